"""Several indexes searched as one: each finds its own best, and the best of all of these are the answer.

So a collection may lie in parts, each built by itself, on one machine or on many (docs/scale.md). A row is a passage's
position among all of them, in the order in which they were given.
"""

from collections import Counter
from collections.abc import Callable

import numpy as np
from torch import Tensor

from nanocolbert.cli import InputError
from nanocolbert.index.clock import Clock
from nanocolbert.index.documents import first_of_documents
from nanocolbert.index.ranking import Ranking, gather, top

# Of each meta.json, and what holds where it does not say:
SAME = {**dict.fromkeys(("kind", "method", "model_fingerprint", "tokenizer_fingerprint", "dim")), "pool_factor": 1}


class JoinedIndex:
    """Open indexes of the same kind and model, searched as one."""

    def __init__(self, metas: list[dict], indexes: list):
        """Raises InputError unless they are of the same kind and model; metas: their meta.json."""
        self.indexes, self.mine = indexes, range(len(indexes))
        self.first_rows = np.append(0, np.cumsum([len(index) for index in indexes]))
        first = indexes[0]
        for index, meta in zip(indexes, metas, strict=True):
            for key, default in SAME.items():
                found, wanted = meta.get(key, default), metas[0].get(key, default)
                if found != wanted:
                    raise InputError(
                        f"{index.folder}: {key} {found}, {wanted} in {first.folder}: only indexes of one kind and one "
                        "model are searched together"
                    )
        self.clock = first.clock
        self.streams, self.has_filters = first.streams, first.has_filters
        self.effort = max(indexes, key=len).effort  # the others take less
        self.folder = ", ".join(str(index.folder) for index in indexes)

    def search_only(self, number: int, of: int) -> None:
        """From now on search the indexes of one process of several: neighbours, so that equal scores keep their order.

        Raises InputError where there are fewer indexes than processes.
        """
        if len(self.indexes) < of:
            raise InputError(f"{len(self.indexes)} indexes for {of} processes: give at most as many processes")
        edges = [len(self.indexes) * at // of for at in (number, number + 1)]
        self.mine = range(*edges)

    @property
    def clock(self) -> Clock:
        """Where time goes, in all of them."""
        return self.indexes[0].clock

    @clock.setter
    def clock(self, clock: Clock) -> None:
        for index in self.indexes:
            index.clock = clock

    def __len__(self) -> int:
        """Passages, the deleted ones among them."""
        return int(self.first_rows[-1])

    @property
    def version(self) -> int:
        """How often they have been changed, all together, from 1."""
        return 1 + sum(index.version - 1 for index in self.indexes)

    @property
    def fields(self) -> list[str]:
        """The names that metadata of passages have."""
        return list(dict.fromkeys(name for index in self.indexes for name in index.fields))

    def is_current(self) -> bool:
        """Whether what is open is what lies on disk."""
        return all(index.is_current() for index in self.indexes)

    def alive(self) -> np.ndarray:
        """Whether each row is there, (n,) bool."""
        return np.concatenate([index.alive() for index in self.indexes])

    def where(self, condition: str) -> np.ndarray:
        """Whether each row's metadata fulfil a condition, as SQL has it, (n,) bool. Raises InputError."""
        if not self.fields:
            raise InputError(f"{self.folder}: where {condition[:200]!r}: no passages with metadata: leave it out")
        return np.concatenate([index.where(condition, self.fields) for index in self.indexes])

    def rows(self, pids: list[str]) -> np.ndarray:
        """The row of each id that is there, (n,) int64; -1 for the others. Raises InputError for one that is twice."""
        rows = np.full(len(pids), -1)
        for index, first in zip(self.indexes, self.first_rows[:-1], strict=True):
            found = index.rows(pids)
            there = found >= 0
            if len(twice := np.flatnonzero(there & (rows >= 0))):
                raise self._twice(pids[twice[0]])
            rows[there] = found[there] + first
        return rows

    def ids(self, rows: np.ndarray) -> list[str]:
        """Ids of the given rows. Raises InputError for one that comes twice: what was found is then no ranking."""
        ids = self._gather(rows, lambda index, local: index.ids(local))
        if len({*ids}) < len(ids):
            twice = [pid for pid, n in Counter(ids).items() if n > 1]
            self.rows(twice)  # of an index alone it may be there and deleted
        return ids

    def _twice(self, pid: str) -> InputError:
        where = [str(index.folder) for index in self.indexes if index.rows([pid])[0] >= 0]
        return InputError(f"passage {pid} is in {' and in '.join(where)}: delete it from all but one")

    def texts(self, rows: np.ndarray) -> list[str | None]:
        """Texts of the given rows; None where they are not kept."""
        return self._gather(rows, lambda index, local: index.texts(local))

    def metadata(self, rows: np.ndarray) -> list[dict | None]:
        """What else is known of the given rows."""
        return self._gather(rows, lambda index, local: index.metadata(local))

    def vectors(self, rows: np.ndarray) -> list[np.ndarray] | None:
        """Embeddings (Ld, D) fp16 of the given rows; None where one of the indexes keeps none."""
        parts = [index.vectors(np.zeros(0, np.int64)) for index in self.indexes]
        return None if None in parts else self._gather(rows, lambda index, local: index.vectors(local))

    def _gather(self, rows: np.ndarray, read: Callable) -> list:
        """What read(index, its own rows) gives, in the order of `rows` (n,)."""
        return gather(np.asarray(rows), self.indexes, self.first_rows[:-1], read)

    def ask(self, answer: Callable, queries: Tensor, rows, allowed, k: int, by_document: bool = False) -> list[Ranking]:
        """The k best rows for each query (B, Lq, D), and their scores, of what each index finds with the whole effort.

        answer(index, queries, rows, allowed): what one finds. rows: each query's own (n,), of all if None; allowed (n,)
        bool: rows that may be found; by_document: the best row of each document.
        """
        found = []
        for number in self.mine:
            here = slice(*self.first_rows[number : number + 2].tolist())
            own = None if rows is None else [one[(one >= here.start) & (one < here.stop)] - here.start for one in rows]
            may = None if allowed is None else allowed[here]
            answers = answer(self.indexes[number], queries, own, may)
            found.append([(local + here.start, scores) for local, scores in answers])
        return [self.merge(rankings, k, by_document) for rankings in zip(*found, strict=True)]

    def merge(self, rankings: list[Ranking], k: int, by_document: bool = False) -> Ranking:
        """The k best of several rankings of different rows; equal scores in the order of rows."""
        rows, scores = (np.concatenate(parts) for parts in zip(*rankings, strict=True))
        order = np.argsort(rows)
        rows, scores = top(rows[order], scores[order], len(rows) if by_document else k)
        best = first_of_documents(self, rows, k) if by_document else slice(None)
        return rows[best], scores[best]

    def check_rank(self, by_codes: bool) -> None:
        """Raise InputError unless passages can be scored by what is kept."""
        for index in self.indexes:
            index.check_rank(by_codes)
