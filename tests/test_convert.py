"""scripts/convert.py: every layout out and in again, with what is known of the training."""

import argparse
import json

import pytest
from conftest import call_stage, succeed
from golden_checkpoints import assert_same

from model import ColBERT
from nanocolbert.checkpoints import layouts
from nanocolbert.storage.artifact import read_meta, write_meta

pytestmark = pytest.mark.usefixtures("fp32")  # as the libraries computed

META = {"steps": 400, "args": {"tokens_dir": "/home/me/data/tokens", "batch_size": 32, "lr": 3e-6}}


def test_command_line(colbert, tmp_path):
    colbert.save_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / "meta.json").write_text(json.dumps(META))
    for layout, source in (("sentence-transformers", "ours"), ("nanocolbert", "sentence-transformers")):
        arguments = ("--model", tmp_path / source, "--layout", layout, "--output_dir", tmp_path / layout)
        succeed(call_stage("convert.py", *arguments))
        assert layouts.detect(tmp_path / layout) == layout
        assert_same(colbert, ColBERT.from_pretrained(tmp_path / layout))
        meta = read_meta(tmp_path / layout, "model", "convert.py", check=True)
        assert meta["layout"] == layout and meta["steps"] == 400 and meta["args"] == META["args"]
    assert "| steps | 400 |" in (tmp_path / "sentence-transformers" / "README.md").read_text()
    for again in ("ours", "none", "text"):  # a model that came without a meta.json gets one
        (tmp_path / "ours" / "meta.json").unlink(missing_ok=True)
        (tmp_path / "text").write_text("")
        done = call_stage("convert.py", "--model", tmp_path / again, "--output_dir", tmp_path / "ours2", "--no-verify")
        assert (done.returncode == 0) == (again == "ours")
    assert read_meta(tmp_path / "ours2", "model", "convert.py", check=True)["layout"] == "nanocolbert"
    failed = call_stage("convert.py", "--model", tmp_path / "none", "--output_dir", tmp_path / "x")
    assert failed.returncode == 2 and failed.stderr.startswith("convert.py: error:") and not (tmp_path / "x").exists()


def test_command_line_refuses(colbert, tmp_path, monkeypatch):
    """Before a model is loaded: to write where it reads, over what is not a model, and what checksums tell apart."""
    colbert.save_pretrained(tmp_path / "model")
    write_meta(tmp_path / "model", "model", "", 0.0, argparse.Namespace())
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("")
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    (tmp_path / "model" / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    monkeypatch.setattr(ColBERT, "from_pretrained", None)
    for output, message in (
        ("model", "model: holds what is read"),
        (".", "holds what is read"),
        ("notes", "holds what is no model folder"),
        ("new", "model.safetensors: damaged within bytes"),
    ):
        done = call_stage("convert.py", "--model", tmp_path / "model", "--output_dir", tmp_path / output, "--verify")
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "notes"]
