"""Centroids: the nearest in groups, against all of them."""

import numpy as np
import torch
from made import make_passages

from nanocolbert.index import centroids as centroids_module
from nanocolbert.index.codec import Codec


def test_nearest_centroids_in_groups(monkeypatch):
    monkeypatch.setattr(centroids_module, "product_dtype", lambda device: torch.float32)
    monkeypatch.setattr(centroids_module, "FEWEST_GROUPED", 256)
    monkeypatch.setattr(centroids_module, "GROUP_BLOCK", 1000)
    values, lengths = make_passages(300, 10)
    vectors = torch.from_numpy(values.astype(np.float32))
    centroids = centroids_module.unit(vectors[:256] + 0.1)
    similarities = vectors @ centroids.T
    best = similarities.max(1).values
    groups = centroids_module.Groups.of(centroids)
    assert Codec.train(values, lengths, 2, 256, seed=0)._groups and not centroids_module.Groups.of(centroids[1:])
    for n_tried, least in (3, 0.6), (8, 0.95), (100, 1):  # more groups than there are
        nearest = groups.assign(vectors, n_tried)
        right = similarities.gather(1, nearest[:, None])[:, 0] >= best - 1e-6
        assert right.float().mean() >= least
    assert torch.equal(groups.assign(vectors, 100), centroids_module.assign(vectors, centroids))
