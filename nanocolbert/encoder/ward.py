"""Ward's clustering of the vectors of each passage, compiled: which cluster a vector is of, and the clusters' means.

Distances are 1 - cosine, and of clusters what Ward's method makes of them (Lance and Williams, 1967): with squared
distances d and sizes n, of i + j to k it is ((n_i + n_k) d_ik + (n_j + n_k) d_jk - n_k d_ij) / (n_i + n_j + n_k). Two
clusters that are each other's nearest may be merged at once, whatever the others do: found by a chain of nearest
neighbours (Murtagh, 1983), all merges of n vectors take O(n^2). As scipy's linkage(method="ward") and fcluster, of
which PyLate and sentence-transformers make theirs; where merges are equally high, fcluster may give fewer clusters.
"""

import numpy as np

from nanocolbert.compute import compiled

NOTHING = np.float32(1e-4)  # the length of a sum that has no direction: vectors that point apart
FAR = np.float32(1e30)  # a squared distance that is none: of a vector to itself, or to what was merged


@compiled(fastmath=True)
def distances_of(vectors):
    """Squared distances (n, n) of unit vectors (n, D) fp32, FAR from each to itself.

    Not by np.dot: the library behind it makes threads wait for each other.
    """
    n, D = vectors.shape
    distances = np.empty((n, n), np.float32)
    for i in range(n):
        one = vectors[i]
        for j in range(i):
            other, cosine = vectors[j], np.float32(0)
            for k in range(D):
                cosine += one[k] * other[k]
            distance = max(np.float32(0), 1 - cosine)
            distances[i, j] = distances[j, i] = distance * distance
        distances[i, i] = FAR
    return distances


@compiled(fastmath=True)
def merge_all(distances, pairs, heights):
    """Merge n clusters to one: pairs (n - 1, 2) of them, each named by one of its vectors, and heights (n - 1,) fp32.

    distances (n, n) fp32 squared, FAR from each to itself; it is used up. Merges come as they are found.
    """
    n, length = len(distances), 0
    sizes, chain = np.ones(n, np.float32), np.empty(n, np.int64)
    for merge in range(n - 1):
        if not length:
            chain[0], length = sizes.argmax(), 1  # one that is there: sizes of others are 0
        while True:
            x = chain[length - 1]
            row = distances[x]
            lowest = row[0]
            for i in range(1, n):
                lowest = min(lowest, row[i])
            y = chain[length - 2] if length > 1 else -1
            if (y >= 0 and row[y] <= lowest) or length == n:
                break
            y = 0
            while row[y] > lowest:
                y += 1
            chain[length] = y
            length += 1
        length -= 2
        pairs[merge, 0], pairs[merge, 1], heights[merge] = x, y, lowest
        of_x, of_y, at_x, at_y = sizes[x], sizes[y], distances[x], distances[y]
        for i in range(n):
            k = sizes[i]
            at_y[i] = ((of_x + k) * at_x[i] + (of_y + k) * at_y[i] - k * lowest) / (of_x + of_y + k)
        sizes[x], sizes[y] = 0, of_x + of_y
        for i in range(n):
            if not sizes[i]:
                at_y[i] = FAR
            at_x[i] = FAR
            distances[i, x] = FAR
        at_y[y] = FAR
        for i in range(n):
            distances[i, y] = at_y[i]


@compiled()
def clusters(vectors, offsets, counts, protected, labels):
    """Which cluster each vector of a passage is in: labels (T,), from 0 in the order of their first vectors.

    vectors (T, D) fp32 of unit length; offsets (N + 1,) of the passages; counts (N,) of clusters, of which each of the
    first `protected` vectors is one.
    """
    for passage in range(len(offsets) - 1):
        start, end = offsets[passage], offsets[passage + 1]
        apart = min(protected, end - start)
        for i in range(apart):
            labels[start + i] = i
        start += apart
        n, wanted = end - start, counts[passage] - apart
        part, own = vectors[start:end], labels[start:end]
        if wanted == n:
            own[:] = np.arange(apart, apart + n)
            continue
        pairs, heights = np.empty((n - 1, 2), np.int64), np.empty(n - 1, np.float32)
        merge_all(distances_of(part), pairs, heights)
        first = np.arange(n)  # a vector that came before, of the same cluster; itself, where there is none
        for merge in np.argsort(heights, kind="mergesort")[: n - wanted]:
            x, y = pairs[merge]
            while first[x] != x:
                x = first[x]
            while first[y] != y:
                y = first[y]
            first[max(x, y)] = min(x, y)
        label = apart
        for i in range(n):
            if first[i] == i:
                own[i] = label
                label += 1
            else:
                own[i] = own[first[i]]


@compiled()
def means(vectors, labels, offsets, starts, unit, pooled):
    """The mean of each cluster: pooled (T', D) fp32, of a passage from starts (N,) on; of unit length, if `unit`:
    a cluster whose vectors cancel out is its first.

    vectors (T, D), labels (T,) and offsets (N + 1,): as of `clusters`.
    """
    sizes, first = np.zeros(len(pooled), np.int64), np.empty(len(pooled), np.int64)
    pooled[:] = 0
    for passage in range(len(offsets) - 1):
        for i in range(offsets[passage], offsets[passage + 1]):
            at = starts[passage] + labels[i]
            if not sizes[at]:
                first[at] = i
            sizes[at] += 1
            pooled[at] += vectors[i]
    for at in range(len(pooled)):
        length = np.float32(sizes[at])
        if unit:
            length = np.sqrt((pooled[at] * pooled[at]).sum())
            if length < NOTHING:
                pooled[at], length = vectors[first[at]], np.float32(1)
        pooled[at] /= length
