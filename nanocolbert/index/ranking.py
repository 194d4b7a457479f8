"""Rankings: rows of passages and their scores, the best first; equal scores in the order of the collection."""

from collections.abc import Callable

import numpy as np

from nanocolbert.cli import InputError

Ranking = tuple[np.ndarray, np.ndarray]  # (k,) int64 rows, (k,) fp32 scores


def gather(rows: np.ndarray, parts: list, first_rows, read: Callable) -> list:
    """What read(part, its own rows) gives, in the order of `rows` (n,); part i has the rows from first_rows[i] on."""
    found, of = np.empty(len(rows), object), np.searchsorted(first_rows, rows, side="right") - 1
    for number, part in enumerate(parts):
        here = np.flatnonzero(of == number)
        for at, value in zip(here, read(part, rows[here] - first_rows[number]), strict=True):
            found[at] = value
    return found.tolist()


def top(rows: np.ndarray, scores: np.ndarray, k: int) -> Ranking:
    """The k highest scores and their rows, which are in order; equal scores in the order of the collection."""
    check_numbers(not np.isnan(scores).any())
    best = highest(scores, k)
    best = best[np.lexsort((rows[best], -scores[best]))]
    return rows[best], scores[best]


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
