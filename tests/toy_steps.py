"""Steps of a tiny model in fp64, by several processes at once: what tests/training/test_step.py compares.

    python tests/toy_steps.py MODEL TOKENS      # writes TOKENS/found-1, -2 and -4

A script, so that all these processes are forked from one that has loaded torch and not yet computed.
"""

import faulthandler
import os
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from model import ColBERT
from nanocolbert.compute import own_dropout
from nanocolbert.training.losses import Objective
from nanocolbert.training.step import micro_batches, train_step
from nanocolbert.training.triples import Triples

BATCH_SIZE = 8


class Case(NamedTuple):
    losses: tuple[str, ...]
    cached_parts: int = 1
    accumulated: int = 1
    dropout: float = 0.0


LOSSES = (("in_batch",), ("kl", "softmax=0.5"), ("margin_mse",), ("distil", "in_batch=0.1"))
PLAIN, CACHED = ([Case(losses, cached_parts=parts) for losses in LOSSES] for parts in (1, 2))
ACCUMULATED = [Case(("in_batch", "kl"), cached_parts=parts, accumulated=2) for parts in (1, 2)]
CASES = {1: [*PLAIN, *CACHED, *ACCUMULATED], 2: [*PLAIN, *CACHED, *ACCUMULATED], 4: [*PLAIN, *CACHED]}  # by processes


class Step:
    """A step's parts, and its first batch."""

    def __init__(self, case: Case, model: Path, tokens: Path):
        AcceleratorState._reset_state()
        GradientState._reset_state()
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=case.accumulated)
        self.model = ColBERT.from_pretrained(model, device="cpu").double().train()
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = case.dropout
        own_dropout(self.model)
        self.objective = Objective(case.losses, "cosine", 0.5, learn=True).double()
        self.weights = [*self.model.parameters(), self.objective.log_temperature]
        optimizer = torch.optim.SGD(self.weights, lr=1.0)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        data = Triples(tokens, BATCH_SIZE, None)
        self.batches = micro_batches(data, 0, self.model, self.accelerator, False, case.cached_parts)
        for batch in self.batches:
            batch["teacher_all"] = teacher_all(self.accelerator, batch)

    def run(self) -> tuple[dict, torch.Tensor]:
        """What the log says, and the gradients of all weights (n,): how far plain descent moves them."""
        before = torch.cat([weight.detach().flatten() for weight in self.weights])
        said = train_step(self.accelerator, self.wrapped, self.optimizer, self.batches, self.objective, max_norm=0)
        said = {name: self.accelerator.reduce(value, "mean").item() for name, value in said.items()}
        return said, before - torch.cat([weight.detach().flatten() for weight in self.weights])


def teacher_all(accelerator: Accelerator, batch: dict) -> torch.Tensor:
    """Made-up scores (B, N) of this process's queries, from the numbers of the positive and of each passage."""
    own, every = batch["rows"][:, 1:], accelerator.gather(batch["rows"])[:, 1:]
    return torch.cos(own[:, :1] * 1.7 + every.flatten()[None] * 0.9)


def run_cases(rank: int, processes: int, model: Path, tokens: Path) -> None:
    """The cases by one process of several; the first writes tokens/found-N, {case: (losses, gradients)}."""
    if processes > 1:
        sizes = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {name: str(value) for name, value in sizes.items()}
        store = torch.distributed.FileStore(str(tokens / f"store-{processes}"), processes)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    found = {tuple(case): Step(case, model, tokens).run() for case in CASES[processes]}
    if rank == 0:
        torch.save(found, tokens / f"found-{processes}")
    if processes > 1:
        torch.distributed.barrier()


def fork(processes: int, model: Path, tokens: Path) -> list[int]:
    """Run the cases in so many children; returns what they exited with."""
    children = []
    for rank in range(processes):
        if not (child := os.fork()):
            faulthandler.dump_traceback_later(100, exit=True)
            code = 1
            try:
                run_cases(rank, processes, model, tokens)
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)  # at once, as the stages do
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def write_tokens(tokens_dir: Path, folder: Path) -> None:
    """Tokens with rows of 3 passages, drawn from few so that many stand twice, and a teacher's scores of them."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for name in ("passages", "queries"):
        (folder / name).symlink_to(tokens_dir / name)
    rows = np.stack([np.append(rng.integers(16), rng.permutation(9)[:3] + 10) for _ in range(BATCH_SIZE)])
    np.save(folder / "triples.npy", rows.astype(np.int32))
    np.save(folder / "scores.npy", rng.normal(size=(BATCH_SIZE, 3)).astype(np.float32))


if __name__ == "__main__":  # MODEL TOKENS
    torch.set_num_threads(1)
    ended = [fork(n, *map(Path, sys.argv[1:])) for n in CASES]
    sys.exit(str(ended) if any(map(any, ended)) else 0)
