"""Book: product quantisation in two levels (Jégou et al., TPAMI 2011), which codec.py codes differences with."""

import numpy as np
import torch
from torch import Tensor

from nanocolbert.index.kernels import quantise as kernels
from nanocolbert.index.kernels.compiled import CODEWORDS
from nanocolbert.progress import progress

CANDIDATES = 8  # coarse codewords tried for each part
BEGIN_SAMPLE = 8_000  # vectors that k-means begins with
BOOK_ITERATIONS, JOINT_ITERATIONS = 6, 3


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


def quantise(vectors: np.ndarray, codewords, edges, within, n_candidates: int, columns=None) -> tuple:
    """Codes (n, M) of both levels, and the codewords they stand for, (2, n, D), as kernels/quantise.py says.

    columns (D,): those of the vectors in the order of the parts, None if they are in it.
    """
    columns = np.arange(vectors.shape[1]) if columns is None else columns
    codes = np.empty((len(vectors), sum(map(len, codewords))), np.uint8)
    rebuilt = np.empty((2, *vectors.shape), np.float32)
    kernels.quantise(np.ascontiguousarray(vectors), columns, *codewords, *edges, within, n_candidates, codes, rebuilt)
    return codes, rebuilt


def nest(dim: int, coarse: int, fine: int) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Which fine parts make up each coarse part, (coarse + 1,), and the edges of the coarse and the fine parts."""
    within, edges = parts_of(fine, coarse), parts_of(dim, fine)
    return within, (edges[within], edges)


def parts_of(dim: int, M: int) -> np.ndarray:
    """Where the M parts of a vector begin, and its end: (M + 1,)."""
    return np.cumsum([0] + [len(part) for part in np.array_split(np.arange(dim), M)])


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


def as_saved(array: np.ndarray) -> np.ndarray:
    """What is left of fp32 values in fp16: an opened codec encodes and scores like the one that was trained."""
    return array.astype(np.float16).astype(np.float32)
