"""Search an index: by compressed codes or IVFPQ (paper, section 3.6); or rerank given candidates; or score everything.

    python retrieve.py --model model --index_dir index --queries queries.dev.tsv --output run.tsv --k 1000
    python retrieve.py ... --quality best               # of a compressed index: fast, default or best
    python retrieve.py ... --candidates top1000.dev     # reranking: exact MaxSim of the candidates of each query
    python retrieve.py ... --exact                      # every passage, streamed: the ground truth for all else

    Searcher("index").search("what is late interaction?", k=10)     # the same in a notebook: pids, scores, texts

reads   index/ (build_index.py; embeddings/ will do for the last two), model/ (train.py), queries (qid, query)
writes  a run file, TREC (qid Q0 pid rank score tag) or MS MARCO (qid, pid, rank)

A compressed index is searched in the steps that search.py describes; --nprobe, --n_coarse, --n_fine and --n_exact
override what --quality says of each. Where it keeps no vectors, codes are all there is to score by, --exact and
--candidates as well. In an IVFPQ index, for each query token the --faiss_depth nearest embeddings in --nprobe lists are
looked up; their passages are ordered by the sum of what was found (a token that found nothing of a passage counts as
its last hit), and the first --rerank_depth are scored exactly on the memory-mapped fp16 embeddings, in fp32. Under
`accelerate launch` each process takes a share of the queries. Reference: 146 ms a query on MS MARCO.
"""

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from knobs import QUALITY, Effort, effort_for

NPROBE, FAISS_DEPTH, BATCH_SIZE = 32, 1024, 32  # how hard to look, unless told otherwise; queries at a time


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    switch = argparse.BooleanOptionalAction
    parser.add_argument(
        "--model", type=Path, required=True, help="the ColBERT model folder that the index was made from"
    )
    parser.add_argument("--index_dir", type=Path, required=True, help="what build_index.py wrote (or doc2embedding.py)")
    parser.add_argument("--queries", type=Path, required=True, help="qid, query")
    parser.add_argument("--output", type=Path, required=True, help="run file to write")
    parser.add_argument("--format", choices=("trec", "msmarco"), default="trec", help="of the run file (default trec)")
    parser.add_argument("--tag", default="nanocolbert", help="name of the run in a TREC file")
    parser.add_argument("--k", type=int, default=1000, help="passages a query (default 1000)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--candidates", type=Path, help="rerank these: top1000.dev, a run file, or qid, pid")
    how.add_argument("--exact", action=switch, default=False, help="score every passage")
    parser.add_argument("--batch_size", type=int, default=BATCH_SIZE, help="queries at a time (default 32)")
    parser.add_argument("--nprobe", type=int, help="lists searched for each query token (default: by --quality, or 32)")
    group = parser.add_argument_group("compressed index")
    group.add_argument("--quality", choices=tuple(QUALITY), default="default", help="how hard to look")
    group.add_argument("--n_coarse", type=int, help="passages scored by coarse codes (default: by --quality)")
    group.add_argument("--n_fine", type=int, help="of them, scored by all codes (default: by --quality)")
    group.add_argument("--n_exact", type=int, help="of them, scored by kept vectors (default: by --quality)")
    group = parser.add_argument_group("IVFPQ")
    group.add_argument("--faiss_depth", type=int, help=f"embeddings found for each query token (default {FAISS_DEPTH})")
    group.add_argument("--rerank_depth", type=int, help="passages scored exactly (default: k, at least 1000)")
    parser.add_argument("--cpu", action=switch, default=False, help="use the CPU even where there is a GPU")
    parser.add_argument("--gpu_index", action=switch, default=False, help="put the index on the GPU too")
    return parser.parse_args()


if __name__ == "__main__":  # before the imports that take seconds: --help, or a wrong flag, is answered at once
    ARGS = parse_args()

import numpy as np
import torch
import transformers
from accelerate import PartialState
from torch import Tensor

import runs
from artifact import check_file, peak_memory_mb, read_meta
from cli import InputError, run_stage
from compute import default_device
from maxsim import maxsim_packed
from model import ColBERT, check_texts, model_fingerprint
from progress import progress
from ragged import Ids, Ragged, neighbours
from search import CompressedIndex, Ranking, read_vectors, top
from tsv import Collection, read_queries

