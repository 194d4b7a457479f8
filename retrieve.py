"""Search an index: by compressed codes or IVFPQ (paper, section 3.6); or rerank given candidates; or score everything.

    python retrieve.py --model model --index_dir index --queries queries.dev.tsv --output run.tsv --k 1000
    python retrieve.py ... --quality best               # of a compressed index: fast, default or best
    python retrieve.py ... --candidates top1000.dev     # reranking: exact MaxSim of the candidates of each query
    python retrieve.py ... --exact                      # every passage, streamed: the ground truth for all else

    Searcher("index").search("what is late interaction?", k=10)     # the same in a notebook: pids, scores, texts

reads   index/ (build_index.py; embeddings/ will do for the last two), model/ (train.py), queries (qid, query)
writes  a run file, TREC (qid Q0 pid rank score tag) or MS MARCO (qid, pid, rank)

A compressed index is searched in the steps that search.py describes; --nprobe, --n_coarse, --n_fine and --n_exact
override what --quality says of each. Where it keeps no vectors, --exact and --candidates are refused, unless they are
to score --by_codes. In an IVFPQ index, for each query token the --faiss_depth nearest embeddings in --nprobe lists are
looked up; their passages are ordered by the sum of what was found (a token that found nothing of a passage counts as
its last hit), and the first --rerank_depth are scored exactly on the memory-mapped fp16 embeddings, in fp32. Equal
scores are in the order of the collection. Under `accelerate launch` each process takes a share of the queries.
Reference: 146 ms a query on MS MARCO.
"""

import argparse
import gzip
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from nanocolbert import cli
from nanocolbert.cli import InputError, check_launch, positive, run_stage, say, word
from nanocolbert.index.knobs import QUALITY, Effort, effort_for

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
    parser.add_argument("--tag", type=word, default="nanocolbert", help="name of the run in a TREC file")
    parser.add_argument("--k", type=positive, default=1000, help="passages a query (default 1000)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--candidates", type=Path, help="rerank these: top1000.dev, a run file, or qid, pid")
    how.add_argument("--exact", action=switch, default=False, help="score every passage")
    parser.add_argument(
        "--by_codes", action=switch, default=False, help="--exact, --candidates: score by codes, without kept vectors"
    )
    parser.add_argument("--batch_size", type=positive, default=BATCH_SIZE, help="queries at a time (default 32)")
    parser.add_argument(
        "--nprobe", type=positive, help="lists searched for each query token (default: by --quality, or 32)"
    )
    group = parser.add_argument_group("compressed index")
    group.add_argument("--quality", choices=tuple(QUALITY), default="default", help="how hard to look")
    group.add_argument("--n_coarse", type=positive, help="passages scored by coarse codes (default: by --quality)")
    group.add_argument("--n_fine", type=positive, help="of them, scored by all codes (default: by --quality)")
    group.add_argument("--n_exact", type=positive, help="of them, scored by kept vectors (default: by --quality)")
    group = parser.add_argument_group("IVFPQ")
    group.add_argument(
        "--faiss_depth", type=positive, help=f"embeddings found for each query token (default {FAISS_DEPTH})"
    )
    group.add_argument("--rerank_depth", type=positive, help="passages scored exactly (default: k, at least 1000)")
    parser.add_argument("--verify", action=switch, default=False, help="check the checksums of what is read first")
    parser.add_argument("--cpu", action=switch, default=False, help="use the CPU even where there is a GPU")
    parser.add_argument("--gpu_index", action=switch, default=False, help="put the index on the GPU too")
    return parser.parse_args()


if __name__ == "__main__":  # before the imports that take seconds: --help, or a wrong flag, is answered at once
    ARGS = cli.start(parse_args)

import numpy as np
import torch
import transformers
from accelerate import PartialState
from torch import Tensor

