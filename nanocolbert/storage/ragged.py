"""Ragged arrays and ids on disk: rows of different lengths as one `values.npy` and int64 `offsets.npy` (n + 1).

Row i is `values[offsets[i]:offsets[i + 1]]`. Both files are plain .npy, memory-mapped when read and appended to when
written, so neither reader nor writer holds more than the rows in hand.
"""

import itertools
import os
from pathlib import Path
from tokenize import TokenError

import numpy as np

from nanocolbert.cli import InputError, first_line

BLOCK = 1 << 16  # ids handled at a time
CHECKED = 1 << 20  # offsets looked at at a time


def load_npy(path, kinds: str = "", shape: tuple[int | None, ...] | None = None, mmap: bool = True) -> np.ndarray:
    """A .npy file, memory-mapped unless told otherwise. Raises InputError if it is not what is wanted.

    kinds: the types it may have ("i8 S": int64, or bytes of any length), all if empty. shape: None stands for any size.
    """
    path = Path(path)
    again = f"restore it, or make {path.parent} again"
    try:
        array = np.load(path, mmap_mode="r" if mmap else None)
    except FileNotFoundError:
        raise InputError(f"{path}: missing: {again}") from None
    except (ValueError, EOFError, SyntaxError, TypeError, KeyError, OverflowError, MemoryError, TokenError) as error:
        reason = "pickled objects, which are never loaded" if "pickle" in str(error) else first_line(error)
        raise InputError(f"{path}: not a whole .npy file ({reason}): {again}") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: not a .npy file: {again}")
    with open(path, "rb") as file:
        start, size = header_size(file.read(12)), os.fstat(file.fileno()).st_size
    if start + array.nbytes != size:  # a flipped bit of the header's length: all values would be others
        raise InputError(f"{path}: {size} bytes, {start + array.nbytes} by its header: {again}")
    found = f"{array.dtype.kind}{array.dtype.itemsize}"
    is_wanted = not kinds or found in kinds.split() or array.dtype.kind in kinds.split()
    if not is_wanted or not array.dtype.isnative:
        raise InputError(f"{path}: holds {array.dtype}, not {kinds}: {again}")
    shape = array.shape if shape is None else shape
    if len(shape) != array.ndim or any(want not in (None, n) for want, n in zip(shape, array.shape, strict=True)):
        wanted = " x ".join("any" if size is None else str(size) for size in shape)
        raise InputError(f"{path}: of shape {' x '.join(map(str, array.shape))}, not {wanted}: {again}")
    return array


def header_size(head: bytes) -> int:
    """Where the values of a .npy file begin, from its first 12 bytes: magic string, version, length of the header."""
    return 10 + int.from_bytes(head[8:10], "little") if head[6] == 1 else 12 + int.from_bytes(head[8:12], "little")


def check_offsets(path, offsets: np.ndarray, end: int) -> None:
    """Raise InputError unless offsets (n + 1,) begin with 0, never fall, and end with `end`."""
    falls = any(
        (np.diff(offsets[start : start + CHECKED + 1]) < 0).any() for start in range(0, len(offsets) - 1, CHECKED)
    )
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != end or falls:
        raise InputError(f"{path}: not the offsets of {end} values: restore it, or make {Path(path).parent} again")


class NpyWriter:
    """Append rows to a .npy file whose length is not known beforehand; it can be loaded once `close` was called."""

    def __init__(self, path, dtype, row_shape: tuple[int, ...] = ()):
        self.file = open(path, "wb+")  # noqa: SIM115 - closed by close()
        self.dtype, self.row_shape, self.n_rows = np.dtype(dtype), row_shape, 0
        self._write_header()
        self.start = self.file.tell()

    def _write_header(self) -> None:
        # numpy pads the header so that a longer first axis still fits: it can be written again over itself
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.n_rows, *self.row_shape)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def append(self, rows: np.ndarray) -> None:
        assert rows.shape[1:] == self.row_shape, (rows.shape, self.row_shape)
        self.file.write(np.ascontiguousarray(rows, self.dtype).data.cast("B") if len(rows) else b"")
        self.n_rows += len(rows)

    def close(self) -> None:
        self.file.seek(0)
        self._write_header()
        assert self.file.tell() == self.start, "the .npy header changed its length"
        self.file.close()


def allocate_npy(path, dtype, shape: tuple[int, ...]) -> None:
    """Write a .npy file of zeros (a hole on disk) whose parts are to be written later, by several processes."""
    with open(path, "wb") as file:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + int(np.prod(shape)) * np.dtype(dtype).itemsize)


class RaggedWriter:
    """Append rows to a ragged array in `folder`; it is whole once `close` was called."""

    def __init__(self, folder, dtype, row_shape: tuple[int, ...] = ()):
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.values = NpyWriter(Path(folder) / "values.npy", dtype, row_shape)
        self.offsets = NpyWriter(Path(folder) / "offsets.npy", np.int64)
        self.offsets.append(np.zeros(1, np.int64))

    def __len__(self) -> int:
        return self.offsets.n_rows - 1

    def append(self, values: np.ndarray, lengths: np.ndarray) -> None:
        """Append len(lengths) rows; values (sum of lengths, ...) holds them one after the other."""
        assert len(values) == lengths.sum(), (len(values), lengths.sum())
        self.offsets.append(self.values.n_rows + np.cumsum(lengths, dtype=np.int64))
        self.values.append(values)

    def close(self) -> None:
        self.values.close()
        self.offsets.close()


