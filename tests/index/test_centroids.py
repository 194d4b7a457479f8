"""Centroids: trained and looked for in groups, against all of them."""

import numpy as np
import pytest
import torch
from made import make_passages

from nanocolbert.index import centroids as centroids_module
from nanocolbert.index.centroids import Groups, assign, train_centroids, unit


@pytest.fixture
def groups(monkeypatch) -> tuple[torch.Tensor, Groups]:
    """Vectors (n, D), and 256 centroids of them in groups."""
    monkeypatch.setattr(centroids_module, "product_dtype", lambda device: torch.float32)
    monkeypatch.setattr(centroids_module, "FEWEST_GROUPED", 256)
    monkeypatch.setattr(centroids_module, "GROUP_BLOCK", 1000)
    values, _ = make_passages(300, 10)
    vectors = torch.from_numpy(values.astype(np.float32))
    return vectors, Groups.of(*train_centroids(vectors, 256, np.random.default_rng(0)))


@pytest.mark.parametrize("n", [1, 200, 256, 300, 3000])
def test_as_many_centroids_as_asked_for(n, groups):
    centroids, starts = train_centroids(groups[0], n, np.random.default_rng(0))
    assert len(centroids) == n == starts[-1] and starts[0] == 0 and (np.diff(starts) > 0).all()
    assert (len(starts) > 2) == (n >= 256)
    nearest = assign(groups[0], unit(centroids))
    assert len(nearest.unique()) > 0.5 * n  # hardly one is for nothing


def test_two_levels_are_near_one(groups):
    vectors, found = groups
    plain = unit(centroids_module.kmeans(vectors, 256, np.random.default_rng(0)))
    of_two, of_one = ((vectors @ centroids.T).max(1).values.mean() for centroids in (found.centroids, plain))
    assert of_two > of_one - 0.02


def test_nearest_centroids_in_groups(groups):
    vectors, found = groups
    best = (vectors @ found.centroids.T).max(1).values
    for n_tried, least in (3, 0.6), (8, 0.95), (100, 1):  # more groups than there are
        nearest = found.assign(vectors, n_tried)
        right = (vectors * found.centroids[nearest]).sum(1) >= best - 1e-6
        assert right.float().mean() >= least
    assert np.array_equal(found.assign(vectors, 100), assign(vectors, found.centroids).numpy())