from model import ColBERT
from nanocolbert.checkpoints.layouts import model_fingerprint
from nanocolbert.compute import default_device
from nanocolbert.index.compressed import CompressedIndex, Ranking, highest, read_vectors, top
from nanocolbert.maxsim import maxsim_packed
from nanocolbert.progress import progress
from nanocolbert.storage import runs
from nanocolbert.storage.artifact import (
    beside,
    check_file,
    check_output_file,
    is_device,
    peak_memory_mb,
    read_meta,
    replacing,
    verify,
)
from nanocolbert.storage.ragged import Ids, Ragged, neighbours
from nanocolbert.storage.tsv import Collection, read_queries
from nanocolbert.text import check_texts

RERANK_TOKENS = {"cpu": 4096, "cuda": 1 << 20}  # embeddings of candidates scored at a time
EXACT_TOKENS = 4096  # embeddings scored at a time by exact search
EXACT_QUERIES = 16  # against so many queries: their similarities, 8 MB, stay in the cache
EXACT_PASSAGES = 2048  # passages whose scores are kept before they are merged into the best
EFFORT = (
    "exact",
    "by_codes",
    "quality",
    *Effort._fields,
    "faiss_depth",
    "rerank_depth",
    "batch_size",
)  # flags of the search


class Hit(NamedTuple):
    """A passage that was found; `text` where the collection is at hand."""

    pid: str
    score: float
    text: str | None


