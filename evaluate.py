"""Measure a run against judgments, and against another run; or several runs, of several seeds each.

Reads qrels and runs (TREC or MS MARCO format, see runs.py); writes the measures as JSON if asked to.

    python evaluate.py --qrels data/msmarco/qrels.dev.small.tsv --run run.tsv --output metrics.json
    python evaluate.py --qrels qrels.dl19.tsv --run run.tsv --rel 2 --compare bm25.tsv
    python evaluate.py --qrels qrels.tsv --run BM25=bm25.tsv v1=v1.0.run,v1.1.run kl={kl.0.run,kl.1.run} --compare BM25

A mean is over all queries of the qrels: one without a ranking counts 0, as in MS MARCO's script and in `trec_eval -c`,
and so does one without a relevant passage. Queries that the qrels do not know are left out. Notes on stderr count all
three.
A person, on a terminal, is given a table; a program, whose pipe or file stdout is, the same as one line of JSON
(--json and --no-json choose).
Several runs are methods: a path, or NAME=PATH. Paths with commas between them, or a NAME given again (as bash makes of
NAME={a,b}), are one method's runs, of several seeds: mean, lowest and highest are shown, and what is tested against
--compare is the mean of each query. A p-value is of one test: among twenty, one is below 0.05 by chance.
Where documents were cut to passages (tsv2mmap.py --passage_words) and are judged as a whole: --by_document.
TREC Deep Learning judges on a scale of 0 to 3 and takes 2 and 3 as relevant: --rel 2. nDCG uses the grades either way.

Cost: a run of 6,980 queries × 1,000 passages takes 20 s of one core and 2 GB.
"""

import argparse
import os
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


# --------------------------------------------------------------------------------------------------------- several runs


def parse_run(given: str) -> tuple[str, list[str]]:
    """(name, paths) of PATH, NAME=PATH or NAME=PATH,PATH,...; what is there as a file is a path. Raises InputError."""
    if os.path.exists(given) or "=" not in given:
        return given, [given]
    name, _, rest = given.partition("=")
    paths = [rest] if os.path.exists(rest) else rest.split(",")
    if not name or not all(paths):
        raise InputError(f"{given}: give NAME=PATH, or NAME=PATH,PATH,... of several seeds")
    return name, paths


def parse_runs(given: list[str]) -> dict[str, list[str]]:
    """{name: paths of its runs}, as `parse_run` has each. Raises InputError where a method has one of them twice."""
    methods = {}
    for name, paths in map(parse_run, given):
        methods.setdefault(name, []).extend(paths)
    for name, paths in methods.items():
        twice = [path for i, path in enumerate(paths) if path in paths[:i]]
        if twice:
            raise InputError(f"{twice[0]}: a second time{'' if name == twice[0] else f' for {name}'}: give it once")
    return methods


def methods_of(given: list[str], other: str | None) -> tuple[dict[str, list[str]], str | None]:
    """({name: paths} of what --run and --compare were given, the base first; the base's name). Raises InputError."""
    methods = parse_runs(given)
    if other is None or other in methods:
        return methods, other
    base, paths = next(iter(parse_runs([other]).items()))
    if base in methods:
        raise InputError(f"{other}: {base} is a --run already: give --compare {base}, or another name")
    return {base: paths, **methods}, base


def average(parts: list[dict]) -> dict:
    """{measure: {qid: mean over the parts}} of what `measure_queries` gave for each of a method's runs."""
    return {
        name: {qid: sum(part[name][qid] for part in parts) / len(parts) for qid in by_query}
        for name, by_query in parts[0].items()
    }


def measure_method(paths: list[str], *how) -> tuple[dict, dict]:
    """(measures of a method's runs and what they come to, the mean of each query) of its files; how: `measure_file`."""
    files, parts = [], []
    for path in paths:
        counts, values = measure_file(path, *how)
        files.append({"run": path, **counts, **means(values)})
        parts.append(values)
    values = average(parts)
    found = {"mean": means(values)}
    for what, of in (("lowest", min), ("highest", max)):
        found[what] = {name: of(file[name] for file in files) for name in values}
    return {**found, "runs": files}, values


