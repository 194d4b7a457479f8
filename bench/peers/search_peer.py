"""Another library's compressed index in its own environment: builds it from given vectors, and searches it.

    python bench/peers/search_peer.py --peer fast-plaid --bits 4 --index folder --vectors folder
    python bench/peers/search_peer.py --peer fast-plaid --bits 4 --index folder --queries file --settings JSON ...

Called by bench/bench_search.py, which times its own searches by `time_queries` too.

reads   values.npy (T, D) fp16 and offsets.npy of the passages, or queries.npy (Q, Lq, D) fp32
writes  the index, or --output: .npz of rows and seconds as `time_queries` gives them; prints JSON
"""

import argparse
import json
import random
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

WARM_UP = 3  # queries


def time_queries(search, settings: list, queries, ks: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Search one query after the other by search(query, k, setting), for each setting and k, after a warm-up.

    Returns rows (settings, ks, Q, largest k), -1 where fewer were found, and seconds (2, settings, ks, Q): of the
    processor, in all threads, and by the clock.
    """
    rows = np.full((len(settings), len(ks), len(queries), max(ks)), -1)
    seconds = np.zeros((2, *rows.shape[:3]))
    for s, setting in enumerate(settings):
        for j, k in enumerate(ks):
            for query in queries[:WARM_UP]:
                search(query, k, setting)
            for i, query in enumerate(queries):
                started = time.process_time(), time.perf_counter()
                found = search(query, k, setting)
                seconds[:, s, j, i] = np.subtract((time.process_time(), time.perf_counter()), started)
                rows[s, j, i, : len(found)] = found[:k]
    return rows, seconds


class Plaid:
    """colbert-ai: PLAID. What it asks its model for, vectors of texts, is given to it; "texts" are rows."""

    def __init__(self, folder: str, bits: int):
        from colbert import Searcher  # noqa: F401 - imported before the clock starts
        from colbert.infra import ColBERTConfig
        from colbert.modeling.colbert import ColBERT
        from colbert.search.index_storage import IndexScorer

        for part in (ColBERT, IndexScorer):
            part.try_load_torch_extensions(False)
        self.folder, self.settings = folder, {"index_path": folder, "nbits": bits}
        self.config = lambda **more: ColBERTConfig(**self.settings, **more)

    def build(self, values: np.ndarray, offsets: np.ndarray) -> None:
        from colbert.data.collection import Collection
        from colbert.indexing.collection_indexer import CollectionIndexer
        from colbert.indexing.index_saver import IndexSaver

        class Vectors:
            def encode_passages(self, rows):
                parts = [values[offsets[row] : offsets[row + 1]] for row in rows]
                return torch.from_numpy(np.concatenate(parts).astype(np.float32)), [len(part) for part in parts]

        Path(self.folder).mkdir(parents=True)
        indexer = object.__new__(CollectionIndexer)  # its __init__ opens a model
        indexer.verbose, indexer.rank, indexer.nranks, indexer.use_gpu = 0, 0, 1, False
        indexer.config = self.config(dim=values.shape[1])
        indexer.collection = Collection(data=list(range(len(offsets) - 1)))
        indexer.encoder, indexer.saver = Vectors(), IndexSaver(indexer.config)
        indexer.run([])

    def open(self):
        from colbert import Searcher
        from colbert.search.index_storage import IndexScorer

        searcher = object.__new__(Searcher)  # its __init__ opens a model
        searcher.ranker = IndexScorer(self.folder, use_gpu=False)

        def search(query, k, setting):
            searcher.config = self.config(query_maxlen=len(query), **setting)  # it keeps the first k's defaults
            return searcher.dense_search(torch.from_numpy(query)[None], k)[0]

        return search


class FastPlaid:
    """fast-plaid: PLAID in Rust."""

    def __init__(self, folder: str, bits: int):
        from fast_plaid.search import FastPlaid

        self.index, self.bits = lambda: FastPlaid(folder, device="cpu"), bits

    def build(self, values: np.ndarray, offsets: np.ndarray) -> None:
        passages = [torch.from_numpy(part) for part in np.split(values, offsets[1:-1])]
        self.index().create(passages, nbits=self.bits)

    def open(self):
        index = self.index()

        def search(query, k, setting):
            found = index.search(torch.from_numpy(query)[None], k, n_processes=1, show_progress=False, **setting)
            return [row for row, _ in found[0]]

        return search


class Warp:
    """xtr-warp-rs: WARP in Rust."""

    def __init__(self, folder: str, bits: int):
        from xtr_warp import XTRWarp

        self.index, self.bits = lambda: XTRWarp(folder), bits

    def build(self, values: np.ndarray, offsets: np.ndarray) -> None:
        passages = [torch.from_numpy(part) for part in np.split(values, offsets[1:-1])]
        self.index().create(passages, "cpu", nbits=self.bits, show_progress=False)

    def open(self):
        index = self.index().load("cpu")

        def search(query, k, setting):
            found = index.search(torch.from_numpy(query)[None], k, num_threads=1, show_progress=False, **setting)
            return [row for row, _ in found[0]]

        return search


PEERS = {"colbert-ai": Plaid, "fast-plaid": FastPlaid, "xtr-warp-rs": Warp}
COPIES = ("merged_", "compacted")  # of files that are there already, made by fast-plaid and by xtr-warp-rs


def main(args) -> dict:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    if args.vectors:
        values, offsets = (np.load(args.vectors / f"{name}.npy", mmap_mode="c") for name in ("values", "offsets"))
        peer, started = PEERS[args.peer](str(args.index), args.bits), time.perf_counter()
        with torch.inference_mode():
            peer.build(values, offsets)
        seconds, files = time.perf_counter() - started, [path for path in args.index.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files if not any(copy in path.name for copy in COPIES))
        return {"seconds": round(seconds, 2), "bytes": size, "version": version(args.peer)}
    queries, peer = np.load(args.queries), PEERS[args.peer](str(args.index), args.bits)
    started = time.perf_counter()
    search = peer.open()
    open_ms = 1000 * (time.perf_counter() - started)
    rows, seconds = time_queries(search, json.loads(args.settings), queries, json.loads(args.ks))
    np.savez(args.output, rows=rows, seconds=seconds)
    return {"open_ms": round(open_ms, 2)}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=tuple(PEERS), required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--index", type=Path, required=True, help="its folder")
    parser.add_argument("--vectors", type=Path, help="build from the passages in this folder; without it, search")
    parser.add_argument("--queries", type=Path)
    parser.add_argument("--settings", help="JSON: a list of keywords of its search")
    parser.add_argument("--ks", help="JSON: how many passages are asked for, in turn")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    print("\n" + json.dumps(main(parse_args())), flush=True)
