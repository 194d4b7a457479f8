"""The folder that a training writes: who may write there, and how a finished model gets into it.

output_dir/     the model (weights, settings, tokenizer, meta.json), log.jsonl, loss.png, checkpoints/, best/
"""

import contextlib
import os
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from nanocolbert.cli import InputError
from nanocolbert.encoder.pretrained import check_weights
from nanocolbert.storage.artifact import check_apart, locked, publish, read_json, write_json
from nanocolbert.storage.checksums import sums_of
from nanocolbert.training.dev_set import DevSet
from nanocolbert.training.log import Log
from nanocolbert.training.resume import list_checkpoints

OURS = ("checkpoints", "best", "log.jsonl", "loss.png", "wandb", "model.new")  # what a training leaves, model aside


@contextlib.contextmanager
def claim(accelerator: Accelerator, args):
    """Make and lock output_dir while the block runs; removed again if nothing was written into it.

    Raises InputError, having changed nothing, if it is not to be trained in: see `check_output`.
    """
    folder = Path(os.path.realpath(args.output_dir))
    if accelerator.is_main_process:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{args.output_dir}: a file, not a folder: give another --output_dir")
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, args.output_dir):
            try:
                check_output(args)
                accelerator.wait_for_everyone()
                yield
            finally:
                if is_new:
                    with contextlib.suppress(OSError):
                        folder.rmdir()
    else:
        accelerator.wait_for_everyone()
        if not folder.is_dir():
            raise InputError(
                f"{args.output_dir}: not seen by process {accelerator.process_index}: give a shared folder"
            )
        yield


def check_output(args) -> None:
    """Raise InputError if output_dir holds an input, a model, checkpoints without --resume, or what is not ours."""
    folder = args.output_dir
    check_apart(folder, args.tokens_dir, args.base_model, args.dev_queries, args.dev_qrels, args.dev_candidates)
    found = {path.name for path in folder.iterdir()}
    if "meta.json" in found:
        kind = read_json(folder / "meta.json").get("kind")
        what = "a finished model" if kind == "model" else repr(kind)
        raise InputError(f"{folder}: holds {what}: remove it, or choose another --output_dir")
    others = {name for name in found if name.removesuffix(".partial").removesuffix(".retired") not in OURS}
    if others and not {"log.jsonl", "checkpoints"} & found:
        raise InputError(f"{folder}: holds what no training wrote ({min(others)}): choose another --output_dir")
    checkpoints = list_checkpoints(folder / "checkpoints")
    if checkpoints and not args.resume:
        raise InputError(f"{folder}: holds {checkpoints[-1].name}: go on with --resume, or remove the folder")


def check_trained(model, step: int) -> None:
    """Raise InputError naming the step if a weight is not finite, or if a query has no embeddings."""
    what = f"the model after step {step}"
    try:
        check_weights(model, what)
        with torch.inference_mode():
            model.embed_queries(model.frame_queries(np.zeros(0, np.int32), np.zeros(1, np.int64)))
    except InputError as error:
        reason = str(error).removeprefix(f"{what}: ").split(":")[0]
        raise InputError(f"{what}: {reason}: it was not saved: lower --lr, or use --mixed_precision bf16") from None


def write_model(model, folder: Path, meta: dict) -> None:
    """Write a model and its meta.json, which lists its files and their checksums."""
    model.save_pretrained(folder)
    write_json(folder / "meta.json", {**meta, "files": sums_of(folder)}, summed=True)


def save_model(model, folder: Path, meta: dict) -> None:
    """Put the finished model into a folder that may hold other things: settings and meta.json come last."""
    with publish(folder / "model.new") as partial:
        write_model(model, partial, meta)
    names = sorted(os.listdir(folder / "model.new"), key=lambda name: (name == "meta.json", name == "config.json"))
    for name in names:
        os.replace(folder / "model.new" / name, folder / name)
    (folder / "model.new").rmdir()


def keep_if_best(accelerator: Accelerator, model, dev_set: DevSet, log: Log, output_dir: Path) -> None:
    """Measure the model on the dev set unless that was done, and publish it as output_dir/best if it is.

    The main process does; all wait for it.
    """
    if accelerator.is_main_process and log.measured < log.step:
        model.eval()
        mrr = dev_set.mrr(model)
        model.train()
        log.bar.write(f"step {log.step}: MRR@10 on dev candidates {mrr:.4f}")
        if mrr > log.best_mrr:
            with publish(output_dir / "best") as partial:
                write_model(model, partial, {"kind": "model", "step": log.step, "dev_mrr@10": mrr})
        log.add_mrr(mrr)  # last: what the log says is there
    accelerator.wait_for_everyone()
