"""Segments: the parts of a compressed index on disk, which never change once they are written.

A segment holds passages as codec.py writes them, their ids, and inverted lists: for each centroid the passages that
have a representative there. Lists are kept for blocks of 65,536 passages, so that two bytes name one. state.json names
the segments of an index and what is deleted in them, and lists the files of each with their sizes and checksums, as
meta.json does for all else.
"""

import warnings
from pathlib import Path

import numpy as np

from nanocolbert.cli import InputError
from nanocolbert.index.codec import Codec, Codes
from nanocolbert.index.kernels.score import wrong_passage
from nanocolbert.storage.artifact import read_json
from nanocolbert.storage.checksums import Spans, check_sizes, sums_of
from nanocolbert.storage.ragged import Ids, IdWriter, NpyWriter, Ragged, check_offsets, load_npy, ranges
from nanocolbert.storage.texts import FOLDER as TEXTS
from nanocolbert.storage.texts import Texts, TextWriter

warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # memory maps; nothing writes to them

UNFIT = "offsets.npy and sizes.npy do not fit each other, or the codes"
FIRST = "1"  # the segment that an index is built with
BLOCK = 1 << 16  # passages whose inverted lists are kept together


def read_state(folder) -> dict:
    """What is in an index now: its version, and of each segment its name, the file of what is alive in it, its files.

    Raises InputError if it is damaged.
    """
    path = Path(folder) / "state.json"
    state = read_json(path)
    try:
        whole = all(isinstance(entry["name"], str) and "alive" in entry for entry in state["segments"])
    except (TypeError, KeyError):
        whole = False
    if not whole or not isinstance(state.get("version"), int):
        raise InputError(f"{path}: not the state of an index: restore it, or make {folder} again")
    return state


class SegmentWriter:
    """Write a segment: passages in blocks, in order; whole once `close` was called."""

    def __init__(self, folder, codec: Codec, keep_vectors: bool, keep_texts: bool = False):
        self.folder, self.codec = Path(folder), codec
        self.folder.mkdir(parents=True)
        self.coarse, self.fine = (NpyWriter(self.folder / f"{name}.npy", np.uint8) for name in ("coarse", "fine"))
        self.sizes = NpyWriter(self.folder / "sizes.npy", np.uint16, (2,))
        self.lists = NpyWriter(self.folder / "lists.npy", np.uint16)
        self.starts = NpyWriter(self.folder / "starts.npy", np.int64, (len(codec.centroids) + 1,))
        self.offsets = NpyWriter(self.folder / "offsets.npy", np.int64, (2,))
        self.offsets.append(np.zeros((1, 2), np.int64))
        self.pids = IdWriter(self.folder / "pids.npy")
        self.vectors = NpyWriter(self.folder / "vectors.npy", np.float16, (codec.dim,)) if keep_vectors else None
        self.texts = TextWriter(self.folder / TEXTS) if keep_texts else None
        self.pending: list[np.ndarray] = []  # centroids and passages of the block that is not full yet
        self.n = 0

    def append(self, codes: Codes, pids: list[str], vectors=None, texts=None, metadata=None) -> None:
        """Compressed passages, their ids, and what is kept of them: vectors, texts, with these objects or None."""
        coarse, fine, sizes = codes
        self.pids.append(pids)
        if self.texts is not None:
            self.texts.append(texts, metadata)
        if self.vectors is not None:
            self.vectors.append(vectors)
        ends = self.codec.passage_bytes(sizes).cumsum(0)
        self.offsets.append(np.array([self.coarse.n_rows, self.fine.n_rows]) + ends)
        self.coarse.append(coarse)
        self.fine.append(fine)
        self.sizes.append(sizes)
        first = sizes[:, 0].astype(np.int64)
        pairs = ranges(np.concatenate([[0], ends[:-1, 0]]), 2 * first) if len(sizes) else np.zeros(0, np.int64)
        centroids = coarse[pairs].view("<u2").astype(np.int64)
        if len(centroids) and centroids.max() >= len(self.codec.centroids):
            raise InputError(f"a code of centroid {centroids.max()}, of {len(self.codec.centroids)}: damaged codes")
        passages = np.repeat(self.n + np.arange(len(sizes)), first)
        self.n += len(sizes)
        self.pending.append(np.stack([centroids, passages]))
        while self.n - self.starts.n_rows * BLOCK >= BLOCK:
            self._write_lists()

    def _write_lists(self) -> None:
        """Write the inverted lists of a block: each passage once a list."""
        first, C = self.starts.n_rows * BLOCK, self.starts.row_shape[0] - 1
        centroids, passages = np.concatenate(self.pending, axis=1)
        here = passages < first + BLOCK
        self.pending = [np.stack([centroids[~here], passages[~here]])]
        pairs = np.unique(centroids[here] * BLOCK + passages[here] - first)
        starts = self.lists.n_rows + np.searchsorted(pairs, np.arange(C + 1) * BLOCK)
        self.lists.append((pairs % BLOCK).astype(np.uint16))
        self.starts.append(starts[None])

    def close(self, known: dict[str, Spans] | None = None) -> dict[str, Spans]:
        """The checksums of all files; `known`: of files that others have put here."""
        if self.n > self.starts.n_rows * BLOCK:
            self._write_lists()
        writers = [self.coarse, self.fine, self.sizes, self.lists, self.starts, self.offsets, self.pids]
        for writer in (*writers, *(kept for kept in (self.vectors, self.texts) if kept is not None)):
            writer.close()
        return sums_of(self.folder, known)