class Searcher:
    """An open index. Rows are positions in the collection; `pids.text(rows)` gives their ids."""

    def __init__(
        self, index_dir, model=None, device=None, collection=None, gpu_index: bool = False, verify: bool = False
    ):
        """Open an index folder.

        model: the model folder, collection: the file with the passages (.tsv or .tsv.gz); by default where the index
        says that they were, looked for when first needed. device: by default the GPU if there is one.
        verify: check the checksums of the index first. Any number of threads may search at once.
        Raises InputError where the folders do not fit together.
        """
        self.meta = read_meta(index_dir, "index", "build_index.py", "embeddings", check=verify)
        self._lock = threading.RLock()
        self.index_dir, self.gpu_index = Path(index_dir), gpu_index
        self.device = torch.device(device or default_device())
        self.codes = None
        if self.meta["kind"] == "embeddings" and self.meta.get("bits"):
            raise InputError(f"{index_dir}: compressed embeddings: run build_index.py, and give what it wrote")
        if self.meta.get("method") == "codes":
            self.codes = self.pids = self._open_codes()
        else:
            self.embeddings, self.pids = self._open_embeddings()
        self.seconds: dict[str, float] = {}  # where the time went
        if model is not None:
            self.model = self._load(model)
        if collection is not None:
            self.collection = Collection(collection)

    def _open_codes(self) -> CompressedIndex:
        if not self.gpu_index:
            return CompressedIndex(self.index_dir)
        from nanocolbert.index.gpu_index import GpuIndex

        return GpuIndex(self.index_dir, self.device)

    def _open_embeddings(self) -> tuple[Ragged, Ids]:
        embeddings = Ragged(self.index_dir, "f2")
        pids = Ids(self.index_dir / "pids.npy", len(embeddings))
        shape = (self.meta.get("embeddings", len(embeddings.values)), self.meta["dim"])
        if embeddings.values.shape != shape:
            raise InputError(
                f"{self.index_dir / 'values.npy'}: of shape {embeddings.values.shape}, {shape} by meta.json: restore "
                f"it, or make {self.index_dir} again"
            )
        if len(empty := np.flatnonzero(embeddings.offsets[1:] == embeddings.offsets[:-1])):
            pid = pids.text(empty[:1])[0]
            raise InputError(f"{self.index_dir}: passage {pid} has no embeddings: leave it out of the collection")
        return embeddings, pids

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
        model = ColBERT.from_pretrained(folder, device=self.device)
        model.check_tokenizer(self.index_dir, self.meta)
        return model

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

        path, wanted = self.index_dir / "faiss.index", self.embeddings.values.shape
        try:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
        except (RuntimeError, MemoryError) as error:
            raise InputError(f"{path}: damaged ({str(error).splitlines()[-1]}): make {self.index_dir} again") from None
        if (index.ntotal, index.d) != wanted:
            raise InputError(f"{path}: {index.ntotal} x {index.d}, not {wanted}: make {self.index_dir} again")
        on_gpu = self.gpu_index and getattr(faiss, "get_num_gpus", int)()
        return faiss.index_cpu_to_all_gpus(index) if on_gpu else index

    @contextmanager
    def _timed(self, what: str):
        started = time.perf_counter()
        yield
        with self._lock:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started

    def search(self, queries: str | list[str], k: int = 10, **effort) -> list[Hit] | list[list[Hit]]:
        """The k best passages for a query, the best first; a list of such lists for a list of queries.

        effort, for this call only: exact=True scores every passage, with by_codes=True by its codes; quality="fast",
        "default" or "best", and nprobe, n_coarse, n_fine, n_exact (compressed index), nprobe, faiss_depth, rerank_depth
        (IVFPQ) are the flags of the same names; among=[pid, ...] searches these passages only (compressed index).
        Raises InputError where the collection is not the one that the index was made from, or an id of `among` is not
        in the index.
        """
        if k < 1:
            raise InputError(f"k is {k}: ask for at least one passage")
        rankings = self.rankings([queries] if isinstance(queries, str) else check_texts(queries), k, **effort)
        hits = [self._hits(rows, scores) for rows, scores in rankings]
        return hits[0] if isinstance(queries, str) else hits

    def _hits(self, rows: np.ndarray, scores: np.ndarray) -> list[Hit]:
        pids = self.pids.text(rows)
        with self._lock:  # one that is opened for all
            collection = self.collection
        if collection is None:
            return [Hit(pid, score, None) for pid, score in zip(pids, scores.tolist(), strict=True)]
        hits, lines = [], self.codes.origin(rows) if self.codes else rows
        for line, pid, score in zip(lines.tolist(), pids, scores.tolist(), strict=True):
            if line < 0:  # added to the index later
                hits.append(Hit(pid, score, None))
                continue
            found, text = collection[line] if line < len(collection) else (None, None)
            if found != pid:
                raise InputError(
                    f"{collection.path}:{line + 1}: pid {found!r}, but {pid!r} in {self.index_dir}: "
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
        by_codes: bool = False,
        quality: str = "default",
        among: list[str] | None = None,
        batch_size: int = BATCH_SIZE,
        **knobs: int | None,
    ) -> Iterator[Ranking]:
        """Yield the k best rows and their scores for each query, in batches.

        Scored are the query's own `candidates` if they are given, every passage if `exact`, else what the index finds.
        by_codes: score these two not exactly, but by a compressed index' codes.
        knobs: those that `search` names; None is the default.
        """
        self.check_scoring(exact or candidates is not None, by_codes)
        knobs = {name: value for name, value in knobs.items() if value is not None}
        check_knobs(knobs, quality, among, self.codes is not None)
        allowed = self._allowed(among)
        rank = {"exact": exact, "by_codes": by_codes}
        size = max(1, len(texts)) if exact and self.codes is None else batch_size
        starts = range(0, len(texts), size)
        for start in progress(starts, len(starts) > 1, desc="search", unit=" batches"):
            queries = self.encode(texts[start : start + size])  # (B, Lq, D)
            rows = candidates and candidates[start : start + size]
            if self.codes is not None:
                yield from self._search_codes(queries, k, rows, effort_for(quality, k, **knobs), allowed, **rank)
            elif exact:
                yield from self.exact(queries, k)
            elif candidates is not None:
                yield from self.rerank(queries, rows, k)
            else:
                depth = knobs.get("rerank_depth") or default_rerank_depth(k)
                nprobe, faiss_depth = knobs.get("nprobe", NPROBE), knobs.get("faiss_depth", FAISS_DEPTH)
                yield from self.rerank(queries, self.candidates(queries, nprobe, faiss_depth, depth), k)

    def _search_codes(
        self, queries: Tensor, k: int, candidates, effort: Effort, allowed, exact: bool, by_codes: bool
    ) -> list[Ranking]:
        """Rankings by the compressed index."""
        queries = queries.float().cpu()
        with self._timed("codes"):
            if candidates is None and not exact:
                return self.codes.search_many(queries, k, effort, allowed)
            every = np.flatnonzero(self.codes.alive() if allowed is None else allowed)
            lists = [every] * len(queries) if exact else [np.sort(rows) for rows in candidates]
            return [self.codes.rank(*pair, k, by_codes) for pair in zip(queries, lists, strict=True)]

    def check_scoring(self, is_given: bool, by_codes: bool) -> None:
        """Raise InputError unless what is given, candidates or every passage, can be scored in this way."""
        if by_codes and (self.codes is None or not is_given):
            raise InputError("by_codes says how a compressed index scores --exact and --candidates: leave it out")
        if self.codes is not None and is_given and not by_codes:
            self.codes.check_vectors()

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
            with self._lock:  # one that is opened for all
                model = self.model
            return model.encode_queries(texts, progress=False)

    def candidates(self, queries: Tensor, nprobe: int, faiss_depth: int, rerank_depth: int) -> list[np.ndarray]:
        """Rows of the passages that IVFPQ finds for each query (B, Lq, D), at most `rerank_depth`."""
        B, Lq, D = queries.shape
        with self._timed("IVFPQ"):
            vectors = queries.reshape(B * Lq, D).cpu().numpy()
            similarities, ids = self._search_faiss(vectors, faiss_depth, nprobe)
            ids[(ids < 0) | (ids >= len(self.embeddings.values))] = -1  # the latter: a damaged index
            ids[~vectors.any(1)] = -1  # rows of zeros pad a query: they score 0 everywhere, and find nothing
        with self._timed("candidates"):
            rows = np.searchsorted(self.embeddings.offsets, ids.reshape(-1), side="right") - 1
            rows = rows.reshape(B, Lq, -1)  # -1 where FAISS found nothing (its id is -1)
            similarities = similarities.reshape(B, Lq, -1)
            return [best_candidates(*pair, rerank_depth) for pair in zip(rows, similarities, strict=True)]

    def _search_faiss(self, vectors: np.ndarray, k: int, nprobe: int) -> tuple[np.ndarray, np.ndarray]:
        """Similarities and ids (n, k) of the embeddings that FAISS finds for vectors (n, D)."""
        with self._lock:  # one that is opened for all
            index = self.faiss
        import faiss

        nprobe = min(nprobe, self.meta["nlist"])
        if self.gpu_index and hasattr(faiss, "GpuParameterSpace"):
            with self._lock:
                faiss.GpuParameterSpace().set_index_parameter(index, "nprobe", nprobe)
                return index.search(vectors, k)
        return index.search(vectors, k, params=faiss.SearchParametersIVF(nprobe=nprobe))

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
        best_rows, best = ([np.zeros(0, dtype)] * len(queries) for dtype in (np.int64, np.float32))  # (up to k,) each
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
                    rows = np.arange(first, stop)
                    for query, new in enumerate(torch.cat(scores, 1).numpy()):
                        found = np.concatenate([best[query], new])
                        chosen = highest(found, k)  # in order of position
                        best[query], best_rows[query] = found[chosen], np.append(best_rows[query], rows)[chosen]
                    scores, first = [], stop
        return [top(rows, scores, k) for rows, scores in zip(best_rows, best, strict=True)]


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
    """The n passages whose found embeddings promise the highest MaxSim, as rows (<= n,), in order.

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
    return unique[highest(best.sum(0), n)]


def read_candidates(
    searcher: Searcher, queries: dict[str, str], args, state: PartialState
) -> dict[str, np.ndarray] | None:
    """Rows of each query's candidates, None where none are asked for. Raises InputError if there are none at all."""
    if not args.candidates:
        return None
    candidates = runs.read_candidates(args.candidates, searcher.pids, queries)
    without = [qid for qid, rows in candidates.items() if not len(rows)]
    if len(without) == len(queries):
        raise InputError(
            f"{args.candidates}: no candidates of any query in {args.queries}: give those of these queries"
        )
    if without and state.is_main_process:
        say(f"{args.candidates}: no candidates for {len(without)} of {len(queries)} queries, {without[0]} among them")
    return candidates


