"""Fewer vectors: those of a passage that are near each other become one, their mean (Clavié et al., arXiv 2409.14683).

Shapes: N passages, T vectors in all and T' after pooling, at most Ld of a passage, then Ld'; D dim.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanocolbert.compute import map_alone
from nanocolbert.config import Pooling
from nanocolbert.storage.ragged import neighbours

BLOCK = 4096  # vectors that a thread pools at a time


def cluster(vectors: np.ndarray, lengths: np.ndarray, pooling: Pooling) -> np.ndarray:
    """Which cluster of its passage each vector is in (T,) int64, from 0; vectors (T, D) fp32, lengths (N,)."""
    from nanocolbert.encoder import ward  # compiled loops, which nobody else needs

    labels = np.empty(len(vectors), np.int64)
    ward.clusters(vectors, offsets_of(lengths), pooling.counts(lengths), pooling.protected, labels)
    return labels


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Where rows of these lengths (N,) begin, and the end: (N + 1,)."""
    return np.append(0, np.cumsum(lengths))


def pool_passages(vectors: np.ndarray, lengths: np.ndarray, pooling: Pooling) -> tuple[np.ndarray, np.ndarray]:
    """Pooled vectors (T', D), in the type given, and how many of each passage (N,): vectors (T, D), lengths (N,).

    All threads take their share.
    """
    from nanocolbert.encoder import ward

    counts, offsets = pooling.counts(lengths), offsets_of(lengths)
    first = offsets_of(counts)
    pooled = np.empty((first[-1], vectors.shape[1]), vectors.dtype)

    def pool_block(rows: slice) -> None:
        part = np.ascontiguousarray(vectors[offsets[rows.start] : offsets[rows.stop]], np.float32)
        own = offsets[rows.start : rows.stop + 1] - offsets[rows.start]
        starts = first[rows.start : rows.stop] - first[rows.start]
        found = np.empty((first[rows.stop] - first[rows.start], part.shape[1]), np.float32)
        ward.means(part, cluster(part, lengths[rows], pooling), own, starts, pooling.unit, found)
        pooled[first[rows.start] : first[rows.stop]] = found

    for _ in map_alone(pool_block, neighbours(lengths, BLOCK) if len(vectors) else []):
        pass
    return pooled, counts


def pool(embeddings: Tensor, mask: Tensor, pooling: Pooling) -> tuple[Tensor, Tensor]:
    """Pool embeddings (N, Ld, D) where mask (N, Ld): (N, Ld', D), zeros where the second result, (N, Ld'), is false.

    As `pool_passages`, with a gradient: through the means, not through the choice of clusters.
    """
    if pooling.factor == 1:
        return embeddings, mask
    (N, _, D), mask, device = embeddings.shape, mask.bool(), embeddings.device
    vectors, lengths = embeddings[mask], mask.sum(1).cpu().numpy()  # (T, D), (N,)
    # What is no number, as of a training that fails, is none of this function's business.
    known = vectors.detach().float().nan_to_num().clamp(-1, 1).cpu().numpy()
    counts = pooling.counts(lengths)
    width = int(counts.max(initial=0))
    slots = np.repeat(np.arange(N) * width, lengths) + cluster(known, lengths, pooling)
    slots = torch.from_numpy(slots).to(device)
    pooled = vectors.new_zeros(N * width, D).index_add(0, slots, vectors)
    if pooling.unit:
        pooled = F.normalize(pooled, dim=-1)
    else:
        sizes = torch.bincount(slots, minlength=N * width).clamp(min=1)
        pooled = pooled / sizes[:, None]
    is_there = torch.arange(width, device=device) < torch.from_numpy(counts).to(device)[:, None]
    return pooled.view(N, width, D), is_there
