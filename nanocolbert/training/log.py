"""What is said of a training while it runs: log.jsonl, a progress bar, and wandb.

    {"step": 12, "loss": 0.41, "lr": 3e-06, "grad_norm": 1.8, "seconds": 0.081, "tokens_per_second": 71036.4}
    {"step": 1000, "dev_mrr@10": 0.93}

loss: the weighted sum; where it is one of several, each follows as loss_NAME. lr, temperature (where it is learnt): of
this step. grad_norm: before it is clipped (left out with --max_grad_norm 0, and where it is not finite).
seconds, tokens_per_second: of a step by all processes; on a GPU the mean of the steps since the last write. Tokens are
those that the encoder reads, padding aside. Logs from before these were there are read as well.
"""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from nanocolbert import cli
from nanocolbert.cli import InputError, first_line
from nanocolbert.progress import progress
from nanocolbert.storage.artifact import naming, plain_args, replacing

STOPS = (signal.SIGTERM, signal.SIGINT)


class Log:
    """log.jsonl, the progress bar and wandb: of every step, transferred and averaged once for many steps."""

    def __init__(self, accelerator: Accelerator, args, step: int):
        self.accelerator, self.args, self.path = accelerator, args, args.output_dir / "log.jsonl"
        self.step, self.clock, self.is_first = step, time.perf_counter(), True
        self.steps, self.rates, self.tokens = [], [], 0  # of the steps not yet written
        self.signals = []  # that this process was sent
        self.best_mrr, self.measured = 0.0, 0  # the best MRR@10 so far, and the last step at which it was measured
        if accelerator.is_main_process:
            lines = [line for line in read_log(self.path) if line["step"] <= step] if step else []
            for line in lines:  # later ones will be written again
                if "dev_mrr@10" in line:
                    self.best_mrr, self.measured = max(self.best_mrr, line["dev_mrr@10"]), line["step"]
            with replacing(self.path) as file:
                file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
            self.file = self.path.open("a", buffering=1)
        if args.wandb_mode != "disabled":
            start_wandb(accelerator, args)
        show = accelerator.is_main_process
        self.bar = progress(total=args.max_steps, initial=step, show=show, desc="train", unit=" steps")

    def add(self, said: dict[str, torch.Tensor], lr: float, tokens: int) -> None:
        """Take what `train_step` said of the next step, whose scalars stay on their device for now."""
        self.steps.append(said)
        self.rates.append(lr)
        self.tokens += tokens
        self.bar.update()

    def is_due(self) -> bool:
        """Whether losses should be written after this step: all of them, but where waiting for them costs time."""
        on_gpu = self.accelerator.device.type != "cpu"
        return not on_gpu or (self.step + len(self.steps)) % self.args.log_steps == 0 or self.is_first

    def flush(self) -> int:
        """Write the steps taken since the last time. Raises InputError if a loss is not finite.

        Returns the signal that one of the processes was sent, the same in all of them, or 0.
        """
        steps, tokens, stop = self._reduce()
        seconds, n = time.perf_counter() - self.clock, len(steps)
        speed = {"seconds": round(seconds / n, 6), "tokens_per_second": round(tokens / seconds, 1)}
        for said, lr in zip(steps, self.rates, strict=True):
            self.step += 1
            losses = {name: value for name, value in said.items() if name.startswith("loss")}
            others = {name: value for name, value in said.items() if name not in losses and np.isfinite(value)}
            self.write(step=self.step, **losses, lr=lr, **others, **speed)
        rate = n * self.args.batch_size / seconds
        means = {name: float(np.mean([said[name] for said in steps])) for name in losses}
        self.bar.set_postfix(loss=f"{means['loss']:.4f}", examples_per_s=f"{rate:.1f}", refresh=self.is_first)
        self.accelerator.log({**means, "lr": lr, "examples/s": rate, **speed, **others}, step=self.step)
        if not np.isfinite([said["loss"] for said in steps]).all():
            raise InputError(f"the loss is not finite by step {self.step}: lower --lr, or use --mixed_precision bf16")
        self.steps, self.rates, self.tokens, self.is_first = [], [], 0, False
        self.clock = time.perf_counter()
        return stop

    def _reduce(self) -> tuple[list[dict[str, float]], float, int]:
        """What was said of the steps, tokens of all processes, a signal that one was sent: reduced in one transfer."""
        sent = [float(number in self.signals) for number in STOPS]
        known = torch.stack([value for said in self.steps for value in said.values()])
        here = torch.tensor([self.tokens * self.accelerator.num_processes, *sent], device=known.device)
        found = self.accelerator.reduce(torch.cat([known, here]), "mean").tolist()
        values, (tokens, *sent) = iter(found), found[-len(here) :]
        steps = [{name: next(values) for name in said} for said in self.steps]
        stop = next((number for number, share in zip(STOPS, sent, strict=True) if share), 0)
        return steps, tokens, stop

    def write(self, **line) -> None:
        if self.accelerator.is_main_process:
            with naming(self.path):
                self.file.write(json.dumps(line) + "\n")

    def add_mrr(self, mrr: float) -> None:
        """Write MRR@10 on the dev set."""
        self.write(step=self.step, **{"dev_mrr@10": mrr})
        self.accelerator.log({"dev_mrr@10": mrr}, step=self.step)
        self.best_mrr, self.measured = max(mrr, self.best_mrr), self.step


def read_log(path: Path) -> list[dict]:
    """Lines of log.jsonl; a last line that a kill left half-written is passed over. Raises InputError on any other."""
    lines = []
    for number, text in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else [], 1):
        if not text.endswith(b"\n"):
            break
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or {type(value) for value in line.values()} - {int, float} or "step" not in line:
            raise InputError(f"{path}:{number}: not a line of a log of training: remove it (loss.png goes without)")
        lines.append(line)
    return lines


# --------------------------------------------------------------------------------------------------------------- wandb


def wandb_mode(asked: str) -> str:
    """'auto' is online where the user is logged in and offline otherwise, decided before wandb could ask."""
    if asked != "auto":
        return asked
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    import netrc

    try:
        logged_in = bool(os.environ.get("WANDB_API_KEY")) or "api.wandb.ai" in netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        logged_in = False
    return "online" if logged_in else "offline"


def start_wandb(accelerator: Accelerator, args) -> None:
    """Begin a run of wandb, offline if it cannot be reached."""
    limits = {"WANDB_INIT_TIMEOUT": "20", "WANDB_FINISH_TIMEOUT": "30"}  # seconds
    for name, value in {"WANDB_SILENT": "true", **limits}.items():
        os.environ.setdefault(name, value)
    options = {"dir": str(args.output_dir), "mode": wandb_mode(args.wandb_mode)}
    try:
        accelerator.init_trackers(args.wandb_project, plain_args(args), {"wandb": options})
    except Exception as error:
        if options["mode"] != "online":
            raise InputError(f"wandb does not start: {first_line(error)}: give --wandb_mode disabled") from None
        cli.say(f"wandb: {first_line(error)}: going on offline")
        accelerator.trackers.clear()
        accelerator.init_trackers(args.wandb_project, plain_args(args), {"wandb": {**options, "mode": "offline"}})
