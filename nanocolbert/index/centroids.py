"""Centroids of token embeddings: k-means by cosine, and the nearest centroid of each embedding."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanocolbert.compute import fast_dtype
from nanocolbert.index.kernels import nearest as kernels
from nanocolbert.progress import progress

MOST_CENTROIDS = 1 << 16  # what two bytes can name
PER_CENTROID = 40  # embeddings that centroids are trained on; faiss warns under 39
ITERATIONS = 6  # of k-means
ASSIGN_BLOCK = 512  # embeddings whose similarities to all centroids are in memory at a time
FEWEST_GROUPED, GROUP_BLOCK = 2048, 1 << 15  # centroids worth grouping where products are fp32; embeddings at a time
TRIED = 4, 8  # groups that an embedding's nearest centroid is looked for in: to train centroids, to encode


def default_nlist(n_embeddings: int, most: int | None = None) -> int:
    """The power of two nearest to 4 * sqrt(n), never more lists than can be trained, nor than `most`."""
    wanted = 2 ** round(math.log2(4 * math.sqrt(n_embeddings)))
    return max(1, min(wanted, n_embeddings // (PER_CENTROID - 1), most or wanted))


def sample_passages(offsets: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """Rows of passages drawn at random, in order, that hold at least `wanted` embeddings, or all; offsets (n + 1,)."""
    n = len(offsets) - 1
    n_drawn = min(n, math.ceil(1.05 * wanted * n / offsets[-1]) + 10)
    return np.sort(np.random.default_rng(seed).choice(n, n_drawn, replace=False))


def kmeans(vectors: Tensor, n: int, rng, device="cpu") -> Tensor:
    """Means (n, D) of clusters by cosine; a cluster that nothing is nearest to begins again at a random vector."""
    centroids = vectors[np.sort(rng.permutation(len(vectors))[:n])]
    for _ in progress(range(ITERATIONS), desc="centroids", unit=" rounds"):
        centroids = unit(centroids)
        groups = Groups.of(centroids, device)
        nearest = groups.assign(vectors, TRIED[0]) if groups else assign(vectors, centroids, device)
        counts = torch.bincount(nearest, minlength=n)
        centroids = torch.zeros(n, vectors.shape[1]).index_add_(0, nearest, vectors) / counts.clamp(min=1)[:, None]
        empty = (counts == 0).nonzero()[:, 0]
        centroids[empty] = vectors[rng.integers(0, len(vectors), len(empty))]
    return centroids


class Groups(NamedTuple):
    """Unit centroids (C, D) in groups of what is near to one another, so that a vector is compared with few of them."""

    centers: Tensor  # (G, D), of unit length
    members: np.ndarray  # (C,): the centroids of each group, one group after the other
    starts: np.ndarray  # (G + 1,): where a group's members begin
    centroids: Tensor  # (C, D), in this order

    @classmethod
    def of(cls, centroids: Tensor, device="cpu") -> "Groups | None":
        """None where comparing with all of them is as fast."""
        if product_dtype(device) != torch.float32 or len(centroids) < FEWEST_GROUPED:
            return None
        n = 2 ** round(math.log2(len(centroids) / 2) / 2)
        centers = unit(kmeans(centroids, n, np.random.default_rng(0)))
        group = assign(centroids, centers).numpy()
        members = np.argsort(group, kind="stable")
        starts = np.append(0, np.bincount(group, minlength=n).cumsum())
        return cls(centers, members, starts, centroids[members])

    def assign(self, vectors: Tensor, n_tried: int) -> Tensor:
        """The nearest centroid for each vector (n, D), (n,) int64, of those in the n_tried nearest groups."""
        parts = [self._assign(part, min(n_tried, len(self.centers))) for part in vectors.split(GROUP_BLOCK)]
        return torch.from_numpy(np.concatenate(parts))

    def _assign(self, vectors: Tensor, n_tried: int) -> np.ndarray:
        rows, ends = kernels.choose_groups((vectors @ self.centers.T).numpy(), n_tried)
        best, nearest = np.full(len(vectors), -1e30, np.float32), np.zeros(len(vectors), np.int64)
        for group, end in enumerate(ends[1:]):
            here, members = rows[ends[group] : end], slice(*self.starts[group : group + 2])
            if len(here) and members.start < members.stop:
                similarities = vectors[torch.from_numpy(here)] @ self.centroids[members].T
                kernels.keep_best(similarities.numpy(), here, self.members[members], best, nearest)
        return nearest


def assign(vectors: Tensor, centroids: Tensor, device="cpu") -> Tensor:
    """The nearest of the unit centroids (C, D) for each vector (n, D): (n,) int64."""
    dtype = product_dtype(device)
    centroids, nearest = centroids.to(device, dtype), torch.empty(len(vectors), dtype=torch.int64)
    # One result and one buffer: small results among large passing ones would leave a heap of holes.
    buffer = torch.empty(min(ASSIGN_BLOCK, len(vectors)), len(centroids), device=device)
    for start in range(0, len(vectors), ASSIGN_BLOCK):
        part = vectors[start : start + ASSIGN_BLOCK].to(device, dtype)
        similarities = buffer[: len(part)]
        if dtype == buffer.dtype:
            torch.matmul(part, centroids.T, out=similarities)
        else:
            similarities.copy_(part @ centroids.T)
        if similarities.device.type == "cpu":  # numpy's argmax is many times faster there
            nearest[start : start + len(part)] = torch.from_numpy(similarities.numpy().argmax(1))
        else:
            nearest[start : start + len(part)] = similarities.argmax(1)
    return nearest


def product_dtype(device) -> torch.dtype:
    """What products with centroids are computed in: bf16 but on CPUs that would have to emulate it."""
    device = torch.device(device)
    return fast_dtype(device) if device.type == "cpu" else torch.bfloat16


def unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)
