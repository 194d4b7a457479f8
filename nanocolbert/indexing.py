"""From passages to an index, and into one, by a model: what search.py and update_index.py do."""

import argparse
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanocolbert.checkpoints.layouts import model_fingerprint
from nanocolbert.cli import InputError
from nanocolbert.index import changes
from nanocolbert.index.building import CHANGING, build_codes, not_unit
from nanocolbert.index.compressed import CompressedIndex
from nanocolbert.index.knobs import LONGEST
from nanocolbert.storage.artifact import fingerprint, publish, seen_from, write_meta
from nanocolbert.storage.cutting import parts_of
from nanocolbert.storage.documents import Document
from nanocolbert.storage.ragged import IdWriter, RaggedWriter
from nanocolbert.storage.texts import FOLDER as TEXTS
from nanocolbert.storage.texts import TextWriter
from nanocolbert.storage.tsv import batched, check_id
from nanocolbert.text import tokenizer_fingerprint

BLOCK = 4096  # passages embedded at a time


class Passage(NamedTuple):
    """A passage to be found. place: where it comes from, for messages, as in "a.tsv:3"."""

    place: str
    pid: str
    text: str
    metadata: dict | None = None


def passages_of(texts: Iterable[str], ids=None, metadata=None, cut: dict | None = None) -> Iterator[Passage]:
    """Yield passages of texts, their ids, by default 0, 1, 2, ..., and objects of metadata or None.

    cut: texts are documents, to be cut to passages of so many "words" with that "overlap".
    Raises InputError where one has no text, or an id that cannot be used, and where there are more of one than another.
    """
    if isinstance(texts, str):
        raise InputError(f"one text, {texts[:40]!r}, where a list of texts is wanted: put it into a list")
    if isinstance(ids, str) or isinstance(metadata, dict):
        raise InputError("one id, or one object of metadata, where a list of them is wanted: put it into a list")
    given = [column for column in (texts, ids, metadata) if column is not None]
    try:
        for n, (text, *others) in enumerate(zip(*given, strict=True)):
            pid = str(n if ids is None else others.pop(0))
            check_id("ids", n, pid)
            document = Document(n, pid, checked(text, f"text {n}"), others[0] if others else None)
            for part in parts_of("ids", document, **cut) if cut else [document]:
                yield Passage(f"passage {n}", part.id, part.text, part.metadata)
    except ValueError as error:
        if not str(error).startswith("zip()"):
            raise
        raise InputError("not as many ids, or metadata, as texts: give one of each passage") from None


def checked(text, place: str) -> str:
    """A text. Raises InputError unless it is one that can be written."""
    if not isinstance(text, str):
        raise InputError(f"{place} is of type {type(text).__name__}, not a string: drop or convert it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place}: half a character at letter {error.start} ({error.reason}): drop it") from None
    return text


def embed(model, passages: Iterable[Passage], pool_factor: int | None = None) -> Iterator[tuple]:
    """Yield (values (T, D) fp16, lengths (n,), pids, texts, metadata) of passages, block by block.

    pool_factor: None as the model has it.
    Raises InputError where a passage has no embeddings, or more than a code can tell apart.
    """
    for block in batched(passages, BLOCK):
        places, pids, texts, metadata = map(list, zip(*block, strict=True))
        pieces = model.tokenize(texts, "passage")
        check_counts(model, places, pids, pieces, pool_factor)
        values, lengths, _ = model.embed_passages(*pieces, pool_factor=pool_factor)
        yield values, lengths, pids, texts, metadata


def check_counts(model, places: list[str], pids: list[str], pieces, pool_factor: int | None) -> None:
    """Raise InputError where a passage, of these word pieces, has no embeddings, or too many."""
    counts = model.kept_counts(*pieces, pool_factor)
    wrong = np.flatnonzero((counts < 1) | (counts >= LONGEST))
    if len(wrong):
        at = int(wrong[0])
        found = f"{counts[at]} embeddings, at most {LONGEST - 1} can be compressed: shorten it"
        if not counts[at]:
            found = "no embeddings, so that it cannot be found: leave it out"
        raise InputError(f"{places[at]}: passage {pids[at]} has {found}")


