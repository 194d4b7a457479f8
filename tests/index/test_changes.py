"""Changes of an index: against a dictionary, beside readers, and killed in the middle."""

import itertools
import multiprocessing
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from made import (
    EVERYTHING,
    block,
    change,
    check_against,
    decoded,
    make_index,
    make_passages,
    make_query,
    put,
    search_one,
)

from nanocolbert.cli import InputError
from nanocolbert.index.changes import add, changing, compact, delete
from nanocolbert.index.codec import Codec
from nanocolbert.index.compressed import CompressedIndex
from nanocolbert.index.knobs import effort_for
from nanocolbert.index.segments import read_state


def test_random_changes_against_a_dictionary(codec, tmp_path):
    rng = random.Random(0)
    first = block(60, 2)
    folder, truth = make_index(tmp_path / "index", codec, first), decoded(codec, *first)
    for step in range(25):
        what = rng.choice(["add", "delete", "delete", "compact"])
        if what == "add":
            new = block(rng.randint(1, 30), 100 + step)
            assert add(folder, [new]) == len(new[2])
            truth |= decoded(codec, *new)
        elif what == "delete":
            pids = rng.sample(sorted(truth), min(len(truth), rng.randint(1, 15)))
            assert delete(folder, pids) == len(pids)
            for pid in pids:
                del truth[pid]
        else:
            assert compact(folder) == len(truth)
        index, query = CompressedIndex(folder), make_query(6, step)
        assert index.alive().sum() == len(truth)
        check_against(index, truth, query)
        among = rng.sample(sorted(truth), min(len(truth), 20))
        allowed = np.zeros(len(index), bool)
        allowed[index.rows(among)] = True
        check_against(index, {pid: truth[pid] for pid in among}, query, allowed)


def test_a_deleted_id_may_come_back_and_others_may_not_twice(codec, tmp_path):
    folder = make_index(tmp_path / "index", codec, block(20, 2))
    with pytest.raises(InputError, match="has a passage 2-3 already"):
        add(folder, [block(1, 3, ["2-3"])])
    with pytest.raises(InputError, match="has a passage new already"):
        add(folder, [block(2, 3, ["new", "new"])])
    with pytest.raises(InputError, match="has no passage nobody"):
        delete(folder, ["2-3", "nobody"])
    assert CompressedIndex(folder).alive().sum() == 20 and len(list((folder / "segments").iterdir())) == 1
    delete(folder, ["2-3"])
    assert CompressedIndex(folder).rows(["2-3", "2-4"]).tolist() == [-1, 4]
    new = block(1, 3, ["2-3"])
    add(folder, [new])
    index = CompressedIndex(folder)
    assert index.rows(["2-3"]).tolist() == [20] and index.ids(np.array([20])) == ["2-3"]


def test_readers_go_on_with_what_they_opened(codec, tmp_path):
    first = block(80, 2)
    folder, query = make_index(tmp_path / "index", codec, first), make_query(6, 1)
    index = CompressedIndex(folder)
    before = search_one(index, query, 10, EVERYTHING)
    delete(folder, index.ids(before[0][:5]))
    add(folder, [block(10, 3)])
    compact(folder)
    after = search_one(index, query, 10, EVERYTHING)
    assert all(np.array_equal(*pair) for pair in zip(before, after, strict=True))
    assert not set(index.ids(before[0][:5])) & set(CompressedIndex(folder).ids(np.arange(85)))


def test_an_index_can_be_emptied(codec, tmp_path):
    folder = make_index(tmp_path / "index", codec, block(5, 2))
    delete(folder, CompressedIndex(folder).ids(np.arange(5)))
    assert len(search_one(CompressedIndex(folder), make_query(4, 1), 3, effort_for("fast", 3))[0]) == 0
    compact(folder)
    add(folder, [block(4, 3)])
    assert len(search_one(CompressedIndex(folder), make_query(4, 1), 3, effort_for("fast", 3))[0]) == 3


def test_a_planted_lock_is_not_followed(codec, tmp_path):
    folder = make_index(tmp_path / "index", codec, block(5, 2))
    (tmp_path / "precious").write_text("precious")
    (folder / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(InputError, match="a symbolic link, which is not followed"):
        compact(folder)
    assert (tmp_path / "precious").read_text() == "precious"


def test_an_index_that_is_built_anew_meanwhile_is_left_as_it_is(codec, tmp_path):
    folder = make_index(tmp_path / "index", codec, block(20, 2))
    another = make_index(tmp_path / "another", codec, block(30, 3))
    (another / "segments/of another process").mkdir()  # which is adding to it
    with pytest.raises(InputError, match="was built anew meanwhile"), changing(folder) as state:
        folder.rename(tmp_path / "retired")
        another.rename(folder)
        state["segments"] = []
    assert len(CompressedIndex(folder)) == 30 and (folder / "segments/of another process").is_dir()
    assert delete(folder, ["3-1"]) == 1 and not (folder / "segments/of another process").exists()


def test_damaged_codes_are_not_compacted(codec, tmp_path):
    folder = make_index(tmp_path / "index", codec, block(20, 2))
    change(folder / "segments/1/coarse.npy", put(slice(None), 255))
    with pytest.raises(InputError, match="damaged codes"):
        compact(folder)
    assert read_state(folder)["version"] == 1 and len(CompressedIndex(folder)) == 20


def change_for_ever(folder: Path, ready) -> None:
    """Add 20 passages, delete 10 of them, compact, and so on."""
    torch.set_num_threads(1)
    Codec.load(folder).encode(*make_passages(5, 0))  # what is compiled is loaded
    ready.set()
    for seed in itertools.count(1000):
        add(folder, [block(20, seed)])
        delete(folder, [f"{seed}-{i}" for i in range(10)])
        compact(folder)


def test_kill_9_leaves_the_old_index_or_the_new_one(codec, tmp_path, monkeypatch):
    """Twenty kills at random moments of an endless series of changes: the state is always one of the series."""
    folder, rng = make_index(tmp_path / "index", codec, block(30, 2)), random.Random(0)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests"))))
    context, versions = multiprocessing.get_context("forkserver"), set()
    context.set_forkserver_preload(["test_changes"])
    for kill in range(20):
        ready = context.Event()
        process = context.Process(target=change_for_ever, args=(folder, ready))
        process.start()
        assert ready.wait(60)
        time.sleep(rng.uniform(0, 0.25))
        process.kill()
        process.join()
        index, counts = CompressedIndex(folder), {}
        for pid in index.ids(np.flatnonzero(index.alive())):
            seed, number = map(int, pid.split("-"))
            counts.setdefault(seed, []).append(number)
        assert sorted(counts.pop(2)) == list(range(30))
        assert all(sorted(numbers) in (list(range(20)), list(range(10, 20))) for numbers in counts.values())
        assert sum(len(numbers) == 20 for numbers in counts.values()) <= 1  # only the last addition is still whole
        assert len(search_one(index, make_query(4, kill), 10, effort_for("fast", 10))[0]) == 10
        versions.add(index.state["version"])
        if counts:
            delete(folder, [f"{seed}-{number}" for seed, numbers in counts.items() for number in numbers])
    assert len(versions) > 10  # it did change meanwhile
