"""Runs and qrels: how rankings and judgments are read, written and measured.

A run is {qid: {pid: score}}, qrels are {qid: {pid: relevance}}. A run file has a line for each retrieved passage, as
TREC (qid Q0 pid rank score tag) or as MS MARCO (qid, pid, rank) has it; `.gz` is read and written as it is.

The rank column is the ranking. MS MARCO's script goes by it; trec_eval ignores it, sorts by score and lets the spelling
of the pids decide between equal scores. Here equal scores stay in the order in which they were ranked, and a TREC file
whose ranks contradict its scores is refused: two tools would measure two rankings.
"""

import contextlib
import io
import itertools
import math
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import ir_measures
import numpy as np

from nanocolbert.cli import InputError
from nanocolbert.storage.artifact import replacing
from nanocolbert.storage.cutting import document_of
from nanocolbert.storage.ragged import Ids
from nanocolbert.storage.tsv import HEADERS, check_header, open_bytes, packing, read_lines

TREC_COLUMNS = "qid, Q0, pid, rank, score, tag"
MSMARCO_COLUMNS = "qid, pid, rank"
QRELS_COLUMNS = "qid, 0, pid, relevance"
BEIR_COLUMNS = "query-id, corpus-id, score"
EMPTY = "{}: an empty file, expected a run: was the search finished?"
MEASURES = (
    "MRR@10",
    "nDCG@10",
    "MAP",
    "Recall@50",
    "Recall@200",
    "Recall@1000",
    "Success@1",
    "Success@5",
    "Success@20",
)


def read_run(path) -> dict[str, dict[str, float]]:
    """Read a run file; the first line tells TREC from MS MARCO. A score is -rank, so that it has no ties.

    Raises InputError on a pid or a rank that a query has twice, on MS MARCO ranks other than 1, 2, ..., n (the official
    script takes them literally) and on TREC scores that are not numbers or rise while the ranks go down.
    """
    run, ranks, scores, lines = {}, {}, {}, {}  # the last three: an array for each qid, in the order of run[qid]
    for number, qid, pid, rank, score in _read_run_lines(path):
        if qid not in run:
            run[qid], ranks[qid], scores[qid], lines[qid] = {}, array("q"), array("d"), array("q")
        if pid in run[qid]:
            raise InputError(f"{path}:{number}: passage {pid} a second time for query {qid}: list it once")
        run[qid][pid] = -float(rank)
        ranks[qid].append(rank)
        lines[qid].append(number)
        if score is not None:
            scores[qid].append(score)
    if not run:
        raise InputError(EMPTY.format(path))
    for qid in run:
        _check_ranking(path, qid, ranks[qid], scores[qid], lines[qid])
    return run


def read_rankings(path, tell=None) -> Iterator[tuple[str, list[str], list[float] | None]]:
    """Yield (qid, pids, scores) of each query of a run file, best passage first; the scores are None in MS MARCO's.

    One query is held in memory at a time: its lines must stand together. tell: see `read_lines`. Raises InputError as
    `read_run` does, and where they do not.
    """
    seen = set()
    for qid, group in itertools.groupby(_read_run_lines(path, tell), key=lambda line: line[1]):
        lines, _, pids, ranks, scores = zip(*group, strict=True)
        if qid in seen:
            raise InputError(f"{path}:{lines[0]}: query {qid} again, after others: sort the run by its first column")
        seen.add(qid)
        places = {}
        for number, pid in zip(lines, pids, strict=True):
            if places.setdefault(pid, number) != number:
                raise InputError(f"{path}:{number}: passage {pid} a second time for query {qid}: list it once")
        is_scored = scores[0] is not None
        _check_ranking(path, qid, ranks, scores if is_scored else (), lines)
        order = sorted(range(len(pids)), key=ranks.__getitem__)
        yield qid, [pids[i] for i in order], [scores[i] for i in order] if is_scored else None
    if not seen:
        raise InputError(EMPTY.format(path))


