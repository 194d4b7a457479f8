"""Training steps: our train_step against the reference's way, same weights and triples.

    python bench/bench_train.py                                    # MiniLM, one core
    python bench/bench_train.py --bert_base --device cuda --threads 8      # BERT-base shape, on a GPU

Three ways, each in a process of its own, in turn: the reference's (passages padded to 180, fp32, or fp16 autocast on a
GPU, a tensor of all differences), ours in fp32 and ours in the type that is fast here (one way where that is fp32). A
step takes --batch_size triples: queries and passages drawn at random from a collection, since speed does not depend
on which they are. `gflops` counts the multiplications that real tokens need, three times those of the forward pass, so
padding is no work done; `roof` is a square matmul in the same type. Memory is that of the process, or the GPU's.
"""

import argparse
import itertools
import multiprocessing
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import reference
import torch
import transformers
from accelerate import Accelerator
from bench_encode import encoder_folder, load_texts, useful_gflop
from measure import DATA, MINILM, add_machine_flags, hardware, matmul_gflops, spread, status_bytes, timed, write_result

from model import ColBERT
from nanocolbert.compute import COMPUTE_DTYPES, fast_dtype, mixed_precision
from nanocolbert.encoder.attention import packable
from nanocolbert.encoder.batches import to_device
from nanocolbert.storage.ragged import RaggedWriter
from nanocolbert.text import FRAME, MARKERS, tokenize
from nanocolbert.training.losses import Objective
from nanocolbert.training.step import train_step
from nanocolbert.training.triples import TOKENS_PER_BATCH, Triples, collate

WAYS = ("reference", "ours_fp32", "ours")
worker = None  # of this process


def precision(args, way: str) -> str:
    """accelerate's name for the type that a way computes in."""
    return mixed_precision(args.device) if way == "ours" else "no"


class Worker:
    """One way, with its model, its optimiser and its batches, in a process of its own."""

    def __init__(self, args, way: str):
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(args.threads)
        self.args, self.way = args, way
        self.accelerator = Accelerator(mixed_precision=precision(args, way), cpu=args.device == "cpu")
        rates = {"attention_dropout": None} if way == "reference" else {"dropout": args.dropout}
        with encoder_folder(args) as folder:
            model = ColBERT.from_base(str(folder), **rates)
        queries, passages = load_texts(args.queries, 1 << 30), load_texts(args.collection, args.n_passages)
        rng = np.random.default_rng(0)
        rows = np.stack(
            [rng.integers(len(queries), size=args.n_triples)]
            + [rng.integers(len(passages), size=args.n_triples) for _ in range(2)],
            axis=1,
        )  # (n, 3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=way != "reference")
        self.model, self.optimizer = self.accelerator.prepare(model.train(), optimizer)
        starts = range(0, args.n_triples - args.batch_size + 1, args.batch_size)
        batches = [rows[start : start + args.batch_size] for start in starts]
        prepare = self.padded_batches if way == "reference" else self.our_batches
        self.batches, self.lengths, self.padding = prepare(model, queries, passages, batches)
        self.step = 0

    def padded_batches(self, model, queries, passages, batches):
        tokenizer, config = reference.load_tokenizer(self.args.model), model.config
        ids, mask = reference.tokenize_padded(tokenizer, passages, MARKERS["passage"], config.doc_maxlen)
        query_ids, query_mask = reference.tokenize_padded(tokenizer, queries, MARKERS["query"], config.query_maxlen)
        query_ids[query_mask == 0] = config.mask_token_id
        made, lengths = [], []
        for rows in batches:
            both = np.concatenate([rows[:, 1], rows[:, 2]])
            made.append(((query_ids[rows[:, 0]], query_mask[rows[:, 0]]), (ids[both], mask[both])))
            lengths.append(mask[both].sum(1).numpy())
        positions = 2 * self.args.batch_size * config.doc_maxlen
        return made, lengths, 1 - np.mean([length.sum() for length in lengths]) / positions

    def our_batches(self, model, queries, passages, batches):
        folder = Path(tempfile.mkdtemp())
        for name, texts, maxlen in (
            ("queries", queries, model.config.query_maxlen),
            ("passages", passages, model.config.doc_maxlen),
        ):
            writer = RaggedWriter(folder / name, np.uint16)
            writer.append(*tokenize(model.tokenizer, texts, maxlen))
            writer.close()
        np.save(folder / "triples.npy", np.concatenate(batches).astype(np.int32))
        data = Triples(folder, self.args.batch_size, None)
        packed = packable(model.encoder, self.accelerator.device, COMPUTE_DTYPES[precision(self.args, self.way)])
        budget = TOKENS_PER_BATCH[self.accelerator.device.type]
        made = [collate(data, rows, model, budget, packed) for rows in batches]
        lengths = [data.passages.lengths(rows[:, 1:].reshape(-1)) + FRAME for rows in batches]
        if packed:
            return made, lengths, 0.0
        positions = sum(ids.numel() for batch in made for ids, _ in batch["inputs"]["batches"][1:])  # without queries
        return made, lengths, 1 - sum(map(np.sum, lengths)) / positions

    def run(self, n: int) -> list[float]:
        """Seconds of n steps."""
        return [timed(self.run_step)[1] for _ in range(n)]

    def run_step(self) -> None:
        batch = to_device(self.batches[self.step % len(self.batches)], self.accelerator.device)
        self.step += 1
        if self.way == "reference":
            dtype = torch.float16 if self.accelerator.device.type == "cuda" else torch.float32
            reference.train_step(self.model, self.optimizer, *batch, dtype)
        else:
            train_step(self.accelerator, self.model, self.optimizer, [batch], Objective(), max_norm=2.0)
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()

    def facts(self) -> dict:
        """Work of a step, and what it took."""
        model, on_gpu = self.accelerator.unwrap_model(self.model), self.accelerator.device.type == "cuda"
        query_tokens = np.full(self.args.batch_size, model.config.query_maxlen)
        gflop = [useful_gflop(model, np.concatenate([length, query_tokens])) for length in self.lengths]
        dtype = COMPUTE_DTYPES[precision(self.args, self.way)]
        return {
            "dtype": str(dtype).removeprefix("torch."),
            "gflop_a_step": round(3 * statistics.mean(gflop), 1),
            "tokens_a_step": round(float(np.mean([length.sum() for length in self.lengths]))),
            "padding": round(float(self.padding), 4),
            "peak_mb": round((torch.cuda.max_memory_allocated() if on_gpu else status_bytes("VmHWM")) / 1e6),
            "roof_gflops": round(matmul_gflops(dtype, self.accelerator.device), 1),
        }


