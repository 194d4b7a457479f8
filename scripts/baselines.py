"""Search a collection with a method that needs no training: what ColBERT has to beat.

`bm25` is BM25 with Snowball stems and English stop words (k1 = 0.9, b = 0.4, Lucene's idf). `mean_pool` is one vector a
text, the mean of an encoder's last hidden states, and the cosine of two. Writes a run file.
On one core BM25 takes 1 s for the demo's 300 queries over 2,000 passages and 46 s for SQuAD's 10,570 over 20,958;
mean_pool takes as long as embedding.

    python scripts/baselines.py --method bm25 --collection data/demo/collection.tsv \
        --queries data/demo/queries.dev.tsv --output bm25.tsv --k 1000
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanocolbert import cli
from nanocolbert.cli import InputError, first_line, positive, run_stage
from nanocolbert.progress import progress
from nanocolbert.storage.artifact import check_output_file
from nanocolbert.storage.documents import read_documents, read_queries
from nanocolbert.storage.runs import write_run

CHUNK = 4096  # passages held as vectors at a time; (queries, CHUNK) scores fit in memory with them
Rankings = Iterator[tuple[str, list[str], list[float]]]


def read_collection(path) -> tuple[list[str], list[str]]:
    """(pids, passages), in file order. Raises InputError on an empty file and on a duplicate pid."""
    pids, passages, seen = [], [], set()
    for number, pid, passage, *_ in read_documents(path, "collection: pid, passage"):
        if pid in seen:
            raise InputError(f"{path}:{number}: pid {pid!r} a second time: a pid names one passage")
        seen.add(pid)
        pids.append(pid)
        passages.append(passage)
    if not pids:
        raise InputError(f"{path}: no passages")
    return pids, passages


def search_bm25(pids: list[str], passages: list[str], queries: dict[str, str], k: int) -> Rankings:
    """Yield (qid, pids, scores) by BM25; passages that share no word with the query are left out."""
    import bm25s
    import Stemmer

    stemmer = Stemmer.Stemmer("english")
    bm25 = bm25s.BM25(k1=0.9, b=0.4)
    bm25.index(bm25s.tokenize(passages, stopwords="en", stemmer=stemmer, show_progress=False), show_progress=False)
    words = bm25s.tokenize(list(queries.values()), stopwords="en", stemmer=stemmer, show_progress=False)
    ranked, scores = bm25.retrieve(words, k=min(k, len(pids)), show_progress=False)  # (Q, k) each
    for qid, positions, row in zip(queries, ranked, scores, strict=True):
        found = row > 0
        yield qid, [pids[i] for i in positions[found]], row[found].tolist()


def load_encoder(model: str, max_tokens: int, batch_size: int):
    """A function from texts to mean-pooled, normalised vectors (n, D), fp32. Raises InputError on a bad `model`."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    from nanocolbert.compute import default_device, fast_dtype

    device = default_device().type
    dtype = fast_dtype(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        encoder = AutoModel.from_pretrained(model, trust_remote_code=False).to(device).eval()
    except (OSError, ValueError) as error:
        raise InputError(f"--model {model}: {first_line(error)}: give a model's name or folder") from None

    @torch.inference_mode()
    def encode(texts: list[str]) -> np.ndarray:
        ids = tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
        by_length = sorted(range(len(texts)), key=lambda i: len(ids[i]))
        vectors = np.empty((len(texts), encoder.config.hidden_size), np.float32)  # (n, D)
        for start in range(0, len(texts), batch_size):
            rows = by_length[start : start + batch_size]
            batch = tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt").to(device)
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                hidden = encoder(**batch).last_hidden_state.float()  # (B, L, D)
            mask = batch["attention_mask"].unsqueeze(-1)  # (B, L, 1)
            mean = (hidden * mask).sum(1) / mask.sum(1)  # (B, D)
            vectors[rows] = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
        return vectors

    return encode


def search_vectors(encode, pids: list[str], passages: list[str], queries: dict[str, str], k: int) -> Rankings:
    """Yield (qid, pids, scores) by cosine; the passages' vectors are made, scored and forgotten chunk by chunk."""
    query_vectors = encode(list(queries.values()))  # (Q, D)
    best = np.empty((len(queries), 0), np.float32)  # (Q, k) the best scores so far
    best_at = np.empty((len(queries), 0), np.int64)  # (Q, k) and whose they are
    with progress(total=len(passages), desc="embed", unit=" passages") as bar:
        for start in range(0, len(passages), CHUNK):
            vectors = encode(passages[start : start + CHUNK])  # (n, D)
            at = np.broadcast_to(np.arange(start, start + len(vectors)), (len(queries), len(vectors)))
            best = np.concatenate([best, query_vectors @ vectors.T], axis=1)  # (Q, k + n)
            best_at = np.concatenate([best_at, at], axis=1)
            if best.shape[1] > k:
                kept = np.argpartition(-best, k - 1, axis=1)[:, :k]
                best, best_at = np.take_along_axis(best, kept, 1), np.take_along_axis(best_at, kept, 1)
            bar.update(len(vectors))
    for qid, positions, row in zip(queries, best_at, best, strict=True):
        order = np.lexsort((positions, -row))  # ties stay in collection order
        yield qid, [pids[i] for i in positions[order]], row[order].tolist()


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["bm25", "mean_pool"], required=True, help="how to search")
    parser.add_argument("--collection", required=True, help="pid, passage; .gz allowed")
    parser.add_argument("--queries", required=True, help="qid, query; .gz allowed")
    parser.add_argument("--output", required=True, help="run file to write")
    parser.add_argument("--k", type=positive, default=1000, help="passages per query")
    parser.add_argument("--format", choices=["trec", "msmarco"], default="trec", help="of the run file")
    # mean_pool
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="encoder: name or folder")
    parser.add_argument("--max_tokens", type=positive, default=256, help="longer texts are cut to this")
    parser.add_argument("--batch_size", type=positive, default=64, help="texts encoded at once")
    return parser.parse_args()


def main(args):
    started = time.time()
    check_output_file(args.output, args.collection, args.queries)
    queries = read_queries(args.queries)
    pids, passages = read_collection(args.collection)
    if not queries:
        raise InputError(f"{args.queries}: no queries")
    if args.method == "bm25":
        rankings = search_bm25(pids, passages, queries, args.k)
    else:
        encode = load_encoder(args.model, args.max_tokens, args.batch_size)
        rankings = search_vectors(encode, pids, passages, queries, args.k)
    n_queries = write_run(args.output, rankings, format=args.format, tag=args.method)
    seconds = round(time.time() - started, 2)
    print(f"{args.method}: {n_queries:,} queries over {len(pids):,} passages in {seconds} s → {args.output}")
    return {"output": args.output, "method": args.method, "n_queries": n_queries, "seconds": seconds}


if __name__ == "__main__":
    run_stage(main, cli.start(parse_args))
