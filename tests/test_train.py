"""Training: the same losses however the steps were computed, and what it refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TRAIN_STEPS, call_stage, succeed, toy_inputs
from toy_training import losses, refused, train
from transformers import BertTokenizerFast

from model import ColBERT
from nanocolbert.compute import mixed_precision
from nanocolbert.storage.artifact import SUM
from nanocolbert.training.log import read_log
from nanocolbert.training.resume import drops
from train import with_dropout


def test_a_model_comes_out(model_dir, encoder_dir):
    assert len(losses(model_dir)) == TRAIN_STEPS
    assert {path.name for path in model_dir.iterdir()} >= {"config.json", "meta.json", "log.jsonl", "loss.png"}
    assert not (model_dir / "model.new").exists() and not list(model_dir.rglob("*.partial"))
    meta = json.loads((model_dir / "meta.json").read_text())
    assert meta["kind"] == "model" and meta["steps"] == TRAIN_STEPS and meta["processes"] == 1
    assert meta["mixed_precision"] == meta["args"]["mixed_precision"] == "no"
    model = ColBERT.from_pretrained(model_dir)
    base = ColBERT.from_base(encoder_dir, dim=16)
    changed = [not torch.equal(weights, base.state_dict()[name]) for name, weights in model.state_dict().items()]
    assert len(changed) > 20 and sum(changed) > len(changed) - 3  # position embeddings past the longest text and such


def test_in_16_bits_where_these_pay(model_dir, train_arguments, tmp_path):
    found = train(train_arguments, tmp_path / "model", "--mixed_precision", "auto")
    meta = json.loads((tmp_path / "model/meta.json").read_text())
    assert meta["mixed_precision"] == meta["args"]["mixed_precision"] == mixed_precision("cpu")  # found out
    assert found == pytest.approx(losses(model_dir), rel=0.2, abs=0.05)


@pytest.mark.parametrize("parts", [2, 4])
def test_same_losses_by_accumulation(model_dir, train_arguments, tmp_path, parts):
    found = train(train_arguments, tmp_path / "model", "--gradient_accumulation_steps", parts)
    assert found == pytest.approx(losses(model_dir), rel=1e-4)


def test_shuffle_is_another_order_and_reproducible(model_dir, train_arguments, tmp_path):
    shuffled = [train(train_arguments, tmp_path / name, "--shuffle") for name in ("a", "b")]
    assert shuffled[0] == pytest.approx(shuffled[1], rel=1e-6)
    assert shuffled[0] != pytest.approx(losses(model_dir), rel=1e-3)


@pytest.mark.parametrize(
    "flags", [("--similarity", "l2"), ("--similarity", "cosine", "--loss", "in_batch", "--schedule", "linear")]
)
def test_the_loss_falls(train_arguments, tmp_path, flags):
    found = train(train_arguments, tmp_path / "model", "--max_steps", 60, "--dropout", 0.1, *flags)
    assert np.mean(found[-8:]) < 0.5 * np.mean(found[:8]), found


def test_training_goes_on_from_a_model(model_dir, train_arguments, tmp_path):
    found = train(train_arguments, tmp_path / "model", "--base_model", model_dir)
    assert np.mean(found) < np.mean(losses(model_dir))
    args = json.loads((tmp_path / "model/meta.json").read_text())["args"]
    assert (args["dim"], args["mask_punctuation"], args["projection"]) == (16, True, None)


def test_flags_of_a_new_model_say_nothing_to_another(model_dir, train_arguments, tmp_path):
    for flags in (("--dim", 8), ("--no-mask_punctuation",), ("--projection", "orthogonal")):
        message = refused(train_arguments, tmp_path / "model", "--base_model", model_dir, *flags)
        assert f"error: {' '.join(map(str, flags))}: " in message and "is a ColBERT already" in message


def test_dropout_of_a_model_to_go_on_from(model_dir, train_arguments, tmp_path):
    found = [
        train(train_arguments, tmp_path / name, "--base_model", model_dir, "--dropout", rate)
        for name, rate in (("a", 0.0), ("b", 0.5))
    ]
    assert found[0] != pytest.approx(found[1], rel=1e-3)
    model = ColBERT.from_pretrained(model_dir)
    batch = model.frame_queries(*model.tokenize(["apple"], "query"))
    changed = with_dropout(model, 0.25, 0.5)
    assert torch.equal(changed.eval().embed(batch), model.embed(batch)) and drops(changed) and not drops(model)
    rates = (changed.encoder.config.hidden_dropout_prob, changed.encoder.config.attention_probs_dropout_prob)
    assert rates == (0.25, 0.5) and changed.encoder.embeddings.dropout.p == 0.25


def test_principal_projection(train_arguments, tmp_path):
    train(train_arguments, tmp_path / "model", "--projection", "principal", "--lr", 1e-12)
    weight = ColBERT.from_pretrained(tmp_path / "model").linear.weight.detach()
    assert torch.allclose(weight @ weight.T, torch.eye(16), atol=1e-4)


def test_mistakes(train_arguments, toy_dir, encoder_dir, tmp_path):
    folder = tmp_path / "model"
    message = refused(train_arguments, folder, "--batch_size", 9, "--gradient_accumulation_steps", 2)
    assert "--batch_size 9 does not divide among 1 process(es) x 2 accumulation step(s) x 1 cached part(s)" in message
    message = refused(train_arguments, folder, "--batch_size", 12, "--cached_parts", 8)
    assert "x 1 accumulation step(s) x 8 cached part(s): make it a multiple of 8" in message
    assert "--loss kl: " in refused(train_arguments, folder, "--loss", "softmax", "kl=2")
    message = refused(train_arguments, folder, "--expand_queries_to", 600)
    assert "expand_queries_to 600: queries have 32 tokens (query_maxlen): give at most as many" in message
    for wrong in ("x", "kl=", "kl=0", "kl=nan"):
        done = call_stage("train.py", *train_arguments, "--output_dir", folder, "--loss", wrong)
        assert done.returncode == 2 and "error: argument --loss: '" in done.stderr.splitlines()[-1]
    assert "run tsv2mmap.py first" in refused(train_arguments, folder, "--tokens_dir", tmp_path)
    assert "no such folder" in refused(train_arguments, folder, "--base_model", tmp_path / "none")
    message = refused(train_arguments, folder, "--dev_queries", toy_dir / "queries.tsv")
    assert "give all of --dev_queries, --dev_qrels and --dev_candidates, or none" in message
    assert not folder.exists()


def test_tokens_without_triples(train_arguments, toy_dir, encoder_dir, tmp_path):
    arguments = (*toy_inputs(toy_dir)[:4], "--tokenizer", encoder_dir, "--output_dir", tmp_path / "tokens")
    succeed(call_stage("tsv2mmap.py", *arguments))
    message = refused(train_arguments, tmp_path / "model", "--tokens_dir", tmp_path / "tokens")
    assert "holds no triples: run tsv2mmap.py with --triples" in message


def test_another_tokenizer(train_arguments, encoder_dir, tmp_path, monkeypatch):
    shutil.copytree(encoder_dir, tmp_path / "other")
    vocabulary = (encoder_dir / "vocab.txt").read_text().splitlines()
    vocabulary[5], vocabulary[6] = vocabulary[6], vocabulary[5]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast.from_pretrained(tmp_path).save_pretrained(tmp_path / "other")
    monkeypatch.setattr(ColBERT, "project_on_principal", None)  # it may not know these word pieces: not to be called
    flags = ("--base_model", tmp_path / "other", "--projection", "principal")
    message = refused(train_arguments, tmp_path / "model", *flags)
    assert "another tokenizer than" in message and f"run tsv2mmap.py with --tokenizer {tmp_path / 'other'}" in message
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "flag, values",
    [
        ("--dim", ["0", "-1", "1.5"]),
        ("--max_steps", ["-1", "nan"]),
        ("--batch_size", ["0"]),
        ("--gradient_accumulation_steps", ["0"]),
        ("--lr", ["0", "-1e-3", "inf", "nan"]),
        ("--warmup_steps", ["-1"]),
        ("--weight_decay", ["-1", "inf"]),
        ("--max_grad_norm", ["-1", "nan"]),
        ("--dropout", ["1", "-0.1", "nan"]),
        ("--attention_dropout", ["1", "1.5"]),
        ("--seed", ["-1", "4294967296"]),
        ("--save_steps", ["0"]),
        ("--keep_checkpoints", ["0"]),
        ("--log_steps", ["0"]),
        ("--eval_steps", ["0"]),
        ("--dev_depth", ["0"]),
    ],
)
def test_numbers(train_arguments, tmp_path, flag, values):
    for value in values:
        done = call_stage("train.py", *train_arguments, "--output_dir", tmp_path / "model", f"{flag}={value}")
        assert done.returncode == 2 and f"argument {flag}: '{value}' is not" in done.stderr.splitlines()[-1]


def damaged_tokens(tokens_dir, folder, name: str, change) -> Path:
    """A copy of the tokens, as of before there were checksums, one array of it changed."""
    shutil.copytree(tokens_dir, folder)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({key: meta[key] for key in meta if key not in ("files", SUM)}))
    array = np.load(folder / name)
    np.save(folder / name, change(array))
    return folder


def test_a_teacher(tokens_dir, train_arguments, tmp_path):
    """One that prefers each row's second passage: so does the model after a few steps."""
    folder = damaged_tokens(tokens_dir, tmp_path / "tokens", "triples.npy", lambda triples: triples)
    np.save(folder / "scores.npy", np.tile(np.float32([0, 1]), (64, 1)))
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "scored": True}))
    flags = ("--tokens_dir", folder, "--loss", "kl", "margin_mse=0.1", "softmax=1e-9", "--max_steps", 40)
    train(train_arguments, tmp_path / "model", *flags)
    lines = read_log(tmp_path / "model/log.jsonl")
    first, last = lines[0], lines[-1]
    assert last["loss_kl"] < 0.5 * first["loss_kl"] and last["loss_margin_mse"] < first["loss_margin_mse"]
    assert last["loss_softmax"] > np.log(2)  # worse than a guess at the passage that stands first


