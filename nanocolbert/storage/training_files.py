"""Training files of ids as people have them, as a stream of rows: a query's id, its passages' ids, maybe their scores.

    id      qid, pid+, pid1, ..., pidk                   separated by tabs
    nway    [qid, [pid, score], ...] or [qid, pid, ...]  a line of JSON: Stanford's ColBERT and PyLate; also PyLate's
                                                         {"query_id": ..., "document_ids": [...], "scores": [...]}
    scored  score+, score-, qid, pid+, pid-              separated by tabs: what TU Wien gives to distil from
    qrels   qid, 0, pid, relevance                       or, below a header line, BEIR's three; of relevance 1 or more

The first passage is the positive (+). All rows of a file have as many passages K. Each file may be .gz; triples of
texts are tsv2mmap.py's own. Memory holds one chunk of rows, and the ids of the collection where they are looked up.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanocolbert.cli import InputError, first_line
from nanocolbert.storage.documents import as_json, finite, kind_of, read_documents, refuse
from nanocolbert.storage.ragged import Ids, NpyWriter
from nanocolbert.storage.tsv import HEADERS, QUERY_IDS, batched, open_bytes, read_lines, read_rows

FORMATS = ("text", "id", "nway", "scored", "qrels")
OF_MANY = ("id", "nway")  # whose rows may have any number of passages
GUESSED = 100  # lines looked at to tell the formats apart
LARGEST = float(np.finfo(np.float32).max)
IDS = 60_000  # looked up at a time
GRADES = range(-2, 11)  # of judgments, -2 being spam: what is beyond may be an id
PASSAGES = ("document_ids", "doc_ids", "passage_ids", "pids")  # fields of an object, by their usual names
RELEVANCES = ("score", "relevance", "rel", "label", "grade", "judgment")  # what a header calls the last column of qrels
SCORED = "score of the positive, score of the negative, qid, positive pid, negative pid"
QRELS = {4: "qid, 0, pid, relevance", 3: "query-id, corpus-id, score"}


class Row(NamedTuple):
    """number: its line in the file, from 1; ids: the query's, then K passages'; scores: K, or None."""

    number: int
    ids: list[str]
    scores: list[float] | None


def read_training(path, format: str, nway: int | None = None, tell=None) -> Iterator[Row]:
    """Yield the rows of a training file of ids, in file order.

    nway: take the first so many passages of each row, which has at least as many; None: all, as many as the first row
    has. tell: see `read_lines`. Raises InputError, which names the line, on what cannot be used.
    """
    if format == "id":
        return read_id_rows(path, nway, tell)
    if format == "nway":
        return even(path, read_nway_rows(path, tell), nway)
    return {"scored": read_scored_rows, "qrels": read_qrels_rows}[format](path, tell)


def read_id_rows(path, nway: int | None, tell) -> Iterator[Row]:
    """Rows of qid, positive pid, negative pids: as many columns as the first line has, at least 3."""
    if nway is None:
        with open_bytes(path, "triples") as file:
            n_negatives = max(1, file.readline().count(b"\t") - 1)
        columns = ", ".join(["qid", "positive pid", *["negative pid"] * n_negatives])
        for number, fields in read_rows(path, columns, "triples", tell):
            yield Row(number, fields, None)
        return
    for number, line in read_lines(path, "triples", tell):
        fields = line.split("\t", nway + 1)
        if len(fields) <= nway:
            raise InputError(
                f"{path}:{number}: found {len(fields)} column(s), expected at least {nway + 1} (qid and --nway {nway} "
                "pids), separated by tabs"
            )
        yield Row(number, fields[: nway + 1], None)


def read_scored_rows(path, tell) -> Iterator[Row]:
    for number, (*scores, qid, positive, negative) in read_rows(path, SCORED, "triples", tell):
        yield Row(number, [qid, positive, negative], [score_of(path, number, score, repr(score)) for score in scores])


def read_qrels_rows(path, tell) -> Iterator[Row]:
    """Rows of qid, pid: each judgment of relevance 1 or more. Raises InputError where there is none."""
    number, n_columns, found = 0, None, False
    for number, line in read_lines(path, "qrels", tell):
        fields = line.split()
        if number == 1 and fields and fields[0].lower() in HEADERS:
            n_columns = 3 if len(fields) == 3 else 4
            continue
        n_columns = n_columns or 4  # three without a header may be a run
        if len(fields) != n_columns:
            raise InputError(
                f"{path}:{number}: found {len(fields)} column(s), expected {n_columns} ({QRELS[n_columns]}), separated "
                "by tabs or spaces"
            )
        if not is_whole(fields[-1]):
            raise InputError(f"{path}:{number}: relevance {fields[-1]!r} is not an integer: give qrels")
        if int(fields[-1]) >= 1:
            found = True
            yield Row(number, [fields[0], fields[-2]], None)
    if number and not found:
        raise InputError(f"{path}: no passage is of relevance 1 or more: give the qrels of training queries")


def read_nway_rows(path, tell) -> Iterator[Row]:
    """Rows of any number of passages from lines of JSON; blank lines are passed over."""
    for number, line in read_lines(path, "triples", tell):
        if line and not line.isspace():
            yield parse_nway(path, number, line)


def parse_nway(path, number: int, line: str) -> Row:
    """[qid, [pid, score], ...], [qid, pid, ...], or an object with the same in three fields. Raises InputError."""
    try:
        value = json.loads(line, parse_constant=refuse, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}:{number}: not JSON ({first_line(error)}): give [qid, [pid, score], ...] on each line"
        ) from None
    if isinstance(value, dict):
        value = as_list(path, number, value)
    if not isinstance(value, list) or len(value) < 2:
        raise InputError(f"{path}:{number}: {as_json(value)}: give [qid, [pid, score], ...] on each line")
    qid, *passages = value
    pairs = [isinstance(passage, list) for passage in passages]
    if not any(pairs):
        return Row(number, [id_of(path, number, one) for one in value], None)
    for passage in passages:
        if not (isinstance(passage, list) and len(passage) == 2):
            raise InputError(f"{path}:{number}: {as_json(passage)} is no [pid, score], as others of its row are")
    ids = [id_of(path, number, one) for one in (qid, *(pid for pid, _ in passages))]
    return Row(number, ids, [score_of(path, number, score, as_json(score)) for _, score in passages])


def as_list(path, number: int, record: dict) -> list:
    """A row as a list, from an object. Raises InputError where its fields are not those of one."""
    qid = next((record[name] for name in QUERY_IDS if name in record), None)
    pids = next((record[name] for name in PASSAGES if name in record), None)
    scores = record.get("scores")
    if qid is None or not isinstance(pids, list) or not isinstance(scores, list | None):
        raise InputError(
            f'{path}:{number}: {as_json(record)}: give {{"query_id": ..., "document_ids": [...], "scores": [...]}}, '
            "or [qid, [pid, score], ...]"
        )
    if scores is None:
        return [qid, *pids]
    if len(scores) != len(pids):
        raise InputError(f"{path}:{number}: {len(pids)} passages, but {len(scores)} scores: give one for each")
    return [qid, *map(list, zip(pids, scores, strict=True))]


def id_of(path, number: int, value) -> str:
    """An id from JSON. Raises InputError where it is neither a string nor a whole number."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise InputError(f"{path}:{number}: {as_json(value)} is not an id: give a string or a whole number")


