"""Book: the codewords of two levels are the best of those tried, and parts share the variance."""

import numpy as np
import pytest

from nanocolbert.index.book import CANDIDATES, Book, deal, parts_of
from nanocolbert.index.codec import principal_directions


def distances_to(parts: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Squared distances (n, 256) of vectors (n, d) to codewords (256, e), which end in zeros from d on."""
    return ((parts[:, None] - words[:, : parts.shape[1]]) ** 2).sum(-1)


@pytest.mark.parametrize("coarse, fine", [(4, 4), (2, 7), (3, 10)])
def test_codewords_are_the_best_of_the_candidates(coarse, fine):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(500, 10)).astype(np.float32)
    book = Book.train(vectors, coarse, fine, rng)
    codes, rebuilt_coarse, rebuilt = book.encode(vectors)
    assert np.allclose(book.decode(codes), rebuilt, atol=1e-5)
    assert np.allclose(book.decode(codes[:, :coarse]), rebuilt_coarse, atol=1e-5)
    ordered = vectors[:, book.columns]
    for m in range(coarse):
        part, words = ordered[:, slice(*book.edges[0][m : m + 2])], book.codewords[0][m]
        near = np.argsort(distances_to(part, words), 1)[:, :CANDIDATES]
        errors = np.zeros(near.shape, np.float32)
        for c in range(near.shape[1]):
            left = part - words[near[:, c], : part.shape[1]]
            for q in range(*book.within[m : m + 2]):
                columns = slice(*(book.edges[1][q : q + 2] - book.edges[0][m]))
                errors[:, c] += distances_to(left[:, columns], book.codewords[1][q]).min(1)
        chosen = ((ordered - rebuilt[:, book.columns])[:, slice(*book.edges[0][m : m + 2])] ** 2).sum(1)
        assert np.allclose(chosen, errors.min(1), atol=1e-4)


def test_rotation_is_orthogonal_and_parts_are_balanced():
    vectors = (np.random.default_rng(0).normal(size=(2000, 16)) * np.logspace(0, 2, 16)).astype(np.float32)
    rotation = principal_directions(vectors)
    assert np.allclose(rotation @ rotation.T, np.eye(16), atol=1e-5)
    variances = (vectors @ rotation).var(0)
    columns = deal(variances, parts_of(16, 4))
    assert sorted(columns) == list(range(16))
    assert np.ptp(np.log(variances[columns]).reshape(4, 4).sum(1)) < 0.2 * np.log(1e4) * 4
