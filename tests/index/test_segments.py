"""Segments: arrays that do not fit are refused before any loop follows them; older indexes open."""

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from made import EVERYTHING, block, change, make_index, make_query, put, search_one

from nanocolbert.cli import InputError
from nanocolbert.index import compressed
from nanocolbert.index.changes import add, compact, delete
from nanocolbert.index.compressed import CompressedIndex
from nanocolbert.index.segments import read_state
from nanocolbert.storage.artifact import read_meta, verify, write_meta
from nanocolbert.storage.checksums import check_sums

SEGMENT = "segments/2/"


@pytest.fixture(scope="module")
def kept_dir(tmp_path_factory, codec) -> Path:
    """An index with vectors and deleted passages."""
    folder = make_index(tmp_path_factory.mktemp("kept") / "index", codec, block(200, 2), vectors=True)
    compact(folder)
    delete(folder, ["2-3"])
    return folder


def verify_segments(folder: Path) -> None:
    """What --verify does, of an index without a meta.json, and of its codec by opening it."""
    for entry in read_state(folder)["segments"]:
        check_sums(folder / "segments" / entry["name"], entry["files"])
    CompressedIndex(folder)


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        (SEGMENT + "offsets.npy", put((7, 0), 1 << 40)),
        (SEGMENT + "offsets.npy", put((7, 1), -5)),
        (SEGMENT + "offsets.npy", lambda offsets: offsets[:-1]),
        (SEGMENT + "offsets.npy", lambda offsets: offsets + 1),
        (SEGMENT + "offsets.npy", lambda offsets: offsets.astype(np.uint64)),
        (SEGMENT + "sizes.npy", put((7, 0), 40_000)),
        (SEGMENT + "sizes.npy", put(7, 0)),
        (SEGMENT + "sizes.npy", lambda sizes: sizes[::-1].copy()),
        (SEGMENT + "coarse.npy", lambda codes: codes[:-1]),
        (SEGMENT + "fine.npy", lambda codes: np.append(codes, codes[:1])),
        (SEGMENT + "starts.npy", put((0, 3), 1 << 40)),
        (SEGMENT + "starts.npy", put((0, 3), -1)),
        (SEGMENT + "starts.npy", lambda starts: starts[:, :-1]),
        (SEGMENT + "starts.npy", lambda starts: np.concatenate([starts, starts])),
        (SEGMENT + "lists.npy", lambda lists: lists[:-1]),
        (SEGMENT + "alive-3.npy", lambda alive: alive[:-1]),
        (SEGMENT + "alive-3.npy", lambda alive: alive.astype(np.int8)),
        (SEGMENT + "vectors.npy", lambda vectors: vectors[:-1]),
        (SEGMENT + "vectors.npy", lambda vectors: vectors.astype(">f2")),
        (SEGMENT + "pids.npy", lambda pids: pids[:0]),
        ("centroids.npy", put((3, 3), np.nan)),
        ("centroids.npy", lambda centroids: centroids[:-1]),
        ("centroids.npy", lambda centroids: centroids[:, :-1]),
        ("groups.npy", lambda groups: groups[:-1]),
        ("groups.npy", lambda groups: np.append(groups, groups[-1])),
        ("groups.npy", lambda groups: groups - 1),
        ("rotation.npy", lambda rotation: rotation[:, :-1]),
        ("norms.npy", lambda norms: norms[:2]),
        ("representative_columns.npy", put(0, 1)),
        ("follower_fine.npy", lambda words: words[:-1]),
        ("representative_coarse.npy", lambda words: words[:, :, :-1]),
    ],
)
def test_arrays_that_do_not_fit_are_refused(kept_dir, tmp_path, name, edit):
    """Each by itself, as a flipped bit or another index's file would have it: the loops trust addresses."""
    folder = shutil.copytree(kept_dir, tmp_path / "index")
    change(folder / name, edit)
    with pytest.raises(InputError):
        verify_segments(folder)
    state = json.loads((folder / "state.json").read_text())
    del state["checksum"], state["segments"][0]["files"]
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError) as error:  # by what is in them
        search_one(CompressedIndex(folder), make_query(4, 1), 3, EVERYTHING)
    assert str(folder) in str(error.value)


def test_what_is_listed_is_there(kept_dir, tmp_path):
    for name in ("vectors.npy", "alive-3.npy", "lists.npy"):
        folder = shutil.copytree(kept_dir, tmp_path / name)
        (folder / SEGMENT / name).unlink()
        with pytest.raises(InputError, match=f"{name}: missing"):
            CompressedIndex(folder)
    (folder / "state.json").write_text((folder / "state.json").read_text().replace('"version": 3', '"version": 4'))
    with pytest.raises(InputError, match=r"state\.json: damaged"):
        CompressedIndex(folder)
    (folder / "state.json").write_text('{"version": 3}')
    with pytest.raises(InputError, match=r"state\.json: not the state of an index"):
        CompressedIndex(folder)


def make_old(folder: Path) -> None:
    """As indexes were before state.json listed files."""
    state = json.loads((folder / "state.json").read_text())
    del state["checksum"]
    for entry in state["segments"]:
        del entry["files"]
    (folder / "state.json").write_text(json.dumps(state))


def test_an_old_index_opens_and_changes(kept_dir, tmp_path):
    folder = shutil.copytree(kept_dir, tmp_path / "index")
    make_old(folder)
    index, query = CompressedIndex(folder), make_query(6, 1)
    assert index.keeps_vectors and not index.keeps_texts
    before = search_one(index, query, 10, EVERYTHING)
    assert np.array_equal(search_one(CompressedIndex(kept_dir), query, 10, EVERYTHING)[0], before[0])
    delete(folder, ["2-5"])
    add(folder, [block(3, 3)])
    assert ["files" in entry for entry in read_state(folder)["segments"]] == [False, True]
    (folder / SEGMENT / "vectors.npy").unlink()
    with pytest.raises(InputError, match=r"vectors\.npy: missing"):  # one segment has them, one does not
        CompressedIndex(folder)


@pytest.mark.parametrize("is_old", [False, True])
def test_vectors_that_vanish_while_an_index_is_opened(kept_dir, tmp_path, monkeypatch, is_old):
    """A compaction beside a reader: it never finds an index that keeps none."""
    folder, calls = shutil.copytree(kept_dir, tmp_path / "index"), []
    if is_old:
        make_old(folder)

    def read_then_compact(where) -> dict:
        state = read_state(where)
        calls.append(state["version"])
        if len(calls) == 1:
            with monkeypatch.context() as patch:  # half of the old segment is removed
                patch.setattr(compressed, "read_state", read_state)
                patch.setattr(
                    "nanocolbert.index.changes.shutil.rmtree", lambda path: (Path(path) / "vectors.npy").unlink()
                )
                compact(where)
        return state

    monkeypatch.setattr(compressed, "read_state", read_then_compact)
    index = CompressedIndex(folder)
    assert calls[0] == 3 and index.state["version"] == 4 and index.keeps_vectors


def test_checksums_of_segments(kept_dir, tmp_path):
    folder = shutil.copytree(kept_dir, tmp_path / "index")
    write_meta(folder, "index", "x", time.time(), argparse.Namespace(), also=("segments", "state.json", "lock"))
    assert verify(folder) > 0 and not any("/" in name for name in read_meta(folder, "index", "build_index.py")["files"])
    change(folder / SEGMENT / "fine.npy", put(9, 7))
    CompressedIndex(folder)
    with pytest.raises(InputError, match=r"fine\.npy: damaged"):
        verify(folder)
