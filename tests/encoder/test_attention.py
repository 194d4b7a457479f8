"""Packed texts: the same hidden states and gradients as padded ones, by PyTorch's own attention."""

import pytest
import torch
import transformers

from nanocolbert.encoder import attention

SHAPE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
ENCODERS = {
    "bert": transformers.BertConfig(vocab_size=100, **SHAPE),
    "electra": transformers.ElectraConfig(vocab_size=100, embedding_size=16, **SHAPE),
    "distilbert": transformers.DistilBertConfig(vocab_size=100, dim=32, n_layers=2, n_heads=2, hidden_dim=64),
    "roberta": transformers.RobertaConfig(vocab_size=100, pad_token_id=1, **SHAPE),
    "xlm-roberta": transformers.XLMRobertaConfig(vocab_size=100, pad_token_id=1, **SHAPE),
    "modernbert": transformers.ModernBertConfig(
        vocab_size=100, local_attention=8, pad_token_id=0, cls_token_id=1, sep_token_id=2, **SHAPE
    ),
}
LENGTHS = torch.tensor([40, 22, 7, 31])


@pytest.fixture
def texts():
    """input_ids and attention_mask (4, 40) of texts of different lengths."""
    ids = torch.randint(5, 100, (4, 40), generator=torch.Generator().manual_seed(0))
    return ids, (torch.arange(40) < LENGTHS[:, None]).long()


def gradients(encoder, hidden) -> list[torch.Tensor]:
    weight = torch.linspace(-1, 1, hidden.numel()).view_as(hidden)
    found = torch.autograd.grad(
        (hidden * weight).sum(), list(encoder.parameters()), allow_unused=True, retain_graph=True
    )
    return [part for part in found if part is not None]


@pytest.mark.parametrize("kind", attention.PACKABLE)
def test_packed_equals_padded(kind, texts):
    torch.manual_seed(0)
    encoder, (ids, mask) = transformers.AutoModel.from_config(ENCODERS[kind]).eval(), texts
    outputs = mask.clone()
    if kind != "modernbert":  # far from all keys, a position has nothing to attend to
        outputs[2:] = 1  # the fill has outputs, as that of a query
    encoder.set_attn_implementation("sdpa")
    expected = encoder(ids, mask).last_hidden_state[outputs.bool()]  # (T, H)
    encoder.set_attn_implementation(attention.NAME)
    packed = attention.pack((ids[:1], mask[:1], outputs[:1]), (ids[1:], mask[1:], outputs[1:]))
    assert packed.offsets.tolist() == [0, *outputs.sum(1).cumsum(0).tolist()] and packed.longest == 40
    assert packed.key_offsets.tolist() == [0, *LENGTHS.cumsum(0).tolist()] and packed.most_keys == 40
    for hidden in (encoder(ids, mask).last_hidden_state[outputs.bool()], attention.encode_packed(encoder, packed)):
        assert torch.allclose(hidden, expected, atol=1e-5)
        for found, wanted in zip(gradients(encoder, hidden), gradients(encoder, expected), strict=True):
            assert torch.allclose(found, wanted, atol=1e-3 * wanted.abs().max().clamp(min=1e-3))


def test_when_texts_are_packed():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    bert = transformers.BertModel(ENCODERS["bert"]).eval()
    assert attention.packable(bert, gpu, torch.bfloat16) and attention.packable(bert, gpu, torch.float16)
    assert not attention.packable(bert, cpu, torch.bfloat16) and not attention.packable(bert, gpu, torch.float32)
    assert not attention.packable(bert.train(), gpu, torch.bfloat16)  # it has dropout, which the packed path has not
    other = transformers.MPNetModel(transformers.MPNetConfig(vocab_size=100, **SHAPE)).eval()
    assert not attention.packable(other, gpu, torch.bfloat16)
