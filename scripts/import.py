"""Bring a collection with its queries and judgments here: a folder of BEIR's, or a data set of ir_datasets.

    python scripts/import.py beir scifact --output_dir data/scifact                      # --split train, dev
    python scripts/import.py ir_datasets cranfield --output_dir data/cranfield           # pip install ir_datasets

reads   FOLDER/corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv; or whatever ir_datasets has, or downloads, of NAME
writes  OUT/collection.jsonl (_id, title, text and other fields), queries.tsv (qid, query), qrels.tsv (qid, 0, pid,
        relevance) and, where passages were scored for each query, candidates.tsv (qid, pid), for retrieve.py

Of BEIR's queries those are kept that the split judges. All is read as a stream.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanocolbert import cli
from nanocolbert.cli import InputError, first_line, run_stage
from nanocolbert.progress import progress
from nanocolbert.storage.artifact import check_file, check_output_dir, fingerprint, publish, write_meta
from nanocolbert.storage.documents import read_documents
from nanocolbert.storage.runs import read_qrels
from nanocolbert.storage.tsv import check_id

LONGEST = 1000  # characters of a field, as JSON, that is taken along beside the text

# -------------------------------------------------------------------------------------------------------------- writing


def write_lines(path: Path, lines: Iterable[str]) -> int:
    """Write lines as they come, below a bar; returns how many."""
    n = 0
    with open(path, "wb") as file:
        for line in progress(lines, desc=path.stem, unit=" lines", unit_scale=True):
            file.write(line.encode(errors="replace") + b"\n")
            n += 1
    return n


def write_collection(path: Path, records: Iterable[dict]) -> int:
    return write_lines(path, (json.dumps(record, ensure_ascii=False) for record in records))


def write_rows(path: Path, rows: Iterable[tuple]) -> int:
    """Tab-separated; white space within a field is one space each."""
    return write_lines(path, ("\t".join(" ".join(str(field).split()) for field in row) for row in rows))


def make_record(identifier: str, title: str, text: str, more: dict) -> dict:
    record = {"_id": identifier, **({"title": title} if title else {}), "text": text}
    return {**record, **{name: value for name, value in more.items() if name not in record}}


# ----------------------------------------------------------------------------------------------------------------- BEIR


def import_beir(source: Path, split: str, folder: Path) -> dict[str, int]:
    """Write a split of a BEIR folder; returns the counts. Raises InputError where it is none, or has no such split."""
    corpus, queries = (find(source, name) for name in ("corpus", "queries"))
    if not (source / "qrels" / f"{split}.tsv").is_file():
        splits = ", ".join(sorted(path.stem for path in (source / "qrels").glob("*.tsv"))) or "none"
        raise InputError(f"{source / 'qrels'}: no {split}.tsv (splits: {splits}): give --split another name")
    qrels = read_qrels(source / "qrels" / f"{split}.tsv")
    missing = {pid for judged in qrels.values() for pid in judged}

    def records() -> Iterator[dict]:
        for document in read_documents(corpus, "collection: BEIR's corpus.jsonl"):
            missing.discard(document.id)
            text = document.text[len(document.title) + 1 :] if document.title else document.text
            yield make_record(document.id, document.title, text, document.metadata or {})

    judged = (query for query in read_documents(queries, "queries: BEIR's queries.jsonl") if query.id in qrels)
    counts = {
        "documents": write_collection(folder / "collection.jsonl", records()),
        "queries": write_rows(folder / "queries.tsv", ((query.id, query.text) for query in judged)),
        "judgments": write_rows(
            folder / "qrels.tsv",
            ((qid, 0, pid, relevance) for qid, found in qrels.items() for pid, relevance in found.items()),
        ),
    }
    if counts["queries"] != len(qrels):
        raise InputError(f"{queries}: has {counts['queries']} of the {len(qrels)} queries that {split}.tsv judges")
    if missing:
        cli.say(f"note: {len(missing)} judged documents are not in {corpus}, {min(missing)} among them")
    return counts


def find(source: Path, name: str) -> Path:
    path = source / f"{name}.jsonl.gz"
    return path if path.is_file() else check_file(source / f"{name}.jsonl", "of a BEIR folder")


# ---------------------------------------------------------------------------------------------------------- ir_datasets


def load_dataset(name: str):
    """A data set of ir_datasets. Raises InputError where there is none of this name, or it has no documents."""
    try:
        import ir_datasets
    except ImportError:
        raise InputError("ir_datasets is not installed: pip install ir_datasets") from None
    try:
        dataset = ir_datasets.load(name)
    except KeyError:
        raise InputError(f"{name}: no data set of ir_datasets: see its catalogue for names") from None
    if not dataset.has_docs():
        raise InputError(f"{name}: has no documents: give the data set that has")
    return dataset


def items(name: str, what: str, iterator: Iterator) -> Iterator:
    """What ir_datasets yields. Raises InputError for its own errors, as where nothing can be downloaded."""
    try:
        yield from iterator
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise InputError(f"ir_datasets {name}: its {what} cannot be read ({first_line(error)})") from None


def text_of(item) -> str:
    """What a document or a query says by default, or all its texts."""
    if hasattr(item, "default_text"):
        return item.default_text()
    texts = [value for name, value in item._asdict().items() if isinstance(value, str) and not name.endswith("_id")]
    return " ".join(filter(None, texts))


def record_of(name: str, number: int, document) -> dict:
    """A document as JSON: its title apart if its text begins with it, short other fields that are not in the text."""
    check_id(f"{name}: document", number, document.doc_id)
    text, title = text_of(document), getattr(document, "title", None)
    if isinstance(title, str) and text.startswith(f"{title} "):
        text = text[len(title) + 1 :]
    else:
        title = ""
    more = {}
    for field, value in document._asdict().items():
        if field in ("doc_id", "title") or (isinstance(value, str) and value in text):
            continue
        if value is not None and is_short(value):
            more[field] = value
    return make_record(document.doc_id, title if title.strip() else "", text, more)


def is_short(value) -> bool:
    """Whether JSON can hold it, shortly."""
    try:
        return len(json.dumps(value, allow_nan=False)) <= LONGEST
    except (TypeError, ValueError):  # bytes; NaN
        return False


def best_grades(name: str, qrels) -> dict[tuple[str, str], int]:
    """{(qid, pid): relevance}, the highest where a pair was judged more than once, as for several aspects."""
    grades, n = {}, 0
    for qrel in items(name, "judgments", qrels):
        if not hasattr(qrel, "relevance"):
            raise InputError(f"{name}: judgments without relevance ({', '.join(qrel._fields)}), which are not read")
        pair = (qrel.query_id, qrel.doc_id)
        n += 1
        grades[pair] = max(int(qrel.relevance), grades.get(pair, int(qrel.relevance)))
    if n > len(grades):
        cli.say(f"note: {n - len(grades)} judgments are of a pair that was judged before: the highest is taken")
    return grades


def import_ir_dataset(name: str, dataset, folder: Path) -> dict[str, int]:
    """Write a data set of ir_datasets, as much as there is of it; returns the counts."""
    documents = enumerate(items(name, "documents", dataset.docs_iter()), 1)
    records = (record_of(name, number, document) for number, document in documents)
    counts = {"documents": write_collection(folder / "collection.jsonl", records)}
    if dataset.has_queries():
        queries = enumerate(items(name, "queries", dataset.queries_iter()), 1)
        rows = ((checked(name, "query", number, query.query_id), text_of(query)) for number, query in queries)
        counts["queries"] = write_rows(folder / "queries.tsv", rows)
    if dataset.has_qrels():
        grades = best_grades(name, dataset.qrels_iter())
        rows = ((qid, 0, pid, relevance) for (qid, pid), relevance in grades.items())
        counts["judgments"] = write_rows(folder / "qrels.tsv", rows)
    if dataset.has_scoreddocs():
        scored = items(name, "scored documents", dataset.scoreddocs_iter())
        rows = ((found.query_id, found.doc_id) for found in scored)
        counts["candidates"] = write_rows(folder / "candidates.tsv", rows)
    return counts


def checked(name: str, what: str, number: int, identifier: str) -> str:
    check_id(f"{name}: {what}", number, identifier)
    return identifier


# ----------------------------------------------------------------------------------------------------------------- main


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = parser.add_subparsers(dest="source", required=True, metavar="{beir,ir_datasets}")
    beir = sources.add_parser("beir", help="a folder as BEIR has it: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv")
    beir.add_argument("folder", type=Path, help="the folder")
    beir.add_argument("--split", default="test", help="qrels to take, and the queries that they judge (default: test)")
    ir_datasets = sources.add_parser("ir_datasets", help="a data set of ir_datasets, which is to be installed")
    ir_datasets.add_argument("name", help="its name, e.g. cranfield or beir/scifact/test")
    for source in (beir, ir_datasets):
        source.add_argument("--output_dir", type=Path, required=True, help="the folder to write")
    return parser.parse_args()


def main(args):
    started = time.time()
    check_output_dir(args.output_dir, "collection", args.folder if args.source == "beir" else None)
    dataset = None if args.source == "beir" else load_dataset(args.name)
    with publish(args.output_dir) as folder:
        if dataset is None:
            counts = import_beir(args.folder, args.split, folder)
        else:
            counts = import_ir_dataset(args.name, dataset, folder)
        if not counts["documents"]:
            raise InputError(f"{args.name if dataset else args.folder}: no documents")
        made_from = fingerprint(*sorted(folder.iterdir()))
        meta = write_meta(folder, "collection", made_from, started, args, counts=counts)
    return {"output_dir": str(args.output_dir), **counts, "seconds": meta["seconds"]}


if __name__ == "__main__":
    run_stage(main, cli.start(parse_args))