def _read_run_lines(path, tell=None) -> Iterator[tuple[int, str, str, int, float | None]]:
    """Yield (line number, qid, pid, rank, score or None) of a run file; the first line tells TREC from MS MARCO."""
    columns = None
    for number, fields in _read_fields(path, "run", tell=tell):
        if columns is None:
            columns = {6: TREC_COLUMNS, 3: MSMARCO_COLUMNS}.get(len(fields))
            if columns is None:
                raise InputError(
                    f"{path}:{number}: found {len(fields)} column(s), expected 6 ({TREC_COLUMNS}) "
                    f"or 3 ({MSMARCO_COLUMNS})"
                )
        _check_columns(path, number, fields, columns)
        if columns is TREC_COLUMNS:
            qid, _, pid, rank, score, _ = fields
        else:
            (qid, pid, rank), score = fields, None
        rank = _number(path, number, "rank", rank, int)
        yield number, qid, pid, rank, None if score is None else _number(path, number, "score", score, float)


def _check_ranking(path, qid: str, ranks, scores, lines) -> None:
    """Raise InputError unless the ranks of a query are a ranking and the scores, where there are any, follow it."""
    order = np.argsort(ranks, kind="stable")  # (n passages of the query,)
    sorted_ranks = np.asarray(ranks)[order]
    twice = np.flatnonzero(np.diff(sorted_ranks) == 0)
    if twice.size:
        i = twice[0]
        raise InputError(
            f"{path}:{lines[order[i + 1]]}: rank {sorted_ranks[i]} a second time for query {qid} "
            f"(first in line {lines[order[i]]}): number its passages 1, 2, 3, ..."
        )
    if not len(scores):
        gap = np.flatnonzero(sorted_ranks != np.arange(1, len(ranks) + 1))
        if gap.size:
            i = gap[0]
            raise InputError(
                f"{path}:{lines[order[i]]}: query {qid} has rank {sorted_ranks[i]} where {i + 1} should come: "
                "number its passages 1, 2, 3, ..."
            )
        return
    rising = np.flatnonzero(np.diff(np.asarray(scores)[order]) > 0)
    if rising.size:
        i, j = order[rising[0]], order[rising[0] + 1]
        raise InputError(
            f"{path}:{lines[j]}: query {qid} has score {scores[j]} at rank {ranks[j]}, above score {scores[i]} at rank "
            f"{ranks[i]}: rank by falling score"
        )


def read_candidates(path, pids: Ids, qids) -> dict[str, np.ndarray]:
    """Candidates to rerank as {qid: rows of the passages (n,) int64}, in file order, for each of `qids`.

    Reads top1000.dev (qid, pid, query, passage), a run (TREC or MS MARCO) or plain (qid, pid), told apart by the first
    line. Lines of other queries are passed over; a passage listed twice counts once. Raises InputError on unknown pids.
    """
    found: dict[str, list[np.ndarray]] = {qid: [] for qid in qids}
    pid_column = None

    def take(lines: list[tuple[int, str, str]]) -> None:
        rows = pids.rows([pid for _, _, pid in lines])
        if (rows < 0).any():
            number, _, pid = lines[int(np.argmin(rows))]
            raise InputError(f"{path}:{number}: pid {pid!r} is not in the collection: give candidates from it")
        order = np.argsort([positions[qid] for _, qid, _ in lines], kind="stable")
        groups = np.array([positions[qid] for _, qid, _ in lines])[order]
        for group in np.split(order, np.flatnonzero(np.diff(groups)) + 1):
            found[lines[group[0]][1]].append(rows[group])

    positions = {qid: position for position, qid in enumerate(found)}
    chunk = []
    with open_bytes(path, "candidates") as file:
        for number, line in enumerate(file, 1):
            fields = line.split(b"\t") if line.count(b"\t") in (1, 3) else line.split()
            if pid_column is None:
                check_header(path, number, fields[0].decode(errors="replace") if fields else "")
                pid_column = {2: 1, 3: 1, 4: 1, 6: 2}.get(len(fields))
                columns = len(fields)
            if pid_column is None or len(fields) != columns:
                raise InputError(
                    f"{path}:{number}: found {len(fields)} column(s), expected qid, pid; or qid, pid, query, passage; "
                    f"or a run ({TREC_COLUMNS}; {MSMARCO_COLUMNS})"
                )
            qid, pid = fields[0].decode(errors="replace"), fields[pid_column].strip().decode(errors="replace")
            if qid in positions:
                chunk.append((number, qid, pid))
            if len(chunk) == 1 << 16:
                take(chunk)
                chunk = []
        if chunk:
            take(chunk)
    return {qid: _first_of_each(np.concatenate(rows)) if rows else np.zeros(0, np.int64) for qid, rows in found.items()}


