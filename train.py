"""Train ColBERT on triples: softmax cross-entropy of the positive against its negatives (paper, section 3.3).

    python train.py --tokens_dir tokens --base_model bert-base-uncased --output_dir model
    accelerate launch --multi_gpu --num_processes 4 --mixed_precision bf16 train.py ...   # the same, on four GPUs

reads   tokens/ (tsv2mmap.py) and a Hugging Face encoder, or a ColBERT model to go on from
writes  model/ (weights, settings and tokenizer: what ColBERT.from_pretrained opens), model/log.jsonl (one line a
        step), model/loss.png, model/checkpoints/step-N/ (the last few: a model folder with optimizer, scheduler and
        random state), model/best/ where --dev_queries is given

A run killed at any time goes on with --resume: the same batches, the same losses. The batch of a step is a function
of the step, so the position in the data is the step itself. Ctrl-C and SIGTERM save a checkpoint first.
Reference: 12.5 steps/s of 32 triples on an A100.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nanocolbert import cli
from nanocolbert.cli import InputError, count, first_line, not_negative_float, positive, positive_float, run_stage, seed


def rate(text: str) -> float:
    """A dropout rate."""
    value = cli.share(text)
    if value == 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to below 1")
    return value


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    switch = argparse.BooleanOptionalAction

    group = parser.add_argument_group("data and model")
    group.add_argument("--tokens_dir", type=Path, required=True, help="what tsv2mmap.py wrote, with triples")
    group.add_argument("--base_model", required=True, help="Hugging Face encoder, or a ColBERT model to go on from")
    group.add_argument("--output_dir", type=Path, required=True, help="the model folder to write")
    group.add_argument("--dim", type=positive, help="size of a token embedding (default 128)")
    group.add_argument("--mask_punctuation", action=switch, help="drop punctuation in passages (default: yes)")
    group.add_argument("--similarity", choices=("l2", "cosine"), default="l2", help="of the training loss (default l2)")
    group.add_argument(
        "--projection",
        choices=("orthogonal", "principal"),
        help="how a new projection begins: random rows (default), or the encoder's principal directions",
    )
    group.add_argument("--dropout", type=rate, help="dropout rate of the encoder (default: as it comes)")
    group.add_argument(
        "--attention_dropout",
        type=rate,
        help="of the attention weights (default 0, of a ColBERT as it comes; v1 0.1): above 0 a GPU, too, computes "
        "padded batches",
    )

    group = parser.add_argument_group("optimisation")
    group.add_argument("--max_steps", type=count, default=400_000, help="optimiser steps, exactly (default 400000)")
    group.add_argument("--batch_size", type=positive, default=32, help="triples a step over all processes (default 32)")
    group.add_argument("--gradient_accumulation_steps", type=positive, default=1, help="parts a batch is computed in")
    group.add_argument(
        "--in_batch_negatives",
        action=switch,
        default=False,
        help="also take the other passages of the micro-batch as negatives (not v1)",
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
    group.add_argument(
        "--max_grad_norm", type=not_negative_float, default=2.0, help="clip gradients; 0: not at all (default 2)"
    )
    group.add_argument("--shuffle", action=switch, default=False, help="random order by --seed, else file order as v1")
    group.add_argument("--seed", type=seed, default=12345, help="of dropout, the projection and --shuffle")

    group = parser.add_argument_group("running")
    group.add_argument(
        "--mixed_precision",
        choices=("auto", "no", "fp16", "bf16"),
        default="auto",
        help="auto: bf16 where this machine is faster in it, else fp32 (fp16 on older GPUs)",
    )
    group.add_argument("--cpu", action=switch, default=False, help="train on the CPU even where there is a GPU")
    group.add_argument("--resume", action=switch, default=False, help="go on from the last checkpoint, if there is one")
    group.add_argument("--verify", action=switch, default=False, help="check the checksums of what is read first")
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

    group = parser.add_argument_group("evaluation while training (reranking)")
    group.add_argument("--dev_queries", type=Path, help="qid, query")
    group.add_argument("--dev_qrels", type=Path, help="qrels of these queries")
    group.add_argument("--dev_candidates", type=Path, help="a run, or top1000.dev; pids of the tokens' collection")
    group.add_argument(
        "--dev_depth", type=positive, default=100, help="candidates of a query that are used (default 100)"
    )
    group.add_argument("--eval_steps", type=positive, default=1000, help="steps between evaluations (default 1000)")
    return parser.parse_args()


if __name__ == "__main__":  # before the imports that take seconds: --help, or a wrong flag, is answered at once
    ARGS = cli.start(parse_args)

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, PartialState
from accelerate.utils import load, set_seed
from transformers import AutoConfig

from model import ColBERT
from nanocolbert.checkpoints.layouts import is_colbert
from nanocolbert.compute import COMPUTE_DTYPES, mixed_precision, own_dropout
from nanocolbert.encoder.attention import pack, packable
from nanocolbert.encoder.batches import to_device
from nanocolbert.encoder.pretrained import check_weights, set_dropout
from nanocolbert.maxsim import maxsim, maxsim_packed, maxsim_pairs
from nanocolbert.progress import progress
from nanocolbert.storage import runs
from nanocolbert.storage.artifact import (
    check_apart,
    check_file,
    check_sums,
    locked,
    make_meta,
    naming,
    plain_args,
    publish,
    read_json,
    read_meta,
    replacing,
    sums_of,
    verify,
    write_json,
)
from nanocolbert.storage.ragged import Ids, Ragged, length_batches, load_npy, ranges
from nanocolbert.storage.tsv import read_queries
from nanocolbert.text import FRAME

TRAIN_TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 1 << 16}  # passages that go through the encoder together, if padded
NEW = {"dim": 128, "mask_punctuation": True, "projection": "orthogonal", "attention_dropout": 0.0}  # of a new ColBERT
OURS = ("checkpoints", "best", "log.jsonl", "loss.png", "wandb", "model.new")  # what a training leaves, model aside
STOPS = (signal.SIGTERM, signal.SIGINT)
ROWS = 1 << 20  # triples that are checked at a time


class Triples:
    """The training batches: a function of the step, so that nothing has to be remembered to resume."""

    def __init__(self, tokens_dir, batch_size: int, shuffle_seed: int | None):
        self.folder = Path(tokens_dir)
        self.passages, self.queries = Ragged(self.folder / "passages"), Ragged(self.folder / "queries")
        self.triples = load_npy(self.folder / "triples.npy", "i4", (None, None))  # (n, 2 + k)
        self.batch_size, self.shuffle_seed = batch_size, shuffle_seed
        self.epoch, self.order = -1, None

    def check(self) -> None:
        """Raise InputError where a triple names a query or a passage that is not there."""
        path, n_queries, n_passages = self.folder / "triples.npy", len(self.queries), len(self.passages)
        if not len(self.triples) or self.triples.shape[1] < 3:
            raise InputError(f"{path}: {self.triples.shape} holds no triples: run tsv2mmap.py again")
        for start in range(0, len(self.triples), ROWS):
            rows = self.triples[start : start + ROWS].view(np.uint32)  # below 0 is beyond all
            passages = rows if n_passages >= n_queries else rows[:, 1:]  # faster where it is all of them
            if rows[:, 0].max() >= n_queries or passages.max() >= n_passages:
                row = int(((rows[:, 0] >= n_queries) | (rows[:, 1:] >= n_passages).any(1)).argmax())
                raise InputError(
                    f"{path}: triple {start + row} is {self.triples[start + row].tolist()}, of {n_queries} queries and "
                    f"{n_passages} passages: run tsv2mmap.py again"
                )

    def rows(self, step: int) -> np.ndarray:
        """Triples (batch_size, 2 + k) of a step, counted from 0; the data starts again when it is used up."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        if self.shuffle_seed is None:
            return self.triples[positions % len(self.triples)]
        epochs = positions // len(self.triples)
        return np.concatenate(
            [
                self.triples[self._order(epoch)[positions[epochs == epoch] % len(self.triples)]]
                for epoch in np.unique(epochs).tolist()
            ]
        )

    def _order(self, epoch: int) -> np.ndarray:
        if epoch != self.epoch:
            rng = np.random.default_rng([self.shuffle_seed, epoch])
            self.epoch, self.order = epoch, rng.permutation(np.arange(len(self.triples), dtype=np.int32))
        return self.order


