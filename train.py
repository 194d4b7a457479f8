"""Train ColBERT: by default softmax cross-entropy of a positive against its negatives (paper, section 3.3).

    python train.py --tokens_dir tokens --base_model bert-base-uncased --output_dir model
    accelerate launch --multi_gpu --num_processes 4 --num_machines 1 --mixed_precision no --dynamo_backend no \\
        train.py ...

The second trains on four GPUs; the precision is train.py's own to choose, whatever the launcher is told.

reads   tokens/ (tsv2mmap.py) and a Hugging Face encoder, or a ColBERT model to go on from
writes  model/ (weights, settings and tokenizer: what ColBERT.from_pretrained opens), model/log.jsonl (one line a
        step: losses, learning rate, gradient norm, seconds, tokens a second), model/loss.png, model/checkpoints/step-N/
        (the last few: a model folder with optimizer, scheduler and random state), model/best/ where --dev_queries is
        given

A run killed at any time goes on with --resume: the same batches, the same losses. The batch of a step is a function
of the step, so the position in the data is the step itself. Ctrl-C and SIGTERM save a checkpoint first.
Reference: 12.5 steps/s of 32 triples on an A100.
"""

import argparse
import functools
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nanocolbert import cli
from nanocolbert.cli import InputError, count, first_line, not_negative_float, positive, positive_float, run_stage, seed

SWITCH = argparse.BooleanOptionalAction
LOSSES = ("softmax", "in_batch", "kl", "margin_mse", "distil")  # those of nanocolbert/training/losses.py
SIMILARITIES = ("mean", "maxsim", "sum")  # and of teachers.py
NEW = {"dim": 128, "mask_punctuation": True, "markers": True}
NEW |= {"projection": "orthogonal", "attention_dropout": 0.0}  # of a new ColBERT


def loss(text: str) -> str:
    """NAME or NAME=WEIGHT."""
    name, equals, weight = text.partition("=")
    if name not in LOSSES:
        raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(LOSSES)}, each with =WEIGHT if not 1")
    if equals:
        positive_float(weight)
    return text


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_and_model(parser.add_argument_group("data and model"))
    add_loss(parser.add_argument_group("loss"))
    add_optimisation(parser.add_argument_group("optimisation"))
    add_running(parser.add_argument_group("running"))
    add_evaluation(parser.add_argument_group("evaluation while training (reranking)"))
    return parser.parse_args()


def add_data_and_model(group) -> None:
    group.add_argument("--tokens_dir", type=Path, required=True, help="what tsv2mmap.py wrote, with triples")
    group.add_argument("--base_model", required=True, help="Hugging Face encoder, or a ColBERT model to go on from")
    group.add_argument("--output_dir", type=Path, required=True, help="the model folder to write")
    group.add_argument("--dim", type=positive, help="size of a token embedding (default 128)")
    group.add_argument("--mask_punctuation", action=SWITCH, help="drop punctuation in passages (default: yes)")
    group.add_argument("--markers", action=SWITCH, help="put [Q] and [D] after [CLS] (default: yes, as v1)")
    group.add_argument(
        "--expand_queries_to",
        type=count,
        help="fill queries with [MASK] to N tokens; 0: not at all (default: all, as v1)",
    )
    group.add_argument("--pool_factor", type=positive, help="pool a passage's vectors, N to one (default: as it comes)")
    group.add_argument(
        "--projection",
        choices=("orthogonal", "principal"),
        help="how a new projection begins: random rows (default), or the encoder's principal directions",
    )
    group.add_argument("--dropout", type=cli.rate, help="dropout rate of the encoder (default: as it comes)")
    group.add_argument(
        "--attention_dropout",
        type=cli.rate,
        help="of the attention weights (default 0, of a ColBERT as it comes; v1 0.1): above 0 a GPU, too, computes "
        "padded batches",
    )


