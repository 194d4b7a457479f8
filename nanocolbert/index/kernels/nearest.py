"""Which token stands for which, and which centroid is nearest."""

import numpy as np

from nanocolbert.compute import compiled

MOST_PARENTS = 256  # representatives that a byte can name


@compiled()
def representatives(vectors, offsets, similarity, parents):
    """Choose tokens that stand for the others of their passage: parents (T,), a token's own position if it is one.

    vectors (T, D) fp32 unit vectors; offsets (n + 1,) of the passages. Again and again the token with the most
    neighbours left, at cosine `similarity` or more, is taken with them, until nobody has any; then every token so
    covered goes to the nearest of the representatives.
    """
    for passage in range(len(offsets) - 1):
        start, n = offsets[passage], offsets[passage + 1] - offsets[passage]
        part = vectors[start : start + n]
        cosine = np.dot(part, part.T)
        near = cosine >= similarity
        neighbours = np.zeros(n, np.int64)
        for i in range(n):
            for j in range(n):
                neighbours[i] += near[i, j]
        left, chosen, n_chosen = np.ones(n, np.bool_), np.zeros(n, np.bool_), 0
        while n_chosen < MOST_PARENTS:
            best = -1
            for i in range(n):
                if left[i] and neighbours[i] > 1 and (best < 0 or neighbours[i] > neighbours[best]):
                    best = i
            if best < 0:
                break
            chosen[best] = True
            n_chosen += 1
            for j in range(n):
                if left[j] and near[best, j]:
                    left[j] = False
                    for k in range(n):
                        neighbours[k] -= near[j, k]
        for i in range(n):
            parents[start + i] = start + i
            if not left[i] and not chosen[i]:
                nearest = -1
                for j in range(n):
                    if chosen[j] and (nearest < 0 or cosine[i, j] > cosine[i, nearest]):
                        nearest = j
                parents[start + i] = start + nearest


@compiled()
def choose_groups(similarities, n_tried):
    """Which vectors are to be compared with each group of centroids; similarities (n, G) fp32 to the groups.

    Returns the vectors (n * n_tried,) of each group, one group after the other, and where these begin, (G + 1,).
    """
    n, G = similarities.shape
    chosen, starts = np.empty((n, n_tried), np.int64), np.zeros(G + 1, np.int64)
    for i in range(n):
        for t in range(n_tried):
            best = similarities[i].argmax()
            similarities[i, best] = -np.inf
            chosen[i, t] = best
            starts[best + 1] += 1
    starts = starts.cumsum()
    rows, at = np.empty(n * n_tried, np.int64), starts[:-1].copy()
    for i in range(n):
        for group in chosen[i]:
            rows[at[group]] = i
            at[group] += 1
    return rows, starts


@compiled(fastmath=True)
def keep_best(similarities, rows, first, best, nearest):
    """Update the best centroid of some vectors, best (n,) fp32 and nearest (n,), by another group of centroids.

    similarities (k, c) of the vectors `rows` (k,) to the centroids from `first` on.
    """
    for i in range(len(rows)):
        highest = similarities[i, 0]
        for j in range(1, similarities.shape[1]):
            highest = max(highest, similarities[i, j])
        if highest > best[rows[i]]:
            best[rows[i]] = highest
            for j in range(similarities.shape[1]):
                if similarities[i, j] == highest:
                    nearest[rows[i]] = first + j
