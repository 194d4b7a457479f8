"""Search of one query at a time: retrieve.py's Searcher against the reference's way, on the same index.

    python bench/bench_retrieve.py --index_dir experiments/squad/index

Same FAISS index, query embeddings, nprobe and k', both giving the --k best; the query encoder is not in the times.
`ours_all` reranks every candidate, as the reference does, and shows what is won by not padding; `ours` reranks the
best of them only; `ours_batch` has all queries in batches of 32; `exact` scores every passage and is what recall@10
is measured against. The ways take turns query by query, after the exact search has read the whole store once.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import faiss
import numpy as np
import reference
import torch
import transformers
from measure import DATA, REPO, add_results_flag, hardware, matmul_gflops, spread, status_bytes, timed, write_result

from nanocolbert.index.clock import Clock
from nanocolbert.index.knobs import Depths, depths_for
from nanocolbert.storage.documents import read_queries
from search import Searcher

BATCH = 32
WARM_UP = 3  # queries


def open_reference(index_dir, searcher: Searcher) -> tuple[reference.Retriever, float]:
    """The reference's retriever on the same files, and the MB of memory it holds."""
    before = status_bytes("RssAnon")
    index = faiss.read_index(str(index_dir / "faiss.index"))
    embeddings = searcher.index.embeddings
    doc_maxlen = searcher.model.config.doc_maxlen
    retriever = reference.Retriever(index, embeddings.values, np.diff(embeddings.offsets), doc_maxlen)
    return retriever, (status_bytes("RssAnon") - before) / 1e6


def recall(rankings: list, truth: list, k: int = 10) -> float:
    """Mean share of the exact search's k best passages that are among the k best of a ranking."""
    shares = [
        len(set(map(int, ranking[:k])) & set(map(int, wanted[:k]))) / len(wanted[:k])
        for ranking, wanted in zip(rankings, truth, strict=True)
    ]
    return statistics.mean(shares)


def run_in_turn(ways: dict, clock: Clock, n_queries: int) -> tuple[dict, dict, dict]:
    """Search for each query by each way in turn: {way: milliseconds}, {way: rows found}, {way: seconds of parts}."""
    for run in ways.values():
        for i in range(min(WARM_UP, n_queries)):
            run(i)
    milliseconds, found = {way: [] for way in ways}, {way: [] for way in ways}
    parts = {way: {} for way in ways}  # where the Searcher's time goes
    for i in range(n_queries):
        for way, run in ways.items():
            clock.seconds = parts[way]  # it adds to what is there
            (rows, _), seconds = timed(run, i)
            milliseconds[way].append(1000 * seconds)
            found[way].append(rows)
    clock.seconds = {}
    return milliseconds, found, parts


def table(milliseconds: dict, found: dict, parts: dict, truth: list) -> list[dict]:
    """A row for each way, printed too; speed_ratio is to the reference."""
    reference_ms, rows = statistics.mean(milliseconds["reference"]), []
    for way, times in milliseconds.items():
        mean = statistics.mean(times)
        rows.append(
            {
                "way": way,
                "mean_ms": round(mean, 2),
                "ms": spread(times, 2) if len(times) > 1 else None,
                "recall_at_10": round(recall(found[way], truth), 4),
                "speed_ratio": round(reference_ms / mean, 2),
                "parts_ms": {what: round(1000 * s / len(truth), 2) for what, s in parts.get(way, {}).items()},
            }
        )
        low, high = min(times), max(times)
        print(
            f"{way:10} {mean:9.2f} ms a query [{low:.2f}, {high:.2f}], recall@10 {rows[-1]['recall_at_10']:.4f}: "
            f"{rows[-1]['speed_ratio']} x {rows[-1]['parts_ms'] or ''}"
        )
    return rows


def main(args):
    machine = hardware()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    before = status_bytes("RssAnon")
    searcher = Searcher(args.index_dir, args.model, device="cpu")
    texts = list(read_queries(args.queries).values())
    texts = [texts[i] for i in np.linspace(0, len(texts) - 1, min(args.n_queries, len(texts))).astype(int)]
    queries = searcher.encode(texts)  # (Q, Lq, D)
    ours = searcher.index
    exact, exact_seconds = timed(ours.rank, queries, None, 10)
    truth = [rows for rows, _ in exact]
    holds = {"ours": (status_bytes("RssAnon") - before) / 1e6}
    retriever, holds["reference"] = open_reference(args.index_dir, searcher)
    best = args.rerank_depth or depths_for("default", args.k).rerank_depth

    def search(batch, rerank_depth=best):
        return ours.search(batch, args.k, Depths(args.nprobe, args.faiss_depth, rerank_depth))

    ways = {
        "reference": lambda i: retriever.search(queries[i], args.k, args.nprobe, args.faiss_depth),
        "ours_all": lambda i: search(queries[i : i + 1], len(ours))[0],
        "ours": lambda i: search(queries[i : i + 1])[0],
    }
    milliseconds, found, parts = run_in_turn(ways, ours.clock, len(queries))
    started = time.perf_counter()
    found["ours_batch"] = [rows for part in queries.split(BATCH) for rows, _ in search(part)]
    milliseconds["ours_batch"] = [1000 * (time.perf_counter() - started) / len(queries)]
    milliseconds["exact"], found["exact"] = [1000 * exact_seconds / len(queries)], truth
    rows = table(milliseconds, found, parts, truth)
    Lq, D = queries.shape[1:]
    gflops = 2 * queries.numel() * len(ours.embeddings.values) / exact_seconds / 1e9
    roof = matmul_gflops(torch.float32)
    print(f"exact search runs at {gflops:.1f} of {roof:.1f} GFLOP/s (fp32)")
    print(f"memory held: reference {holds['reference']:.0f} MB, ours {holds['ours']:.0f} MB with the query encoder")
    facts = {key: searcher.meta[key] for key in ("passages", "embeddings", "dim", "nlist", "m", "nbits")}
    write_result(
        "retrieve",
        args,
        machine,
        index=facts,
        queries=len(queries),
        query_shape=[Lq, D],
        rerank_depth=best,
        exact_gflops=round(gflops, 1),
        roof_gflops=round(roof, 1),
        holds_mb={way: round(value) for way, value in holds.items()},
        rows=rows,
    )


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--index_dir", type=Path, default=REPO / "experiments/squad/index", help="what build_index.py wrote"
    )
    parser.add_argument("--model", type=Path, help="its model, if it was moved (default: as the index says)")
    parser.add_argument("--queries", type=Path, default=DATA / "squad" / "queries.dev.tsv", help="qid, query")
    parser.add_argument("--n_queries", type=int, default=100, help="spread evenly over the file")
    parser.add_argument("--k", type=int, default=1000, help="passages a query that each way returns")
    parser.add_argument("--nprobe", type=int, default=32, help="lists looked into for each query token")
    parser.add_argument("--faiss_depth", type=int, default=1024, help="k': embeddings found for each query token")
    parser.add_argument("--rerank_depth", type=int, help="passages that `ours` scores (default: retrieve.py's own)")
    parser.add_argument("--threads", type=int, default=1, help="of torch and FAISS (default 1: one core)")
    add_results_flag(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
