"""Quality of the fast way: the same training, padded in fp32 and by train.py's own functions in bf16, then searched.

    python bench/bench_quality.py --tokens_dir experiments/squad/tokens --processes 2      # an hour and a half
    python bench/bench_quality.py --tokens_dir experiments/squad/tokens --processes 2 --recipe v1 --max_steps 40

Two ways from the same weights, with the same triples in the same order, the same loss, optimiser and schedule: `padded`
(every passage filled to doc_maxlen, all in one batch, fp32, the attention that transformers writes in plain PyTorch)
and `fast` (collate and train_step: batches of like length, bf16 autocast, our attention). The recipe is
that of configs/squad.sh, or v1's: one negative, l2, a random projection, a constant learning rate. Each of --seeds
shuffles the triples and draws the projection, or the passages that it begins with.
Afterwards every tenth dev question is searched among all the passages that dev questions were written from, exactly;
both models embed as doc2embedding.py does. `p` is that of evaluate.py's randomisation test over the questions.
"""

import argparse
import copy
import functools
import multiprocessing
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from measure import DATA, MINILM, add_results_flag, hardware, write_result

import train
from evaluate import randomisation_test
from model import ColBERT
from nanocolbert.framing import frame
from nanocolbert.storage import runs
from nanocolbert.storage.artifact import read_meta
from nanocolbert.storage.documents import read_queries
from nanocolbert.storage.ragged import Ids, Ragged
from nanocolbert.training.losses import Objective
from nanocolbert.training.step import make_optimizer, train_step
from nanocolbert.training.triples import TOKENS_PER_BATCH, Triples, collate

WAYS = ("padded", "fast")
BOTH = {"mask_punctuation": True, "dropout": 0.0, "attention_dropout": 0.0, "weight_decay": 0.0, "max_grad_norm": 2.0}
BOTH |= {"markers": True, "expand_queries_to": None, "pool_factor": None}
SQUAD = {"similarity": "cosine", "loss": ["in_batch"], "projection": "principal", "lr": 1e-4, "schedule": "linear"}
V1 = {"similarity": "l2", "loss": ["softmax"], "projection": "orthogonal", "lr": 3e-6, "schedule": "constant"}
RECIPES = {"squad": SQUAD, "v1": V1}


def padded_step(model: ColBERT, optimizer, data: Triples, rows: np.ndarray, args) -> torch.Tensor:
    """One step on triples (B, 3), every passage padded to doc_maxlen, in fp32; returns the loss."""
    passage_rows = rows[:, 1:].reshape(-1)
    queries = model.frame_queries(*data.queries.gather(rows[:, 0]))
    passages = frame(*data.passages.gather(passage_rows), model.config, "passage", model.config.doc_maxlen)
    Q, P = model.embed(queries), model.embed(passages)  # (B, Lq, D), (2 B, Ld, D)
    numbers = torch.from_numpy(rows.astype(np.int64))
    loss = Objective(args.loss, args.similarity)(Q, P, model.kept(*passages), numbers)["loss"]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def run_steps(way: str, model: ColBERT, args) -> tuple[list[float], float]:
    """Train the model in place by one way; returns the loss of every step, and seconds."""
    data, losses = Triples(args.tokens_dir, args.batch_size, args.seed), []
    optimizer, scheduler = make_optimizer(model.train(), args)
    if way == "padded":
        model.encoder.set_attn_implementation("eager")
        wrapped = model
    else:
        accelerator = Accelerator(mixed_precision="bf16", cpu=True)
        wrapped, optimizer = accelerator.prepare(model, optimizer)
    started = time.perf_counter()
    for step in range(args.max_steps):
        rows = data.rows(step)
        if way == "padded":
            loss = padded_step(wrapped, optimizer, data, rows, args)
        else:
            batch = collate(data, rows, model, TOKENS_PER_BATCH["cpu"], packed=False)
            objective = Objective(args.loss, args.similarity)
            loss = train_step(accelerator, wrapped, optimizer, [batch], objective, args.max_grad_norm)["loss"]
        scheduler.step()
        losses.append(loss.item())
        if step % 10 == 9 or step + 1 == args.max_steps:
            recent = np.mean(losses[-10:])
            print(
                f"seed {args.seed}, {way} {step + 1}: {recent:.4f}, {time.perf_counter() - started:.0f} s", flush=True
            )
    return losses, time.perf_counter() - started


