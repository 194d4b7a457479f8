"""Documents and queries as people have them: .tsv, .csv, .jsonl (each also .gz) and, with pyarrow, .parquet.

A document has an id, a text, maybe a title, and other fields, its metadata. Files are read as a stream. What a field is
is known by its usual name, from a header line or from the first record; `Fields` names the unusual ones. Without a
header line a .tsv or .csv has two columns, id and text. A .tsv is never CSV: its fields are taken to the letter.
"""

import csv
import datetime
import decimal
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from nanocolbert.cli import InputError, first_line
from nanocolbert.storage.artifact import check_file
from nanocolbert.storage.tsv import HEADERS, PASSAGE_IDS, QUERY_IDS, check_id, read_lines

FORMATS = (".tsv", ".csv", ".jsonl", ".parquet")
PASSAGE_TEXTS = ("text", "passage", "contents", "content", "body", "document", "abstract")
QUERY_TEXTS = ("query", "question")
TITLES = ("title",)
ROWS = 1000  # of .parquet, held in memory at a time
LONGEST_FIELD = 1 << 27  # characters of a field of a .csv: a quote that is never closed does not fill the memory

NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,14})(\.[0-9]+)?")
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Fields(NamedTuple):
    """Names of the fields of a file that are called otherwise than usual; None: the usual name."""

    id: str | None = None
    title: str | None = None
    text: str | None = None


USUAL = Fields()


class Document(NamedTuple):
    """number: its line in the file, or its row in a .parquet, from 1; text: the title, if any, and the text."""

    number: int
    id: str
    text: str
    metadata: dict | None  # all other fields, the title too; None where there are none
    title: str = ""


def read_documents(path, what: str, fields: Fields = USUAL, tell: Callable[[int], None] | None = None):
    """Yield each Document of a collection, or of queries, in file order.

    what: "collection: ..." or "queries: ..."; it also says whose usual names come first. tell(n) is called now and then
    with how many bytes of the file have been read. Raises InputError, which names the line, on what cannot be used.
    """
    given = [name for name in fields if name is not None]
    if len(set(given)) < len(given):
        raise InputError(f"{path}: {', '.join(map(repr, given))}: name a field of its own for ids, titles and texts")
    kind = kind_of(path)
    usual = ((QUERY_IDS, PASSAGE_IDS), (QUERY_TEXTS, PASSAGE_TEXTS))
    usual = [sum(names if what.startswith("queries") else names[::-1], ()) for names in usual]
    if kind == "tsv":
        return read_table(path, tsv_rows(path, what, tell), "tabs", fields, usual)
    if kind == "csv":
        return read_table(path, csv_rows(path, what, tell), "commas", fields, usual)
    if kind == "jsonl":
        return read_jsonl(path, what, fields, usual, tell)
    return read_parquet(path, what, fields, usual, tell)


