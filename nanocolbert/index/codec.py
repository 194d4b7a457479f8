"""Compress token embeddings to a few bytes each, in two steps, and score them as they are.

Tokens of a passage repeat one another: a third of SQuAD's have a neighbour in their passage at a cosine of 0.85. So a
passage's tokens are split into representatives and followers. A representative is coded coarsely, as the nearest of
`nlist` centroids and its difference from it in a few bytes, and then finely: what the coarse code leaves over. A
follower is coded as its difference from its representative as decoded: a small one, hence few bytes. Differences are
coded by product quantisation (Jégou et al., TPAMI 2011): M parts, each replaced by the nearest of 256 codewords, one
byte; before, all is rotated on the principal directions of the differences, which are dealt out so that every part gets
its share of the variance (Ge et al., CVPR 2013). What is left over of a coarse part is coded in finer parts of it, and
the coarse codeword is the one that leaves least in the end (as in additive quantisation, Babenko and Lempitsky, CVPR
2014), which costs no byte and takes 16, 26 and 52 % off the error at 2, 4 and 8 bits. A last byte brings a decoded
vector to unit length. Residuals to centroids are ColBERTv2's (arXiv 2112.01488), near-duplicates within a passage those
of Clavié et al. (arXiv 2409.14683), who average them away. LOG.md has what else was measured.

The coarse codes alone order many passages, the fine ones the best of them (search.py). The dot product of a query token
with a decoded token is a sum of look-ups: one for the centroid, one a part. Scores of 32 query tokens lie side by side,
so that a look-up serves them all by one instruction (kernels.py).

A passage of n representatives and f followers in bytes. Coarse: centroids 2 n, norms n, codes M[0] n. Fine: parents f,
norms f, codes M[1] n + M[2] f. The upper half of a representative's byte of norm is its coarse vector's, the lower half
tells how its fine vector's differs from what is usual for that.
"""

import math
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanocolbert.cli import InputError
from nanocolbert.compute import fast_dtype, single_threads
from nanocolbert.index import kernels
from nanocolbert.index.kernels import CODEWORDS, LANES, SCALE
from nanocolbert.index.knobs import BITS, LONGEST
from nanocolbert.progress import progress
from nanocolbert.storage.ragged import load_npy, neighbours

BOOKS, LEVELS = ("representative", "follower"), ("coarse", "fine")
OVERHEAD = 1.2  # bytes a token of centroids, offsets and sizes, in a collection of a few million tokens
SIMILARITY = 0.85  # cosine from which a token may follow another
MOST_CENTROIDS = 1 << 16  # what two bytes can name
PER_CENTROID = 40  # embeddings that centroids are trained on; faiss warns under 39
NORM_QUANTILES = 0.001, 0.999  # of the factors seen in training: what a byte of norm spans
CANDIDATES = 8  # coarse codewords tried for each part
BEGIN_SAMPLE = 8_000  # of them, those that k-means begins with
BOOK_SAMPLE = 60_000  # differences that the codewords are trained on
BOOK_ITERATIONS, JOINT_ITERATIONS, CENTROID_ITERATIONS = 6, 3, 6
ASSIGN_BLOCK = 512  # embeddings whose similarities to all centroids are in memory at a time
FEWEST_GROUPED, GROUP_BLOCK = 2048, 1 << 15  # centroids worth grouping where products are fp32; embeddings at a time
TRIED = 4, 8  # groups that an embedding's nearest centroid is looked for in: to train centroids, to encode
ENCODE_TOKENS = 1 << 15  # embeddings that a thread encodes at a time


