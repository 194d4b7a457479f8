"""The compressed index, open: passages in segments (segments.py), coded as codec.py says, and the search in them.

A query goes through up to four steps, each cheaper and coarser than the next:
 1. probe: for each query token, the passages of the `nprobe` lists nearest to it; what a passage promises is the sum of
    its lists' similarities, a token that found nothing of it counting as its last list (as in WARP, arXiv 2501.17788);
 2. coarse: the first `n_coarse` of them by MaxSim with the coarse codes, as look-ups, nothing is decoded
    (kernels/score.py);
 3. fine: the first `n_fine` of these by MaxSim with all codes;
 4. exact: the first `n_exact` of these by exact MaxSim, where the index keeps the fp16 vectors (exact.py).
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanocolbert.cli import InputError
from nanocolbert.compute import single_threads
from nanocolbert.index.clock import Clock
from nanocolbert.index.codec import Codec, Tables
from nanocolbert.index.exact import score_rows
from nanocolbert.index.kernels.score import FINAL, LANES, nearest_lists, probe, score_coarse, score_fine
from nanocolbert.index.knobs import Effort, effort_for
from nanocolbert.index.ranking import Ranking, gather, highest, top
from nanocolbert.index.segments import BLOCK, Segment, read_state
from nanocolbert.storage.artifact import identity, read_json
from nanocolbert.storage.texts import metadata_of, texts_of

PASSAGES = 16  # of a document looked for at a time


class CompressedIndex:
    """An open compressed index; a row is a passage's position among all segments."""

    streams, has_filters = False, True  # see ExactIndex

    def __init__(self, folder):
        """Raises InputError if there is no index, or one whose files do not fit each other."""
        self.folder, self.device, self.clock = Path(folder), torch.device("cpu"), Clock()
        if not (self.folder / "state.json").is_file():
            raise InputError(f"{folder}: not a compressed index (no state.json): run build_index.py first")
        while True:
            self._seen, error = identity(self.folder / "state.json"), None
            try:
                self.codec, self.state = Codec.load(self.folder), read_state(self.folder)
                self._open()
            except (InputError, FileNotFoundError) as found:  # replaced since the state was read?
                error = found
            if self.is_current():
                break
        if error:
            raise error
        self._check_meta()

    def _open(self) -> None:
        self.segments, self.n, self._is_checked = [], 0, False
        for entry in self.state["segments"]:
            self.segments.append(Segment(self.folder / "segments" / entry["name"], entry, self.codec, self.n))
            self.n += len(self.segments[-1])
        without = [segment.folder for segment in self.segments if segment.vectors is None]
        self.keeps_vectors = not without
        self.keeps_texts = all(segment.texts is not None for segment in self.segments)
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

    def ids(self, rows: np.ndarray) -> list[str]:
        """Ids of the given rows."""
        return self._gather(rows, lambda segment, local: segment.pids.text(local))

    def texts(self, rows: np.ndarray) -> list[str | None]:
        """Texts of the given rows; None where they are not kept."""
        return self._gather(rows, lambda segment, local: texts_of(segment.texts, local))

    def metadata(self, rows: np.ndarray) -> list[dict | None]:
        """What else is known of the given rows."""
        return self._gather(rows, lambda segment, local: metadata_of(segment.texts, local))

    def _gather(self, rows: np.ndarray, read: Callable) -> list:
        """What read(segment, its rows) gives, in the order of `rows` (n,)."""
        return gather(rows, self.segments, [segment.first_row for segment in self.segments], read)

    def vectors(self, rows: np.ndarray) -> list[np.ndarray] | None:
        """Embeddings (Ld, D) fp16 of the given rows, in the order of their tokens; None where they are not kept."""
        if not self.keeps_vectors:
            return None
        return self._gather(rows, lambda segment, local: [segment.vectors[row] for row in local])

    @property
    def version(self) -> int:
        """How often the index had been changed, from 1."""
        return self.state["version"]

    def is_current(self) -> bool:
        """Whether what is open is what lies on disk, or nothing does, as while an index is replaced; cheap."""
        return identity(self.folder / "state.json") in (self._seen, None)

    @property
    def fields(self) -> list[str]:
        """The names that metadata of passages have."""
        return list(dict.fromkeys(name for part in self.segments if part.texts for name in part.texts.metadata.fields))

    def where(self, condition: str, fields: list[str] | None = None) -> np.ndarray:
        """Whether each row's metadata fulfil a condition, as SQL has it, (n,) bool. Raises InputError.

        fields: those that it may name, by default the index's own.
        """
        fields, fulfil = self.fields if fields is None else fields, np.zeros(len(self), bool)
        if not fields:
            raise InputError(f"{self.folder}: where {condition[:200]!r}: its passages have no metadata: leave it out")
        for segment in self.segments:
            if segment.texts is not None:
                fulfil[segment.first_row + segment.texts.metadata.where(condition, fields)] = True
        return fulfil

    def rows(self, pids: list[str]) -> np.ndarray:
        """The row of each id that is there, (n,) int64; -1 for the others."""
        rows = np.full(len(pids), -1)
        for segment in self.segments:
            local = segment.pids.rows(pids)
            there = local >= 0
            there[there] = segment.alive[local[there]]
            rows[there] = local[there] + segment.first_row
        return rows

    def passage_rows(self, documents: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Rows (n,) of the passages doc#1, doc#2, ... that documents were cut to, and whose each is, (n,)."""
        rows, whose, left, first = [], [], np.arange(len(documents)), 1
        while len(left):  # some at a time: any one of them may have been deleted alone
            numbers = range(first, first + PASSAGES)
            found = self.rows([f"{documents[at]}#{n}" for at in left for n in numbers]).reshape(-1, PASSAGES)
            rows.append(found[found >= 0])
            whose.append(np.repeat(left, (found >= 0).sum(1)))
            left, first = left[(found >= 0).any(1)], first + PASSAGES
        return np.concatenate([np.zeros(0, np.int64), *rows]), np.concatenate([left, *whose])

    # --------------------------------------------------------------------------------------------------------- search

    def effort(self, quality: str, k: int, **knobs: int) -> Effort:
        """The effort of a quality where k of these passages are asked for. Raises InputError, as effort_for."""
        return effort_for(quality, k, len(self), **knobs)

    def search(self, queries: Tensor, k: int, effort: Effort, allowed: np.ndarray | None = None) -> list[Ranking]:
        """The k best rows for each query (B, Lq, D), and their scores; each query by one of the threads.

        allowed (n,) bool: rows that may be found.
        """
        with self.clock("codes"), single_threads() as threads:
            run = threads.map if len(queries) > 1 else map
            return list(run(lambda query: self._search(query, k, effort, allowed), queries.float().cpu()))

    def _search(self, query: Tensor, k: int, effort: Effort, allowed: np.ndarray | None) -> Ranking:
        query, tables = self._prepare(query)
        n_fine, n_exact = max(effort.n_fine, k), max(effort.n_exact, k)
        n_coarse = max(effort.n_coarse, n_fine)
        if allowed is not None and allowed.sum() <= n_coarse:
            rows = np.flatnonzero(allowed & self.alive())
        else:
            rows = self._probe(tables, len(query), effort.nprobe, n_coarse, allowed)
        if len(rows) > n_fine:
            rows = rows[highest(self._scores(rows, tables, fine=False), n_fine)]
        if not self.keeps_vectors:
            return top(rows, self._scores(rows, tables, fine=True), k)
        if len(rows) > n_exact:
            rows = rows[highest(self._scores(rows, tables, fine=True), n_exact)]
        return top(rows, self._exact(query, rows), k)

    def rank(self, queries: Tensor, rows: list[np.ndarray] | None, k: int, by_codes: bool = False) -> list[Ranking]:
        """The k best of each query's own rows, of all if None: by kept vectors, or by all codes.

        queries (B, Lq, D). Raises InputError if vectors are asked for, and none are kept.
        """
        self.check_rank(by_codes)
        rows = [np.flatnonzero(self.alive())] * len(queries) if rows is None else map(np.sort, rows)
        with self.clock("codes"):
            return [self._rank(*pair, k, by_codes) for pair in zip(queries.float().cpu(), rows, strict=True)]

    def _rank(self, query: Tensor, rows: np.ndarray, k: int, by_codes: bool) -> Ranking:
        query, tables = self._prepare(query)
        return top(rows, self._scores(rows, tables, fine=True) if by_codes else self._exact(query, rows), k)

    def check_rank(self, by_codes: bool) -> None:
        """Raise InputError unless passages can be scored by what is kept."""
        if not by_codes and not self.keeps_vectors:
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

    def _probe(self, tables: list[Tables], n_tokens: int, nprobe: int, n: int, allowed) -> np.ndarray:
        """Step 1: the n most promising rows, in order."""
        nprobe = min(nprobe, len(self.codec.centroids))
        left = n_tokens - LANES * np.arange(len(tables))
        near = [nearest_lists(t.centroids, min(LANES, m), nprobe) for t, m in zip(tables, left, strict=True)]
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
                found, promise = probe(segment.lists, starts, probes, gains, block, states, n)
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
                    score_fine(local, *arrays, codec.factors, found)
                else:
                    arrays = (segment.coarse, *files, codec.M, *table.rough)
                    score_coarse(local, *arrays, codec.factors[0], found)
        return scores / np.float32(FINAL)

    def _exact(self, query: Tensor, rows: np.ndarray) -> np.ndarray:
        """Exact MaxSim (n,) of rows in order."""
        scores = np.empty(len(rows), np.float32)
        for segment, part in self.parts(rows):
            scores[part] = score_rows(query, segment.vectors, rows[part] - segment.first_row, self.device)
        return scores

    def parts(self, rows: np.ndarray) -> Iterator[tuple[Segment, slice]]:
        """Each segment that has some of these rows, with their slice."""
        for segment in self.segments:
            part = slice(*np.searchsorted(rows, [segment.first_row, segment.first_row + len(segment)]))
            if part.start < part.stop:
                yield segment, part
