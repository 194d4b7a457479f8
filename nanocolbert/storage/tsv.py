"""Text files as MS MARCO has them: plain UTF-8 lines, tab-separated, never CSV; `.gz` is read and written as it is.

All text comes in through `open_bytes`, which passes over a byte-order mark.
Every error names the file, the line, what was found and what to do.
"""

import codecs
import contextlib
import gzip
import itertools
import os
import re
import zlib
from collections.abc import Callable, Iterator

from nanocolbert.cli import InputError
from nanocolbert.storage.artifact import check_file

BLOCK = 1 << 22  # bytes looked through at a time
TOLD = 1000  # lines between two words of how far a reader has come
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # and halves of characters
PASSAGE_IDS = (  # what ids of passages are called
    *("_id", "id", "pid", "docid", "doc_id", "docno", "did", "passage_id", "passageid", "corpus-id"),
)
QUERY_IDS = ("qid", "query_id", "queryid", "query-id")
HEADERS = {*PASSAGE_IDS, *QUERY_IDS}  # what the first field of a header line is called


@contextlib.contextmanager
def open_bytes(path, what: str):
    """Open a file, unpacking `.gz`. Raises InputError where it is missing or the gzip stream is broken."""
    path = check_file(path, what)
    with open(path, "rb") as raw:
        file = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        try:
            start = file.peek(4)
            if start.startswith(codecs.BOM_UTF8):
                file.read(len(codecs.BOM_UTF8))
            elif start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise InputError(f"{path}:1: UTF-16 (by its byte-order mark): convert the file to UTF-8")
            yield file
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise InputError(f"{path}: broken gzip file ({error}): fetch it again") from None


@contextlib.contextmanager
def packing(file, path):
    """A binary file that packs what is written into another, where `path` ends with `.gz`; else that file itself."""
    if not str(path).endswith(".gz"):
        yield file
        return
    with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
        yield packed


def decode(path, number: int, line: bytes) -> str:
    """A line as text, without its end. Raises InputError where it is not UTF-8."""
    try:
        return line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}:{number}: byte {line[error.start]:#04x} at column {error.start + 1} is not UTF-8: "
            "convert the file to UTF-8"
        ) from None


def read_lines(path, what: str, tell: Callable[[int], None] | None = None) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text without its end) of each line. Raises InputError where it is not UTF-8.

    tell(n) is called now and then with how many bytes of the file have been read, as they lie on disk.
    """
    with open_bytes(path, what) as file:
        for number, line in enumerate(file, 1):
            yield number, decode(path, number, line)
            if tell and not number % TOLD:
                tell(os.lseek(file.fileno(), 0, os.SEEK_CUR))
        if tell:
            tell(os.lseek(file.fileno(), 0, os.SEEK_CUR))


def read_rows(path, columns: str, what: str, tell=None) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number from 1, fields) of each line. tell: see `read_lines`.

    `columns` describes the line and counts it, e.g. "pid, passage". Another number of columns, a blank line and bytes
    that are not UTF-8 raise InputError.
    """
    n_columns = columns.count(",") + 1
    for number, line in read_lines(path, what, tell):
        fields = line.split("\t")
        if len(fields) != n_columns:
            raise InputError(
                f"{path}:{number}: found {len(fields)} column(s), expected {n_columns} ({columns}), separated by tabs"
            )
        yield number, fields


def check_header(path, number: int, field: str) -> None:
    """Raise InputError if a file begins with the names of its columns."""
    if number == 1 and field.strip().lower() in HEADERS:
        raise InputError(f"{path}:1: a header line (it begins with {field!r}): remove it")


def check_id(path, number: int, identifier: str) -> None:
    """Raise InputError unless the id is 1 to 256 bytes without white space (run files are split there), or control."""
    if not identifier or len(identifier.split()) != 1 or identifier.strip() != identifier:
        raise InputError(f"{path}:{number}: id {identifier!r} is empty or has white space: give ids without")
    if CONTROL.search(identifier):
        raise InputError(
            f"{path}:{number}: id {identifier!r} has a control character, or half of one: give ids without"
        )
    if len(identifier.encode()) > 256:
        raise InputError(f"{path}:{number}: id of {len(identifier.encode())} bytes, at most 256 can be stored")


def batched(iterable, size: int):
    """Lists of `size` items, the last one shorter."""
    iterator = iter(iterable)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
