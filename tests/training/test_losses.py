"""Losses against plain Python."""

import math
import statistics

import pytest
import torch

from nanocolbert.cli import InputError
from nanocolbert.training.losses import LOSSES, Objective, Scores, check_losses, counted_once
from train import LOSSES as NAMES


def cross_entropy(logits: list[float]) -> float:
    """Of the first logit against the others."""
    return math.log(sum(math.exp(logit - logits[0]) for logit in logits))


def divergence(logits: list[float], teacher: list[float], temperature: float | None) -> float:
    """Of softmax(logits) from the teacher's scores, which are made 0 to 1 and divided by the temperature; None: which
    are given the standard deviation of the logits."""
    span = max(teacher) - min(teacher) or 1
    if temperature is None:
        span, temperature = statistics.pstdev(teacher), 1 / statistics.pstdev(logits)
    weights = [math.exp((score - min(teacher)) / span / temperature) for score in teacher]
    target = [weight / sum(weights) for weight in weights]
    log_total = math.log(sum(math.exp(logit) for logit in logits))
    return sum(p * (math.log(p) - logit + log_total) for p, logit in zip(target, logits, strict=True))


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
    rows = torch.tensor([[0, 7, 3], [1, 9, 7], [2, 7, 4]])
    for copy in (3, 4):
        P[copy], kept[copy] = P[0], kept[0]
    return Q, P, kept, rows


def logits_of(Q, P, kept, score, temperature: float = 1.0) -> list[list[float]]:
    """Of every query for every passage."""
    texts = [passage[keep].tolist() for passage, keep in zip(P, kept, strict=True)]
    return [[score(query.tolist(), text) / temperature for text in texts] for query in Q]


SIMILARITIES = pytest.mark.parametrize("similarity, score", [("l2", l2_score), ("cosine", dot_score)])
ONCE = [[0, 1, 2, 5], [2, 0, 1, 5], [4, 1, 2, 5]]  # of the fixture: the positive, then all others, one copy of each


@SIMILARITIES
def test_softmax(batch, similarity, score):
    Q, P, kept, rows = batch
    logits = logits_of(Q, P, kept, score, 0.5)
    expected = [cross_entropy(logits[b][2 * b : 2 * b + 2]) for b in range(3)]
    loss = Objective(["softmax"], similarity, 0.5)(Q, P, kept, rows)["loss"]
    assert loss.item() == pytest.approx(sum(expected) / 3, rel=1e-5)


@SIMILARITIES
@pytest.mark.parametrize("learn", [False, True])
def test_in_batch(batch, similarity, score, learn):
    Q, P, kept, rows = batch
    logits = logits_of(Q, P, kept, score, 0.5)
    expected = [cross_entropy([logits[b][i] for i in ONCE[b]]) for b in range(3)]
    objective = Objective(["in_batch"], similarity, 0.5, learn)
    assert objective(Q, P, kept, rows)["loss"].item() == pytest.approx(sum(expected) / 3, rel=1e-5)
    (part,) = [objective(Q[1:2], P, kept, rows, first=1)["loss"]]  # of one process's query
    assert part.item() == pytest.approx(expected[1], rel=1e-5)


def test_more_negatives(batch):
    Q, P, kept, _ = batch
    rows = torch.arange(8).view(2, 4)
    logits = logits_of(Q, P, kept, dot_score)
    expected = [cross_entropy(logits[b][3 * b : 3 * b + 3]) for b in range(2)]
    assert Objective(["softmax"], "cosine")(Q[:2], P, kept, rows)["loss"].item() == pytest.approx(sum(expected) / 2)


def test_a_positive_alone(batch):
    Q, P, kept, _ = batch
    rows = torch.tensor([[0, 7], [1, 9], [2, 7]])
    logits = logits_of(Q, P[::2], kept[::2], dot_score)
    expected = [cross_entropy([logits[b][i] for i in others]) for b, others in enumerate(([0, 1], [1, 0], [2, 1]))]
    loss = Objective(["in_batch"], "cosine")(Q, P[::2], kept[::2], rows)["loss"]
    assert loss.item() == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_teachers(batch):
    """KL, MarginMSE and KL over the batch; a teacher that scores all alike is uniform. A sum says its terms."""
    Q, P, kept, _ = batch
    rows, teacher = torch.arange(8).view(2, 4), torch.tensor([[9.0, -2.0, 4.0], [5.0, 5.0, 5.0]])
    logits, scores = logits_of(Q[:2], P, kept, dot_score), teacher.tolist()
    own = [logits[b][3 * b : 3 * b + 3] for b in range(2)]
    expected = {"kl": sum(divergence(own[b], scores[b], 0.3) for b in range(2)) / 2}
    margins = [own[b][0] - own[b][k] - scores[b][0] + scores[b][k] for b in range(2) for k in (1, 2)]
    expected["margin_mse"] = sum(margin**2 for margin in margins) / 4
    all_scores = torch.arange(12.0).view(2, 6) ** 2
    expected["distil"] = sum(divergence(logits[b], all_scores[b].tolist(), None) for b in range(2)) / 2
    objective = Objective(["kl=2", "margin_mse", "distil=0.5"], "cosine", teacher_temperature=0.3)
    found = objective(Q[:2], P, kept, rows, 0, teacher, all_scores)
    assert list(found) == ["loss", "loss_kl", "loss_margin_mse", "loss_distil"]
    for name, value in expected.items():
        assert found[f"loss_{name}"].item() == pytest.approx(value, rel=1e-4), name
    total = 2 * expected["kl"] + expected["margin_mse"] + expected["distil"] / 2
    assert found["loss"].item() == pytest.approx(total, rel=1e-4)


