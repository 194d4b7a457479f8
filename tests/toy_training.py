"""Small trainings by train.py, for the tests of it and of what it is made of."""

import os
import signal
import sys

from conftest import call_stage, succeed

from nanocolbert.training.log import read_log


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


STOPPED = ("--dropout", 0.1, "--log_steps", 3, "--shuffle", "--warmup_steps", 3, "--mixed_precision", "no")