def score_of(path, number: int, value, shown: str) -> float:
    """A score, from text or JSON, that fp32 can hold. Raises InputError where it is none."""
    try:
        score = math.nan if isinstance(value, bool) else float(value)
        if abs(score) <= LARGEST:  # NaN is not
            return score
    except (ValueError, TypeError, OverflowError):
        pass
    raise InputError(f"{path}:{number}: score {shown} is not a finite number")


def even(path, rows: Iterable[Row], nway: int | None) -> Iterator[Row]:
    """The same rows, cut to `nway`. Raises InputError unless all have as many passages, and scores all or none."""
    first = None
    for row in rows:
        number, ids, scores = row
        found, wanted = len(ids) - 1, nway or (len(first.ids) - 1 if first else len(ids) - 1)
        if found < wanted or (found > wanted and nway is None):
            source = f"--nway {nway} takes" if nway else f"line {first.number} has"
            raise InputError(
                f"{path}:{number}: {found} passage(s), {source} {wanted}: give --nway N, the first N of each row"
            )
        row = Row(number, ids[: wanted + 1], scores and scores[:wanted])
        first = first or row
        if (scores is None) != (first.scores is None):
            has, had = ("no scores", "scores") if scores is None else ("scores", "none")
            raise InputError(f"{path}:{number}: {has}, where line {first.number} has {had}: give all rows alike")
        yield row


# ----------------------------------------------------------------------------------------------------------- what it is


