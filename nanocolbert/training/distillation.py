"""Distilling an encoder's own similarity: while a model is trained, the encoder that it began as scores the batch.

What a short training loses first is what the encoder knew. It is the target of the loss `distil`: of each query the
similarity to all passages of the batch, those of other processes too. It needs no judgments, and takes any texts.

Shapes: B queries of this process, N passages of all, L tokens at most, H hidden.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanocolbert.cli import InputError
from nanocolbert.encoder.pretrained import locate
from nanocolbert.maxsim import maxsim
from nanocolbert.text import tokenizer_fingerprint
from nanocolbert.training.teachers import OwnSimilarity, is_cross_encoder, load_teacher, standardised

Framed = tuple[np.ndarray, np.ndarray]  # word pieces (T,), lengths (n,)


class Distillation:
    """Scores of a batch by an encoder's own similarity. Its word pieces are those of the model that is trained."""

    def __init__(self, teacher: OwnSimilarity, gather: Callable | None = None):
        """gather(tensor (n, L, ...)): those of all processes, one after the other; None of one process."""
        self.teacher, self.gather = teacher, gather

    @classmethod
    def load(cls, name, similarity: str, tokens_dir, tokens_meta: dict, device, gather=None) -> "Distillation":
        """By the encoder in a folder, or on the hub. Raises InputError where it cannot read these word pieces."""
        if is_cross_encoder(locate(name)):
            raise InputError(
                f"--teacher {name}: a cross-encoder, and distil wants an encoder: give one, or score the rows by "
                "scripts/score.py and take kl"
            )
        teacher = load_teacher(name, similarity, device=device)
        if tokenizer_fingerprint(teacher.tokenizer) != tokens_meta["tokenizer_fingerprint"]:
            raise InputError(
                f"--teacher {name}: another tokenizer than that of {tokens_dir}, {tokens_meta['tokenizer']}: "
                "distil reads word pieces: score the rows by scripts/score.py and take kl"
            )
        return cls(teacher, gather)

    def embed(self, values: np.ndarray, lengths: np.ndarray) -> list[tuple[Tensor, Tensor]]:
        """Unit vectors (n, L, H) of word pieces, and their mask (n, L), for each similarity that is added up.

        values (T,), lengths (n,): one text after the other, cut to what the teacher takes.
        """
        return [padded(vectors) for vectors in zip(*self.teacher.vectors_of(values, lengths), strict=True)]

    @torch.no_grad()
    def score(self, queries: Framed, passages: Framed, which: Tensor) -> Tensor:
        """The teacher's scores (B, N) fp32; several similarities are standardised over a query's passages and added.

        which (n,): which of `passages`, each of them different, are this process's part of the N.
        """
        total = 0
        for (Q, _), (P, mask) in zip(self.embed(*queries), self.embed(*passages), strict=True):
            P, mask = P[which], mask[which]
            if self.gather is not None:
                P, mask = self.gather(P), self.gather(mask)
            scores = maxsim(Q, P, mask)
            total = total + (standardised(scores) if self.teacher.similarity == "sum" else scores)
        return total


def padded(vectors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(L, H) of each of n texts as (n, L, H) and its mask (n, L)."""
    lengths = torch.tensor([len(part) for part in vectors], device=vectors[0].device)
    filled = pad_sequence(vectors, batch_first=True)
    return filled, torch.arange(filled.shape[1], device=filled.device) < lengths[:, None]
