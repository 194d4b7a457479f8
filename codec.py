"""Compress token embeddings to a few bytes each, and score them as they are.

Tokens of a passage repeat one another: a third of SQuAD's have a neighbour in their passage at a cosine of 0.85. So a
passage's tokens are split into representatives and followers. A representative is coded as the nearest of `nlist`
centroids and its difference from it, a follower as its difference from its representative as decoded: a smaller
difference, hence fewer bytes. Differences are coded by product quantisation (Jégou et al., TPAMI 2011): M parts, each
replaced by the nearest of 256 codewords, one byte; before, they are rotated on their principal directions, which are
dealt out so that every part gets its share of the variance (Ge et al., CVPR 2013). A last byte brings the decoded
vector to unit length. Residuals to centroids are ColBERTv2's (arXiv 2112.01488), near-duplicates within a passage those
of Clavié et al. (arXiv 2409.14683), who average them away. LOG.md has what else was measured.

The dot product of a query token with a decoded token is a sum of look-ups: one for the centroid, one a part. Scores of
32 query tokens lie side by side, so that a look-up serves them all by one instruction (kernels.py).

A passage of n representatives and f followers in bytes: centroids 2 n, parents f, norms n + f, codes M[0] n + M[1] f.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import kernels
from artifact import InputError
from kernels import LANES, LARGEST_SCALE, NORM_LEAST, NORM_STEP
from ragged import neighbours

BITS = (1, 2, 4, 8)
BOOKS = ("representatives", "followers")
SIMILARITY = 0.85  # cosine from which a token may follow another
MOST_CENTROIDS = 1 << 16  # what two bytes can name
CODEWORDS = 256
PER_CENTROID = 40  # embeddings that centroids are trained on; faiss warns under 39
BOOK_SAMPLE = 30_000  # differences that the codewords are trained on
BOOK_ITERATIONS, CENTROID_ITERATIONS = 10, 6
ASSIGN_BLOCK = 512  # embeddings whose similarities to all centroids are in memory at a time
ENCODE_TOKENS = 1 << 15  # embeddings that a thread encodes at a time


def code_bytes(dim: int, bits: int) -> tuple[int, int]:
    """Bytes (M) of a representative's code and of a follower's: about bits * dim / 8 a token, all told."""
    sizes = (dim * bits // 8 + dim // 32, dim * bits // 8 - 3 * dim // 32)
    return tuple(max(4, min(dim, size) // 4 * 4) for size in sizes)


def default_nlist(n_embeddings: int, most: int | None = None) -> int:
    """The power of two nearest to 4 * sqrt(n), never more lists than can be trained, nor than `most`."""
    wanted = 2 ** round(math.log2(4 * math.sqrt(n_embeddings)))
    return max(1, min(wanted, n_embeddings // (PER_CENTROID - 1), most or wanted))


def sample_passages(offsets: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """Rows of passages drawn at random, in order, that hold at least `wanted` embeddings, or all; offsets (n + 1,)."""
    n = len(offsets) - 1
    n_drawn = min(n, math.ceil(1.05 * wanted * n / offsets[-1]) + 10)
    return np.sort(np.random.default_rng(seed).choice(n, n_drawn, replace=False))


class Tables(NamedTuple):
    """What up to LANES query tokens score with the parts of a code; 1.0 is `scale`."""

    centroids: np.ndarray  # (C, LANES) int16
    representatives: np.ndarray  # (M[0], 256, LANES) int8
    followers: np.ndarray  # (M[1], 256, LANES) int8
    scale: float


class Book(NamedTuple):
    """A product quantiser: rotation (D, D), codewords (M, 256, d) and where each part begins, edges (M + 1,).

    Parts differ in size by one at most; codewords of a shorter part end in zeros.
    """

    rotation: np.ndarray
    codewords: np.ndarray
    edges: np.ndarray

    @classmethod
    def train(cls, vectors: np.ndarray, M: int, rng) -> "Book":
        """By k-means of each part of these vectors (n, D) fp32."""
        edges = parts_of(vectors.shape[1], M)
        rotation = as_saved(balanced_rotation(vectors, edges))
        rotated, n = vectors @ rotation, len(vectors)
        codewords = np.zeros((M, CODEWORDS, np.diff(edges).max()), np.float32)
        begin = rotated[rng.permutation(n)[:CODEWORDS] if n >= CODEWORDS else rng.integers(0, n, CODEWORDS)]
        for m in range(M):
            codewords[m, :, : edges[m + 1] - edges[m]] = begin[:, edges[m] : edges[m + 1]]
        codes, rebuilt = np.empty((n, M), np.uint8), np.empty_like(rotated)
        for _ in range(BOOK_ITERATIONS):
            kernels.quantise(rotated, codewords, edges, codes, rebuilt)
            for m in range(M):
                counts = np.bincount(codes[:, m], minlength=CODEWORDS)
                for j in range(edges[m + 1] - edges[m]):
                    column = rotated[:, edges[m] + j]
                    means = np.bincount(codes[:, m], column, CODEWORDS) / np.maximum(counts, 1)
                    codewords[m, :, j] = np.where(counts, means, column[rng.integers(0, n, CODEWORDS)])
        return cls(rotation, as_saved(codewords), edges)

    def encode(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes (n, M) uint8 of vectors (n, D) fp32, and what they decode to, (n, D)."""
        codes, rebuilt = np.empty((len(vectors), len(self.codewords)), np.uint8), np.empty_like(vectors)
        kernels.quantise(vectors @ self.rotation, self.codewords, self.edges, codes, rebuilt)
        return codes, rebuilt @ self.rotation.T

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Vectors (n, D) of codes (n, M)."""
        widths = np.diff(self.edges)
        columns = [words[codes[:, m], : widths[m]] for m, words in enumerate(self.codewords)]
        return np.concatenate(columns, 1) @ self.rotation.T

    def tables(self, query: Tensor) -> Tensor:
        """Dot products (M, 256, Lq) of codewords with the parts of a query (Lq, D)."""
        rotated, widths = query @ torch.from_numpy(self.rotation), np.diff(self.edges)[:, None]
        # past the end of a shorter part any column will do: its codewords are 0 there
        columns = self.edges[:-1, None] + np.minimum(np.arange(widths.max()), widths - 1)
        parts = rotated.T[torch.from_numpy(columns)]  # (M, d, Lq)
        return torch.bmm(torch.from_numpy(self.codewords), parts)


class Codec:
    """Centroids (C, D) fp32, and a Book each for representatives and followers."""

    def __init__(self, centroids: np.ndarray, books: list[Book], similarity: float):
        self.centroids, self.books, self.similarity = centroids, books, similarity
        self.M = np.array([len(book.codewords) for book in books])

    @classmethod
    def train(cls, values, lengths, bits: int, nlist: int, seed: int, device="cpu", similarity=SIMILARITY) -> "Codec":
        """Train on a sample of whole passages: values (T, D), lengths (n,).

        Raises InputError where the sample is too small for the centroids.
        """
        values, dim = np.asarray(values, np.float32), values.shape[1]
        if bits not in BITS or dim % 4:
            raise InputError(f"{bits} bits, dimension {dim}: give 1, 2, 4 or 8 bits, and a dimension that 4 divides")
        rng, sizes = np.random.default_rng(seed), code_bytes(dim, bits)
        parents = find_parents(values, lengths, similarity)
        is_first = parents == np.arange(len(values))
        firsts = values[is_first]
        if nlist > min(len(firsts), MOST_CENTROIDS):
            raise InputError(
                f"{nlist} centroids from {len(firsts)} embeddings: at most so many, and {MOST_CENTROIDS}: lower --nlist"
            )
        centroids = as_saved(kmeans(torch.from_numpy(firsts), nlist, rng, device).numpy())
        some = firsts[rng.permutation(len(firsts))[:BOOK_SAMPLE]]
        nearest = assign(torch.from_numpy(some), unit(torch.from_numpy(centroids)), device).numpy()
        book = Book.train(some - centroids[nearest], sizes[0], rng)
        followers = rng.permutation(np.flatnonzero(~is_first))[:BOOK_SAMPLE]
        if not len(followers):  # a sample without near-duplicates; something must stand there
            followers = parents[:1]
        codec = cls(centroids, [book, book], similarity)
        decoded = codec._encode_first(values[parents[followers]], device)[2]
        return cls(centroids, [book, Book.train(values[followers] - decoded, sizes[1], rng)], similarity)

    def save(self, folder) -> None:
        """Write the arrays into a folder."""
        np.save(Path(folder) / "centroids.npy", self.centroids.astype(np.float16))
        for name, book in zip(BOOKS, self.books, strict=True):
            np.save(Path(folder) / f"{name}_rotation.npy", book.rotation.astype(np.float16))
            np.save(Path(folder) / f"{name}_codewords.npy", book.codewords.astype(np.float16))
        np.save(Path(folder) / "similarity.npy", self.similarity)

    @classmethod
    def load(cls, folder) -> "Codec":
        """Open what `save` wrote."""
        read = lambda name: np.load(Path(folder) / f"{name}.npy").astype(np.float32)  # noqa: E731
        parts = [(read(f"{name}_rotation"), read(f"{name}_codewords")) for name in BOOKS]
        books = [Book(*pair, parts_of(len(pair[0]), len(pair[1]))) for pair in parts]
        return cls(read("centroids"), books, float(np.load(Path(folder) / "similarity.npy")))

    @cached_property
    def _unit(self) -> Tensor:
        return unit(torch.from_numpy(self.centroids))

    @property
    def dim(self) -> int:
        """Size D of a vector."""
        return self.centroids.shape[1]

    # --------------------------------------------------------------------------------------------------------- encode

    def encode(self, values: np.ndarray, lengths: np.ndarray, device="cpu") -> tuple[np.ndarray, np.ndarray]:
        """Compress passages: values (T, D), lengths (n,); all threads take their share.

        Returns their bytes one after the other (B,) uint8, and how many representatives and followers each has,
        (n, 2) uint16; `passage_bytes` tells where each ends.
        """
        if len(lengths) and lengths.max() >= kernels.LONGEST:
            raise InputError(f"a passage of {lengths.max()} tokens: at most {kernels.LONGEST - 1} can be compressed")
        if not len(lengths):
            return np.zeros(0, np.uint8), np.zeros((0, 2), np.uint16)
        offsets = np.append(0, np.cumsum(lengths))

        def encode_block(block: slice) -> tuple[np.ndarray, np.ndarray]:
            part = values[offsets[block.start] : offsets[block.stop]]
            return self._encode(np.asarray(part, np.float32), lengths[block], device)

        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            parts = list(threads.map(encode_block, neighbours(lengths, ENCODE_TOKENS)))
        return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))

    def _encode(self, values: np.ndarray, lengths: np.ndarray, device) -> tuple[np.ndarray, np.ndarray]:
        T, passage = len(values), np.repeat(np.arange(len(lengths)), lengths)
        parents = find_parents(values, lengths, self.similarity)
        is_first = parents == np.arange(T)
        has_followers = np.zeros(T, bool)
        has_followers[parents[~is_first]] = True
        # in each passage: representatives that are followed, the other ones, followers
        order = np.lexsort((~has_followers, ~is_first, passage))
        first_order, follower_order = order[is_first[order]], order[~is_first[order]]
        nearest, codes, decoded = self._encode_first(values[first_order], device)
        place = np.zeros(T, np.int64)
        place[first_order] = np.arange(len(first_order))
        parent = place[parents[follower_order]]  # (F,) among the representatives
        differences = values[follower_order] - decoded[parent]
        follower_codes, rebuilt = self.books[1].encode(differences)
        rebuilt += decoded[parent]
        norms = norm_bytes(decoded), norm_bytes(rebuilt)

        n, f = (np.bincount(passage[kind], minlength=len(lengths)) for kind in (first_order, follower_order))
        begins = np.cumsum(n) - n  # of each passage among the representatives
        within = parent - begins[passage[follower_order]]
        assert not len(within) or within.max() < kernels.MOST_PARENTS
        sizes = np.stack([n, f], 1).astype(np.uint16)
        starts = np.concatenate([[0], np.cumsum(self.passage_bytes(sizes))])
        data = np.empty(starts[-1], np.uint8)
        of_first, of_follower = passage[first_order], passage[follower_order]
        i = np.arange(len(of_first)) - begins[of_first]
        j = np.arange(len(of_follower)) - (np.cumsum(f) - f)[of_follower]
        pairs = nearest.astype("<u2").view(np.uint8).reshape(-1, 2)
        put(data, starts[of_first] + 2 * i, pairs)
        put(data, starts[of_follower] + 2 * n[of_follower] + j, within.astype(np.uint8)[:, None])
        at = starts[:-1] + 2 * n + f
        put(data, at[of_first] + i, norms[0][:, None])
        put(data, (at + n)[of_follower] + j, norms[1][:, None])
        at = at + n + f
        put(data, at[of_first] + self.M[0] * i, codes)
        put(data, (at + self.M[0] * n)[of_follower] + self.M[1] * j, follower_codes)
        return data, sizes

    def _encode_first(self, values: np.ndarray, device) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Centroids (n,), codes (n, M[0]) and decoded vectors (n, D), not of unit length, of representatives."""
        nearest = assign(torch.from_numpy(values), self._unit, device).numpy()
        codes, rebuilt = self.books[0].encode(values - self.centroids[nearest])
        return nearest, codes, rebuilt + self.centroids[nearest]

    def passage_bytes(self, sizes: np.ndarray) -> np.ndarray:
        """Bytes (n,) of passages of these sizes (n, 2)."""
        return sizes.astype(np.int64) @ (self.M + np.array([3, 2]))

    # --------------------------------------------------------------------------------------------------------- decode

    def decode(self, data: np.ndarray, size: np.ndarray) -> np.ndarray:
        """Unit vectors (T, D) fp32 of one passage of `size` (2,), representatives first; the plain way back."""
        n, f = map(int, size)
        parts = np.split(data, np.cumsum([2 * n, f, n, f, self.M[0] * n]))
        centroids = parts[0].copy().view("<u2").astype(np.int64)
        firsts = self.centroids[centroids] + self.books[0].decode(parts[4].reshape(n, self.M[0]))
        followers = firsts[parts[1]] + self.books[1].decode(parts[5].reshape(f, self.M[1]))
        factors = NORM_LEAST + NORM_STEP * np.concatenate([parts[2], parts[3]]).astype(np.float32)
        return np.concatenate([firsts, followers]) * factors[:, None]

    # ---------------------------------------------------------------------------------------------------------- score

    def tables(self, query: Tensor) -> Tables:
        """Look-up tables of up to LANES query tokens, (Lq, D) fp32."""
        padded = torch.zeros(LANES, self.dim)
        padded[: len(query)] = query
        products = torch.from_numpy(self.centroids) @ padded.T  # (C, LANES)
        parts = [book.tables(padded) for book in self.books]
        scale = min(LARGEST_SCALE, 127 / max(1e-6, *(float(part.abs().max()) for part in parts)))
        tables = (part.mul_(scale).round_().to(torch.int8).numpy() for part in parts)
        return Tables(products.mul_(scale).round_().to(torch.int16).numpy(), *tables, scale)


