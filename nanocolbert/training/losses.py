"""The loss of a batch of triples."""

import torch
import torch.nn.functional as F

from nanocolbert.maxsim import maxsim, maxsim_pairs


def triples_loss(Q, P, mask, passage_rows, scale: float, in_batch_negatives: bool) -> torch.Tensor:
    """Mean cross-entropy of each query's positive against its negatives, or against all passages of the batch.

    Q (B, Lq, D), P (B * K, Ld, D), mask (B * K, Ld), passage_rows (B, K): a query's positive stands first.
    scale: 2 gives v1's l2 similarity -|q - d|^2 = 2 q.d - 2 its softmax, 1 is cosine.
    """
    B, K = passage_rows.shape
    if not in_batch_negatives:
        logits = maxsim_pairs(Q, P.view(B, K, *P.shape[1:]), mask.view(B, K, -1))  # (B, K)
        return F.cross_entropy(scale * logits, torch.zeros(B, dtype=torch.long, device=Q.device))
    positives = torch.arange(B, device=Q.device) * K
    same = passage_rows.view(1, -1) == passage_rows[:, :1]  # another copy of the positive is no negative
    same.scatter_(1, positives[:, None], False)
    logits = maxsim(Q, P, mask).masked_fill(same, -torch.inf)  # (B, B * K)
    return F.cross_entropy(scale * logits, positives)
