"""Measure a run against judgments, and against another run.

Reads qrels and runs (TREC or MS MARCO format, see runs.py); writes the measures as JSON if asked to.

    python evaluate.py --qrels data/msmarco/qrels.dev.small.tsv --run run.tsv --output metrics.json
    python evaluate.py --qrels qrels.dl19.tsv --run run.tsv --rel 2 --compare bm25.tsv

A mean is over all queries of the qrels: one without a ranking counts 0, as in MS MARCO's script and in `trec_eval -c`,
and so does one without a relevant passage. Queries that the qrels do not know are left out. Notes on stderr count all
three.
A person, on a terminal, is given a table; a program, whose pipe or file stdout is, the same as one line of JSON
(--json and --no-json choose).
Where documents were cut to passages (tsv2mmap.py --passage_words) and are judged as a whole: --by_document.
TREC Deep Learning judges on a scale of 0 to 3 and takes 2 and 3 as relevant: --rel 2. nDCG uses the grades either way.

Cost: a run of 6,980 queries × 1,000 passages takes 20 s of one core and 2 GB.
"""

import argparse
import sys
from pathlib import Path

from nanocolbert.cli import InputError, catch_signals, positive, run_stage

if __name__ == "__main__":  # before the imports that take a second
    catch_signals()

import numpy as np

from nanocolbert.storage.artifact import check_output_file, write_json
from nanocolbert.storage.runs import MEASURES, by_document, means, measure_queries, parse_measures, read_qrels, read_run

N_RANDOMISATIONS = 10_000


def check_queries(qrels, run, path, relevant_from: int) -> dict:
    """Count the queries that a reader of the means should know about. Raises InputError if none is in both files."""
    ranked = qrels.keys() & run.keys()
    if not ranked:
        raise InputError(
            f"{path}: none of its {len(run)} queries is judged (it has {next(iter(run))}, the qrels have "
            f"{next(iter(qrels))}): give the qrels of the same queries"
        )
    return {
        "judged_queries": len(qrels),
        "judged_queries_without_ranking": len(qrels) - len(ranked),
        "judged_queries_without_relevant": sum(max(judged.values()) < relevant_from for judged in qrels.values()),
        "unjudged_queries": len(run) - len(ranked),
        "passages_of_deepest_ranking": max(len(run[qid]) for qid in ranked),
    }


def print_notes(path, counts: dict, measures: dict, relevant_from: int) -> None:
    """Say on stderr what the means leave out or count as 0."""
    notes = {
        "judged_queries_without_ranking": "judged queries have no ranking and count 0",
        "judged_queries_without_relevant": f"judged queries have nothing of relevance >= {relevant_from} and count 0",
        "unjudged_queries": "queries are not judged and are left out",
    }
    for key, note in notes.items():
        if counts[key]:
            print(f"note: {path}: {counts[key]} {note}", file=sys.stderr)
    depth = counts["passages_of_deepest_ranking"]
    shallow = [name for name, measure in measures.items() if measure.params.get("cutoff", 0) > depth]
    if shallow:
        print(
            f"note: {path}: no ranking goes beyond rank {depth}, so neither does {', '.join(shallow)}", file=sys.stderr
        )


def measure_file(path, qrels, measures: dict, relevant_from: int, of_documents: bool = False) -> tuple[dict, dict]:
    """(counts of queries, {measure: {qid: value}}) of a run file; the run itself, which can be large, is let go."""
    run = by_document(read_run(path)) if of_documents else read_run(path)
    counts = check_queries(qrels, run, path, relevant_from)
    print_notes(path, counts, measures, relevant_from)
    return counts, measure_queries(qrels, run, measures, relevant_from)


def randomisation_test(differences, n_randomisations: int = N_RANDOMISATIONS, seed: int = 0) -> np.ndarray:
    """Two-sided p-value of each column of paired differences (queries, measures), by flipping signs at random.

    Fisher's test, for the hypothesis that the two runs are exchangeable within each query: it asks for no normality and
    holds for a few queries too (Smucker, Allan and Carterette, CIKM 2007). The observed signs count as one flip.
    """
    rng = np.random.default_rng(seed)
    n_queries = len(differences)
    observed = np.abs(differences.sum(0)) * (1 - 1e-9)  # (measures,) as large as observed, but for rounding
    exceeding = np.zeros(differences.shape[1])
    for start in range(0, n_randomisations, 500):
        n_flips = min(500, n_randomisations - start)
        signs = rng.integers(0, 2, (n_flips, n_queries), dtype=np.int8) * 2.0 - 1  # (n_flips, queries)
        exceeding += (np.abs(signs @ differences) >= observed).sum(0)
    return (1 + exceeding) / (1 + n_randomisations)