RERANK_TOKENS = {"cpu": 4096, "cuda": 1 << 20}  # embeddings of candidates scored at a time
EXACT_TOKENS = 4096  # embeddings scored at a time by exact search
EXACT_QUERIES = 16  # against so many queries: their similarities, 8 MB, stay in the cache
EXACT_PASSAGES = 2048  # passages whose scores are kept before they are merged into the best
EFFORT = ("exact", "quality", *Effort._fields, "faiss_depth", "rerank_depth", "batch_size")  # flags of the search


class Hit(NamedTuple):
    """A passage that was found; `text` where the collection is at hand."""

    pid: str
    score: float
    text: str | None


class Searcher:
    """An open index. Rows are positions in the collection; `pids.text(rows)` gives their ids."""

    def __init__(self, index_dir, model=None, device=None, collection=None, gpu_index: bool = False):
        """Open an index folder.

        model: the model folder, collection: the file with the passages (.tsv or .tsv.gz); by default where the index
        says that they were, looked for when first needed. device: by default the GPU if there is one.
        Raises InputError where the folders do not fit together.
        """
        self.meta = read_meta(index_dir, "index", "build_index.py", "embeddings")
        self.index_dir, self.gpu_index = Path(index_dir), gpu_index
        self.device = torch.device(device or default_device())
        self.codes = None
        if self.meta["kind"] == "embeddings" and self.meta.get("bits"):
            raise InputError(f"{index_dir}: compressed embeddings: run build_index.py, and give what it wrote")
        if self.meta.get("method") == "codes":
            self.codes = self.pids = self._open_codes()
        else:
            self.embeddings, self.pids = Ragged(index_dir), Ids(Path(index_dir) / "pids.npy")
        self.seconds: dict[str, float] = {}  # where the time went
        if model is not None:
            self.model = self._load(model)
        if collection is not None:
            self.collection = Collection(collection)

    def _open_codes(self) -> CompressedIndex:
        if not self.gpu_index:
            return CompressedIndex(self.index_dir)
        from gpu_search import GpuIndex

        return GpuIndex(self.index_dir, self.device)

    @cached_property
    def model(self) -> ColBERT:
        """The model that the index was made from."""
        places = [self.index_dir.resolve() / (self.meta.get("model_path") or ""), Path(self.meta["model"])]
        found = [place for place in places if (place / "config.json").is_file()]
        if not found:
            raise InputError(
                f"{self.index_dir}: its model, {self.meta['model']}, is not there: give its folder as model"
            )
        return self._load(found[0])

    def _load(self, folder) -> ColBERT:
        if model_fingerprint(folder) != self.meta["model_fingerprint"]:
            raise InputError(
                f"{self.index_dir}: made from another model ({self.meta['model']}) than {folder}: search with that, or "
                "run doc2embedding.py and build_index.py again"
            )
        return ColBERT.from_pretrained(folder, device=self.device)

    @cached_property
    def collection(self) -> Collection | None:
        """The passages' texts, None where they are not at hand."""
        path = self.index_dir.resolve() / (self.meta.get("collection_path") or "")
        return Collection(path) if path.is_file() else None

    @cached_property
    def faiss(self):
        """The FAISS index."""
        if self.meta["kind"] != "index":
            raise InputError(f"{self.index_dir}: embeddings without an index: run build_index.py, or use --exact")
        import faiss  # a compressed index needs none

        index = faiss.read_index(str(self.index_dir / "faiss.index"), faiss.IO_FLAG_MMAP)
        on_gpu = self.gpu_index and getattr(faiss, "get_num_gpus", int)()
        return faiss.index_cpu_to_all_gpus(index) if on_gpu else index

    @contextmanager
    def _timed(self, what: str):
        started = time.perf_counter()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started

    def search(self, queries: str | list[str], k: int = 10, **effort) -> list[Hit] | list[list[Hit]]:
        """The k best passages for a query, the best first; a list of such lists for a list of queries.

        effort, for this call only: exact=True scores every passage; quality="fast", "default" or "best", and nprobe,
        n_coarse, n_fine, n_exact (compressed index), nprobe, faiss_depth, rerank_depth (IVFPQ) are the flags of the
        same names; among=[pid, ...] searches these passages only (compressed index). Raises InputError where the
        collection is not the one that the index was made from, or an id of `among` is not in the index.
        """
        if k < 1:
            raise InputError(f"k is {k}: ask for at least one passage")
        rankings = self.rankings([queries] if isinstance(queries, str) else check_texts(queries), k, **effort)
        hits = [self._hits(rows, scores) for rows, scores in rankings]
        return hits[0] if isinstance(queries, str) else hits

    def _hits(self, rows: np.ndarray, scores: np.ndarray) -> list[Hit]:
        pids = self.pids.text(rows)
        if self.collection is None:
            return [Hit(pid, score, None) for pid, score in zip(pids, scores.tolist(), strict=True)]
        hits, lines = [], self.codes.origin(rows) if self.codes else rows
        for line, pid, score in zip(lines.tolist(), pids, scores.tolist(), strict=True):
            if line < 0:  # added to the index later
                hits.append(Hit(pid, score, None))
                continue
            found, text = self.collection[line] if line < len(self.collection) else (None, None)
            if found != pid:
                raise InputError(
                    f"{self.collection.path}:{line + 1}: pid {found!r}, but {pid!r} in {self.index_dir}: "
                    "give the collection that the index was made from"
                )
            hits.append(Hit(pid, score, text))
        return hits

    def rankings(
        self,
        texts: list[str],
        k: int,
        candidates: list[np.ndarray] | None = None,
        exact: bool = False,
        quality: str = "default",
        among: list[str] | None = None,
        batch_size: int = BATCH_SIZE,
        **knobs: int | None,
    ) -> Iterator[Ranking]:
        """Yield the k best rows and their scores for each query, in batches.

        Scored are the query's own `candidates` if they are given, every passage if `exact`, else what the index finds.
        knobs: those that `search` names; None is the default.
        """
        knobs = {name: value for name, value in knobs.items() if value is not None}
        check_knobs(knobs, quality, among, self.codes is not None)
        allowed = self._allowed(among)
        size = max(1, len(texts)) if exact and self.codes is None else batch_size
        starts = range(0, len(texts), size)
        for start in progress(starts, len(starts) > 1, desc="search", unit=" batches"):
            queries = self.encode(texts[start : start + size])  # (B, Lq, D)
            rows = candidates and candidates[start : start + size]
            if self.codes is not None:
                yield from self._search_codes(queries, k, rows, exact, effort_for(quality, k, **knobs), allowed)
            elif exact:
                yield from self.exact(queries, k)
            elif candidates is not None:
                yield from self.rerank(queries, rows, k)
            else:
                depth = knobs.get("rerank_depth") or default_rerank_depth(k)
                nprobe, faiss_depth = knobs.get("nprobe", NPROBE), knobs.get("faiss_depth", FAISS_DEPTH)
                yield from self.rerank(queries, self.candidates(queries, nprobe, faiss_depth, depth), k)

    def _search_codes(self, queries: Tensor, k: int, candidates, exact: bool, effort: Effort, allowed) -> list[Ranking]:
        """Rankings by the compressed index."""
        queries = queries.float().cpu()
        with self._timed("codes"):
            if candidates is None and not exact:
                return self.codes.search_many(queries, k, effort, allowed)
            every = np.flatnonzero(self.codes.alive() if allowed is None else allowed)
            lists = [every] * len(queries) if exact else [np.sort(rows) for rows in candidates]
            return [self.codes.rank(*pair, k) for pair in zip(queries, lists, strict=True)]

    def _allowed(self, among: list[str] | None) -> np.ndarray | None:
        """Whether each row may be found (n,) bool, from ids; None: all may."""
        if among is None:
            return None
        rows = self.codes.rows(among)
        if (rows < 0).any():
            raise InputError(f"{self.index_dir}: has no passage {among[int((rows < 0).argmax())]}")
        allowed = np.zeros(len(self.codes), bool)
        allowed[rows] = True
        return allowed

    def encode(self, texts: list[str]) -> Tensor:
        """Query embeddings (B, Lq, D) fp32."""
        with self._timed("encode queries"):
            return self.model.encode_queries(texts, progress=False)

    def candidates(self, queries: Tensor, nprobe: int, faiss_depth: int, rerank_depth: int) -> list[np.ndarray]:
        """Rows of the passages that IVFPQ finds for each query (B, Lq, D), at most `rerank_depth`."""
        B, Lq, D = queries.shape
        with self._timed("IVFPQ"):
            self._set_nprobe(nprobe)
            vectors = queries.reshape(B * Lq, D).cpu().numpy()
            similarities, ids = self.faiss.search(vectors, faiss_depth)
            ids[~vectors.any(1)] = -1  # rows of zeros pad a query: they score 0 everywhere, and find nothing
        with self._timed("candidates"):
            rows = np.searchsorted(self.embeddings.offsets, ids.reshape(-1), side="right") - 1
            rows = rows.reshape(B, Lq, -1)  # -1 where FAISS found nothing (its id is -1)
            similarities = similarities.reshape(B, Lq, -1)
            return [best_candidates(*pair, rerank_depth) for pair in zip(rows, similarities, strict=True)]

    def _set_nprobe(self, nprobe: int) -> None:
        index = self.faiss  # first of all: opening it tells whether there is one
        import faiss

        nprobe = min(nprobe, self.meta["nlist"])
        if self.gpu_index and hasattr(faiss, "GpuParameterSpace"):
            faiss.GpuParameterSpace().set_index_parameter(index, "nprobe", nprobe)
        else:
            faiss.extract_index_ivf(index).nprobe = nprobe

    def rerank(self, queries: Tensor, candidates: list[np.ndarray], k: int) -> list[Ranking]:
        """Exact MaxSim of each query (B, Lq, D) with its own candidate rows; the k best."""
        rankings = []
        for query, rows in zip(queries, candidates, strict=True):
            if not len(rows):
                rankings.append((rows, np.zeros(0, np.float32)))
                continue
            rows = np.sort(rows)  # the memory map is read from front to back
            blocks = neighbours(self.embeddings.lengths(rows), RERANK_TOKENS[self.device.type])
            scores = [self._score(query[None].to(self.device), rows[block]) for block in blocks]
            rankings.append(top(rows, np.concatenate(scores), k))
        return rankings

    def _score(self, query: Tensor, rows: np.ndarray) -> np.ndarray:
        """MaxSim (n,) of one query (1, Lq, D) with some passages."""
        with self._timed("read embeddings"):
            embeddings, lengths = read_vectors(self.embeddings, rows)
            embeddings = embeddings.to(self.device).float()  # (T, D)
        with self._timed("MaxSim"):
            return maxsim_packed(query, embeddings, lengths.to(self.device))[0].cpu().numpy()

    def exact(self, queries: Tensor, k: int) -> list[Ranking]:
        """The k best of all passages for each query (Q, Lq, D): every embedding is read once and scored in fp32."""
        Q, k = len(queries), min(k, len(self.embeddings))
        best = torch.full((Q, 0), -torch.inf)  # (Q, up to k)
        best_rows = torch.zeros((Q, 0), dtype=torch.int64)
        scores, first = [], 0
        blocks = neighbours(np.diff(self.embeddings.offsets), EXACT_TOKENS)
        for block in progress(blocks, desc="exact", unit=" blocks"):
            start, stop = block.start, block.stop
            with self._timed("MaxSim"):
                values, lengths = self.embeddings.slice(start, stop)
                block = torch.from_numpy(np.array(values)).to(self.device).float()  # (T, D)
                lengths = torch.from_numpy(lengths).to(self.device)
                parts = [maxsim_packed(part.to(self.device), block, lengths) for part in queries.split(EXACT_QUERIES)]
                scores.append(torch.cat(parts).cpu())  # (Q, stop - start)
            if stop - first >= EXACT_PASSAGES or stop == len(self.embeddings):
                with self._timed("merge"):
                    rows = torch.arange(first, stop).expand(Q, -1)
                    best, at = torch.cat([best, *scores], 1).topk(min(k, best.shape[1] + stop - first), dim=1)
                    best_rows = torch.cat([best_rows, rows], 1).gather(1, at)
                    scores, first = [], stop
        return [top(rows, scores, k) for rows, scores in zip(best_rows.numpy(), best.numpy(), strict=True)]


