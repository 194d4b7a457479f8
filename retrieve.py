"""Search an index: by compressed codes or IVFPQ (paper, section 3.6); or rerank given candidates; or score everything.

    python retrieve.py --index_dir index --queries queries.dev.tsv --output run.tsv --k 1000
    python retrieve.py ... --quality best               # of a compressed index: fast, default or best
    python retrieve.py ... --candidates top1000.dev     # reranking: exact MaxSim of the candidates of each query
    python retrieve.py ... --exact                      # every passage, streamed: the ground truth for all else
    python retrieve.py --index_dir index/* ...          # a collection in several indexes: the best of all

reads   index/ (build_index.py; embeddings/ will do for the last two), model/ (train.py), queries (qid, query)
writes  a run file, TREC (qid Q0 pid rank score tag) or MS MARCO (qid, pid, rank)

search.py has the search itself, for notebooks too. In a compressed index --nprobe, --n_coarse, --n_fine and
--n_exact override what --quality says of each step. Where it keeps no vectors, --exact and --candidates are refused,
unless they are to score --by_codes. An IVFPQ index scores exactly, on memory-mapped fp16 embeddings, the first
--rerank_depth of the passages that it finds. Equal scores are in the order of the collection. Under
`accelerate launch` each process takes a share of the queries, or of the indexes where there are several, each of which
is searched with the whole effort. Reference: 146 ms a query on MS MARCO.
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

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
    parser.add_argument(
        "--index_dir", type=Path, nargs="+", required=True, help="what build_index.py wrote (or doc2embedding.py)"
    )
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
    parser.add_argument(
        "--by_document", action=switch, default=False, help="for passages doc#1, doc#2, ... doc, by the best of them"
    )
    parser.add_argument("--where", help="only passages whose metadata fulfil it, as SQL has it: year >= 2020")
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
from accelerate.utils import gather_object

from nanocolbert.checkpoints.layouts import model_of
from nanocolbert.compute import is_of_another_process
from nanocolbert.storage import runs, shares
from nanocolbert.storage.artifact import check_file, check_output_file, peak_memory_mb, read_meta, verify
from nanocolbert.storage.cutting import document_of
from nanocolbert.storage.documents import read_queries
from search import Searcher

KNOBS = tuple(dict.fromkeys((*Effort._fields, *Depths._fields)))
EFFORT = ("exact", "by_codes", "quality", "where", "by_document", *KNOBS, "batch_size")  # flags of the search


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


def search_all(searcher: Searcher, queries: dict[str, str], candidates, args, state) -> Iterator[tuple]:
    """Yield (qid, pids, scores) of every query; where processes share indexes, the first one yields all."""
    effort = {name: getattr(args, name) for name in EFFORT}
    rows = candidates and [candidates[qid] for qid in queries]
    rankings = searcher.rankings(list(queries.values()), args.k, rows, **effort)
    if share_indexes(args, state):
        rankings = merged(searcher, rankings, args, state)
        queries = queries if state.is_main_process else ()  # the others take part to the end, and yield nothing
    for qid, (rows, scores) in zip(queries, rankings, strict=True):
        pids = searcher.index.ids(rows)
        yield qid, [document_of(pid) for pid in pids] if args.by_document else pids, scores.tolist()


def share_indexes(args, state: PartialState) -> bool:
    """Whether each process searches some of the indexes for all queries, and not all of them for some."""
    return state.num_processes > 1 and len(args.index_dir) > 1


def merged(searcher: Searcher, rankings: Iterator, args, state: PartialState) -> Iterator:
    """Yield, in the first process, the best of what all processes have found of each query; nothing in the others."""
    while batch := list(itertools.islice(rankings, args.batch_size)):
        try:
            found = gather_object([batch])  # of each process
        except RuntimeError as error:
            if is_of_another_process(error):
                raise InputError("another process of this search has ended: see what it said") from None
            raise
        for parts in zip(*found, strict=True) if state.is_main_process else ():
            yield searcher.index.merge(parts, args.k, args.by_document)


def main(args):
    check_launch()
    state = PartialState(cpu=args.cpu or not torch.accelerator.is_available())  # else processes do not find each other
    check_file(args.queries, "queries: qid, query")
    if args.candidates:
        check_file(args.candidates, "candidates of the queries")
    if args.model is None:
        meta = read_meta(args.index_dir[0], "index", "build_index.py", "embeddings")
        args.model = model_of(args.index_dir[0], meta)
    check_output(args)
    if args.verify and (Path(args.model) / "meta.json").is_file():  # it comes with checksums
        verify(args.model)
    queries = read_queries(args.queries)
    if not queries:
        raise InputError(f"{args.queries}: no queries")
    searcher = Searcher(args.index_dir, args.model, state.device, gpu_index=args.gpu_index, verify=args.verify)
    searcher.check_scoring(args.exact or args.candidates is not None, args.by_codes)
    candidates = read_candidates(searcher, queries, args, state)
    if share_indexes(args, state):
        searcher.index.search_only(state.process_index, state.num_processes)
        mine = queries
    else:
        mine = dict(list(queries.items())[state.process_index :: state.num_processes])
    started = time.time()
    found = search_all(searcher, mine, candidates, args, state)
    shares.write_run(args.output, found, args.format, args.tag, state)
    seconds = time.time() - started
    if not state.is_main_process:
        return None
    for what, spent in sorted(searcher.index.clock.seconds.items(), key=lambda item: -item[1]):
        print(f"{what:>16} {1000 * spent / len(mine):8.2f} ms a query {100 * spent / seconds:5.1f} %")
    print(f"{'in all':>16} {1000 * seconds / len(mine):8.2f} ms a query")
    finds = not args.exact and candidates is None
    knobs = {name: getattr(args, name) for name in KNOBS if getattr(args, name) is not None}
    return {
        "output": str(args.output),
        "queries": len(queries),
        **({"effort": searcher.index.effort(args.quality, args.k, **knobs)._asdict()} if finds else {}),
        "seconds": round(seconds, 2),
        "ms_per_query": round(1000 * seconds / len(queries), 2),
        "peak_memory_mb": peak_memory_mb(),
    }


def check_output(args) -> None:
    """Raise InputError if the run file cannot be written, or is a part of what is read."""
    target = check_output_file(args.output, args.queries, args.candidates, *args.index_dir, args.model)
    for folder in (*args.index_dir, Path(args.model)):
        if (folder / "meta.json").exists() and folder.resolve() in target.parents:
            raise InputError(f"{args.output}: inside {folder}, which is read: give another --output")


if __name__ == "__main__":
    run_stage(main, ARGS)
