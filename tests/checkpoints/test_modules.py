"""modules.json, which PyLate and sentence-transformers share."""

import json

import pytest
import torch
from golden_checkpoints import NATIVE, copy_of

from model import ColBERT
from nanocolbert.cli import InputError

pytestmark = pytest.mark.usefixtures("fp32")  # as the libraries computed


def test_several_dense_layers(tmp_path):
    model = ColBERT.from_pretrained(copy_of("pylate-bert", tmp_path))
    assert [layer["out_features"] for layer in model.config.dense] == [12, 8] and model.config.dim == 8
    hidden = torch.randn(3, 16)
    first, last = model.linear
    expected = torch.tanh(hidden @ first.linear.weight.T + first.linear.bias) + hidden @ first.residual.weight.T
    assert torch.allclose(model.linear(hidden), expected @ last.linear.weight.T, atol=1e-6)


def test_modules_that_are_refused(tmp_path):
    folder = copy_of(NATIVE, tmp_path)
    modules = json.loads((folder / "modules.json").read_text())

    def refused(changed: list[dict], message: str) -> None:
        (folder / "modules.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=message):
            ColBERT.from_pretrained(folder)

    refused([*modules, {"path": "x", "type": "my.code.Pooling"}], r"module 'my\.code\.Pooling' cannot be honoured")
    pooling = {"path": "x", "type": "sentence_transformers.multi_vector_encoder.modules.TokenPooling"}
    refused([*modules, pooling], "TokenPooling' cannot be honoured")
    refused([{**module, "path": "../" + module["path"]} for module in modules], "leads out of the folder")
    refused(modules[:1], "no Dense module")
    refused(modules[1:], "the first module must be a Transformer")
    refused([modules[0], *modules[::-1][:-1]], "a Dense after Normalize")
    refused([module for module in modules if "Mask" not in module["type"]], "query_expansion without a MultiVectorMask")
