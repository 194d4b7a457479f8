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
FEWEST_GROUPED, GROUP_BLOCK = 2048, 1 << 15  # centroids worth grouping; embeddings assigned at a time
TRIED = 8  # groups that an embedding's nearest centroid is looked for in


def default_nlist(n_embeddings: int, most: int | None = None) -> int:
    """The power of two nearest to 4 * sqrt(n), never more lists than can be trained, nor than `most`."""
    wanted = 2 ** round(math.log2(4 * math.sqrt(n_embeddings)))
    return max(1, min(wanted, n_embeddings // (PER_CENTROID - 1), most or wanted))


def sample_passages(offsets: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """Rows of passages drawn at random, in order, that hold at least `wanted` embeddings, or all; offsets (n + 1,)."""
    n = len(offsets) - 1
    n_drawn = min(n, math.ceil(1.05 * wanted * n / offsets[-1]) + 10)
    return np.sort(np.random.default_rng(seed).choice(n, n_drawn, replace=False))


def train_centroids(vectors: Tensor, n: int, rng, device="cpu") -> tuple[Tensor, np.ndarray]:
    """Means (n, D) of clusters by cosine, and where groups of them begin, (G + 1,); vectors (m, D), n at most m.

    Many are found in two levels: groups first, then the clusters of each group, as many as its share of the vectors.
    """
    if n < FEWEST_GROUPED:
        return kmeans(vectors, n, rng, device, show=True), np.array([0, n])
    G = 2 ** math.ceil(math.log2(n) / 2)
    group = assign(vectors, unit(kmeans(vectors[drawn(rng, len(vectors), G * PER_CENTROID)], G, rng, device)), device)
    order, counts = group.argsort(stable=True), torch.bincount(group, minlength=G)
    shares = torch.diff(counts.cumsum(0) * n // len(vectors), prepend=torch.zeros(1, dtype=torch.int64))
    work = [(part, share) for part, share in zip(order.split(counts.tolist()), shares.tolist(), strict=True) if share]
    bar = progress(work, desc="centroids", unit=" groups")
    found = [kmeans(vectors[part], share, rng, device) for part, share in bar]
    centroids, starts = torch.cat(found), np.append(0, np.cumsum([len(part) for part in found]))
    for _ in range(2):  # what lies at the edge of a group goes to its neighbours
        centroids = means(vectors, torch.from_numpy(Groups.of(centroids, starts).assign(vectors)), centroids)
    return centroids, starts


def drawn(rng, n: int, wanted: int) -> np.ndarray:
    """At most `wanted` of n, in order."""
    return np.sort(rng.permutation(n)[:wanted])


def kmeans(vectors: Tensor, n: int, rng, device="cpu", show: bool = False) -> Tensor:
    """Means (n, D) of clusters by cosine; a cluster that nothing is nearest to begins again at a random vector."""
    centroids = vectors[drawn(rng, len(vectors), n)]
    for _ in progress(range(ITERATIONS), desc="centroids", unit=" rounds", show=show):
        again = vectors[rng.integers(0, len(vectors), n)]
        centroids = means(vectors, assign(vectors, unit(centroids), device), again)
    return centroids


def means(vectors: Tensor, nearest: Tensor, otherwise: Tensor) -> Tensor:
    """The mean (n, D) of the vectors (m, D) that each centroid is nearest to (m,); `otherwise` (n, D) of none."""
    counts = torch.bincount(nearest, minlength=len(otherwise))[:, None]
    sums = torch.zeros_like(otherwise).index_add_(0, nearest, vectors)
    return torch.where(counts > 0, sums / counts.clamp(min=1), otherwise)


class Groups(NamedTuple):
    """Centroids in groups of what is near to one another, so that a vector is compared with few of them."""

    centers: Tensor  # (G, D), of unit length
    starts: np.ndarray  # (G + 1,): where a group's centroids begin
    centroids: Tensor  # (C, D), of unit length

    @classmethod
    def of(cls, centroids: Tensor, starts: np.ndarray) -> "Groups":
        return cls(unit(torch.from_numpy(np.add.reduceat(centroids.numpy(), starts[:-1]))), starts, unit(centroids))

    def assign(self, vectors: Tensor, n_tried: int = TRIED) -> np.ndarray:
        """The nearest centroid for each vector (n, D), (n,) int64, of those in the n_tried nearest groups."""
        parts = [self._assign(part, min(n_tried, len(self.centers))) for part in vectors.split(GROUP_BLOCK)]
        return np.concatenate(parts)

    def _assign(self, vectors: Tensor, n_tried: int) -> np.ndarray:
        rows, ends = kernels.choose_groups((vectors @ self.centers.T).numpy(), n_tried)
        best, nearest = np.full(len(vectors), -1e30, np.float32), np.zeros(len(vectors), np.int64)
        for group, end in enumerate(ends[1:]):
            here, members = rows[ends[group] : end], slice(*self.starts[group : group + 2])
            if len(here):
                similarities = vectors[torch.from_numpy(here)] @ self.centroids[members].T
                kernels.keep_best(similarities.numpy(), here, members.start, best, nearest)
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
