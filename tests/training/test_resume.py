"""Checkpoints: what is killed, stopped or damaged goes on to the same losses and bytes, or says what to do."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, call_stage
from toy_training import STOPPED, killed_at, refused, train

import train as train_stage
from model import ColBERT
from nanocolbert import cli
from nanocolbert.checkpoints.layouts import model_fingerprint
from nanocolbert.cli import InputError
from nanocolbert.storage.artifact import SUM, read_json, verify
from nanocolbert.storage.checksums import check_sums
from nanocolbert.training.log import Log, read_log
from nanocolbert.training.losses import Objective
from nanocolbert.training.resume import (
    BEFORE,
    check_same_draws,
    check_same_settings,
    list_checkpoints,
    of_before,
    save_checkpoint,
)

NEW = ("files", "processes", "device", SUM, *BEFORE, "markers", "expand_queries_to")  # in run.json
PARTS = ("model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "run.json")


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
    old = {key: saved[key] for key in saved if key not in NEW}
    (checkpoint / "run.json").write_text(json.dumps({**old, "in_batch_negatives": False}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


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
        "bf16",
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


class Stopping(Log):
    """A log whose training is sent a signal while it computes step 5."""

    number = signal.SIGTERM

    def add(self, *step):
        super().add(*step)
        if self.step + len(self.steps) == 5:
            self.signals.append(self.number)


def untimed(log: Path) -> list[dict]:
    """Lines of a log, but for the time that steps took."""
    return [{k: line[k] for k in line if k not in ("seconds", "tokens_per_second")} for line in read_log(log)]


LOSSES = ("--loss", "in_batch", "softmax=0.5", "--temperature", 0.5, "--learn_temperature", "--cached_parts", 2)


@pytest.mark.parametrize("number, others", [(signal.SIGTERM, ()), (signal.SIGINT, LOSSES)])
def test_stopped_and_resumed(train_arguments, toy_dir, tmp_path, monkeypatch, number, others):
    """A signal saves a checkpoint, from which --resume goes on to the very same bytes, and to the same evaluations."""
    names = ("queries", "qrels", "candidates")
    flags = [*train_arguments, *STOPPED, *(part for n in names for part in (f"--dev_{n}", toy_dir / f"{n}.tsv"))]
    flags += ["--eval_steps", 5, *others]
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
    for name in ("model.safetensors", "best/model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert untimed(tmp_path / "a/log.jsonl") == untimed(tmp_path / "b/log.jsonl")


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


def test_a_run_of_before_read_as_v1():
    """It does not go on with another way of reading, but on a ColBERT, which has its own."""
    new = {"projection": "orthogonal", "markers": True, "expand_queries_to": None, **BEFORE}
    check_same_settings(Path("step-1"), of_before(new) | {"projection": "orthogonal"}, new)
    for flag in ({"markers": False}, {"expand_queries_to": 0}, {"pool_factor": 2}):
        other = new | flag
        with pytest.raises(InputError, match=f"trained with {min(flag)} .*, now {min(flag.values())}"):
            check_same_settings(Path("step-1"), of_before(other) | {"projection": "orthogonal"}, other)
    on_colbert = new | {"projection": None, "markers": False, "expand_queries_to": 32}
    check_same_settings(Path("step-1"), of_before(on_colbert) | {"projection": None}, on_colbert)


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
    def check(processes, device, drops):
        accelerator = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
        check_same_draws(accelerator, Path("step-1"), processes, device, drops)

    for same in ((2, "cpu", True), (2, None, True), (1, "cuda", False), (4, "cpu", False)):
        check(*same)
    for other, said in (
        ((4, None, True), r"trained by 4 process\(es\), now 2, which would draw other dropout"),
        ((2, "cuda", True), "trained on cuda, now on cpu, which would draw other dropout"),
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


def test_no_fewer_steps_than_were_done(stopped, train_arguments, tmp_path):
    shutil.copytree(stopped, tmp_path / "model")
    message = refused(train_arguments, tmp_path / "model", *STOPPED, "--resume", "--max_steps", 5)
    assert "step-0000006: already past --max_steps 5" in message


def test_a_damaged_log(stopped, train_arguments, tmp_path):
    for line in ('{"step": "x", "loss": 1}', "[]", "{", "", "\0", '{"loss": 1.0}'):
        shutil.copytree(stopped, tmp_path / "model", dirs_exist_ok=True)
        lines = (stopped / "log.jsonl").read_text().splitlines()
        (tmp_path / "model/log.jsonl").write_text("\n".join([lines[0], line, *lines[2:]]) + "\n")
        message = refused(train_arguments, tmp_path / "model", *STOPPED, "--resume")
        assert "log.jsonl:2: not a line of a log" in message


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
        save_checkpoint(OneProcess(), model, Objective(), {}, folder, step, 2)
    whole, steps = list_checkpoints(folder), itertools.count(3)
    for n in range(99):
        ended = killed_at(n, lambda: save_checkpoint(OneProcess(), model, Objective(), {}, folder, next(steps), 2))
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
