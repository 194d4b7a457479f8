"""Our own layout: what it may say, what others write into it, and files that are not those that were written."""

import argparse

import pytest
from golden_checkpoints import assert_refused, assert_same, change

from model import ColBERT
from nanocolbert.checkpoints import layouts
from nanocolbert.checkpoints.own import OWN_LATER
from nanocolbert.cli import InputError
from nanocolbert.storage.artifact import write_meta

pytestmark = pytest.mark.usefixtures("fp32")  # as the libraries computed

OWN = [
    ({"skiplists": [1]}, (), "unknown key 'skiplists'"),
    ({}, ("mask_punctuation",), "key 'mask_punctuation' is missing"),
    ({}, ("query_marker_id",), "key 'query_marker_id' is missing"),
    ({}, ("encoder",), "key 'encoder' is missing"),
    ({"dim": 99}, (), r"the projection should have weights .*\(99, 32\)"),
    ({"dim": "16"}, (), "dim '16' cannot be honoured here"),
    ({"query_maxlen": 3}, (), "query_maxlen 3 leaves no room for a word piece"),
    ({"doc_maxlen": 600}, (), "takes 512 tokens, 600 were asked for"),
    ({"skiplist": 7}, (), "skiplist '7' cannot be honoured here"),
    ({"skiplist": [7, 999]}, (), "token 999 is put into texts, or dropped, but its encoder has 131 embeddings"),
    ({"query_marker_id": 999}, (), "token 999 is put into texts, or dropped"),
    ({"normalize": "no"}, (), "normalize 'no' cannot be honoured here"),
    ({"dense": [{"in_features": 32}]}, (), "dense .* cannot be honoured here"),
    ({"encoder": {"model_type": "none"}}, (), "no encoder could be loaded"),
    ({"encoder": {"model_type": "bert"}}, (), "key 'vocab_size' of the encoder is missing"),
    ({"auto_map": {"AutoModel": "x.Y"}}, (), "auto_map: it asks for code of its own"),
]


@pytest.mark.parametrize("settings, removed, message", OWN)
def test_settings_of_our_own_that_are_refused(settings, removed, message, colbert, tmp_path):
    colbert.save_pretrained(tmp_path)
    assert_refused(tmp_path, "config.json", settings, removed, message)


def test_settings_that_transformers_writes(colbert, tmp_path):
    """Of this version and of others; and those of our first version, which had fewer of its own."""
    colbert.save_pretrained(tmp_path)
    change(
        tmp_path, "config.json", torch_dtype="float32", output_attentions=False, tie_word_embeddings=True, id2label={}
    )
    assert_same(colbert, ColBERT.from_pretrained(tmp_path))
    change(tmp_path, "config.json", *OWN_LATER)
    assert_same(colbert, ColBERT.from_pretrained(tmp_path))
    assert layouts.read_tokenizer(tmp_path)[1] == colbert.config.texts()


def test_files_of_a_model_folder(colbert, tmp_path):
    """A file that is not what was written is named before it is read; others may have been left behind."""
    colbert.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "log.jsonl").write_text("{}")
    write_meta(tmp_path / "model", "model", "", 0.0, argparse.Namespace())
    (tmp_path / "model" / "log.jsonl").unlink()
    assert ColBERT.from_pretrained(tmp_path / "model").meta["kind"] == "model"
    whole = (tmp_path / "model" / "model.safetensors").read_bytes()
    (tmp_path / "model" / "model.safetensors").write_bytes(whole[:-4])
    with pytest.raises(InputError, match=r"model\.safetensors: \d+ bytes, should be \d+"):
        ColBERT.from_pretrained(tmp_path / "model")
    colbert.save_pretrained(tmp_path / "model")  # in its place: what the old meta.json says is no longer so
    assert ColBERT.from_pretrained(tmp_path / "model").meta is None