def put(array, place, value):
    array[place] = value
    return array


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("triples.npy", lambda a: put(a, (5, 0), 16), "triple 5 is [16, "),
        ("triples.npy", lambda a: put(a, (63, 2), 40), "of 16 queries and 40 passages: run tsv2mmap.py again"),
        ("triples.npy", lambda a: put(a, (0, 1), -1), "triple 0 is ["),
        ("triples.npy", lambda a: a.astype(np.float32), "triples.npy: holds float32"),
        ("triples.npy", lambda a: a[:, 0], "triples.npy: of shape 64"),
        ("triples.npy", lambda a: a[:0], "holds no triples"),
        (
            "passages/values.npy",
            lambda a: put(a, slice(None), 9999),
            "passages/values.npy: word piece 9999, the model knows",
        ),
    ],
)
def test_damaged_tokens(tokens_dir, train_arguments, tmp_path, name, change, said):
    folder = damaged_tokens(tokens_dir, tmp_path / "tokens", name, change)
    assert said in refused(train_arguments, tmp_path / "model", "--tokens_dir", folder)


def test_verify_reads_the_checksums(tokens_dir, model_dir, train_arguments, tmp_path):
    for source, file, flag in ((tokens_dir, "triples.npy", "--tokens_dir"), (model_dir, "config.json", "--base_model")):
        shutil.copytree(source, tmp_path / source.name)
        content = (source / file).read_bytes()
        (tmp_path / source.name / file).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        message = refused(train_arguments, tmp_path / "out", flag, tmp_path / source.name, "--verify")
        assert file in message and not (tmp_path / "out").exists()


def test_no_more_principal_directions_than_there_are(train_arguments, tmp_path):
    error = refused(train_arguments, tmp_path / "model", "--dim", 4096, "--projection", "principal")
    assert "--dim 4096, but the encoder has" in error and not list(tmp_path.iterdir())