def add_loss(group) -> None:
    group.add_argument(
        "--loss",
        type=loss,
        nargs="+",
        default=["softmax"],
        metavar="NAME[=WEIGHT]",
        help="one, or a weighted sum: softmax over a row's passages (v1; default), in_batch: over those of all "
        "processes' micro-batches, kl or margin_mse: of a teacher's scores of a row's passages, distil: kl over "
        "in_batch's passages to an encoder's own similarity",
    )
    group.add_argument("--similarity", choices=("l2", "cosine"), default="l2", help="l2 is twice cosine (default l2)")
    group.add_argument("--temperature", type=positive_float, default=1.0, help="divides all scores (default 1)")
    group.add_argument("--learn_temperature", action=SWITCH, default=False, help="from --temperature on (default: no)")
    group.add_argument(
        "--teacher_temperature",
        type=positive_float,
        default=0.25,
        help="divides a teacher's scores, from 0 to 1 in each row, of kl (default 0.25)",
    )
    group.add_argument("--teacher", help="of distil: an encoder of the same tokenizer (default: --base_model)")
    group.add_argument(
        "--teacher_similarity", choices=SIMILARITIES, help="of distil: of mean vectors, MaxSim, or both (default: sum)"
    )


def add_optimisation(group) -> None:
    group.add_argument("--max_steps", type=count, default=400_000, help="optimiser steps, exactly (default 400000)")
    group.add_argument("--batch_size", type=positive, default=32, help="triples a step over all processes (default 32)")
    group.add_argument("--gradient_accumulation_steps", type=positive, default=1, help="parts a batch is computed in")
    group.add_argument(
        "--cached_parts",
        type=positive,
        default=1,
        help="embed a batch in so many parts, twice: the same step in less memory (default 1)",
    )
    group.add_argument("--lr", type=positive_float, default=3e-6, help="peak learning rate (default 3e-6)")
    group.add_argument("--warmup_steps", type=count, default=0, help="steps of linear warm-up (default 0)")
    group.add_argument(
        "--schedule",
        choices=("constant", "linear"),
        default="constant",
        help="after the warm-up: constant as v1, or linear decay to 0 at --max_steps",
    )
    group.add_argument("--weight_decay", type=not_negative_float, default=0.0, help="of AdamW (default 0)")
    group.add_argument("--max_grad_norm", type=not_negative_float, default=2.0, help="clip them; 0: off (default 2)")
    group.add_argument("--shuffle", action=SWITCH, default=False, help="random order by --seed, else file order as v1")
    group.add_argument("--seed", type=seed, default=12345, help="of dropout, the projection and --shuffle")


def add_running(group) -> None:
    group.add_argument(
        "--mixed_precision",
        choices=("auto", "no", "fp16", "bf16"),
        default="auto",
        help="auto: bf16 where this machine is faster in it, else fp32 (fp16 on older GPUs)",
    )
    group.add_argument("--cpu", action=SWITCH, default=False, help="train on the CPU even where there is a GPU")
    group.add_argument("--resume", action=SWITCH, default=False, help="go on from the last checkpoint, if there is one")
    group.add_argument("--verify", action=SWITCH, default=False, help="check the checksums of what is read first")
    group.add_argument("--save_steps", type=positive, default=10_000, help="steps between checkpoints (default 10000)")
    group.add_argument("--keep_checkpoints", type=positive, default=2, help="how many to keep (default 2)")
    group.add_argument("--log_steps", type=positive, default=10, help="steps between writes to the log (default 10)")
    group.add_argument(
        "--wandb_mode",
        choices=("auto", "online", "offline", "disabled"),
        default="auto",
        help="auto: online where logged in, else offline; never asks (default auto)",
    )
    group.add_argument("--wandb_project", default="nanocolbert", help="wandb project (default nanocolbert)")


def add_evaluation(group) -> None:
    group.add_argument("--dev_queries", type=Path, help="qid, query")
    group.add_argument("--dev_qrels", type=Path, help="qrels of these queries")
    group.add_argument("--dev_candidates", type=Path, help="a run, or top1000.dev; pids of the tokens' collection")
    group.add_argument(
        "--dev_depth", type=positive, default=100, help="candidates of a query that are used (default 100)"
    )
    group.add_argument("--eval_steps", type=positive, default=1000, help="steps between evaluations (default 1000)")


