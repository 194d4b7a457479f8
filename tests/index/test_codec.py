"""Codec: compressed passages score as their decoded vectors do, and these are near the embeddings."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from nanocolbert.cli import InputError
from nanocolbert.index import codec as codec_module
from nanocolbert.index import kernels
from nanocolbert.index.codec import Book, Codec, Codes, code_bytes, deal, find_parents, parts_of, principal_directions
from nanocolbert.index.kernels import FINAL, LANES

DIM, NLIST = 32, 8
LEAST = {1: 0.85, 2: 0.92, 4: 0.98, 8: 0.995}  # mean cosine of decoded vectors, by bits


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
    codec = Codec.train(*make_passages(300, 1), request.param, NLIST, seed=0)
    codec.bits = request.param
    return codec


def decode_all(codec: Codec, codes: Codes) -> list[np.ndarray]:
    ends = codec.passage_bytes(codes.sizes).cumsum(0)[:-1].T
    parts = (np.split(data, at) for data, at in zip(codes[:2], ends, strict=True))
    return [codec.decode(*passage) for passage in zip(*parts, codes.sizes, strict=True)]


def offsets_of(codec: Codec, codes: Codes) -> np.ndarray:
    return np.concatenate([np.zeros((1, 2), np.int64), codec.passage_bytes(codes.sizes).cumsum(0)])


def make_query(n: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_decoded_vectors_are_near(codec):
    values, lengths = make_passages(40, 2)
    decoded = decode_all(codec, codec.encode(values, lengths))
    nearness, norms = [], []
    for vectors, passage in zip(decoded, np.split(values.astype(np.float32), np.cumsum(lengths)[:-1]), strict=True):
        assert vectors.shape == passage.shape  # every token, though in another order
        norms.append(np.linalg.norm(vectors, axis=1))
        nearness.append((passage @ vectors.T).max(1))
    assert np.concatenate(nearness).mean() > LEAST[codec.bits]
    assert np.mean(np.abs(np.concatenate(norms) - 1) < 0.02) > 0.9  # a byte reaches so far, not further


@pytest.mark.parametrize("n_tokens", [1, 5, LANES])
def test_scores_are_those_of_decoded_vectors(codec, n_tokens):
    values, lengths = make_passages(40, 3)
    codes = codec.encode(values, lengths)
    query, rows, scores = make_query(n_tokens, 4), np.arange(40)[::-3].copy(), np.zeros(14, np.int32)
    tables = codec.tables(query)
    arrays = (codes.coarse, codes.fine, offsets_of(codec, codes), codes.sizes, codec.M)
    kernels.score_fine(rows, *arrays, tables.centroids, *tables.books, codec.factors, scores)
    decoded = decode_all(codec, codes)
    slow = [(query.numpy() @ decoded[row].T).max(1).sum() for row in rows]
    assert np.allclose(scores / FINAL, slow, atol=0.002 * n_tokens)


def test_scores_of_representatives():
    """By coarse codes alone."""
    codec = Codec.train(*make_passages(300, 1), 2, NLIST, seed=0)
    values, lengths = make_passages(20, 5)
    codes = codec.encode(values, lengths)
    assert codes.sizes.sum() == len(values)
    query, scores = make_query(7, 6), np.zeros(20, np.int32)
    tables, arrays = codec.tables(query), (codes.coarse, offsets_of(codec, codes), codes.sizes, codec.M)
    kernels.score_coarse(np.arange(20), *arrays, *tables.rough, codec.factors[0], scores)
    parts = np.split(codes.coarse, offsets_of(codec, codes)[1:-1, 0])
    decoded = [codec.decode(part, None, size) for part, size in zip(parts, codes.sizes, strict=True)]
    slow = [(query.numpy() @ vectors.T).max(1).sum() for vectors in decoded]
    assert np.allclose(scores / FINAL, slow, atol=0.005 * 7)  # bf16, bytes


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("share", [0.4, 0.67, 0.85, 1.0])
def test_a_token_takes_at_most_what_was_promised(bits, share):
    coarse, fine, follower = code_bytes(128, bits, share)
    size = share * (2 + 2 + 1 + coarse + fine) + (1 - share) * (2 + follower)  # with its place in a list
    promised = 16 * bits + 4
    assert promised - 8 < size + 1.2 <= promised and min(coarse, fine, follower) > 0


def test_a_codec_is_opened_as_it_was(codec, tmp_path):
    codec.save(tmp_path)
    opened, passages = Codec.load(tmp_path), make_passages(10, 7)
    for ours, theirs in zip(codec.encode(*passages), opened.encode(*passages), strict=True):
        assert np.array_equal(ours, theirs)


def test_blocks_do_not_matter(codec, monkeypatch):
    passages = make_passages(30, 8)
    whole = codec.encode(*passages)
    monkeypatch.setattr("nanocolbert.index.codec.ENCODE_TOKENS", 50)
    parts = codec.encode(*passages)
    for ours, theirs in zip(whole, parts, strict=True):
        assert np.mean(ours == theirs) > 0.99  # products of another shape may round otherwise, and a code be as good
    for ours, theirs in zip(decode_all(codec, whole), decode_all(codec, parts), strict=True):
        assert np.allclose(ours, theirs, atol=0.01)


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
    coarse, fine, sizes = codec.encode(values, np.array([800]))
    assert sizes.sum() == 800 and sizes[0, 1] == kernels.MOST_PARENTS
    assert [len(coarse), len(fine)] == codec.passage_bytes(sizes)[0].tolist()
    with pytest.raises(InputError, match="at most 1023"):
        codec.encode(np.repeat(values, 2, axis=0), np.array([1600]))


def distances_to(parts: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Squared distances (n, 256) of vectors (n, d) to codewords (256, e), which end in zeros from d on."""
    return ((parts[:, None] - words[:, : parts.shape[1]]) ** 2).sum(-1)


