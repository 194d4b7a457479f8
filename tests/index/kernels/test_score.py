"""Look-ups score as decoded vectors do; lists that are probed, and what passages promise, against plain loops."""

import numpy as np
import pytest
from made import NLIST, decode_all, make_passages, make_query, offsets_of

from nanocolbert.index.codec import Codec
from nanocolbert.index.kernels import score as kernels
from nanocolbert.index.kernels.score import FINAL, LANES


@pytest.fixture(scope="module", params=[1, 2, 4, 8])
def codec(request) -> Codec:
    return Codec.train(*make_passages(300, 1), request.param, NLIST, seed=0)


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


@pytest.mark.parametrize("C", [5, 64, 1000])
def test_nearest_lists(C):
    similarities = np.random.default_rng(C).integers(-300, 300, (C, LANES)).astype(np.int16)  # with ties
    for nprobe in {1, 5, min(C, 40)}:
        lists, found = kernels.nearest_lists(similarities, 7, nprobe)
        order = np.argsort(-similarities[:, :7].astype(int), axis=0, kind="stable")[:nprobe].T
        assert np.array_equal(lists, order)
        assert np.array_equal(found, np.take_along_axis(similarities[:, :7].T, order, 1))


def test_probe_counts_the_best_list_of_each_query_token():
    rng = np.random.default_rng(0)
    members = [np.sort(rng.choice(50, rng.integers(0, 20), replace=False)).astype(np.uint16) for _ in range(10)]
    starts = np.append(0, np.cumsum([len(part) for part in members]))
    probes = np.stack([rng.permutation(10)[:4] for _ in range(5)])
    gains = -np.sort(-rng.integers(1, 3000, (5, 4)), axis=1).astype(np.int32)
    may, states = rng.random(50) < 0.9, np.zeros(50, np.uint32)
    slow = {}
    for lists, row in zip(probes, gains, strict=True):
        best = {}
        for number, gain in zip(lists, row, strict=True):
            for passage in members[number].tolist():
                best[passage] = max(best.get(passage, 0), int(gain))
        for passage, gain in best.items():
            slow[passage] = slow.get(passage, 0) + gain
    slow = {passage: promise for passage, promise in sorted(slow.items()) if may[passage]}
    for n in (1, 7, 1000, 1000):  # the room is left as it was found
        passages, promises = kernels.probe(np.concatenate(members), starts, probes, gains, may, states, n)
        found = dict(zip(passages.tolist(), promises.tolist(), strict=True))
        assert found.items() <= slow.items() and list(found) == sorted(found)
        assert sorted(found.values())[-n:] == sorted(slow.values())[-n:]
        assert len(found) < n + 10 and not states.any()