def call(args, way: str, method: str, *arguments):
    """Call a method of this process's worker, which the first call makes."""
    global worker
    worker = worker or Worker(args, way)
    return getattr(worker, method)(*arguments)


def main(args):
    machine, context = hardware(), multiprocessing.get_context("spawn")
    if "ours" in args.ways and fast_dtype(args.device) == torch.float32:
        args.ways = [way for way in args.ways if way != "ours_fp32"]
    pools = {way: context.Pool(1) for way in args.ways}
    seconds = {way: [] for way in args.ways}
    for way in args.ways:
        pools[way].apply(call, (args, way, "run", args.warmup))
    for _, way in itertools.product(range(args.repeats), args.ways):
        seconds[way] += pools[way].apply(call, (args, way, "run", args.steps))
    rows = []
    for way in args.ways:
        time, facts = spread(seconds[way], 4), pools[way].apply(call, (args, way, "facts"))
        row = {"way": way, "seconds": time, "steps_per_second": round(1 / time["median"], 3), **facts}
        row["gflops"] = round(facts["gflop_a_step"] / time["median"], 1)
        row["share_of_roof"] = round(row["gflops"] / row["roof_gflops"], 3)
        rows.append(row)
        row["speed_ratio"] = round(rows[0]["seconds"]["median"] / time["median"], 2)
        print(
            f"{way:9} {row['dtype']:8} {time['median']:.3f} s a step [{time['low']}, {time['high']}], "
            f"{row['tokens_a_step']} tokens, padding {row['padding']:.1%}, {row['gflops']} of {row['roof_gflops']} "
            f"GFLOP/s ({row['share_of_roof']:.0%}), {row['peak_mb']} MB: {row['speed_ratio']} x"
        )
        pools[way].terminate()
    write_result("train", args, machine, rows=rows)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pool = DATA / "msmarco-dl19-20"
    parser.add_argument("--collection", type=Path, default=pool / "collection.tsv", help="pid, passage")
    parser.add_argument("--queries", type=Path, default=pool / "queries.dl19.tsv", help="qid, query")
    parser.add_argument("--model", default=MINILM, help="an encoder's name or folder")
    parser.add_argument("--dropout", type=float, help="of ours (default: as the encoder comes, as the reference)")
    parser.add_argument("--bert_base", action=argparse.BooleanOptionalAction, default=False, help="its shape instead")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="which to measure")
    parser.add_argument("--batch_size", type=int, default=32, help="triples a step (default 32)")
    parser.add_argument("--n_passages", type=int, default=5000, help="spread evenly over the collection")
    parser.add_argument("--n_triples", type=int, default=640, help="drawn from them at random")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the clock starts")
    parser.add_argument("--steps", type=int, default=2, help="steps of a way before the next has its turn")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    add_machine_flags(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
