"""The compressed index: steps against plain ones, changes against a dictionary, and kills in the middle of changes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, call_stage, succeed
from test_codec import NLIST, decode_all, make_passages, make_query

import kernels
import search
from artifact import InputError
from codec import Codec
from model import maxsim_packed
from search import QUALITY, CompressedIndex, Effort, add, compact, create, delete

EVERYTHING = Effort(NLIST, 10**6, 10**6, 10**6)


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.train(*make_passages(300, 1), 4, NLIST, seed=0)


def block(n: int, seed: int, pids=None) -> tuple[np.ndarray, np.ndarray, list[str]]:
    return *make_passages(n, seed), pids or [f"{seed}-{i}" for i in range(n)]


def make_index(folder: Path, codec: Codec, *blocks, vectors: bool = False) -> Path:
    folder.mkdir()
    kept = None
    if vectors:
        kept = folder / "values.npy"
        np.save(kept, np.concatenate([values for values, _, _ in blocks]))
    create(folder, codec, blocks, vectors=kept)
    return folder


def brute_force(passages: dict[str, np.ndarray], query: torch.Tensor) -> dict[str, float]:
    return {pid: float((query.numpy() @ vectors.T).max(1).sum()) for pid, vectors in passages.items()}


def decoded(codec: Codec, values, lengths, pids) -> dict[str, np.ndarray]:
    return dict(zip(pids, decode_all(codec, *codec.encode(values, lengths)), strict=True))


def check_against(index: CompressedIndex, passages: dict[str, np.ndarray], query, allowed=None, tolerance=0.05) -> None:
    """What a search with all effort finds is what scoring everything finds, but for rounding."""
    rows, scores = index.search(query, 10, EVERYTHING, allowed)
    slow = brute_force(passages, query)
    best = sorted(slow.values(), reverse=True)[:10]
    assert len(rows) == len(best) and np.allclose(scores, best, atol=tolerance)
    assert np.allclose([slow[pid] for pid in index.text(rows)], scores, atol=tolerance)


@pytest.mark.parametrize("n_tokens", [3, 32, 70])
def test_finds_what_brute_force_finds(codec, tmp_path, monkeypatch, n_tokens):
    monkeypatch.setattr(search, "BLOCK", 64)  # several blocks of lists
    passages = block(300, 2)
    index = CompressedIndex(make_index(tmp_path / "index", codec, passages))
    assert len(index.segments[0].starts) == 5
    query = make_query(n_tokens, 3)
    check_against(index, decoded(codec, *passages), torch.cat([query, torch.zeros(2, query.shape[1])]))


def test_kept_vectors_make_the_last_step_exact(codec, tmp_path):
    values, lengths, pids = block(200, 2)
    folder = make_index(tmp_path / "index", codec, (values, lengths, pids), vectors=True)
    query, index = make_query(8, 3), CompressedIndex(folder)
    rows, scores = index.search(query, 10, Effort(4, 100, 50, 30))
    exact = maxsim_packed(query[None], torch.from_numpy(values).float(), torch.from_numpy(lengths))[0]
    assert np.allclose(scores, exact[torch.from_numpy(rows)], atol=1e-5)
    rows, scores = index.search(query, 10, EVERYTHING)
    assert np.allclose(scores, exact.topk(10).values, atol=1e-5)


def test_probe_counts_the_best_list_of_each_query_token():
    rng = np.random.default_rng(0)
    members = [np.sort(rng.choice(50, rng.integers(0, 20), replace=False)).astype(np.uint16) for _ in range(10)]
    starts = np.append(0, np.cumsum([len(part) for part in members]))
    probes = np.stack([rng.permutation(10)[:4] for _ in range(5)])
    gains = -np.sort(-rng.integers(1, 100, (5, 4)), axis=1).astype(np.int32)
    seen, totals = np.zeros(50, np.uint8), np.zeros(50, np.int32)
    arrays = (np.concatenate(members), starts, probes, gains, seen, totals, np.empty(50, np.int64))
    slow = {}
    for lists, row in zip(probes, gains, strict=True):
        best = {}
        for number, gain in zip(lists, row, strict=True):
            for passage in members[number].tolist():
                best[passage] = max(best.get(passage, 0), int(gain))
        for passage, gain in best.items():
            slow[passage] = slow.get(passage, 0) + gain
    for _ in range(2):  # the room is left as it was found
        passages, promises = kernels.probe(*arrays)
        assert dict(zip(passages.tolist(), promises.tolist(), strict=True)) == slow


def test_more_effort_is_not_worse(codec, tmp_path):
    passages = block(2000, 2)
    index, truth = CompressedIndex(make_index(tmp_path / "index", codec, passages)), decoded(codec, *passages)
    found = {}
    for name, effort in {"little": Effort(1, 40, 20, 1), **QUALITY}.items():
        overlap = 0
        for seed in range(20):
            query = make_query(8, seed)
            slow = brute_force(truth, query)
            best = sorted(slow, key=slow.get, reverse=True)[:10]
            overlap += len(set(best) & set(index.text(index.search(query, 10, effort)[0])))
        found[name] = overlap / 200
    assert found["little"] < found["best"] and found["fast"] <= found["default"] + 0.02
    assert found["best"] > 0.95  # it scores every passage by its codes


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
    assert index.rows(["2-3"]).tolist() == [20] and index.text(np.array([20])) == ["2-3"]


def test_readers_go_on_with_what_they_opened(codec, tmp_path):
    first = block(80, 2)
    folder, query = make_index(tmp_path / "index", codec, first), make_query(6, 1)
    index = CompressedIndex(folder)
    before = index.search(query, 10, EVERYTHING)
    delete(folder, index.text(before[0][:5]))
    add(folder, [block(10, 3)])
    compact(folder)
    after = index.search(query, 10, EVERYTHING)
    assert all(np.array_equal(*pair) for pair in zip(before, after, strict=True))
    assert not set(index.text(before[0][:5])) & set(CompressedIndex(folder).text(np.arange(85)))


def test_an_index_can_be_emptied(codec, tmp_path):
    folder = make_index(tmp_path / "index", codec, block(5, 2))
    delete(folder, CompressedIndex(folder).text(np.arange(5)))
    assert len(CompressedIndex(folder).search(make_query(4, 1), 3, QUALITY["fast"])[0]) == 0
    compact(folder)
    add(folder, [block(4, 3)])
    assert len(CompressedIndex(folder).search(make_query(4, 1), 3, QUALITY["fast"])[0]) == 3


CHANGES = """
import sys
sys.path[:0] = [{tests!r}, {repo!r}]
import search
from test_search import block
print("ready", flush=True)
for i in range(10**6):
    search.add({folder!r}, [block(20, 1000 + i)])
    search.delete({folder!r}, [f"{{1000 + i}}-{{j}}" for j in range(10)])
    search.compact({folder!r})
