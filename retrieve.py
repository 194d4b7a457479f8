"""Search an index: by compressed codes or IVFPQ (paper, section 3.6); or rerank given candidates; or score everything.

    python retrieve.py --index_dir index --queries queries.dev.tsv --output run.tsv --k 1000
    python retrieve.py ... --quality best               # of a compressed index: fast, default or best
    python retrieve.py ... --candidates top1000.dev     # reranking: exact MaxSim of the candidates of each query
    python retrieve.py ... --exact                      # every passage, streamed: the ground truth for all else

    Searcher("index").search("what is late interaction?", k=10)     # the same in a notebook: pids, scores, texts

reads   index/ (build_index.py; embeddings/ will do for the last two), model/ (train.py), queries (qid, query)
writes  a run file, TREC (qid Q0 pid rank score tag) or MS MARCO (qid, pid, rank)

The way of a query: the model encodes it, the index finds rows and scores for it (compressed.py, ivfpq.py and exact.py
in nanocolbert/index/ say how), and rows become ids and texts. In a compressed index --nprobe, --n_coarse, --n_fine and
--n_exact override what --quality says of each step. Where it keeps no vectors, --exact and --candidates are refused,
unless they are to score --by_codes. An IVFPQ index scores exactly, on memory-mapped fp16 embeddings, the first
--rerank_depth of the passages that it finds. Equal scores are in the order of the collection. Under
`accelerate launch` each process takes a share of the queries. Reference: 146 ms a query on MS MARCO.
"""

import argparse
import threading
import time
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from nanocolbert import cli
from nanocolbert.cli import InputError, check_launch, positive, run_stage, say, word
from nanocolbert.index.knobs import DEPTHS, QUALITY, Depths, Effort

