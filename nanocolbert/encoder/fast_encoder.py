"""BERT-like encoders on a CPU, for embedding: packed texts, in bf16 where the CPU computes in it, else in fp32.

The same function as the encoder's own forward pass without dropout (Devlin et al., arXiv 1810.04805), and faster than
transformers' (docs/log.md), because nothing is computed for padding. In bf16 weights are laid out for oneDNN, queries,
keys and values come from one product, and GELU is computed while a product's result is in the cache. In fp32 products
are written into buffers that all layers share, small enough for the cache, and texts of one length are attended to as
they lie in them: nothing is copied.

Shapes: B texts of at most L positions, T positions in all, H hidden, h heads of size d = H / h.
"""

import itertools
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OPERATORS = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
STEP = 32  # attention is computed on multiples of it: few shapes, and whole vectors in its softmax
GROUP = 16  # texts attended to at a time: a call for each costs more, above all with several threads
NAMES = {  # of a layer's parts: query, key, value, output, its norm, up, down, their norm
    "distilbert": (
        *("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "sa_layer_norm"),
        *("ffn.lin1", "ffn.lin2", "output_layer_norm"),
    ),
    "bert": (
        *("attention.self.query", "attention.self.key", "attention.self.value"),
        *("attention.output.dense", "attention.output.LayerNorm"),
        *("intermediate.dense", "output.dense", "output.LayerNorm"),
    ),
}
NAMES |= dict.fromkeys(("electra", "roberta", "xlm-roberta"), NAMES["bert"])


class Linear(NamedTuple):
    weight: Tensor  # (out, in), in oneDNN's own order
    bias: Tensor  # (out,)


class Layer(NamedTuple):
    qkv: Linear  # H to 3 H; the queries' part is scaled by d ** -0.5
    out: Linear
    norm: nn.LayerNorm
    up: Linear
    down: Linear
    last_norm: nn.LayerNorm


def supports(encoder: nn.Module, dtype: torch.dtype) -> bool:
    """Whether `encode` can take the place of the encoder's own forward pass, in this type."""
    config = encoder.config
    if config.model_type not in NAMES:
        return False
    parts = map(stack(encoder)[0].get_submodule, NAMES[config.model_type])
    return (
        all(type(part) in (nn.Linear, nn.LayerNorm) for part in parts)  # not what adapters put in their place
        and getattr(config, "activation" if config.model_type == "distilbert" else "hidden_act") == "gelu"
        and not getattr(config, "is_decoder", False)
        and encoder.dtype == torch.float32
        and not encoder.training
        and not torch.is_grad_enabled()
        and (dtype == torch.float32 or (dtype == torch.bfloat16 and has_bf16()))
    )


def has_bf16() -> bool:
    """Whether PyTorch can have oneDNN compute in bf16 on this CPU."""
    return (
        torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.mkldnn, name) for name in OPERATORS)
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def stack(encoder: nn.Module) -> nn.ModuleList:
    """The encoder's layers as they are."""
    return (encoder.transformer if hasattr(encoder, "transformer") else encoder.encoder).layer


def encode(encoder: nn.Module, input_ids, position_ids, lengths: list[int], keys: list[int], dtype) -> Tensor:
    """Last hidden states (T, H), of `dtype`, of B texts that lie one after the other.

    input_ids, position_ids (1, T); lengths (B,) of the texts, of which the first keys (B,) positions are attended to.
    """
    hidden = encoder.embeddings(input_ids=input_ids, position_ids=position_ids)[0]  # (T, H)
    if hasattr(encoder, "embeddings_project"):
        hidden = encoder.embeddings_project(hidden)
    return (encode_bf16 if dtype == torch.bfloat16 else encode_fp32)(encoder, hidden.to(dtype), lengths, keys)


# --------------------------------------------------------------------------------------------------------------- fp32


def encode_fp32(encoder: nn.Module, hidden: Tensor, lengths: list[int], keys: list[int]) -> Tensor:
    """Hidden states (T, H) after all layers."""
    (T, H), inner = hidden.shape, stack(encoder)[0].get_submodule(NAMES[encoder.config.model_type][5]).out_features
    qkv, wide, narrow = hidden.new_empty(T, 3, H), hidden.new_empty(T, inner), hidden.new_empty(T, H)
    runs = equal_runs(lengths, keys)
    for layer in stack(encoder):
        *projections, out, norm, up, down, last_norm = map(layer.get_submodule, NAMES[encoder.config.model_type])
        for part, place in zip(projections, qkv.unbind(1), strict=True):
            product(hidden, part, place)
        attend(qkv, encoder.config.num_attention_heads, runs, narrow)
        hidden = add_norm(product(narrow, out, hidden.new_empty(T, H)), hidden, norm)
        torch.ops.aten.gelu_(product(hidden, up, wide))
        hidden = add_norm(product(wide, down, narrow), hidden, last_norm)
    return hidden


def product(x: Tensor, part: nn.Linear, out: Tensor) -> Tensor:
    return torch.addmm(part.bias, x, part.weight.T, out=out)


class Run(NamedTuple):
    """Texts of one length, one after the other."""

    first: int  # where the first one begins
    n: int  # texts
    length: int
    mask: Tensor | None  # (n, 1, 1, length) true where a position is attended to; None: all are


