"""Attention within each of many texts, without padding; registered with transformers under the name "colbert".

On a GPU the texts of a batch lie one after the other in one sequence, and each attends within itself by PyTorch's
variable-length flash attention. Fewer positions may be attended to than get an output: the [MASK] fill of a query has
outputs and is not attended to (paper, section 3.2). On a CPU texts are packed where fast_encoder.py knows the encoder
and nothing is trained; else batches are padded, and of near-equal length.

Shapes: B texts of at most L positions, T positions in all, d size of a head.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nanocolbert import compute
from nanocolbert.encoder import fast_encoder

NAME = "colbert"
PACKABLE = ("bert", "distilbert", "electra", "roberta", "xlm-roberta", "modernbert")  # these take position_ids
COUNT_FROM_PADDING = ("roberta", "xlm-roberta")  # their first position is the padding id + 1


class Packed(NamedTuple):
    """Texts one after the other."""

    input_ids: Tensor  # (1, T)
    position_ids: Tensor  # (1, T) from 0 on in each text
    offsets: Tensor  # (B + 1,) int32: where each text begins, and T
    longest: int  # positions of the longest text
    keys: Tensor  # (T',) the positions that are attended to
    key_offsets: Tensor  # (B + 1,) int32: where the keys of each text begin, and T'
    most_keys: int


def packable(encoder, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether texts can be packed: on a GPU, in 16 bits, by an encoder that is told the positions; without dropout.

    On a CPU where fast_encoder.py has the encoder, and without gradients.
    """
    if device.type == "cpu":
        return fast_encoder.supports(encoder, dtype)
    rates = (rate for key, rate in vars(encoder.config).items() if "attention" in key and "dropout" in key)
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and encoder.config.model_type in PACKABLE
        and not (encoder.training and any(rates))
    )


def compute_dtype(device: torch.device) -> torch.dtype:
    """The type that torch.autocast is set to here, fp32 where it is not on."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32


def pack(*batches: tuple[Tensor, Tensor, Tensor]) -> Packed:
    """Pack padded batches (input_ids, attention_mask, outputs), (B, L) each, one after the other.

    The positions kept are those where `outputs` is true; attention_mask tells which of them are attended to. Done on
    the host: a GPU would have to be waited for to learn how many there are.
    """
    outputs = [batch[2].bool() for batch in batches]
    attended = [batch[1].bool() & kept for batch, kept in zip(batches, outputs, strict=True)]
    lengths = torch.cat([kept.sum(1) for kept in outputs])  # (B,)
    key_counts = torch.cat([keys.sum(1) for keys in attended])
    positions = [torch.arange(kept.shape[1]).expand_as(kept)[kept] for kept in outputs]
    return Packed(
        input_ids=torch.cat([ids[kept] for (ids, _, _), kept in zip(batches, outputs, strict=True)])[None],
        position_ids=torch.cat(positions)[None],
        offsets=_offsets(lengths),
        longest=int(lengths.max()),
        keys=torch.cat([keys[kept] for keys, kept in zip(attended, outputs, strict=True)]).nonzero()[:, 0],
        key_offsets=_offsets(key_counts),
        most_keys=int(key_counts.max()),
    )


def _offsets(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()


def encode_packed(encoder, texts: Packed) -> Tensor:
    """Last hidden states (T, H) of packed texts, by an encoder that is `packable`."""
    kind = encoder.config.model_type
    assert encoder.config._attn_implementation == NAME, "another attention would not know where a text ends"
    first = encoder.config.pad_token_id + 1 if kind in COUNT_FROM_PADDING else 0
    dtype = compute_dtype(texts.input_ids.device)
    if texts.input_ids.device.type == "cpu" and fast_encoder.supports(encoder, dtype):
        lengths, keys = texts.offsets.diff(), texts.key_offsets.diff()
        attended = texts.position_ids[0] < keys.repeat_interleave(lengths)  # (T,)
        assert torch.equal(attended.nonzero()[:, 0], texts.keys), "keys are not the first positions of their texts"
        positions = texts.position_ids + first
        return fast_encoder.encode(encoder, texts.input_ids, positions, lengths.tolist(), keys.tolist(), dtype)
    mask = {"full_attention": None, "sliding_attention": None} if kind == "modernbert" else None
    hidden = encoder(texts.input_ids, mask, position_ids=texts.position_ids + first, packed=texts).last_hidden_state
    return hidden[0]


def attention(module, query, key, value, attention_mask=None, dropout=0.0, scaling=None, packed=None, **kwargs):
    """What transformers calls in each layer.

    query, key, value (B, heads, L, d), (1, heads, T, d) if packed; attention_mask (B, 1, L or 1, L), true where a key
    may be attended to. Returns (B, L, heads, d), (1, T, heads, d) if packed, and None for the weights.
    """
    if packed is not None:
        assert not dropout, "packed texts are attended to without dropout"
        window = kwargs.get("sliding_window")
        return varlen(*(part[0].transpose(0, 1) for part in (query, key, value)), packed, scaling, window)[None], None
    # as PyTorch's: without a mask, a module that does not say otherwise is causal
    special = kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None
    special |= (attention_mask is None and getattr(module, "is_causal", True)) or key.shape[1] != query.shape[1]
    if query.device.type == "cpu" and query.requires_grad and not special:
        return products(query, key, value, attention_mask, dropout, scaling).transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


def products(query, key, value, mask: Tensor | None = None, dropout=0.0, scaling: float | None = None) -> Tensor:
    """Attention as two matrix products: (B, heads, L, d), arguments as of `attention`.

    In training on a CPU they are faster than PyTorch's fused attention, whose backward pass is slow (docs/log.md).
    """
    with torch.autocast(query.device.type, enabled=False):
        scores = query * (query.shape[-1] ** -0.5 if scaling is None else scaling) @ key.transpose(-2, -1)
        if mask is not None:
            scores = scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)  # a row of -inf would give nan
        weights = scores.softmax(-1)
        return (compute.dropout(weights, dropout) if dropout else weights) @ value


def varlen(query, key, value, packed: Packed, scaling: float | None, window: int | None) -> Tensor:
    """Attention within each of the packed texts: (T, heads, d). window: positions to either side, + 1; None is all."""
    key, value = key[packed.keys], value[packed.keys]  # (T', heads, d)
    if query.device.type == "cuda":
        from torch.nn.attention.varlen import varlen_attn

        sides = (-1, -1) if window is None else (window - 1, window - 1)
        ends = (packed.offsets, packed.key_offsets, packed.longest, packed.most_keys)
        return varlen_attn(query, key, value, *ends, scale=scaling, window_size=sides)
    results, at = [], packed.position_ids[0]  # elsewhere text by text: slow, and plain to see
    starts, key_starts = packed.offsets.tolist(), packed.key_offsets.tolist()
    for (start, stop), (first, last) in zip(pairwise(starts), pairwise(key_starts), strict=True):
        near = None
        if window is not None:
            near = (at[start:stop, None] - at[packed.keys[first:last]]).abs() < window  # (L, keys)
        parts = (query[start:stop], key[first:last], value[first:last])
        results.append(products(*(part.transpose(0, 1) for part in parts), near, scaling=scaling).transpose(0, 1))
    return torch.cat(results)


ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
