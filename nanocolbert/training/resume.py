"""Checkpoints of a training, and how a run goes on from one: the same batches, the same losses.

    checkpoints/step-0000100/   a model folder, and optimizer, scheduler, random states of each process, run.json

A checkpoint is written beside its place and renamed when whole. run.json lists its files with their checksums, and the
settings that must be the same when the run goes on.
"""

import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import load

from nanocolbert.cli import InputError, first_line
from nanocolbert.encoder.pretrained import check_weights
from nanocolbert.storage.artifact import naming, plain_args, read_json, write_json
from nanocolbert.storage.checksums import check_sums, sums_of

# Of every run before there were these settings.
BEFORE = {"loss": ["softmax"], "temperature": 1.0, "learn_temperature": False, "teacher_temperature": 0.25}
BEFORE |= {"cached_parts": 1, "pool_factor": None, "teacher": None, "teacher_similarity": None}
PARTS = ("model.safetensors", "optimizer.bin", "scheduler.bin")  # of a checkpoint, beside each process's random states


def run_settings(args, tokens_meta: dict) -> dict:
    """What must not change between a run and its resumption: all but where and how often things are written."""
    free = ["output_dir", "tokens_dir", "cpu", "resume", "verify", "save_steps", "keep_checkpoints", "log_steps"]
    settings = {key: value for key, value in plain_args(args).items() if key not in (*free, "eval_steps")}
    settings = {key: value for key, value in settings.items() if not key.startswith(("wandb", "dev"))}
    if args.schedule == "constant":  # then a run may be made longer
        del settings["max_steps"]
    return {**settings, "tokens": tokens_meta["fingerprint"]}


# -------------------------------------------------------------------------------------------------------------- saving