BATCH_SIZE = 32  # queries at a time


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    switch = argparse.BooleanOptionalAction
    parser.add_argument(
        "--model", help="the ColBERT model that the index was made from, of any layout (default: as the index says)"
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
        "--faiss_depth", type=positive, help=f"embeddings found for each query token (default {DEPTHS.faiss_depth})"
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
from accelerate import PartialState
from torch import Tensor

from model import ColBERT
from nanocolbert.checkpoints.layouts import check_made_by, model_of
from nanocolbert.compute import default_device
from nanocolbert.index.compressed import CompressedIndex
from nanocolbert.index.exact import ExactIndex
from nanocolbert.index.gpu_index import GpuIndex
from nanocolbert.index.ivfpq import IVFPQ
from nanocolbert.index.ranking import Ranking
from nanocolbert.progress import progress
from nanocolbert.storage import runs, shares
from nanocolbert.storage.artifact import check_file, check_output_file, peak_memory_mb, read_meta, verify
from nanocolbert.storage.documents import read_queries
from nanocolbert.storage.tsv import Collection, find_collection
from nanocolbert.text import check_texts

KNOBS = tuple(dict.fromkeys((*Effort._fields, *Depths._fields)))
EFFORT = ("exact", "by_codes", "quality", *KNOBS, "batch_size")  # flags of the search


class Hit(NamedTuple):
    """A passage that was found; `text` where the collection is at hand."""

    pid: str
    score: float
    text: str | None


class Searcher:
    """An open index and its model. Rows are positions in the collection; `index.text(rows)` gives their ids."""

    def __init__(
        self, index_dir, model=None, device=None, collection=None, gpu_index: bool = False, verify: bool = False
    ):
        """Open an index folder.

        model: a folder or a name on the hub, collection: the file with the passages (.tsv or .tsv.gz); by default where
        the index says that they were, looked for when first needed. device: by default the GPU if there is one.
        verify: check the checksums of the index first. Any number of threads may search at once.
        Raises InputError where the folders do not fit together.
        """
        self.meta = read_meta(index_dir, "index", "build_index.py", "embeddings", check=verify)
        self._lock = threading.RLock()
        self.index_dir, self.device = Path(index_dir), torch.device(device or default_device())
        self.index = open_index(self.index_dir, self.meta, self.device, gpu_index)
        if model is not None:
            self.model = self._load(model)
        if collection is not None:
            self.collection = Collection(collection)

    def __repr__(self) -> str:
        kinds = {"codes": f"compressed, {self.meta.get('bits')} bits", "ivfpq": "IVFPQ", None: "embeddings"}
        kind = kinds[self.meta.get("method")]
        return f"Searcher: {self.index.alive().sum():,} passages in {self.index_dir} ({kind}), on {self.device}"

    @cached_property
    def model(self) -> ColBERT:
        """The model that the index was made from."""
        return self._load(model_of(self.index_dir, self.meta))

    def _load(self, folder) -> ColBERT:
        check_made_by(folder, self.index_dir, self.meta)
        model = ColBERT.from_pretrained(folder, device=self.device)
        model.check_tokenizer(self.index_dir, self.meta)
        return model

    @cached_property
    def collection(self) -> Collection | None:
        """The passages' texts, None where they are not at hand."""
        path = find_collection(self.index_dir, self.meta)
        return Collection(path) if path else None

    def search(self, queries: str | list[str], k: int = 10, **effort) -> list[Hit] | list[list[Hit]]:
        """The k best passages for a query, the best first; a list of such lists for a list of queries.

        effort, for this call only: exact=True scores every passage, with by_codes=True by its codes; quality="fast",
        "default" or "best", and nprobe, n_coarse, n_fine, n_exact (compressed index), nprobe, faiss_depth, rerank_depth
        (IVFPQ) are the flags of the same names; among=[pid, ...] searches these passages only (compressed index), with
        skip_unknown=True those of them that are in the index.
        Raises InputError where the collection is not the one that the index was made from, or an id of `among` is not
        in the index.
        """
        if k < 1:
            raise InputError(f"k is {k}: ask for at least one passage")
        rankings = self.rankings([queries] if isinstance(queries, str) else check_texts(queries), k, **effort)
        hits = [self._hits(rows, scores) for rows, scores in rankings]
        return hits[0] if isinstance(queries, str) else hits

    def _hits(self, rows: np.ndarray, scores: np.ndarray) -> list[Hit]:
        """What was found, with its ids, and texts where the collection is at hand."""
        pids = self.index.text(rows)
        with self._lock:  # one that is opened for all
            collection = self.collection
        if collection is None:
            return [Hit(pid, score, None) for pid, score in zip(pids, scores.tolist(), strict=True)]
        hits = []
        for line, pid, score in zip(self.index.origin(rows).tolist(), pids, scores.tolist(), strict=True):
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
        among: Iterable | None = None,
        skip_unknown: bool = False,
        batch_size: int = BATCH_SIZE,
        **knobs: int | None,
    ) -> Iterator[Ranking]:
        """Yield the k best rows and their scores for each query, in batches.

        Scored are the query's own `candidates` if they are given, every passage if `exact`, else what the index finds.
        by_codes: score these two not exactly, but by a compressed index' codes.
        knobs: those that `search` names; None is the default. among, skip_unknown: as `search` says.
        """
        self.check_scoring(exact or candidates is not None, by_codes)
        effort = self.index.effort(quality, k, **{name: value for name, value in knobs.items() if value is not None})
        allowed = None if among is None else self._allowed(among, skip_unknown)
        size = max(1, len(texts)) if exact and self.index.streams else batch_size
        starts = range(0, len(texts), size)
        for start in progress(starts, len(starts) > 1, desc="search", unit=" batches"):
            queries = self.encode(texts[start : start + size])  # (B, Lq, D)
            if candidates is not None:
                yield from self.index.rank(queries, candidates[start : start + size], k, by_codes)
            elif exact:
                rows = None if allowed is None else [np.flatnonzero(allowed)] * len(queries)
                yield from self.index.rank(queries, rows, k, by_codes)
            else:
                yield from self.index.search(queries, k, effort, allowed)

    def check_scoring(self, is_given: bool, by_codes: bool) -> None:
        """Raise InputError unless what is given, candidates or every passage, can be scored in this way."""
        if by_codes and not is_given:
            raise InputError("by_codes says how a compressed index scores --exact and --candidates: leave it out")
        if is_given:
            self.index.check_rank(by_codes)

    def _allowed(self, among: Iterable, skip_unknown: bool) -> np.ndarray:
        """Whether each row may be found (n,) bool, from ids, strings or numbers."""
        if not isinstance(self.index, CompressedIndex):
            raise InputError("among and quality are for a compressed index: build_index.py --method codes")
        pids = [among] if isinstance(among, str) else list(map(str, among))
        rows = self.index.rows(pids)
        if (rows < 0).any() and not skip_unknown:
            raise InputError(
                f"{self.index_dir}: has no passage {pids[int((rows < 0).argmax())]}: leave it out, or say "
                "skip_unknown=True"
            )
        allowed = np.zeros(len(self.index), bool)
        allowed[rows[rows >= 0]] = True
        return allowed

    def encode(self, texts: list[str]) -> Tensor:
        """Query embeddings (B, Lq, D) fp32."""
        with self.index.clock("encode queries"):
            with self._lock:  # one that is opened for all
                model = self.model
            return model.encode_queries(texts, progress=False)