if __name__ == "__main__":  # before the imports that take seconds: --help, or a wrong flag, is answered at once
    ARGS = cli.start(parse_args)

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from transformers import AutoConfig

from model import ColBERT
from nanocolbert.checkpoints.layouts import is_colbert
from nanocolbert.compute import COMPUTE_DTYPES, is_of_another_process, mixed_precision, one_arena, own_dropout
from nanocolbert.encoder.attention import packable
from nanocolbert.encoder.pretrained import set_dropout
from nanocolbert.storage.artifact import check_file, make_meta, read_meta, verify
from nanocolbert.storage.ragged import Ragged
from nanocolbert.training.dev_set import DevSet
from nanocolbert.training.distillation import Distillation
from nanocolbert.training.log import Log, read_log
from nanocolbert.training.losses import Objective, check_losses
from nanocolbert.training.output import check_trained, claim, keep_if_best, save_model
from nanocolbert.training.plot import plot_loss
from nanocolbert.training.resume import resume, run_settings, save_checkpoint
from nanocolbert.training.step import gather, make_optimizer, micro_batches, train_step
from nanocolbert.training.triples import Triples


def check_args(args, accelerator: Accelerator) -> dict:
    """Check what can be checked before anything is written; returns the tokens' meta.json."""
    tokens_meta = read_meta(args.tokens_dir, "tokens", "tsv2mmap.py", check=args.verify)
    if args.verify and (Path(args.base_model) / "meta.json").is_file():
        verify(args.base_model)
    if not tokens_meta["counts"].get("triples"):
        raise InputError(f"{args.tokens_dir}: holds no triples: run tsv2mmap.py with --triples")
    check_losses(args.loss, args.tokens_dir, tokens_meta, args.batch_size // args.gradient_accumulation_steps)
    shares = accelerator.num_processes * args.gradient_accumulation_steps * args.cached_parts
    if args.batch_size % shares:
        raise InputError(
            f"--batch_size {args.batch_size} does not divide among {accelerator.num_processes} process(es) x "
            f"{args.gradient_accumulation_steps} accumulation step(s) x {args.cached_parts} cached part(s): make it a "
            f"multiple of {shares}"
        )
    dev = (args.dev_queries, args.dev_qrels, args.dev_candidates)
    if any(dev) and not all(dev):
        raise InputError(
            "evaluation while training: give all of --dev_queries, --dev_qrels and --dev_candidates, or none"
        )
    for path in filter(None, dev):
        check_file(path, "dev set of train.py")
    return tokens_meta


def load_model(args, tokens_meta: dict) -> ColBERT:
    """The base model, as a ColBERT with the lengths the tokens were cut to. Raises InputError if they do not fit.

    What args leave open about the model is filled in.
    """
    model = go_on_from(args) if is_colbert(args.base_model) else start_from(args, tokens_meta)
    model.check_tokens(args.base_model, args.tokens_dir, tokens_meta)
    if args.projection == "principal":
        if args.dim > model.linear.in_features:
            raise InputError(
                f"--dim {args.dim}, but the encoder has {model.linear.in_features} principal directions: "
                "lower --dim, or leave out --projection principal"
            )
        passages = Ragged(args.tokens_dir / "passages")
        sample = np.random.default_rng(args.seed).choice(len(passages), min(512, len(passages)), replace=False)
        model.eval().project_on_principal(*passages.gather(np.sort(sample)))
    model.config.pool_factor = args.pool_factor or model.config.pool_factor
    return model


def start_from(args, tokens_meta: dict) -> ColBERT:
    """A new ColBERT on a Hugging Face encoder."""
    for key, value in NEW.items():
        setattr(args, key, value if getattr(args, key) is None else getattr(args, key))
    return ColBERT.from_base(
        args.base_model,
        dropout=args.dropout,
        attention_dropout=args.attention_dropout,
        dim=args.dim,
        query_maxlen=tokens_meta["query_maxlen"] - (0 if args.markers else 1),  # as many word pieces
        doc_maxlen=tokens_meta["doc_maxlen"] - (0 if args.markers else 1),
        mask_punctuation=args.mask_punctuation,
        markers=args.markers,
        expand_queries_to=args.expand_queries_to,
    )


def go_on_from(args) -> ColBERT:
    """A ColBERT that is there. Raises InputError for flags of a new one that say otherwise."""
    model = ColBERT.from_pretrained(args.base_model, device="cpu")  # accelerate moves it
    own = {"dim": model.config.dim, "mask_punctuation": model.config.mask_punctuation, "projection": None}
    own |= {"markers": model.config.query_marker_id is not None, "expand_queries_to": model.config.expand_queries_to}
    for key, value in own.items():
        if getattr(args, key) not in (None, value):
            flag = f"--no-{key}" if getattr(args, key) is False else f"--{key} {getattr(args, key)}"
            its = f", its own is {value}" if value is not None else ""
            raise InputError(f"{flag}: {args.base_model} is a ColBERT already{its}: leave it out")
        setattr(args, key, value)
    if (args.dropout, args.attention_dropout) != (None, None):
        model = with_dropout(model, args.dropout, args.attention_dropout)
    return model


def with_dropout(model: ColBERT, dropout: float | None, attention_dropout: float | None) -> ColBERT:
    """The same model with other dropout rates (None leaves them)."""
    encoder = AutoConfig.for_model(**model.config.encoder)
    set_dropout(encoder, dropout, attention_dropout)
    model.config.encoder = encoder.to_dict()
    changed = ColBERT(model.config, model.tokenizer)
    changed.load_state_dict(model.state_dict())
    return changed


def load_teacher(args, accelerator: Accelerator, tokens_meta: dict) -> Distillation | None:
    """What scores the passages of a batch for the loss `distil`, where that is wanted."""
    if not any(loss.partition("=")[0] == "distil" for loss in args.loss):
        if args.teacher or args.teacher_similarity:
            raise InputError("--teacher and --teacher_similarity are of --loss distil: add it, or leave them out")
        return None
    name, similarity = args.teacher or args.base_model, args.teacher_similarity or "sum"
    if is_colbert(name):
        raise InputError(f"--loss distil: {name} is a ColBERT: give the encoder that it began as by --teacher")
    together = functools.partial(gather, accelerator=accelerator) if accelerator.num_processes > 1 else None
    return Distillation.load(name, similarity, args.tokens_dir, tokens_meta, accelerator.device, together)


def main(args):
    cli.check_launch()
    started = time.time()
    on_cpu = args.cpu or not torch.accelerator.is_available()  # said so, processes without a GPU find each other
    one_arena()
    if args.mixed_precision == "auto":
        args.mixed_precision = mixed_precision(PartialState(cpu=on_cpu).device)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        cpu=on_cpu,
        step_scheduler_with_optimizer=False,
        log_with="wandb" if args.wandb_mode != "disabled" else None,
    )
    try:
        with claim(accelerator, args):
            return fit(accelerator, args, started)
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"on the GPU: {first_line(error)}") from None
    except RuntimeError as error:
        if "DefaultCPUAllocator" in str(error):
            raise MemoryError(first_line(error)) from None
        if accelerator.num_processes > 1 and is_of_another_process(error):
            raise InputError("another process of this training has ended: see what it said, then --resume") from None
        raise


