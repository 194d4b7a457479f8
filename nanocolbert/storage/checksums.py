"""Checksums of a folder's files: taken when it is published, compared when it is read (--verify)."""

import os
import stat
import zlib
from pathlib import Path

import numpy as np

from nanocolbert.cli import InputError

BLOCK = 1 << 22  # bytes read at a time
Spans = list[list]  # [bytes, CRC-32] of a file's parts, one after the other


def span(data) -> list:
    """[bytes, CRC-32] of bytes, or of an array."""
    data = memoryview(np.ascontiguousarray(data)).cast("B") if isinstance(data, np.ndarray) else data
    return [len(data), zlib.crc32(data)]


def sums_of(folder, known: dict[str, Spans] | None = None, also=()) -> dict[str, Spans]:
    """{path: spans} of every file of a folder but its meta.json; `known`: those that need not be read for it.

    also: files and folders in it that are left out, as what is still being written is (.partial).
    Files that only their owner may read become readable to whom the umask allows.
    """
    folder, known, sums = Path(folder), known or {}, {}
    share(folder)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_part = name != "meta.json" and path.suffix != ".partial" and name.split("/")[0] not in also
        if path.is_file() and is_part:
            sums[name] = known[name] if name in known else [sum_of(path)]
    return sums


def share(folder) -> None:
    """Make files that only their owner may read, as libraries write them, readable to whom the umask allows."""
    mask = os.umask(0)
    os.umask(mask)
    for path in Path(folder).rglob("*"):
        if path.is_file():
            found = path.stat()
            if not stat.S_IMODE(found.st_mode) & 0o077 & ~mask and found.st_uid == os.geteuid():
                path.chmod(stat.S_IMODE(found.st_mode) | (0o666 & ~mask))


def sum_of(path) -> list:
    total, size = 0, 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            total, size = zlib.crc32(block, total), size + len(block)
    return [size, total]


def check_sizes(folder, sums: dict[str, Spans]) -> None:
    """Raise InputError if one of these files is missing, or of another size."""
    for name, spans in sums.items():
        path, wanted = Path(folder) / name, sum(size for size, _ in spans)
        try:
            found = os.stat(path).st_size
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{path}: missing: restore it, or make {folder} again") from None
        if found != wanted:
            raise InputError(f"{path}: {found} bytes, should be {wanted}: restore it, or make {folder} again")


def check_sums(folder, sums: dict[str, Spans]) -> int:
    """Read files and raise InputError unless they are what was published; returns the bytes read."""
    check_sizes(folder, sums)
    read = 0
    for name, spans in sums.items():
        path = Path(folder) / name
        with open(path, "rb") as file:
            for size, wanted in spans:
                total, left = 0, size
                while left and (block := file.read(min(BLOCK, left))):
                    total, left = zlib.crc32(block, total), left - len(block)
                if total != wanted:
                    raise InputError(
                        f"{path}: damaged within bytes {file.tell() - size} to {file.tell()} (their checksum is "
                        f"another): restore it, or make {folder} again"
                    )
                read += size
    return read
