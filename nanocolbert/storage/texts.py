"""What is kept of passages beside their embeddings: their texts, and what else was known of them.

A folder texts/: a ragged array of UTF-8 bytes, memory-mapped; where there is metadata, metadata.sqlite beside it.
"""

from collections.abc import Container, Iterable
from functools import cached_property
from pathlib import Path

import numpy as np

from nanocolbert.cli import InputError
from nanocolbert.storage.artifact import identity, link
from nanocolbert.storage.metadata import Metadata, MetadataWriter
from nanocolbert.storage.ragged import Ragged, RaggedWriter

FOLDER, OFFSETS, METADATA = "texts", "offsets.npy", "metadata.sqlite"


class TextWriter:
    """Append texts, and metadata, of passages to a folder; it is whole once `close` was called."""

    def __init__(self, folder):
        self.texts = RaggedWriter(folder, np.uint8)
        self.metadata = MetadataWriter(Path(folder) / METADATA)

    def append(self, texts: list[str], metadata: Iterable[dict | None] | None = None) -> None:
        """Texts, and an object of each or None."""
        if metadata is not None:
            self.metadata.append(len(self.texts), metadata)
        encoded = [text.encode() for text in texts]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        self.texts.append(np.frombuffer(b"".join(encoded), np.uint8), lengths)

    def close(self) -> None:
        self.texts.close()
        self.metadata.close()


class Texts:
    """The texts of an artifact's n passages, and their metadata; opened when they are first asked for."""

    def __init__(self, folder, n: int, has_metadata: bool):
        self.folder, self.n = Path(folder), n
        self.seen = identity(self.folder / OFFSETS)
        self.metadata_seen = identity(self.folder / METADATA) if has_metadata else None

    @cached_property
    def bytes(self) -> Ragged:
        """Raises InputError where they are not those of n passages, or others by now."""
        found = Ragged(self.folder, "u1")
        if identity(self.folder / OFFSETS) != self.seen:
            raise InputError(f"{self.folder}: replaced since it was opened: open it again")
        if len(found) != self.n:
            raise InputError(f"{self.folder}: {len(found)} texts of {self.n} passages: restore it, or make it again")
        return found

    def check(self) -> None:
        """Raise InputError as `bytes` does."""
        assert len(self.bytes) == self.n

    @cached_property
    def metadata(self) -> Metadata:
        return Metadata(self.folder / METADATA, self.metadata_seen)

    @classmethod
    def of(cls, folder, n: int, listed: Container[str] | None = None) -> "Texts | None":
        """Those of an artifact in `folder`; None where it keeps none.

        listed: the artifact's files, where others may remove them meanwhile: what is gone is not what never was.
        """
        folder = Path(folder) / FOLDER
        if listed is None:
            return cls(folder, n, (folder / METADATA).is_file()) if folder.is_dir() else None
        has = {name: f"{FOLDER}/{name}" in listed for name in (OFFSETS, METADATA)}
        return cls(folder, n, has[METADATA]) if has[OFFSETS] else None

    def __getitem__(self, row: int) -> str:
        try:
            return bytes(self.bytes[row]).decode()
        except UnicodeDecodeError:
            raise InputError(f"{self.folder}: text {row} is not UTF-8: restore it, or make the folder again") from None


def texts_of(texts: Texts | None, rows: np.ndarray) -> list[str | None]:
    """The texts of some rows (n,); None where none are kept."""
    return [None] * len(rows) if texts is None else [texts[row] for row in rows.tolist()]


def metadata_of(texts: Texts | None, rows: np.ndarray) -> list[dict | None]:
    """The metadata of some rows (n,); None where there are none."""
    return [None] * len(rows) if texts is None else texts.metadata.objects(rows)


def link_texts(source, target, n: int) -> bool:
    """Hard-link the texts of an artifact's n passages into another folder; returns whether there are any.

    Raises InputError where they do not fit each other.
    """
    texts = Texts.of(source, n)
    if texts is None:
        return False
    texts.check()
    (Path(target) / FOLDER).mkdir()
    for path in texts.folder.iterdir():
        link(path, Path(target) / FOLDER / path.name)
    return True