def collate(data: Triples, rows: np.ndarray, model: ColBERT, tokens_per_batch: int, packed: bool) -> dict:
    """A micro-batch of triples (B, 1 + K): framed queries and passages in batches of like length, or all packed."""
    passage_rows = rows[:, 1:].reshape(-1)  # (N,), N = B * K: each query's positive, then its negatives
    lengths = data.passages.lengths(passage_rows)
    groups = length_batches(lengths + FRAME, (1 << 62) if packed else tokens_per_batch)
    queries, passages = data.queries.gather(rows[:, 0]), [data.passages.gather(passage_rows[group]) for group in groups]
    for name, (values, _) in (("queries", queries), *(("passages", part) for part in passages)):
        model.check_ids(data.folder / name / "values.npy", values)  # on a GPU an error that names nothing
    input_ids, attention_mask = model.frame_queries(*queries)
    batches = [model.frame_passages(*part) for part in passages]
    kept = [model.kept(*batch) for batch in batches]  # (B', L) each
    counts = torch.cat([part.sum(1) for part in kept])  # (N,), in the order of the batches
    if packed:
        kept = [part[mask.bool()] for part, (_, mask) in zip(kept, batches, strict=True)]
        everything = torch.ones_like(input_ids)  # the fill has outputs, too
        batches = [pack((input_ids, attention_mask, everything), *((ids, mask, mask) for ids, mask in batches))]
    else:
        batches = [(input_ids, attention_mask), *batches]
    mask = torch.arange(int(counts.max())) < counts[:, None]  # (N, Ld)
    slots = torch.zeros(mask.shape, dtype=torch.int64)
    slots[mask] = torch.cat([part.view(-1) for part in kept]).nonzero()[:, 0] + input_ids.numel()
    back = torch.from_numpy(np.argsort(np.concatenate(groups)))
    return {
        "inputs": {"batches": batches, "scored": model.scored(attention_mask), "slots": slots[back]},
        "mask": mask[back],
        "passage_rows": torch.from_numpy(passage_rows.astype(np.int64)).view(len(rows), -1),  # (B, K)
    }


