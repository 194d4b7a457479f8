"""colbert-ai's layout and v1's file: weights in every container, and settings that must be refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from golden_checkpoints import (
    GOLDEN,
    STANFORD,
    assert_refused,
    copy_of,
    largest_difference,
    stanford_state,
    v1_file,
    vectors,
)

from model import ColBERT
from nanocolbert.cli import InputError

pytestmark = pytest.mark.usefixtures("fp32")  # as the libraries computed


def test_pickled_weights(tmp_path):
    folder = copy_of("stanford-bert", tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save(stanford_state(), folder / "pytorch_model.bin")
    expected = dict(np.load(GOLDEN / "stanford-bert" / "as-saved.npz"))
    assert largest_difference(vectors(ColBERT.from_pretrained(folder)), expected) < 1e-5


def test_v1(tmp_path):
    """v1's file: the weights of colbert-ai's, the arguments of the training, the encoder's shape from its base."""
    v1 = v1_file()
    state, arguments = v1["model_state_dict"], v1["arguments"]
    torch.save(v1, tmp_path / "colbert.dnn")
    expected = dict(np.load(GOLDEN / "stanford-bert" / "as-saved.npz"))
    assert largest_difference(vectors(ColBERT.from_pretrained(tmp_path / "colbert.dnn")), expected) < 1e-5

    for broken, message in (
        ({"arguments": {**arguments, "stride": 2}}, "unknown key 'stride'"),
        ({"arguments": {"dim": 8}}, "arguments without 'query_maxlen'"),
        ({"ema": state}, "unknown key 'ema'"),
    ):
        torch.save({**v1, **broken}, tmp_path / "broken.dnn")
        with pytest.raises(InputError, match=message):
            ColBERT.from_pretrained(tmp_path / "broken.dnn")


def test_code_in_a_pickle_is_not_run(tmp_path):
    torch.save({"model_state_dict": {}, "arguments": {"model": Path("x")}, "optimizer": print}, tmp_path / "bad.dnn")
    with pytest.raises(InputError, match="more than weights is pickled in it"):
        ColBERT.from_pretrained(tmp_path / "bad.dnn")


MISTAKES = [
    ("artifact.metadata", {"stride": 2}, (), "unknown key 'stride'"),
    ("artifact.metadata", {"interaction": "flipr"}, (), "interaction 'flipr' cannot be honoured"),
    ("artifact.metadata", {"query_token_id": "[unused7]"}, (), r"'\[unused7\]' is no token"),
    ("artifact.metadata", {"dim": 9}, (), "the projection should have weights"),
    ("artifact.metadata", {"doc_maxlen": 99}, (), "takes 64 tokens, 99 were asked for"),
]


@pytest.mark.parametrize("name, settings, removed, message", MISTAKES)
def test_settings_that_are_refused(name, settings, removed, message, tmp_path):
    assert_refused(copy_of(STANFORD, tmp_path), name, settings, removed, message)