"""


def test_kill_9_leaves_the_old_index_or_the_new_one(codec, tmp_path):
    """Twenty kills at random moments of an endless series of changes: the state is always one of the series."""
    folder, rng = make_index(tmp_path / "index", codec, block(30, 2)), random.Random(0)
    script = CHANGES.format(tests=str(ROOT / "tests"), repo=str(ROOT), folder=str(folder))
    versions = set()
    for kill in range(20):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True)
        assert process.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0, 0.25))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        index = CompressedIndex(folder)
        counts = {}
        for pid in index.text(np.flatnonzero(index.alive())):
            seed, number = pid.split("-")
            counts.setdefault(int(seed), []).append(int(number))
        assert sorted(counts.pop(2)) == list(range(30))
        for numbers in counts.values():
            assert sorted(numbers) in (list(range(20)), list(range(10, 20)))
        assert sum(len(numbers) == 20 for numbers in counts.values()) <= 1  # only the last addition is still whole
        rows = index.search(make_query(4, kill), 10, QUALITY["fast"])[0]
        assert len(rows) == 10
        versions.add(index.state["version"])
        delete(folder, [f"{seed}-{number}" for seed, numbers in counts.items() for number in numbers] or ["2-0"])
        if not counts:
            add(folder, [(*(part[:n] for part, n in zip(make_passages(30, 2), (0, 0), strict=True)), [])])
            values, lengths = make_passages(30, 2)
            add(folder, [(values[: lengths[0]], lengths[:1], ["2-0"])])
    assert len(versions) > 5  # it did change meanwhile


# -------------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="session")
def codes_dir(tmp_path_factory, embedding_dir) -> Path:
    folder = tmp_path_factory.mktemp("codes") / "index"
    flags = ["--embedding_dir", embedding_dir, "--nlist", 4, "--bits", 4]
    succeed(call_stage("build_index.py", *flags, "--output_dir", folder))
    return folder


def test_meta_says_what_a_token_takes(codes_dir):
    meta = json.loads((codes_dir / "meta.json").read_text())
    size = sum(path.stat().st_size for path in codes_dir.rglob("*.npy") if path.name != "pids.npy")
    assert meta["method"] == "codes" and meta["bytes_per_embedding"] == round(size / meta["embeddings"], 2)