def test_distilled_passages_count_once(batch):
    Q, P, kept, rows = batch
    teacher = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    teacher[:, 3:5] = 99.0  # of copies, but for the third query's positive
    teacher[2, 4] = 0.0
    logits = logits_of(Q, P, kept, dot_score)
    expected = [divergence([logits[b][i] for i in at], teacher[b, at].tolist(), None) for b, at in enumerate(ONCE)]
    queries = Q.requires_grad_()
    loss = Objective(["distil"], "cosine")(queries, P, kept, rows, teacher_all=teacher)["loss"]
    assert loss.item() == pytest.approx(sum(expected) / 3, rel=1e-5)
    alike = Objective(["distil"], "cosine")(queries, P, kept, rows, teacher_all=torch.full((3, 6), 7.0))["loss"]
    uniform = [divergence([logits[b][i] for i in at], [0.0] * 4, 1.0) for b, at in enumerate(ONCE)]
    assert alike.item() == pytest.approx(sum(uniform) / 3, rel=1e-5)
    loss.backward()
    assert queries.grad.isfinite().all() and queries.grad.abs().sum() > 0


def test_counted_once():
    """A passage is a negative once, and none of a query that any row has it as the positive of."""
    rows = torch.tensor([[0, 5, 1], [1, 2, 5], [0, 3, 2], [2, 3, 1], [1, 2, 3]])
    judged = {0: {5, 3}, 1: {2}, 2: {3}}
    for first, B in ((0, 5), (1, 3)):
        found = counted_once(rows, first, B)
        for b, query in enumerate(rows[first : first + B, 0].tolist()):
            positive, seen = 2 * (first + b), set()
            for column, number in enumerate(rows[:, 1:].flatten().tolist()):
                counts = column == positive or (number not in judged[query] and number not in seen)
                assert found[b, column] == counts, (b, column)
                seen.add(number)


def test_the_temperature_learns():
    objective = Objective(["softmax"], "cosine", 2.0, learn=True)
    (weight,) = objective.parameters()
    objective(
        torch.ones(1, 1, 1),
        torch.tensor([[[1.0]], [[0.5]]]),
        torch.ones(2, 1, dtype=torch.bool),
        torch.tensor([[0, 0, 1]]),
    )["loss"].backward()
    assert objective.temperature.item() == pytest.approx(2) and weight.grad > 0  # lower: the positive is ahead
    assert not list(Objective(["softmax"]).parameters())


@pytest.mark.parametrize(
    "losses, meta, said",
    [
        (["kl"], {}, "--loss kl: tokens has no teacher's scores"),
        (["margin_mse=2"], {"scored": False}, "--loss margin_mse: tokens has no teacher's scores"),
        (["softmax"], {"passages_per_query": 1}, "--loss softmax: tokens has one passage a query: take in_batch"),
        (["in_batch", "kl"], {"passages_per_query": 1, "scored": True}, "--loss kl: tokens has one passage a query"),
        (["kl", "kl=2"], {"scored": True}, "--loss kl kl=2: kl is there twice"),
    ],
)
def test_what_a_loss_needs(losses, meta, said):
    with pytest.raises(InputError, match=said):
        check_losses(losses, "tokens", meta, 2)


def test_all_losses_are_known():
    assert tuple(LOSSES) == NAMES and Scores.__dataclass_fields__.keys() >= {"own", "all", "teacher", "teacher_all"}
    check_losses(["in_batch"], "tokens", {"passages_per_query": 1}, 2)
    for loss in ("in_batch", "distil"):  # of one query and its passage it would be 0, whatever the model
        with pytest.raises(InputError, match=f"--loss {loss}: a micro-batch is one query and its passage"):
            check_losses([loss], "tokens", {"passages_per_query": 1}, 1)
        check_losses([loss], "tokens", {"passages_per_query": 2}, 1)
    check_losses(["softmax", "kl=0.5", "margin_mse"], "tokens", {"passages_per_query": 3, "scored": True}, 1)
