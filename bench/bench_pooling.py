"""Quality against bytes of pooled passages: nDCG@10 at each --factors, by vectors and at each --bits.

    python bench/bench_pooling.py --models experiments/squad/model                     # cranfield, of the shared data
    python bench/bench_pooling.py --models plain pooled --data scifact --factors 1 2   # trained for it, and not

Passages are embedded once a model, in the way of doc2embedding.py, then pooled by each factor. `vectors`: every passage
is scored by its fp16 vectors; else a compressed index is searched as by default. Bytes a passage are those of vectors,
or of codes, centroids and codewords: a small collection pays the more for the last. Only judged queries count, by what
is judged of the passages that are there. python bench/plot.py draws it.
"""

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from measure import DATA, add_machine_flags, hardware, write_result

from model import ColBERT
from nanocolbert.encoder.pooling import pool_passages
from nanocolbert.index.building import build_codes, codes_bytes
from nanocolbert.index.compressed import CompressedIndex
from nanocolbert.index.knobs import BITS
from nanocolbert.storage import runs
from nanocolbert.storage.documents import read_documents, read_queries
from nanocolbert.storage.ragged import IdWriter, RaggedWriter

MEASURE, DEPTH = "nDCG@10", 10


def read(args) -> tuple[list[str], list[str], dict[str, str], dict]:
    """Ids and texts of the passages, and the queries that are judged by one of them, with what is judged."""
    folder = args.data if args.data.is_dir() else DATA / args.data
    documents = itertools.islice(read_documents(folder / "collection.tsv", "collection: pid, passage"), args.n_passages)
    pids, texts = zip(*((document.id, document.text) for document in documents), strict=True)
    known, qrels = set(pids), runs.read_qrels(folder / args.qrels)
    here = {qid: {pid: n for pid, n in judged.items() if pid in known} for qid, judged in qrels.items()}
    here = {qid: judged for qid, judged in here.items() if max(judged.values(), default=0) > 0}
    queries = {qid: text for qid, text in read_queries(folder / args.queries).items() if qid in here}
    queries = dict(itertools.islice(queries.items(), args.n_queries))
    return list(pids), list(texts), queries, {qid: here[qid] for qid in queries}


def quality(rankings, pids: list[str], qrels: dict) -> float:
    """Mean nDCG@10 of each query's (rows, scores)."""
    run = {
        qid: {pids[row]: float(score) for row, score in zip(rows, scores, strict=True)}
        for qid, (rows, scores) in zip(qrels, rankings, strict=True)
    }
    return runs.measure(qrels, run, [MEASURE])[MEASURE]


def search_vectors(model: ColBERT, queries, vectors: np.ndarray, counts: np.ndarray) -> list:
    """The best rows and scores of each query (B, Lq, D) by exact MaxSim with vectors (T, D), counts (N,)."""
    offsets = torch.from_numpy(np.append(0, np.cumsum(counts)))
    best = model.score(queries, (torch.from_numpy(vectors), offsets)).topk(min(DEPTH, len(counts)))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def search_codes(queries, vectors: np.ndarray, counts: np.ndarray, pids: list[str], bits: int, args) -> tuple:
    """As `search_vectors` by a compressed index of these bits, and its bytes."""
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        source, index = Path(folder) / "embeddings", Path(folder) / "index"
        index.mkdir()
        values = RaggedWriter(source, np.float16, vectors.shape[1:])
        values.append(vectors, counts)
        values.close()
        ids = IdWriter(source / "pids.npy")
        ids.append(pids)
        ids.close()
        build_codes(index, source, bits, seed=args.seed, gpu=args.device == "cuda")
        opened = CompressedIndex(index)
        return opened.search(queries, DEPTH, opened.effort("default", DEPTH)), codes_bytes(index)


def measure(name: str, args) -> list[dict]:
    """Rows of one model: a factor and bits each."""
    pids, texts, queries, qrels = read(args)
    model = ColBERT.from_pretrained(name, device=args.device)
    Q = model.encode_queries(list(queries.values()))
    started = time.perf_counter()
    values, offsets = (part.numpy() for part in model.encode_passages(texts, ragged=True, pool_factor=1))
    seconds, rows = time.perf_counter() - started, []
    lengths = np.diff(offsets)
    pool_passages(*first_of(values, lengths), model.config.pooling(2))  # compiled, or read from disk
    for factor in args.factors:
        started = time.perf_counter()
        vectors, counts = values, lengths
        if factor > 1:
            vectors, counts = pool_passages(values, lengths, model.config.pooling(factor))
        facts = {"model": name, "trained_for": model.config.pool_factor, "dim": model.config.dim, "factor": factor}
        facts |= {"vectors_per_passage": round(float(counts.mean()), 2), "embed_seconds": round(seconds, 2)}
        facts |= {"pool_seconds": round(time.perf_counter() - started, 4)}
        for bits in [None, *args.bits]:
            if bits:
                rankings, n_bytes = search_codes(Q, vectors, counts, pids, bits, args)
            else:
                rankings, n_bytes = search_vectors(model, Q, vectors, counts), vectors.nbytes
            row = {"bits": bits or 16, "bytes_per_passage": round(n_bytes / len(pids), 1)}
            rows.append(facts | row | {"ndcg_at_10": round(quality(rankings, pids, qrels), 4)})
            print(rows[-1], flush=True)
    return rows


def first_of(values: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first passage alone."""
    return values[: lengths[0]], lengths[:1]


def main(args):
    torch.set_num_threads(args.threads)
    machine, (pids, _, queries, _) = hardware(), read(args)
    rows = [row for name in args.models for row in measure(name, args)]
    short = {name: Path(name).name for name in args.models}
    if len({*short.values()}) == len(short):
        rows = [{**row, "model": short[row["model"]]} for row in rows]
    write_result("pooling", args, machine, passages=len(pids), queries=len(queries), rows=rows)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="ColBERT checkpoints of any layout")
    parser.add_argument("--data", type=Path, default=Path("cranfield"), help="a folder, or one of the shared data")
    parser.add_argument("--queries", default="queries.tsv", help="in that folder: qid, query")
    parser.add_argument("--qrels", default="qrels.tsv", help="in that folder: qrels of these")
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 2, 3, 4], help="pool factors (default 1 2 3 4)")
    parser.add_argument("--bits", type=int, nargs="*", choices=BITS, default=[1, 2, 4], help="(default 1 2 4)")
    parser.add_argument("--n_passages", type=int, help="the first so many (default: all)")
    parser.add_argument("--n_queries", type=int, help="the first so many judged ones (default: all)")
    parser.add_argument("--seed", type=int, default=12345, help="of the codecs")
    parser.add_argument("--work", type=Path, help="where indexes lie for a moment (default: the system's)")
    add_machine_flags(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
