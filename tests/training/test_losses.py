"""The loss against plain Python."""

import math

import pytest
import torch

from nanocolbert.training.losses import triples_loss


def cross_entropy(logits: list[float]) -> float:
    """Of the first logit against the others."""
    return math.log(sum(math.exp(logit - logits[0]) for logit in logits))


def l2_score(query, passage) -> float:
    """v1's similarity: the sum over query tokens of the largest -|q - d|^2."""
    return sum(max(-sum((a - b) ** 2 for a, b in zip(q, d, strict=True)) for d in passage) for q in query)


def dot_score(query, passage) -> float:
    return sum(max(sum(a * b for a, b in zip(q, d, strict=True)) for d in passage) for q in query)


@pytest.fixture
def batch():
    """Q (3, 4, 5), P (3 * 2, 6, 5) of unit vectors, a mask with holes, and rows in which passage 7 stands four times:
    as the positive of two queries, and as a negative of another one and of its own."""
    generator = torch.Generator().manual_seed(0)
    Q = torch.nn.functional.normalize(torch.randn(3, 4, 5, generator=generator), dim=-1)
    P = torch.nn.functional.normalize(torch.randn(6, 6, 5, generator=generator), dim=-1)
    kept = torch.rand(6, 6, generator=generator) < 0.6
    kept[:, 0] = True
    rows = torch.tensor([[7, 3], [9, 7], [7, 4]])
    for copy in (3, 4):
        P[copy], kept[copy] = P[0], kept[0]
    return Q, P, kept, rows


@pytest.mark.parametrize("scale, score", [(2.0, l2_score), (1.0, dot_score)])
def test_loss_of_triples(batch, scale, score):
    Q, P, kept, rows = batch
    texts = [passage[keep].tolist() for passage, keep in zip(P, kept, strict=True)]
    expected = [cross_entropy([score(Q[b].tolist(), texts[2 * b + k]) for k in range(2)]) for b in range(3)]
    loss = triples_loss(Q, P, kept, rows, scale, in_batch_negatives=False)
    assert loss.item() == pytest.approx(sum(expected) / 3, rel=1e-5)


@pytest.mark.parametrize("scale, score", [(2.0, l2_score), (1.0, dot_score)])
def test_loss_with_in_batch_negatives(batch, scale, score):
    Q, P, kept, rows = batch
    texts = [passage[keep].tolist() for passage, keep in zip(P, kept, strict=True)]
    numbers, expected = rows.view(-1).tolist(), []
    for b in range(3):
        others = [i for i in range(6) if i != 2 * b and numbers[i] != numbers[2 * b]]
        assert len(others) == (5 if b == 1 else 3)
        expected.append(cross_entropy([score(Q[b].tolist(), texts[i]) for i in [2 * b, *others]]))
    loss = triples_loss(Q, P, kept, rows, scale, in_batch_negatives=True)
    assert loss.item() == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_loss_with_more_negatives(batch):
    Q, P, kept, _ = batch
    rows = torch.arange(6).view(2, 3)
    texts = [passage[keep].tolist() for passage, keep in zip(P, kept, strict=True)]
    expected = [cross_entropy([dot_score(Q[b].tolist(), texts[3 * b + k]) for k in range(3)]) for b in range(2)]
    assert triples_loss(Q[:2], P, kept, rows, 1.0, False).item() == pytest.approx(sum(expected) / 2, rel=1e-5)
