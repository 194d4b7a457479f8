"""Hannibal046's nanoColBERT."""

import pytest
import torch
from golden_checkpoints import assert_same, change
from safetensors.torch import save_file

from model import ColBERT
from nanocolbert.cli import InputError

pytestmark = pytest.mark.usefixtures("fp32")  # as the libraries computed


def test_nanocolbert_as_the_reference_saves_it(colbert, tmp_path):
    """A BERT config with three more keys, bert.*, and a buffer that must not be believed."""
    colbert.tokenizer.save_pretrained(tmp_path)
    colbert.encoder.config.save_pretrained(tmp_path)
    change(tmp_path, "config.json", dim=16, mask_punctuation=True, similarity_metric="l2")
    weights = {f"bert.{name}": weight for name, weight in colbert.encoder.state_dict().items()}
    weights |= {"linear.weight": colbert.linear.weight.detach(), "mask_buffer": torch.tensor([0, 7, 1 << 40])}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = ColBERT.from_pretrained(tmp_path)
    assert (model.config.query_maxlen, model.config.doc_maxlen) == (32, 180)  # the defaults of its scripts
    assert model.config.skiplist == colbert.config.skiplist
    assert_same(colbert, model)
    change(tmp_path, "config.json", similarity_metric="dot")
    with pytest.raises(InputError, match="similarity_metric 'dot' cannot be honoured"):
        ColBERT.from_pretrained(tmp_path)
