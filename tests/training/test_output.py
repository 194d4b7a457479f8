"""The folder that a training writes: nobody else's, whole, and of finite weights."""

import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from conftest import call_stage
from safetensors.torch import load_file, save_file
from toy_training import killed_at, refused, train

from model import ColBERT
from nanocolbert.cli import InputError
from nanocolbert.storage.artifact import check_output_dir, lock, read_meta, verify
from nanocolbert.training.output import save_model


def test_outputs_that_are_not_ours(tokens_dir, train_arguments, encoder_dir, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/notes.txt").write_text("mine")
    shutil.copytree(tokens_dir, tmp_path / "tokens")
    shutil.copytree(encoder_dir, tmp_path / "encoder")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name, said in (
        ("file", "a file, not a folder"),
        ("file/sub", "Not a directory"),
        ("folder", "holds what no training wrote (notes.txt)"),
        ("tokens", "holds 'tokens'"),
        ("encoder", "holds what no training wrote"),
    ):
        for flags in ((), ("--resume",)):
            assert said in refused(train_arguments, tmp_path / name, *flags)
    assert "holds what is read" in refused(train_arguments, tmp_path / "tokens", "--tokens_dir", tmp_path / "tokens")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_link_is_followed(train_arguments, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    train(train_arguments, tmp_path / "link", "--max_steps", 1)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there/meta.json").is_file()


def test_two_trainings_at_once(train_arguments, tmp_path):
    (tmp_path / "model").mkdir()
    held = lock(tmp_path / "model", "", os.O_RDONLY)
    assert "another process is writing it" in refused(train_arguments, tmp_path / "model")
    os.close(held)
    train(train_arguments, tmp_path / "model", "--max_steps", 1)


def test_files_of_a_model(train_arguments, tmp_path):
    """What a model consists of is listed and summed, readable by others, and not replaced as if it were all."""
    train(train_arguments, tmp_path / "model", "--save_steps", 4)
    meta = read_meta(tmp_path / "model", "model", "train.py", check=True)
    assert set(meta["files"]) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    mask = os.umask(0)
    os.umask(mask)
    for path in filter(Path.is_file, (tmp_path / "model").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) & ~0o111 == 0o666 & ~mask, path
    with pytest.raises(InputError, match="is not a part of it"):
        check_output_dir(tmp_path / "model", "model")


def test_a_model_is_whole_or_not_finished(encoder_dir, tmp_path):
    """Killed again and again, each time one change later, until it comes to its end."""
    torch.set_num_threads(1)  # a forked child has no other
    model = ColBERT.from_base(encoder_dir, dim=4)
    for n in range(99):
        ended = killed_at(n, lambda: save_model(model, tmp_path / "model", {"kind": "model"}))
        if (tmp_path / "model/meta.json").exists():
            assert verify(tmp_path / "model")
        if ended:
            break
    assert 5 < n < 99 and ended
    save_model(model, tmp_path / "again", {"kind": "model"})
    found = [{path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("model", "again")]
    assert found[0] == found[1] and "meta.json" in found[0]


def test_save_model_spares_what_else_is_in_the_folder(encoder_dir, tmp_path):
    (tmp_path / "log.jsonl").write_text("x")
    save_model(ColBERT.from_base(encoder_dir, dim=4), tmp_path, {"kind": "model"})
    assert (tmp_path / "log.jsonl").read_text() == "x" and ColBERT.from_pretrained(tmp_path).config.dim == 4
    assert not (tmp_path / "model.new").exists()


def spoiled(source: Path, folder: Path) -> Path:
    """A copy of a model with one NaN in its weights."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "query.weight" in name)
    weights[name][3, 5] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    if (folder / "meta.json").exists():
        (folder / "meta.json").unlink()
    return folder


def test_a_base_model_with_a_nan(encoder_dir, model_dir, train_arguments, tmp_path):
    for source in (encoder_dir, model_dir):
        base = spoiled(source, tmp_path / source.name)
        message = refused(train_arguments, tmp_path / "out", "--base_model", base)
        assert "query.weight" in message and str(base) in message and not (tmp_path / "out").exists()


@pytest.mark.parametrize("lr", [1e38, 1e300])
@pytest.mark.parametrize("flags", [("--max_steps", 1), ("--save_steps", 1), "dev"])
def test_nothing_that_is_not_finite_is_published(train_arguments, toy_dir, tmp_path, lr, flags):
    if flags == "dev":
        flags = [part for n in ("queries", "qrels", "candidates") for part in (f"--dev_{n}", toy_dir / f"{n}.tsv")]
        flags += ["--eval_steps", 1]
    more = ("--output_dir", tmp_path / "model", "--lr", lr, "--max_grad_norm", 0)
    done = call_stage("train.py", *train_arguments, *flags, *more)
    assert done.returncode == 2 and "the model after step 1: " in done.stderr and "lower --lr" in done.stderr
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"log.jsonl"}


def test_a_loss_that_is_not_finite_stops(train_arguments, tmp_path):
    flags = ("--output_dir", tmp_path / "model", "--lr", 1e38, "--max_grad_norm", 0)
    done = call_stage("train.py", *train_arguments, *flags)
    assert done.returncode == 2 and "lower --lr" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "model/meta.json").exists()
