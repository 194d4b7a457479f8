"""scripts/stage.py with small commands: what is done, what is made again and why, what is removed and what never is."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

# Writes a stage's folder, or a file, from its inputs; says so in calls.txt. --kill: dies half way, the first time.
COMMAND = """
import json, os, pathlib, signal, sys
words = sys.argv[1:]
flags = dict(zip(words[::2], words[1::2]))
with open("calls.txt", "a") as file:
    file.write(" ".join(words) + "\\n")
output = pathlib.Path(flags.get("--output_dir") or flags["--output"])
if "--output" in flags:
    output.write_text(" ".join(words))
else:
    partial = (output / "half").exists()
    output.mkdir(exist_ok=True)
    (output / "half").write_text("going on" if partial else "clean")
    if flags.get("--workers") == "kill" and not partial:
        os.kill(os.getpid(), signal.SIGKILL)
    if flags.get("--workers") == "wait":
        open("waiting", "w").close()
        open("gate").read()
    kind = flags.get("--kind", "tokens")
    if kind == "model":
        (output / "model.safetensors").write_text(flags["--dim"])
    (output / "meta.json").write_text(json.dumps({"kind": kind, "fingerprint": flags.get("--seed")}))
"""


class Pipeline:
    """Three chained stages in a folder of their own: a collection → tokens → model → run."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "make.py").write_text(COMMAND)
        (folder / "collection.tsv").write_text("1\tone\n")

    def command(self, file: str, *words) -> list[str]:
        words = ("out", f"out/{file}", "python", "make.py", *map(str, words))
        return [sys.executable, str(ROOT / "scripts/stage.py"), *words]

    def stage(self, file: str, *words) -> subprocess.CompletedProcess:
        return subprocess.run(self.command(file, *words), cwd=self.folder, capture_output=True, text=True)

    def tokens(self, *words, collection="collection.tsv"):
        arguments = ("--collection", collection, "--output_dir", "out/tokens")
        return self.stage("tokens/meta.json", *arguments, *words)

    def model(self, *words, dim=16):
        arguments = ("--tokens_dir", "out/tokens", "--kind", "model", "--dim", dim, "--output_dir", "out/model")
        return self.stage("model/meta.json", *arguments, *words)

    def search(self):
        return self.stage("colbert.run", "--model", "out/model", "--output", "out/colbert.run")

    def calls(self) -> int:
        """Commands run since the last time."""
        path = self.folder / "calls.txt"
        n = len(path.read_text().splitlines()) if path.exists() else 0
        path.write_text("")
        return n


@pytest.fixture
def pipeline(tmp_path) -> Pipeline:
    return Pipeline(tmp_path)


def lines(done: subprocess.CompletedProcess) -> list[str]:
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if " s: " not in line and "make.py" not in line]


