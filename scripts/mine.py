"""Mine the next training file from a run: each query's positives, each beside passages that the run ranks high.

    python scripts/mine.py --run train.run --qrels qrels.train.tsv --output mined.jsonl --ranks 10 100 --negatives 4

reads   a run of the training queries (retrieve.py; a query's lines together), their qrels
writes  n-way JSONL, a row for each judged (query, positive): [qid, pid+, pid1, ..., pidk], or with a teacher
        [qid, [pid+, score], [pid1, score], ...]; tsv2mmap.py --triples reads both; .gz by its name

Negatives are drawn at random from --ranks of the run, as ANCE (Xiong et al., ICLR 2021, section 4) draws them from the
model's own index; no passage that is judged relevant is one. High ranks hold passages that nobody judged and that are
relevant all the same. Three ways drop these false negatives:
  --margin M, --difference D   what scores above M times the positive's score, or less than D below it (TopK-PercPos and
                               TopK-MarginPos of NV-Retriever, Moreira et al. 2024), by the run or by --teacher. A
                               positive that the run has not found scores below all that it has found: it has no row
  --teacher FILE               n-way JSONL with scores (scripts/score.py) of queries' passages: only passages with a
                               score are drawn, and the scores are written
  --answers FILE               passages that hold an answer of the query, word for word, whatever the case (DPR,
                               Karpukhin et al., EMNLP 2020, section 3.2), by their text in --collection
A row with fewer than --negatives is left out, and counted. What is drawn for a row depends on --seed, the query and the
positive, and on what there is to draw from. One query is held in memory at a time, beside the qrels, the teacher's
scores (some 20 bytes a passage) and the answers.
A run of 87,599 queries x 100 passages takes 47 s of one core and 87 MB.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import time
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanocolbert import cli
from nanocolbert.cli import InputError, not_negative_float, positive, positive_float, run_stage, say
from nanocolbert.progress import progress
from nanocolbert.storage.artifact import check_file, check_output_file, replacing
from nanocolbert.storage.cutting import CJK
from nanocolbert.storage.documents import as_json, kind_of, parse_record, read_documents
from nanocolbert.storage.ragged import Ids, IdWriter, Ragged, RaggedWriter
from nanocolbert.storage.runs import read_qrels, read_rankings
from nanocolbert.storage.training_files import read_nway_rows
from nanocolbert.storage.tsv import HEADERS, PASSAGE_IDS, QUERY_IDS, batched, packing, read_lines

ANSWERS = ("answers", "answer")
WORD = re.compile(rf"[{CJK}]|[^\W{CJK}]+")  # one character where words are written without spaces
CHUNK = 2000  # passages handled at a time


class Teacher:
    """A teacher's scores of queries' passages, held as bytes: some 20 a passage."""

    def __init__(self, path):
        """Read n-way JSONL. Raises InputError where it has no scores."""
        self.of: dict[str, tuple[str, array]] = {}
        for number, (qid, *pids), scores in progress(read_nway_rows(path, None), desc=path.name):
            if scores is None:
                raise InputError(f"{path}:{number}: no scores: give what scripts/score.py wrote")
            known = self.scores(qid)
            known.update(zip(pids, scores, strict=True))  # a query has a row for each of its positives
            self.of[qid] = "\n".join(known), array("d", known.values())

    def scores(self, qid: str) -> dict[str, float]:
        """{pid: score} of a query; empty where it has none."""
        pids, scores = self.of.get(qid, ("", ()))
        return dict(zip(pids.split("\n"), scores, strict=True)) if scores else {}


class Answers:
    """Which passages hold an answer of a query: texts as their words alone, on disk, passages' and answers' alike."""

    def __init__(self, path, collection, folder: Path):
        """folder: where to put the passages. Raises InputError."""
        self.path, self.collection, self.of = path, collection, read_answers(path)
        texts, ids = RaggedWriter(folder / "texts", np.uint8), IdWriter(folder / "pids.npy")
        passages = progress(read_documents(collection, "collection: pid, passage"), desc=collection.name)
        for chunk in batched(passages, CHUNK):
            encoded = [as_words(passage.text).encode() for passage in chunk]
            texts.append(np.frombuffer(b"".join(encoded), np.uint8), np.array(list(map(len, encoded))))
            ids.append([passage.id for passage in chunk])
        texts.close()
        ids.close()
        self.texts, self.ids = Ragged(folder / "texts"), Ids(folder / "pids.npy")

    def held_by(self, qid: str, pids: list[str]) -> Iterator[bool]:
        """Whether each passage holds an answer. Raises InputError on a pid that is not in the collection."""
        answers = [answer.encode() for answer in self.of.get(qid, ())]
        rows = self.ids.rows(pids)
        for pid, row in zip(pids, rows.tolist(), strict=True):
            if row < 0:
                raise InputError(f"{self.collection}: pid {pid!r} of the run is not in it: give the run's collection")
            text = self.texts[row].tobytes()
            yield any(answer in text for answer in answers)


def as_words(text: str) -> str:
    """A text's words in lower case, each between spaces, so that a part of a word is not found: " the 2 boats "."""
    return f" {' '.join(WORD.findall(unicodedata.normalize('NFKC', text).casefold()))} "


