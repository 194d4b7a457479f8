"""Turn a collection, queries and training triples into memory-mapped word pieces.

    python tsv2mmap.py --collection data/msmarco/collection.tsv --queries data/msmarco/queries.train.tsv \
        --triples data/msmarco/triples.train.small.tsv --tokenizer bert-base-uncased --output_dir tokens

reads   a collection (pid, passage) and queries (qid, query): .tsv, .csv or .jsonl, each also .gz, or .parquet; fields
        by their usual names, or the collection's named by flags; a title is put before the text. A training file,
        maybe .gz: three texts a line, or ids in one of the formats of nanocolbert/storage/training_files.py
writes  tokens/passages, tokens/queries (ragged word pieces without special tokens, uint16 or uint32),
        tokens/pids.npy, tokens/qids.npy, tokens/triples.npy (int32 rows of a query and its passages, in file order),
        tokens/scores.npy (fp32, of these passages, where the file has scores), tokens/texts (the passages' texts, which
        embeddings and indexes link)

Each distinct text is tokenised and stored once. Triples of text are matched to the collection and the queries by a
64-bit hash of the text (two of 9 million texts share one with probability 2e-6); texts found in neither are stored
after them, without an id: they are trained on, and not embedded for search. Memory does not grow with the
collection but for 8 bytes an id, and 12 bytes a distinct text where triples are texts.
"""

import argparse
import collections
import contextlib
import itertools
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path

from nanocolbert.cli import InputError, catch_signals, cores, count, held, maxlen, positive, run_stage, say, shard

if __name__ == "__main__":  # before the imports that take a second
    catch_signals()

import numpy as np

from nanocolbert.progress import progress
from nanocolbert.storage.artifact import check_file, check_output_dir, fingerprint, publish, write_meta
from nanocolbert.storage.cutting import WHOLE, read_passages
from nanocolbert.storage.documents import USUAL, Fields
from nanocolbert.storage.ragged import Ids, IdWriter, NpyWriter, RaggedWriter
from nanocolbert.storage.text_rows import TextRows, hash_texts
from nanocolbert.storage.texts import FOLDER as TEXTS
from nanocolbert.storage.texts import TextWriter
from nanocolbert.storage.training_files import (
    FORMATS,
    OF_MANY,
    Written,
    guess_format,
    read_training,
    write_training,
)
from nanocolbert.storage.tsv import batched, read_rows
from nanocolbert.text import FRAME, own_backend, prepare_texts, tokenize, tokenizer_fingerprint

CHUNK = 2000  # texts handed to a worker at a time
TRIPLE_HEADERS = ("query", "anchor", "question", "positive", "negative", "pos", "neg")


class TokenWriter:
    """Tokenises texts on all workers and writes them, in order, as one ragged array."""

    def __init__(self, folder, pool: Executor, n_ahead: int, dtype, kind: str, most: int):
        """most: word pieces of a text; n_full counts those that have as many, so may have been cut."""
        self.writer, self.pool, self.kind, self.pending = RaggedWriter(folder, dtype), pool, kind, collections.deque()
        self.most = most
        self.n_texts, self.n_ahead, self.n_full = 0, n_ahead, 0

    def append(self, texts: list[str]) -> None:
        self.n_texts += len(texts)
        # This may start workers. They never hear Ctrl-C: the parent ends them. And what another thread hears does not
        # interrupt it: the pool would not know of a worker that is half started.
        with unheard(signal.SIGINT), held():
            self.pending.append(self.pool.submit(tokenize_chunk, texts, self.kind))
        if len(self.pending) > self.n_ahead:  # bounds what is read ahead
            self._write_one()

    def _write_one(self) -> None:
        values, lengths = self.pending.popleft().result()
        self.n_full += int((lengths == self.most).sum())
        self.writer.append(values, lengths)

    def close(self) -> None:
        while self.pending:
            self._write_one()
        self.writer.close()


