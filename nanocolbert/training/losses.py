"""What a training lowers: a weighted sum of losses, of what the student and a teacher score.

B queries with K passages each, of which the first is a positive; N passages in the batches of all processes. A loss is
a function of `Scores`, the mean over the queries.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanocolbert.cli import InputError
from nanocolbert.maxsim import maxsim, maxsim_pairs

SCALES = {"l2": 2.0, "cosine": 1.0}  # of MaxSim: v1's l2 similarity is -|q - d|^2 = 2 q.d - 2, softmax that of 2 q.d
EVEN = 1e-6  # a teacher's scores of a row that differ by less are all the same
NEVER = -1e9  # the logit of what is left out: its probability is 0, and 0 times its logarithm is no nan


@dataclass
class Scores:
    """Of the queries of one process. The student's are logits: scaled MaxSim over the temperature."""

    own: Tensor  # (B, K) of each query's own passages
    all: Tensor | None = None  # (B, N) of all passages
    counted: Tensor | None = None  # (B, N) true at the row's positive, and once at each passage that is none
    teacher: Tensor | None = None  # (B, K) the teacher's, as `own`
    teacher_all: Tensor | None = None  # (B, N) the teacher's, as `all`
    teacher_temperature: float = 0.25


def softmax(scores: Scores) -> Tensor:
    """Cross-entropy of the positive against its row's negatives: v1's with one (arXiv 2004.12832, section 3.3), n-way
    with more (arXiv 2112.01488, section 3.2)."""
    return (scores.own.logsumexp(1) - scores.own[:, 0]).mean()


def in_batch(scores: Scores) -> Tensor:
    """Cross-entropy of the positive against all passages of the batch (arXiv 2004.04906, section 3.2)."""
    logits = scores.all.masked_fill(~scores.counted, -torch.inf)  # (B, N)
    return (logits.logsumexp(1) - scores.own[:, 0]).mean()


def kl(scores: Scores) -> Tensor:
    """KL divergence from a teacher's distribution over a row's passages (ColBERTv2, arXiv 2112.01488, section 3.2).

    The teacher's scores are min-max normalised (JaColBERTv2.5, arXiv 2407.20750), as teachers differ in scale. Over
    0.25 the best passage of a row then weighs e^4 = 55 times the worst; over 1 less than three times.
    """
    teacher = scores.teacher.to(scores.own.dtype)
    least, most = teacher.amin(1, keepdim=True), teacher.amax(1, keepdim=True)
    normal = (teacher - least) / (most - least).clamp_min(EVEN)  # 0 to 1
    return divergence(scores.own, normal / scores.teacher_temperature)


def distil(scores: Scores) -> Tensor:
    """KL divergence from an encoder's own similarities, over all passages of the batch, each counted once.

    Each row is stretched to the standard deviation of the student's logits: what is asked for is how near passages are
    beside each other, not a scale, which would flatten what the student knows.
    """
    student, teacher, counted = scores.all, scores.teacher_all.to(scores.all.dtype), scores.counted
    stretch = deviation(student.detach(), counted) / deviation(teacher, counted).clamp_min(EVEN)
    return divergence(student, teacher * stretch, counted)