def kind_of(path) -> str:
    """The format of a file, by its name: csv, jsonl or parquet; what is called otherwise is tsv."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    suffix = "".join((suffixes[:-1] if suffixes[-1:] == [".gz"] else suffixes)[-1:])
    return {".json": "jsonl", ".ndjson": "jsonl"}.get(suffix, suffix[1:] if suffix in FORMATS else "tsv")


# ------------------------------------------------------------------------------------------------- which field is what


def find_fields(path, number: int, names: list[str], fields: Fields, usual) -> Fields:
    """The names, among those of a file, of its ids, titles (None: it has none) and texts. Raises InputError."""
    for name, flag in zip(fields, Fields._fields, strict=True):
        if name is not None and name not in names:
            raise InputError(
                f"{path}:{number}: no field {name!r} (it has {listed(names)}): give --{flag}_field another name"
            )
    of = {}
    for name in names:
        of.setdefault(name.strip().lower(), name)
    taken = [*fields]
    for i, known in enumerate((usual[0], TITLES, usual[1])):
        taken[i] = fields[i] or next((of[name] for name in known if name in of and of[name] not in taken), None)
    identifier, title, text = taken
    for found, flag, known in ((identifier, "id", usual[0]), (text, "text", usual[1])):
        if found is None:
            raise InputError(
                f"{path}:{number}: no field has a usual name of {flag}s ({', '.join(known[:6])}, ...; it has "
                f"{listed(names)}): name it by --{flag}_field, or rename it"
            )
    return Fields(identifier, title, text)


def listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:12])) or "none"
    return f"{shown[:400]}{' ...' if len(names) > 12 or len(shown) > 400 else ''}"


def header(path, names: list[str], fields: Fields, usual) -> Fields | None:
    """The fields that a first line names, None if it is no header. Raises InputError if it is one of no use."""
    known = {name.strip().lower() for name in names}
    is_header = names[0].strip().lower() in HEADERS or (known & {*usual[0]} and known & {*usual[1]})
    if not is_header and fields == USUAL:
        return None
    if twice := [name for i, name in enumerate(names) if name and name in names[:i]]:
        raise InputError(f"{path}:1: two columns are called {twice[0]!r}: give each a name of its own")
    return find_fields(path, 1, names, fields, usual)


def make_document(path, number: int, record: dict, names: Fields) -> Document:
    """A Document of {field: value}, which is emptied. Raises InputError on an id or a text that is none."""
    identifier, text = record.pop(names.id, None), record.pop(names.text, None)
    title = record.pop(names.title, None) if names.title else None
    if isinstance(identifier, int) and not isinstance(identifier, bool):
        identifier = str(identifier)
    if not isinstance(identifier, str):
        raise InputError(
            f"{path}:{number}: {names.id!r} is {as_json(identifier)}, not an id: give a string or a whole number"
        )
    check_id(path, number, identifier)
    for value, name in ((text, names.text), ("" if title is None else title, names.title)):
        if not isinstance(value, str):
            raise InputError(f"{path}:{number}: {name!r} is {as_json(value)}, not a text: give a string")
    nested = record.get("metadata")
    if isinstance(nested, dict) or nested is None:  # as BEIR has it
        record.pop("metadata", None)
        record = {**(nested or {}), **record}
    if not title or title.isspace():
        return Document(number, identifier, text, record or None)
    whole = f"{title} {text}" if text else title
    return Document(number, identifier, whole, {**record, "title": title}, title)


def as_json(value) -> str:
    """A value as a message shows it."""
    shown = json.dumps(value, default=repr)
    return "missing or null" if value is None else shown if len(shown) < 60 else f"{shown[:60]} ..."


# -------------------------------------------------------------------------------------------------------- the formats


def tsv_rows(path, what: str, tell) -> Iterator[tuple[int, list[str]]]:
    for number, line in read_lines(path, what, tell):
        yield number, line.split("\t")


def csv_rows(path, what: str, tell) -> Iterator[tuple[int, list[str]]]:
    """(number of its first line, fields) of each record; blank lines are passed over."""
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader((f"{line}\n" for _, line in read_lines(path, what, tell)), strict=True)
    number = 1
    try:
        for row in reader:
            if row:
                yield number, row
            number = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}:{number}: not CSV ({error}): close each quote, and double those within") from None


def read_table(path, rows: Iterator[tuple[int, list[str]]], separator: str, fields: Fields, usual):
    """Documents of (line number, fields): of the columns that a header line names, or of two, id and text."""
    first = next(rows, None)
    if first is None:
        return
    if names := header(path, first[1], fields, usual):
        yield from read_named(path, rows, separator, first[1], names)
        return
    for number, row in itertools.chain([first], rows):
        if len(row) != 2:
            hint = " or, more of them, a header line with their names" if number == 1 else ""
            raise InputError(
                f"{path}:{number}: found {len(row)} column(s), expected 2 (id, text), separated by {separator}{hint}"
            )
        identifier, text = row
        if not (identifier.isalnum() and len(identifier) <= 64):  # of 256 bytes at most: check_id need not look
            check_id(path, number, identifier)
        yield tuple.__new__(Document, (number, identifier, text, None, ""))  # half the time of Document(...)


def read_named(path, rows, separator: str, columns: list[str], names: Fields) -> Iterator[Document]:
    """Documents of the lines below a header. Metadata that look like numbers are numbers, empty ones are None."""
    used, named = {*names}, [name for name in columns if name]
    for number, row in rows:
        if len(row) != len(columns):
            raise InputError(
                f"{path}:{number}: found {len(row)} column(s), expected {len(columns)} (as the header says: "
                f"{listed(named)}), separated by {separator}"
            )
        record = dict(zip(columns, row, strict=True))
        record.pop("", None)  # a column without a name, as of a saved data frame's row numbers
        for name in record.keys() - used:
            record[name] = number_or_text(record[name])
        yield make_document(path, number, record, names)


def number_or_text(value: str) -> int | float | str | None:
    found = NUMBER.fullmatch(value)
    if not found:
        return value or None
    return float(value) if found[2] else int(value)


def read_jsonl(path, what: str, fields: Fields, usual, tell) -> Iterator[Document]:
    names, has_title = None, not fields.title
    for number, line in read_lines(path, what, tell):
        if not line or line.isspace():
            continue
        record = parse_record(path, number, line)
        if names is None:  # a document may lack a title, the first one too
            first = [name for name in record if name != fields.title]
            first = find_fields(path, number, first, fields._replace(title=None), usual)
            names = first._replace(title=fields.title or first.title or TITLES[0])
        has_title = has_title or names.title in record
        yield make_document(path, number, record, names)
    if names and not has_title:
        raise InputError(f"{path}: no object has a field {fields.title!r}: give --title_field another name")


def parse_record(path, number: int, line: str) -> dict:
    """The JSON object of a line. Raises InputError unless it is one that can be written as UTF-8 and as JSON again."""
    try:
        record = json.loads(line, parse_constant=refuse, parse_float=finite)
        if SURROGATE.search(line):
            json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError(f"{path}:{number}: half of a surrogate pair, which is no text: mend it") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}:{number}: not JSON ({first_line(error)}): give one object a line") from None
    if not isinstance(record, dict):
        raise InputError(f"{path}:{number}: JSON, but not an object ({as_json(record)}): give one object a line")
    return record


def refuse(constant: str):
    raise ValueError(f"{constant} is no number of JSON's")


def finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else refuse(digits)


def read_parquet(path, what: str, fields: Fields, usual, tell) -> Iterator[Document]:
    check_file(path, what)
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: .parquet is read by pyarrow: pip install pyarrow, or give .jsonl") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            names = find_fields(path, 1, file.schema_arrow.names, fields, usual)
            for batch in file.iter_batches(ROWS, use_threads=False):
                for record in batch.to_pylist():
                    number += 1
                    used = {name: record.pop(name) for name in names if name}
                    record = {name: json_value(path, number, name, value) for name, value in record.items()}
                    yield make_document(path, number, {**record, **used}, names)
                if tell:
                    tell(os.path.getsize(path) * number // file.metadata.num_rows)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: not a whole parquet file ({first_line(error)}): fetch it again") from None


def json_value(path, number: int, name: str, value):
    """A value of a table as JSON has it: a time as ISO 8601, a number that is none as null. Raises InputError."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float | decimal.Decimal):
        value = float(value)
        if math.isinf(value):
            raise InputError(f"{path}:{number}: {name!r} is {value}, no number of JSON's: mend it")
        return None if math.isnan(value) else value  # a data frame's missing value
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, list | tuple):
        return [json_value(path, number, name, part) for part in value]
    if isinstance(value, dict):
        return {key: json_value(path, number, name, part) for key, part in value.items()}
    raise InputError(f"{path}:{number}: {name!r} holds {type(value).__name__}, which JSON has not: leave it out")


def read_queries(path) -> dict[str, str]:
    """Queries as {qid: text}, in file order; an empty query is fine. Raises InputError on a duplicate qid."""
    queries = {}
    for query in read_documents(path, "queries: qid, query"):
        if query.id in queries:
            raise InputError(f"{path}:{query.number}: qid {query.id!r} a second time: a qid names one query")
        queries[query.id] = query.text
    return queries
