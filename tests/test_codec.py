"""Codec: compressed passages score as their decoded vectors do, and these are near the embeddings."""

import numpy as np
import pytest
import torch

import kernels
from artifact import InputError
from codec import Book, Codec, balanced_rotation, find_parents, parts_of
from kernels import FINAL, LANES

DIM, NLIST = 32, 8


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


@pytest.fixture(scope="module", params=[1, 2, 4, 8])
def codec(request) -> Codec:
    return Codec.train(*make_passages(300, 1), request.param, NLIST, seed=0)


def decode_all(codec: Codec, data: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    ends = np.cumsum(codec.passage_bytes(sizes))
    return [codec.decode(part, size) for part, size in zip(np.split(data, ends[:-1]), sizes, strict=True)]


def make_query(n: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_decoded_vectors_are_near(codec):
    values, lengths = make_passages(40, 2)
    decoded = decode_all(codec, *codec.encode(values, lengths))
    nearness = []
    for vectors, passage in zip(decoded, np.split(values.astype(np.float32), np.cumsum(lengths)[:-1]), strict=True):
        assert vectors.shape == passage.shape  # every token, though in another order
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=0.02)
        nearness.append((passage @ vectors.T).max(1))
    least = {4: 0.85, 8: 0.94, 16: 0.985, 32: 0.995}[int(codec.M[0])]  # 1, 2, 4, 8 bits
    assert np.concatenate(nearness).mean() > least


@pytest.mark.parametrize("n_tokens", [1, 5, LANES])
def test_scores_are_those_of_decoded_vectors(codec, n_tokens):
    values, lengths = make_passages(40, 3)
    data, sizes = codec.encode(values, lengths)
    offsets = np.append(0, codec.passage_bytes(sizes).cumsum())
    query, rows, scores = make_query(n_tokens, 4), np.arange(40)[::-3].copy(), np.zeros(14, np.int32)
    tables = codec.tables(query)
    kernels.score_passages(rows, data, offsets, sizes, codec.M, *tables[:3], scores)
    decoded = decode_all(codec, data, sizes)
    slow = [(query.numpy() @ decoded[row].T).max(1).sum() for row in rows]
    assert np.allclose(scores / (FINAL * tables.scale), slow, atol=0.01 * n_tokens)


def test_scores_of_centroids(codec):
    values, lengths = make_passages(20, 5)
    data, sizes = codec.encode(values, lengths)
    offsets = np.append(0, codec.passage_bytes(sizes).cumsum())
    query, scores = make_query(7, 6), np.zeros(20, np.int32)
    tables = codec.tables(query)
    kernels.score_centroids(np.arange(20), data, offsets, sizes, tables.centroids, scores)
    for i in range(20):
        centroids = data[offsets[i] : offsets[i] + 2 * sizes[i, 0]].copy().view("<u2")
        slow = (query.numpy() @ codec.centroids[centroids].T).max(1).sum()
        assert abs(scores[i] / (FINAL * tables.scale) - slow) < 0.05


def test_a_codec_is_opened_as_it_was(codec, tmp_path):
    codec.save(tmp_path)
    opened, passages = Codec.load(tmp_path), make_passages(10, 7)
    for ours, theirs in zip(codec.encode(*passages), opened.encode(*passages), strict=True):
        assert np.array_equal(ours, theirs)


def test_blocks_do_not_matter(codec, monkeypatch):
    passages = make_passages(30, 8)
    whole = codec.encode(*passages)
    monkeypatch.setattr("codec.ENCODE_TOKENS", 50)
    for ours, theirs in zip(whole, codec.encode(*passages), strict=True):
        assert np.array_equal(ours, theirs)


def test_followers_follow_a_near_representative():
    values, lengths = make_passages(50, 9)
    values = values.astype(np.float32)
    parents = find_parents(values, lengths, 0.85)
    passage = np.repeat(np.arange(50), lengths)
    assert (parents[parents] == parents).all() and (passage[parents] == passage).all()
    follows = parents != np.arange(len(values))
    assert 0.1 < follows.mean() < 0.6
    assert ((values * values[parents]).sum(1) >= 0.85).all()
    assert (find_parents(values, lengths, 1.1) == np.arange(len(values))).all()


def test_long_passages_of_equal_tokens():
    """More representatives than a byte can name stay representatives."""
    rng = np.random.default_rng(0)
    values = np.repeat(rng.normal(size=(400, DIM)), 2, axis=0)
    values = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)
    codec = Codec.train(values, np.array([800]), 2, NLIST, seed=0)
    data, sizes = codec.encode(values, np.array([800]))
    assert sizes.sum() == 800 and sizes[0, 1] == kernels.MOST_PARENTS
    assert len(data) == codec.passage_bytes(sizes)[0]
    with pytest.raises(InputError, match="at most 1023"):
        codec.encode(np.repeat(values, 2, axis=0), np.array([1600]))


def test_product_quantisation_finds_the_nearest_codewords():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(500, 10)).astype(np.float32)
    book = Book.train(vectors, 4, rng)
    codes, rebuilt = book.encode(vectors)
    assert np.allclose(book.decode(codes), rebuilt, atol=1e-5)
    rotated = vectors @ book.rotation
    for m, (start, stop) in enumerate(zip(book.edges[:-1], book.edges[1:], strict=True)):
        distances = ((rotated[:, None, start:stop] - book.codewords[m, :, : stop - start]) ** 2).sum(-1)
        chosen = np.take_along_axis(distances, codes[:, m : m + 1].astype(int), 1)[:, 0]
        assert np.allclose(chosen, distances.min(1), atol=1e-4)


def test_rotation_is_orthogonal_and_balanced():
    vectors = np.random.default_rng(0).normal(size=(2000, 16)).astype(np.float32) * np.logspace(0, 2, 16)
    edges = parts_of(16, 4)
    rotation = balanced_rotation(vectors.astype(np.float32), edges)
    assert np.allclose(rotation @ rotation.T, np.eye(16), atol=1e-5)
    logs = np.log((vectors @ rotation).var(0)).reshape(4, 4).sum(1)
    assert np.ptp(logs) < 0.2 * np.log(1e4) * 4


def test_refusals():
    values, lengths = make_passages(10, 1)
    with pytest.raises(InputError, match="lower --nlist"):
        Codec.train(values, lengths, 2, 10**6, seed=0)
    with pytest.raises(InputError, match="3 bits"):
        Codec.train(values, lengths, 3, 4, seed=0)