def error(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stdout + done.stderr
    return done.stderr


def run_all(pipeline, **model) -> list[str]:
    return lines(pipeline.tokens()) + lines(pipeline.model(**model)) + lines(pipeline.search())


DONE = ["== done: out/tokens/meta.json", "== done: out/model/meta.json", "== done: out/colbert.run"]


def test_nothing_changed_is_nothing_done(pipeline):
    assert run_all(pipeline) == [] and pipeline.calls() == 3
    assert run_all(pipeline) == DONE and pipeline.calls() == 0
    assert lines(pipeline.tokens("--workers", 9, "--wandb_mode", "offline")) == DONE[:1]


def test_an_argument_and_what_follows_from_it(pipeline):
    run_all(pipeline)
    pipeline.calls()
    assert run_all(pipeline, dim=8) == [
        DONE[0],
        "== again: out/model (--dim 8, was 16); what was there is now out/model.old",
        "== again: out/colbert.run (out/model has changed)",
    ]
    assert pipeline.calls() == 2
    assert (pipeline.folder / "out/model.old/model.safetensors").read_text() == "16"
    assert (pipeline.folder / "out/model/half").read_text() == "clean"
    assert run_all(pipeline, dim=8) == [DONE[0], *DONE[1:]]
    assert lines(pipeline.tokens("--seed", 1)) == ["== again: out/tokens (--seed 1, was not given)"]
    assert lines(pipeline.tokens()) == ["== again: out/tokens (no longer --seed 1)"]


def test_a_removed_model_is_made_again_and_the_run_only_if_it_differs(pipeline):
    run_all(pipeline)
    subprocess.run(["rm", "-r", "out/model"], cwd=pipeline.folder, check=True)
    assert run_all(pipeline) == [DONE[0], "== again: out/model (it is gone)", DONE[2]]


def test_a_changed_collection(pipeline):
    run_all(pipeline)
    (pipeline.folder / "collection.tsv").write_text("1\tanother\n")
    assert lines(pipeline.tokens()) == ["== again: out/tokens (collection.tsv has changed)"]
    (pipeline.folder / "collection.tsv").unlink()  # to save the space
    assert lines(pipeline.tokens()) == DONE[:1]
    assert "no such file" in error(pipeline.tokens(collection="colection.tsv"))
    assert (pipeline.folder / "out/tokens/meta.json").exists()


def test_a_base_model_is_known_by_its_contents(pipeline):
    base = pipeline.folder / "base"
    base.mkdir()
    (base / "weights").write_text("a")
    pipeline.model("--base_model", "base")
    os.utime(base / "weights", ns=(1, 1))  # installed anew
    assert lines(pipeline.model("--base_model", "base")) == DONE[1:2]
    (base / "weights").write_text("b")
    why = "== again: out/model (base has changed); what was there is now out/model.old"
    assert lines(pipeline.model("--base_model", "base")) == [why]


def test_the_interrupted_goes_on_or_starts_clean(pipeline):
    assert pipeline.tokens("--workers", "kill").returncode == 128 + signal.SIGKILL
    assert lines(pipeline.tokens()) == []
    assert (pipeline.folder / "out/tokens/half").read_text() == "going on"

    assert pipeline.model("--workers", "kill").returncode
    assert lines(pipeline.model(dim=8)) == ["== again: out/model (--dim 8, was 16)"]
    assert (pipeline.folder / "out/model/half").read_text() == "clean"


def test_checkpoints_are_moved_aside_and_never_over_a_finished_model(pipeline):
    out = pipeline.folder / "out"
    pipeline.model("--workers", "kill")
    (out / "model/checkpoints").mkdir()
    assert lines(pipeline.model(dim=8))[0].endswith("out/model.old")
    pipeline.model(dim=4)  # the finished one of 8 in place of the checkpoints
    (out / "model/meta.json").unlink()
    (out / "model/checkpoints").mkdir()
    assert lines(pipeline.model(dim=2)) == ["== again: out/model (--dim 2, was 4)"]
    assert (out / "model.old/model.safetensors").read_text() == "8"


def test_made_by_hand_is_taken_until_its_input_is_made_anew(pipeline):
    run_all(pipeline)
    (pipeline.folder / "out/stages.json").unlink()
    by_hand = " (as found: no record of how it was made)"
    assert run_all(pipeline) == [line + by_hand for line in DONE]
    assert run_all(pipeline) == DONE

    (pipeline.folder / "out/colbert.run").write_text("another")
    assert lines(pipeline.search()) == [DONE[2] + " (as found: changed since it was made)"]

    (pipeline.folder / "out/stages.json").unlink()
    (pipeline.folder / "out/tokens/meta.json").unlink()
    assert run_all(pipeline)[0].startswith("== again: out/model (out/tokens has changed)")


def test_a_driver_killed_in_a_stage_leaves_no_lie(pipeline):
    os.mkfifo(pipeline.folder / "gate")
    command = pipeline.command("tokens/meta.json", "--collection", "collection.tsv", "--output_dir", "out/tokens")
    driver = subprocess.Popen([*command, "--workers", "wait"], cwd=pipeline.folder)
    while not (pipeline.folder / "waiting").exists():
        time.sleep(0.01)
    driver.kill()
    driver.wait()
    assert "another run is at work" in error(pipeline.tokens())  # its command goes on
    (pipeline.folder / "gate").write_text("")
    while "another run" in (done := pipeline.tokens()).stderr:
        time.sleep(0.01)
    assert lines(done) == DONE[:1]


def test_a_command_that_fails_is_no_output(pipeline):
    (pipeline.folder / "make.py").write_text("import sys; sys.exit(3)")
    assert pipeline.search().returncode == 3
    (pipeline.folder / "make.py").write_text("")
    assert "ended without out/colbert.run" in error(pipeline.search())
    (pipeline.folder / "make.py").write_text(COMMAND)
    assert lines(pipeline.search()) == []


def test_nothing_but_the_stage_s_own_output_is_removed(pipeline):
    folder, out = pipeline.folder, pipeline.folder / "out"
    assert "not the --output" in error(pipeline.stage("other/meta.json", "--output_dir", "out/tokens"))

    pipeline.tokens()
    (out / "tokens").rename(folder / "elsewhere")
    (out / "tokens").symlink_to(folder / "elsewhere")
    assert "symbolic link" in error(pipeline.tokens("--seed", 1))

    def at(output, *words):
        return pipeline.stage(f"../{output}/meta.json", "--output_dir", f"out/../{output}", *words)

    (folder / "mine").mkdir()
    at("mine")
    assert "not within out" in error(at("mine", "--seed", 1))
    data = json.dumps({"kind": "demo collection"})
    (folder / "mine/meta.json").write_text(data)
    assert lines(at("mine", "--seed", 1))[-1].startswith("== again: out/../mine")

    pipeline.stage("all/meta.json", "--output_dir", "out/all")
    (out / "all/input.tsv").write_text("")
    arguments = ("--output_dir", "out/all", "--collection", "out/all/input.tsv")
    assert "holds what it is made from" in error(pipeline.stage("all/meta.json", *arguments))
    assert all((folder / name).exists() for name in ("elsewhere/meta.json", "mine/meta.json", "out/all/input.tsv"))
