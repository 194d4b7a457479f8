"""Scores against three plain loops, and gradients against the plain tensor of all similarities."""

import pytest
import torch
from tiny_models import loop_score

from nanocolbert.maxsim import MAXSIM_BYTES, maxsim, maxsim_packed, maxsim_pairs


@pytest.fixture
def scoring():
    """Three queries, and four passages of 1 to 6 tokens, two of which are against every query; masks with holes."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(3, 5, 4, generator=generator)
    queries[..., 0] = queries[..., 0].abs() + 3
    passages = torch.randn(4, 6, 4, generator=generator)
    passages[1:3] = torch.tensor([-1.0, 0, 0, 0]) + 0.1 * passages[1:3]  # all similarities negative
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1], [1, 1, 0, 1, 0, 0]]).bool()
    passages[~mask] = torch.randn(int((~mask).sum()), 4, generator=generator) * 100  # what masked tokens hold is noise
    passages[1, 1] = 0
    expected = [[loop_score(q.tolist(), p[m].tolist()) for p, m in zip(passages, mask, strict=True)] for q in queries]
    assert max(row[1] for row in expected) < 0
    return queries, passages, mask, torch.tensor(expected)


def test_maxsim(scoring):
    queries, passages, mask, expected = scoring
    assert torch.allclose(maxsim(queries, passages, mask), expected, atol=1e-4)


@pytest.mark.parametrize("size", [1, 1000, 1 << 20])
def test_gradients_of_maxsim(scoring, monkeypatch, size):
    """Those of the plain tensor of all similarities, however many queries are computed at a time."""
    monkeypatch.setitem(MAXSIM_BYTES, "cpu", size)
    queries, passages, mask, expected = scoring
    weight = torch.linspace(-1, 1, expected.numel()).view_as(expected)  # (B, N)
    found, wanted = (tuple(part.clone().requires_grad_() for part in (queries, passages)) for _ in range(2))
    (maxsim(*found, mask) * weight).sum().backward()
    similarity = torch.einsum("bqd,nld->bnql", *wanted).masked_fill(~mask[None, :, None, :], -torch.inf)
    (similarity.amax(-1).sum(-1) * weight).sum().backward()
    for ours, plain in zip(found, wanted, strict=True):
        assert torch.allclose(ours.grad, plain.grad, atol=1e-4)


def test_maxsim_pairs(scoring):
    queries, passages, mask, expected = scoring
    own = torch.tensor([[0, 1], [2, 2], [3, 1]])  # (B, K)
    scores = maxsim_pairs(queries, passages[own], mask[own])
    assert torch.allclose(scores, expected.gather(1, own), atol=1e-4)


def test_maxsim_packed(scoring):
    queries, passages, mask, expected = scoring
    scores = maxsim_packed(queries, passages[mask], mask.sum(1))
    assert scores.shape == (3, 4) and scores.dtype == torch.float32 and torch.allclose(scores, expected, atol=1e-4)
    assert torch.allclose(maxsim_packed(queries[1:2], passages[2:3, 5], torch.tensor([1])), expected[1:2, 2:3])
