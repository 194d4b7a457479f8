"""MaxSim, the score of late interaction: for each query token its best passage token, summed (paper, section 3.3).

Shapes: B queries of Lq tokens, N passages of at most Ld tokens, T tokens of passages in all, D dimensions.
"""

import numpy as np
import torch
from torch import Tensor

from nanocolbert.cli import InputError
from nanocolbert.storage.ragged import neighbours

FEWEST = 16  # vectors multiplied at a time on a CPU: products of fewer are added up in an order that varies among them
SCORE_QUERIES, SCORE_TOKENS = 16, {"cpu": 4096, "cuda": 1 << 20}  # scored at a time, as in a search
MAXSIM_BYTES = {"cpu": 1 << 23, "cuda": 1 << 29}  # similarities held at a time in training


def maxsim(queries: Tensor, passages: Tensor, mask: Tensor) -> Tensor:
    """Score every query against every passage: sum over query tokens of the best passage token (paper, eq. 3).

    queries (B, Lq, D), passages (N, Ld, D), mask (N, Ld) true at real tokens; returns (B, N). Tokens that are
    not real never win, however small the similarities. Takes MAXSIM_BYTES of memory besides, whatever the sizes.
    """
    return _MaxSim.apply(queries, passages, mask)


class _MaxSim(torch.autograd.Function):
    """Similarities a few queries at a time; what is kept of them is where each maximum was."""

    @staticmethod
    def forward(ctx, queries, passages, mask):
        scores, winners = [], []
        for part in _maxsim_parts(queries, passages):
            similarity = torch.einsum("bqd,nld->bnql", part, passages)  # (b, N, Lq, Ld)
            best, winner = similarity.masked_fill_(~mask[None, :, None, :], -torch.inf).max(-1)  # (b, N, Lq)
            scores.append(best.sum(-1))
            winners.append(winner.to(torch.int16))
        ctx.save_for_backward(queries, passages, torch.cat(winners))
        return torch.cat(scores)

    @staticmethod
    def backward(ctx, grad):  # (B, N)
        queries, passages, winners = ctx.saved_tensors
        grad_queries, grad_passages, first = [], torch.zeros_like(passages), 0
        for part in _maxsim_parts(queries, passages):
            here = slice(first, first := first + len(part))
            winner = winners[here].long()[..., None]  # (b, N, Lq, 1)
            chosen = torch.zeros((*winner.shape[:3], passages.shape[1]), dtype=grad.dtype, device=grad.device)
            chosen.scatter_(3, winner, grad[here, :, None, None].expand_as(winner))  # (b, N, Lq, Ld)
            grad_queries.append(torch.einsum("bnql,nld->bqd", chosen, passages))
            grad_passages += torch.einsum("bnql,bqd->nld", chosen, part)
        return torch.cat(grad_queries), grad_passages, None


def _maxsim_parts(queries: Tensor, passages: Tensor):
    row = 4 * queries.shape[1] * passages.shape[0] * passages.shape[1]  # bytes of one query's similarities
    return queries.split(max(1, MAXSIM_BYTES.get(queries.device.type, 1 << 24) // max(1, row)))


def maxsim_pairs(queries: Tensor, passages: Tensor, mask: Tensor) -> Tensor:
    """Score each query against its own passages only.

    queries (B, Lq, D), passages (B, K, Ld, D), mask (B, K, Ld) true at real tokens; returns (B, K).
    """
    similarity = torch.einsum("bqd,bkld->bkql", queries, passages)  # (B, K, Lq, Ld)
    return similarity.masked_fill(~mask[:, :, None, :], -torch.inf).amax(-1).sum(-1)


def maxsim_packed(queries: Tensor, embeddings: Tensor, lengths: Tensor) -> Tensor:
    """Score every query against packed passages, without padding.

    queries (B, Lq, D), embeddings (T, D) of N passages one after the other, lengths (N,) all above 0, T their sum;
    returns (B, N) fp32. On a CPU passages with the same embeddings have the same score, to the last bit.
    """
    B, Lq, D = queries.shape
    queries = queries.reshape(B * Lq, D)
    if queries.device.type == "cpu":  # numpy's segmented maximum is many times faster there, along contiguous rows
        starts, T, N = np.cumsum(lengths.numpy()) - lengths.numpy(), len(embeddings), len(lengths)
        if min(T, B * Lq) < FEWEST:
            queries, embeddings = (
                torch.nn.functional.pad(vectors, (0, 0, 0, max(0, FEWEST - len(vectors))))
                for vectors in (queries, embeddings)
            )
        similarity = (queries @ embeddings.T).float().numpy()[: B * Lq, :T]
        best = np.maximum.reduceat(similarity, starts, axis=1)  # (B * Lq, N)
        if N == 1:  # numpy adds up one column in another order than several
            best = best.repeat(2, 1)
        return torch.from_numpy(best.reshape(B, Lq, -1).sum(1)[:, :N])
    similarity = (embeddings @ queries.T).float()  # (T, B * Lq)
    best = torch.segment_reduce(similarity, "max", lengths=lengths, axis=0)  # (N, B * Lq)
    return best.view(-1, B, Lq).sum(-1).T


def maxsim_all(queries: Tensor, passages, device) -> Tensor:
    """Score every query (B, Lq, D) against every passage of a list of (Ld, D), block by block: (B, N) fp32 on the CPU.

    Raises InputError where a passage has no embeddings.
    """
    lengths = np.array([len(passage) for passage in passages], np.int64)  # (N,)
    if not lengths.all():
        raise InputError(f"passage {lengths.argmin()} has no embeddings (0, D): leave it out")
    scores = torch.empty(len(queries), len(passages))  # (B, N)
    for rows in neighbours(lengths, SCORE_TOKENS.get(torch.device(device).type, 4096)):
        block = torch.cat(list(passages[rows])).to(device, torch.float32)  # (T, D)
        block_lengths = torch.from_numpy(lengths[rows]).to(device)
        for start in range(0, len(queries), SCORE_QUERIES):
            part = queries[start : start + SCORE_QUERIES].to(device, torch.float32)
            scores[start : start + SCORE_QUERIES, rows] = maxsim_packed(part, block, block_lengths).cpu()
    return scores