def read_answers(path) -> dict[str, list[str]]:
    """{qid: answers, as words} from JSONL (a query's id; "answers": strings) or lines of qid, answer, ... (tabs).

    Lines of one query add up. Raises InputError, which names the line, on what cannot be used.
    """
    found, is_jsonl = {}, kind_of(path) == "jsonl"
    for number, line in read_lines(path, "answers"):
        if not is_jsonl:
            qid, *answers = line.split("\t")
            if number == 1 and qid.lower() in HEADERS:
                continue
        elif not line or line.isspace():
            continue
        else:
            qid, answers = parse_answers(path, number, parse_record(path, number, line))
        if not answers:
            raise InputError(f"{path}:{number}: no answer: give qid and answers, separated by tabs")
        words = filter(str.strip, map(as_words, answers))  # of one without a letter or a digit nothing is left
        found.setdefault(qid, []).extend(words)
    if not found:
        raise InputError(f"{path}: empty, expected answers: qid, answer")
    return found


def parse_answers(path, number: int, record: dict) -> tuple[str, list[str]]:
    """(qid, answers) of an object. Raises InputError where it has none; an empty list is fine."""
    qid = next((record[name] for name in (*QUERY_IDS, *PASSAGE_IDS) if name in record), None)
    answers = next((record[name] for name in ANSWERS if name in record), None)
    answers = answers.get("text") if isinstance(answers, dict) else answers  # as SQuAD has it
    answers = [answers] if isinstance(answers, str) else answers
    is_id = isinstance(qid, str | int) and not isinstance(qid, bool)
    if not is_id or not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise InputError(f'{path}:{number}: {as_json(record)}: give {{"qid": ..., "answers": ["...", ...]}}')
    return str(qid), answers or [""]


def limit(score: float, margin: float | None, difference: float | None) -> float:
    """The highest score a negative may have beside a positive's; a margin below 1 is below a negative score, too."""
    limits = [np.inf]
    if margin is not None:
        limits.append(score * (margin if score >= 0 else 2 - margin))
    if difference is not None:
        limits.append(score - difference)
    return min(limits)


def mine(args, qrels, teacher: Teacher | None, answers: Answers | None, counts: Counter) -> Iterator[list]:
    """Yield the rows of all judged queries of a run, in its order, and count what is left out."""
    first, last = args.ranks
    rankings = progress(read_rankings(args.run), desc=args.run.name, unit=" queries")
    has_limit = args.margin is not None or args.difference is not None
    ranked = set()
    for qid, pids, scores in rankings:
        judged = qrels.get(qid)
        if judged is None:
            counts["queries_without_judgment"] += 1
            continue
        ranked.add(qid)
        if has_limit and not teacher and scores is None:
            raise InputError(
                f"{args.run}: no scores in it, by which --margin or --difference drops: give a TREC run, or --teacher"
            )
        known = teacher.scores(qid) if teacher else dict(zip(pids, scores or [0.0] * len(pids), strict=True))
        pool = [pid for pid in pids[first - 1 : last] if judged.get(pid, 0) < 1]
        scored = [pid for pid in pool if pid in known]
        counts["passages_without_score"] += len(pool) - len(scored)
        for pid in [pid for pid, relevance in judged.items() if relevance >= args.rel]:
            if pid not in known and (teacher or has_limit):
                counts["positives_without_score"] += 1
                continue
            most = limit(known[pid], args.margin, args.difference) if has_limit else np.inf
            below = [other for other in scored if known[other] <= most]
            counts["negatives_by_score"] += len(scored) - len(below)
            row = draw(args, qid, pid, below, answers, counts)
            if row:
                yield [row[0], *([one, known[one]] for one in row[1:])] if teacher else row
    counts["judged_queries_without_ranking"] = len(qrels.keys() - ranked)