def equal_runs(lengths: list[int], keys: list[int]) -> list[Run]:
    runs, first = [], 0
    for length, texts in itertools.groupby(zip(lengths, keys, strict=True), key=lambda text: text[0]):
        counts = torch.tensor([count for _, count in texts])
        mask = None if (counts == length).all() else (torch.arange(length) < counts[:, None])[:, None, None]
        runs.append(Run(first, len(counts), length, mask))
        first += len(counts) * length
    return runs


def attend(qkv: Tensor, heads: int, runs: list[Run], out: Tensor) -> None:
    """Attention within each text, of qkv (T, 3, H), written to out (T, H)."""
    for first, n, length, mask in runs:
        here = slice(first, first + n * length)
        parts = qkv[here].view(n, length, 3, heads, -1).permute(2, 0, 3, 1, 4)  # (3, n, h, length, d)
        attended = F.scaled_dot_product_attention(*parts, attn_mask=mask)  # (n, h, length, d)
        out[here].view(n, length, heads, -1).copy_(attended.transpose(1, 2))


# --------------------------------------------------------------------------------------------------------------- bf16


def encode_bf16(encoder: nn.Module, hidden: Tensor, lengths: list[int], keys: list[int]) -> Tensor:
    """Hidden states (T, H) after all layers."""
    groups = grouped(lengths, keys)
    for layer in layers(encoder):
        attended = attention(linear(hidden, layer.qkv), encoder.config.num_attention_heads, groups)
        hidden = add_norm(linear(attended, layer.out), hidden, layer.norm)
        hidden = add_norm(linear(linear(hidden, layer.up, "gelu"), layer.down), hidden, layer.last_norm)
    return hidden


def linear(x: Tensor, part: Linear, activation: str = "none") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, part.weight, part.bias, activation, [], "none")


def add_norm(x: Tensor, residual: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x.add_(residual), norm.normalized_shape, norm.weight, norm.bias, norm.eps)


class Group(NamedTuple):
    """G texts whose lengths, rounded up to a multiple of STEP, are the same width W."""

    rows: Tensor  # (G, W) where their positions are; behind a text, its last one again
    real: Tensor  # (T',) which of the G W are not behind a text
    hidden: Tensor  # (G, 1, 1, W) true where a position is not attended to


def grouped(lengths: list[int], keys: list[int]) -> list[Group]:
    lengths, keys = torch.tensor(lengths)[:, None], torch.tensor(keys)[:, None]  # (B, 1)
    starts, widths = lengths.cumsum(0) - lengths, (lengths[:, 0] + STEP - 1) // STEP * STEP
    groups = []
    for width in widths.unique().tolist():
        columns = torch.arange(width)
        for texts in (widths == width).nonzero()[:, 0].split(GROUP):
            rows = starts[texts] + columns.minimum(lengths[texts] - 1)
            real = (columns < lengths[texts]).view(-1).nonzero()[:, 0]
            groups.append(Group(rows, real, (columns >= keys[texts])[:, None, None]))
    return groups


def attention(qkv: Tensor, heads: int, groups: list[Group]) -> Tensor:
    """Attention (T, H) within each text, of qkv (T, 3 H)."""
    result = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
    for rows, real, hidden in groups:
        G, W = rows.shape
        parts = qkv.index_select(0, rows.view(-1)).view(G, W, 3, heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = parts.reshape(3, G * heads, W, -1)  # (G h, W, d)
        scores = torch.bmm(query, key.transpose(1, 2))  # (G h, W, W)
        scores.view(G, heads, W, W).masked_fill_(hidden, -torch.inf)
        attended = torch.bmm(scores.softmax(-1), value).view(G, heads, W, -1).transpose(1, 2)  # (G, W, h, d)
        result.index_copy_(0, rows.view(-1)[real], attended.reshape(G * W, -1).index_select(0, real))
    return result


_copies = WeakKeyDictionary()  # encoder: (addresses and versions of its weights, some of their values, layers)


def layers(encoder: nn.Module) -> list[Layer]:
    """The encoder's layers in bf16, made again when its weights have changed."""
    weights = [weight.detach() for weight in stack(encoder).parameters()]
    where = [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights]
    some = torch.cat([weight.view(-1)[:64] for weight in weights])  # fused optimizers leave the versions as they are
    copy = _copies.get(encoder)
    if copy is None or copy[0] != where or not torch.equal(copy[1], some):
        copy = _copies[encoder] = where, some, [make_layer(layer, encoder.config) for layer in stack(encoder)]
    return copy[2]


def make_layer(layer: nn.Module, config) -> Layer:
    query, key, value, out, norm, up, down, last_norm = map(layer.get_submodule, NAMES[config.model_type])
    scale = (config.hidden_size // config.num_attention_heads) ** -0.5
    weight = torch.cat([query.weight * scale, key.weight, value.weight])
    bias = torch.cat([query.bias * scale, key.bias, value.bias])
    pairs = (weight, bias), (out.weight, out.bias), (up.weight, up.bias), (down.weight, down.bias)
    qkv, out, up, down = (
        Linear(torch.ops.mkldnn._reorder_linear_weight(weight.detach().bfloat16(), 1024), bias.detach().bfloat16())
        for weight, bias in pairs
    )
    return Layer(qkv, out, norm, up, down, last_norm)