def search_all(searcher: Searcher, queries: dict[str, str], candidates, args) -> Iterator[tuple]:
    """Yield (qid, pids, scores) of every query."""
    effort = {name: getattr(args, name) for name in EFFORT}
    rows = candidates and [candidates[qid] for qid in queries]
    rankings = searcher.rankings(list(queries.values()), args.k, rows, **effort)
    for qid, (rows, scores) in zip(queries, rankings, strict=True):
        yield qid, searcher.pids.text(rows), scores.tolist()


def write_run(rankings, args, state: PartialState) -> None:
    """Write the run file: one process by itself, several a share each, which the first one joins."""
    target = check_output_file(args.output)

    def rankings_alone():
        remove_shares(target)  # now that the file is locked
        yield from rankings

    if state.num_processes == 1:
        runs.write_run(target, rankings_alone(), args.format, args.tag)
        return
    if is_device(target):
        raise InputError(f"{args.output}: not a file, which several processes need: give a file, or one process")
    shares = [beside(target, f".partial.{i}") for i in range(state.num_processes)]
    if not state.is_main_process:
        state.wait_for_everyone()  # until the file is locked
        runs.write_run(shares[state.process_index], rankings, args.format, args.tag)
        state.wait_for_everyone()
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as file:
        try:
            remove_shares(target)
            state.wait_for_everyone()
            runs.write_run(shares[0], rankings, args.format, args.tag)
            state.wait_for_everyone()
            packed = gzip.GzipFile("", "wb", fileobj=file, mtime=0) if target.suffix == ".gz" else file
            for share in shares:
                with share.open("rb") as part:
                    shutil.copyfileobj(part, packed)
            if packed is not file:
                packed.close()
        finally:
            remove_shares(target)


