"""The compressed index: passages as codec.py writes them, inverted lists over the centroids, and the search in them.

A query goes through four steps, each cheaper a passage and coarser than the next:
 1. probe: for each query token, the passages of the `nprobe` lists nearest to it; what a passage promises is the sum of
    its lists' similarities, a token that found nothing of it counting as its last list (as in WARP, arXiv 2501.17788);
 2. the first `n_centroids` of them by MaxSim with the centroids alone (PLAID's centroid interaction, arXiv 2205.09707);
 3. the first `n_codes` of these by MaxSim with the decoded tokens, as look-ups, nothing is decoded (kernels.py);
 4. the first `n_exact` of these by exact MaxSim, where the index keeps the fp16 vectors.

An index is a list of segments that never change, and state.json, which names them and what is deleted in them: a
change writes new files first, and replaces state.json last. Whoever has the index open goes on with what it opened.
A segment's inverted lists are kept for blocks of 65,536 passages, so that two bytes name one.
"""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import kernels
from codec import Codec
from kernels import FINAL, LANES
from model import maxsim_packed
from ragged import Ids, IdWriter, NpyWriter, Ragged, ranges

BLOCK = 1 << 16  # passages whose inverted lists are kept together


class Effort(NamedTuple):
    """How hard to look: lists probed for each query token, and passages that go through each later step."""

    nprobe: int
    n_centroids: int
    n_codes: int
    n_exact: int


QUALITY = {
    "fast": Effort(8, 1024, 256, 64),
    "default": Effort(16, 4096, 512, 128),
    "best": Effort(64, 16384, 2048, 512),
}


# -------------------------------------------------------------------------------------------------------------- write


class SegmentWriter:
    """Write a segment: passages in blocks, in order; whole once `close` was called."""

    def __init__(self, folder, codec: Codec, keep_vectors: bool):
        self.folder, self.codec = Path(folder), codec
        self.folder.mkdir(parents=True)
        self.data = NpyWriter(self.folder / "data.npy", np.uint8)
        self.sizes = NpyWriter(self.folder / "sizes.npy", np.uint16, (2,))
        self.lists = NpyWriter(self.folder / "lists.npy", np.uint16)
        self.starts = NpyWriter(self.folder / "starts.npy", np.int64, (len(codec.centroids) + 1,))
        self.offsets = NpyWriter(self.folder / "offsets.npy", np.int64)
        self.offsets.append(np.zeros(1, np.int64))
        self.pids = IdWriter(self.folder / "pids.npy")
        self.vectors = NpyWriter(self.folder / "vectors.npy", np.float16, (codec.dim,)) if keep_vectors else None
        self.pending: list[np.ndarray] = []  # centroids and passages of the block that is not full yet
        self.n, self.n_tokens = 0, 0

    def append(self, data: np.ndarray, sizes: np.ndarray, pids: list[str], vectors=None) -> None:
        """Compressed passages, as Codec.encode gives them, their ids, and their vectors if they are kept."""
        self.pids.append(pids)
        self.data.append(data)
        if self.vectors is not None:
            self.vectors.append(vectors)
        ends = self.codec.passage_bytes(sizes).cumsum()
        self.offsets.append(self.data.n_rows - len(data) + ends)
        self.sizes.append(sizes)
        first = sizes[:, 0].astype(np.int64)
        pairs = ranges(np.concatenate([[0], ends[:-1]]), 2 * first) if len(sizes) else np.zeros(0, np.int64)
        centroids = data[pairs].view("<u2").astype(np.int64)
        passages = np.repeat(self.n + np.arange(len(sizes)), first)
        self.n, self.n_tokens = self.n + len(sizes), self.n_tokens + int(sizes.sum())
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

    def close(self) -> None:
        if self.n > self.starts.n_rows * BLOCK or not self.n:
            self._write_lists() if self.n else self.starts.append(np.zeros((1, *self.starts.row_shape), np.int64))
        for writer in (self.data, self.sizes, self.lists, self.starts, self.offsets, self.pids, self.vectors):
            if writer is not None:
                writer.close()


# --------------------------------------------------------------------------------------------------------------- read


class Segment:
    """A memory-mapped segment and what is deleted in it."""

    def __init__(self, folder, deleted: str | None, first_row: int):
        self.folder, self.first_row, self.deleted = Path(folder), first_row, deleted
        names = ("data", "offsets", "sizes", "lists", "starts")
        self.data, self.offsets, self.sizes, self.lists, self.starts = (self._open(name) for name in names)
        self.pids = Ids(self.folder / "pids.npy")
        self.alive = np.load(self.folder / deleted, mmap_mode="r") if deleted else None  # (n,) bool

    def _open(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.sizes)

    @cached_property
    def vectors(self) -> Ragged | None:
        """The fp16 vectors of the passages, where they are kept."""
        if not (self.folder / "vectors.npy").is_file():
            return None
        ragged = object.__new__(Ragged)
        ragged.values = self._open("vectors")
        ragged.offsets = np.concatenate([[0], np.cumsum(self.sizes.sum(1, dtype=np.int64))])
        return ragged