def save_checkpoint(accelerator, model, objective, settings: dict, folder: Path, step: int, keep: int) -> None:
    """Publish checkpoints/step-N: all that a resume needs, and a model folder in itself; drop the oldest."""
    final = folder / f"step-{step:07d}"
    partial = final.with_name(f"{final.name}.partial")
    try:
        if accelerator.is_main_process:
            remove_leftovers(folder)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        with naming(final):
            accelerator.save_state(partial, safe_serialization=True)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with naming(final):
                model.config.save_pretrained(partial)
                model.tokenizer.save_pretrained(partial)
                facts = {"processes": accelerator.num_processes, "device": accelerator.device.type}
                if objective.log_temperature is not None:
                    facts["log_temperature"] = objective.log_temperature.item()
                write_json(partial / "run.json", {**settings, **facts, "files": sums_of(partial)}, summed=True)
            partial.rename(final)
            for old in list_checkpoints(folder)[:-keep]:
                retire(old)
    except BaseException:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    accelerator.wait_for_everyone()


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, the oldest first, by number."""
    found = (path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit())
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def retire(checkpoint: Path) -> None:
    """Remove a checkpoint; renamed first: half removed, it is none."""
    removed = checkpoint.with_name(f"{checkpoint.name}.removed")
    checkpoint.rename(removed)
    shutil.rmtree(removed)


def remove_leftovers(folder: Path) -> None:
    """Remove checkpoints that a kill left half written, or half removed."""
    for path in (*folder.glob("step-*.partial"), *folder.glob("step-*.removed")):
        shutil.rmtree(path)


# ------------------------------------------------------------------------------------------------------------ resuming


def resume(accelerator: Accelerator, model, objective, args, settings: dict) -> int:
    """Load the last checkpoint, if there is one; returns its step.

    Raises InputError if it is damaged, or of a run that would not go on the same: other settings, or other processes
    where those draw their own dropout.
    """
    checkpoints = list_checkpoints(args.output_dir / "checkpoints")
    if not checkpoints:
        return 0
    last, step = checkpoints[-1], int(checkpoints[-1].name.removeprefix("step-"))
    goes_on = f"goes on from {checkpoints[-2].name}" if len(checkpoints) > 1 else "begins again"
    remedy = f"remove {last}, then --resume {goes_on}"
    saved = read_json(last / "run.json", remedy)
    if not isinstance(saved, dict):
        raise InputError(f"{last / 'run.json'}: no settings of a run: {remedy}")
    if "files" not in saved and args.projection is None:  # flags of a new ColBERT once said nothing to one that was not
        saved |= {key: settings[key] for key in ("dim", "mask_punctuation", "projection")}
        saved |= {"dropout": None, "attention_dropout": None}
    if saved.pop("in_batch_negatives", False):
        saved["loss"] = ["in_batch_negatives"]  # which were others than now
    saved = of_before(settings) | saved
    check_same_settings(last, saved, settings)
    if step > args.max_steps:
        raise InputError(f"{last}: already past --max_steps {args.max_steps}: give more, or another --output_dir")
    processes = saved.get("processes", max(1, len(list(last.glob("random_states_*.pkl")))))
    check_same_draws(accelerator, last, processes, saved.get("device"), drops(model))
    load_checkpoint(accelerator, last, processes, saved.get("files", {}), remedy)
    check_weights(model, last)
    if objective.log_temperature is not None:
        objective.log_temperature.data.fill_(saved["log_temperature"])
    accelerator.print(f"going on after step {step}")
    return step


def of_before(settings: dict) -> dict:
    """What a run.json from before there were all these settings says nothing of.

    A new ColBERT then had markers and was filled to its length; one to go on from reads as it says itself.
    """
    if settings["projection"] is None:
        return BEFORE | {key: settings[key] for key in ("markers", "expand_queries_to")}
    return BEFORE | {"markers": True, "expand_queries_to": None}


def check_same_settings(last: Path, saved: dict, settings: dict) -> None:
    """Raise InputError where a checkpoint was trained with other settings than these."""
    for key in settings:
        if saved.get(key) != settings[key]:
            raise InputError(
                f"{last}: trained with {key} {saved.get(key)}, now {settings[key]}: give the same arguments to "
                "go on, or another --output_dir"
            )


def check_same_draws(accelerator, last: Path, processes: int, device: str | None, drops: bool) -> None:
    """Raise InputError where these processes would draw other dropout than the checkpoint's.

    Negatives are the same by any number of processes, which gather them. Of how many accumulated parts is a setting.
    """
    was, now = f"by {processes} process(es)", f"{accelerator.num_processes}"
    differs = processes != accelerator.num_processes
    if not differs and device not in (None, accelerator.device.type):
        was, now, differs = f"on {device}", f"on {accelerator.device.type}", True
    if drops and differs:
        raise InputError(
            f"{last}: trained {was}, now {now}, which would draw other dropout: go on as it was, or give another "
            "--output_dir"
        )


def drops(model) -> bool:
    """Whether training draws random numbers: a dropout rate of the encoder is above 0."""
    rates = [value for key, value in vars(model.encoder.config).items() if "dropout" in key]
    return any(isinstance(value, float | int) and value > 0 for value in rates)


def load_checkpoint(accelerator: Accelerator, last: Path, processes: int, files: dict, remedy: str) -> None:
    """Load weights, optimizer, schedule and this process's random states, and check the checksums of `files` meanwhile.

    Raises InputError where a file is missing, damaged, or cannot be loaded.
    """
    for name in (*PARTS, *(f"random_states_{number}.pkl" for number in range(processes))):
        if not (last / name).is_file():
            raise InputError(f"{last / name}: missing: restore it, or {remedy}")
    problem = None
    with ThreadPoolExecutor(1) as pool:
        sums = pool.submit(check_sums, last, files if accelerator.is_main_process else {})
        try:
            accelerator.load_state(last)
            if accelerator.process_index < processes:
                load_random_states(last / f"random_states_{accelerator.process_index}.pkl", accelerator.device)
        except (MemoryError, torch.OutOfMemoryError, InputError):
            raise
        except Exception as error:  # of safetensors, torch, pickle, zip, accelerate
            problem = InputError(f"{last}: cannot be loaded ({first_line(error)}): {remedy}")
    try:
        sums.result()
    except InputError as error:
        raise InputError(f"{error}; or {remedy}") from None
    if problem:
        raise problem


def load_random_states(path: Path, device: torch.device) -> None:
    """Set the random generators; accelerate does, too, but passes over what it cannot read.

    Raises InputError where GPUs were counted otherwise: whose generator is this process's?
    """
    states = load(path)
    random.setstate(states["random_state"])
    np.random.set_state(states["numpy_random_seed"])
    torch.set_rng_state(states["torch_manual_seed"])
    if device.type == "cuda":
        generators, n = states["torch_cuda_manual_seed"], torch.cuda.device_count()
        if len(generators) != n:
            raise InputError(
                f"{path}: trained where {len(generators)} GPUs were seen, now {n}: show as many (CUDA_VISIBLE_DEVICES)"
            )
        torch.cuda.set_rng_state(generators[device.index or 0], device)
