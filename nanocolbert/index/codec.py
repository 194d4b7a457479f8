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
of Clavié et al. (arXiv 2409.14683), who average them away. docs/log.md has what else was measured.

The coarse codes alone order many passages, the fine ones the best of them (compressed.py). The dot product of a query
token with a decoded token is a sum of look-ups: one for the centroid, one a part. Scores of 32 query tokens lie side by
side, so that a look-up serves them all by one instruction (kernels/score.py).

A passage of n representatives and f followers in bytes. Coarse: centroids 2 n, norms n, codes M[0] n. Fine: parents f,
norms f, codes M[1] n + M[2] f. The upper half of a representative's byte of norm is its coarse vector's, the lower half
tells how its fine vector's differs from what is usual for that.
"""

from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanocolbert.cli import InputError
from nanocolbert.compute import fast_dtype, single_threads
from nanocolbert.index.book import Book, as_saved, nest
from nanocolbert.index.centroids import MOST_CENTROIDS, Groups, assign, train_centroids, unit
from nanocolbert.index.kernels.compiled import CODEWORDS
from nanocolbert.index.kernels.nearest import MOST_PARENTS, representatives
from nanocolbert.index.kernels.score import FACTOR, LANES, SCALE, rough
from nanocolbert.index.knobs import BITS, LONGEST
from nanocolbert.storage.ragged import load_npy, neighbours

BOOKS, LEVELS = ("representative", "follower"), ("coarse", "fine")
OVERHEAD = 1.2  # bytes a token of centroids, offsets and sizes, in a collection of a few million tokens
SIMILARITY = 0.85  # cosine from which a token may follow another
NORM_QUANTILES = 0.001, 0.999  # of the factors seen in training: what a byte of norm spans
BOOK_SAMPLE = 60_000  # differences that the codewords are trained on
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


class Tables(NamedTuple):
    """What up to LANES query tokens score with centroids and codewords, int16; 1.0 is SCALE."""

    centroids: np.ndarray  # (C, LANES)
    books: list[np.ndarray]  # (M, 256, LANES): coarse, fine, follower
    rough: list[np.ndarray]  # centroids and the coarse book in bytes, see kernels/score.py


class Codes(NamedTuple):
    """Compressed passages: coarse and fine bytes, one passage after the other, and sizes (n, 2) uint16.

    A passage's sizes are how many representatives and how many followers it has.
    """

    coarse: np.ndarray
    fine: np.ndarray
    sizes: np.ndarray


class Codec:
    """A rotation (D, D), centroids (C, D) fp32 as rotated, a Book each for representatives and followers.

    starts (G + 1,): where groups of centroids begin.
    norms (3, 256) fp32: the factor that a byte of norm stands for, after coarse codes, after fine ones, of followers.
    """

    def __init__(self, rotation, centroids: np.ndarray, starts, books: list[Book], norms: np.ndarray, similarity):
        self.rotation, self.centroids, self.starts, self.books = rotation, centroids, starts, books
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
        centroids, starts = train_centroids(torch.from_numpy(firsts), nlist, rng, device)
        some = firsts[rng.permutation(len(firsts))[:BOOK_SAMPLE]]
        nearest, centroids = Groups.of(centroids, starts).assign(torch.from_numpy(some)), centroids.numpy()
        rotation = as_saved(principal_directions(some - centroids[nearest]))
        codec = cls(rotation, as_saved(centroids @ rotation), starts, [], np.ones((3, 256), np.float32), similarity)
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
        np.save(folder / "groups.npy", self.starts)
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
        starts = np.array([0, len(centroids)])  # as older indexes, which have none
        if (folder / "groups.npy").is_file():
            starts = read("groups", "i8", None)
            if not len(starts) or starts[0] != 0 or starts[-1] != len(centroids) or (np.diff(starts) < 1).any():
                raise InputError(f"{folder / 'groups.npy'}: not groups of {len(centroids)} centroids: make it again")
        codec = cls(rotation, centroids, starts, books, norms, float(similarity))
        if rotation.shape != (dim, dim) or not 0 < len(centroids) <= MOST_CENTROIDS or (codec.M % 2).any():
            raise InputError(f"{folder}: rotation.npy, centroids.npy and the codewords do not fit: make it again")
        return codec

    @cached_property
    def _unit(self) -> Tensor:
        return unit(torch.from_numpy(self.centroids))

    @cached_property
    def _groups(self) -> Groups:
        return Groups.of(torch.from_numpy(self.centroids), self.starts)

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
        assert not len(parent) or i[parent].max() < MOST_PARENTS
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
        vectors = torch.from_numpy(values)
        if len(self.starts) > 2 and torch.device(device).type == "cpu":
            return self._groups.assign(vectors)
        return assign(vectors, self._unit, device).numpy()

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
        """Factors of norms as `scaled_max` takes them, (3, 256) int64."""
        return (self.norms * FACTOR).round().clip(0, (1 << 15) - 1).astype(np.int64)

    def tables(self, query: Tensor) -> Tables:
        """Look-up tables of up to LANES query tokens, (Lq, D) fp32."""
        padded = torch.zeros(LANES, self.dim)
        padded[: len(query)] = SCALE * query @ torch.from_numpy(self.rotation)
        similarities = self._multiplied @ padded.T.to(self._multiplied.dtype)
        centroids = similarities.float().round_().to(torch.int16).numpy()
        first, follower = (book.tables(padded) for book in self.books)
        books = [first[: self.M[0]], first[self.M[0] :], follower]
        return Tables(centroids, books, [rough(centroids), rough(books[0])])

    @cached_property
    def _multiplied(self) -> Tensor:
        """Centroids as queries are multiplied with them: to 2 bits, what bf16 rounds off is little beside the rest."""
        is_rough = self.M[1] < self.dim // 4
        return torch.from_numpy(self.centroids).to(fast_dtype(torch.device("cpu")) if is_rough else torch.float32)


def principal_directions(vectors: np.ndarray) -> np.ndarray:
    """Principal directions (D, D) of vectors (n, D), as columns, the largest first."""
    return np.linalg.eigh(vectors.T @ vectors / len(vectors))[1][:, ::-1].astype(np.float32)


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
    representatives(values, np.concatenate([[0], np.cumsum(lengths)]), np.float32(similarity), parents)
    return parents
