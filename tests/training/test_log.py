"""log.jsonl and wandb."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, succeed
from toy_training import losses, train

from nanocolbert.text import FRAME
from nanocolbert.training.log import read_log, start_wandb, wandb_mode
from nanocolbert.training.triples import Triples


def test_lines_of_steps(train_arguments, tokens_dir, tmp_path):
    """Learning rates of the schedule, norms before they are clipped, and a rate of the tokens that were read."""
    flags = ("--warmup_steps", 3, "--schedule", "linear", "--max_grad_norm", 1e-3, "--gradient_accumulation_steps", 2)
    train(train_arguments, tmp_path / "model", *flags, "--max_steps", 6)
    lines = read_log(tmp_path / "model/log.jsonl")
    assert [list(line) for line in lines] == [["step", "loss", "lr", "grad_norm", "seconds", "tokens_per_second"]] * 6
    factors = [1 / 4, 2 / 4, 3 / 4, 1, 2 / 3, 1 / 3]
    assert [line["lr"] for line in lines] == pytest.approx([2e-3 * factor for factor in factors])
    assert all(line["grad_norm"] > 1e-3 and line["seconds"] > 0 for line in lines)
    data = Triples(tokens_dir, 8, None)
    for step, line in enumerate(lines):
        rows = data.rows(step)
        passages = np.concatenate([np.unique(half[:, 1:]) for half in np.split(rows, 2)])  # each micro-batch's, once
        tokens = len(rows) * 32 + int((data.passages.lengths(passages) + FRAME).sum())
        assert line["seconds"] * line["tokens_per_second"] == pytest.approx(tokens, rel=1e-3)  # both are rounded


def test_terms_and_temperature(train_arguments, tmp_path):
    flags = ("--loss", "in_batch", "softmax=0.5", "--temperature", 0.5, "--learn_temperature", "--max_steps", 3)
    train(train_arguments, tmp_path / "model", *flags)
    lines = read_log(tmp_path / "model/log.jsonl")
    assert list(lines[0])[:5] == ["step", "loss", "loss_in_batch", "loss_softmax", "lr"]
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss_in_batch"] + line["loss_softmax"] / 2, rel=1e-5)
    temperatures = [line["temperature"] for line in lines]
    assert temperatures[0] == pytest.approx(0.5) and len(set(temperatures)) == 3


def test_no_norm_where_nothing_is_clipped(train_arguments, tmp_path):
    train(train_arguments, tmp_path / "model", "--max_grad_norm", 0, "--max_steps", 2)
    assert not any("grad_norm" in line for line in read_log(tmp_path / "model/log.jsonl"))


def test_a_log_of_before_goes_on(train_arguments, tmp_path):
    """One of losses alone: it is kept as it is, drawn, and gone on with."""
    flags = (*train_arguments, "--save_steps", 4)
    train(flags, tmp_path / "model")
    (tmp_path / "model/meta.json").unlink()
    log = tmp_path / "model/log.jsonl"
    before = [{"step": line["step"], "loss": line["loss"]} for line in read_log(log)]
    log.write_text("".join(json.dumps(line) + "\n" for line in before))
    train(flags, tmp_path / "model", "--resume")
    lines = read_log(log)
    assert lines[:4] == before[:4] and all("lr" in line for line in lines[4:])


def test_half_a_line_in_the_log_is_passed_over(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 2}] and read_log(tmp_path / "none") == []


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