def compare(values: dict, other: dict, show: int) -> dict:
    """What changed from the run of `other` to that of `values` ({measure: {qid: value}}), per measure and per query."""
    names, qids = list(values), list(next(iter(values.values())))
    ours = np.array([[values[name][qid] for name in names] for qid in qids])  # (queries, measures)
    theirs = np.array([[other[name][qid] for name in names] for qid in qids])
    differences = ours - theirs
    p_values = randomisation_test(differences)
    by_measure = {}
    for i, name in enumerate(names):
        by_measure[name] = {
            "other": float(theirs[:, i].mean()),
            "difference": float(differences[:, i].mean()),
            "p": float(p_values[i]),
            "queries_better": int((differences[:, i] > 0).sum()),
            "queries_worse": int((differences[:, i] < 0).sum()),
        }
    by_query = differences[:, 0]
    most = [i for i in np.argsort(-np.abs(by_query), kind="stable")[:show] if by_query[i]]
    changed = [{"qid": qids[i], "other": float(theirs[i, 0]), "run": float(ours[i, 0])} for i in most]
    return {"measures": by_measure, "changed": changed}


def print_table(title: str, means_of_run: dict, comparison: dict | None) -> None:
    print(title)
    if comparison is None:
        for name, value in means_of_run.items():
            print(f"{name:<16} {value:.4f}")
        return
    print(f"{'':<16} {'run':>7} {'other':>7} {'change':>8} {'p':>7} {'better':>7} {'worse':>7}")
    for name, row in comparison["measures"].items():
        print(
            f"{name:<16} {means_of_run[name]:7.4f} {row['other']:7.4f} {row['difference']:+8.4f} {row['p']:7.4f} "
            f"{row['queries_better']:7} {row['queries_worse']:7}"
        )
    if comparison["changed"]:
        print(f"queries whose {next(iter(means_of_run))} changed most (qid, other, run)")
        for row in comparison["changed"]:
            print(f"  {row['qid']:<14} {row['other']:.4f} {row['run']:.4f}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qrels", required=True, help="judgments: qid, 0, pid, relevance (or BEIR's); .gz allowed")
    parser.add_argument("--run", required=True, help="run file, TREC or MS MARCO format; .gz allowed")
    parser.add_argument(
        "--output", default=None, help="write the measures to this JSON file (default: only print them)"
    )
    parser.add_argument(
        "--json",
        action=argparse.BooleanOptionalAction,
        help="print one line of JSON, or a table (default: JSON unless on a terminal)",
    )
    # what is measured
    parser.add_argument("--measures", nargs="+", default=list(MEASURES), metavar="M", help="names of ir_measures")
    parser.add_argument("--rel", type=positive, default=1, help="lowest relevance that counts as relevant (default: 1)")
    parser.add_argument(
        "--by_document",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="rank documents, each by its best passage: doc#2 counts as doc",
    )
    # another run
    parser.add_argument("--compare", default=None, metavar="OTHER_RUN", help="run to compare with, by a paired test")
    parser.add_argument(
        "--show", type=positive, default=10, help="with --compare: changed queries to list (default: 10)"
    )
    return parser.parse_args()


def main(args) -> dict | None:
    if args.output is not None:
        check_output_file(args.output, args.qrels, args.run, args.compare)
    measures = parse_measures(args.measures, args.rel)
    qrels = read_qrels(args.qrels)
    counts, values = measure_file(args.run, qrels, measures, args.rel, args.by_document)
    result = {
        "qrels": args.qrels,
        "run": args.run,
        "rel": args.rel,
        "by_document": args.by_document,
        **counts,
        **means(values),
    }
    comparison = None
    if args.compare is not None:
        other_counts, other_values = measure_file(args.compare, qrels, measures, args.rel, args.by_document)
        comparison = {"run": args.compare, **other_counts, **compare(values, other_values, args.show)}
        result["compare"] = comparison
    if args.output is not None:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, result)
    if args.json or (args.json is None and not sys.stdout.isatty()):
        return result
    print_table(f"{args.run}: {counts['judged_queries']} judged queries", means(values), comparison)
    return None


if __name__ == "__main__":
    run_stage(main, parse_args())
