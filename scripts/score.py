"""Have a teacher score the passages of training rows, for a student to be trained towards: docs/training.md.

    python scripts/score.py --teacher path/to/cross-encoder --collection passages.tsv --queries queries.train.tsv \
        --rows rows.jsonl --output scored.jsonl

reads   training rows: .jsonl, [qid, pid, ...] or [qid, [pid, score], ...], whose scores are passed over; or a .tsv of
        ids, qid and pids; each maybe .gz. Rows may have different numbers of passages. The collection and the queries
        that they name, as all stages read them
writes  the same rows in their order as [qid, [pid, score], ...], a line of JSON each; .gz if it is named so

The teacher is a cross-encoder, a ColBERT of any layout, or any encoder, which then compares texts by its own vectors
(--similarity): its files tell which. All rows are looked at before the teacher is loaded. Memory does not grow with the
rows, nor with the collection but for 8 bytes a passage: its texts lie, meanwhile, in a folder beside the output.
A text is embedded once for all rows of 1,024. An encoder takes as long as embedding, a cross-encoder one pass a pair.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanocolbert import cli
from nanocolbert.cli import InputError, maxlen, run_stage
from nanocolbert.progress import progress
from nanocolbert.storage.artifact import (
    beside,
    check_file,
    check_output_file,
    is_device,
    own_folder,
    read_meta,
    replacing,
)
from nanocolbert.storage.documents import kind_of, read_documents
from nanocolbert.storage.ragged import Ids, IdWriter
from nanocolbert.storage.texts import FOLDER as TEXTS_FOLDER
from nanocolbert.storage.texts import Texts, TextWriter
from nanocolbert.storage.training_files import read_id_rows, read_nway_rows
from nanocolbert.storage.tsv import batched, packing

ROWS, PAIRS = 1024, 4096  # handed to the teacher at a time: whichever are fewer
TEXTS = 2000  # stored at a time


# ----------------------------------------------------------------------------------------------------------------- rows


def read_training_rows(path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, [qid, pid, ...]) of each training row. Raises InputError, which names the line."""
    rows = read_nway_rows(path, None) if kind_of(path) == "jsonl" else read_id_rows(path, None, None)
    for row in rows:
        yield row.number, row.ids


def check_rows(path, qids: Ids, pids: Ids, queries, collection) -> tuple[int, int]:
    """How many rows there are, and pairs of a query and a passage. Raises InputError on ids that nothing has."""
    n_rows = n_pairs = 0
    for chunk in batched(read_training_rows(path), TEXTS):
        numbers = [number for number, ids in chunk for _ in ids[1:]]
        wanted = [pid for _, ids in chunk for pid in ids[1:]]
        check_known(path, numbers, wanted, pids, "pid", collection)
        check_known(path, [number for number, _ in chunk], [ids[0] for _, ids in chunk], qids, "qid", queries)
        n_rows, n_pairs = n_rows + len(chunk), n_pairs + len(wanted)
    if not n_rows:
        raise InputError(f"{path}: empty, expected training rows")
    return n_rows, n_pairs


def check_known(path, numbers: list[int], wanted: list[str], known: Ids, kind: str, source) -> None:
    unknown = np.flatnonzero(known.rows(wanted) < 0)
    if len(unknown):
        raise InputError(
            f"{path}:{numbers[unknown[0]]}: {kind} {wanted[unknown[0]]!r} is not in {source}: give the file that these "
            "rows were made from"
        )


def chunked(rows: Iterable[tuple[int, list[str]]]) -> Iterator[list[list[str]]]:
    """Ids of rows, as many at a time as the teacher is given."""
    chunk, n_pairs = [], 0
    for _, ids in rows:
        chunk.append(ids)
        n_pairs += len(ids) - 1
        if len(chunk) == ROWS or n_pairs >= PAIRS:
            yield chunk
            chunk, n_pairs = [], 0
    if chunk:
        yield chunk


# ---------------------------------------------------------------------------------------------------------------- texts


class Stored:
    """Texts by id, memory-mapped, so that any number of them will do; their folder may be unlinked meanwhile."""

    def __init__(self, folder: Path, ids: str):
        self.ids = Ids(folder / ids)
        self.texts = Texts(folder / TEXTS_FOLDER, len(self.ids), has_metadata=False)
        self.texts.check()

    def of(self, ids: list[str]) -> list[str]:
        """The texts of ids that are here."""
        return [self.texts[row] for row in self.ids.rows(ids).tolist()]


def copy_texts(path, what: str, folder: Path) -> Stored:
    """The texts of a file of documents or queries, copied into a new folder. Raises InputError."""
    folder.mkdir()
    ids, texts = IdWriter(folder / "ids.npy"), TextWriter(folder / TEXTS_FOLDER)
    with progress(desc=Path(path).name, unit=" texts", unit_scale=True) as bar:
        for chunk in batched(read_documents(path, what), TEXTS):
            ids.append([document.id for document in chunk])
            texts.append([document.text for document in chunk])
            bar.update(len(chunk))
    ids.close()
    texts.close()
    if not len(texts.texts):
        raise InputError(f"{path}: empty, expected {what}")
    stored = Stored(folder, "ids.npy")
    if repeated := stored.ids.duplicate():
        raise InputError(f"{path}: id {repeated[0]!r} a second time: ids must be unique")
    return stored