def code_bytes(dim: int, bits: int, share: float) -> tuple[int, int, int]:
    """Bytes M of a representative's coarse code, of its fine one, and of a follower's, all even.

    In all at most bits * dim / 8 + dim / 32 a token, lists and centroids among them, where `share` of the tokens are
    representatives.
    """
    even = lambda value, least: max(least, min(dim, int(value)) // 2 * 2)  # noqa: E731
    budget = bits * dim / 8 + dim / 32 - OVERHEAD
    follower = even(7 * bits * dim / 64 - dim / 16, 2)
    both = (budget - (1 - share) * (2 + follower)) / share - 5
    coarse = even(min((2 if bits == 1 else 3) * dim / 32, both / 2), 2)
    fine = even(both - coarse, coarse)
    if share < 1:
        follower = even((budget - share * (5 + coarse + fine)) / (1 - share) - 2, 2)
    return coarse, fine, follower


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
    """What up to LANES query tokens score with centroids and codewords, int16; 1.0 is SCALE."""

    centroids: np.ndarray  # (C, LANES)
    books: list[np.ndarray]  # (M, 256, LANES): coarse, fine, follower
    rough: list[np.ndarray]  # centroids and the coarse book in bytes, see kernels.rough


class Codes(NamedTuple):
    """Compressed passages: coarse and fine bytes, one passage after the other, and sizes (n, 2) uint16.

    A passage's sizes are how many representatives and how many followers it has.
    """

    coarse: np.ndarray
    fine: np.ndarray
    sizes: np.ndarray


class Book:
    """A product quantiser in two levels: coarse parts, and in each of them fine parts, which code what it leaves over.

    codewords: of both levels, (M, 256, d) each; columns (D,) of a vector in the order of the parts. Part m of a level
    has the columns edges[m] to edges[m + 1] - 1; widths of fine parts differ by one at most, coarse part m is made of
    the fine parts within[m] to within[m + 1] - 1, and codewords of a narrower part end in zeros.
    """

    def __init__(self, codewords: list[np.ndarray], columns: np.ndarray):
        self.codewords, self.columns = codewords, columns
        self.within, self.edges = nest(len(columns), *(len(words) for words in codewords))
        self.columns_of_parts = []  # (M, d) each
        for edges in self.edges:
            widths = np.diff(edges)[:, None]
            # past the end of a narrower part any column will do: its codewords are 0 there
            places = edges[:-1, None] + np.minimum(np.arange(widths.max()), widths - 1)
            self.columns_of_parts.append(torch.from_numpy(columns[places]))

    @classmethod
    def train(cls, vectors: np.ndarray, coarse: int, fine: int, rng) -> "Book":
        """By k-means of each part of these vectors (n, D) fp32, of each part of what it leaves over, then of both."""
        n, (_, edges) = len(vectors), nest(vectors.shape[1], coarse, fine)
        columns = deal((vectors**2).mean(0), edges[1])
        vectors, codewords = np.ascontiguousarray(vectors[:, columns]), []
        left = vectors.copy()
        for level in edges:
            words = np.zeros((len(level) - 1, CODEWORDS, np.diff(level).max()), np.float32)
            some = left[rng.permutation(n)[:BEGIN_SAMPLE]]
            kernels.first_codewords(some, level, rng.random(words.shape[:2]), words)
            alone = [words, words[:0]], (level, level[:1]), np.zeros(len(level), np.int64)  # no finer parts
            for _ in progress(range(BOOK_ITERATIONS), desc="codewords", unit=" rounds"):
                codes, rebuilt = quantise(left, *alone, 1)
                kernels.refine(words, level, codes, left - rebuilt[0])
            left -= quantise(left, *alone, 1)[1][0]
            codewords.append(words)
        book = cls(codewords, columns)
        for _ in progress(range(JOINT_ITERATIONS), desc="codewords", unit=" rounds"):
            codes, rebuilt = quantise(vectors, codewords, book.edges, book.within, CANDIDATES)
            left = vectors - rebuilt[1]
            for words, level, here in zip(codewords, edges, np.split(codes, [coarse], axis=1), strict=True):
                kernels.refine(words, level, here, left)
        return cls([as_saved(words) for words in codewords], columns)

    def encode(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Codes (n, M) uint8 of vectors (n, D) fp32, the coarse ones first, and what these and all decode to, (n, D).

        For each coarse part the codeword that leaves least over after the fine ones, of the CANDIDATES nearest.
        """
        codes, rebuilt = quantise(vectors, self.codewords, self.edges, self.within, CANDIDATES, self.columns)
        return codes, *rebuilt

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Vectors (n, D) of codes (n, M), or of the coarse ones alone."""
        vectors = np.zeros((len(codes), len(self.columns)), np.float32)
        for words, edges in zip(self.codewords, self.edges, strict=True):
            here, codes = codes[:, : len(words)], codes[:, len(words) :]
            for m in range(here.shape[1]):
                vectors[:, edges[m] : edges[m + 1]] += words[m, here[:, m], : edges[m + 1] - edges[m]]
        return vectors[:, np.argsort(self.columns)]

    def tables(self, query: Tensor) -> np.ndarray:
        """Dot products (M, 256, LANES) int16 of codewords with the parts of a query (LANES, D)."""
        products = [
            torch.bmm(torch.from_numpy(words), query.T[columns])
            for words, columns in zip(self.codewords, self.columns_of_parts, strict=True)
        ]
        return torch.cat(products).round_().to(torch.int16).numpy()


class Codec:
    """A rotation (D, D), centroids (C, D) fp32 as rotated, a Book each for representatives and followers.

    norms (3, 256) fp32: the factor that a byte of norm stands for, after coarse codes, after fine ones, of followers.
    """

    def __init__(self, rotation, centroids: np.ndarray, books: list[Book], norms: np.ndarray, similarity: float):
        self.rotation, self.centroids, self.books = rotation, centroids, books
        self.norms, self.similarity = norms, similarity

    @property
    def M(self) -> np.ndarray:
        """Bytes of a representative's coarse code, of its fine one, and of a follower's."""
        (coarse, fine), followers = ([len(words) for words in book.codewords] for book in self.books)
        return np.array([coarse, fine, sum(followers)])

    @classmethod
    def train(cls, values, lengths, bits: int, nlist: int, seed: int, device="cpu", similarity=SIMILARITY) -> "Codec":
        """Train on a sample of whole passages: values (T, D), lengths (n,).

        Raises InputError where the sample is too small for the centroids.
        """
        values, dim = np.asarray(values, np.float32), values.shape[1]
        if bits not in BITS or dim % 4:
            raise InputError(f"{bits} bits, dimension {dim}: give 1, 2, 4 or 8 bits, and a dimension that 4 divides")
        rng = np.random.default_rng(seed)
        parents = find_parents(values, lengths, similarity)
        is_first = parents == np.arange(len(values))
        firsts = values[is_first]
        if nlist > min(len(firsts), MOST_CENTROIDS):
            raise InputError(
                f"{nlist} centroids from {len(firsts)} embeddings: at most so many, and {MOST_CENTROIDS}: lower --nlist"
            )
        M = code_bytes(dim, bits, len(firsts) / len(values))
        centroids = kmeans(torch.from_numpy(firsts), nlist, rng, device).numpy()
        some = firsts[rng.permutation(len(firsts))[:BOOK_SAMPLE]]
        nearest = assign(torch.from_numpy(some), unit(torch.from_numpy(centroids)), device).numpy()
        rotation = as_saved(principal_directions(some - centroids[nearest]))
        codec = cls(rotation, as_saved(centroids @ rotation), [], np.ones((3, 256), np.float32), similarity)
        some = some @ rotation
        codec.books.append(Book.train(some - codec.centroids[codec._nearest(some, device)], *M[:2], rng))
        *_, coarse, decoded = codec._encode_first(some, device)
        upper, fine = spread(norm_factors(coarse), 16), norm_factors(decoded)
        codec.norms[0] = np.repeat(upper, 16)
        usual = nearest_level(norm_factors(coarse), upper)
        for number in range(16):
            here = fine[usual == number]
            codec.norms[1, 16 * number :][:16] = spread(here if len(here) >= 16 else fine, 16)
        followers = rng.permutation(np.flatnonzero(~is_first))[:BOOK_SAMPLE]
        if not len(followers):  # a sample without near-duplicates; something must stand there
            followers = parents[:1]
        decoded = codec._encode_first(values[parents[followers]] @ rotation, device)[-1]
        left = values[followers] @ rotation - decoded
        coarse = max(1, M[2] // 3)
        codec.books.append(Book.train(left, coarse, M[2] - coarse, rng))
        codec.norms[2] = spread(norm_factors(decoded + codec.books[1].encode(left)[-1]), 256)
        return codec

    def save(self, folder) -> None:
        """Write the arrays into a folder."""
        folder = Path(folder)
        np.save(folder / "rotation.npy", self.rotation.astype(np.float16))
        np.save(folder / "centroids.npy", self.centroids.astype(np.float16))
        np.save(folder / "norms.npy", self.norms)
        np.save(folder / "similarity.npy", self.similarity)
        for name, book in zip(BOOKS, self.books, strict=True):
            for level, words in zip(LEVELS, book.codewords, strict=True):
                np.save(folder / f"{name}_{level}.npy", words.astype(np.float16))
            np.save(folder / f"{name}_columns.npy", book.columns.astype(np.uint16))

    @classmethod
    def load(cls, folder) -> "Codec":
        """Open what `save` wrote. Raises InputError unless the arrays fit each other, and are finite."""
        folder = Path(folder)

        def read(name: str, kind: str, *shape) -> np.ndarray:
            array = load_npy(folder / f"{name}.npy", kind, shape, mmap=False)
            if kind[0] != "f":
                return array.astype(np.int64)
            array = array.astype(np.float32)
            if not np.isfinite(array.sum()):
                raise InputError(f"{folder / name}.npy: holds what is no number: restore it, or make {folder} again")
            return array

        rotation = read("rotation", "f2", None, None)
        dim = len(rotation)
        centroids, norms = read("centroids", "f2", None, dim), read("norms", "f4", 3, 256)
        similarity, books = read("similarity", "f4 f8"), []
        for name in BOOKS:
            columns = read(f"{name}_columns", "u2", dim)
            words = [read(f"{name}_{level}", "f2", None, CODEWORDS, None) for level in LEVELS]
            coarse, fine = map(len, words)
            fits = 0 < coarse <= fine <= dim and np.array_equal(np.sort(columns), np.arange(dim))
            widths = [np.diff(edges).max() for edges in nest(dim, coarse, fine)[1]] if fits else []
            if [level.shape[2] for level in words] != widths:
                raise InputError(f"{folder}: {name}_*.npy do not fit each other: make {folder} again")
            books.append(Book(words, columns))
        codec = cls(rotation, centroids, books, norms, float(similarity))
        if rotation.shape != (dim, dim) or not 0 < len(centroids) <= MOST_CENTROIDS or (codec.M % 2).any():
            raise InputError(f"{folder}: rotation.npy, centroids.npy and the codewords do not fit: make it again")
        return codec

    @cached_property
    def _unit(self) -> Tensor:
        return unit(torch.from_numpy(self.centroids))

    @cached_property
    def _groups(self) -> "Groups | None":
        return Groups.of(self._unit)

    @property
    def dim(self) -> int:
        """Size D of a vector."""
        return self.centroids.shape[1]

    # --------------------------------------------------------------------------------------------------------- encode

    def encode(self, values: np.ndarray, lengths: np.ndarray, device="cpu") -> Codes:
        """Compress passages: values (T, D), lengths (n,); all threads take their share."""
        if len(lengths) and (lengths.max() >= LONGEST or lengths.min() < 1):
            wrong = lengths.max() if lengths.max() >= LONGEST else lengths.min()
            raise InputError(f"a passage of {wrong} tokens: at least 1 and at most {LONGEST - 1} can be compressed")
        if not len(lengths):
            return Codes(np.zeros(0, np.uint8), np.zeros(0, np.uint8), np.zeros((0, 2), np.uint16))
        offsets = np.append(0, np.cumsum(lengths))

        def encode_block(block: slice) -> Codes:
            part = values[offsets[block.start] : offsets[block.stop]]
            return self._encode(np.asarray(part, np.float32), lengths[block], device)

        with single_threads() as threads:
            parts = list(threads.map(encode_block, neighbours(lengths, ENCODE_TOKENS)))
        return Codes(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def _encode(self, values: np.ndarray, lengths: np.ndarray, device) -> Codes:
        T, passage = len(values), np.repeat(np.arange(len(lengths)), lengths)
        parents = find_parents(values, lengths, self.similarity)
        values = values @ self.rotation
        is_first = parents == np.arange(T)
        has_followers = np.zeros(T, bool)
        has_followers[parents[~is_first]] = True
        # in each passage: representatives that are followed, the other ones, followers
        order = np.lexsort((~has_followers, ~is_first, passage))
        firsts, followers = order[is_first[order]], order[~is_first[order]]
        of_first, of_follower = passage[firsts], passage[followers]
        n, f = (np.bincount(where, minlength=len(lengths)) for where in (of_first, of_follower))
        sizes = np.stack([n, f], 1).astype(np.uint16)
        i = np.arange(len(firsts)) - (np.cumsum(n) - n)[of_first]  # place among the passage's representatives
        j = np.arange(len(followers)) - (np.cumsum(f) - f)[of_follower]

        nearest, codes, coarse_decoded, decoded = self._encode_first(values[firsts], device)
        starts = np.concatenate([np.zeros((1, 2), np.int64), np.cumsum(self.passage_bytes(sizes), 0)])
        coarse, fine = (np.empty(size, np.uint8) for size in starts[-1])
        at = starts[:-1, 0]
        put(coarse, at[of_first] + 2 * i, nearest.astype("<u2").view(np.uint8).reshape(-1, 2))
        put(coarse, (at + 2 * n)[of_first] + i, self._norm_bytes(coarse_decoded, decoded))
        put(coarse, (at + 3 * n)[of_first] + self.M[0] * i, codes[:, : self.M[0]])
        place = np.zeros(T, np.int64)
        place[firsts] = np.arange(len(firsts))
        parent = place[parents[followers]]  # (F,) among all representatives
        assert not len(parent) or i[parent].max() < kernels.MOST_PARENTS
        follower_codes, _, rebuilt = self.books[1].encode(values[followers] - decoded[parent])
        at = starts[:-1, 1]
        norms = nearest_level(norm_factors(decoded[parent] + rebuilt), self.norms[2])
        put(fine, at[of_follower] + j, i[parent].astype(np.uint8)[:, None])
        put(fine, (at + f)[of_follower] + j, norms.astype(np.uint8)[:, None])
        at = at + 2 * f
        put(fine, at[of_first] + self.M[1] * i, codes[:, self.M[0] :])
        put(fine, (at + self.M[1] * n)[of_follower] + self.M[2] * j, follower_codes)
        return Codes(coarse, fine, sizes)

    def _nearest(self, values: np.ndarray, device) -> np.ndarray:
        vectors, groups = torch.from_numpy(values), self._groups if torch.device(device).type == "cpu" else None
        return (groups.assign(vectors, TRIED[1]) if groups else assign(vectors, self._unit, device)).numpy()

    def _encode_first(self, values: np.ndarray, device) -> tuple[np.ndarray, ...]:
        """Of representatives: centroids (n,), codes (n, M), vectors decoded coarsely and finely (n, D).

        Decoded vectors are not of unit length yet.
        """
        nearest = self._nearest(values, device)
        start = self.centroids[nearest]
        codes, coarse, fine = self.books[0].encode(values - start)
        return nearest, codes, start + coarse, start + fine

    def _norm_bytes(self, coarse: np.ndarray, fine: np.ndarray) -> np.ndarray:
        """Bytes of norm (n, 1) of representatives decoded coarsely and finely (n, D)."""
        upper, wanted = nearest_level(norm_factors(coarse), self.norms[0, ::16]), norm_factors(fine)
        levels = self.norms[1].reshape(16, 16)[upper]  # (n, 16), evenly spaced
        lower = np.round(15 * (wanted - levels[:, 0]) / np.maximum(levels[:, -1] - levels[:, 0], 1e-6))
        return (16 * upper + np.clip(lower, 0, 15)).astype(np.uint8)[:, None]

    def passage_bytes(self, sizes: np.ndarray) -> np.ndarray:
        """Coarse and fine bytes (n, 2) of passages of these sizes (n, 2)."""
        n, f = sizes.T.astype(np.int64)
        fine = self.M[1] * n + (self.M[2] + 2) * f
        return np.stack([(self.M[0] + 3) * n, fine], 1)

    # --------------------------------------------------------------------------------------------------------- decode

    def decode(self, coarse: np.ndarray, fine: np.ndarray | None, size: np.ndarray) -> np.ndarray:
        """Unit vectors (T, D) fp32 of one passage of `size` (2,), representatives first; the plain way back.

        By coarse codes alone, `fine` None, those of its representatives.
        """
        n, f = map(int, size)
        centroids, norms, codes = np.split(coarse, [2 * n, 3 * n])
        start = self.centroids[centroids.copy().view("<u2").astype(np.int64)]
        codes = codes.reshape(n, self.M[0])
        if fine is None:
            return (start + self.books[0].decode(codes)) * self.norms[0, norms][:, None] @ self.rotation.T
        parents, follower_norms, fine_codes, follower_codes = np.split(fine, np.cumsum([f, f, self.M[1] * n]))
        vectors = start + self.books[0].decode(np.concatenate([codes, fine_codes.reshape(n, self.M[1])], 1))
        followers = vectors[parents] + self.books[1].decode(follower_codes.reshape(f, self.M[2]))
        factors = np.concatenate([self.norms[1, norms], self.norms[2, follower_norms]])
        return np.concatenate([vectors, followers]) * factors[:, None] @ self.rotation.T

    # ---------------------------------------------------------------------------------------------------------- score

    @cached_property
    def factors(self) -> np.ndarray:
        """Factors of norms as kernels.scaled_max takes them, (3, 256) int64."""
        return (self.norms * kernels.FACTOR).round().clip(0, (1 << 15) - 1).astype(np.int64)

    def tables(self, query: Tensor) -> Tables:
        """Look-up tables of up to LANES query tokens, (Lq, D) fp32."""
        padded = torch.zeros(LANES, self.dim)
        padded[: len(query)] = SCALE * query @ torch.from_numpy(self.rotation)
        similarities = self._multiplied @ padded.T.to(self._multiplied.dtype)
        centroids = similarities.float().round_().to(torch.int16).numpy()
        first, follower = (book.tables(padded) for book in self.books)
        books = [first[: self.M[0]], first[self.M[0] :], follower]
        return Tables(centroids, books, [kernels.rough(centroids), kernels.rough(books[0])])

    @cached_property
    def _multiplied(self) -> Tensor:
        """Centroids as queries are multiplied with them: to 2 bits, what bf16 rounds off is little beside the rest."""
        is_rough = self.M[1] < self.dim // 4
        return torch.from_numpy(self.centroids).to(fast_dtype(torch.device("cpu")) if is_rough else torch.float32)


def as_saved(array: np.ndarray) -> np.ndarray:
    """What is left of fp32 values in fp16: an opened codec encodes and scores like the one that was trained."""
    return array.astype(np.float16).astype(np.float32)


def principal_directions(vectors: np.ndarray) -> np.ndarray:
    """Principal directions (D, D) of vectors (n, D), as columns, the largest first."""
    return np.linalg.eigh(vectors.T @ vectors / len(vectors))[1][:, ::-1].astype(np.float32)


def deal(variances: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Columns (D,) dealt out to parts, the largest variance first, so that parts have like products of variances."""
    logs = np.log(np.maximum(variances, 1e-9 + 1e-6 * variances.max()))
    logs -= logs.min()
    parts, totals, room = [[] for _ in edges[1:]], np.zeros(len(edges) - 1), np.diff(edges)
    for j in np.argsort(-logs, kind="stable"):
        part = np.where(room > 0, totals, np.inf).argmin()
        parts[part].append(j)
        totals[part] += logs[j]
        room[part] -= 1
    return np.concatenate(parts).astype(np.int64)


def nest(dim: int, coarse: int, fine: int) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Which fine parts make up each coarse part, (coarse + 1,), and the edges of the coarse and the fine parts."""
    within, edges = parts_of(fine, coarse), parts_of(dim, fine)
    return within, (edges[within], edges)


def quantise(vectors: np.ndarray, codewords, edges, within, n_candidates: int, columns=None) -> tuple:
    """Codes (n, M) of both levels, and the codewords they stand for, (2, n, D), as kernels.quantise says.

    columns (D,): those of the vectors in the order of the parts, None if they are in it.
    """
    columns = np.arange(vectors.shape[1]) if columns is None else columns
    codes = np.empty((len(vectors), sum(map(len, codewords))), np.uint8)
    rebuilt = np.empty((2, *vectors.shape), np.float32)
    kernels.quantise(np.ascontiguousarray(vectors), columns, *codewords, *edges, within, n_candidates, codes, rebuilt)
    return codes, rebuilt


def parts_of(dim: int, M: int) -> np.ndarray:
    """Where the M parts of a vector begin, and its end: (M + 1,)."""
    return np.cumsum([0] + [len(part) for part in np.array_split(np.arange(dim), M)])


def put(data: np.ndarray, starts: np.ndarray, rows: np.ndarray) -> None:
    """Write row i of rows (n, w) to data[starts[i] : starts[i] + w]."""
    data[starts[:, None] + np.arange(rows.shape[1])] = rows


def norm_factors(vectors: np.ndarray) -> np.ndarray:
    """What brings each vector (n, D) to unit length, (n,)."""
    return 1 / np.maximum(np.linalg.norm(vectors, axis=1), 1e-6)


def spread(values: np.ndarray, n: int) -> np.ndarray:
    """n levels, evenly spaced, over what most of the values span."""
    return np.linspace(*np.quantile(values, NORM_QUANTILES), n).astype(np.float32)


def nearest_level(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The nearest of evenly spaced levels (n,) to each value."""
    step = max((levels[-1] - levels[0]) / (len(levels) - 1), 1e-6)
    return np.clip(np.round((values - levels[0]) / step), 0, len(levels) - 1).astype(np.int64)


def find_parents(values: np.ndarray, lengths: np.ndarray, similarity: float) -> np.ndarray:
    """The representative of each token (T,), itself where it is one; values (T, D) fp32, lengths (n,) of passages."""
    parents = np.empty(len(values), np.int64)
    kernels.representatives(values, np.concatenate([[0], np.cumsum(lengths)]), np.float32(similarity), parents)
    return parents


def unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)


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


def product_dtype(device) -> torch.dtype:
    """What products with centroids are computed in: bf16 but on CPUs that would have to emulate it."""
    device = torch.device(device)
    return fast_dtype(device) if device.type == "cpu" else torch.bfloat16


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


def kmeans(vectors: Tensor, n: int, rng, device="cpu") -> Tensor:
    """Means (n, D) of clusters by cosine; a cluster that nothing is nearest to begins again at a random vector."""
    centroids = vectors[np.sort(rng.permutation(len(vectors))[:n])]
    for _ in progress(range(CENTROID_ITERATIONS), desc="centroids", unit=" rounds"):
        centroids = unit(centroids)
        groups = Groups.of(centroids, device)
        nearest = groups.assign(vectors, TRIED[0]) if groups else assign(vectors, centroids, device)
        counts = torch.bincount(nearest, minlength=n)
        centroids = torch.zeros(n, vectors.shape[1]).index_add_(0, nearest, vectors) / counts.clamp(min=1)[:, None]
        empty = (counts == 0).nonzero()[:, 0]
        centroids[empty] = vectors[rng.integers(0, len(vectors), len(empty))]
    return centroids