class Segment:
    """A memory-mapped segment; entry: what state.json has of it.

    entry["alive"]: the file that says what is not deleted in it, None if everything is there; entry["files"]: all files
    and their checksums, which older indexes do not have.
    """

    def __init__(self, folder, entry: dict, codec: Codec, first_row: int):
        """Raises InputError unless the files are what the state lists, and fit each other and the codec."""
        self.folder, self.codec, self.first_row = Path(folder), codec, first_row
        check_sizes(self.folder, entry.get("files", {}))
        self.sizes, self.offsets = self._load("sizes", "u2", None, 2), self._load("offsets", "i8", None, 2)
        n, C = len(self), len(codec.centroids)
        self.coarse, self.fine = (self._load(name, "u1", None) for name in ("coarse", "fine"))
        self.lists, self.starts = self._load("lists", "u2", None), self._load("starts", "i8", -(-n // BLOCK), C + 1)
        ends = len(self.coarse), len(self.fine)
        if self.offsets.shape != (n + 1, 2) or (self.offsets[0] != 0).any() or (self.offsets[-1] != ends).any():
            raise InputError(f"{self.folder}: {UNFIT}: make {self.folder.parent.parent} again")
        self.pids = Ids(self.folder / "pids.npy", n)
        self.alive = np.ones(n, bool)  # (n,), not to be written to
        if entry["alive"]:
            self.alive = load_npy(self.folder / entry["alive"], "b1", (n,), mmap=False)
        listed = entry.get("files")
        self.texts, self.vectors = Texts.of(self.folder, n, listed), None
        if "vectors.npy" in listed if listed is not None else (self.folder / "vectors.npy").is_file():
            offsets = np.append(0, self.sizes.sum(1, dtype=np.int64).cumsum())
            self.vectors = Ragged.of(self._load("vectors", "f2", int(offsets[-1]), codec.dim), offsets)

    def _load(self, name: str, kind: str, *shape: int | None) -> np.ndarray:
        return load_npy(self.folder / f"{name}.npy", kind, shape)

    def check(self) -> None:
        """Raise InputError unless offsets, sizes and starts are what the compiled loops may follow.

        Called before the first search: of a million passages it takes longer than opening them all.
        """
        first_wrong = wrong_passage(self.offsets, self.sizes, self.codec.M)
        if first_wrong < len(self):
            raise InputError(f"{self.folder}: {UNFIT} (passage {first_wrong}): make {self.folder.parent.parent} again")
        starts, path = self.starts, self.folder / "starts.npy"
        check_offsets(path, starts.ravel() if len(self) else np.zeros(1, np.int64), len(self.lists))
        if not np.array_equal(starts[1:, 0], starts[:-1, -1]):
            raise InputError(f"{path}: blocks do not follow each other: restore it, or make the index again")

    def __len__(self) -> int:
        return len(self.sizes)