def _first_of_each(rows: np.ndarray) -> np.ndarray:
    """Rows without repetitions, in their order."""
    return rows[np.sort(np.unique(rows, return_index=True)[1])]


def read_qrels(path) -> dict[str, dict[str, int]]:
    """Read TREC qrels (qid, 0, pid, relevance; tabs or spaces), or below a header line BEIR's, without the 0.

    Three columns without a header may be a run: refused. Raises InputError on a pair judged twice.
    """
    qrels, columns = {}, None
    for number, fields in _read_fields(path, "qrels", may_have_header=True):
        if number == 1 and fields and fields[0].lower() in HEADERS:
            columns = BEIR_COLUMNS if len(fields) == 3 else QRELS_COLUMNS
            continue
        if columns is None and len(fields) == 3:
            raise InputError(
                f"{path}:{number}: found 3 column(s), as a run has, expected 4 ({QRELS_COLUMNS}), separated by tabs or "
                f"spaces, or 3 below a header line ({BEIR_COLUMNS})"
            )
        columns = columns or QRELS_COLUMNS
        _check_columns(path, number, fields, columns)
        qid, pid, relevance = fields[0], fields[-2], fields[-1]
        judged = qrels.setdefault(qid, {})
        if pid in judged:
            raise InputError(f"{path}:{number}: passage {pid} judged a second time for query {qid}: judge it once")
        judged[pid] = _number(path, number, "relevance", relevance, int)
    if not qrels:
        raise InputError(f"{path}: an empty file, expected qrels ({QRELS_COLUMNS})")
    return qrels


