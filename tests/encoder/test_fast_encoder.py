"""The fast forward pass on a CPU: the encoder's own hidden states, to the rounding of the type it computes in."""

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from test_attention import ENCODERS

from nanocolbert.encoder import attention, fast_encoder

LENGTHS, KEYS = (
    torch.tensor([40, 22, 7, 31, 64, 33]),
    torch.tensor([40, 22, 7, 9, 50, 33]),
)  # some are only given outputs
CPU = torch.device("cpu")

BF16 = pytest.param(
    torch.bfloat16, marks=pytest.mark.skipif(not fast_encoder.has_bf16(), reason="oneDNN has no bf16 on this CPU")
)


@pytest.fixture(params=[torch.float32, BF16])
def dtype(request):
    return request.param


@pytest.fixture(params=fast_encoder.NAMES)
def encoder(request):
    """A tiny encoder whose attention is far from uniform."""
    torch.manual_seed(0)
    encoder = transformers.AutoModel.from_config(ENCODERS[request.param]).eval()
    for name, weight in encoder.named_parameters():
        if "norm" not in name.lower():
            torch.nn.init.normal_(weight, std=0.3)
    encoder.set_attn_implementation(attention.NAME)
    return encoder


def texts():
    """input_ids, attention_mask, outputs (6, 64)."""
    ids, columns = torch.randint(5, 100, (6, 64), generator=torch.Generator().manual_seed(0)), torch.arange(64)
    return ids, (columns < KEYS[:, None]).long(), columns < LENGTHS[:, None]


def slow(encoder) -> torch.Tensor:
    ids, mask, outputs = texts()
    return encoder(ids, mask).last_hidden_state[outputs]


@torch.inference_mode()
def fast(encoder, dtype) -> torch.Tensor:
    assert attention.packable(encoder, CPU, dtype)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found = attention.encode_packed(encoder, attention.pack(texts()))
    assert found.dtype == dtype
    return found.float()


def distance(found, expected) -> float:
    """The largest distance of a hidden state, relative to its length."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


@torch.no_grad()
def test_fast_equals_slow(encoder, dtype):
    expected, found = slow(encoder), fast(encoder, dtype)
    assert found.shape == expected.shape == (LENGTHS.sum(), 32)
    rounding = 1e-5
    if dtype != torch.float32:
        with torch.autocast("cpu", dtype):
            rounding = distance(slow(encoder).float(), expected)
    assert distance(found, expected) < 2 * rounding < 0.2


@torch.no_grad()
def test_texts_of_one_length_are_attended_to_together(monkeypatch):
    """Neighbours of one length in one call, with and without positions that are only given outputs."""
    lengths, keys = [5, 5, 5, 7, 7, 5], [5, 5, 5, 7, 4, 5]
    runs = fast_encoder.equal_runs(lengths, keys)
    assert [(run.first, run.n, run.length, run.mask is None) for run in runs] == [
        (0, 3, 5, True),
        (15, 2, 7, False),
        (29, 1, 5, True),
    ]
    qkv, found = torch.randn(34, 3, 8), torch.empty(34, 8)
    fast_encoder.attend(qkv, 2, runs, found)
    for first, length, count in zip([0, 5, 10, 15, 22, 29], lengths, keys, strict=True):
        text = qkv[first : first + length].view(length, 3, 2, 4)
        for head in range(2):
            query, key, value = text[:, 0, head], text[:count, 1, head], text[:count, 2, head]
            expected = (query @ key.T / 2).softmax(-1) @ value
            assert torch.allclose(found[first : first + length].view(length, 2, 4)[:, head], expected, atol=1e-5)


@pytest.mark.parametrize("fused", (False, True))
def test_changed_weights_are_noticed(encoder, dtype, fused):
    before = fast(encoder, dtype)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.05, fused=fused)
    slow(encoder)[:, 0].sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert distance(fast(encoder, dtype), slow(encoder)) < 0.1 < distance(before, slow(encoder))
        encoder.get_parameter(next(name for name, _ in encoder.named_parameters() if "out" in name))[-1] += 9
        assert distance(fast(encoder, dtype), slow(encoder)) < 0.1


def test_a_model_made_for_inference_only(encoder, dtype):
    with torch.inference_mode():
        copy = type(encoder)(encoder.config).eval()
        copy.load_state_dict(encoder.state_dict())
        assert torch.equal(fast(copy, dtype), fast(encoder, dtype))


def test_threads_share_an_encoder(encoder, dtype):
    expected = fast(encoder, dtype)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, expected) for found in pool.map(fast, [encoder] * 8, [dtype] * 8))


def test_where_it_is_used(dtype):
    bert, gelu = transformers.BertModel(ENCODERS["bert"]).eval(), ENCODERS["bert"].to_dict()
    supports = functools.partial(fast_encoder.supports, dtype=dtype)
    assert not supports(bert)  # with gradients
    with torch.no_grad():
        assert supports(bert) and attention.packable(bert, CPU, dtype)
        assert not attention.packable(bert, CPU, torch.float16)
        assert not supports(bert.train()) and not supports(bert.eval().bfloat16())
        for changed in ({"hidden_act": "relu"}, {"is_decoder": True}):
            config = transformers.BertConfig(**{**gelu, **changed})
            assert not supports(transformers.BertModel(config).eval())
        assert not supports(transformers.ModernBertModel(ENCODERS["modernbert"]).eval())