def reciprocal_ranks(weights: dict, base: ColBERT, args) -> np.ndarray:
    """Reciprocal rank at 10 of each question (n,), by exact search with the weights that a way came to."""
    model = copy.deepcopy(base).eval()
    model.load_state_dict(weights)
    qrels = runs.read_qrels(args.qrels)
    pids = list(dict.fromkeys(pid for judged in qrels.values() for pid in judged))  # what dev questions were made of
    queries = dict([*read_queries(args.queries).items()][:: args.every][: args.n_queries])
    pieces = Ragged(args.tokens_dir / "passages").gather(Ids(args.tokens_dir / "pids.npy").rows(pids))
    embeddings, counts, _ = model.embed_passages(*pieces)
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))
    scores = model.score(model.encode_queries(list(queries.values())), (torch.from_numpy(embeddings), offsets))
    best = scores.topk(min(10, len(pids)))
    found = {
        qid: dict(zip([pids[i] for i in rows], values, strict=True))
        for qid, rows, values in zip(queries, best.indices.tolist(), best.values.tolist(), strict=True)
    }
    ranks = runs.measure_queries({qid: qrels[qid] for qid in queries}, found, ["MRR@10"])["MRR@10"]
    return np.array([ranks[qid] for qid in queries])


def compare(seed: int, args) -> tuple[list[dict], dict]:
    """Train both ways from one seed and search with both: a row for each way, and what they differ in."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    recipe = {**vars(args), **BOTH, **RECIPES[args.recipe], "seed": seed}
    recipe = argparse.Namespace(**recipe | ({"lr": args.lr} if args.lr else {}))
    torch.manual_seed(seed)
    base = train.load_model(recipe, read_meta(args.tokens_dir, "tokens", "tsv2mmap.py"))
    rows, losses, ranks = [], {}, {}
    for way in WAYS:
        model = copy.deepcopy(base)
        losses[way], seconds = run_steps(way, model, recipe)
        ranks[way] = reciprocal_ranks(model.state_dict(), base, args)
        last = float(np.mean(losses[way][-20:]))
        row = {"seed": seed, "way": way, "loss_of_last_20_steps": round(last, 4)}
        row |= {"mrr_at_10": round(float(ranks[way].mean()), 4), "seconds": round(seconds, 1)}
        rows.append(row)
        print(row, flush=True)
    changes = ranks["fast"] - ranks["padded"]
    difference = {
        "seed": seed,
        "largest_loss_difference": round(float(np.abs(np.subtract(losses["padded"], losses["fast"])).max()), 4),
        "mrr_at_10": round(float(changes.mean()), 4),
        "p": round(float(randomisation_test(changes[:, None])[0]), 3),
        "questions": len(changes),
        "questions_changed": int((changes != 0).sum()),
    }
    print("fast - padded:", difference, flush=True)
    return rows, difference


def main(args):
    machine = hardware()
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        pairs = pool.map(functools.partial(compare, args=args), args.seeds)
    rows, differences = [row for rows, _ in pairs for row in rows], [difference for _, difference in pairs]
    write_result("quality", args, machine, rows=rows, differences=differences)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens_dir", type=Path, required=True, help="what tsv2mmap.py wrote, with triples")
    parser.add_argument("--base_model", default=MINILM, help="an encoder's name or folder")
    parser.add_argument("--recipe", choices=RECIPES, default="squad", help="how (default squad)")
    parser.add_argument("--lr", type=float, help="peak learning rate in place of the recipe's")
    parser.add_argument("--dim", type=int, default=128, help="size of a token embedding (default 128)")
    parser.add_argument("--queries", type=Path, default=DATA / "squad" / "queries.dev.tsv", help="qid, query")
    parser.add_argument("--qrels", type=Path, default=DATA / "squad" / "qrels.dev.tsv", help="qrels of these")
    parser.add_argument("--every", type=int, default=10, help="of the queries, this one in so many (default 10)")
    parser.add_argument("--n_queries", type=int, default=1000, help="how many of them")
    parser.add_argument("--max_steps", type=int, default=150, help="steps of each way (default 150)")
    parser.add_argument("--warmup_steps", type=int, default=15, help="of them, with a rising learning rate")
    parser.add_argument("--batch_size", type=int, default=16, help="triples a step (default 16)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--processes", type=int, default=1, help="seeds computed at a time")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each (default 1: one core)")
    add_results_flag(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