def by_document(run: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """A run of documents, each where the best of its passages (doc#1, doc#2, ...) was ranked."""
    documents = {}
    for qid, scores in run.items():
        documents[qid] = {}
        for pid in sorted(scores, key=scores.get, reverse=True):  # stable: ties stay in order
            documents[qid].setdefault(document_of(pid), scores[pid])
    return documents


def write_run(
    path,
    rankings: Iterable[tuple[str, list[str], list[float]]],
    format: str = "trec",
    tag: str = "nanocolbert",
) -> int:
    """Write (qid, pids, scores) as they come, best passage first; the file appears when whole. Return the queries.

    `format` is "trec" or "msmarco". Scores must not rise within a query, pids must differ.
    """
    assert format in ("trec", "msmarco"), format
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    queries = 0
    with replacing(path) as raw, packing(raw, path) as packed, contextlib.ExitStack() as closed:
        file = io.TextIOWrapper(packed, encoding="utf-8", newline="\n")
        closed.callback(file.detach)  # what is beneath it is closed by others
        for qid, pids, scores in rankings:
            assert len(pids) == len(scores) == len(set(pids)), (qid, len(pids), len(scores), len(set(pids)))
            assert not any(map(math.isnan, scores)), (qid, scores)
            assert all(a >= b for a, b in itertools.pairwise(scores)), (qid, scores)
            if format == "trec":
                ranked = enumerate(zip(pids, scores, strict=True), 1)
                file.writelines(f"{qid} Q0 {pid} {rank} {score:.6f} {tag}\n" for rank, (pid, score) in ranked)
            else:
                file.writelines(f"{qid}\t{pid}\t{rank}\n" for rank, pid in enumerate(pids, 1))
            queries += 1
    return queries


def parse_measures(names: Iterable[str], relevant_from: int = 1) -> dict[str, ir_measures.Measure]:
    """Measures of ir_measures by the name they were asked for, e.g. "MRR@10".

    A passage is relevant from relevance `relevant_from`, unless the name says otherwise ("P(rel=2)@5"). nDCG uses the
    grades as they are. Raises InputError on an unknown name.
    """
    measures = {}
    for name in names:
        try:
            measure = ir_measures.parse_measure(name)
            if "rel" in measure.SUPPORTED_PARAMS and "rel" not in measure.params and relevant_from != 1:
                measure = measure(rel=relevant_from)
            supported = ir_measures.DefaultPipeline.supports(measure)
        except (NameError, ValueError, TypeError, AssertionError) as error:
            raise InputError(f"measure {name!r}: {error}: name it as ir_measures does, e.g. MRR@10 or P@5") from None
        if not supported:
            raise InputError(f"measure {name!r} cannot be computed here: ask for another, e.g. {' '.join(MEASURES)}")
        measures[name] = measure
    return measures


def measure_queries(qrels, run, measures=MEASURES, relevant_from: int = 1) -> dict[str, dict[str, float]]:
    """{measure: {qid: value}} over every query of the qrels, in their order, computed by ir_measures.

    A query without a ranking has 0, and so has one without a relevant passage. Unjudged queries play no part.
    Tied scores keep the order of the run's dict, whatever the measure.
    """
    parsed = parse_measures(measures, relevant_from)
    ranked = {}
    for qid in qrels.keys() & run.keys():
        assert not any(map(math.isnan, run[qid].values())), f"query {qid}: a score is NaN"
        best_first = sorted(run[qid], key=run[qid].get, reverse=True)  # stable: ties stay in order
        ranked[qid] = {pid: -float(rank) for rank, pid in enumerate(best_first, 1)}
    values = {measure: dict.fromkeys(qrels, 0.0) for measure in set(parsed.values())}
    if ranked:
        for metric in ir_measures.iter_calc(list(values), qrels, ranked):
            values[metric.measure][metric.query_id] = metric.value
    return {name: values[measure] for name, measure in parsed.items()}


def measure(qrels, run, measures=MEASURES, relevant_from: int = 1) -> dict[str, float]:
    """{measure: mean over every query of the qrels}; see `measure_queries`."""
    return means(measure_queries(qrels, run, measures, relevant_from))


def means(values: dict[str, dict[str, float]]) -> dict[str, float]:
    """{measure: mean over the queries} of what `measure_queries` returns."""
    return {name: sum(by_query.values()) / len(by_query) for name, by_query in values.items()}


def _read_fields(path, what: str, may_have_header: bool = False, tell=None) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number from 1, fields) of lines split at white space."""
    for number, line in read_lines(path, what, tell):
        fields = line.split()
        if number == 1 and fields and not may_have_header:
            check_header(path, number, fields[0])
        yield number, fields


def _check_columns(path, number: int, fields: list[str], columns: str) -> None:
    if len(fields) != columns.count(",") + 1:
        raise InputError(
            f"{path}:{number}: found {len(fields)} column(s), expected {columns.count(',') + 1} ({columns}), "
            "separated by tabs or spaces"
        )


def _number(path, number: int, what: str, text: str, kind: type):
    try:
        value = kind(text)
        if math.isfinite(value) and abs(value) < 2**63:  # fits the arrays of read_run
            return value
    except (ValueError, OverflowError):
        pass
    raise InputError(f"{path}:{number}: {what} {text!r} is not {'an integer' if kind is int else 'a finite number'}")