def guess_format(path, queries, collection, limit: int | None) -> str:
    """One of FORMATS, by the first lines of a training file, at most `limit`, and the ids and texts of `queries`.

    Raises InputError where that cannot be told.
    """
    lines = [line for _, line in itertools.islice(read_lines(path, "triples"), min(limit or GUESSED, GUESSED))]
    if kind_of(path) == "jsonl" or look_like_json(lines):
        return "nway"
    if look_like_qrels(path, lines):
        return "qrels"
    rows = [line.split("\t") for line in lines]
    if any(len(field.split()) > 1 for fields in rows for field in fields):  # ids have no white space
        return "text"
    if not (queries and collection):
        raise InputError(
            f"{path}:1: {rows[0][0] if rows else ''!r} may be an id or a text: give --triples_format text, or, of "
            "ids, --collection and --queries too"
        )
    known = known_in(queries, rows)
    found = [kind for kind, n in known.items() if n]
    if found == ["id", "scored"] and not all(is_whole(score) for fields in rows for score in fields[:2]):
        found = ["scored"]
    if len(found) == 1 or not rows:
        return found[0] if found else "id"
    if not found or "text" in found:
        what = "both an id and a text" if found else "neither an id nor a text"
        raise InputError(
            f"{path}:1: {rows[0][0]!r} is {what} of {queries}: give --triples_format {', '.join(FORMATS[:-1])} or "
            f"{FORMATS[-1]}, and the queries these triples were made from"
        )
    raise InputError(
        f"{path}:1: may be five ids, or two scores and three ids: give --triples_format id, or --triples_format scored"
    )


def known_in(queries, rows: list[list[str]]) -> dict[str, int]:
    """How many queries the first column names, by id or as a text, and the third, where scores may stand before it."""
    first = {fields[0] for fields in rows}
    known = {"id": 0, "text": 0}
    third = {fields[2] for fields in rows} if look_scored(rows) else set()
    for query in read_documents(queries, "queries: qid, query"):
        known["id"] += query.id in first
        known["text"] += query.text in first
        if query.id in third:
            known["scored"] = known.get("scored", 0) + 1
    return known


def look_like_json(lines: list[str]) -> bool:
    """Whether the first line is a list or an object of JSON's."""
    try:
        return isinstance(json.loads(lines[0]), list | dict) if lines else False
    except (ValueError, RecursionError):
        return False


def look_like_qrels(path, lines: list[str]) -> bool:
    """Whether there is a 0 in the second of four columns, a grade in the last, or a header line that says so.

    Raises InputError where they may be rows of ids as well.
    """
    rows = [line.split() for line in lines if line.count("\t") in (0, 2, 3)]
    if not rows or len(rows) < len(lines):
        return False
    head, *below = rows
    if head and head[0].lower() in HEADERS and len(head) in QRELS and head[-1].lower() in RELEVANCES:
        return True
    if not all(len(row) == 4 and row[1] in ("0", "Q0") and is_whole(row[3]) for row in (head, *below)):
        return False
    if all(int(row[3]) in GRADES for row in rows):
        return True
    raise InputError(
        f"{path}: may be qrels, or rows of ids whose positive is '0': give --triples_format qrels, or --triples_format "
        "id"
    )


def look_scored(rows: list[list[str]]) -> bool:
    """Whether the first two of five columns are numbers."""
    return bool(rows) and all(len(fields) == 5 and is_float(fields[0]) and is_float(fields[1]) for fields in rows)


def is_whole(text: str) -> bool:
    return text.removeprefix("-").isdecimal() and len(text) < 20


def is_float(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


# ------------------------------------------------------------------------------------------------------------ as arrays


class Written(NamedTuple):
    """Rows, passages of each (K), and whether they have scores."""

    rows: int
    passages: int
    scored: bool


def write_training(path, rows: Iterable[Row], folder: Path, format: str) -> Written:
    """Write triples.npy int32 (n, 1 + K), places in the folder's qids.npy and pids.npy; scores.npy fp32 (n, K) if any.

    Raises InputError on an id that is in neither, and where there are no rows.
    """
    qids, pids, rows = Ids(folder / "qids.npy"), Ids(folder / "pids.npy"), iter(rows)
    first = next(rows, None)
    if first is None:
        raise InputError(f"{path}: empty, expected triples")
    n_ids, scored = len(first.ids), first.scores is not None
    writer = NpyWriter(folder / "triples.npy", np.int32, (n_ids,))
    scores = NpyWriter(folder / "scores.npy", np.float32, (n_ids - 1,)) if scored else None
    for chunk in batched(itertools.chain([first], rows), max(1, IDS // n_ids)):
        fields = list(zip(*(row.ids for row in chunk), strict=True))  # a column each
        found = np.stack([qids.rows(fields[0]), *map(pids.rows, fields[1:])], axis=1)  # (rows, 1 + K)
        if (found < 0).any():
            row, column = np.argwhere(found < 0)[0]
            kind, source = ("qid", "queries") if column == 0 else ("pid", "collection")
            where = f" in column {column + 1}" if format == "id" else ""
            raise InputError(
                f"{path}:{chunk[row].number}: {kind} {fields[column][row]!r}{where} is not among the {source}: give "
                f"the {source} these triples were made from"
            )
        writer.append(found)
        if scored:
            scores.append(np.array([row.scores for row in chunk], np.float32))
    writer.close()
    if scored:
        scores.close()
    return Written(writer.n_rows, n_ids - 1, scored)
