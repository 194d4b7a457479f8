"""IVFPQ and stored embeddings: candidates against loops, and rows and scores without a model."""

import numpy as np
import pytest
import torch

from nanocolbert.index.ivfpq import IVFPQ, best_candidates
from nanocolbert.index.knobs import Depths
from nanocolbert.storage.artifact import read_meta


@pytest.fixture(scope="module")
def index(index_dir) -> IVFPQ:
    return IVFPQ(index_dir, read_meta(index_dir, "index", "build_index.py"))


def test_best_candidates_against_loops():
    rng = np.random.default_rng(0)
    rows = rng.integers(-1, 30, (8, 40))
    similarities = -np.sort(-rng.random((8, 40)).astype(np.float32), axis=1)
    rows[:, 35:] = -1  # FAISS pads at the end
    promise = {}
    for row in set(rows[rows >= 0].tolist()):
        promise[row] = 0.0
        for token in range(8):
            found = [s for r, s in zip(rows[token], similarities[token], strict=True) if r == row]
            promise[row] += (
                max(found) if found else min(s for r, s in zip(rows[token], similarities[token], strict=True) if r >= 0)
            )
    for n in (1, 5, 12):
        expected = sorted(promise, key=promise.get, reverse=True)[:n]
        assert sorted(best_candidates(rows, similarities, n).tolist()) == sorted(expected)
    assert sorted(best_candidates(rows, similarities, 99).tolist()) == sorted(promise)
    assert len(best_candidates(np.full((8, 4), -1), np.zeros((8, 4), np.float32), 3)) == 0


def test_given_rows_and_all_rows_score_alike(index):
    queries = torch.nn.functional.normalize(torch.randn(3, 32, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    given, every = index.rank(queries, [np.arange(40)] * 3, 10), index.rank(queries, None, 10)
    for (rows, scores), (all_rows, all_scores) in zip(given, every, strict=True):
        assert rows.tolist() == all_rows.tolist() and np.allclose(scores, all_scores, atol=1e-4)
    rows, scores = index.rank(queries[:1], [np.zeros(0, np.int64)], 10)[0]
    assert len(rows) == len(scores) == 0


def test_full_depth_finds_what_every_row_scores(index):
    queries = torch.nn.functional.normalize(torch.randn(3, 32, 16, generator=torch.Generator().manual_seed(1)), dim=-1)
    found, every = index.search(queries, 40, Depths(4, 5000, 40)), index.rank(queries, None, 40)
    for (rows, scores), (all_rows, all_scores) in zip(found, every, strict=True):
        assert rows.tolist() == all_rows.tolist() and np.allclose(scores, all_scores, atol=1e-4)
    assert all(len(rows) <= 3 for rows, _ in index.search(queries, 40, Depths(1, 2, 3)))


def test_rows_of_zeros_pad_a_query(index):
    query = torch.nn.functional.normalize(torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(2)), dim=-1)
    padded = torch.cat([query, torch.zeros(1, 3, 16)], 1)
    (few,), (also_few,) = (index.candidates(vectors, Depths(1, 2, 100)) for vectors in (query, padded))
    assert few.tolist() == also_few.tolist() and len(few) < 40
    (plain,), (same,) = (index.rank(vectors, None, 5) for vectors in (query, padded))
    assert plain[0].tolist() == same[0].tolist() and np.allclose(plain[1], same[1], atol=1e-5)
