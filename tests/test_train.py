"""Training: the loss against plain Python, and the same losses however the steps were computed."""

import itertools
import json
import math
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TRAIN_STEPS, call_stage, succeed, toy_inputs
from safetensors.torch import load_file, save_file
from transformers import BertTokenizerFast

import train as train_stage
from model import ColBERT
from nanocolbert import cli
from nanocolbert.checkpoints.layouts import model_fingerprint
from nanocolbert.cli import InputError
from nanocolbert.compute import mixed_precision
from nanocolbert.storage.artifact import SUM, check_output_dir, check_sums, lock, read_json, read_meta, verify
from train import (
    Triples,
    check_same_draws,
    collate,
    drops,
    list_checkpoints,
    read_log,
    save_checkpoint,
    save_model,
    start_wandb,
    triples_loss,
    wandb_mode,
    with_dropout,
)


def losses(folder) -> list[float]:
    """Losses of the log, after checking that every step has exactly one line."""
    lines = [line for line in read_log(folder / "log.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def train(train_arguments, folder, *flags) -> list[float]:
    succeed(call_stage("train.py", *train_arguments, "--output_dir", folder, *flags))
    return losses(folder)


def refused(train_arguments, folder, *flags) -> str:
    done = call_stage("train.py", *train_arguments, "--output_dir", folder, *flags)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


# -------------------------------------------------------------------------------------------------------------- loss


def cross_entropy(logits: list[float]) -> float:
    """Of the first logit against the others."""
    return math.log(sum(math.exp(logit - logits[0]) for logit in logits))


def l2_score(query, passage) -> float:
    """v1's similarity: the sum over query tokens of the largest -|q - d|^2."""
    return sum(max(-sum((a - b) ** 2 for a, b in zip(q, d, strict=True)) for d in passage) for q in query)


def dot_score(query, passage) -> float:
    return sum(max(sum(a * b for a, b in zip(q, d, strict=True)) for d in passage) for q in query)


@pytest.fixture
def batch():
    """Q (3, 4, 5), P (3 * 2, 6, 5) of unit vectors, a mask with holes, and rows in which passage 7 stands four times:
    as the positive of two queries, and as a negative of another one and of its own."""
    generator = torch.Generator().manual_seed(0)
    Q = torch.nn.functional.normalize(torch.randn(3, 4, 5, generator=generator), dim=-1)
    P = torch.nn.functional.normalize(torch.randn(6, 6, 5, generator=generator), dim=-1)
    kept = torch.rand(6, 6, generator=generator) < 0.6
    kept[:, 0] = True
    rows = torch.tensor([[7, 3], [9, 7], [7, 4]])
    for copy in (3, 4):
        P[copy], kept[copy] = P[0], kept[0]
    return Q, P, kept, rows


@pytest.mark.parametrize("scale, score", [(2.0, l2_score), (1.0, dot_score)])
def test_loss_of_triples(batch, scale, score):
    Q, P, kept, rows = batch
    texts = [passage[keep].tolist() for passage, keep in zip(P, kept, strict=True)]
    expected = [cross_entropy([score(Q[b].tolist(), texts[2 * b + k]) for k in range(2)]) for b in range(3)]
    loss = triples_loss(Q, P, kept, rows, scale, in_batch_negatives=False)
    assert loss.item() == pytest.approx(sum(expected) / 3, rel=1e-5)


@pytest.mark.parametrize("scale, score", [(2.0, l2_score), (1.0, dot_score)])
def test_loss_with_in_batch_negatives(batch, scale, score):
    Q, P, kept, rows = batch
    texts = [passage[keep].tolist() for passage, keep in zip(P, kept, strict=True)]
    numbers, expected = rows.view(-1).tolist(), []
    for b in range(3):
        others = [i for i in range(6) if i != 2 * b and numbers[i] != numbers[2 * b]]
        assert len(others) == (5 if b == 1 else 3)
        expected.append(cross_entropy([score(Q[b].tolist(), texts[i]) for i in [2 * b, *others]]))
    loss = triples_loss(Q, P, kept, rows, scale, in_batch_negatives=True)
    assert loss.item() == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_loss_with_more_negatives(batch):
    Q, P, kept, _ = batch
    rows = torch.arange(6).view(2, 3)
    texts = [passage[keep].tolist() for passage, keep in zip(P, kept, strict=True)]
    expected = [cross_entropy([dot_score(Q[b].tolist(), texts[3 * b + k]) for k in range(3)]) for b in range(2)]
    assert triples_loss(Q[:2], P, kept, rows, 1.0, False).item() == pytest.approx(sum(expected) / 2, rel=1e-5)


# -------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("packed", [False, True])
def test_embeddings_of_a_batch(tokens_dir, model_dir, packed):
    """Of each text alone, however the batch is computed."""
    model, data = ColBERT.from_pretrained(model_dir), Triples(tokens_dir, 8, None)
    rows = data.rows(1)
    batch = collate(data, rows, model, 64, packed)
    assert (len(batch["inputs"]["batches"]) == 1) == packed
    Q, P = model(**batch["inputs"])
    for query, row in zip(Q, rows[:, 0], strict=True):
        alone = model.embed(model.frame_queries(*data.queries.gather(np.array([row]))))[0]
        assert torch.allclose(query, alone, atol=1e-5)
    for passage, mask, row in zip(P, batch["mask"], rows[:, 1:].reshape(-1), strict=True):
        ids, attention_mask = model.frame_passages(*data.passages.gather(np.array([row])))
        alone = model.embed((ids, attention_mask))[model.kept(ids, attention_mask)]
        assert torch.allclose(passage[mask], alone, atol=1e-5)


def test_packed_and_padded_gradients_agree(tokens_dir, model_dir):
    model, data = ColBERT.from_pretrained(model_dir), Triples(tokens_dir, 8, None)
    gradients = []
    for packed in (False, True):
        batch = collate(data, data.rows(1), model, 64, packed)
        loss = triples_loss(*model(**batch["inputs"]), batch["mask"], batch["passage_rows"], 2.0, True)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for padded, packed in zip(*gradients, strict=True):
        assert torch.allclose(padded, packed, atol=1e-5), (padded - packed).abs().max()


def test_batches_in_file_order_begin_again(tokens_dir):
    triples = np.load(tokens_dir / "triples.npy").tolist()
    data = Triples(tokens_dir, 24, None)
    found = [row for step in range(6) for row in data.rows(step).tolist()]
    assert found == (triples * 3)[:144]


def test_shuffled_epochs(tokens_dir):
    triples = np.load(tokens_dir / "triples.npy").tolist()
    data = Triples(tokens_dir, 24, 1)
    found = [row for step in range(8) for row in data.rows(step).tolist()]  # 192 = 3 epochs of 64
    epochs = [found[:64], found[64:128], found[128:]]
    assert all(sorted(epoch) == sorted(triples) and epoch != triples for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert Triples(tokens_dir, 24, 1).rows(5).tolist() == found[120:144]  # a step needs no step before it
    assert Triples(tokens_dir, 24, 2).rows(0).tolist() != found[:24]


# ---------------------------------------------------------------------------------------------------------- training


def test_a_model_comes_out(model_dir, encoder_dir):
    assert len(losses(model_dir)) == TRAIN_STEPS
    assert {path.name for path in model_dir.iterdir()} >= {"config.json", "meta.json", "log.jsonl", "loss.png"}
    assert not (model_dir / "model.new").exists() and not list(model_dir.rglob("*.partial"))
    meta = json.loads((model_dir / "meta.json").read_text())
    assert meta["kind"] == "model" and meta["steps"] == TRAIN_STEPS and meta["processes"] == 1
    assert meta["mixed_precision"] == meta["args"]["mixed_precision"] == mixed_precision("cpu")  # found out
    model = ColBERT.from_pretrained(model_dir)
    base = ColBERT.from_base(encoder_dir, dim=16)
    changed = [not torch.equal(weights, base.state_dict()[name]) for name, weights in model.state_dict().items()]
    assert len(changed) > 20 and sum(changed) > len(changed) - 3  # position embeddings past the longest text and such


@pytest.mark.parametrize("parts", [2, 4])
def test_same_losses_by_accumulation(model_dir, train_arguments, tmp_path, parts):
    found = train(train_arguments, tmp_path / "model", "--gradient_accumulation_steps", parts)
    assert found == pytest.approx(losses(model_dir), rel=1e-4)


def test_shuffle_is_another_order_and_reproducible(model_dir, train_arguments, tmp_path):
    shuffled = [train(train_arguments, tmp_path / name, "--shuffle") for name in ("a", "b")]
    assert shuffled[0] == pytest.approx(shuffled[1], rel=1e-6)
    assert shuffled[0] != pytest.approx(losses(model_dir), rel=1e-3)


def test_killed_and_resumed(train_arguments, tmp_path):
    """SIGKILL, then --resume: the losses and the weights of a run that was never interrupted, dropout and all."""
    flags = [*train_arguments, "--dropout", 0.1, "--save_steps", 4, "--log_steps", 3, "--shuffle", "--warmup_steps", 9]
    command = [sys.executable, "train.py", *map(str, flags), "--output_dir", str(tmp_path / "a")]
    checkpoints = tmp_path / "a/checkpoints"
    with open(tmp_path / "out.txt", "w") as out:
        process = subprocess.Popen([*command, "--max_steps", "20000"], cwd=ROOT, stdout=out, stderr=out)
        deadline = time.time() + 300
        try:
            while not list_checkpoints(checkpoints) and process.poll() is None and time.time() < deadline:
                time.sleep(0.01)
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL, (tmp_path / "out.txt").read_text()
    assert not (tmp_path / "a/meta.json").exists()
    last = int(list_checkpoints(checkpoints)[-1].name.removeprefix("step-"))
    with open(tmp_path / "a/log.jsonl", "a") as log:
        log.write('{"step": 99')  # as a kill may leave it

    steps = ("--max_steps", last + 6)
    assert "go on with --resume" in refused(flags, tmp_path / "a", *steps)
    assert "trained with lr 0.002, now 0.5" in refused(flags, tmp_path / "a", *steps, "--resume", "--lr", 0.5)
    assert "trained with mixed_precision" in refused(
        flags,
        tmp_path / "a",
        *steps,
        "--resume",
        "--mixed_precision",
        "no" if mixed_precision("cpu") != "no" else "bf16",
    )
    resumed = train(flags, tmp_path / "a", *steps, "--resume")
    uninterrupted = train(flags, tmp_path / "b", *steps)
    assert len(resumed) == last + 6 and resumed == pytest.approx(uninterrupted, rel=1e-4)
    models = [ColBERT.from_pretrained(tmp_path / name).state_dict() for name in "ab"]
    for name, weights in models[0].items():
        assert torch.allclose(weights, models[1][name], atol=1e-5), name
    assert "holds a finished model" in refused(flags, tmp_path / "a", *steps, "--resume")


def test_checkpoints_are_models_and_only_the_last_are_kept(train_arguments, tmp_path):
    arguments = (*train_arguments, "--max_steps", 21, "--save_steps", 3, "--keep_checkpoints", 3)
    train(arguments, tmp_path / "model")
    checkpoints = list_checkpoints(tmp_path / "model/checkpoints")
    assert [path.name for path in checkpoints] == ["step-0000012", "step-0000015", "step-0000018"]
    assert ColBERT.from_pretrained(checkpoints[-1]).config.dim == 16
    model_fingerprint(checkpoints[-1])


def test_checkpoints_are_ordered_as_numbers(tmp_path):
    for name in ("step-9", "step-10", "step-0000002", "step-x", "step-11.partial"):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-0000002", "step-9", "step-10"]


@pytest.mark.parametrize(
    "flags", [("--similarity", "l2"), ("--similarity", "cosine", "--in_batch_negatives", "--schedule", "linear")]
)
def test_the_loss_falls(train_arguments, tmp_path, flags):
    found = train(train_arguments, tmp_path / "model", "--max_steps", 60, "--dropout", 0.1, *flags)
    assert np.mean(found[-8:]) < 0.5 * np.mean(found[:8]), found


def test_evaluation_while_training(train_arguments, toy_dir, tmp_path):
    dev = {"queries": "queries.tsv", "qrels": "qrels.tsv", "candidates": "candidates.tsv"}
    flags = [part for name, file in dev.items() for part in (f"--dev_{name}", toy_dir / file)]
    folder = tmp_path / "model"
    with_dropout = (*train_arguments, "--dropout", 0.1)
    with_dev = train(with_dropout, folder, *flags, "--eval_steps", 3)
    lines = [line for line in read_log(folder / "log.jsonl") if "dev_mrr@10" in line]
    assert [line["step"] for line in lines] == [3, 6, 8]
    values = [line["dev_mrr@10"] for line in lines]
    assert all(0 < value <= 1 for value in values)
    meta = json.loads((folder / "meta.json").read_text())
    best = json.loads((folder / "best/meta.json").read_text())
    assert meta["best_dev_mrr@10"] == best["dev_mrr@10"] == max(values)
    assert best["step"] == lines[values.index(max(values))]["step"]

    # The last value is what the finished model gives by hand.
    model = ColBERT.from_pretrained(folder)
    rows = {name: [line.split("\t") for line in (toy_dir / name).read_text().splitlines()] for name in dev.values()}
    passages = dict(line.split("\t") for line in (toy_dir / "collection.tsv").read_text().splitlines())
    relevant = {qid: pid for qid, _, pid, _ in rows["qrels.tsv"]}
    scores = model.score([text for _, text in rows["queries.tsv"]], list(passages.values()))
    ranks = []
    for (qid, _), row in zip(rows["queries.tsv"], scores, strict=True):
        own = list(passages).index(relevant[qid])
        ranks.append(1 + int((row > row[own]).sum()))
    mrr = np.mean([1 / rank if rank <= 10 else 0 for rank in ranks])
    assert values[-1] == pytest.approx(mrr, abs=0.05)  # bf16, batched otherwise: near ties may change places

    # Looking does not change what is seen: dropout comes on again.
    assert with_dev == pytest.approx(train(with_dropout, tmp_path / "without"), rel=1e-6)


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


# ---------------------------------------------------------------------------------------------------------- mistakes


def test_mistakes(train_arguments, toy_dir, encoder_dir, tmp_path):
    folder = tmp_path / "model"
    message = refused(train_arguments, folder, "--batch_size", 9, "--gradient_accumulation_steps", 2)
    assert "--batch_size 9 does not divide among 1 process(es) x 2 accumulation step(s)" in message
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


def test_another_tokenizer(train_arguments, encoder_dir, tmp_path):
    shutil.copytree(encoder_dir, tmp_path / "other")
    vocabulary = (encoder_dir / "vocab.txt").read_text().splitlines()
    vocabulary[5], vocabulary[6] = vocabulary[6], vocabulary[5]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast.from_pretrained(tmp_path).save_pretrained(tmp_path / "other")
    message = refused(train_arguments, tmp_path / "model", "--base_model", tmp_path / "other")
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


# ------------------------------------------------------------------------------------------------------- where it goes


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


# ----------------------------------------------------------------------------------------------------------- stopping


class Stopping(train_stage.Log):
    """A log whose training is sent a signal while it computes step 5."""

    number = signal.SIGTERM

    def add(self, loss):
        super().add(loss)
        if self.step + len(self.losses) == 5:
            self.signals.append(self.number)


STOPPED = ("--dropout", 0.1, "--log_steps", 3, "--shuffle", "--warmup_steps", 3, "--mixed_precision", "no")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_and_resumed(train_arguments, toy_dir, tmp_path, monkeypatch, number):
    """A signal saves a checkpoint, from which --resume goes on to the very same bytes, and to the same evaluations."""
    names = ("queries", "qrels", "candidates")
    flags = [*train_arguments, *STOPPED, *(part for n in names for part in (f"--dev_{n}", toy_dir / f"{n}.tsv"))]
    flags += ["--eval_steps", 5]
    with monkeypatch.context() as patch:
        patch.setattr(Stopping, "number", number)
        patch.setattr(train_stage, "Log", Stopping)
        patch.setattr(cli, "stop_softly", list)
        done = call_stage("train.py", *flags, "--output_dir", tmp_path / "a")
    assert (
        done.returncode == 128 + number and "after step 5, which is saved: go on with" in done.stderr.splitlines()[-1]
    )
    assert number.name in done.stderr and not (tmp_path / "a/meta.json").exists()
    assert [path.name for path in list_checkpoints(tmp_path / "a/checkpoints")] == ["step-0000005"]
    assert not (tmp_path / "a/best").exists()  # it ends at once: to be measured later
    train(flags, tmp_path / "a", "--resume")
    train(flags, tmp_path / "b")
    for name in ("model.safetensors", "log.jsonl", "best/model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


# -------------------------------------------------------------------------------------------------- damaged checkpoints


@pytest.fixture(scope="module")
def stopped(train_arguments, tmp_path_factory) -> Path:
    """The folder of a training that was cut off after step 6, with checkpoints of 3 and 6."""
    folder = tmp_path_factory.mktemp("stopped") / "model"
    train(train_arguments, folder, *STOPPED, "--save_steps", 3)
    (folder / "meta.json").unlink()
    return folder


def as_before(checkpoint: Path) -> None:
    """Make a checkpoint one from before there were checksums."""
    saved = json.loads((checkpoint / "run.json").read_text())
    new = ("files", "processes", "device", SUM)
    (checkpoint / "run.json").write_text(json.dumps({key: saved[key] for key in saved if key not in new}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


PARTS = ("model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "run.json")


@pytest.mark.parametrize("harm", [Path.unlink, cut, flip, lambda path: path.write_bytes(b"")])
def test_damaged_checkpoints(stopped, train_arguments, tmp_path, harm):
    """Each file of a checkpoint, by name, with what to do; then that is done."""
    for name in PARTS:
        shutil.copytree(stopped, tmp_path / name)
        harm(tmp_path / name / "checkpoints/step-0000006" / name)
        message = refused(train_arguments, tmp_path / name, *STOPPED, "--resume")
        assert f"step-0000006/{name}" in message
        assert "step-0000006, then --resume goes on from step-0000003" in message
    shutil.rmtree(tmp_path / name / "checkpoints/step-0000006")
    train(train_arguments, tmp_path / name, *STOPPED, "--resume")
    assert (tmp_path / name / "model.safetensors").read_bytes() == (stopped / "model.safetensors").read_bytes()


@pytest.mark.parametrize("harm", [Path.unlink, cut, lambda path: path.write_bytes(b"x" * 999)])
def test_damaged_checkpoints_of_before(stopped, train_arguments, tmp_path, harm):
    for name in PARTS[:-1]:
        shutil.copytree(stopped, tmp_path / name)
        as_before(tmp_path / name / "checkpoints/step-0000006")
        harm(tmp_path / name / "checkpoints/step-0000006" / name)
        message = refused(train_arguments, tmp_path / name, *STOPPED, "--resume")
        assert "step-0000006" in message and "then --resume goes on from step-0000003" in message


def test_a_checkpoint_of_before_goes_on(stopped, train_arguments, tmp_path):
    shutil.copytree(stopped, tmp_path / "model")
    as_before(tmp_path / "model/checkpoints/step-0000006")
    train(train_arguments, tmp_path / "model", *STOPPED, "--resume")
    assert (tmp_path / "model/model.safetensors").read_bytes() == (stopped / "model.safetensors").read_bytes()


def test_a_checkpoint_of_before_on_a_colbert(model_dir, train_arguments, tmp_path):
    """Flags that once said nothing are recorded there: they are no other run, but those that say something now are."""
    flags = (*train_arguments, "--base_model", model_dir)
    flags = [flag for i, flag in enumerate(flags) if "--dropout" not in flags[max(0, i - 1) : i + 1]]
    train(flags, tmp_path / "model", "--save_steps", 4)
    (tmp_path / "model/meta.json").unlink()
    checkpoint = tmp_path / "model/checkpoints/step-0000004"
    as_before(checkpoint)
    saved = json.loads((checkpoint / "run.json").read_text())
    saved |= {"dim": 128, "projection": "principal", "dropout": 0.1, "attention_dropout": 0.0}
    (checkpoint / "run.json").write_text(json.dumps(saved))
    message = refused(flags, tmp_path / "model", "--resume", "--dropout", 0.1)
    assert "trained with dropout None, now 0.1" in message
    train(flags, tmp_path / "model", "--resume")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_nothing_pickled_is_run(stopped, train_arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in PARTS[1:-1]:
        shutil.copytree(stopped, tmp_path / name)
        as_before(tmp_path / name / "checkpoints/step-0000006")
        torch.save(Evil(), tmp_path / name / "checkpoints/step-0000006" / name)
        assert "cannot be loaded" in refused(train_arguments, tmp_path / name, *STOPPED, "--resume")
        assert not (tmp_path / "evil").exists()


def test_other_processes_or_devices_are_another_run():
    def check(processes, device, in_batch, drops, now=2):
        device_now = torch.device("cpu")
        accelerator = SimpleNamespace(num_processes=now, device=device_now)
        check_same_draws(accelerator, Path("step-1"), processes, device, in_batch, drops)

    for same in ((2, "cpu", True, True), (2, None, True, True), (1, "cuda", False, False), (4, "cpu", False, False)):
        check(*same)
    for other, said in (
        ((1, "cpu", True, False), r"trained by 1 process\(es\), now 2, which would draw other negatives"),
        ((4, None, False, True), r"trained by 4 process\(es\), now 2, which would draw other dropout"),
        ((2, "cuda", False, True), "trained on cuda, now on cpu, which would draw other dropout"),
    ):
        with pytest.raises(InputError, match=said):
            check(*other)


def test_other_processes_are_known_by_the_checkpoint(stopped, train_arguments, tmp_path):
    for name in ("now", "before"):
        checkpoint = shutil.copytree(stopped, tmp_path / name) / "checkpoints/step-0000006"
        if name == "before":
            as_before(checkpoint)
            shutil.copy(checkpoint / "random_states_0.pkl", checkpoint / "random_states_1.pkl")
        else:
            saved = read_json(checkpoint / "run.json")
            (checkpoint / "run.json").write_text(json.dumps({**saved, "processes": 2}))
        message = refused(train_arguments, tmp_path / name, *STOPPED, "--resume")
        assert "trained by 2 process(es), now 1, which would draw other dropout" in message


def test_a_damaged_log(stopped, train_arguments, tmp_path):
    for line in ('{"step": "x", "loss": 1}', "[]", "{", "", "\0", '{"loss": 1.0}'):
        shutil.copytree(stopped, tmp_path / "model", dirs_exist_ok=True)
        lines = (stopped / "log.jsonl").read_text().splitlines()
        (tmp_path / "model/log.jsonl").write_text("\n".join([lines[0], line, *lines[2:]]) + "\n")
        message = refused(train_arguments, tmp_path / "model", *STOPPED, "--resume")
        assert "log.jsonl:2: not a line of a log" in message


def test_no_fewer_steps_than_were_done(stopped, train_arguments, tmp_path):
    shutil.copytree(stopped, tmp_path / "model")
    message = refused(train_arguments, tmp_path / "model", *STOPPED, "--resume", "--max_steps", 5)
    assert "step-0000006: already past --max_steps 5" in message


# ------------------------------------------------------------------------------------------------------------- kills


def killed_at(n: int, function) -> bool:
    """Call it in a child that is killed at its n-th change of a name on disk; returns whether it came to its end."""
    child = os.fork()
    if child == 0:
        changes = iter(range(n))

        def hook(event, _):
            if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir") and next(changes, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            function()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == 0


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


def test_killed_while_the_model_is_put_in_place(stopped, train_arguments, tmp_path):
    """What a kill leaves is no finished model, and the same command with --resume makes it."""
    shutil.copytree(stopped, tmp_path / "model")
    (tmp_path / "model/model.new").mkdir()
    (tmp_path / "model/config.json").rename(tmp_path / "model/model.new/config.json")
    (tmp_path / "model/model.new/meta.json").write_text("{}")
    (tmp_path / "model/model.safetensors").write_text("of another time")
    train(train_arguments, tmp_path / "model", *STOPPED, "--resume")
    assert verify(tmp_path / "model") and not (tmp_path / "model/model.new").exists()
    assert (tmp_path / "model/model.safetensors").read_bytes() == (stopped / "model.safetensors").read_bytes()


class OneProcess:
    """What save_checkpoint needs of an Accelerator."""

    is_main_process, num_processes, device = True, 1, torch.device("cpu")

    def wait_for_everyone(self):
        pass

    def save_state(self, folder, safe_serialization):
        for name in PARTS[:-1]:
            (folder / name).write_text(f"{name} of {folder.name}")


def test_a_checkpoint_is_whole_or_none(encoder_dir, tmp_path):
    model, folder = ColBERT.from_base(encoder_dir, dim=4), tmp_path / "checkpoints"
    for step in (1, 2):
        save_checkpoint(OneProcess(), model, {}, folder, step, 2)
    whole, steps = list_checkpoints(folder), itertools.count(3)
    for n in range(99):
        ended = killed_at(n, lambda: save_checkpoint(OneProcess(), model, {}, folder, next(steps), 2))
        if list_checkpoints(folder)[-1] != whole[-1]:
            next(steps)
        whole = list_checkpoints(folder)
        assert len(whole) >= 2
        for checkpoint in whole:
            check_sums(checkpoint, read_json(checkpoint / "run.json")["files"])
        if ended:
            break
    assert 5 < n < 99 and ended
    assert sorted(folder.iterdir()) == whole and len(whole) == 2


@pytest.mark.parametrize("reason", [RuntimeError("[enforce fail at inline_container.cc:672] . x"), OSError(28, "x")])
def test_a_full_disk_leaves_the_older_checkpoints(train_arguments, tmp_path, monkeypatch, reason):
    save, calls = torch.save, []

    def fill(value, path, *rest):
        calls.append(path)
        if "step-0000006" in str(path):
            Path(path).write_bytes(b"half")
            raise reason
        save(value, path, *rest)

    monkeypatch.setattr(torch, "save", fill)
    done = call_stage("train.py", *train_arguments, "--output_dir", tmp_path / "model", "--save_steps", 3)
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "step-0000006" in error and "free some space" in error
    assert [path.name for path in (tmp_path / "model/checkpoints").iterdir()] == ["step-0000003"]


# ------------------------------------------------------------------------------------------------------- not a number


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


# ------------------------------------------------------------------------------------------------------ small things


def test_half_a_line_in_the_log_is_passed_over(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 2}] and read_log(tmp_path / "none") == []


def test_save_model_spares_what_else_is_in_the_folder(encoder_dir, tmp_path):
    (tmp_path / "log.jsonl").write_text("x")
    save_model(ColBERT.from_base(encoder_dir, dim=4), tmp_path, {"kind": "model"})
    assert (tmp_path / "log.jsonl").read_text() == "x" and ColBERT.from_pretrained(tmp_path).config.dim == 4
    assert not (tmp_path / "model.new").exists()


def test_wandb_mode_never_asks(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert wandb_mode("auto") == "offline" and wandb_mode("online") == "online"
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert wandb_mode("auto") == "online"
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert wandb_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode("auto") == "disabled"


def test_wandb_that_cannot_be_reached(monkeypatch, tmp_path, capsys):
    class Accelerator:
        trackers, asked = [], []

        def init_trackers(self, project, config, options):
            self.asked.append(options["wandb"]["mode"])
            assert not self.trackers
            if self.asked == ["online"]:
                self.trackers.append("that does not start")
                raise RuntimeError("Timed out\nhint")

    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name in ("WANDB_INIT_TIMEOUT", "WANDB_FINISH_TIMEOUT", "WANDB_SILENT"):
        monkeypatch.setenv(name, "1")  # restored afterwards
    start_wandb(Accelerator(), SimpleNamespace(wandb_mode="online", wandb_project="x", output_dir=tmp_path))
    assert Accelerator.asked == ["online", "offline"]
    assert capsys.readouterr().err.endswith("wandb: Timed out: going on offline\n")


def test_wandb_offline_does_not_prompt(train_arguments, tmp_path):
    pytest.importorskip("wandb")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "WANDB_DIR": str(tmp_path / "wandb")}
    (tmp_path / "wandb").mkdir()
    command = [sys.executable, "train.py", *map(str, train_arguments), "--output_dir", str(tmp_path / "model")]
    command += ["--wandb_mode", "auto", "--max_steps", "2"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
        )
    except subprocess.TimeoutExpired:
        pytest.fail("waits for an answer")
    succeed(done)
    assert len(losses(tmp_path / "model")) == 2 and list(tmp_path.rglob("offline-run-*"))


def test_no_more_principal_directions_than_there_are(train_arguments, tmp_path):
    error = refused(train_arguments, tmp_path / "model", "--dim", 4096, "--projection", "principal")
    assert "--dim 4096, but the encoder has" in error and not list(tmp_path.iterdir())
