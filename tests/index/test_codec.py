"""Codec: decoded vectors are near the embeddings, and what was promised of bytes, sizes and files is kept."""

import numpy as np
import pytest
from made import DIM, NLIST, decode_all, make_passages

from nanocolbert.cli import InputError
from nanocolbert.index.codec import Codec, code_bytes, find_parents
from nanocolbert.index.kernels.nearest import MOST_PARENTS

LEAST = {1: 0.85, 2: 0.92, 4: 0.98, 8: 0.995}  # mean cosine of decoded vectors, by bits


@pytest.fixture(scope="module", params=[1, 2, 4, 8])
def codec(request) -> Codec:
    codec = Codec.train(*make_passages(300, 1), request.param, NLIST, seed=0)
    codec.bits = request.param
    return codec


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


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("share", [0.4, 0.67, 0.85, 1.0])
def test_a_token_takes_at_most_what_was_promised(bits, share):
    coarse, fine, follower = code_bytes(128, bits, share)
    size = share * (2 + 2 + 1 + coarse + fine) + (1 - share) * (2 + follower)  # with its place in a list
    promised = 16 * bits + 4
    assert promised - 8 < size + 1.2 <= promised and min(coarse, fine, follower) > 0


@pytest.mark.parametrize(
    ("dim", "bits"), [(24, 4), (24, 8), *((dim, bits) for dim in (48, 96) for bits in (2, 4, 8)), (96, 1)]
)
def test_smaller_vectors_keep_that_promise(dim, bits):
    for share in (0.4, 0.67, 0.85, 1.0):
        coarse, fine, follower = code_bytes(dim, bits, share)
        size = share * (2 + 2 + 1 + coarse + fine) + (1 - share) * (2 + follower)
        assert size + 1.2 <= bits * dim / 8 + dim / 32 and max(coarse, fine, follower) <= dim


def test_the_smallest_codes():
    """Of 24 dimensions 1 bit and 2 are the same: a code has two bytes at least."""
    assert {code_bytes(24, bits, share) for bits in (1, 2) for share in (0.4, 0.85)} == {(2, 2, 2)}
    codec = Codec.train(*make_passages(300, 1, dim=24), 1, NLIST, seed=0)
    values, lengths = make_passages(40, 2, dim=24)
    decoded = decode_all(codec, codec.encode(values, lengths))
    passages = np.split(values.astype(np.float32), np.cumsum(lengths)[:-1])
    nearness = [(passage @ vectors.T).max(1) for vectors, passage in zip(decoded, passages, strict=True)]
    assert codec.M.tolist() == [2, 2, 2] and np.concatenate(nearness).mean() > 0.85


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
    assert sizes.sum() == 800 and sizes[0, 1] == MOST_PARENTS
    assert [len(coarse), len(fine)] == codec.passage_bytes(sizes)[0].tolist()
    with pytest.raises(InputError, match="at most 1023"):
        codec.encode(np.repeat(values, 2, axis=0), np.array([1600]))


def test_refusals():
    values, lengths = make_passages(10, 1)
    with pytest.raises(InputError, match="lower --nlist"):
        Codec.train(values, lengths, 2, 10**6, seed=0)
    with pytest.raises(InputError, match="3 bits"):
        Codec.train(values, lengths, 3, 4, seed=0)