def several_runs(args, methods: dict[str, list[str]], base: str | None, *how) -> dict:
    """Measures of methods, {name: paths}; with a base, the name of one, what changed from it to each of the others."""
    found = {name: measure_method(paths, *how) for name, paths in methods.items()}
    result = {"qrels": args.qrels, "rel": args.rel, "by_document": args.by_document, "compare": base, "methods": {}}
    for name, (measured, values) in found.items():
        if base not in (None, name):
            measured["compare"] = compare(values, found[base][1], 0)["measures"]
        result["methods"][name] = measured
    return result


def print_methods(result: dict) -> None:
    """A row of means for each method; below it, where there are several runs or a base, what else is known."""
    names = list(next(iter(result["methods"].values()))["mean"])
    first = max(24, *(len(name) + len(" (mean of 99)") for name in result["methods"]))

    def row(title: str, values: dict, sign: str = "") -> None:
        print(f"{title:<{first}}", *(f"{value:>{sign}{max(11, len(name))}.4f}" for name, value in values.items()))

    print(" " * first, *(f"{name:>11}" for name in names))
    for name, measured in result["methods"].items():
        n = len(measured["runs"])
        row(name if n == 1 else f"{name} (mean of {n})", measured["mean"])
        for what in ("lowest", "highest") if n > 1 else ():
            row(f"  {what}", measured[what])
        if changes := measured.get("compare"):
            row(f"  less {result['compare']}", {key: change["difference"] for key, change in changes.items()}, "+")
            row("  p", {key: change["p"] for key, change in changes.items()})


# ---------------------------------------------------------------------------------------------------------------- stage


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qrels", required=True, help="judgments: qid, 0, pid, relevance (or BEIR's); .gz allowed")
    parser.add_argument(
        "--run",
        required=True,
        nargs="+",
        action="extend",
        help="run file, TREC or MS MARCO format; .gz allowed; or several, as PATH, NAME=PATH or NAME=PATH,PATH,...",
    )
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
    parser.add_argument(
        "--compare",
        default=None,
        metavar="OTHER_RUN",
        help="run to compare with, by a paired test: given as --run is, or the NAME of one of those",
    )
    parser.add_argument(
        "--show", type=positive, default=10, help="with --compare, of one run: changed queries to list (default: 10)"
    )
    return parser.parse_args()


def one_run(args, run: str, *how) -> dict:
    """Measures of a run, and what changed from the other to it, if there is one."""
    counts, values = measure_file(run, *how)
    result = {
        "qrels": args.qrels,
        "run": run,
        "rel": args.rel,
        "by_document": args.by_document,
        **counts,
        **means(values),
    }
    if args.compare is not None:
        other_counts, other_values = measure_file(args.compare, *how)
        result["compare"] = {"run": args.compare, **other_counts, **compare(values, other_values, args.show)}
    return result


def main(args) -> dict | None:
    methods, base = methods_of(args.run, args.compare)
    if args.output is not None:
        check_output_file(args.output, args.qrels, *(path for paths in methods.values() for path in paths))
    is_one = len(args.run) == 1 and all(paths == [name] for name, paths in methods.items())
    measures = parse_measures(args.measures, args.rel)
    how = (read_qrels(args.qrels), measures, args.rel, args.by_document)
    result = one_run(args, args.run[0], *how) if is_one else several_runs(args, methods, base, *how)
    if args.output is not None:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, result)
    if args.json or (args.json is None and not sys.stdout.isatty()):
        return result
    if is_one:
        title = f"{args.run[0]}: {result['judged_queries']} judged queries"
        print_table(title, {name: result[name] for name in measures}, result.get("compare"))
    else:
        print_methods(result)
    return None


if __name__ == "__main__":
    run_stage(main, parse_args())
