"""Codewords: the nearest, against all distances, and where they move to."""

import numpy as np
import pytest
from test_book import distances_to

from nanocolbert.index.kernels import quantise as kernels


@pytest.mark.parametrize("n, width, n_copies", [(1, 5, 0), (8, 11, 0), (8, 1, 0), (8, 3, 30), (8, 3, 255), (15, 2, 7)])
def test_nearest_codewords(n, width, n_copies):
    """Among them some that are equal."""
    rng = np.random.default_rng(0)
    vectors, words = (rng.normal(size=(size, width)).astype(np.float32) for size in (400, 256))
    words[rng.permutation(256)[:n_copies]] = words[0]
    columns, halves = kernels.transpose(words[None], np.array([0, width]))
    nearest, errors = np.empty((400, n), np.uint8), np.empty((400, n), np.float32)
    kernels.find_nearest(vectors, 0, width, columns[0], halves[0], nearest, errors)
    distances = distances_to(vectors, words)
    assert all(len(set(row)) == n for row in nearest.tolist())
    found = np.sort(np.take_along_axis(distances, nearest.astype(int), 1), 1)
    assert np.allclose(found, np.sort(distances, 1)[:, :n], atol=1e-5)
    shared = 0.5 * (vectors**2).sum(1)[:, None]
    assert np.allclose(np.sort(errors + shared, 1), 0.5 * found, atol=1e-5)


def test_codewords_move_to_the_mean_of_what_they_stand_for():
    rng = np.random.default_rng(0)
    vectors, edges = rng.normal(size=(3000, 8)).astype(np.float32), np.array([0, 3, 8])
    codes = rng.integers(0, 200, (3000, 2)).astype(np.uint8)  # nothing has the last ones
    words = rng.normal(size=(2, 256, 5)).astype(np.float32)
    words[0, :, 3:] = 0
    moved, left = words.copy(), np.empty_like(vectors)
    for m, (first, stop) in enumerate(((0, 3), (3, 8))):
        left[:, first:stop] = vectors[:, first:stop] - words[m, codes[:, m], : stop - first]
    kernels.refine(moved, edges, codes, left)
    assert np.array_equal(moved[:, 200:], words[:, 200:]) and not moved[0, :, 3:].any()
    for m, (first, stop) in enumerate(((0, 3), (3, 8))):
        means = [vectors[codes[:, m] == code, first:stop].mean(0) for code in range(200)]
        assert np.allclose(moved[m, :200, : stop - first], means, atol=1e-5)
        assert np.allclose(
            left[:, first:stop], vectors[:, first:stop] - moved[m, codes[:, m], : stop - first], atol=1e-5
        )