def passages_of_tokens(folder) -> Stored:
    """The passages' texts that tsv2mmap.py kept, as it cut them. Raises InputError where it kept none."""
    read_meta(folder, "tokens", "tsv2mmap.py")
    if not (Path(folder) / TEXTS_FOLDER).is_dir():
        raise InputError(f"{folder}: without the passages' texts: run tsv2mmap.py again, with --keep_texts")
    return Stored(Path(folder), "pids.npy")


def store(args) -> tuple[Stored, Stored]:
    """The texts of queries and passages. Their folder is removed at once: what is open stays until we end."""
    output = Path(os.path.realpath(args.output))
    if is_device(output):
        with tempfile.TemporaryDirectory() as folder:
            return store_in(Path(folder), args)
    folder = beside(output, ".texts")
    with own_folder(folder, args.output):
        return store_in(folder, args)


def store_in(folder: Path, args) -> tuple[Stored, Stored]:
    queries = copy_texts(args.queries, "queries: qid, query", folder / "queries")
    if Path(args.collection).is_dir():
        return queries, passages_of_tokens(args.collection)
    return queries, copy_texts(args.collection, "collection: pid, passage", folder / "passages")


# --------------------------------------------------------------------------------------------------------------- scores


def load(args):
    """The teacher that --teacher names. Raises InputError where it is none."""
    from nanocolbert.checkpoints.layouts import is_colbert
    from nanocolbert.training.teachers import LateInteraction, load_teacher

    if not is_colbert(args.teacher):
        return load_teacher(args.teacher, args.similarity, args.max_tokens, args.fp32)
    for flag in ("similarity", "max_tokens"):
        if getattr(args, flag) is not None:
            raise InputError(f"{args.teacher}: a ColBERT, which knows how to compare texts: leave out --{flag}")
    from model import ColBERT

    return LateInteraction(ColBERT.from_pretrained(args.teacher), args.fp32)


def score_chunk(teacher, chunk: list[list[str]], queries: Stored, passages: Stored, done) -> list[str]:
    """A line of JSON for each row of ids; scores to six digits, fp32 having seven."""
    from nanocolbert.training.teachers import score_rows

    rows = [(queries.of(ids[:1])[0], passages.of(ids[1:])) for ids in chunk]
    lines = []
    for (qid, *pids), scores in zip(chunk, score_rows(teacher, rows, done), strict=True):
        pairs = [[pid, float(f"{score:.6g}")] for pid, score in zip(pids, scores.tolist(), strict=True)]
        lines.append(json.dumps([qid, *pairs], ensure_ascii=False) + "\n")
    return lines


def write_scores(path, teacher, rows, n_pairs: int, queries: Stored, passages: Stored) -> None:
    """Score all rows, below a bar, into a file that is there when it is whole."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    show = {"desc": "score", "unit": " pairs", "unit_scale": True}
    with replacing(path) as raw, packing(raw, path) as file, progress(total=n_pairs, **show) as bar:
        n_done = 0
        for chunk in chunked(rows):
            for line in score_chunk(teacher, chunk, queries, passages, bar.update):
                file.write(line.encode())
            n_done += sum(len(ids) - 1 for ids in chunk)
            bar.update(n_done - bar.n)  # a pair that rows share was scored once


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="cross-encoder, ColBERT or encoder: folder, or hub name")
    parser.add_argument(
        "--similarity",
        choices=("mean", "maxsim", "sum"),
        help="of an encoder: cosine of its mean-pooled vectors, MaxSim of all at full width, or both",
    )
    parser.add_argument("--collection", required=True, help="passages: ids and texts; or tsv2mmap.py's tokens folder")
    parser.add_argument("--queries", required=True, help="ids and texts of the training queries")
    parser.add_argument("--rows", required=True, help="training rows: n-way .jsonl, or a .tsv of ids; .gz allowed")
    parser.add_argument("--output", required=True, help="the n-way .jsonl to write, with scores; .gz allowed")
    parser.add_argument(
        "--max_tokens", type=maxlen, help="cut texts to this (default: 256; of a cross-encoder, pairs: 512)"
    )
    parser.add_argument(
        "--fp32",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compute in fp32, also where 16 bits are faster",
    )
    return parser.parse_args()


def main(args) -> dict:
    started = time.time()
    check_output_file(args.output, args.rows, args.collection, args.queries, args.teacher)
    if not check_file(args.rows, "training rows").is_file():
        raise InputError(f"{args.rows}: a pipe, which is read once, and rows are read twice: give a file")
    queries, passages = store(args)
    n_rows, n_pairs = check_rows(args.rows, queries.ids, passages.ids, args.queries, args.collection)
    teacher = load(args)
    write_scores(args.output, teacher, read_training_rows(args.rows), n_pairs, queries, passages)
    seconds = round(time.time() - started, 2)
    return {"output": args.output, "teacher": args.teacher, "rows": n_rows, "pairs": n_pairs, "seconds": seconds}


if __name__ == "__main__":
    run_stage(main, cli.start(parse_args))
