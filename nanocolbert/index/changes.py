"""Changes of a compressed index: made, added to, deleted from, compacted.

An index is a list of segments that never change, and state.json, which names them and what is deleted in them: a
change writes new files first, and replaces state.json last. Whoever has the index open goes on with what it opened.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from nanocolbert.cli import InputError, held
from nanocolbert.index.codec import Codec, Codes
from nanocolbert.index.compressed import CompressedIndex
from nanocolbert.index.segments import FIRST, SegmentWriter, read_state
from nanocolbert.storage.artifact import is_at, link, locked, write_json
from nanocolbert.storage.checksums import sum_of
from nanocolbert.storage.cutting import document_of
from nanocolbert.storage.ragged import ranges
from nanocolbert.storage.texts import link_texts, metadata_of, texts_of

COMPACT_PASSAGES = 4096  # passages copied at a time


@contextmanager
def changing(folder):
    """Give the state of an index to be changed; replaces it when the block ends, unless by an exception.

    One process at a time: others wait. What no state names any more, or a killed process has left, is removed.
    Raises InputError if another index has taken the folder's place meanwhile: that is left as it is.
    """
    folder = Path(folder)
    with locked(folder / "lock", folder, os.O_RDWR | os.O_CREAT, wait=True) as lock:
        _check_is_the_same(folder, lock)
        state = read_state(folder)
        _remove_leftovers(folder, state)
        state["version"] += 1
        try:
            yield state
            _check_is_the_same(folder, lock)
            write_json(folder / "state.json", state, summed=True)
        finally:
            with held():
                if is_at(lock, folder / "lock"):
                    _remove_leftovers(folder, read_state(folder))


def _check_is_the_same(folder: Path, lock: int) -> None:
    if not is_at(lock, folder / "lock"):
        raise InputError(f"{folder}: was built anew meanwhile, and is not changed: try again")


def _remove_leftovers(folder: Path, state: dict) -> None:
    """Remove what a state does not name."""
    named = {entry["name"]: entry["alive"] for entry in state["segments"]}
    for segment in (folder / "segments").iterdir():
        if segment.name not in named:
            shutil.rmtree(segment)
            continue
        for path in segment.glob("alive-*.npy"):
            if path.name != named[segment.name]:
                path.unlink()


def create(folder, codec: Codec, blocks: Iterable, vectors=None, texts=None, known: dict | None = None) -> None:
    """Write codec, state and a first segment of compressed blocks (codes, pids) into an empty folder.

    To be linked and kept: vectors, the .npy file of all values; texts, of the artifact in this folder, if there are
    any. known: checksums, as they are known, of vectors.npy and of what the texts consist of.
    """
    folder = Path(folder)
    codec.save(folder)
    writer = SegmentWriter(folder / "segments" / FIRST, codec, keep_vectors=False)
    for codes, pids in blocks:
        writer.append(codes, pids)
    if vectors is not None:
        link(Path(vectors), writer.folder / "vectors.npy")
    if texts is not None:
        link_texts(texts, writer.folder, writer.n)
    state = {"version": 1, "segments": [{"name": FIRST, "alive": None, "files": writer.close(known)}]}
    write_json(folder / "state.json", state, summed=True)


def add(folder, blocks: Iterable, check: Callable = lambda index: None, replace=False, of_documents=False) -> int:
    """Add passages to an index; returns how many.

    replace: they take the place of those of the same ids and, if of_documents, of all of documents cut to passages.
    blocks: (values (T, D), lengths (n,), pids), where the index keeps texts with these and metadata (or None) too.
    check(index): called before the first block is taken. Raises InputError if one of the ids is there already, or comes
    twice; the index is then as it was.
    """
    with changing(folder) as state:
        index, taken, name, replaced = CompressedIndex(folder), set(), str(state["version"]), []
        check(index)
        writer = SegmentWriter(Path(folder) / "segments" / name, index.codec, index.keeps_vectors, index.keeps_texts)
        for values, lengths, pids, *contents in blocks:
            rows = index.rows(pids)
            for pid, row in zip(pids, rows.tolist(), strict=True):
                if pid in taken or (row >= 0 and not replace):
                    raise InputError(
                        f"{folder}: has a passage {pid} already: delete it first, replace it, or leave it out"
                    )
                taken.add(pid)
            replaced.append(rows[rows >= 0])
            if of_documents:
                documents = list({*map(document_of, pids)})
                parts, whose = index.passage_rows(documents)
                if len(parts) and not replace:  # whose first passages were deleted
                    raise InputError(f"{folder}: has passages of {documents[whose[0]]} already: delete it first")
                replaced.append(parts)
            writer.append(index.codec.encode(values, lengths), pids, values, *contents)
        files = writer.close()
        _mark(state, index, np.unique(np.concatenate([np.zeros(0, np.int64), *replaced])))
        if writer.n:
            state["segments"].append({"name": name, "alive": None, "files": files})
    return writer.n


def delete(folder, pids: list[str], places: list[str] | None = None, of_documents: bool = False) -> int:
    """Delete passages from an index; returns how many. Raises InputError if one of the ids is not there.

    places: where each id stands, for messages. of_documents: an id may be that of a document cut to passages.
    """
    with changing(folder) as state:
        index = CompressedIndex(folder)
        rows = index.rows(pids)
        parts, whose = index.passage_rows(pids if of_documents else [])
        missing = np.setdiff1d(np.flatnonzero(rows < 0), whose)
        if len(missing):
            first = int(missing[0])
            raise InputError(f"{f'{places[first]}: ' if places else ''}{folder} has no passage {pids[first]}")
        rows = np.union1d(rows[rows >= 0], parts[rows[whose] < 0])
        _mark(state, index, rows)
    return len(rows)


def _mark(state: dict, index: CompressedIndex, rows: np.ndarray) -> None:
    """Note in a state that rows (n,), in order, are deleted."""
    entries = {segment.folder.name: entry for segment, entry in zip(index.segments, state["segments"], strict=True)}
    for segment, part in index.parts(rows):
        entry = entries[segment.folder.name]
        alive = segment.alive.copy()
        alive[rows[part] - segment.first_row] = False
        entry["alive"] = f"alive-{state['version']}.npy"
        np.save(segment.folder / entry["alive"], alive)
        if "files" in entry:
            others = {name: spans for name, spans in entry["files"].items() if not name.startswith("alive-")}
            entry["files"] = others | {entry["alive"]: [sum_of(segment.folder / entry["alive"])]}


def compact(folder) -> int:
    """Make one segment of all, without what was deleted; returns its passages. Nothing is compressed anew."""
    with changing(folder) as state:
        index, name = CompressedIndex(folder), str(state["version"])
        index.check()
        writer = SegmentWriter(Path(folder) / "segments" / name, index.codec, index.keeps_vectors, index.keeps_texts)
        for segment in index.segments:
            alive = np.flatnonzero(segment.alive)
            for rows in np.array_split(alive, math.ceil(len(alive) / COMPACT_PASSAGES) or 1):
                starts, lengths = segment.offsets[rows].T, (segment.offsets[rows + 1] - segment.offsets[rows]).T
                coarse, fine = (
                    data[ranges(*where)]
                    for data, *where in zip((segment.coarse, segment.fine), starts, lengths, strict=True)
                )
                vectors = segment.vectors.gather(rows)[0] if index.keeps_vectors else None
                contents = texts_of(segment.texts, rows), metadata_of(segment.texts, rows)
                writer.append(Codes(coarse, fine, segment.sizes[rows]), segment.pids.text(rows), vectors, *contents)
        state["segments"] = [{"name": name, "alive": None, "files": writer.close()}]
    return writer.n