def check_knobs(knobs: dict, quality: str, among, is_compressed: bool) -> None:
    """Raises InputError for what the kind of index does not know."""
    known = Effort._fields if is_compressed else ("nprobe", "faiss_depth", "rerank_depth")
    for name, value in knobs.items():
        if name not in known:
            kind = "a compressed index" if is_compressed else "IVFPQ"
            raise InputError(f"{name} says nothing to {kind}: give {', '.join(known)}")
        if value < 1:
            raise InputError(f"{name} is {value}: give at least 1")
    if quality not in QUALITY:
        raise InputError(f"quality {quality!r}: give {', '.join(QUALITY)}")
    if not is_compressed and (among is not None or quality != "default"):
        raise InputError("among and quality are for a compressed index: build_index.py --method codes")


def best_candidates(rows: np.ndarray, similarities: np.ndarray, n: int) -> np.ndarray:
    """The n passages whose found embeddings promise the highest MaxSim, as rows (<= n,), in no order.

    rows, similarities (Lq, k'): the passages of the embeddings found for each query token, the nearest first; row -1
    stands for nothing found. A token that found nothing of a passage adds what its last hit had.
    """
    found = rows >= 0
    unique, column = np.unique(rows[found], return_inverse=True)
    if len(unique) <= n:
        return unique
    last = np.where(found, similarities, np.inf).min(1)  # (Lq,)
    last[~found.any(1)] = 0.0  # the same for every passage
    best = np.repeat(last[:, None], len(unique), axis=1)  # (Lq, candidates)
    np.maximum.at(best, (np.nonzero(found)[0], column), similarities[found])
    return unique[np.argpartition(-best.sum(0), n - 1)[:n]]


