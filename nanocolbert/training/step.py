"""One optimiser step: what this process computes of it, the losses over all processes' passages, the gradients."""

from contextlib import nullcontext

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from nanocolbert.encoder.batches import to_device
from nanocolbert.encoder.pooling import pool
from nanocolbert.training.losses import Objective
from nanocolbert.training.triples import TOKENS_PER_BATCH, Triples, collate

FASTER = 10  # times the model's learning rate is a temperature's: a thousand steps at 1e-4 may change it threefold


def make_optimizer(model, args, temperature: torch.nn.Parameter | None = None):
    """AdamW and its schedule: linear warm-up, then constant (v1) or linear decay to 0 at --max_steps.

    temperature: is learnt beside the model, where there is one.
    """
    groups = [{"params": list(model.parameters())}]
    if temperature is not None:
        groups.append({"params": [temperature], "lr": FASTER * args.lr, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=args.lr, eps=1e-8, weight_decay=args.weight_decay, fused=True)

    def factor(step: int) -> float:
        rising = (step + 1) / (args.warmup_steps + 1)
        falling = (args.max_steps - step) / max(1, args.max_steps - args.warmup_steps)
        return min(rising, 1.0 if args.schedule == "constant" else max(0.0, falling))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def micro_batches(
    data: Triples, step: int, model, accelerator: Accelerator, packed: bool, cached_parts: int = 1, distils=False
):
    """This process's part of a step's triples, on its device, in as many micro-batches as gradients are accumulated.

    A micro-batch is what `collate` returns, with "teacher" (B, K) where there are scores, and where it `distils` the
    word pieces of its queries and different passages, and which passage is which, "texts". Of several cached parts it
    has "parts", the inputs of each, instead of "inputs"; the rest is of all.
    """
    parts, processes = accelerator.gradient_accumulation_steps, accelerator.num_processes
    tokens_per_batch = TOKENS_PER_BATCH.get(accelerator.device.type, 1 << 14)

    def own(rows):
        """(batch_size, n) to this process's (parts, B, n)."""
        return rows.reshape(parts, processes, -1, rows.shape[1])[:, accelerator.process_index]

    batches = []
    for rows in own(data.rows(step)):
        pieces = np.split(rows, cached_parts)
        batches.append(joined([collate(data, piece, model, tokens_per_batch, packed) for piece in pieces]))
        if distils:
            different, which = np.unique(rows[:, 1:], return_inverse=True)
            texts = data.queries.gather(rows[:, 0]), data.passages.gather(different)
            batches[-1]["texts"] = *texts, torch.from_numpy(which.reshape(-1))
    scores = data.scores_of(step)  # (batch_size, K)
    if scores is not None:
        for batch, teacher in zip(batches, own(scores), strict=True):
            batch["teacher"] = torch.from_numpy(teacher)
    return to_device(batches, accelerator.device)


def joined(batches: list[dict]) -> dict:
    """One micro-batch of several, whose inputs are its "parts"; one as it is."""
    if len(batches) == 1:
        return batches[0]
    return {
        "parts": [batch["inputs"] for batch in batches],
        "mask": cat_widened([batch["mask"] for batch in batches]),
        "rows": torch.cat([batch["rows"] for batch in batches]),
        "tokens": sum(batch["tokens"] for batch in batches),
    }


def train_step(accelerator: Accelerator, wrapped, optimizer, batches, objective: Objective, max_norm: float) -> dict:
    """One optimiser step over its micro-batches; returns what the log says of it, scalars on the device.

    "loss", "loss_NAME" of each where they are several: means over the micro-batches. "grad_norm" before gradients are
    clipped, unless max_norm is 0. "temperature" where it is learnt.
    """
    said = {"temperature": objective.temperature.detach()} if objective.log_temperature is not None else {}
    for batch in batches:
        with accelerator.accumulate(wrapped):
            if "parts" in batch:
                losses = backward_in_parts(accelerator, wrapped, objective, batch)
            else:
                losses = losses_of(accelerator, objective, *wrapped(**batch["inputs"]), batch)
                accelerator.backward(losses["loss"])
            if accelerator.sync_gradients:
                mean_gradient(accelerator, objective.log_temperature)
                if max_norm > 0:
                    said["grad_norm"] = accelerator.clip_grad_norm_(wrapped.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()
        for name, loss in losses.items():
            said[name] = said.get(name, 0) + loss.detach() / len(batches)
    return said


def backward_in_parts(accelerator: Accelerator, wrapped, objective: Objective, batch: dict) -> dict[str, Tensor]:
    """The losses of a micro-batch whose graph does not fit into memory, and their gradients (GradCache, 2101.06983).

    Its parts are embedded without a graph; the losses give the gradients of these embeddings; each part is embedded
    again, by the same draws, and takes them on to the weights.
    """
    device = accelerator.device
    with torch.no_grad(), torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        found = [wrapped(**inputs) for inputs in batch["parts"]]  # (B', Lq, D) and (N', Ld, D) each
    for embeddings in (part for pair in found for part in pair):
        embeddings.requires_grad_()
    losses = losses_of(accelerator, objective, *map(cat_widened, zip(*found, strict=True)), batch)
    accelerator.backward(losses["loss"])
    for i, (inputs, pair) in enumerate(zip(batch["parts"], found, strict=True), 1):
        with nullcontext() if i == len(found) else accelerator.no_sync(wrapped):
            torch.autograd.backward(wrapped(**inputs), [embeddings.grad for embeddings in pair])
    return losses


def losses_of(accelerator: Accelerator, objective: Objective, Q: Tensor, P: Tensor, batch: dict) -> dict[str, Tensor]:
    """The losses of this process's queries (B, Lq, D), over all processes' passages (N, Ld, D) where one needs them."""
    mask, rows, first, teacher_all = batch["mask"], batch["rows"], 0, batch.get("teacher_all")
    if objective.pooling is not None:
        P, mask = pool(P, mask, objective.pooling)
    if objective.looks_at_all and accelerator.num_processes > 1:
        first = accelerator.process_index * len(rows)
        P = Gathered.apply(as_wide_as_all(P, accelerator), accelerator)
        mask, rows = gather(mask, accelerator), accelerator.gather(rows)
    if objective.distillation is not None:
        teacher_all = objective.distillation.score(*batch["texts"])
    return objective(Q, P, mask, rows, first, batch.get("teacher"), teacher_all)


def gather(tensor: Tensor, accelerator: Accelerator) -> Tensor:
    """(n, L, ...) of all processes, one after the other, as wide as the widest."""
    return accelerator.gather(as_wide_as_all(tensor, accelerator))


def as_wide_as_all(tensor: Tensor, accelerator: Accelerator) -> Tensor:
    """(n, L, ...) filled with zeros to the widest of all processes."""
    return widened(tensor, int(accelerator.reduce(torch.tensor(tensor.shape[1], device=tensor.device), "max")))


def widened(tensor: Tensor, width: int) -> Tensor:
    """(N, L, ...) filled with zeros to (N, width, ...)."""
    return torch.nn.functional.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, width - tensor.shape[1]))


def cat_widened(tensors) -> Tensor:
    """Of several (N, L, ...) one, as wide as the widest."""
    width = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([widened(tensor, width) for tensor in tensors])


class Gathered(torch.autograd.Function):
    """The tensors (n, ...) of all processes, one after the other: (processes * n, ...).

    Its gradient is the sum of those that all processes have for it.
    """

    @staticmethod
    def forward(ctx, tensor: Tensor, accelerator: Accelerator) -> Tensor:
        ctx.accelerator = accelerator
        return accelerator.gather(tensor)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grads = ctx.accelerator.reduce(grad, "sum").chunk(ctx.accelerator.num_processes)
        return grads[ctx.accelerator.process_index], None


def mean_gradient(accelerator: Accelerator, weight: Tensor | None) -> None:
    """Give a weight outside of the model, where there is one, the mean of all processes' gradients of it."""
    if weight is not None and weight.grad is not None:
        weight.grad = accelerator.reduce(weight.grad, "mean")
