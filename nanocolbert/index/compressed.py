"""The compressed index: passages as codec.py writes them, inverted lists over the centroids, and the search in them.

A query goes through up to four steps, each cheaper and coarser than the next:
 1. probe: for each query token, the passages of the `nprobe` lists nearest to it; what a passage promises is the sum of
    its lists' similarities, a token that found nothing of it counting as its last list (as in WARP, arXiv 2501.17788);
 2. the first `n_coarse` of them by MaxSim with the coarse codes, as look-ups, nothing is decoded (kernels.py);
 3. the first `n_fine` of these by MaxSim with all codes;
 4. the first `n_exact` of these by exact MaxSim, where the index keeps the fp16 vectors.

An index is a list of segments that never change, and state.json, which names them and what is deleted in them: a
change writes new files first, and replaces state.json last. Whoever has the index open goes on with what it opened.
state.json lists the files of each segment with their sizes and checksums, as meta.json does for all else.
A segment's inverted lists are kept for blocks of 65,536 passages, so that two bytes name one.
"""

import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanocolbert.cli import InputError, held
from nanocolbert.compute import single_threads
from nanocolbert.index import kernels
from nanocolbert.index.codec import Codec, Codes, Tables
from nanocolbert.index.kernels import FINAL, LANES
from nanocolbert.index.knobs import Effort
from nanocolbert.maxsim import maxsim_packed
from nanocolbert.storage.artifact import link, locked, read_json, write_json
from nanocolbert.storage.checksums import Spans, check_sizes, sum_of, sums_of
from nanocolbert.storage.ragged import Ids, IdWriter, NpyWriter, Ragged, check_offsets, load_npy, neighbours, ranges

warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # memory maps; nothing writes to them

Ranking = tuple[np.ndarray, np.ndarray]  # rows of passages and their scores, the best first
UNFIT = "offsets.npy and sizes.npy do not fit each other, or the codes"
EXACT_TOKENS = 4096  # embeddings scored exactly at a time
COMPACT_PASSAGES = 4096  # passages copied at a time
FIRST = "1"  # the segment that an index is built with
BLOCK = 1 << 16  # passages whose inverted lists are kept together


# -------------------------------------------------------------------------------------------------------------- write


class SegmentWriter:
    """Write a segment: passages in blocks, in order; whole once `close` was called."""

    def __init__(self, folder, codec: Codec, keep_vectors: bool):
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
        self.pending: list[np.ndarray] = []  # centroids and passages of the block that is not full yet
        self.n = 0

    def append(self, codes: Codes, pids: list[str], vectors=None) -> None:
        """Compressed passages, their ids, and their vectors if they are kept."""
        coarse, fine, sizes = codes
        self.pids.append(pids)
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
        for writer in writers + [self.vectors] * (self.vectors is not None):
            writer.close()
        return sums_of(self.folder, known)


# --------------------------------------------------------------------------------------------------------------- read


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
        has = entry["files"].__contains__ if "files" in entry else lambda name: (self.folder / name).is_file()
        self.origins = self._load("origins", "i8", n) if has("origins.npy") else None
        self.vectors = None
        if has("vectors.npy"):
            offsets = np.append(0, self.sizes.sum(1, dtype=np.int64).cumsum())
            self.vectors = Ragged.of(self._load("vectors", "f2", int(offsets[-1]), codec.dim), offsets)

    def _load(self, name: str, kind: str, *shape: int | None) -> np.ndarray:
        return load_npy(self.folder / f"{name}.npy", kind, shape)

    def check(self) -> None:
        """Raise InputError unless offsets, sizes and starts are what the compiled loops may follow.

        Called before the first search: of a million passages it takes longer than opening them all.
        """
        first_wrong = kernels.wrong_passage(self.offsets, self.sizes, self.codec.M)
        if first_wrong < len(self):
            raise InputError(f"{self.folder}: {UNFIT} (passage {first_wrong}): make {self.folder.parent.parent} again")
        starts, path = self.starts, self.folder / "starts.npy"
        check_offsets(path, starts.ravel() if len(self) else np.zeros(1, np.int64), len(self.lists))
        if not np.array_equal(starts[1:, 0], starts[:-1, -1]):
            raise InputError(f"{path}: blocks do not follow each other: restore it, or make the index again")

    def __len__(self) -> int:
        return len(self.sizes)

    def origin(self, rows: np.ndarray) -> np.ndarray:
        """Where passages stand in the collection that the index was built from, (n,) int64; -1: added later."""
        if self.origins is not None:
            return self.origins[rows]
        return rows if self.folder.name == FIRST else np.full(len(rows), -1)


