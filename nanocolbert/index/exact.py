"""Exact MaxSim with stored embeddings, memory-mapped fp16, in fp32: of every passage, streamed, or of given ones."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanocolbert.cli import InputError
from nanocolbert.index.clock import Clock
from nanocolbert.index.knobs import Depths, depths_for
from nanocolbert.index.ranking import Ranking, highest, top
from nanocolbert.maxsim import maxsim_packed
from nanocolbert.progress import progress
from nanocolbert.storage.ragged import Ids, Ragged, neighbours
from nanocolbert.storage.texts import Texts, metadata_of, texts_of

ROWS_TOKENS = {"cpu": 4096, "cuda": 1 << 20}  # embeddings of given passages scored at a time
EXACT_TOKENS = 4096  # embeddings scored at a time of all
EXACT_QUERIES = 16  # against so many queries: their similarities, 8 MB, stay in the cache
EXACT_PASSAGES = 2048  # passages whose scores are kept before they are merged into the best


def read_vectors(vectors: Ragged, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Embeddings (T, D) fp16 of some passages, one after the other, and the passages' lengths (n,)."""
    positions, lengths = vectors.positions(rows)
    values = torch.index_select(torch.from_numpy(vectors.values), 0, torch.from_numpy(positions))
    return values, torch.from_numpy(lengths)


def score_rows(query: Tensor, vectors: Ragged, rows: np.ndarray, device, clock: Callable = nullcontext) -> np.ndarray:
    """Exact MaxSim (n,) of a query (Lq, D) with the passages `rows`, in order: the map is read from front to back."""
    query, scores = query[None].to(device), np.empty(len(rows), np.float32)
    for block in neighbours(vectors.lengths(rows), ROWS_TOKENS[query.device.type]):
        with clock("read embeddings"):
            values, lengths = read_vectors(vectors, rows[block])
            values = values.to(device).float()  # (T, D)
        with clock("MaxSim"):
            scores[block] = maxsim_packed(query, values, lengths.to(device))[0].cpu().numpy()
    return scores


class ExactIndex:
    """Stored embeddings, without an index; a row is a passage's position in the collection."""

    streams = True  # scoring every passage reads them all: queries had better come at once
    has_filters = False  # passages are not chosen by their ids and metadata
    version, fields = 1, ()
    effort = staticmethod(depths_for)

    def __init__(self, folder, meta: dict, device="cpu"):
        """Open a folder, of which `meta` is the meta.json. Raises InputError if its arrays do not fit."""
        self.folder, self.meta, self.device, self.clock = Path(folder), meta, torch.device(device), Clock()
        self.embeddings = Ragged(self.folder, "f2")
        self.pids = Ids(self.folder / "pids.npy", len(self.embeddings))
        self.kept_texts = Texts.of(self.folder, len(self.embeddings))
        found, wanted = self.embeddings.values.shape, (meta.get("embeddings", len(self.embeddings.values)), meta["dim"])
        if found != wanted:
            raise InputError(
                f"{self.folder / 'values.npy'}: of shape {found}, {wanted} by meta.json: restore it, or make "
                f"{self.folder} again"
            )
        if len(empty := np.flatnonzero(self.embeddings.offsets[1:] == self.embeddings.offsets[:-1])):
            pid = self.ids(empty[:1])[0]
            raise InputError(f"{self.folder}: passage {pid} has no embeddings: leave it out of the collection")

    def __len__(self) -> int:
        """Passages."""
        return len(self.embeddings)

    def is_current(self) -> bool:
        """Whether what is open is what lies on disk: nothing changes it."""
        return True

    def alive(self) -> np.ndarray:
        """Whether each row is there, (n,) bool: all are."""
        return np.ones(len(self), bool)

    def ids(self, rows: np.ndarray) -> list[str]:
        """Ids of the given rows."""
        return self.pids.text(rows)

    def texts(self, rows: np.ndarray) -> list[str | None]:
        """Texts of the given rows; None where they are not kept."""
        return texts_of(self.kept_texts, rows)

    def metadata(self, rows: np.ndarray) -> list[dict | None]:
        """What else is known of the given rows."""
        return metadata_of(self.kept_texts, rows)

    def vectors(self, rows: np.ndarray) -> list[np.ndarray]:
        """Embeddings (Ld, D) fp16 of the given rows."""
        return [self.embeddings[row] for row in rows]

    def rows(self, pids: list[str]) -> np.ndarray:
        """The row of each id that is there, (n,) int64; -1 for the others."""
        return self.pids.rows(pids)

    def search(self, queries: Tensor, k: int, effort: Depths, allowed=None) -> list[Ranking]:
        """Raises InputError: there is nothing to find passages by."""
        raise InputError(f"{self.folder}: embeddings without an index: run build_index.py, or use --exact")

    def check_rank(self, by_codes: bool) -> None:
        """Raise InputError if passages are to be scored by codes, which are not here."""
        if by_codes:
            raise InputError("by_codes says how a compressed index scores --exact and --candidates: leave it out")

    def rank(self, queries: Tensor, rows: list[np.ndarray] | None, k: int, by_codes: bool = False) -> list[Ranking]:
        """The k best of each query's own rows, of all if None; queries (B, Lq, D)."""
        self.check_rank(by_codes)
        if rows is None:
            return self._rank_all(queries, k)
        return [self._rank(query, np.sort(own), k) for query, own in zip(queries, rows, strict=True)]

    def _rank(self, query: Tensor, rows: np.ndarray, k: int) -> Ranking:
        return top(rows, score_rows(query, self.embeddings, rows, self.device, self.clock), k)

    def _rank_all(self, queries: Tensor, k: int) -> list[Ranking]:
        """Every embedding is read once."""
        best_rows, best = ([np.zeros(0, dtype)] * len(queries) for dtype in (np.int64, np.float32))  # (up to k,) each
        scores, first, queries = [], 0, queries.to(self.device)
        for block in progress(neighbours(np.diff(self.embeddings.offsets), EXACT_TOKENS), desc="exact", unit=" blocks"):
            with self.clock("MaxSim"):
                scores.append(self._score_block(queries, block))  # (B, passages of the block)
            if block.stop - first >= EXACT_PASSAGES or block.stop == len(self):
                with self.clock("merge"):
                    rows = np.arange(first, block.stop)
                    for query, new in enumerate(torch.cat(scores, 1).numpy()):
                        found = np.concatenate([best[query], new])
                        chosen = highest(found, k)  # in order of position
                        best[query], best_rows[query] = found[chosen], np.append(best_rows[query], rows)[chosen]
                    scores, first = [], block.stop
        return [top(rows, scores, k) for rows, scores in zip(best_rows, best, strict=True)]

    def _score_block(self, queries: Tensor, block: slice) -> Tensor:
        """MaxSim (B, n) of queries (B, Lq, D) with neighbouring passages."""
        values, lengths = self.embeddings.slice(block.start, block.stop)
        values = torch.from_numpy(np.array(values)).to(self.device).float()  # (T, D)
        lengths = torch.from_numpy(lengths).to(self.device)
        return torch.cat([maxsim_packed(part, values, lengths) for part in queries.split(EXACT_QUERIES)]).cpu()