class CompressedIndex:
    """An open compressed index; a row is a passage's position among all segments."""

    def __init__(self, folder):
        self.folder = Path(folder)
        state = json.loads((self.folder / "state.json").read_text())
        self.version, self.codec = state["version"], Codec.load(self.folder)
        self.segments, first = [], 0
        for entry in state["segments"]:
            self.segments.append(Segment(self.folder / "segments" / entry["name"], entry["alive"], first))
            first += len(self.segments[-1])
        self.n = first

    def __len__(self) -> int:
        """Passages, the deleted ones among them."""
        return self.n

    def alive(self) -> np.ndarray:
        """Whether each row is there (n,) bool."""
        parts = [np.ones(len(s), bool) if s.alive is None else s.alive for s in self.segments]
        return np.concatenate(parts) if parts else np.zeros(0, bool)

    def pids(self, rows: np.ndarray) -> list[str]:
        """Ids of the given rows."""
        found = np.empty(len(rows), object)
        for segment in self.segments:
            here = (rows >= segment.first_row) & (rows < segment.first_row + len(segment))
            found[here] = segment.pids.text(rows[here] - segment.first_row)
        return found.tolist()

    def rows(self, pids: list[str]) -> np.ndarray:
        """The row of each id that is there (n,) int64, -1 for the others."""
        rows = np.full(len(pids), -1)
        for segment in self.segments:
            local = segment.pids.rows(pids)
            there = local >= 0
            if segment.alive is not None:
                there[there] = segment.alive[local[there]]
            rows[there] = local[there] + segment.first_row
        return rows

    def search(self, query: Tensor, k: int, effort: Effort, allowed: np.ndarray | None = None):
        """The k best rows for a query (Lq, D), and their scores; allowed (n,) bool: rows that may be found."""
        padding = ~query.any(1)
        query = query[~padding] if padding.any() else query
        n_codes, n_exact = max(effort.n_codes, 2 * k), max(effort.n_exact, 2 * k)
        n_centroids = max(effort.n_centroids, n_codes)
        tables = [self.codec.tables(part) for part in query.split(LANES)]
        if allowed is not None and allowed.sum() <= n_centroids:
            rows = self._alive_of(np.flatnonzero(allowed))
        else:
            rows = self._probe(query, tables, effort.nprobe, n_centroids, allowed)
        if len(rows) > n_codes:
            rows = rows[highest(self._scores(rows, tables, kernels.score_centroids), n_codes)]
        scores = self._scores(rows, tables, kernels.score_passages)
        if self.segments and self.segments[0].vectors is not None:
            rows = np.sort(rows[highest(scores, n_exact)])
            scores = self._exact(query, rows)
        best = highest(scores, k)
        best = best[np.lexsort((rows[best], -scores[best]))]
        return rows[best], scores[best]

    def _alive_of(self, rows: np.ndarray) -> np.ndarray:
        return rows[self.alive()[rows]]

    def _probe(self, query: Tensor, tables, nprobe: int, n: int, allowed) -> np.ndarray:
        """Step 1: the n most promising rows."""
        similarities = np.concatenate([part.centroids[:, : len(q)] for part, q in zip(tables, query.split(LANES))], 1)
        nprobe = min(nprobe, len(similarities))
        values, probes = torch.from_numpy(similarities.T.astype(np.int32)).topk(nprobe)  # (Lq, nprobe)
        gains = (values - values[:, -1:]).int().numpy() + 1
        probes = probes.numpy()
        rows, promises = np.zeros(0, np.int64), np.zeros(0, np.int32)
        seen, totals, found = np.zeros(BLOCK, np.uint8), np.zeros(BLOCK, np.int32), np.empty(BLOCK, np.int64)
        for segment in self.segments:
            for number, starts in enumerate(segment.starts):
                passages, promise = kernels.probe(segment.lists, starts, probes, gains, seen, totals, found)
                passages += number * BLOCK
                if segment.alive is not None:
                    kept = segment.alive[passages]
                    passages, promise = passages[kept], promise[kept]
                passages += segment.first_row
                if allowed is not None:
                    kept = allowed[passages]
                    passages, promise = passages[kept], promise[kept]
                rows, promises = np.concatenate([rows, passages]), np.concatenate([promises, promise])
                best = highest(promises, n)
                rows, promises = rows[best], promises[best]
        return np.sort(rows)

    def _scores(self, rows: np.ndarray, tables, kernel) -> np.ndarray:
        """Steps 2 and 3: MaxSim (n,) fp32 of rows in order."""
        scores = np.zeros(len(rows), np.int32)
        for segment in self.segments:
            start, stop = np.searchsorted(rows, [segment.first_row, segment.first_row + len(segment)])
            if start == stop:
                continue
            local, out = rows[start:stop] - segment.first_row, scores[start:stop]
            arrays = (local, segment.data, segment.offsets, segment.sizes)
            for part in tables:
                if kernel is kernels.score_centroids:
                    kernel(*arrays, part.centroids, out)
                else:
                    kernel(*arrays, self.codec.M, *part, out)
        return scores.astype(np.float32) / FINAL

    def _exact(self, query: Tensor, rows: np.ndarray) -> np.ndarray:
        """Step 4: exact MaxSim (n,) of rows in order."""
        scores = np.empty(len(rows), np.float32)
        for segment in self.segments:
            start, stop = np.searchsorted(rows, [segment.first_row, segment.first_row + len(segment)])
            if start < stop:
                values, lengths = segment.vectors.gather(rows[start:stop] - segment.first_row)
                vectors = torch.from_numpy(values).float()
                scores[start:stop] = maxsim_packed(query[None], vectors, torch.from_numpy(lengths))[0].numpy()
        return scores

    def search_batch(self, queries: Iterable[Tensor], k: int, effort: Effort, allowed=None) -> list:
        """`search` for many queries, one a thread."""
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            return list(threads.map(lambda query: self.search(query, k, effort, allowed), queries))


def highest(scores: np.ndarray, n: int) -> np.ndarray:
    """Positions of the n highest scores, in order of position."""
    return np.sort(np.argpartition(-scores, n - 1)[:n]) if len(scores) > n else np.arange(len(scores))