@pytest.mark.parametrize("coarse, fine", [(4, 4), (2, 7), (3, 10)])
def test_codewords_are_the_best_of_the_candidates(coarse, fine):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(500, 10)).astype(np.float32)
    book = Book.train(vectors, coarse, fine, rng)
    codes, rebuilt_coarse, rebuilt = book.encode(vectors)
    assert np.allclose(book.decode(codes), rebuilt, atol=1e-5)
    assert np.allclose(book.decode(codes[:, :coarse]), rebuilt_coarse, atol=1e-5)
    ordered = vectors[:, book.columns]
    for m in range(coarse):
        part, words = ordered[:, slice(*book.edges[0][m : m + 2])], book.codewords[0][m]
        near = np.argsort(distances_to(part, words), 1)[:, : codec_module.CANDIDATES]
        errors = np.zeros(near.shape, np.float32)
        for c in range(near.shape[1]):
            left = part - words[near[:, c], : part.shape[1]]
            for q in range(*book.within[m : m + 2]):
                columns = slice(*(book.edges[1][q : q + 2] - book.edges[0][m]))
                errors[:, c] += distances_to(left[:, columns], book.codewords[1][q]).min(1)
        chosen = ((ordered - rebuilt[:, book.columns])[:, slice(*book.edges[0][m : m + 2])] ** 2).sum(1)
        assert np.allclose(chosen, errors.min(1), atol=1e-4)


@pytest.mark.parametrize("n, width, n_copies", [(1, 5, 0), (8, 11, 0), (8, 1, 0), (8, 3, 30), (8, 3, 255), (15, 2, 7)])
def test_nearest_codewords(n, width, n_copies):
    """Among them some that are equal."""
    rng = np.random.default_rng(0)
    vectors, words = (rng.normal(size=(size, width)).astype(np.float32) for size in (400, 256))
    words[rng.permutation(256)[:n_copies]] = words[0]
    columns, halves = kernels.transpose(words[None], np.array([0, width]))
    nearest, errors = np.empty((400, n), np.uint8), np.empty((400, n), np.float32)
    kernels.find_nearest(vectors, 0, width, columns[0], halves[0], nearest, errors)
    distances = distances_to(vectors, words)
    assert all(len(set(row)) == n for row in nearest.tolist())
    found = np.sort(np.take_along_axis(distances, nearest.astype(int), 1), 1)
    assert np.allclose(found, np.sort(distances, 1)[:, :n], atol=1e-5)
    shared = 0.5 * (vectors**2).sum(1)[:, None]
    assert np.allclose(np.sort(errors + shared, 1), 0.5 * found, atol=1e-5)


