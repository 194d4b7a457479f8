"""Documents that were cut to passages doc#1, doc#2, ...: the best of them, each by its best passage."""

import numpy as np
from torch import Tensor

from nanocolbert.index.ranking import Ranking
from nanocolbert.storage.cutting import document_of


def best_documents(index, find, queries: Tensor, rows: list[np.ndarray] | None, k: int) -> list[Ranking]:
    """The best passage of each of the k best documents for each query (B, Lq, D).

    find(queries, rows, n): the n best passages; more are looked for until there are k documents among them, or no more
    passages. rows: each query's own, of all if None.
    """
    found, missing, n = [None] * len(queries), np.arange(len(queries)), k
    while len(missing):
        n *= 4
        own = None if rows is None else [rows[i] for i in missing]
        for i, (here, scores) in zip(missing, find(queries[missing], own, n), strict=True):
            best = first_of_documents(index, here, k)
            found[i] = (here[best], scores[best]), len(best) == k or len(here) < n
        missing = [i for i in missing if not found[i][1]]
    return [ranking for ranking, _ in found]


def first_of_documents(index, rows: np.ndarray, k: int) -> np.ndarray:
    """Positions of the first passage of each document among rows, the best first, of k documents at most."""
    _, first = np.unique([document_of(pid) for pid in index.ids(rows)], return_index=True)
    return np.sort(first)[:k]
