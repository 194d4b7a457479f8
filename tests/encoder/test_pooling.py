"""Pooling: the clusters of scipy's Ward method, their means, and the gradient through them."""

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage

from nanocolbert.cli import InputError
from nanocolbert.config import ColBERTConfig, Pooling
from nanocolbert.encoder.pooling import cluster, pool, pool_passages


def make(n: int, dim: int, seed: int) -> np.ndarray:
    """Unit vectors (n, dim) fp32 about a third as many directions."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(1, n // 3), dim))
    vectors = centres[rng.integers(len(centres), size=n)] + 0.7 * rng.normal(size=(n, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def members(labels) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)}


def slow_clusters(vectors: np.ndarray, pooling: Pooling) -> list[list[int]]:
    """What sentence-transformers' HierarchicalTokenPooling makes of one passage, by scipy."""
    n, p = len(vectors), pooling.protected
    alone = [[i] for i in range(min(n, p))]
    wanted = max((n - p) // pooling.factor, 1)
    if wanted >= n - p:
        return [[i] for i in range(n)]
    distances = np.clip(1 - vectors[p:] @ vectors[p:].T, 0, 2)[np.triu_indices(n - p, 1)]
    labels = fcluster(linkage(distances, "ward"), wanted, "maxclust")
    return alone + sorted(sorted(p + i for i in group) for group in members(labels))


def slow_pool(vectors: np.ndarray, pooling: Pooling) -> np.ndarray:
    pooled = np.array([vectors[group].mean(0) for group in slow_clusters(vectors, pooling)])
    return pooled / np.linalg.norm(pooled, axis=1, keepdims=True) if pooling.unit else pooled


@pytest.mark.parametrize("factor", [1, 2, 3, 7])
@pytest.mark.parametrize("protected", [0, 1, 3])
def test_clusters_and_means_are_scipys(factor, protected):
    lengths = np.array([1, 2, 3, 4, 5, 23, 64, 150, 1])
    passages = [make(n, dim, seed) for dim in (24,) for seed, n in enumerate(lengths)]
    pooling = Pooling(factor, protected, factor != 3)
    expected = [slow_pool(vectors, pooling) for vectors in passages]
    labels = np.split(cluster(np.concatenate(passages), lengths, pooling), np.cumsum(lengths)[:-1])
    for vectors, own in zip(passages, labels, strict=True):
        assert members(own) == {frozenset(group) for group in slow_clusters(vectors, pooling)}
    pooled, counts = pool_passages(np.concatenate(passages), lengths, pooling)
    assert counts.tolist() == pooling.counts(lengths).tolist() == [len(part) for part in expected]
    assert pooled.dtype == np.float32 and np.allclose(pooled, np.concatenate(expected), atol=1e-6)


def test_how_many_follows_from_the_length_alone():
    """Alike vectors, whose merges are all equally high, too."""
    for factor, protected in ((2, 1), (4, 0), (9, 2)):
        pooling = Pooling(factor, protected)
        for n in range(1, 40):
            wanted = min(n, protected) + (max(1, (n - protected) // factor) if n > protected else 0)
            assert pooling.counts(n) == wanted
            labels = cluster(np.tile(np.eye(8, dtype=np.float32)[:1], (n, 1)), np.array([n]), pooling)
            assert sorted({*labels.tolist()}) == list(range(wanted))
    assert pooling.counts(np.array([0, 3])).tolist() == [0, 3]
    assert Pooling().counts(np.arange(5)).tolist() == [0, 1, 2, 3, 4]


def test_many_passages_by_several_threads():
    lengths = np.random.default_rng(1).integers(1, 60, size=400)
    vectors = make(lengths.sum(), 16, 2).astype(np.float16)
    alone = [
        pool_passages(part, np.array([len(part)]), Pooling(3))[0] for part in np.split(vectors, np.cumsum(lengths)[:-1])
    ]
    n = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        pooled, counts = pool_passages(vectors, lengths, Pooling(3))
    finally:
        torch.set_num_threads(n)
    assert pooled.dtype == np.float16 and counts.tolist() == [len(part) for part in alone]
    assert np.array_equal(pooled, np.concatenate(alone))


def test_vectors_that_cancel_out():
    vectors = np.array([[1, 0], [-1, 0]], np.float32)
    assert pool_passages(vectors, np.array([2]), Pooling(2, 0))[0].tolist() == [[1, 0]]
    assert pool_passages(vectors, np.array([2]), Pooling(2, 0, unit=False))[0].tolist() == [[0, 0]]


@pytest.mark.parametrize("unit", [True, False])
def test_pool_is_the_same_with_a_gradient(unit):
    lengths, pooling = [7, 0, 12, 1], Pooling(3, 1, unit)
    passages = [make(n, 8, n) for n in lengths if n]
    mask = torch.zeros(4, 14, dtype=torch.bool)
    for row, n in enumerate(lengths):
        mask[row, torch.randperm(14)[:n].sort().values] = True
    embeddings = torch.randn(4, 14, 8)
    embeddings[mask] = torch.from_numpy(np.concatenate(passages))
    embeddings = embeddings.double().requires_grad_()
    pooled, is_there = pool(embeddings, mask, pooling)
    assert is_there.tolist() == [[i < n for i in range(4)] for n in (3, 0, 4, 1)] and pooled.shape == (4, 4, 8)
    expected = np.concatenate([slow_pool(part, pooling) for part in passages])
    assert np.allclose(pooled[is_there].detach(), expected, atol=1e-6) and not pooled[~is_there].any()

    def by_hand(embeddings):
        groups = [[row[own][group].mean(0) for group in slow_clusters(part, pooling)] for row, own, part in rows]
        made = torch.stack([vector for group in groups for vector in group])
        return torch.nn.functional.normalize(made, dim=-1) if unit else made

    rows = [(embeddings[row], mask[row], part) for row, part in zip((0, 2, 3), passages, strict=True)]
    weights = torch.randn(8, 8, dtype=torch.float64)
    (found,) = torch.autograd.grad((pooled[is_there] * weights).sum(), embeddings)
    (wanted,) = torch.autograd.grad((by_hand(embeddings) * weights).sum(), embeddings)
    assert torch.allclose(found, wanted, atol=1e-6) and found[mask].any() and not found[~mask].any()


def test_pool_of_what_is_no_number_ends():
    embeddings = torch.full((2, 9, 4), torch.nan)
    pooled, mask = pool(embeddings, torch.ones(2, 9), Pooling(2))
    assert pooled.shape == (2, 5, 4) and mask.all() and pooled.isnan().all()
    same = pool(embeddings, mask, Pooling())
    assert same[0] is embeddings and same[1] is mask


def test_the_pooling_of_a_model():
    config = ColBERTConfig(pool_factor=3, protected_tokens=0, normalize_pooled=False)
    assert config.pooling() == (3, 0, False) and config.pooling(2) == (2, 0, True) and config.pooling(1) == (1, 0, True)
    assert ColBERTConfig().pooling() == (1, 1, True)
    plain = ColBERTConfig(normalize=False)
    assert plain.pooling() == (1, 1, False)
    for wrong in (2, 0, -1):
        with pytest.raises(InputError, match=f"a pool factor of {wrong}: .*give 1"):
            plain.pooling(wrong)
