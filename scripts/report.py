"""Print what a pipeline run came to: a table of systems, and one query with the passages that it found.

python scripts/report.py BM25=bm25.json ColBERT=colbert.json          # files that evaluate.py --output wrote
python scripts/report.py --show_run run.tsv --collection F --queries F [--qrels F] [--qid Q]
"""

import argparse
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanocolbert.cli import InputError, run_stage, start
from nanocolbert.storage.artifact import read_json
from nanocolbert.storage.cutting import document_of
from nanocolbert.storage.documents import read_documents, read_queries
from nanocolbert.storage.runs import read_qrels, read_run

COLUMNS = ("MRR@10", "Recall@50", "Recall@100", "Recall@200", "Recall@1000", "nDCG@10")  # those that a system has


def read_metrics(pair: str) -> tuple[str, dict[str, float]]:
    """(system, {measure: value}) of `name=metrics.json`. Raises InputError where it is something else."""
    name, _, path = pair.partition("=")
    if not path:
        raise InputError(f"{pair}: give name=metrics.json")
    try:
        metrics = read_json(path, "run evaluate.py --output")
        return name, {measure: metrics[measure] for measure in COLUMNS if measure in metrics}
    except TypeError:
        raise InputError(f"{path}: not what evaluate.py --output writes: run it again") from None


def print_table(systems: list[tuple[str, dict[str, float]]]) -> None:
    columns = [column for column in COLUMNS if any(column in metrics for _, metrics in systems)]
    print(" " * 24, *(f"{column:>11}" for column in columns))
    for name, metrics in systems:
        values = (f"{metrics[column]:11.4f}" if column in metrics else f"{'–':>11}" for column in columns)
        print(f"{name:<24}", *values)


def print_search(args) -> None:
    """Print a query and its three best passages, those that the qrels call relevant marked with a star."""
    queries, run = read_queries(args.queries), read_run(args.show_run)
    qrels = read_qrels(args.qrels) if args.qrels else {}
    ranked = [qid for qid in queries if run.get(qid)]
    answered = (qid for qid in ranked if any(grade(qrels.get(qid, {}), pid) > 0 for pid in best(run[qid])))
    qid = args.qid or next(answered, ranked[0] if ranked else None)
    if qid not in queries or not run.get(qid):
        raise InputError(f"{args.show_run}: no ranking for query {qid!r} of {args.queries}: give --qid of one it has")
    top = best(run[qid])
    wanted = {*top, *map(document_of, top)}  # a passage that a document was cut to shows the document
    texts = {
        read.id: read.text for read in read_documents(args.collection, "collection: pid, passage") if read.id in wanted
    }
    passages = {pid: texts.get(pid, texts.get(document_of(pid))) for pid in top}
    if missing := {pid for pid in top if passages[pid] is None}:
        raise InputError(f"{args.collection}: has no passage {min(missing)}: give the collection that was searched")
    relevant = qrels.get(qid, {})
    print(f"\n{qid}: {queries[qid]}")
    for rank, pid in enumerate(top, 1):
        text = textwrap.shorten(f"{rank}. {pid}: {passages[pid]}", 400, placeholder=" …")
        print(textwrap.fill(("*" if grade(relevant, pid) > 0 else " ") + text, 110, subsequent_indent="    "))


def grade(judged: dict[str, int], pid: str) -> int:
    """The relevance of a passage or, where that is not judged, of its document."""
    return judged.get(pid, judged.get(document_of(pid), 0))


def best(ranking: dict[str, float]) -> list[str]:
    """The three passages with the highest scores."""
    return sorted(ranking, key=ranking.get, reverse=True)[:3]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", nargs="*", help="systems of the table: name=metrics.json")
    parser.add_argument("--show_run", help="run file to show a query of")
    parser.add_argument("--collection", help="with --show_run: pid, passage")
    parser.add_argument("--queries", help="with --show_run: qid, query")
    parser.add_argument("--qrels", help="with --show_run: mark relevant passages with a star")
    parser.add_argument("--qid", help="the query to show (default: the first that is answered in its three best)")
    return parser.parse_args()


def main(args) -> None:
    if args.show_run and not (args.collection and args.queries):
        raise InputError("--show_run needs --collection and --queries")
    if args.metrics:
        print_table([read_metrics(pair) for pair in args.metrics])
    if args.show_run:
        print_search(args)


if __name__ == "__main__":
    run_stage(main, start(parse_args))