class CompressedIndex:
    """An open compressed index; a row is a passage's position among all segments."""

    def __init__(self, folder):
        """Raises InputError if there is no index, or one whose files do not fit each other."""
        self.folder = Path(folder)
        if not (self.folder / "state.json").is_file():
            raise InputError(f"{folder}: not a compressed index (no state.json): run build_index.py first")
        self.codec = Codec.load(self.folder)
        while True:
            self.state, error = read_state(self.folder), None
            try:
                self._open()
            except InputError as found:  # replaced since the state was read?
                error = found
            if not error and all("files" in entry for entry in self.state["segments"]):
                break
            if read_state(self.folder) == self.state:  # what no listing tells of was not removed meanwhile
                if error:
                    raise error
                break
        self._check_meta()

    def _open(self) -> None:
        self.segments, self.n, self._is_checked = [], 0, False
        for entry in self.state["segments"]:
            self.segments.append(Segment(self.folder / "segments" / entry["name"], entry, self.codec, self.n))
            self.n += len(self.segments[-1])
        without = [segment.folder for segment in self.segments if segment.vectors is None]
        self.keeps_vectors = not without
        if without and len(without) < len(self.segments):
            raise InputError(f"{without[0] / 'vectors.npy'}: missing: restore it, or make {self.folder} again")

    def _check_meta(self) -> None:
        if not (self.folder / "meta.json").is_file():
            return  # not published yet
        meta = read_json(self.folder / "meta.json")
        found = {"dim": self.codec.dim, "nlist": len(self.codec.centroids)}
        for key, value in found.items():
            if meta.get(key, value) != value:
                raise InputError(f"{self.folder}: {key} {value}, {meta[key]} by its meta.json: make it again")
        if meta.get("keep_vectors") and not self.keeps_vectors:
            raise InputError(
                f"{self.folder}: without the vectors that it was made with: restore them, or make it again"
            )

    def __len__(self) -> int:
        """Passages, the deleted ones among them."""
        return self.n

    def alive(self) -> np.ndarray:
        """Whether each row is there, (n,) bool."""
        return np.concatenate([np.zeros(0, bool), *(segment.alive for segment in self.segments)])

    def origin(self, rows: np.ndarray) -> np.ndarray:
        """Where the given rows stand in the collection that the index was built from, (n,) int64; -1: added later."""
        found = np.empty(len(rows), np.int64)
        for segment in self.segments:
            here = (rows >= segment.first_row) & (rows < segment.first_row + len(segment))
            found[here] = segment.origin(rows[here] - segment.first_row)
        return found

    def text(self, rows: np.ndarray) -> list[str]:
        """Ids of the given rows."""
        found = np.empty(len(rows), object)
        for segment in self.segments:
            here = (rows >= segment.first_row) & (rows < segment.first_row + len(segment))
            found[here] = segment.pids.text(rows[here] - segment.first_row)
        return found.tolist()

    def rows(self, pids: list[str]) -> np.ndarray:
        """The row of each id that is there, (n,) int64; -1 for the others."""
        rows = np.full(len(pids), -1)
        for segment in self.segments:
            local = segment.pids.rows(pids)
            there = local >= 0
            there[there] = segment.alive[local[there]]
            rows[there] = local[there] + segment.first_row
        return rows

    # --------------------------------------------------------------------------------------------------------- search

    def search(self, query: Tensor, k: int, effort: Effort, allowed: np.ndarray | None = None) -> Ranking:
        """The k best rows for a query (Lq, D) fp32, and their scores; allowed (n,) bool: rows that may be found."""
        query, tables = self._prepare(query)
        n_fine = max(effort.n_fine, k)
        n_coarse = max(effort.n_coarse, n_fine)
        if allowed is not None and allowed.sum() <= n_coarse:
            rows = np.flatnonzero(allowed & self.alive())
        else:
            rows = self._probe(tables, len(query), effort.nprobe, n_coarse, allowed)
        return self._finish(query, tables, rows, k, n_fine, max(effort.n_exact, k))

    def rank(self, query: Tensor, rows: np.ndarray, k: int, by_codes: bool = False) -> Ranking:
        """The k best of the given rows, in order, by kept vectors or all codes. Raises InputError without vectors."""
        query, tables = self._prepare(query)
        if by_codes:
            return top(rows, self._scores(rows, tables, fine=True), k)
        self.check_vectors()
        return top(rows, self._exact(query, rows), k)

    def check_vectors(self) -> None:
        """Raise InputError unless passages can be scored exactly."""
        if not self.keeps_vectors:
            raise InputError(
                f"{self.folder}: keeps no vectors, by which passages are scored exactly: build it with "
                "--keep_vectors, or give the embeddings folder; or say --by_codes (by_codes=True)"
            )

    def check(self) -> None:
        """Raise InputError if a segment cannot be searched; looked at once."""
        if not self._is_checked:
            for segment in self.segments:
                segment.check()
            self._is_checked = True

    def _prepare(self, query: Tensor) -> tuple[Tensor, list[Tables]]:
        self.check()
        query = query[query.any(1)]  # rows of zeros pad a query: they score 0 everywhere
        return query, [self.codec.tables(part) for part in query.split(LANES)]

    def _finish(self, query: Tensor, tables, rows: np.ndarray, k: int, n_fine: int, n_exact: int) -> Ranking:
        """Steps 2 to 4."""
        if len(rows) > n_fine:
            rows = rows[highest(self._scores(rows, tables, fine=False), n_fine)]
        if not self.keeps_vectors:
            return top(rows, self._scores(rows, tables, fine=True), k)
        if len(rows) > n_exact:
            rows = rows[highest(self._scores(rows, tables, fine=True), n_exact)]
        return top(rows, self._exact(query, rows), k)

    def _probe(self, tables: list[Tables], n_tokens: int, nprobe: int, n: int, allowed) -> np.ndarray:
        """Step 1: the n most promising rows, in order."""
        nprobe = min(nprobe, len(self.codec.centroids))
        left = n_tokens - LANES * np.arange(len(tables))
        near = [kernels.nearest_lists(t.centroids, min(LANES, m), nprobe) for t, m in zip(tables, left, strict=True)]
        probes, similarities = (np.concatenate(parts) for parts in zip(*near, strict=True))
        gains = similarities - similarities[:, -1:] + 1
        rows, promises, states = np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(1 << 16, np.uint32)
        for segment in self.segments:
            may = segment.alive
            if allowed is not None:
                may = may & allowed[segment.first_row :][: len(segment)]
            for number, starts in enumerate(segment.starts):
                first = number * BLOCK
                block = may[first : first + BLOCK]
                found, promise = kernels.probe(segment.lists, starts, probes, gains, block, states, n)
                rows = np.concatenate([rows, found + segment.first_row + first])
                promises = np.concatenate([promises, promise])
            best = highest(promises, n)
            rows, promises = rows[best], promises[best]
        return rows

    def _scores(self, rows: np.ndarray, tables: list[Tables], fine: bool) -> np.ndarray:
        """MaxSim (n,) of rows in order, by coarse codes or by all codes."""
        scores, codec = np.zeros(len(rows), np.int32), self.codec
        for segment, part in self.parts(rows):
            local, found, files = rows[part] - segment.first_row, scores[part], (segment.offsets, segment.sizes)
            for table in tables:
                if fine:
                    arrays = (segment.coarse, segment.fine, *files, codec.M, table.centroids, *table.books)
                    kernels.score_fine(local, *arrays, codec.factors, found)
                else:
                    arrays = (segment.coarse, *files, codec.M, *table.rough)
                    kernels.score_coarse(local, *arrays, codec.factors[0], found)
        return scores / np.float32(FINAL)

    def _exact(self, query: Tensor, rows: np.ndarray) -> np.ndarray:
        """Exact MaxSim (n,) of rows in order."""
        scores = np.empty(len(rows), np.float32)
        for segment, part in self.parts(rows):
            local = rows[part] - segment.first_row
            for block in neighbours(segment.vectors.lengths(local), EXACT_TOKENS):
                vectors, lengths = read_vectors(segment.vectors, local[block])
                scores[part][block] = maxsim_packed(query[None], vectors.float(), lengths)[0].numpy()
        return scores

    def parts(self, rows: np.ndarray) -> Iterator[tuple[Segment, slice]]:
        """Each segment that has some of these rows, with their slice."""
        for segment in self.segments:
            part = slice(*np.searchsorted(rows, [segment.first_row, segment.first_row + len(segment)]))
            if part.start < part.stop:
                yield segment, part

    def search_many(self, queries: Iterable[Tensor], k: int, effort: Effort, allowed=None) -> list[Ranking]:
        """`search` for many queries, each on one of the threads."""
        with single_threads() as threads:
            return list(threads.map(lambda query: self.search(query, k, effort, allowed), queries))


