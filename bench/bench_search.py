"""Search engines on the same token vectors, one thread: ours, FAISS IVFPQ with exact reranking, and other libraries.

    python bench/bench_search.py --embedding_dir experiments/squad/embeddings --model experiments/squad/model \
        --queries experiments/squad/queries.1000.tsv --environments ../peers

Every system first builds its index from the first --n_passages, in a process of its own; then all are searched in
turn, --rounds times, one query at a time: a query's time is the lowest of the rounds, without the query encoder. It is
processor time: what the clock says on an idle machine, while on a busy one the clock counts the others' share too, the
longer a search the more (`clock_ms_at_10` and `_at_100`).
Recall is the share of the exact search's k best passages that are among the k found, for k = 10 and 100, each asked for
by itself. `bytes_per_token` is the index on disk without ids, and the fp16 vectors where the search reads them;
`build_seconds` processor time of the whole command; `build_peak_mb` memory that no file backs; `open_ms` without
imports.

With --environments, a folder of virtual environments named colbert-ai, fast-plaid and xtr-warp-rs (made from
bench/peers/requirements-*.txt), other libraries take part, each in its own (bench/peers/search_peer.py); one that is
not there is left out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import transformers
from bench_retrieve import recall
from measure import REPO, add_results_flag, command_flags, hardware, run_command, timed, write_result
from peers.search_peer import time_queries

from model import ColBERT
from nanocolbert.index.compressed import CompressedIndex
from nanocolbert.index.knobs import Depths
from nanocolbert.storage.artifact import read_meta, write_json
from nanocolbert.storage.checksums import sums_of
from nanocolbert.storage.documents import read_queries
from nanocolbert.storage.ragged import Ragged
from search import Searcher

KS = (10, 100)
EXACT_QUERIES = 10  # that exact search is timed with
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


class System(NamedTuple):
    """A way to search: flags of its build, named settings of its search, and the peer if it is not ours."""

    build: dict
    settings: dict
    peer: str | None = None


OURS = {  # a quality, and knobs
    "fast": ("fast", {}),
    "nprobe 16, n_coarse 2000": ("default", {"nprobe": 16, "n_coarse": 2000}),
    "default": ("default", {}),
    "nprobe 48, n_coarse 6400": ("default", {"nprobe": 48, "n_coarse": 6400}),
    "best": ("best", {}),
}
IVFPQ = {  # nprobe, faiss_depth, rerank_depth
    "nprobe 8, depth 100, rerank 250": (8, 100, 250),
    "nprobe 8, depth 128, rerank 400": (8, 128, 400),
    "nprobe 8, depth 256, rerank 1000": (8, 256, 1000),
    "nprobe 32, depth 1024, rerank 4000": (32, 1024, 4000),
}
PLAID = {  # what it does for k up to 10, 100 and 1000
    "default": {},
    "ncells 2, threshold 0.45, ndocs 1024": {"ncells": 2, "centroid_score_threshold": 0.45, "ndocs": 1024},
    "ncells 4, threshold 0.4, ndocs 4096": {"ncells": 4, "centroid_score_threshold": 0.4, "ndocs": 4096},
}
FAST_PLAID = {"n_ivf_probe 2, n_full_scores 256": {"n_ivf_probe": 2, "n_full_scores": 256}, "default": {}}
WARP = {"default": {}, "nprobe 32": {"nprobe": 32}}
SYSTEMS = {
    **{f"ours-{bits}": System({"bits": bits}, OURS) for bits in (1, 2, 4, 8)},
    "ours-2-vectors": System({"bits": 2, "keep_vectors": True}, OURS),
    "ivfpq": System({"method": "ivfpq"}, IVFPQ),
    "exact": System({}, {"every passage": None}),
    "plaid-2": System({"bits": 2}, PLAID, "colbert-ai"),
    "plaid-4": System({"bits": 4}, PLAID, "colbert-ai"),
    "fast-plaid-2": System({"bits": 2}, FAST_PLAID, "fast-plaid"),
    "fast-plaid-4": System({"bits": 4}, FAST_PLAID, "fast-plaid"),
    "warp-2": System({"bits": 2}, WARP, "xtr-warp-rs"),
    "warp-4": System({"bits": 4}, WARP, "xtr-warp-rs"),
}
SCRIPT = "bench/peers/search_peer.py"


def take_passages(source: Path, n: int | None, folder: Path) -> Path:
    """The folder of the embeddings of the first n passages: `source` itself, or one made of it."""
    embeddings = Ragged(source)
    if n is None or n >= len(embeddings):
        return source
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    values, meta = embeddings.slice(0, n)[0], read_meta(source, "embeddings", "doc2embedding.py")
    np.save(folder / "values.npy", values)
    np.save(folder / "offsets.npy", embeddings.offsets[: n + 1])
    np.save(folder / "pids.npy", np.load(source / "pids.npy", mmap_mode="r")[:n])
    facts = {"passages": n, "embeddings": len(values), "files": sums_of(folder)}
    write_json(folder / "meta.json", meta | facts, summed=True)
    return folder


def load_queries(args) -> torch.Tensor:
    """Query embeddings (Q, Lq, D) fp32."""
    if args.queries.suffix == ".npy":
        queries = np.load(args.queries)
        return torch.from_numpy(queries[spread_over(len(queries), args.n_queries)]).float()
    texts = list(read_queries(args.queries).values())
    texts = [texts[i] for i in spread_over(len(texts), args.n_queries)]
    return ColBERT.from_pretrained(args.model, device="cpu").encode_queries(texts, progress=False)


def spread_over(n: int, wanted: int) -> np.ndarray:
    return np.linspace(0, n - 1, min(wanted, n)).astype(int)


def build(name: str, python: Path, vectors: Path, index: Path) -> dict:
    """Build an index; what it cost."""
    system, (n_tokens, dim) = SYSTEMS[name], Ragged(vectors).values.shape
    reads_vectors = name in ("exact", "ivfpq") or "keep_vectors" in system.build
    if name == "exact":
        return {"bytes_per_token": 2 * dim, "build_seconds": 0, "build_peak_mb": 0}
    if system.peer:
        done = run_command(SCRIPT, python, peer=system.peer, vectors=vectors, index=index, **system.build)
        size = done["output"]["bytes"] / n_tokens
    else:
        flags = {"embedding_dir": vectors, "output_dir": index, "no-gpu": True}
        done = run_command("build_index.py", **flags, **system.build)
        size = done["output"]["bytes_per_embedding"] + (2 * dim if reads_vectors else 0)
    facts = {"bytes_per_token": round(size, 1), "build_seconds": done["processor_seconds"]}
    facts |= {"build_clock_seconds": done["seconds"], "build_peak_mb": done["private_mb"]}
    return facts | ({"version": done["output"]["version"]} if system.peer else {})


def search(name: str, python: Path, vectors: Path, index: Path, queries: torch.Tensor) -> tuple:
    """Open an index, search it: milliseconds of opening, then rows and seconds as `time_queries` gives them."""
    system = SYSTEMS[name]
    settings = list(system.settings.values())
    if not system.peer:
        find, seconds = timed(open_ours, name, vectors, index)
        return 1000 * seconds, *time_queries(find, settings, queries[: EXACT_QUERIES if name == "exact" else None], KS)
    with tempfile.TemporaryDirectory() as work:
        files = {"queries": Path(work) / "queries.npy", "output": Path(work) / "found.npz"}
        np.save(files["queries"], queries.numpy())
        flags = {"peer": system.peer, "bits": system.build["bits"], "index": index, **files}
        flags |= {"settings": json.dumps(settings), "ks": json.dumps(KS)}
        done = subprocess.run([python, REPO / SCRIPT, *command_flags(flags)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name}: exit code {done.returncode}\n{done.stderr[-2000:]}")
        found = np.load(files["output"])
        return json.loads(done.stdout.splitlines()[-1])["open_ms"], found["rows"], found["seconds"]


def open_ours(name: str, vectors: Path, index: Path):
    """The search(query, k, setting) of an index of ours, of IVFPQ, or of all vectors."""
    if name == "exact":
        every = Searcher(vectors, device="cpu").index
        return lambda query, k, _: every.rank(query[None], None, k)[0][0]
    if name != "ivfpq":
        codes = CompressedIndex(index)
        return lambda query, k, effort: codes.search(query[None], k, codes.effort(effort[0], k, **effort[1]))[0][0]
    import faiss

    faiss.omp_set_num_threads(1)
    ivfpq = Searcher(index, device="cpu").index
    ivfpq.faiss  # noqa: B018 - opened when first asked for
    return lambda query, k, depths: ivfpq.search(query[None], k, Depths(*depths))[0][0]


def table(name: str, built: dict, open_ms: float, rows: np.ndarray, seconds: np.ndarray, truth: list) -> list[dict]:
    """A row for each setting of a system."""
    lines = []
    for s, setting in enumerate(SYSTEMS[name].settings):
        line = {"system": name, "setting": setting, **built, "open_ms": round(open_ms, 2)}
        for j, k in enumerate(KS):
            processor, clock = 1000 * seconds[:, s, j]
            line[f"ms_at_{k}"] = round(float(np.median(processor)), 2)
            line[f"p95_ms_at_{k}"] = round(float(np.percentile(processor, 95)), 2)
            line[f"recall_at_{k}"] = round(recall(rows[s, j], truth[: rows.shape[2]], k), 4)
            line[f"clock_ms_at_{k}"] = round(float(np.median(clock)), 2)
        lines.append(line)
    return lines


def show(rows: list[dict]) -> None:
    head = ("system", "setting", "B/token", "build s", "MB", "open ms", *("ms/query", "p95", "recall") * 2)
    keys = ("system", "setting", "bytes_per_token", "build_seconds", "build_peak_mb", "open_ms")
    keys += tuple(f"{what}_at_{k}" for k in KS for what in ("ms", "p95_ms", "recall"))
    print(f"{'':87}{'k = 10':>26}{'k = 100':>26}")
    print("{:15}{:38}{:>8}{:>10}{:>7}{:>9}{:>10}{:>8}{:>8}{:>10}{:>8}{:>8}".format(*head))
    for row in rows:
        values = [row[key] for key in keys]
        print("{:15}{:38}{:8.1f}{:10.1f}{:7d}{:9.1f}{:10.2f}{:8.2f}{:8.4f}{:10.2f}{:8.2f}{:8.4f}".format(*values))


def main(args):
    machine = hardware()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ |= dict.fromkeys(THREADS, "1")  # of other processes
    torch.set_num_threads(1)
    environments = args.environments.absolute() if args.environments else Path("none")
    pythons = {name: environments / (SYSTEMS[name].peer or "") / "bin" / "python" for name in args.systems}
    names = [name for name in args.systems if not SYSTEMS[name].peer or pythons[name].exists()]
    queries = load_queries(args)
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).absolute() / str(args.n_passages or "all")
        vectors = take_passages(args.embedding_dir.absolute(), args.n_passages, work / "embeddings")
        places, built = {name: (pythons[name], vectors, work / name) for name in names}, {}
        for name in names:
            facts = work / f"{name}.json"
            if not facts.exists():
                work.mkdir(parents=True, exist_ok=True)
                write_json(facts, build(name, *places[name]))
            built[name] = json.loads(facts.read_text())
            print(name, built[name], flush=True)
        every, found = Searcher(vectors, device="cpu").index, {}
        truth = [rows for rows, _ in every.rank(queries, None, max(KS))]
        for _ in range(args.rounds):
            for name in names:
                open_ms, rows, seconds = search(name, *places[name], queries)
                least = found.get(name, (open_ms, rows, seconds))
                found[name] = min(open_ms, least[0]), rows, np.minimum(seconds, least[2])
        n_tokens, dim = every.embeddings.values.shape
        facts = {"passages": len(every), "tokens": n_tokens, "dim": dim}
    rows = [row for name in names for row in table(name, built[name], *found[name], truth)]
    show(rows)
    write_result("search", args, machine, **facts, query_shape=list(queries.shape), rows=rows)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embedding_dir", type=Path, required=True, help="what doc2embedding.py wrote")
    parser.add_argument("--n_passages", type=int, help="the first so many (default: all)")
    parser.add_argument("--queries", type=Path, required=True, help="qid, query; or embeddings (Q, Lq, D) as .npy")
    parser.add_argument("--model", type=Path, help="ColBERT folder, which encodes the queries")
    parser.add_argument("--n_queries", type=int, default=100, help="spread evenly over the file")
    parser.add_argument("--rounds", type=int, default=3, help="times that all systems are searched in turn")
    parser.add_argument("--systems", nargs="+", choices=tuple(SYSTEMS), default=tuple(SYSTEMS), metavar="SYSTEM")
    parser.add_argument("--environments", type=Path, help="folder of the other libraries' virtual environments")
    parser.add_argument("--work", type=Path, help="keep the indexes in this folder; those there are not built again")
    add_results_flag(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