def draw(args, qid: str, pid: str, pool: list[str], answers: Answers | None, counts: Counter) -> list[str] | None:
    """[qid, positive, negatives ...], drawn from the pool; None where too few are left in it."""
    pool = random.Random(f"{args.seed} {qid} {pid}").sample(pool, len(pool))
    if answers:
        kept = []
        counts["rows_without_answer"] += not answers.of.get(qid)
        for other, held in zip(pool, answers.held_by(qid, pool), strict=True):
            counts["negatives_by_answer"] += held
            kept += [] if held else [other]
            if len(kept) == args.negatives:
                break
        pool = kept
    if len(pool) < args.negatives:
        counts["positives_with_too_few"] += 1
        return None
    return [qid, pid, *pool[: args.negatives]]


NOTES = {  # of what is left out
    "queries_without_judgment": "queries of the run are not judged",
    "judged_queries_without_ranking": "judged queries are not in the run",
    "positives_without_score": "positives have no score, so no row",
    "passages_without_score": "passages of these ranks have no score of the teacher's",
    "positives_with_too_few": "positives have too few passages to draw from, so no row",
    "negatives_by_score": "passages scored too near a positive, or above it",
    "negatives_by_answer": "passages that were drawn held an answer",
    "rows_without_answer": "positives are of queries without an answer: passages were not looked through",
}


def noted(counts: Counter) -> list[str]:
    """What is left out, in words."""
    return [f"{counts[key]} {note}" for key, note in NOTES.items() if counts[key]]


def write_rows(path, rows: Iterator[list], counts: Counter) -> None:
    """Write rows as lines of JSON, and count them; the file appears when whole. Raises InputError if there are none."""
    with replacing(path) as raw, packing(raw, path) as file:
        for row in rows:
            file.write(json.dumps(row).encode() + b"\n")
            counts["rows"] += 1
        if not counts["rows"]:
            reasons = "; ".join(noted(counts)) or "nothing is judged relevant"
            raise InputError(
                f"{path}: no row to write: {reasons}: give --run and --qrels of the same queries, wider --ranks or "
                "fewer --negatives"
            )


def check_args(args) -> None:
    """Raise InputError on flags that do not fit, on files that are missing, and where the output would replace one."""
    inputs = [args.run, args.qrels, args.teacher, args.answers, args.collection]
    for path in filter(None, inputs):
        check_file(path, "input of mine.py")
    check_output_file(args.output, *inputs)
    first, last = args.ranks
    if last - first + 1 < args.negatives:
        raise InputError(f"--ranks {first} {last}: not as many as --negatives {args.negatives}: give a later last rank")
    if bool(args.answers) != bool(args.collection):
        raise InputError("--answers and --collection: give both, or none")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run of the training queries, TREC or MS MARCO format")
    parser.add_argument("--qrels", type=Path, required=True, help="judgments of the training queries")
    parser.add_argument("--output", type=Path, required=True, help="n-way JSONL to write; maybe .gz")
    parser.add_argument("--rel", type=positive, default=1, help="lowest relevance of a positive (default 1)")
    parser.add_argument(
        "--ranks",
        type=positive,
        nargs=2,
        default=[10, 100],
        metavar=("FIRST", "LAST"),
        help="ranks of the run to draw from, counted from 1 (default 10 100)",
    )
    parser.add_argument("--negatives", type=positive, default=4, help="of each row (default 4)")
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the draw (default 0)")
    group = parser.add_argument_group("false negatives")
    group.add_argument(
        "--margin", type=positive_float, help="drop what scores above M times the positive, such as 0.95"
    )
    group.add_argument("--difference", type=not_negative_float, help="drop what scores less than D below the positive")
    group.add_argument("--teacher", type=Path, help="n-way JSONL with scores, to drop by and to write")
    group.add_argument("--answers", type=Path, help='answers of the queries: qid, answer, ...; or JSONL, "answers"')
    group.add_argument("--collection", type=Path, help="the run's passages, which may hold --answers")
    return parser.parse_args()


def main(args):
    started, counts = time.time(), Counter()
    check_args(args)
    qrels = read_qrels(args.qrels)
    teacher = Teacher(args.teacher) if args.teacher else None
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        answers = Answers(args.answers, args.collection, Path(folder)) if args.answers else None
        write_rows(args.output, mine(args, qrels, teacher, answers, counts), counts)
    for line in noted(counts):
        say(f"note: {line}")
    seconds = round(time.time() - started, 2)
    return {"output": str(args.output), **{key: counts[key] for key in ("rows", *NOTES)}, "seconds": seconds}


if __name__ == "__main__":
    run_stage(main, cli.start(parse_args))