def read_vectors(vectors: Ragged, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Embeddings (T, D) fp16 of some passages, one after the other, and the passages' lengths (n,)."""
    positions, lengths = vectors.positions(rows)
    values = torch.index_select(torch.from_numpy(vectors.values), 0, torch.from_numpy(positions))
    return values, torch.from_numpy(lengths)


def highest(scores: np.ndarray, n: int) -> np.ndarray:
    """Positions of the n highest scores, in order of position; of equal ones the first.

    Raises InputError if one of them is not a number.
    """
    if len(scores) <= n:
        return np.arange(len(scores))
    least = np.partition(scores, len(scores) - n)[len(scores) - n]
    chosen = np.flatnonzero(scores >= least)
    if len(chosen) > n:
        equal = np.flatnonzero(scores[chosen] == least)
        chosen = np.delete(chosen, equal[n - len(chosen) :])
    check_numbers(len(chosen) == n)  # what is not one is highest, but not chosen
    return chosen


def check_numbers(are_numbers: bool) -> None:
    """Raise InputError unless scores are numbers: embeddings that are not, those that are kept or the query's."""
    if not are_numbers:
        raise InputError("a score is not a number: the index is damaged, or the model is: make it again")


def top(rows: np.ndarray, scores: np.ndarray, k: int) -> Ranking:
    """The k highest scores and their rows, which are in order; equal scores in the order of the collection."""
    check_numbers(not np.isnan(scores).any())
    best = highest(scores, k)
    best = best[np.lexsort((rows[best], -scores[best]))]
    return rows[best], scores[best]


# ------------------------------------------------------------------------------------------------------------- change


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


@contextmanager
def changing(folder):
    """Give the state of an index to be changed; replaces it when the block ends, unless by an exception.

    One process at a time: others wait. What no state names any more, or a killed process has left, is removed.
    """
    folder = Path(folder)
    with locked(folder / "lock", folder, os.O_RDWR | os.O_CREAT, wait=True):
        state = read_state(folder)
        _remove_leftovers(folder, state)
        state["version"] += 1
        try:
            yield state
            write_json(folder / "state.json", state, summed=True)
        finally:
            with held():
                _remove_leftovers(folder, read_state(folder))


def _remove_leftovers(folder: Path, state: dict) -> None:
    """Remove what a state does not name."""
    named = {entry["name"]: entry["alive"] for entry in state["segments"]}
    for segment in (folder / "segments").iterdir():
        if segment.name not in named:
            shutil.rmtree(segment)
            continue
        for path in segment.glob("alive-*.npy"):
            if path.name != named[segment.name]:
                path.unlink()


def create(folder, codec: Codec, blocks: Iterable, vectors=None, spans: Spans | None = None) -> None:
    """Write codec, state and a first segment of compressed blocks (codes, pids) into an empty folder.

    vectors: the .npy file of all values, to be linked and kept; spans: its checksums, if they are known.
    """
    folder = Path(folder)
    codec.save(folder)
    writer = SegmentWriter(folder / "segments" / FIRST, codec, keep_vectors=False)
    for codes, pids in blocks:
        writer.append(codes, pids)
    if vectors is not None:
        link(Path(vectors), writer.folder / "vectors.npy")
    files = writer.close({"vectors.npy": spans} if spans else None)
    state = {"version": 1, "segments": [{"name": FIRST, "alive": None, "files": files}]}
    write_json(folder / "state.json", state, summed=True)


def add(folder, blocks: Iterable, check: Callable = lambda index: None) -> int:
    """Add passages to an index: blocks of (values (T, D), lengths (n,), pids); returns how many.

    check(index): called before the first block is taken. Raises InputError if one of the ids is there already; the
    index is then as it was.
    """
    with changing(folder) as state:
        index, taken, name = CompressedIndex(folder), set(), str(state["version"])
        check(index)
        writer = SegmentWriter(Path(folder) / "segments" / name, index.codec, index.keeps_vectors)
        for values, lengths, pids in blocks:
            for pid, row in zip(pids, index.rows(pids).tolist(), strict=True):
                if row >= 0 or pid in taken:
                    raise InputError(f"{folder}: has a passage {pid} already: delete it first, or leave it out")
                taken.add(pid)
            writer.append(index.codec.encode(values, lengths), pids, values)
        files = writer.close()
        if writer.n:
            state["segments"].append({"name": name, "alive": None, "files": files})
    return writer.n


def delete(folder, pids: list[str], places: list[str] | None = None) -> int:
    """Delete passages from an index; returns how many. Raises InputError if one of the ids is not there.

    places: where each id stands, for messages.
    """
    with changing(folder) as state:
        index = CompressedIndex(folder)
        rows = index.rows(pids)
        if (rows < 0).any():
            first = int((rows < 0).argmax())
            raise InputError(f"{f'{places[first]}: ' if places else ''}{folder} has no passage {pids[first]}")
        rows = np.unique(rows)
        entries = {segment.folder.name: entry for segment, entry in zip(index.segments, state["segments"], strict=True)}
        for segment, part in index.parts(rows):
            entry = entries[segment.folder.name]
            alive = segment.alive.copy()
            alive[rows[part] - segment.first_row] = False
            entry["alive"] = f"alive-{state['version']}.npy"
            np.save(segment.folder / entry["alive"], alive)
            if "files" in entry:
                others = {name: spans for name, spans in entry["files"].items() if not name.startswith("alive-")}
                entry["files"] = others | {entry["alive"]: [sum_of(segment.folder / entry["alive"])]}
    return len(rows)


def compact(folder) -> int:
    """Make one segment of all, without what was deleted; returns its passages. Nothing is compressed anew."""
    with changing(folder) as state:
        index, name = CompressedIndex(folder), str(state["version"])
        index.check()
        writer = SegmentWriter(Path(folder) / "segments" / name, index.codec, index.keeps_vectors)
        np.save(writer.folder / "origins.npy", index.origin(np.flatnonzero(index.alive())))
        for segment in index.segments:
            alive = np.flatnonzero(segment.alive)
            for rows in np.array_split(alive, math.ceil(len(alive) / COMPACT_PASSAGES) or 1):
                starts, lengths = segment.offsets[rows].T, (segment.offsets[rows + 1] - segment.offsets[rows]).T
                coarse, fine = (
                    data[ranges(*where)]
                    for data, *where in zip((segment.coarse, segment.fine), starts, lengths, strict=True)
                )
                vectors = segment.vectors.gather(rows)[0] if index.keeps_vectors else None
                writer.append(Codes(coarse, fine, segment.sizes[rows]), segment.pids.text(rows), vectors)
        state["segments"] = [{"name": name, "alive": None, "files": writer.close()}]
    return writer.n