def triples_loss(Q, P, mask, passage_rows, scale: float, in_batch_negatives: bool) -> torch.Tensor:
    """Mean cross-entropy of each query's positive against its negatives, or against all passages of the batch.

    Q (B, Lq, D), P (B * K, Ld, D), mask (B * K, Ld), passage_rows (B, K): a query's positive stands first.
    scale: 2 gives v1's l2 similarity -|q - d|^2 = 2 q.d - 2 its softmax, 1 is cosine.
    """
    B, K = passage_rows.shape
    if not in_batch_negatives:
        logits = maxsim_pairs(Q, P.view(B, K, *P.shape[1:]), mask.view(B, K, -1))  # (B, K)
        return F.cross_entropy(scale * logits, torch.zeros(B, dtype=torch.long, device=Q.device))
    positives = torch.arange(B, device=Q.device) * K
    same = passage_rows.view(1, -1) == passage_rows[:, :1]  # another copy of the positive is no negative
    same.scatter_(1, positives[:, None], False)
    logits = maxsim(Q, P, mask).masked_fill(same, -torch.inf)  # (B, B * K)
    return F.cross_entropy(scale * logits, positives)


class DevSet:
    """Reranking of given candidates, measured while training: MRR@10 by the same code as evaluate.py."""

    def __init__(self, args, model: ColBERT):
        self.qrels = runs.read_qrels(args.dev_qrels)
        texts = {qid: text for qid, text in read_queries(args.dev_queries).items() if qid in self.qrels}
        self.passages = Ragged(args.tokens_dir / "passages")
        pids = Ids(args.tokens_dir / "pids.npy")
        candidates = runs.read_candidates(args.dev_candidates, pids, texts)
        self.qids = [qid for qid in texts if len(candidates[qid])]
        if not self.qids:
            raise InputError(f"{args.dev_candidates}: has candidates for none of the judged queries")
        self.qrels = {qid: self.qrels[qid] for qid in self.qids}
        self.rows = [candidates[qid][: args.dev_depth] for qid in self.qids]
        self.pids = [pids.text(rows) for rows in self.rows]
        self.query_tokens = model.tokenize([texts[qid] for qid in self.qids], "query")

    @torch.inference_mode()
    def mrr(self, model: ColBERT) -> float:
        """MRR@10 of the candidates in the order of the model's scores; every candidate is embedded once."""
        unique, inverse = np.unique(np.concatenate(self.rows), return_inverse=True)
        embeddings, counts, _ = model.embed_passages(*self.passages.gather(unique))
        embeddings, starts = torch.from_numpy(embeddings), np.cumsum(counts) - counts
        with model.autocast():
            queries = model.embed_queries(model.frame_queries(*self.query_tokens))
        run, first = {}, 0
        for query, qid, pids in zip(queries, self.qids, self.pids, strict=True):
            rows = inverse[first : first + len(pids)]
            first += len(pids)
            packed = embeddings[torch.from_numpy(ranges(starts[rows], counts[rows]))].float()
            scores = maxsim_packed(query[None], packed, torch.from_numpy(counts[rows]))[0]
            run[qid] = dict(zip(pids, scores.tolist(), strict=True))
        return runs.measure(self.qrels, run, ["MRR@10"])["MRR@10"]