def divergence(logits: Tensor, wanted: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean KL divergence of softmax(logits) from softmax(wanted), (B, n) each. counted (B, n): what takes part."""
    if counted is not None:
        logits, wanted = (side.masked_fill(~counted, NEVER) for side in (logits, wanted))
    target, found = wanted.log_softmax(1), logits.log_softmax(1)
    return (target.exp() * (target - found)).sum(1).mean()


def deviation(scores: Tensor, counted: Tensor) -> Tensor:
    """The standard deviation (B, 1) of those scores (B, n) of a row that count (B, n)."""
    n = counted.sum(1, keepdim=True)
    centred = scores - (scores * counted).sum(1, keepdim=True) / n
    return ((centred * counted).square().sum(1, keepdim=True) / n).sqrt()


def margin_mse(scores: Scores) -> Tensor:
    """Squared difference of margins, positive to negative, between student and teacher (arXiv 2010.02666).

    The teacher's scores as they are; with several negatives the mean over them.
    """
    student, teacher = (side[:, :1] - side[:, 1:] for side in (scores.own, scores.teacher))  # (B, K - 1)
    return F.mse_loss(student, teacher.to(student.dtype))


LOSSES = {"softmax": softmax, "in_batch": in_batch, "kl": kl, "margin_mse": margin_mse, "distil": distil}
OF_ALL = {"in_batch", "distil"}  # look at the passages of all queries
OF_NEGATIVES, OF_SCORES = {"softmax", "kl", "margin_mse"}, {"kl", "margin_mse"}  # need these in each row


def check_losses(losses: list[str], tokens_dir, tokens_meta: dict, queries: int) -> None:
    """Raise InputError where a loss, NAME or NAME=WEIGHT, is there twice, or needs what the tokens do not have.

    queries: of a micro-batch of all processes.
    """
    names = [loss.partition("=")[0] for loss in losses]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"--loss {' '.join(losses)}: {name} is there twice: give it once, with its weight")
        if name in OF_NEGATIVES and tokens_meta.get("passages_per_query") == 1:
            raise InputError(f"--loss {name}: {tokens_dir} has one passage a query: take in_batch, or mine negatives")
        if name in OF_ALL and queries == tokens_meta.get("passages_per_query") == 1:
            raise InputError(
                f"--loss {name}: a micro-batch is one query and its passage, which says nothing: give more"
            )
        if name in OF_SCORES and not tokens_meta.get("scored"):
            raise InputError(
                f"--loss {name}: {tokens_dir} has no teacher's scores: run tsv2mmap.py with --triples that have"
            )


class Objective(nn.Module):
    """The weighted sum of some losses, and the temperature that their logits are divided by, which may be learnt."""

    def __init__(
        self,
        losses=("softmax",),
        similarity: str = "l2",
        temperature: float = 1.0,
        learn: bool = False,
        teacher_temperature: float = 0.25,
    ):
        """losses: a name, or NAME=WEIGHT, each."""
        super().__init__()
        terms = (loss.partition("=") for loss in losses)
        self.weights = {name: float(weight or 1) for name, _, weight in terms}
        self.scale, self.fixed, self.teacher_temperature = SCALES[similarity], temperature, teacher_temperature
        self.distillation, self.pooling = None, None  # what gives teacher_all; how passages are pooled first
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature))) if learn else None

    @property
    def temperature(self) -> Tensor | float:
        return self.fixed if self.log_temperature is None else self.log_temperature.exp()

    @property
    def looks_at_all(self) -> bool:
        """Whether the passages of all queries, in all processes, are needed."""
        return not OF_ALL.isdisjoint(self.weights)

    def forward(self, Q, P, mask, rows, first: int = 0, teacher=None, teacher_all=None) -> dict[str, Tensor]:
        """The sum ("loss"), and where there are several, each ("loss_NAME", not weighted).

        rows (B', 1 + K): a batch's queries and their passages, by number. P (B' * K, Ld, D), mask (B' * K, Ld) are of
        these passages, Q (B, Lq, D) of the queries from row `first` on. teacher (B, K), teacher_all (B, B' * K).
        """
        own, all_scores, counted = self.score(Q, P, mask, rows, first)
        scores = Scores(own, all_scores, counted, teacher, teacher_all, self.teacher_temperature)
        losses = {name: LOSSES[name](scores) for name in self.weights}
        total = sum(self.weights[name] * loss for name, loss in losses.items())
        return {"loss": total, **({f"loss_{name}": loss for name, loss in losses.items()} if len(losses) > 1 else {})}

    def score(self, Q, P, mask, rows, first: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logits of the queries' own passages (B, K), of all (B, N), and which of these count (B, N)."""
        B, n, K = len(Q), len(rows), rows.shape[1] - 1
        factor, here = self.scale / self.temperature, slice(first, first + B)
        if not self.looks_at_all:
            P, mask = P.view(n, K, *P.shape[1:])[here], mask.view(n, K, -1)[here]
            return factor * maxsim_pairs(Q, P, mask), None, None
        scores = factor * maxsim(Q, P, mask)  # (B, N)
        at = torch.arange(B, device=Q.device)
        own = scores.view(B, n, K)[at, first + at]  # (B, K)
        return own, scores, counted_once(rows, first, B)


def counted_once(rows: Tensor, first: int, B: int) -> Tensor:
    """Which passages of all rows (B', 1 + K) count for the B queries from row `first` on: (B, N), N = B' * K.

    Each passage is a negative once, however many rows brought it. What any row has as a positive of the query is none.
    """
    queries, positives, numbers, K = rows[:, 0], rows[:, 1], rows[:, 1:].flatten(), rows.shape[1] - 1  # numbers (N,)
    order = numbers.argsort(stable=True)
    new = F.pad(numbers[order].diff() != 0, (1, 0), value=True)
    once = torch.zeros_like(new).scatter(0, order, new)  # true at the first copy of each
    at = torch.arange(first, first + B, device=rows.device)
    same = queries[at, None] == queries  # (B, B')
    judged = same.float() @ (positives[:, None] == numbers).float() > 0  # (B, N) a positive of the query
    return (once & ~judged).scatter(1, (at * K)[:, None], True)
