"""The layers between the encoder and the embeddings: made, loaded, and begun well.

Shapes: H hidden, D dim, B passages of at most L tokens, T tokens in all, N passages.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanocolbert.cli import InputError
from nanocolbert.compute import map_alone, without_dropout
from nanocolbert.encoder.attention import encode_packed, pack
from nanocolbert.encoder.batches import tokens_per_batch
from nanocolbert.storage.ragged import length_batches, ranges

ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid", "LeakyReLU", "ELU", "Softplus")  # of torch.nn


class Dense(nn.Module):
    """A layer between the encoder and the embeddings that is more than a matrix: activation(Wx + b), plus a residual.

    activation: name of a class of torch.nn. residual: add the input, through a matrix where its size differs.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, activation: str, residual: bool):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.activation = getattr(nn, activation)()
        self.add_input = residual
        if residual and in_features != out_features:
            self.residual = nn.Linear(in_features, out_features, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (..., in_features); returns (..., out_features)."""
        out = self.activation(self.linear(hidden))
        if not self.add_input:
            return out
        return out + (self.residual(hidden) if hasattr(self, "residual") else hidden)


def make_projection(hidden: int, dim: int, dense: list[dict] | None) -> nn.Module:
    """One linear layer without bias from `hidden` to `dim` features, or the layers whose arguments `dense` holds."""
    if dense is None:
        return nn.Linear(hidden, dim, bias=False)
    return nn.Sequential(*(Dense(**layer) for layer in dense))


def load_projection(where, linear: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put weights into a projection, as fp32. Raises InputError where names or shapes differ."""
    wanted = {name: tuple(weight.shape) for name, weight in linear.state_dict().items()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    if wanted != found:
        raise InputError(f"{where}: the projection should have weights {wanted}, found {found}")
    linear.load_state_dict(weights)


@torch.inference_mode()
def principal_directions(model, values: np.ndarray, lengths: np.ndarray) -> Tensor:
    """The D principal directions (D, H) of a model's hidden states, each of unit length, on some passages.

    model: a ColBERT. values (T,), lengths (N,): word pieces. Of all projections to D dimensions, this one keeps most of
    the encoder's similarities, which a short training cannot make up for.
    """
    starts = np.cumsum(lengths) - lengths

    @torch.inference_mode()
    def moments(rows) -> Tensor:  # (H, H)
        framed = model.frame_passages(values[ranges(starts[rows], lengths[rows])], lengths[rows])
        ids, mask = (part.to(model.device) for part in framed)
        kept = model.kept(ids, mask)  # (B, L)
        with model.autocast():
            if model.device.type == "cpu" and model.packs():
                hidden = encode_packed(model.encoder, pack((ids, mask, mask)))[kept[mask.bool()]]  # (T', H)
            else:
                hidden = model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state[kept]
        hidden = F.normalize(hidden.float(), dim=-1)
        return hidden.T @ hidden

    framed = lengths + model.config.framing("passage")
    batches = length_batches(framed, tokens_per_batch(model.device, int(framed.sum())))
    with without_dropout(model):
        total = sum(map_alone(moments, batches, device=model.device))
    return torch.linalg.eigh(total).eigenvectors[:, -model.config.dim :].T
