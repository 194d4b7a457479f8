"""The fast forward pass on a CPU: the encoder's own hidden states to the rounding of bf16."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from test_attention import ENCODERS

import attention
import fast_encoder

LENGTHS, KEYS = (
    torch.tensor([40, 22, 7, 31, 64, 33]),
    torch.tensor([40, 22, 7, 9, 50, 33]),
)  # some are only given outputs
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bf16 on this CPU"
)


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
def fast(encoder) -> torch.Tensor:
    assert attention.packable(encoder, CPU, torch.bfloat16)
    return attention.encode_packed(encoder, attention.pack(texts())).float()


def distance(found, expected) -> float:
    """The largest distance of a hidden state, relative to its length."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


@torch.no_grad()
def test_fast_equals_slow(encoder):
    expected, found = slow(encoder), fast(encoder)
    assert found.shape == expected.shape == (LENGTHS.sum(), 32)
    with torch.autocast("cpu", torch.bfloat16):
        rounding = distance(slow(encoder).float(), expected)
    assert distance(found, expected) < 2 * rounding < 0.2


@pytest.mark.parametrize("fused", (False, True))
def test_changed_weights_are_noticed(encoder, fused):
    before = fast(encoder)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.05, fused=fused)
    slow(encoder)[:, 0].sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert distance(fast(encoder), slow(encoder)) < 0.1 < distance(before, slow(encoder))
        encoder.get_parameter(next(name for name, _ in encoder.named_parameters() if "out" in name))[-1] += 9
        assert distance(fast(encoder), slow(encoder)) < 0.1


def test_a_model_made_for_inference_only(encoder):
    with torch.inference_mode():
        copy = type(encoder)(encoder.config).eval()
        copy.load_state_dict(encoder.state_dict())
        assert torch.equal(fast(copy), fast(encoder))


def test_threads_share_an_encoder(encoder):
    expected = fast(encoder)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, expected) for found in pool.map(fast, [encoder] * 8))


def test_where_it_is_used():
    bert, gelu = transformers.BertModel(ENCODERS["bert"]).eval(), ENCODERS["bert"].to_dict()
    assert not fast_encoder.supports(bert)  # with gradients
    with torch.no_grad():
        assert fast_encoder.supports(bert) and not attention.packable(bert, CPU, torch.float32)
        assert not fast_encoder.supports(bert.train()) and not fast_encoder.supports(bert.eval().bfloat16())
        for changed in ({"hidden_act": "relu"}, {"is_decoder": True}):
            config = transformers.BertConfig(**{**gelu, **changed})
            assert not fast_encoder.supports(transformers.BertModel(config).eval())
        assert not fast_encoder.supports(transformers.ModernBertModel(ENCODERS["modernbert"]).eval())
