"""Embeddings that are not to be used, as a damaged model gives them: found, and the text named."""

from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from nanocolbert.cli import InputError

NEAR_UNIT = 0.01  # an embedding's length may differ so much from 1: of zeros, as a damaged projection gives, it is 0


class EmbeddingError(InputError):
    """An embedding that is not to be used; `passage` counts the texts of the call from 0."""

    def __init__(self, message: str, passage: int):
        super().__init__(message)
        self.passage = passage


def are_sound(embeddings: Tensor, normalized: bool) -> Tensor:
    """Whether embeddings (T, D) are all finite, and of unit length if `normalized`: a scalar on their device.

    What cannot be in fp16, if it is that, is infinite.
    """
    if normalized:
        lengths = torch.linalg.vector_norm(embeddings, dim=-1, dtype=torch.float32)  # (T,)
        return ((lengths - 1).abs() < NEAR_UNIT).all()
    return embeddings.isfinite().all()


def name_unsound(embeddings: Tensor, counts: np.ndarray, normalized: bool) -> None:
    """Raise EmbeddingError for the first text whose embeddings are not `are_sound`: (T, D) in all, counts (N,)."""
    for passage, part in enumerate(embeddings.split(counts.tolist())):
        if not are_sound(part, normalized):
            what = "not finite" if not part.isfinite().all() else "not of unit length"
            raise EmbeddingError(
                f"an embedding is {what}: the model's weights are damaged, or too large for {part.dtype}", passage
            )


@contextmanager
def named(what: str, rows):
    """Say which text of all an EmbeddingError is about: the call was of `rows`."""
    try:
        yield
    except EmbeddingError as error:
        row = int(rows[error.passage])
        raise EmbeddingError(f"{what} {row}: {error}", row) from None
