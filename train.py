"""Train ColBERT on triples: softmax cross-entropy of the positive against its negatives (paper, section 3.3).

    python train.py --tokens_dir tokens --base_model bert-base-uncased --output_dir model
    accelerate launch --multi_gpu --num_processes 4 --mixed_precision bf16 train.py ...   # the same, on four GPUs

reads   tokens/ (tsv2mmap.py) and a Hugging Face encoder, or a ColBERT model to go on from
writes  model/ (weights, settings and tokenizer: what ColBERT.from_pretrained opens), model/log.jsonl (one line a
        step), model/loss.png, model/checkpoints/step-N/ (the last few: a model folder with optimizer, scheduler and
        random state), model/best/ where --dev_queries is given

A run killed at any time goes on with --resume: the same batches, the same losses. The batch of a step is a function
of the step, so the position in the data is the step itself. Reference: 12.5 steps/s of 32 triples on an A100.
"""

import argparse
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    switch = argparse.BooleanOptionalAction

    group = parser.add_argument_group("data and model")
    group.add_argument("--tokens_dir", type=Path, required=True, help="what tsv2mmap.py wrote, with triples")
    group.add_argument("--base_model", required=True, help="Hugging Face encoder, or a ColBERT model to go on from")
    group.add_argument("--output_dir", type=Path, required=True, help="the model folder to write")
    group.add_argument("--dim", type=int, default=128, help="size of a token embedding (default 128)")
    group.add_argument("--mask_punctuation", action=switch, default=True, help="drop punctuation in passages")
    group.add_argument("--similarity", choices=("l2", "cosine"), default="l2", help="of the training loss (default l2)")
    group.add_argument(
        "--projection",
        choices=("orthogonal", "principal"),
        default="orthogonal",
        help="how a new projection begins: random rows, or the encoder's principal directions",
    )
    group.add_argument("--dropout", type=float, help="dropout rate of the encoder (default: as it comes)")
    group.add_argument(
        "--attention_dropout",
        type=float,
        default=0.0,
        help="of the attention weights (default 0; v1 0.1): above 0 a GPU, too, computes padded batches",
    )

    group = parser.add_argument_group("optimisation")
    group.add_argument("--max_steps", type=int, default=400_000, help="optimiser steps, exactly (default 400000)")
    group.add_argument("--batch_size", type=int, default=32, help="triples a step over all processes (default 32)")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1, help="parts a batch is computed in")
    group.add_argument(
        "--in_batch_negatives",
        action=switch,
        default=False,
        help="also take the other passages of the micro-batch as negatives (not v1)",
    )
    group.add_argument("--lr", type=float, default=3e-6, help="peak learning rate (default 3e-6)")
    group.add_argument("--warmup_steps", type=int, default=0, help="steps of linear warm-up (default 0)")
    group.add_argument(
        "--schedule",
        choices=("constant", "linear"),
        default="constant",
        help="after the warm-up: constant as v1, or linear decay to 0 at --max_steps",
    )
    group.add_argument("--weight_decay", type=float, default=0.0, help="of AdamW (default 0)")
    group.add_argument("--max_grad_norm", type=float, default=2.0, help="clip gradients; 0: not at all (default 2)")
    group.add_argument("--shuffle", action=switch, default=False, help="random order by --seed, else file order as v1")
    group.add_argument("--seed", type=int, default=12345, help="of dropout, the projection and --shuffle")

    group = parser.add_argument_group("running")
    group.add_argument(
        "--mixed_precision",
        choices=("auto", "no", "fp16", "bf16"),
        default="auto",
        help="auto: bf16 where this machine is faster in it, else fp32 (fp16 on older GPUs)",
    )
    group.add_argument("--cpu", action=switch, default=False, help="train on the CPU even where there is a GPU")
    group.add_argument("--resume", action=switch, default=False, help="go on from the last checkpoint, if there is one")
    group.add_argument("--save_steps", type=int, default=10_000, help="steps between checkpoints (default 10000)")
    group.add_argument("--keep_checkpoints", type=int, default=2, help="how many to keep (default 2)")
    group.add_argument("--log_steps", type=int, default=10, help="steps between writes to the log (default 10)")
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
    group.add_argument("--dev_depth", type=int, default=100, help="candidates of a query that are used (default 100)")
    group.add_argument("--eval_steps", type=int, default=1000, help="steps between evaluations (default 1000)")
    return parser.parse_args()


if __name__ == "__main__":  # before the imports that take seconds: --help, or a wrong flag, is answered at once
    ARGS = parse_args()

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed

import runs
from artifact import check_file, make_meta, plain_args, publish, read_meta, write_json
from attention import pack, packable
from cli import InputError, finish, run_stage
from compute import COMPUTE_DTYPES, mixed_precision, own_dropout
from layouts import is_colbert
from maxsim import maxsim, maxsim_packed, maxsim_pairs
from model import FRAME, ColBERT, length_batches, to_device
from progress import progress
from ragged import Ids, Ragged, ranges
from tsv import read_queries

TRAIN_TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 1 << 16}  # passages that go through the encoder together, if padded


class Triples:
    """The training batches: a function of the step, so that nothing has to be remembered to resume."""

    def __init__(self, tokens_dir, batch_size: int, shuffle_seed: int | None):
        self.passages, self.queries = Ragged(Path(tokens_dir) / "passages"), Ragged(Path(tokens_dir) / "queries")
        self.triples = np.load(Path(tokens_dir) / "triples.npy", mmap_mode="r")  # (n, 2 + k)
        self.batch_size, self.shuffle_seed = batch_size, shuffle_seed
        self.epoch, self.order = -1, None

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
    input_ids, attention_mask = model.frame_queries(*data.queries.gather(rows[:, 0]))
    passage_rows = rows[:, 1:].reshape(-1)  # (N,), N = B * K: each query's positive, then its negatives
    lengths = data.passages.lengths(passage_rows)
    groups = length_batches(lengths + FRAME, (1 << 62) if packed else tokens_per_batch)
    batches = [model.frame_passages(*data.passages.gather(passage_rows[group])) for group in groups]
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
        pids = Ids(args.tokens_dir / "pids.npy")
        candidates = runs.read_candidates(args.dev_candidates, pids, texts)
        self.qids = [qid for qid in texts if len(candidates[qid])]
        if not self.qids:
            raise InputError(f"{args.dev_candidates}: has candidates for none of the judged queries")
        self.qrels = {qid: self.qrels[qid] for qid in self.qids}
        self.rows = [candidates[qid][: args.dev_depth] for qid in self.qids]
        self.pids = [pids.text(rows) for rows in self.rows]
        self.query_tokens = model.tokenize([texts[qid] for qid in self.qids], "query")
        self.passages = Ragged(args.tokens_dir / "passages")

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
    final, partial = folder / f"step-{step:07d}", folder / f"step-{step:07d}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(partial, safe_serialization=True)
    if accelerator.is_main_process:
        model.config.save_pretrained(partial)
        model.tokenizer.save_pretrained(partial)
        write_json(partial / "run.json", settings)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, the oldest first, by number."""
    found = (path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit())
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def save_model(model: ColBERT, folder: Path, meta: dict) -> None:
    """Put the finished model into a folder that may hold other things: settings and meta.json come last."""
    with publish(folder / "model.new") as partial:
        model.save_pretrained(partial)
        write_json(partial / "meta.json", meta)
    names = sorted(os.listdir(folder / "model.new"), key=lambda name: (name == "meta.json", name == "config.json"))
    for name in names:
        os.replace(folder / "model.new" / name, folder / name)
    (folder / "model.new").rmdir()


def read_log(path: Path) -> list[dict]:
    """Lines of log.jsonl; a last line that a kill left half-written is passed over."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


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
    figure.savefig(picture, dpi=120)
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


def check_args(args, accelerator: Accelerator) -> tuple[dict, int]:
    """Check what can be checked before anything is written; returns tokens' meta.json and the micro-batch size."""
    tokens_meta = read_meta(args.tokens_dir, "tokens", "tsv2mmap.py")
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
        raise InputError("evaluation while training needs --dev_queries, --dev_qrels and --dev_candidates")
    for path in filter(None, dev):
        check_file(path, "dev set of train.py")
    checkpoints = list_checkpoints(args.output_dir / "checkpoints")
    if (args.output_dir / "meta.json").exists():
        raise InputError(f"{args.output_dir}: holds a finished model: remove it, or choose another --output_dir")
    if checkpoints and not args.resume:
        raise InputError(f"{args.output_dir}: holds {checkpoints[-1].name}: go on with --resume, or remove the folder")
    return tokens_meta, args.batch_size // shares