def test_codewords_move_to_the_mean_of_what_they_stand_for():
    rng = np.random.default_rng(0)
    vectors, edges = rng.normal(size=(3000, 8)).astype(np.float32), np.array([0, 3, 8])
    codes = rng.integers(0, 200, (3000, 2)).astype(np.uint8)  # nothing has the last ones
    words = rng.normal(size=(2, 256, 5)).astype(np.float32)
    words[0, :, 3:] = 0
    moved, left = words.copy(), np.empty_like(vectors)
    for m, (first, stop) in enumerate(((0, 3), (3, 8))):
        left[:, first:stop] = vectors[:, first:stop] - words[m, codes[:, m], : stop - first]
    kernels.refine(moved, edges, codes, left)
    assert np.array_equal(moved[:, 200:], words[:, 200:]) and not moved[0, :, 3:].any()
    for m, (first, stop) in enumerate(((0, 3), (3, 8))):
        means = [vectors[codes[:, m] == code, first:stop].mean(0) for code in range(200)]
        assert np.allclose(moved[m, :200, : stop - first], means, atol=1e-5)
        assert np.allclose(
            left[:, first:stop], vectors[:, first:stop] - moved[m, codes[:, m], : stop - first], atol=1e-5
        )


def test_nearest_centroids_in_groups(monkeypatch):
    monkeypatch.setattr(codec_module, "product_dtype", lambda device: torch.float32)
    monkeypatch.setattr(codec_module, "FEWEST_GROUPED", 256)
    monkeypatch.setattr(codec_module, "GROUP_BLOCK", 1000)
    values, lengths = make_passages(300, 10)
    vectors = torch.from_numpy(values.astype(np.float32))
    centroids = codec_module.unit(vectors[:256] + 0.1)
    similarities = vectors @ centroids.T
    best = similarities.max(1).values
    groups = codec_module.Groups.of(centroids)
    assert Codec.train(values, lengths, 2, 256, seed=0)._groups and not codec_module.Groups.of(centroids[1:])
    for n_tried, least in (3, 0.6), (8, 0.95), (100, 1):  # more groups than there are
        nearest = groups.assign(vectors, n_tried)
        right = similarities.gather(1, nearest[:, None])[:, 0] >= best - 1e-6
        assert right.float().mean() >= least
    assert torch.equal(groups.assign(vectors, 100), codec_module.assign(vectors, centroids))


def test_rotation_is_orthogonal_and_parts_are_balanced():
    vectors = (np.random.default_rng(0).normal(size=(2000, 16)) * np.logspace(0, 2, 16)).astype(np.float32)
    rotation = principal_directions(vectors)
    assert np.allclose(rotation @ rotation.T, np.eye(16), atol=1e-5)
    variances = (vectors @ rotation).var(0)
    columns = deal(variances, parts_of(16, 4))
    assert sorted(columns) == list(range(16))
    assert np.ptp(np.log(variances[columns]).reshape(4, 4).sum(1)) < 0.2 * np.log(1e4) * 4


def test_refusals():
    values, lengths = make_passages(10, 1)
    with pytest.raises(InputError, match="lower --nlist"):
        Codec.train(values, lengths, 2, 10**6, seed=0)
    with pytest.raises(InputError, match="3 bits"):
        Codec.train(values, lengths, 3, 4, seed=0)


def test_no_array_is_freed_while_its_address_is_used(tmp_path):
    """Where every array is a mapping of its own, which is gone once it is freed, a use of it ends the process."""
    codec = Codec.train(*make_passages(300, 1), 2, NLIST, seed=0)
    codes, tables, book = codec.encode(*make_passages(5, 2)), codec.tables(make_query(LANES, 3)), codec.books[0]
    score = (np.arange(5), *codes[:2], offsets_of(codec, codes), codes.sizes, codec.M, tables.centroids, *tables.books)
    vectors, codes = np.ones((3, DIM), np.float32), np.zeros((3, sum(map(len, book.codewords))), np.uint8)
    quantise = (vectors, book.columns, *book.codewords, *book.edges, book.within, 8, codes, np.stack([vectors] * 2))
    with open(tmp_path / "calls", "wb") as file:
        pickle.dump({"score_fine": (*score, codec.factors, np.zeros(5, np.int32)), "quantise": quantise}, file)
    program = (
        "import pickle, sys\nfrom nanocolbert.index import kernels\n"
        "for name, arguments in pickle.load(open(sys.argv[1], 'rb')).items(): getattr(kernels, name)(*arguments)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "calls"], cwd=ROOT, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "64"}
    )
    assert done.returncode == 0