def fit(accelerator: Accelerator, args, started: float) -> dict | None:
    """Train, and publish the model; returns what to report, in the main process."""
    tokens_meta = check_args(args, accelerator)
    set_seed(args.seed)
    model = load_model(args, tokens_meta)
    settings = run_settings(args, tokens_meta)
    own_dropout(model.train())
    dev_set = DevSet(args, model) if args.dev_queries else None
    temperature = {"temperature": args.temperature, "learn": args.learn_temperature}
    objective = Objective(args.loss, args.similarity, **temperature, teacher_temperature=args.teacher_temperature)
    objective.to(accelerator.device)
    objective.pooling, objective.distillation = model.config.pooling(), load_teacher(args, accelerator, tokens_meta)
    optimizer, scheduler = make_optimizer(model, args, objective.log_temperature)
    wrapped, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    data = Triples(args.tokens_dir, args.batch_size, args.seed if args.shuffle else None)
    data.check()
    step, stop = resume(accelerator, model, objective, args, settings) if args.resume else 0, 0
    log = Log(accelerator, args, step)
    packed = packable(model.encoder, accelerator.device, COMPUTE_DTYPES[accelerator.mixed_precision])
    compute = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    accelerator.print(f"training on {accelerator.device} in {compute}, {torch.get_num_threads()} threads", flush=True)
    if dev_set and step % args.eval_steps == 0:  # stopped before it was measured
        keep_if_best(accelerator, model, dev_set, log, args.output_dir)
    accelerator.wait_for_everyone()
    log.signals, clock = cli.stop_softly(), time.time()
    log.clock = time.perf_counter()
    how = {"cached_parts": args.cached_parts, "distils": objective.distillation is not None}
    batches_of = functools.partial(micro_batches, data, model=model, accelerator=accelerator, packed=packed, **how)
    with ThreadPoolExecutor(1) as loader:  # builds the next batch while this one computes
        upcoming = loader.submit(batches_of, step)
        while step < args.max_steps and not stop:
            batches = upcoming.result()
            upcoming = loader.submit(batches_of, step + 1)
            said = train_step(accelerator, wrapped, optimizer, batches, objective, args.max_grad_norm)
            log.add(said, scheduler.get_last_lr()[0], sum(batch["tokens"] for batch in batches))
            scheduler.step()
            step += 1

            is_last = step == args.max_steps
            measure = dev_set is not None and (step % args.eval_steps == 0 or is_last)
            save = step % args.save_steps == 0 and not is_last
            if log.is_due() or measure or save or is_last:
                sent = log.flush()
                stop = 0 if is_last else sent
            if measure or save or stop or is_last:
                check_trained(model, step)
                if save or stop:
                    folder = args.output_dir / "checkpoints"
                    save_checkpoint(accelerator, model, objective, settings, folder, step, args.keep_checkpoints)
                if measure and not stop:
                    keep_if_best(accelerator, model, dev_set, log, args.output_dir)
                log.clock = time.perf_counter()  # of training alone
    log.bar.close()
    if stop:
        end_early(accelerator, stop, step)
    return finish(accelerator, model, args, tokens_meta, log, started, time.time() - clock)