def save_checkpoint(
    accelerator: Accelerator, model: ColBERT, settings: dict, folder: Path, step: int, keep: int
) -> None:
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
                write_json(partial / "run.json", {**settings, **facts, "files": sums_of(partial)}, summed=True)
            partial.rename(final)
            for old in list_checkpoints(folder)[:-keep]:
                retire(old)
    except BaseException:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    accelerator.wait_for_everyone()


def retire(checkpoint: Path) -> None:
    """Remove a checkpoint; renamed first: half removed, it is none."""
    removed = checkpoint.with_name(f"{checkpoint.name}.removed")
    checkpoint.rename(removed)
    shutil.rmtree(removed)


def remove_leftovers(folder: Path) -> None:
    """Remove checkpoints that a kill left half written, or half removed."""
    for path in (*folder.glob("step-*.partial"), *folder.glob("step-*.removed")):
        shutil.rmtree(path)


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, the oldest first, by number."""
    found = (path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit())
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def write_model(model: ColBERT, folder: Path, meta: dict) -> None:
    """Write a model and its meta.json, which lists its files and their checksums."""
    model.save_pretrained(folder)
    write_json(folder / "meta.json", {**meta, "files": sums_of(folder)}, summed=True)


def save_model(model: ColBERT, folder: Path, meta: dict) -> None:
    """Put the finished model into a folder that may hold other things: settings and meta.json come last."""
    with publish(folder / "model.new") as partial:
        write_model(model, partial, meta)
    names = sorted(os.listdir(folder / "model.new"), key=lambda name: (name == "meta.json", name == "config.json"))
    for name in names:
        os.replace(folder / "model.new" / name, folder / name)
    (folder / "model.new").rmdir()


def check_trained(model: ColBERT, step: int) -> None:
    """Raise InputError naming the step if a weight is not finite, or if a query has no embeddings."""
    what = f"the model after step {step}"
    try:
        check_weights(model, what)
        with torch.inference_mode():
            model.embed_queries(model.frame_queries(np.zeros(0, np.int32), np.zeros(1, np.int64)))
    except InputError as error:
        reason = str(error).removeprefix(f"{what}: ").split(":")[0]
        raise InputError(f"{what}: {reason}: it was not saved: lower --lr, or use --mixed_precision bf16") from None


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


def plot_loss(log: Path, picture: Path) -> None:
    """Draw the loss of every step, its running mean, and MRR@10 on the dev set where it was measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_log(log)
    losses = np.array([(line["step"], line["loss"]) for line in lines if "loss" in line]).reshape(-1, 2)
    steps, losses = losses.T
    window = max(1, len(losses) // 50)
    mean = np.convolve(losses, np.ones(window) / window, mode="valid")
    figure, axis = plt.subplots(figsize=(8, 4.5))
    axis.plot(steps, losses, color="0.8", linewidth=0.8, label="loss of a step")
    axis.plot(steps[window - 1 :], mean, color="C0", label=f"mean of {window} steps")
    axis.set(xlabel="step", ylabel="cross-entropy")
    dev = np.array([(line["step"], line["dev_mrr@10"]) for line in lines if "dev_mrr@10" in line])
    if len(dev):
        right = axis.twinx()
        right.plot(*dev.T, "C1.-", label="MRR@10 on dev candidates")
        right.set_ylabel("MRR@10")
        right.legend(loc="upper center")
    axis.legend(loc="upper right")
    figure.tight_layout()
    with replacing(picture) as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


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


def check_args(args, accelerator: Accelerator) -> tuple[dict, int]:
    """Check what can be checked before anything is written; returns tokens' meta.json and the micro-batch size."""
    tokens_meta = read_meta(args.tokens_dir, "tokens", "tsv2mmap.py", check=args.verify)
    if args.verify and (Path(args.base_model) / "meta.json").is_file():
        verify(args.base_model)
    if not tokens_meta["counts"].get("triples"):
        raise InputError(f"{args.tokens_dir}: holds no triples: run tsv2mmap.py with --triples")
    shares = accelerator.num_processes * args.gradient_accumulation_steps
    if args.batch_size % shares:
        raise InputError(
            f"--batch_size {args.batch_size} does not divide among {accelerator.num_processes} process(es) x "
            f"{args.gradient_accumulation_steps} accumulation step(s): make it a multiple of {shares}"
        )
    dev = (args.dev_queries, args.dev_qrels, args.dev_candidates)
    if any(dev) and not all(dev):
        raise InputError(
            "evaluation while training: give all of --dev_queries, --dev_qrels and --dev_candidates, or none"
        )
    for path in filter(None, dev):
        check_file(path, "dev set of train.py")
    return tokens_meta, args.batch_size // shares


def load_model(args, tokens_meta: dict) -> ColBERT:
    """The base model, as a ColBERT with the lengths the tokens were cut to. Raises InputError if they do not fit.

    What args leave open about the model is filled in.
    """
    if is_colbert(args.base_model):
        model = ColBERT.from_pretrained(args.base_model, device="cpu")  # accelerate moves it
        own = {"dim": model.config.dim, "mask_punctuation": model.config.mask_punctuation, "projection": None}
        for key, value in own.items():
            if getattr(args, key) not in (None, value):
                flag = f"--no-{key}" if getattr(args, key) is False else f"--{key} {getattr(args, key)}"
                its = f", its own is {value}" if value is not None else ""
                raise InputError(f"{flag}: {args.base_model} is a ColBERT already{its}: leave it out")
            setattr(args, key, value)
        if (args.dropout, args.attention_dropout) != (None, None):
            model = with_dropout(model, args.dropout, args.attention_dropout)
    else:
        for key, value in NEW.items():
            setattr(args, key, value if getattr(args, key) is None else getattr(args, key))
        model = ColBERT.from_base(
            args.base_model,
            dropout=args.dropout,
            attention_dropout=args.attention_dropout,
            dim=args.dim,
            query_maxlen=tokens_meta["query_maxlen"],
            doc_maxlen=tokens_meta["doc_maxlen"],
            mask_punctuation=args.mask_punctuation,
        )
    if args.projection == "principal":
        if args.dim > model.linear.in_features:
            raise InputError(
                f"--dim {args.dim}, but the encoder has {model.linear.in_features} principal directions: "
                "lower --dim, or leave out --projection principal"
            )
        passages = Ragged(args.tokens_dir / "passages")
        sample = np.random.default_rng(args.seed).choice(len(passages), min(512, len(passages)), replace=False)
        model.eval().project_on_principal(*passages.gather(np.sort(sample)))
    model.check_tokens(args.base_model, args.tokens_dir, tokens_meta)
    return model


def with_dropout(model: ColBERT, dropout: float | None, attention_dropout: float | None) -> ColBERT:
    """The same model with other dropout rates (None leaves them)."""
    encoder = AutoConfig.for_model(**model.config.encoder)
    set_dropout(encoder, dropout, attention_dropout)
    model.config.encoder = encoder.to_dict()
    changed = ColBERT(model.config, model.tokenizer)
    changed.load_state_dict(model.state_dict())
    return changed


def drops(model: ColBERT) -> bool:
    """Whether training draws random numbers: a dropout rate of the encoder is above 0."""
    rates = [value for key, value in vars(model.encoder.config).items() if "dropout" in key]
    return any(isinstance(value, float | int) and value > 0 for value in rates)


def make_optimizer(model: ColBERT, args):
    """AdamW and its schedule: linear warm-up, then constant (v1) or linear decay to 0 at --max_steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, eps=1e-8, weight_decay=args.weight_decay, fused=True)

    def factor(step: int) -> float:
        rising = (step + 1) / (args.warmup_steps + 1)
        falling = (args.max_steps - step) / max(1, args.max_steps - args.warmup_steps)
        return min(rising, 1.0 if args.schedule == "constant" else max(0.0, falling))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class Log:
    """log.jsonl, the progress bar and wandb: the loss of every step, transferred and averaged once for many steps."""

    def __init__(self, accelerator: Accelerator, args, step: int):
        self.accelerator, self.args, self.path = accelerator, args, args.output_dir / "log.jsonl"
        self.losses, self.step, self.clock, self.is_first = [], step, time.time(), True
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

    def add(self, loss: torch.Tensor) -> None:
        """Take the loss of the next step, which stays on its device for now."""
        self.losses.append(loss)
        self.bar.update()

    def is_due(self) -> bool:
        """Whether losses should be written after this step: all of them, but where waiting for them costs time."""
        on_gpu = self.accelerator.device.type != "cpu"
        return not on_gpu or (self.step + len(self.losses)) % self.args.log_steps == 0 or self.is_first

    def flush(self, lr: float) -> int:
        """Write the losses taken since the last time. Raises InputError if one is not finite.

        Returns the signal that one of the processes was sent, the same in all of them, or 0.
        """
        sent = torch.tensor([float(number in self.signals) for number in STOPS], device=self.losses[0].device)
        losses = self.accelerator.reduce(torch.cat([torch.stack(self.losses), sent]), "mean").tolist()
        losses, sent = losses[: -len(STOPS)], losses[-len(STOPS) :]
        rate = len(losses) * self.args.batch_size / (time.time() - self.clock)
        for loss in losses:
            self.step += 1
            self.write(step=self.step, loss=loss)
        self.bar.set_postfix(loss=f"{np.mean(losses):.4f}", examples_per_s=f"{rate:.1f}", refresh=self.is_first)
        self.is_first = False
        self.accelerator.log({"loss": float(np.mean(losses)), "lr": lr, "examples/s": rate}, step=self.step)
        if not np.isfinite(losses).all():
            raise InputError(f"the loss is not finite by step {self.step}: lower --lr, or use --mixed_precision bf16")
        self.losses, self.clock = [], time.time()
        return next((number for number, share in zip(STOPS, sent, strict=True) if share), 0)

    def write(self, **line) -> None:
        if self.accelerator.is_main_process:
            with naming(self.path):
                self.file.write(json.dumps(line) + "\n")

    def add_mrr(self, mrr: float) -> None:
        """Write MRR@10 on the dev set."""
        self.write(step=self.step, **{"dev_mrr@10": mrr})
        self.accelerator.log({"dev_mrr@10": mrr}, step=self.step)
        self.best_mrr, self.measured = max(mrr, self.best_mrr), self.step


def train_step(accelerator: Accelerator, wrapped, optimizer, batches: list[dict], args) -> torch.Tensor:
    """One optimiser step over the micro-batches of a step; returns their mean loss, on its device."""
    scale = {"l2": 2.0, "cosine": 1.0}[args.similarity]
    total = torch.zeros((), device=accelerator.device)
    for batch in batches:
        with accelerator.accumulate(wrapped):
            Q, P = wrapped(**batch["inputs"])
            loss = triples_loss(Q, P, batch["mask"], batch["passage_rows"], scale, args.in_batch_negatives)
            accelerator.backward(loss)
            if accelerator.sync_gradients and args.max_grad_norm > 0:
                accelerator.clip_grad_norm_(wrapped.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        total += loss.detach() / len(batches)
    return total


def keep_if_best(model: ColBERT, dev_set: DevSet, log: Log, output_dir: Path) -> None:
    """Measure the model on the dev set, and publish it as output_dir/best if it is."""
    model.eval()
    mrr = dev_set.mrr(model)
    model.train()
    log.bar.write(f"step {log.step}: MRR@10 on dev candidates {mrr:.4f}")
    if mrr > log.best_mrr:
        with publish(output_dir / "best") as partial:
            write_model(model, partial, {"kind": "model", "step": log.step, "dev_mrr@10": mrr})
    log.add_mrr(mrr)  # last: what the log says is there


def resume(accelerator: Accelerator, model: ColBERT, args, settings: dict) -> int:
    """Load the last checkpoint, if there is one; returns its step.

    Raises InputError if it is damaged, or of a run that would not go on the same: other settings, or other processes
    where those draw their own dropout or negatives.
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
    for key in settings:
        if saved.get(key) != settings[key]:
            raise InputError(
                f"{last}: trained with {key} {saved.get(key)}, now {settings[key]}: give the same arguments to "
                "go on, or another --output_dir"
            )
    if step > args.max_steps:
        raise InputError(f"{last}: already past --max_steps {args.max_steps}: give more, or another --output_dir")
    processes = saved.get("processes", max(1, len(list(last.glob("random_states_*.pkl")))))
    check_same_draws(accelerator, last, processes, saved.get("device"), args.in_batch_negatives, drops(model))

    parts = ["model.safetensors", "optimizer.bin", "scheduler.bin"]
    for name in (*parts, *(f"random_states_{number}.pkl" for number in range(processes))):
        if not (last / name).is_file():
            raise InputError(f"{last / name}: missing: restore it, or {remedy}")
    problem = None
    with ThreadPoolExecutor(1) as pool:  # the checksums while it is loaded
        sums = pool.submit(check_sums, last, saved.get("files", {}) if accelerator.is_main_process else {})
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
    check_weights(model, last)
    accelerator.print(f"going on after step {step}")
    return step


def check_same_draws(accelerator, last: Path, processes: int, device: str | None, in_batch: bool, drops: bool) -> None:
    """Raise InputError where these processes would draw other dropout, or other negatives, than the checkpoint's."""
    was, now = f"by {processes} process(es)", f"{accelerator.num_processes}"
    differs = processes != accelerator.num_processes and (in_batch or drops)
    if not differs and drops and device not in (None, accelerator.device.type):
        was, now, differs = f"on {device}", f"on {accelerator.device.type}", True
    if differs:
        raise InputError(
            f"{last}: trained {was}, now {now}, which would draw other {'dropout' if drops else 'negatives'}: go on as "
            "it was, or give another --output_dir"
        )


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


def run_settings(args, tokens_meta: dict) -> dict:
    """What must not change between a run and its resumption: all but where and how often things are written."""
    free = ["output_dir", "tokens_dir", "cpu", "resume", "verify", "save_steps", "keep_checkpoints", "log_steps"]
    settings = {key: value for key, value in plain_args(args).items() if key not in (*free, "eval_steps")}
    settings = {key: value for key, value in settings.items() if not key.startswith(("wandb", "dev"))}
    if args.schedule == "constant":  # then a run may be made longer
        del settings["max_steps"]
    return {**settings, "tokens": tokens_meta["fingerprint"]}


def main(args):
    cli.check_launch()
    started = time.time()
    on_cpu = args.cpu or not torch.accelerator.is_available()  # said so, processes without a GPU find each other
    if args.mixed_precision == "auto":
        args.mixed_precision = mixed_precision(PartialState(cpu=on_cpu).device)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        cpu=on_cpu,
        step_scheduler_with_optimizer=False,
        log_with="wandb" if args.wandb_mode != "disabled" else None,
    )
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with claim(accelerator, args):
            return fit(accelerator, args, started)
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"on the GPU: {first_line(error)}") from None
    except RuntimeError as error:
        if "DefaultCPUAllocator" in str(error):
            raise MemoryError(first_line(error)) from None
        if accelerator.num_processes > 1 and (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise InputError("another process of this training has ended: see what it said, then --resume") from None
        raise


def fit(accelerator: Accelerator, args, started: float) -> dict | None:
    """Train, and publish the model; returns what to report, in the main process."""
    tokens_meta, micro_size = check_args(args, accelerator)
    set_seed(args.seed)
    model = load_model(args, tokens_meta)
    settings = run_settings(args, tokens_meta)
    own_dropout(model.train())
    dev_set = DevSet(args, model) if args.dev_queries else None
    wrapped, optimizer, scheduler = accelerator.prepare(model, *make_optimizer(model, args))
    data = Triples(args.tokens_dir, args.batch_size, args.seed if args.shuffle else None)
    data.check()
    step, stop = resume(accelerator, model, args, settings) if args.resume else 0, 0
    log = Log(accelerator, args, step)
    tokens_per_batch = TRAIN_TOKENS_PER_BATCH.get(accelerator.device.type, 1 << 14)
    packed = packable(model.encoder, accelerator.device, COMPUTE_DTYPES[accelerator.mixed_precision])

    def micro_batches(step: int) -> list[dict]:
        rows = data.rows(step)
        shares = rows.reshape(args.gradient_accumulation_steps, accelerator.num_processes, micro_size, rows.shape[1])
        mine = shares[:, accelerator.process_index]
        batches = [collate(data, part, model, tokens_per_batch, packed) for part in mine]
        return to_device(batches, accelerator.device)

    compute = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    accelerator.print(f"training on {accelerator.device} in {compute}, {torch.get_num_threads()} threads", flush=True)
    if dev_set and log.measured < step and step % args.eval_steps == 0 and accelerator.is_main_process:
        keep_if_best(model, dev_set, log, args.output_dir)  # stopped before it was measured
    accelerator.wait_for_everyone()
    log.signals, clock = cli.stop_softly(), time.time()
    with ThreadPoolExecutor(1) as loader:  # builds the next batch while this one computes
        upcoming = loader.submit(micro_batches, step)
        while step < args.max_steps and not stop:
            batches, upcoming = upcoming.result(), loader.submit(micro_batches, step + 1)
            log.add(train_step(accelerator, wrapped, optimizer, batches, args))
            scheduler.step()
            step += 1
            is_last = step == args.max_steps
            measure = dev_set is not None and (step % args.eval_steps == 0 or is_last)
            save = step % args.save_steps == 0 and not is_last
            if log.is_due() or measure or save or is_last:
                sent = log.flush(scheduler.get_last_lr()[0])
                stop = 0 if is_last else sent
            if measure or save or stop or is_last:
                check_trained(model, step)
            if save or stop:
                save_checkpoint(
                    accelerator, model, settings, args.output_dir / "checkpoints", step, args.keep_checkpoints
                )
            if measure and not stop:
                if accelerator.is_main_process:
                    keep_if_best(model, dev_set, log, args.output_dir)
                accelerator.wait_for_everyone()
    train_seconds = time.time() - clock
    log.bar.close()
    if stop:
        accelerator.end_training()
        if accelerator.is_main_process:
            cli.say(f"stopped by {signal.Signals(stop).name} after step {step}, which is saved: go on with --resume")
        cli.end(128 + stop)

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        losses = [line["loss"] for line in read_log(log.path) if "loss" in line][-100:]
        facts = {
            "base_model": args.base_model,
            "tokens_fingerprint": tokens_meta["fingerprint"],
            "steps": step,
            "processes": accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "mixed_precision": accelerator.mixed_precision,
            "train_seconds": round(train_seconds, 2),
            "loss_of_last_100_steps": round(float(np.mean(losses)), 4) if losses else None,
            "best_dev_mrr@10": log.best_mrr if dev_set else None,
        }
        if losses:
            plot_loss(log.path, args.output_dir / "loss.png")
        meta = make_meta("model", tokens_meta["fingerprint"], started, args, **facts)
        save_model(model, args.output_dir, meta)
    accelerator.end_training()
    result = None
    if accelerator.is_main_process:
        result = {"output_dir": str(args.output_dir), "seconds": meta["seconds"], **facts}
    if accelerator.num_processes > 1:
        cli.finish(result)  # before what holds the process group goes with this function
    return result


if __name__ == "__main__":
    run_stage(main, ARGS)