def remove_shares(target: Path) -> None:
    """Remove shares of the processes that wrote to a run file, or were killed at it."""
    share = re.compile(re.escape(target.name) + r"\.partial\.\d+(\.partial)?")
    for path in target.parent.iterdir():
        if share.fullmatch(path.name):
            path.unlink(missing_ok=True)


def default_rerank_depth(k: int) -> int:
    """As many passages as are asked for, and enough of them to find the best ten."""
    return max(1000, k)


def main(args):
    check_launch()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    state = PartialState(cpu=args.cpu or not torch.accelerator.is_available())  # else processes do not find each other
    check_file(args.queries, "queries: qid, query")
    if args.candidates:
        check_file(args.candidates, "candidates of the queries")
    check_output(args)
    if args.verify:
        verify(args.model)
    queries = read_queries(args.queries)
    if not queries:
        raise InputError(f"{args.queries}: no queries")
    searcher = Searcher(args.index_dir, args.model, state.device, gpu_index=args.gpu_index, verify=args.verify)
    searcher.check_scoring(args.exact or args.candidates is not None, args.by_codes)
    candidates = read_candidates(searcher, queries, args, state)
    mine = dict(list(queries.items())[state.process_index :: state.num_processes])
    started = time.time()
    write_run(search_all(searcher, mine, candidates, args), args, state)
    seconds = time.time() - started
    if not state.is_main_process:
        return None
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


def check_output(args) -> None:
    """Raise InputError if the run file cannot be written, or is a part of what is read."""
    target = check_output_file(args.output, args.queries, args.candidates, args.index_dir, args.model)
    for folder in (args.index_dir, args.model):
        if (folder / "meta.json").exists() and folder.resolve() in target.parents:
            raise InputError(f"{args.output}: inside {folder}, which is read: give another --output")


if __name__ == "__main__":
    run_stage(main, ARGS)