def search_all(searcher: Searcher, queries: dict[str, str], args) -> Iterator[tuple[str, list[str], list[float]]]:
    """Yield (qid, pids, scores) of every query."""
    candidates = None
    if args.candidates:
        candidates = list(runs.read_candidates(args.candidates, searcher.pids, queries).values())
    effort = {name: getattr(args, name) for name in EFFORT}
    rankings = searcher.rankings(list(queries.values()), args.k, candidates, **effort)
    for qid, (rows, scores) in zip(queries, rankings, strict=True):
        yield qid, searcher.pids.text(rows), scores.tolist()


def default_rerank_depth(k: int) -> int:
    """As many passages as are asked for, and enough of them to find the best ten."""
    return max(1000, k)


def main(args):
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    state = PartialState(cpu=args.cpu or not torch.accelerator.is_available())  # else processes do not find each other
    check_file(args.queries, "queries: qid, query")
    if args.candidates:
        check_file(args.candidates, "candidates of the queries")
    searcher = Searcher(args.index_dir, args.model, state.device, gpu_index=args.gpu_index)
    queries = read_queries(args.queries)
    if not queries:
        raise InputError(f"{args.queries}: no queries")
    mine = dict(list(queries.items())[state.process_index :: state.num_processes])
    share = (
        args.output.with_name(f"{args.output.name}.{state.process_index}") if state.num_processes > 1 else args.output
    )
    started = time.time()
    runs.write_run(share, search_all(searcher, mine, args), args.format, args.tag)
    seconds = time.time() - started
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    if state.num_processes > 1:
        join_shares(args.output, state.num_processes)
    for what, spent in sorted(searcher.seconds.items(), key=lambda item: -item[1]):
        print(f"{what:>16} {1000 * spent / len(mine):8.2f} ms a query {100 * spent / seconds:5.1f} %")
    print(f"{'in all':>16} {1000 * seconds / len(mine):8.2f} ms a query")
    return {
        "output": str(args.output),
        "queries": len(queries),
        "seconds": round(seconds, 2),
        "ms_per_query": round(1000 * seconds / len(queries), 2),
        "peak_memory_mb": peak_memory_mb(),
    }


def join_shares(output: Path, n: int) -> None:
    """Join the run files of n processes into one."""
    partial = output.with_name(output.name + ".partial")
    shares = [output.with_name(f"{output.name}.{i}") for i in range(n)]
    with partial.open("wb") as file:
        for share in shares:
            file.write(share.read_bytes())
    os.replace(partial, output)
    for share in shares:
        share.unlink()


if __name__ == "__main__":
    run_stage(main, ARGS)