def open_index(folder: Path, meta: dict, device: torch.device, on_gpu: bool) -> CompressedIndex | ExactIndex:
    """The index in a folder, of the kind that its meta.json says. Raises InputError if it cannot be searched."""
    if meta["kind"] == "embeddings":
        if meta.get("bits"):
            raise InputError(f"{folder}: compressed embeddings: run build_index.py, and give what it wrote")
        return ExactIndex(folder, meta, device)
    if meta.get("method") != "codes":
        return IVFPQ(folder, meta, device, on_gpu)
    return GpuIndex(folder, device) if on_gpu else CompressedIndex(folder)


def read_candidates(
    searcher: Searcher, queries: dict[str, str], args, state: PartialState
) -> dict[str, np.ndarray] | None:
    """Rows of each query's candidates, None where none are asked for. Raises InputError if there are none at all."""
    if not args.candidates:
        return None
    candidates = runs.read_candidates(args.candidates, searcher.index, queries)
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
        yield qid, searcher.index.text(rows), scores.tolist()


def main(args):
    check_launch()
    state = PartialState(cpu=args.cpu or not torch.accelerator.is_available())  # else processes do not find each other
    check_file(args.queries, "queries: qid, query")
    if args.candidates:
        check_file(args.candidates, "candidates of the queries")
    if args.model is None:
        meta = read_meta(args.index_dir, "index", "build_index.py", "embeddings")
        args.model = model_of(args.index_dir, meta)
    check_output(args)
    if args.verify and (Path(args.model) / "meta.json").is_file():  # it comes with checksums
        verify(args.model)
    queries = read_queries(args.queries)
    if not queries:
        raise InputError(f"{args.queries}: no queries")
    searcher = Searcher(args.index_dir, args.model, state.device, gpu_index=args.gpu_index, verify=args.verify)
    searcher.check_scoring(args.exact or args.candidates is not None, args.by_codes)
    candidates = read_candidates(searcher, queries, args, state)
    mine = dict(list(queries.items())[state.process_index :: state.num_processes])
    started = time.time()
    found = search_all(searcher, mine, candidates, args)
    shares.write_run(args.output, found, args.format, args.tag, state)
    seconds = time.time() - started
    if not state.is_main_process:
        return None
    for what, spent in sorted(searcher.index.clock.seconds.items(), key=lambda item: -item[1]):
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
    for folder in (args.index_dir, Path(args.model)):
        if (folder / "meta.json").exists() and folder.resolve() in target.parents:
            raise InputError(f"{args.output}: inside {folder}, which is read: give another --output")


if __name__ == "__main__":
    run_stage(main, ARGS)