@contextlib.contextmanager
def unheard(number: int):
    """Have a signal wait until the block ends; processes started in it never hear it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def start_workers(n: int, *settings):
    """A pool of n processes. Raises InputError as soon as one of them is gone, and InputError's own."""
    context = multiprocessing.get_context("spawn")  # a fork would copy the parent's threads and memory
    pool = ProcessPoolExecutor(n, context, start_worker, settings)
    try:
        yield pool
    except BrokenProcessPool:
        if pool._call_queue is not None:  # else Python 3.11 may wait for ever for the worker to read on (gh-94777)
            pool._call_queue._reader.close()
        pool.shutdown()
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        raise InputError(
            f"a tokenising worker was killed, as by a system that runs out of memory: each of the {n} takes "
            f"{peak / 1e6:.0f} MB: give fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker(tokenizer: str, maxlen: dict[str, int], texts: dict, dtype: str) -> None:
    """Load the tokenizer (JSON) once in each worker; the workers are the parallelism, so each keeps to one thread."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenize_chunk.tokenizer, tokenize_chunk.maxlen, tokenize_chunk.dtype = own_backend(tokenizer), maxlen, dtype
    tokenize_chunk.texts = texts


def tokenize_chunk(texts: list[str], kind: str) -> tuple[np.ndarray, np.ndarray]:
    texts = prepare_texts(texts, kind, tokenize_chunk.texts)
    values, lengths = tokenize(tokenize_chunk.tokenizer, texts, tokenize_chunk.maxlen[kind])
    return values.astype(tokenize_chunk.dtype), lengths


def below_a_bar(path, read: Callable, limit: int | None = None) -> Iterator:
    """The rows that read(tell) yields, at most `limit`, below a bar that shows how much of the file has been read.

    Bytes take the same time each, which texts do not. Where they cannot be counted, or rows are limited, it shows rows.
    """
    name = Path(path).name
    if limit or not os.path.isfile(path):
        rows = itertools.islice(read(None), limit)
        yield from progress(rows, total=limit, desc=name, unit=" rows", unit_scale=True)
        return
    with progress(total=os.path.getsize(path), desc=name, unit="B", unit_scale=True) as bar:
        yield from read(lambda n: bar.update(n - bar.n))


def convert_texts(path, what: str, how: tuple, writer: TokenWriter, ids: IdWriter, text_rows, kept) -> None:
    """Write a file, read as `how` says, as word pieces and ids, and what is kept of it, unless that is None.

    text_rows: TextRows to be filled, or None. Raises InputError, also on a repeated id.
    """
    for chunk in batched(below_a_bar(path, lambda tell: read_passages(path, what, *how, tell)), CHUNK):
        texts = [document.text for document in chunk]
        if text_rows is not None:
            hashes = hash_texts(texts)
            text_rows.find(hashes)  # keeps the recent ones few
            text_rows.add(hashes, writer.n_texts)
        ids.append([document.id for document in chunk])
        if kept is not None:
            kept.append(texts, [document.metadata for document in chunk])
        writer.append(texts)
    ids.close()
    if kept is not None:
        kept.close()
    if not writer.n_texts:
        shard = how[-1]
        raise InputError(f"{path}: {'empty' if shard[0] == 1 else f'no line for shard {shard[0]}'}, expected {what}")
    repeated = Ids(ids.path).duplicate()
    if repeated:
        identifier, *rows = repeated
        lines = [row + 1 for row in rows]
        if os.path.isfile(path):  # it can be read again: rows are not lines below a header, or where texts have several
            upto = enumerate(itertools.islice(read_passages(path, what, *how), rows[1] + 1))
            lines = [document.number for row, document in upto if row in rows]
        raise InputError(
            f"{path}:{lines[1]}: id {identifier!r} a second time (first on line {lines[0]}): ids must be unique"
        )


def convert_triples(args, folder: Path, format: str, tables, writers) -> Written:
    """Write the training file's rows, and, where it has texts, those not stored before."""
    if format == "text":
        return convert_text_triples(args.triples, folder, args.max_triples, tables, writers)
    rows = below_a_bar(
        args.triples, lambda tell: read_training(args.triples, format, args.nway, tell), args.max_triples
    )
    return write_training(args.triples, rows, folder, format)


def convert_text_triples(path, folder: Path, limit: int | None, tables, writers) -> Written:
    """Write triples of texts as rows, and the texts not stored before. Raises InputError where there are none."""
    columns = "query, positive passage, negative passage"
    writer = NpyWriter(folder / "triples.npy", np.int32, (3,))
    for chunk in batched(below_a_bar(path, lambda tell: read_rows(path, columns, "triples", tell), limit), CHUNK):
        if chunk[0][0] == 1 and all(field.lower() in TRIPLE_HEADERS for field in chunk[0][1]):
            raise InputError(f"{path}:1: a header line (it begins with {chunk[0][1][0]!r}): remove it")
        queries, positives, negatives = zip(*(fields for _, fields in chunk), strict=True)
        rows = np.empty((len(chunk), 3), np.int32)
        rows[:, 0] = rows_of(queries, tables["query"], writers["query"])
        rows[:, 1:] = rows_of([*positives, *negatives], tables["passage"], writers["passage"]).reshape(2, -1).T
        writer.append(rows)
    writer.close()
    if not writer.n_rows:
        raise InputError(f"{path}: empty, expected triples")
    return Written(writer.n_rows, 2, False)


def rows_of(texts, table: TextRows, writer: TokenWriter) -> np.ndarray:
    """Row of each text (n,), storing those seen for the first time."""
    hashes = hash_texts(texts)
    rows = table.find(hashes)
    if (rows < 0).any():
        new, first = np.unique(hashes[rows < 0], return_index=True)
        order = np.argsort(first)
        table.add(new[order], writer.n_texts)
        at = np.flatnonzero(rows < 0)[first[order]]
        writer.append([texts[i] for i in at])
        rows = table.find(hashes)
    return rows


def check_inputs(args) -> None:
    """Raise InputError where files are missing, or the output is not to be written."""
    inputs = [path for path in (args.collection, args.queries, args.triples) if path]
    for path in inputs:
        check_file(path, "input of tsv2mmap.py")
    if not inputs or (args.triples is None and args.collection is None):
        raise InputError("nothing to do: give --collection, or --triples, or both")
    fields, words, overlap, shard = how_to_read(args)
    if args.collection is None and (words or fields != USUAL):
        raise InputError("--passage_words, --id_field, --title_field and --text_field are of a --collection: give it")
    if shard != WHOLE and (args.collection is None or args.queries or args.triples):
        raise InputError("--shard is of a --collection that is to be searched: give it alone, without --triples")
    if args.nway and not args.triples:
        raise InputError("--nway is of --triples: give them")
    if overlap >= (words or 1):
        raise InputError(f"--overlap {overlap}: give --passage_words above it")
    check_output_dir(args.output_dir, "tokens", *inputs, args.tokenizer)


def how_to_read(args) -> tuple[Fields, int | None, int, tuple[int, int]]:
    """What the collection's fields are called, words and overlap of the passages that it is cut to, and its shard."""
    return Fields(args.id_field, args.title_field, args.text_field), args.passage_words, args.overlap, args.shard


def format_of_triples(args) -> str | None:
    """One of FORMATS, as given or guessed; None without triples. Raises InputError where ids have nothing to name."""
    if not args.triples:
        return None
    found = args.triples_format
    if found == "auto":
        found = guess_format(args.triples, args.queries, args.collection, args.max_triples)
    if found != "text" and not (args.collection and args.queries):
        what, other = {"id": ("triples of ids", ", or --triples_format text"), "qrels": ("qrels", "")}.get(
            found, ("rows of ids", "")
        )
        raise InputError(f"{args.triples}: {what} need --collection and --queries{other}")
    if args.nway and found not in OF_MANY:
        raise InputError(f"--nway: {args.triples} is read as {found}, whose rows are all alike: leave it out")
    return found


def convert(args, folder: Path, triples_format: str | None, writers: dict[str, TokenWriter]) -> dict:
    """Write all that was given, through the writers, which are closed; returns what meta.json says of it.

    "counts": how many there are of each; of triples, "triples_format", "passages_per_query" and whether "scored".
    """
    counts, of_triples = {}, {}
    tables = {kind: TextRows() if triples_format == "text" else None for kind in writers}
    for kind, name, path, what, how in (
        ("query", "qids", args.queries, "queries: qid, query", (USUAL, None, 0, WHOLE)),
        ("passage", "pids", args.collection, "collection: pid, passage", how_to_read(args)),
    ):
        ids = IdWriter(folder / f"{name}.npy")
        if path:
            kept = TextWriter(folder / TEXTS) if kind == "passage" and args.keep_texts else None
            convert_texts(path, what, how, writers[kind], ids, tables[kind], kept)
        else:
            ids.close()
        counts[name] = writers[kind].n_texts
    if triples_format:
        counts["triples"], n_passages, scored = convert_triples(args, folder, triples_format, tables, writers)
        of_triples = {"triples_format": triples_format, "passages_per_query": n_passages, "scored": scored}
    for kind, name in (("passage", "passages"), ("query", "queries")):
        writers[kind].close()
        counts[name] = len(writers[kind].writer)
    return {"counts": counts, **of_triples}


def main(args):
    started = time.time()
    check_inputs(args)
    from nanocolbert.checkpoints.layouts import read_tokenizer  # here: the workers, which import this, need no torch

    tokenizer, texts, longest = read_tokenizer(args.tokenizer)  # a ColBERT checkpoint may put prompts before its texts
    dtype = "uint16" if len(tokenizer) <= 1 << 16 else "uint32"
    maxlen = {"query": args.query_maxlen or longest["query"], "passage": args.doc_maxlen or longest["passage"]}
    triples_format = format_of_triples(args)
    with (
        publish(args.output_dir) as folder,
        start_workers(args.workers, tokenizer.backend_tokenizer.to_str(), maxlen, texts, dtype) as pool,
    ):
        writers = {
            kind: TokenWriter(folder / name, pool, 2 * args.workers + 2, dtype, kind, maxlen[kind] - FRAME)
            for kind, name in (("passage", "passages"), ("query", "queries"))
        }
        converted = convert(args, folder, triples_format, writers)
        counts = converted["counts"]
        arrays = sorted(path for path in folder.rglob("*.*") if path.suffix in (".npy", ".sqlite"))
        facts = {
            "tokenizer": args.tokenizer,
            "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
            "query_maxlen": maxlen["query"],
            "doc_maxlen": maxlen["passage"],
            "texts": texts,
            "dtype": dtype,
            **converted,
            "passage_tokens": int(writers["passage"].writer.values.n_rows),
            **({"documents": {"words": args.passage_words, "overlap": args.overlap}} if args.passage_words else {}),
            "bytes": sum(path.stat().st_size for path in arrays),
        }
        meta = write_meta(
            folder, "tokens", fingerprint(facts["tokenizer_fingerprint"], *arrays), started, args, **facts
        )
    if n_full := writers["passage"].n_full:
        say(
            f"note: {n_full} of {counts['passages']} passages fill the {maxlen['passage']} tokens that are taken; what "
            "may follow in them is not searched: cut long ones by --passage_words"
        )
    return {"output_dir": str(args.output_dir), "seconds": meta["seconds"], "bytes": meta["bytes"], **counts}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    files = ".tsv, .csv, .jsonl, each also .gz, or .parquet"
    parser.add_argument("--collection", type=Path, help=f"ids and texts, maybe titles and more: {files}")
    parser.add_argument("--queries", type=Path, help=f"ids and texts of the training queries: {files}")
    parser.add_argument("--triples", type=Path, help="training file: queries, and the passages of each; maybe .gz")
    parser.add_argument(
        "--triples_format",
        choices=("auto", *FORMATS),
        default="auto",
        help="text: query, positive, negative; id: qid, positive, negatives; nway: JSON, [qid, [pid, score], ...]; "
        "scored: two scores, qid, positive, negative; qrels (default: auto, by the first lines)",
    )
    parser.add_argument("--nway", type=positive, help="the first N passages of each row (default: all, of all as many)")
    # of the collection
    parser.add_argument("--id_field", help="field of the ids (default: id, _id, docno or another usual name)")
    parser.add_argument("--title_field", help="field of the titles, which are put before the texts (default: title)")
    parser.add_argument("--text_field", help="field of the texts (default: text, contents or another usual name)")
    parser.add_argument(
        "--passage_words", type=positive, help="cut documents to passages of N words, at sentence ends: ids doc#1, ..."
    )
    parser.add_argument("--overlap", type=count, default=0, help="words that passages begin before the last one's end")
    parser.add_argument(
        "--shard",
        type=shard,
        default=WHOLE,
        metavar="i/n",
        help="every n-th document from the i-th on: an index of each of n parts, searched together",
    )
    # of the triples
    parser.add_argument("--max_triples", type=positive, help="read only the first N triples (default: all)")
    parser.add_argument("--tokenizer", required=True, help="model whose tokenizer to use: folder, hub name, .dnn file")
    parser.add_argument(
        "--query_maxlen",
        type=maxlen,
        help="tokens of a query with [CLS] [Q] [SEP] (default: as a ColBERT model reads, 32)",
    )
    parser.add_argument("--doc_maxlen", type=maxlen, help="tokens of a passage, likewise (default: likewise, 180)")
    parser.add_argument(
        "--keep_texts",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the passages' texts too, which an index then gives back",
    )
    parser.add_argument("--workers", type=positive, default=cores(), help="processes (default: all cores)")
    parser.add_argument("--output_dir", type=Path, required=True, help="the tokens folder to write")
    return parser.parse_args()


if __name__ == "__main__":
    run_stage(main, parse_args())