def as_saved(array: np.ndarray) -> np.ndarray:
    """What is left of fp32 values in fp16: an opened codec encodes and scores like the one that was trained."""
    return array.astype(np.float16).astype(np.float32)


def balanced_rotation(vectors: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Principal directions (D, D) of vectors (n, D), dealt out to parts, largest first: like products of variances."""
    variances, directions = np.linalg.eigh(vectors.T @ vectors / len(vectors))
    logs = np.log(np.maximum(variances, 1e-9 + 1e-6 * variances.max()))
    logs -= logs.min()
    parts, totals, room = [[] for _ in edges[1:]], np.zeros(len(edges) - 1), np.diff(edges)
    for j in np.argsort(-logs, kind="stable"):
        part = np.where(room > 0, totals, np.inf).argmin()
        parts[part].append(j)
        totals[part] += logs[j]
        room[part] -= 1
    return directions[:, np.concatenate(parts)].astype(np.float32)


def parts_of(dim: int, M: int) -> np.ndarray:
    """Where the M parts of a vector begin, and its end: (M + 1,)."""
    return np.cumsum([0] + [len(part) for part in np.array_split(np.arange(dim), M)])


def put(data: np.ndarray, starts: np.ndarray, rows: np.ndarray) -> None:
    """Write row i of rows (n, w) to data[starts[i] : starts[i] + w]."""
    data[starts[:, None] + np.arange(rows.shape[1])] = rows


def norm_bytes(decoded: np.ndarray) -> np.ndarray:
    """The byte (n,) of the factor that brings each vector nearest to unit length."""
    factors = 1 / np.maximum(np.linalg.norm(decoded, axis=1), 1e-6)
    return np.clip(np.round((factors - NORM_LEAST) / NORM_STEP), 0, 255).astype(np.uint8)


def find_parents(values: np.ndarray, lengths: np.ndarray, similarity: float) -> np.ndarray:
    """The representative of each token (T,), itself where it is one; values (T, D) fp32, lengths (n,) of passages."""
    parents = np.empty(len(values), np.int64)
    kernels.representatives(values, np.concatenate([[0], np.cumsum(lengths)]), np.float32(similarity), parents)
    return parents


def unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)


def assign(vectors: Tensor, centroids: Tensor, device="cpu") -> Tensor:
    """The nearest of the unit centroids (C, D) for each vector (n, D): (n,) int64. Products in bf16."""
    centroids, nearest = centroids.to(device, torch.bfloat16), torch.empty(len(vectors), dtype=torch.int64)
    # One result and one buffer: small results among large passing ones would leave a heap of holes.
    buffer = torch.empty(min(ASSIGN_BLOCK, len(vectors)), len(centroids), device=device)
    for start in range(0, len(vectors), ASSIGN_BLOCK):
        part = vectors[start : start + ASSIGN_BLOCK].to(device, torch.bfloat16)
        similarities = buffer[: len(part)].copy_(part @ centroids.T)
        if similarities.device.type == "cpu":  # numpy's argmax is many times faster there
            nearest[start : start + len(part)] = torch.from_numpy(similarities.numpy().argmax(1))
        else:
            nearest[start : start + len(part)] = similarities.argmax(1)
    return nearest


def kmeans(vectors: Tensor, n: int, rng, device="cpu") -> Tensor:
    """Means (n, D) of clusters by cosine; a cluster that nothing is nearest to begins again at a random vector."""
    centroids = vectors[np.sort(rng.permutation(len(vectors))[:n])]
    for _ in range(CENTROID_ITERATIONS):
        nearest = assign(vectors, unit(centroids), device)
        counts = torch.bincount(nearest, minlength=n)
        centroids = torch.zeros(n, vectors.shape[1]).index_add_(0, nearest, vectors) / counts.clamp(min=1)[:, None]
        empty = (counts == 0).nonzero()[:, 0]
        centroids[empty] = vectors[rng.integers(0, len(vectors), len(empty))]
    return centroids
