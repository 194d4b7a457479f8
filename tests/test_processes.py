"""Several processes, as a user launches them: the same losses and files, on one machine or two, whoever is ended."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands import launch
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from conftest import ROOT, TRAIN_STEPS, call_stage, launch_cli, launch_command, succeed, without_gpus

from nanocolbert import cli
from nanocolbert.training.log import read_log
from nanocolbert.training.resume import list_checkpoints

ARRAYS = ("values.npy", "offsets.npy", "pids.npy")


def losses(folder: Path) -> list[float]:
    lines = read_log(folder / "log.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def start(*command) -> subprocess.Popen:
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=without_gpus(), **pipes)


def ranks(output: Path) -> list[int]:
    """The processes that run train.py into this folder, rank 0 first; not those that launched them."""
    listed = subprocess.run(["ps", "-eww", "-o", "pid=,args="], capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in listed.splitlines() if str(output) in line]
    return sorted(int(words[0]) for words in lines if "train.py" in words[2:5] and "accelerate" not in " ".join(words))


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.time() + seconds
    while not condition() and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    assert condition(), process.communicate(timeout=seconds)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def launch_on_two_machines(script, *arguments) -> list[dict]:
    """Two launches at once, of a process each; returns what the stage reports (only the first has anything to)."""
    settings = {"num_machines": 2, "main_process_ip": "127.0.0.1", "main_process_port": free_port()}
    launches = [start(*launch_command(2, script, *arguments, **settings, machine_rank=rank)) for rank in (0, 1)]
    done = [launch.communicate(timeout=300) for launch in launches]
    assert [launch.returncode for launch in launches] == [0, 0], done
    return [json.loads(line) for out, _ in done for line in out.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("processes", [2, 4])
def test_training(model_dir, train_arguments, tmp_path, processes):
    done = succeed(launch_cli(processes, "train.py", *train_arguments, "--output_dir", tmp_path / "model"))
    assert json.loads(done.stdout.splitlines()[-1])["processes"] == processes
    assert losses(tmp_path / "model") == pytest.approx(losses(model_dir), rel=1e-4)


def test_embedding_by_four(embedding_dir, embedding_arguments, tmp_path):
    """(By two: test_doc2embedding.py.)"""
    succeed(launch_cli(4, "doc2embedding.py", *embedding_arguments, "--output_dir", tmp_path / "e"))
    assert all((tmp_path / "e" / name).read_bytes() == (embedding_dir / name).read_bytes() for name in ARRAYS)


def test_two_machines(model_dir, train_arguments, embedding_dir, embedding_arguments, tmp_path):
    (report,) = launch_on_two_machines("train.py", *train_arguments, "--output_dir", tmp_path / "model")
    assert report["processes"] == 2 and losses(tmp_path / "model") == pytest.approx(losses(model_dir), rel=1e-4)
    (report,) = launch_on_two_machines("doc2embedding.py", *embedding_arguments, "--output_dir", tmp_path / "e")
    assert report["processes"] == 2
    assert all((tmp_path / "e" / name).read_bytes() == (embedding_dir / name).read_bytes() for name in ARRAYS)


def test_ended_and_gone_on_with(train_arguments, tmp_path):
    """SIGTERM to one of two: both save the same step. SIGKILL of one: the launch ends, says so, and nothing stays."""
    folder = tmp_path / "model"
    command = launch_command(2, "train.py", *train_arguments, "--output_dir", folder, "--max_steps", 10**6, "--resume")

    def steps() -> int:
        return (folder / "log.jsonl").read_text().count("\n") if (folder / "log.jsonl").exists() else 0

    process = start(*command, "--save_steps", "1000000")
    wait_for(lambda: steps() > 2, process)
    os.kill(ranks(folder)[1], signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    (checkpoint,) = list_checkpoints(folder / "checkpoints")
    last = int(checkpoint.name.removeprefix("step-"))
    assert f"train.py: stopped by SIGTERM after step {last}, which is saved: go on with --resume" in err
    assert "exitcode  : 143" in err and process.returncode and last == steps() and not ranks(folder)

    process = start(*command, "--save_steps", "4")
    wait_for(lambda: steps() > last + 8, process)
    os.kill(ranks(folder)[1], signal.SIGKILL)
    ended = time.time()
    _, err = process.communicate(timeout=60)
    assert time.time() - ended < 60 and process.returncode and not ranks(folder)
    assert "Signal 9 (SIGKILL) received by PID" in err
    assert "train.py: error: another process of this training has ended" in err or "train.py: ended by SIGTERM" in err

    # One process goes on: without dropout it is the same run.
    last = int(list_checkpoints(folder / "checkpoints")[-1].name.removeprefix("step-"))
    flags = (*train_arguments, "--max_steps", last + TRAIN_STEPS)
    refused = call_stage("train.py", *flags, "--output_dir", folder, "--resume", "--loss", "in_batch")
    assert refused.returncode == 2 and "trained with loss ['softmax'], now ['in_batch']" in refused.stderr
    succeed(call_stage("train.py", *flags, "--output_dir", folder, "--resume"))
    succeed(call_stage("train.py", *flags, "--output_dir", tmp_path / "uninterrupted"))
    assert losses(folder) == pytest.approx(losses(tmp_path / "uninterrupted"), rel=1e-3)


@pytest.mark.parametrize("flags", [("--cpu",), ()])
def test_a_launch_of_one_is_no_launch_of_two(monkeypatch, train_arguments, tmp_path, flags):
    """In the environment that `accelerate launch` gives the one process which it starts without --multi_gpu."""
    parser = launch.launch_command_parser()
    words = (*flags, "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no", "train.py")
    command, environment = prepare_simple_launcher_cmd_env(
        launch._validate_launch_command(parser.parse_args(list(map(str, words))))[0]
    )
    assert command == [sys.executable, "train.py"]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = call_stage("train.py", *train_arguments, "--output_dir", tmp_path / "model")
    assert done.returncode == 2 and "launched as one process, where several were asked for" in done.stderr
    assert "accelerate launch --multi_gpu --num_processes N train.py ... --cpu" in done.stderr
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("file", ["train.py", "doc2embedding.py", "configs/msmarco.sh"])
def test_launches_that_draw_no_advice(file, monkeypatch):
    """The commands of docstrings and of the driver say all that accelerate would else tell to say."""
    text = (ROOT / file).read_text().replace("\\\\\n", " ").replace('"$GPUS"', "4")
    (words,) = re.findall(r"accelerate(?: |\.commands\.)launch([^)]*?)(?:\w+\.py|\))", text)
    said = []
    monkeypatch.setattr(launch.logger, "warning", said.append)
    command = [*words.split(), "train.py"]
    args = launch._validate_launch_command(launch.launch_command_parser().parse_args(command))[0]
    assert args.multi_gpu and args.num_processes > 1 and not said


@pytest.mark.parametrize("environment", [{}, {"ACCELERATE_USE_CPU": "True"}, {"MASTER_ADDR": "a"}, "several"])
def test_other_launches(monkeypatch, environment):
    for name in ("WORLD_SIZE", "ACCELERATE_USE_CPU", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    if environment == "several":
        environment = {"WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "a"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cli.check_launch()


def test_a_signal_that_the_launcher_passes_on_is_one_signal(tmp_path):
    """A terminal sends Ctrl-C to all processes, the launcher to those it started: the second is no wish to hurry."""
    script = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from nanocolbert import cli
cli.catch_signals()
soft = cli.stop_softly()
print("ready", flush=True)
while not soft: time.sleep(0.01)
time.sleep(0.5)
print("saved", flush=True)
time.sleep(60)
"""
    command, environment = [sys.executable, "-c", script], {**os.environ, "WORLD_SIZE": "2"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "ready\n"
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    assert process.stdout.readline() == "saved\n" and process.poll() is None
    time.sleep(cli.ECHO)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
