"""What tests of an index are made from: random passages, queries, and small indexes of them."""

from pathlib import Path

import numpy as np
import torch

from nanocolbert.index.changes import create
from nanocolbert.index.codec import Codec, Codes
from nanocolbert.index.compressed import CompressedIndex
from nanocolbert.index.knobs import Effort
from nanocolbert.index.ranking import Ranking

DIM, NLIST = 32, 8
EVERYTHING = Effort(NLIST, 10**6, 10**6, 10**6)


def make_passages(n: int, seed: int, dim: int = DIM, longest: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors (T, D) fp16 around a few directions, with near-duplicates in each passage, and lengths (n,)."""
    rng = np.random.default_rng(seed)
    directions = np.random.default_rng(0).normal(size=(12, dim))
    lengths = rng.integers(1, longest, n)
    values = directions[rng.integers(0, 12, lengths.sum())] + 0.7 * rng.normal(size=(lengths.sum(), dim))
    copies = rng.random(len(values)) < 0.4
    copies[np.cumsum(lengths) - lengths] = False
    values[copies] = values[np.flatnonzero(copies) - 1] + 0.2 * rng.normal(size=(copies.sum(), dim))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16), lengths


def make_query(n: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed)), dim=1)


def block(n: int, seed: int, pids=None) -> tuple[np.ndarray, np.ndarray, list[str]]:
    return *make_passages(n, seed), pids or [f"{seed}-{i}" for i in range(n)]


def decode_all(codec: Codec, codes: Codes) -> list[np.ndarray]:
    ends = codec.passage_bytes(codes.sizes).cumsum(0)[:-1].T
    parts = (np.split(data, at) for data, at in zip(codes[:2], ends, strict=True))
    return [codec.decode(*passage) for passage in zip(*parts, codes.sizes, strict=True)]


def offsets_of(codec: Codec, codes: Codes) -> np.ndarray:
    return np.concatenate([np.zeros((1, 2), np.int64), codec.passage_bytes(codes.sizes).cumsum(0)])


def make_index(folder: Path, codec: Codec, *blocks, vectors: bool = False) -> Path:
    folder.mkdir()
    kept = None
    if vectors:
        kept = folder / "values.npy"
        np.save(kept, np.concatenate([values for values, _, _ in blocks]))
    create(folder, codec, ((codec.encode(*part[:2]), part[2]) for part in blocks), kept)
    return folder


def brute_force(passages: dict[str, np.ndarray], query: torch.Tensor) -> dict[str, float]:
    return {pid: float((query.numpy() @ vectors.T).max(1).sum()) for pid, vectors in passages.items()}


def decoded(codec: Codec, values, lengths, pids) -> dict[str, np.ndarray]:
    return dict(zip(pids, decode_all(codec, codec.encode(values, lengths)), strict=True))


def search_one(index: CompressedIndex, query: torch.Tensor, k: int, effort: Effort, allowed=None) -> Ranking:
    """What an index finds for one query (Lq, D)."""
    return index.search(query[None], k, effort, allowed)[0]


def rank_one(index: CompressedIndex, query: torch.Tensor, rows: np.ndarray, k: int, by_codes: bool = False) -> Ranking:
    """The best of some rows for one query (Lq, D)."""
    return index.rank(query[None], [rows], k, by_codes)[0]


def check_against(index: CompressedIndex, passages: dict[str, np.ndarray], query, allowed=None) -> None:
    """What a search with all effort finds is what scoring everything finds, but for rounding."""
    tolerance = 0.002 * len(query)  # look-ups have 16 bits
    rows, scores = search_one(index, query, 10, EVERYTHING, allowed)
    slow = brute_force(passages, query)
    best = sorted(slow.values(), reverse=True)[:10]
    assert len(rows) == len(best) and np.allclose(scores, best, atol=tolerance)
    assert np.allclose([slow[pid] for pid in index.ids(rows)], scores, atol=tolerance)


def change(path: Path, edit) -> None:
    """Put another array in place of a .npy file, which others may have linked."""
    array = np.load(path)
    path.unlink()
    np.save(path, edit(array))


def put(at, value):
    def edit(array: np.ndarray) -> np.ndarray:
        array[at] = value
        return array

    return edit
