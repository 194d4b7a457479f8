"""Metadata of passages, one JSON object each, in a file of SQLite, which also finds passages by their fields.

A filter is what stands after WHERE: "year >= 2020 AND lang = 'en'". It may come from a stranger: it only ever reads
this one table, within a time and with values of bounded size, and is no query of its own.
"""

import json
import os
import sqlite3
import string
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import numpy as np

from nanocolbert.cli import InputError, first_line
from nanocolbert.storage.artifact import identity

SECONDS = 10.0  # that a filter may take
LONGEST = 1_000_000  # bytes of an object, or of a filter
MOST_FIELDS, LONGEST_NAME = 500, 200  # that a filter can name; in letters
ROW = '"""row"""'  # our own column's name in a filter: no field has one with quotes
STEPS = 20  # of SQLite's machine, some rows, between two looks at the clock: one row may take seconds
OWN_SELECTS = 2  # in the query that a condition becomes a part of
LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION}


class MetadataWriter:
    """Append objects to a file, which is there if any were given; it is whole once `close` was called."""

    def __init__(self, path):
        self.path, self.connection, self.fields = Path(path), None, {}

    def append(self, first_row: int, objects: Iterable[dict | None]) -> None:
        """The objects of neighbouring rows; None where a row has none. Raises InputError for what is no JSON object."""
        rows = []
        for row, value in enumerate(objects, first_row):
            if value:
                rows.append((row, as_json(value)))
                self.fields |= dict.fromkeys(value)
        if rows and self.connection is None:
            self.connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            self.connection.execute("PRAGMA journal_mode = OFF")
            self.connection.execute("PRAGMA synchronous = OFF")
            self.connection.execute("CREATE TABLE passages (row INTEGER PRIMARY KEY, json TEXT NOT NULL)")
            self.connection.execute("CREATE TABLE fields (name TEXT)")
        if rows:
            self.connection.execute("BEGIN")
            self.connection.executemany("INSERT INTO passages VALUES (?, ?)", rows)
            self.connection.execute("COMMIT")

    def close(self) -> None:
        if self.connection is not None:
            self.connection.executemany("INSERT INTO fields VALUES (?)", [(name,) for name in self.fields])
            self.connection.close()


def as_json(value) -> str:
    """An object as JSON. Raises InputError unless it is one, of what JSON can hold."""
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise InputError(f"metadata of type {type(value).__name__}: not an object with names: give a dict, or None")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        size = len(text.encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"metadata: not what JSON can hold ({first_line(error)}): convert it") from None
    if size > LONGEST:
        raise InputError(f"metadata of {size} bytes: at most {LONGEST} can be kept: shorten it")
    return text


class Metadata:
    """Metadata of rows; any number of threads may read."""

    def __init__(self, path, seen: tuple[int, ...] | None):
        """Open a file; seen: its identity, None where there is none. Raises InputError if it is damaged, or gone."""
        self.path, self.fields, self.seen = Path(path), [], seen
        if seen:
            self.fields = [name for (name,) in self._read("SELECT name FROM fields")]

    def _connect(self) -> sqlite3.Connection:
        """Raises InputError where the file is gone, or another by now."""
        # which never changes: SQLite needs no lock, and writes nothing beside it
        address = f"file:{quote(os.fsencode(self.path.resolve()))}?mode=ro&immutable=1"
        connection = sqlite3.connect(address, uri=True)
        if identity(self.path) != self.seen:
            connection.close()
            raise InputError(f"{self.path}: removed, or replaced, since it was opened: open it again")
        return connection

    def _read(self, sql: str, values: Sequence = ()) -> list[tuple]:
        try:
            with closing(self._connect()) as connection:
                return connection.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise InputError(f"{self.path}: damaged ({error}): restore it, or make its folder again") from None

    def objects(self, rows: np.ndarray) -> list[dict | None]:
        """The object of each row (n,); None where it has none."""
        if not self.fields:
            return [None] * len(rows)
        found, rows = {}, rows.tolist()
        for start in range(0, len(rows), 500):
            some = rows[start : start + 500]
            marks = ",".join("?" * len(some))
            found |= dict(self._read(f"SELECT row, json FROM passages WHERE row IN ({marks})", some))
        return [json.loads(found[row]) if row in found else None for row in rows]

    def where(self, condition: str, fields: list[str]) -> np.ndarray:
        """Rows (n,) whose fields, of all that are known, fulfil a condition; those without metadata do not.

        Raises InputError where it is none.
        """
        if not self.fields:
            return np.zeros(0, np.int64)
        columns = [f'json_extract(json, {path_of(name)}) AS "{name}"' for name in columns_of(fields)]
        own = ", ".join([f"row AS {ROW}", *columns])
        guard = Guard()
        try:
            with closing(self._connect()) as connection:
                guard.watch(connection)
                asked = f"SELECT {ROW} FROM (SELECT {own} FROM passages) WHERE ({condition}\n)"
                rows = [row for (row,) in connection.execute(asked)]
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:  # a zero byte, half a character
            found = f"takes more than {SECONDS:g} seconds" if guard.is_late else first_line(error)
            raise InputError(
                f"where {condition[:200]!r}: {found}: give a condition as SQL has it, of the fields "
                f"{', '.join(fields[:20])}"
            ) from None
        return np.array(rows, np.int64)


class Guard:
    """Keeps a connection to reading its own table, by our own query, for a while."""

    def __init__(self):
        self.selects, self.is_late, self.end = 0, False, time.monotonic() + SECONDS

    def watch(self, connection: sqlite3.Connection) -> None:
        for limit in (sqlite3.SQLITE_LIMIT_LENGTH, sqlite3.SQLITE_LIMIT_SQL_LENGTH):
            connection.setlimit(limit, LONGEST + 1000)  # of a row, of which an object is a part
        connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 1000)
        connection.set_progress_handler(self.look, STEPS)
        connection.set_authorizer(self.allow)

    def look(self) -> bool:
        self.is_late = time.monotonic() > self.end
        return self.is_late

    def allow(self, action: int, what: str | None, *_) -> int:
        self.selects += action == sqlite3.SQLITE_SELECT
        fine = action in ALLOWED and self.selects <= OWN_SELECTS
        if action == sqlite3.SQLITE_READ:
            fine = what == "passages"
        return sqlite3.SQLITE_OK if fine else sqlite3.SQLITE_DENY


def columns_of(fields: list[str]) -> list[str]:
    """Fields that a condition can name: SQL takes upper and lower case of ASCII for one; the first of such is found."""
    usable = (name for name in fields if name and '"' not in name and "\0" not in name and len(name) <= LONGEST_NAME)
    found = {}
    for name in usable:
        found.setdefault(name.translate(LOWER), name)
    return [*found.values()][:MOST_FIELDS]


def path_of(name: str) -> str:
    """A field of a JSON object, as SQLite names it: as it is spelled there."""
    return "'$." + json.dumps(name, ensure_ascii=False).replace("'", "''") + "'"
