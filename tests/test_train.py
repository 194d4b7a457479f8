"""Training: the loss against plain Python, and the same losses however the steps were computed."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TRAIN_STEPS, call_stage, launch_cli, succeed, toy_inputs
from transformers import BertTokenizerFast

from compute import mixed_precision
from model import ColBERT, model_fingerprint
from train import Triples, collate, list_checkpoints, read_log, save_model, triples_loss, wandb_mode


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


@pytest.mark.parametrize("processes", [2, 4])
def test_same_losses_by_processes(model_dir, train_arguments, tmp_path, processes):
    done = succeed(launch_cli(processes, "train.py", *train_arguments, "--output_dir", tmp_path / "model"))
    assert json.loads(done.stdout.splitlines()[-1])["processes"] == processes
    assert losses(tmp_path / "model") == pytest.approx(losses(model_dir), rel=1e-4)


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
    assert "needs --dev_queries, --dev_qrels and --dev_candidates" in message
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