class Ragged:
    """A memory-mapped ragged array: `len`, one row by `[i]`, many by `gather`."""

    def __init__(self, folder, kinds: str = ""):
        """Open the arrays in a folder, values of one of these types. Raises InputError if they do not fit."""
        self.values = load_npy(Path(folder) / "values.npy", kinds)
        self.offsets = load_npy(Path(folder) / "offsets.npy", "i8", (None,))
        check_offsets(Path(folder) / "offsets.npy", self.offsets, len(self.values))

    @classmethod
    def of(cls, values: np.ndarray, offsets: np.ndarray) -> "Ragged":
        """Arrays that are at hand."""
        ragged = object.__new__(cls)
        ragged.values, ragged.offsets = values, offsets
        return ragged

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Lengths of the given rows (n,)."""
        return self.offsets[rows + 1] - self.offsets[rows]

    def gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values (T, ...) of the given rows one after the other, and their lengths (n,)."""
        positions, lengths = self.positions(rows)
        return self.values[positions], lengths

    def positions(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions in `values` (T,) of the given rows' values, and the rows' lengths (n,)."""
        lengths = self.lengths(rows)
        return ranges(self.offsets[rows], lengths), lengths

    def slice(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """As `gather` for the neighbouring rows start ... stop - 1, without a copy."""
        offsets = self.offsets[start : stop + 1]
        return self.values[offsets[0] : offsets[-1]], np.diff(offsets)


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ..., start + length - 1 of each range, one after the other: (sum of lengths,) int64."""
    shifts = starts - np.cumsum(lengths) + lengths
    return np.arange(lengths.sum()) + np.repeat(shifts, lengths)


def neighbours(lengths: np.ndarray, size: int) -> list[slice]:
    """Slices of neighbouring rows that hold about `size` values each, from the rows' lengths (n,)."""
    edges = np.searchsorted(np.cumsum(lengths), np.arange(size, lengths.sum(), size))
    edges = np.unique(np.concatenate([[0], edges, [len(lengths)]])).tolist()
    return [slice(*pair) for pair in itertools.pairwise(edges)]


def length_batches(lengths: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
    """Rows grouped into batches of similar length, the longest first, each at most `tokens_per_batch` positions."""
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, tokens_per_batch // int(lengths[order[start]]))
        batches.append(order[start : start + size])
        start += size
    return batches


class IdWriter:
    """Append ids to a .npy file: int64 if every one is a plain decimal number, else fixed-width UTF-8 bytes."""

    def __init__(self, path):
        self.path, self.text = Path(path), Path(f"{path}.text")
        self.file = open(self.text, "wb+")  # noqa: SIM115 - closed by close()
        self.are_numbers, self.width = True, 1

    def append(self, ids: list[str]) -> None:
        encoded = [identifier.encode() for identifier in ids]
        self.width = max(self.width, max(map(len, encoded), default=0))
        self.are_numbers = self.are_numbers and all(map(is_number, encoded))
        self.file.writelines(identifier + b"\n" for identifier in encoded)

    def close(self) -> None:
        self.file.seek(0)
        writer = NpyWriter(self.path, np.int64 if self.are_numbers else f"S{self.width}")
        while lines := self.file.readlines(BLOCK * self.width):
            writer.append(np.array([line[:-1] for line in lines], f"S{self.width}").astype(writer.dtype))
        writer.close()
        self.file.close()
        self.text.unlink()


def is_number(identifier: bytes) -> bool:
    """Whether the id survives the way through an int64: digits, no leading zero, under 10^18."""
    return identifier.isdigit() and len(identifier) < 19 and (identifier[:1] != b"0" or identifier == b"0")


class Ids:
    """The ids of an artifact's rows, both ways: `text(rows)` and `rows(ids)`; 8 bytes a row once ids are looked up."""

    def __init__(self, path, n: int | None = None):
        """Open a file of ids. Raises InputError if it holds none, or not `n`."""
        self.ids = load_npy(path, "i8 S", (n,))
        self._order = None

    def __len__(self) -> int:
        return len(self.ids)

    def text(self, rows) -> list[str]:
        """Ids of the given rows."""
        ids = self.ids[rows]
        return [str(i) for i in ids] if self.ids.dtype.kind == "i" else [i.decode() for i in ids.tolist()]

    def order(self) -> np.ndarray:
        """Rows in the order of their ids (n,)."""
        if self._order is None:
            self._order = np.argsort(self.ids, kind="stable")
        return self._order

    def duplicate(self) -> tuple[str, int, int] | None:
        """(id, its first row, its second row) of the earliest repeated id, or None."""
        order = self.order()
        repeats = np.flatnonzero(self.ids[order[1:]] == self.ids[order[:-1]])
        if not len(repeats):
            return None
        first = repeats[np.argmin(order[repeats + 1])]
        return self.text([order[first]])[0], int(order[first]), int(order[first + 1])

    def rows(self, ids: list[str]) -> np.ndarray:
        """Row of each id (n,) int64, -1 where there is none."""
        order = self.order()
        encoded = [identifier.encode(errors="surrogatepass") for identifier in ids]  # half a character is in no id
        if not len(order) or not len(encoded):
            return np.full(len(encoded), -1)
        if self.ids.dtype.kind == "i":
            wanted = np.array([int(identifier) if is_number(identifier) else -1 for identifier in encoded])
        else:
            width = self.ids.dtype.itemsize  # and zero bytes at the end would be as good as none
            wanted = np.array([b"" if len(one) > width or one.endswith(b"\0") else one for one in encoded])
        found = order[np.minimum(np.searchsorted(self.ids, wanted, sorter=order), len(order) - 1)]
        return np.where(self.ids[found] == wanted, found, -1)
