"""Rankings: ties keep the order of position, and what is not a number is refused."""

import numpy as np
import pytest

from nanocolbert.cli import InputError
from nanocolbert.index.ranking import highest, top


def test_equal_scores_in_the_order_of_position():
    rng = np.random.default_rng(0)
    for n in (1, 5, 40, 99):
        for dtype in (np.float32, np.int32):
            scores = rng.integers(0, 6, 100).astype(dtype)
            first = np.argsort(-scores, kind="stable")[:n]
            assert highest(scores, n).tolist() == sorted(first)
            rows, found = top(np.arange(100), scores, n)
            assert rows.tolist() == first.tolist() and np.array_equal(found, scores[first])
    with pytest.raises(InputError, match="not a number"):
        top(np.arange(3), np.array([1, np.nan, 2], np.float32), 2)


def test_top_keeps_the_order_of_the_collection_for_ties():
    rows, scores = top(np.array([4, 2, 9, 1]), np.array([1.0, 2.0, 2.0, 0.5], np.float32), 3)
    assert rows.tolist() == [2, 9, 4] and scores.tolist() == [2.0, 2.0, 1.0]