def end_early(accelerator: Accelerator, stop: int, step: int) -> None:
    """End the process as a signal asked, after a checkpoint was saved."""
    accelerator.end_training()
    if accelerator.is_main_process:
        cli.say(f"stopped by {signal.Signals(stop).name} after step {step}, which is saved: go on with --resume")
    cli.end(128 + stop)


def finish(
    accelerator: Accelerator, model: ColBERT, args, tokens_meta: dict, log: Log, started: float, seconds
) -> dict:
    """Draw loss.png and publish the model, in the main process; returns what to report."""
    accelerator.wait_for_everyone()
    result = None
    if accelerator.is_main_process:
        losses = [line["loss"] for line in read_log(log.path) if "loss" in line][-100:]
        facts = {
            "base_model": args.base_model,
            "tokens_fingerprint": tokens_meta["fingerprint"],
            "steps": log.step,
            "processes": accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "mixed_precision": accelerator.mixed_precision,
            "train_seconds": round(seconds, 2),
            "loss_of_last_100_steps": round(float(np.mean(losses)), 4) if losses else None,
            "best_dev_mrr@10": log.best_mrr if args.dev_queries else None,
        }
        if losses:
            plot_loss(log.path, args.output_dir / "loss.png")
        meta = make_meta("model", tokens_meta["fingerprint"], started, args, **facts)
        save_model(model, args.output_dir, meta)
        result = {"output_dir": str(args.output_dir), "seconds": meta["seconds"], **facts}
    accelerator.end_training()
    if accelerator.num_processes > 1:
        cli.finish(result)  # before what holds the process group goes with this function
    return result


if __name__ == "__main__":
    run_stage(main, ARGS)