def add(folder, model, meta: dict, read: Callable, look: bool = True, replace: bool = False) -> int:
    """Embed passages and add them to an index, of this meta.json; returns how many. replace: see changes.add.

    They are pooled as those of the index. read(): yields the passages; called twice, to look first, if `look`. Raises
    InputError where an id comes twice or, unless they are replaced, is there already, and as `embed`; the index is then
    as it was.
    """

    def check(index: CompressedIndex) -> None:
        seen = {}
        for block in batched(read(), BLOCK):
            for place, pid, *_ in block:
                if seen.setdefault(pid, place) is not place:
                    raise InputError(f"{place}: id {pid!r} a second time (first in {seen[pid]}): leave one out")
            there = index.rows([passage.pid for passage in block]) >= 0
            if there.any() and not replace:
                place, pid, *_ = block[int(there.argmax())]
                raise InputError(
                    f"{place}: {folder} has a passage {pid} already: delete it first, replace it, or leave it out"
                )
            if model.config.doc_maxlen >= LONGEST:
                places, pids, texts, _ = map(list, zip(*block, strict=True))
                check_counts(model, places, pids, model.tokenize(texts, "passage"), pool_factor)

    pool_factor, look = meta.get("pool_factor", 1), check if look else (lambda index: None)
    return changes.add(folder, embed(model, read(), pool_factor), look, replace, of_documents="documents" in meta)


def build(folder, model, name: str | None, passages, documents: dict | None, pool_factor=None, **settings) -> None:
    """Build a compressed index of passages into `folder`, which appears when it is whole.

    name: where the model lies, or on the hub; None: it is saved within the index. documents: how documents were cut,
    if they were, for meta.json. pool_factor: None as the model has it. settings: bits, nlist, seed, keep_vectors of
    build_codes. Memory holds a block of passages, their ids, and the sample that the codec is trained on. Raises
    InputError.
    """
    started = time.time()
    pooling = model.config.pooling(pool_factor)
    if not pooling.unit:
        raise InputError(not_unit(name or "the model", "by its settings"))
    with publish(folder) as partial:
        source = partial / "embeddings"
        facts = write_embeddings(source, model, passages, pool_factor)
        facts |= build_codes(partial, source, **settings)
        shutil.rmtree(source)
        if name is None:
            model.save_pretrained(partial / "model")
        facts |= {
            "method": "codes",
            "pool_factor": pooling.factor,
            "model": name or "model",
            "model_fingerprint": model_fingerprint(name or partial / "model"),
            "tokenizer_fingerprint": tokenizer_fingerprint(model.tokenizer),
            **({"documents": documents} if documents else {}),
        }
        if name is None or Path(name).exists():
            facts["model_path"] = seen_from(folder, name) if name else "model"
        source = fingerprint(facts["model_fingerprint"], *(partial.rglob("*.npy")))
        write_meta(partial, "index", source, started, argparse.Namespace(**settings), also=CHANGING, **facts)


def write_embeddings(folder, model, passages: Iterable[Passage], pool_factor: int | None) -> dict:
    """Embed passages into a folder as doc2embedding.py has it; returns facts of them. InputError if none come."""
    values, ids = RaggedWriter(folder, np.float16, (model.config.dim,)), IdWriter(folder / "pids.npy")
    kept, taken = TextWriter(folder / TEXTS), {}
    for vectors, lengths, pids, texts, metadata in embed(model, passages, pool_factor):
        for pid in pids:
            if pid in taken:
                raise InputError(f"passage {len(taken)}: id {pid!r} a second time (first {taken[pid]}): leave one out")
            taken[pid] = len(taken)
        values.append(vectors, lengths)
        ids.append(pids)
        kept.append(texts, metadata)
    for writer in (values, ids, kept):
        writer.close()
    if not len(values):
        raise InputError("no passages: give one at least")
    return {"passages": len(values), "embeddings": values.values.n_rows, "dim": model.config.dim}