def load_model(args, tokens_meta: dict) -> ColBERT:
    """The base model, as a ColBERT with the lengths the tokens were cut to. Raises InputError if they do not fit."""
    if is_colbert(args.base_model):
        model = ColBERT.from_pretrained(args.base_model, device="cpu")  # accelerate moves it
    else:
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
        lines = [line for line in read_log(self.path) if line["step"] <= step]  # later ones will be written again
        self.best_mrr = max((line["dev_mrr@10"] for line in lines if "dev_mrr@10" in line), default=0.0)
        if accelerator.is_main_process:
            args.output_dir.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
            self.file = self.path.open("a", buffering=1)
        if args.wandb_mode != "disabled":
            os.environ["WANDB_MODE"] = wandb_mode(args.wandb_mode)
            os.environ.setdefault("WANDB_SILENT", "true")
            accelerator.init_trackers(args.wandb_project, plain_args(args), {"wandb": {"dir": str(args.output_dir)}})
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

    def flush(self, lr: float) -> None:
        """Write the losses taken since the last time. Raises InputError if one is not finite."""
        if not self.losses:
            return
        losses = self.accelerator.reduce(torch.stack(self.losses), "mean").tolist()
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

    def write(self, **line) -> None:
        if self.accelerator.is_main_process:
            self.file.write(json.dumps(line) + "\n")

    def add_mrr(self, mrr: float) -> bool:
        """Write MRR@10 on the dev set; returns whether it is the best so far."""
        self.write(step=self.step, **{"dev_mrr@10": mrr})
        self.accelerator.log({"dev_mrr@10": mrr}, step=self.step)
        is_best, self.best_mrr = mrr > self.best_mrr, max(mrr, self.best_mrr)
        return is_best


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
    if log.add_mrr(mrr):
        with publish(output_dir / "best") as partial:
            model.save_pretrained(partial)
            write_json(partial / "meta.json", {"kind": "model", "step": log.step, "dev_mrr@10": mrr})


def resume(accelerator: Accelerator, args, tokens_meta: dict) -> int:
    """Load the last checkpoint, if there is one; returns its step. Raises InputError if it is of another run."""
    checkpoints = list_checkpoints(args.output_dir / "checkpoints")
    if not checkpoints:
        return 0
    saved, asked = json.loads((checkpoints[-1] / "run.json").read_text()), run_settings(args, tokens_meta)
    for key in asked:
        if saved.get(key) != asked[key]:
            raise InputError(
                f"{checkpoints[-1]}: trained with {key} {saved.get(key)}, now {asked[key]}: give the same arguments to "
                "go on, or another --output_dir"
            )
    accelerator.load_state(checkpoints[-1])
    step = int(checkpoints[-1].name.removeprefix("step-"))
    accelerator.print(f"going on after step {step}")
    return step


def run_settings(args, tokens_meta: dict) -> dict:
    """What must not change between a run and its resumption: all but where and how often things are written."""
    free = ("output_dir", "tokens_dir", "cpu", "resume", "save_steps", "keep_checkpoints", "log_steps", "eval_steps")
    settings = {key: value for key, value in plain_args(args).items() if key not in free}
    settings = {key: value for key, value in settings.items() if not key.startswith(("wandb", "dev"))}
    if args.schedule == "constant":  # then a run may be made longer
        del settings["max_steps"]
    return {**settings, "tokens": tokens_meta["fingerprint"]}


def main(args):
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
    tokens_meta, micro_size = check_args(args, accelerator)
    set_seed(args.seed)
    model = load_model(args, tokens_meta)
    own_dropout(model.train())
    dev_set = DevSet(args, model) if args.dev_queries else None
    wrapped, optimizer, scheduler = accelerator.prepare(model, *make_optimizer(model, args))
    step = resume(accelerator, args, tokens_meta) if args.resume else 0
    log = Log(accelerator, args, step)
    data = Triples(args.tokens_dir, args.batch_size, args.seed if args.shuffle else None)
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
    clock = time.time()
    with ThreadPoolExecutor(1) as loader:  # builds the next batch while this one computes
        upcoming = loader.submit(micro_batches, step)
        while step < args.max_steps:
            batches, upcoming = upcoming.result(), loader.submit(micro_batches, step + 1)
            log.add(train_step(accelerator, wrapped, optimizer, batches, args))
            scheduler.step()
            step += 1
            is_last = step == args.max_steps
            measure = dev_set is not None and (step % args.eval_steps == 0 or is_last)
            save = step % args.save_steps == 0 and not is_last
            if log.is_due() or measure or save or is_last:
                log.flush(scheduler.get_last_lr()[0])
            if measure and accelerator.is_main_process:
                keep_if_best(model, dev_set, log, args.output_dir)
            if save:
                settings = run_settings(args, tokens_meta)
                save_checkpoint(
                    accelerator, model, settings, args.output_dir / "checkpoints", step, args.keep_checkpoints
                )
            if measure:
                accelerator.wait_for_everyone()
    train_seconds = time.time() - clock
    log.bar.close()

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
        finish(result)  # before what holds the process group goes with this function
    return result


if __name__ == "__main__":
    run_stage(main, ARGS)
