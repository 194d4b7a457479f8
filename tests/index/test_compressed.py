"""The compressed index: steps against plain ones, changes against a dictionary, and kills in the middle of changes."""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, call_stage, run_stage_cli, succeed
from test_codec import NLIST, decode_all, make_passages, make_query

from model import ColBERT
from nanocolbert.cli import InputError
from nanocolbert.index import compressed, kernels
from nanocolbert.index.codec import Codec
from nanocolbert.index.compressed import CompressedIndex, add, compact, create, delete, highest, read_state, top
from nanocolbert.index.gpu_index import GpuIndex
from nanocolbert.index.kernels import LANES
from nanocolbert.index.knobs import QUALITY, Effort, effort_for
from nanocolbert.maxsim import maxsim_packed
from nanocolbert.storage.artifact import read_meta, verify, write_meta
from nanocolbert.storage.checksums import check_sums
from retrieve import Searcher

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
    create(folder, codec, ((codec.encode(*part[:2]), part[2]) for part in blocks), kept)
    return folder


def brute_force(passages: dict[str, np.ndarray], query: torch.Tensor) -> dict[str, float]:
    return {pid: float((query.numpy() @ vectors.T).max(1).sum()) for pid, vectors in passages.items()}


def decoded(codec: Codec, values, lengths, pids) -> dict[str, np.ndarray]:
    return dict(zip(pids, decode_all(codec, codec.encode(values, lengths)), strict=True))


def check_against(index: CompressedIndex, passages: dict[str, np.ndarray], query, allowed=None) -> None:
    """What a search with all effort finds is what scoring everything finds, but for rounding."""
    tolerance = 0.002 * len(query)  # look-ups have 16 bits
    rows, scores = index.search(query, 10, EVERYTHING, allowed)
    slow = brute_force(passages, query)
    best = sorted(slow.values(), reverse=True)[:10]
    assert len(rows) == len(best) and np.allclose(scores, best, atol=tolerance)
    assert np.allclose([slow[pid] for pid in index.text(rows)], scores, atol=tolerance)


@pytest.mark.parametrize("n_tokens", [3, 32, 70])
def test_finds_what_brute_force_finds(codec, tmp_path, monkeypatch, n_tokens):
    monkeypatch.setattr(compressed, "BLOCK", 64)  # several blocks of lists
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


@pytest.mark.parametrize("C", [5, 64, 1000])
def test_nearest_lists(C):
    similarities = np.random.default_rng(C).integers(-300, 300, (C, LANES)).astype(np.int16)  # with ties
    for nprobe in {1, 5, min(C, 40)}:
        lists, found = kernels.nearest_lists(similarities, 7, nprobe)
        order = np.argsort(-similarities[:, :7].astype(int), axis=0, kind="stable")[:nprobe].T
        assert np.array_equal(lists, order)
        assert np.array_equal(found, np.take_along_axis(similarities[:, :7].T, order, 1))


def test_probe_counts_the_best_list_of_each_query_token():
    rng = np.random.default_rng(0)
    members = [np.sort(rng.choice(50, rng.integers(0, 20), replace=False)).astype(np.uint16) for _ in range(10)]
    starts = np.append(0, np.cumsum([len(part) for part in members]))
    probes = np.stack([rng.permutation(10)[:4] for _ in range(5)])
    gains = -np.sort(-rng.integers(1, 3000, (5, 4)), axis=1).astype(np.int32)
    may, states = rng.random(50) < 0.9, np.zeros(50, np.uint32)
    slow = {}
    for lists, row in zip(probes, gains, strict=True):
        best = {}
        for number, gain in zip(lists, row, strict=True):
            for passage in members[number].tolist():
                best[passage] = max(best.get(passage, 0), int(gain))
        for passage, gain in best.items():
            slow[passage] = slow.get(passage, 0) + gain
    slow = {passage: promise for passage, promise in sorted(slow.items()) if may[passage]}
    for n in (1, 7, 1000, 1000):  # the room is left as it was found
        passages, promises = kernels.probe(np.concatenate(members), starts, probes, gains, may, states, n)
        found = dict(zip(passages.tolist(), promises.tolist(), strict=True))
        assert found.items() <= slow.items() and list(found) == sorted(found)
        assert sorted(found.values())[-n:] == sorted(slow.values())[-n:]
        assert len(found) < n + 10 and not states.any()


def test_more_effort_is_not_worse(codec, tmp_path):
    passages = block(2000, 2)
    index, truth = CompressedIndex(make_index(tmp_path / "index", codec, passages)), decoded(codec, *passages)
    found = {}
    efforts = {name: effort_for(name, 10) for name in QUALITY}
    for name, effort in {"little": Effort(1, 20, 1, 1), **efforts, "all": EVERYTHING}.items():
        overlap = 0
        for seed in range(20):
            query = make_query(8, seed)
            slow = brute_force(truth, query)
            best = sorted(slow, key=slow.get, reverse=True)[:10]
            overlap += len(set(best) & set(index.text(index.search(query, 10, effort)[0])))
        found[name] = overlap / 200
    assert found["little"] < found["best"] and found["fast"] <= found["default"] + 0.02
    assert found["best"] > 0.85  # coarse codes choose 400 of the 2,000; here they are weak, trained on a small sample
    assert found["all"] > 0.98  # every passage by all its codes: what is left is rounding


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
    assert len(CompressedIndex(folder).search(make_query(4, 1), 3, effort_for("fast", 3))[0]) == 0
    compact(folder)
    add(folder, [block(4, 3)])
    assert len(CompressedIndex(folder).search(make_query(4, 1), 3, effort_for("fast", 3))[0]) == 3


def change(path: Path, edit) -> None:
    """Put another array in place of a .npy file, which others may have linked."""
    array = np.load(path)
    path.unlink()
    np.save(path, edit(array))


def put(at, value):
    def edit(array: np.ndarray) -> np.ndarray:
        array[at] = value
        return array

    return edit


@pytest.fixture(scope="module")
def kept_dir(tmp_path_factory, codec) -> Path:
    """An index with vectors, origins and deleted passages."""
    folder = make_index(tmp_path_factory.mktemp("kept") / "index", codec, block(200, 2), vectors=True)
    compact(folder)
    delete(folder, ["2-3"])
    return folder


SEGMENT = "segments/2/"


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
        (SEGMENT + "origins.npy", lambda origins: origins[:-1]),
        (SEGMENT + "vectors.npy", lambda vectors: vectors[:-1]),
        (SEGMENT + "vectors.npy", lambda vectors: vectors.astype(">f2")),
        (SEGMENT + "pids.npy", lambda pids: pids[:0]),
        ("centroids.npy", put((3, 3), np.nan)),
        ("centroids.npy", lambda centroids: centroids[:-1]),
        ("centroids.npy", lambda centroids: centroids[:, :-1]),
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
        CompressedIndex(folder).search(make_query(4, 1), 3, EVERYTHING)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("open_index", [CompressedIndex, lambda folder: GpuIndex(folder, "cpu")])
def test_what_codes_name_is_bounded(codec, tmp_path, open_index):
    """Centroids, parents and list entries that are none: other results, but no other memory."""
    folder, effort = make_index(tmp_path / "index", codec, block(100, 2)), Effort(NLIST, 50, 30, 30)
    add(folder, [block(80, 3)])
    for name in ("coarse", "fine", "lists"):
        change(folder / f"segments/1/{name}.npy", lambda array: np.full_like(array, np.iinfo(array.dtype).max))
    index, query = open_index(folder), make_query(8, 1)
    before, scores = index.search(query, 10, effort)
    assert len(before) == 10 and np.isfinite(scores).all()
    assert len(index.rank(query, np.arange(180), 180, by_codes=True)[0]) == 180
    after = index.search(query, 10, effort)[0]  # nothing of it is left behind
    assert before.tolist() == after.tolist()


def test_what_is_listed_is_there(kept_dir, tmp_path):
    for name in ("vectors.npy", "origins.npy", "alive-3.npy", "lists.npy"):
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


def verify_segments(folder: Path) -> None:
    """What --verify does, of an index without a meta.json, and of its codec by opening it."""
    for entry in read_state(folder)["segments"]:
        check_sums(folder / "segments" / entry["name"], entry["files"])
    CompressedIndex(folder)


def test_an_old_index_opens_and_changes(kept_dir, tmp_path):
    folder = shutil.copytree(kept_dir, tmp_path / "index")
    make_old(folder)
    index, query = CompressedIndex(folder), make_query(6, 1)
    assert index.keeps_vectors and np.array_equal(index.origin(np.arange(5)), np.arange(5))
    before = index.search(query, 10, EVERYTHING)
    assert np.array_equal(CompressedIndex(kept_dir).search(query, 10, EVERYTHING)[0], before[0])
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
                    "nanocolbert.index.compressed.shutil.rmtree", lambda path: (Path(path) / "vectors.npy").unlink()
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


def test_a_planted_lock_is_not_followed(codec, tmp_path):
    folder = make_index(tmp_path / "index", codec, block(5, 2))
    (tmp_path / "precious").write_text("precious")
    (folder / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(InputError, match="a symbolic link, which is not followed"):
        compact(folder)
    assert (tmp_path / "precious").read_text() == "precious"


def test_damaged_codes_are_not_compacted(codec, tmp_path):
    folder = make_index(tmp_path / "index", codec, block(20, 2))
    change(folder / "segments/1/coarse.npy", put(slice(None), 255))
    with pytest.raises(InputError, match="damaged codes"):
        compact(folder)
    assert read_state(folder)["version"] == 1 and len(CompressedIndex(folder)) == 20


def test_equal_scores_in_the_order_of_position():
    rng = np.random.default_rng(0)
    for n in (1, 5, 40, 99):
        for dtype in (np.float32, np.int32):
            scores = rng.integers(0, 6, 100).astype(dtype)
            first = np.argsort(-scores, kind="stable")[:n]
            assert highest(scores, n).tolist() == sorted(first)
            rows, found = top(np.arange(100), scores, n)
            assert rows.tolist() == first.tolist() and np.array_equal(found, scores[first])
    with pytest.raises(InputError, match="not a number"):
        top(np.arange(3), np.array([1, np.nan, 2], np.float32), 2)


@pytest.mark.parametrize("open_index", [CompressedIndex, lambda folder: GpuIndex(folder, "cpu")])
@pytest.mark.parametrize("vectors", [False, True])
def test_of_equal_passages_the_first_are_found(codec, tmp_path, open_index, vectors):
    values, lengths, _ = block(1, 2)
    same = (np.tile(values, (40, 1)), np.tile(lengths, 40), [f"p{i}" for i in range(40)])
    index, query = open_index(make_index(tmp_path / "index", codec, same, vectors=vectors)), make_query(8, 1)
    for k in (1, 7, 39):
        for effort in (Effort(2, k, k, k), Effort(2, 38, 20, 10), EVERYTHING):
            assert index.search(query, k, effort)[0].tolist() == list(range(k))
        assert index.rank(query, np.arange(40), k, by_codes=not vectors)[0].tolist() == list(range(k))


def test_compiled_without_a_folder_to_write_to():
    names = {"kernels": kernels}
    exec(compile("def double(x):\n    return 2 * x", "/nowhere/loops.py", "exec"), names)
    with pytest.raises(RuntimeError, match="no locator available"):
        kernels.njit(cache=True)(names["double"])
    assert kernels.compiled()(names["double"])(21) == 42


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
    context.set_forkserver_preload(["test_search"])
    for kill in range(20):
        ready = context.Event()
        process = context.Process(target=change_for_ever, args=(folder, ready))
        process.start()
        assert ready.wait(60)
        time.sleep(rng.uniform(0, 0.25))
        process.kill()
        process.join()
        index, counts = CompressedIndex(folder), {}
        for pid in index.text(np.flatnonzero(index.alive())):
            seed, number = map(int, pid.split("-"))
            counts.setdefault(seed, []).append(number)
        assert sorted(counts.pop(2)) == list(range(30))
        assert all(sorted(numbers) in (list(range(20)), list(range(10, 20))) for numbers in counts.values())
        assert sum(len(numbers) == 20 for numbers in counts.values()) <= 1  # only the last addition is still whole
        assert len(index.search(make_query(4, kill), 10, effort_for("fast", 10))[0]) == 10
        versions.add(index.state["version"])
        if counts:
            delete(folder, [f"{seed}-{number}" for seed, numbers in counts.items() for number in numbers])
    assert len(versions) > 10  # it did change meanwhile


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


# ------------------------------------------------------------------------------------------------- search by the stages


@pytest.fixture(scope="module")
def queries_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("queries") / "queries.tsv"
    path.write_text("q1\tred apple\nq2\tthe sea\n")
    return path


def read_rankings(path: Path) -> list[tuple[str, str]]:
    return [tuple(line.split()[:3:2]) for line in path.read_text().splitlines()]


def test_the_stages_agree_with_the_notebook(codes_dir, model_dir, queries_file, tmp_path):
    flags = ["--cpu", "--model", model_dir, "--index_dir", codes_dir, "--queries", queries_file, "--k", 5]
    succeed(call_stage("retrieve.py", *flags, "--output", tmp_path / "run", "--quality", "best"))
    searcher = Searcher(codes_dir, model_dir, "cpu")
    hits = searcher.search(["red apple", "the sea"], k=5, quality="best")
    expected = [(qid, hit.pid) for qid, found in zip(("q1", "q2"), hits, strict=True) for hit in found]
    assert read_rankings(tmp_path / "run") == expected
    succeed(call_stage("retrieve.py", *flags, "--output", tmp_path / "run", "--exact", "--by_codes"))
    assert read_rankings(tmp_path / "run") == expected
    (tmp_path / "candidates").write_text("".join(f"{qid}\t{pid}\n" for qid, pid in expected))
    flags += ["--candidates", tmp_path / "candidates", "--by_codes"]
    succeed(call_stage("retrieve.py", *flags, "--output", tmp_path / "run"))
    assert read_rankings(tmp_path / "run") == expected


def test_among_and_effort_are_for_one_search(codes_dir, model_dir):
    searcher = Searcher(codes_dir, model_dir, "cpu")
    everything = searcher.search("red apple", k=10)
    among = [hit.pid for hit in everything[3:6]]
    assert [hit.pid for hit in searcher.search("red apple", k=10, among=among)] == among
    assert len(searcher.search("red apple", k=10, nprobe=1, n_coarse=2)) <= 10
    assert searcher.search("red apple", k=10) == everything
    for wrong, message in (
        ({"among": ["nobody"]}, "has no passage nobody"),
        ({"faiss_depth": 3}, "faiss_depth says nothing to a compressed index"),
        ({"nprobe": 0}, "nprobe is 0"),
        ({"quality": "great"}, "quality 'great'"),
    ):
        with pytest.raises(InputError, match=message):
            searcher.search("red apple", **wrong)


def test_another_collection_is_refused(codes_dir, model_dir, tmp_path):
    (tmp_path / "other.tsv").write_text("x\tred apple\n")
    with pytest.raises(InputError, match="give the collection that the index was made from"):
        Searcher(codes_dir, model_dir, "cpu", collection=tmp_path / "other.tsv").search("red apple")


def test_update_stage(codes_dir, model_dir, toy_dir, tmp_path):
    texts = dict(line.split("\t") for line in (toy_dir / "collection.tsv").read_text().splitlines())
    index = shutil.copytree(codes_dir, tmp_path / "index")
    (tmp_path / "more.tsv").write_text("new1\tred apple red apple\nnew2\tgreen apple\n")
    flags = ["--index_dir", index, "--model", model_dir, "--cpu"]
    done = succeed(call_stage("update_index.py", *flags, "--add", tmp_path / "more.tsv"))
    assert json.loads(done.stdout.splitlines()[-1])["changed"] == 2
    pids = [hit.pid for hit in Searcher(index, model_dir, "cpu").search("red apple", k=100)]
    assert {"new1", "new2"} <= set(pids)
    (tmp_path / "pids.txt").write_text("new1\n" + pids[-1] + "\n")
    succeed(call_stage("update_index.py", "--index_dir", index, "--delete", tmp_path / "pids.txt"))
    succeed(call_stage("update_index.py", "--index_dir", index, "--compact"))
    hits = Searcher(index, model_dir, "cpu", toy_dir / "collection.tsv").search("red apple", k=100)
    left = set(pids) - {"new1", pids[-1]}
    assert {hit.pid: hit.text for hit in hits} == {pid: texts.get(pid) for pid in left}  # though the rows have moved


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--add", "more.tsv"), "more.tsv:2: id 'new1' a second time"),
        (("--add", "nowhere.tsv"), "nowhere.tsv: no such file"),
        (("--delete", "pids.txt"), "pids.txt:1: "),
        (("--delete", "blank.txt"), "blank.txt:2: id '' is empty"),
    ],
)
def test_refusals_of_updates(codes_dir, model_dir, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    index = shutil.copytree(codes_dir, tmp_path / "index")
    Path("more.tsv").write_text("new1\tred apple\nnew1\tgreen apple\n")
    Path("pids.txt").write_text("nobody\n")
    Path("blank.txt").write_text("1\n\n")
    before = (index / "state.json").read_bytes()
    done = call_stage("update_index.py", "--index_dir", index, "--model", model_dir, "--cpu", *flags)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert (index / "state.json").read_bytes() == before and len(list((index / "segments").iterdir())) == 1


def test_ivfpq_is_not_updated(index_dir):
    done = call_stage("update_index.py", "--index_dir", index_dir, "--compact")
    assert done.returncode == 2 and "IVFPQ, which is not changed" in done.stderr


def test_long_passages_are_refused_before_anything_is_embedded(codes_dir, model_dir, tmp_path, monkeypatch):
    index = shutil.copytree(codes_dir, tmp_path / "index")
    (tmp_path / "more.tsv").write_text("new1\tred apple\nnew2\t" + "house " * 1100 + "\n")
    load = ColBERT.from_pretrained

    def longer(*args, **settings) -> ColBERT:
        model = load(*args, **settings)
        model.config.doc_maxlen = 2000
        return model

    monkeypatch.setattr(ColBERT, "from_pretrained", longer)
    monkeypatch.setattr(ColBERT, "embed_passages", None)
    flags = ("--index_dir", index, "--model", model_dir, "--cpu", "--add", tmp_path / "more.tsv")
    done = call_stage("update_index.py", *flags)
    assert done.returncode == 2 and "more.tsv:2: passage new2 has 1103 embeddings" in done.stderr, done.stderr


def test_exact_is_not_by_codes_unless_asked_for(codes_dir, model_dir, queries_file, toy_dir, tmp_path):
    flags = ["--cpu", "--model", model_dir, "--index_dir", codes_dir, "--queries", queries_file, "--k", 5]
    (tmp_path / "candidates").write_text("q1\tp1\n")
    for how in (["--exact"], ["--candidates", tmp_path / "candidates"]):
        done = call_stage("retrieve.py", *flags, *how, "--output", tmp_path / "run")
        assert done.returncode == 2 and "keeps no vectors" in done.stderr and "--keep_vectors" in done.stderr
        assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()
    done = succeed(call_stage("retrieve.py", *flags, *how, "--by_codes", "--output", tmp_path / "run"))
    assert "no candidates for 1 of 2 queries, q2 among them" in done.stderr
    done = call_stage("retrieve.py", *flags, "--by_codes", "--output", tmp_path / "run")
    assert done.returncode == 2 and "leave it out" in done.stderr
    with pytest.raises(InputError, match="keeps no vectors"):
        Searcher(codes_dir, model_dir, "cpu").search("red apple", exact=True)


def test_many_threads_search_at_once(codes_dir, index_dir, model_dir):
    texts = [f"{a} {b}" for a in ("red", "old", "find", "the") for b in ("apple", "boat", "drum", "house")]
    for folder, efforts in ((codes_dir, [{}, {"nprobe": 1}]), (index_dir, [{"nprobe": 4}, {"nprobe": 1}])):
        jobs = [(text, effort) for text in texts for effort in efforts] * 2
        alone = Searcher(folder, model_dir, "cpu")
        expected = [alone.search(text, k=10, **effort) for text, effort in jobs]
        shared = Searcher(folder, device="cpu")  # whose model and index are loaded by whoever comes first
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda job, searcher=shared: searcher.search(job[0], k=10, **job[1]), jobs))
        assert found == expected


# ------------------------------------------------------------------------------------------------- compressed at once


@pytest.fixture(scope="module")
def compressed_dir(tmp_path_factory, embedding_arguments) -> Path:
    """doc2embedding.py --bits."""
    folder = tmp_path_factory.mktemp("compressed") / "embeddings"
    flags = [*embedding_arguments, "--bits", 4, "--nlist", 4, "--output_dir", folder]
    succeed(run_stage_cli("doc2embedding.py", *flags))
    return folder


def test_compressed_at_once(compressed_dir, codes_dir, model_dir, tmp_path):
    """No vectors on the disk, and scores like those of vectors compressed later."""
    assert not (compressed_dir / "values.npy").exists()
    succeed(call_stage("build_index.py", "--embedding_dir", compressed_dir, "--output_dir", tmp_path / "index"))
    meta = json.loads((tmp_path / "index" / "meta.json").read_text())
    assert meta["bits"] == 4 and meta["nlist"] == 4
    scores = []
    for folder in (tmp_path / "index", codes_dir):
        hits = Searcher(folder, model_dir, "cpu").search("red apple", k=1000, exact=True, by_codes=True)
        scores.append({hit.pid: hit.score for hit in hits})
    assert scores[0].keys() == scores[1].keys()
    assert max(abs(scores[0][pid] - scores[1][pid]) for pid in scores[0]) < 1.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--method", "ivfpq"), "compressed, without vectors"),
        (("--keep_vectors",), "compressed, without vectors"),
        (("--bits", 2), "compressed with 4 bits, 4 centroids"),
    ],
)
def test_refusals_of_compressed_embeddings(compressed_dir, tmp_path, flags, message):
    done = call_stage("build_index.py", "--embedding_dir", compressed_dir, "--output_dir", tmp_path / "index", *flags)
    assert done.returncode == 2 and message in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("parts/4.sizes.npy", None, "missing"),
        ("parts/1.coarse.npy", lambda codes: codes[:-1], "part 1 do not fit"),
        ("parts/1.sizes.npy", lambda sizes: sizes[:-1], "of shape"),
        ("parts/1.coarse.npy", lambda codes: np.full_like(codes, 255), "damaged codes"),
        ("pids.npy", lambda pids: pids[:0], "pids.npy: of shape"),
        ("codec/centroids.npy", lambda centroids: centroids[:, :-1], "centroids.npy: of shape"),
    ],
)
def test_parts_that_are_not_whole(compressed_dir, tmp_path, name, edit, message):
    source = shutil.copytree(compressed_dir, tmp_path / "embeddings")
    meta = json.loads((source / "meta.json").read_text())
    del meta["files"], meta["checksum"]  # else sizes tell
    (source / "meta.json").write_text(json.dumps(meta))
    change(source / name, edit) if edit else (source / name).unlink()
    done = call_stage("build_index.py", "--embedding_dir", source, "--output_dir", tmp_path / "index")
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["embeddings"]


def test_centroids_are_for_compression(embedding_arguments, tmp_path):
    done = call_stage("doc2embedding.py", *embedding_arguments, "--nlist", 4, "--output_dir", tmp_path / "embeddings")
    assert done.returncode == 2 and "--nlist says nothing without --bits" in done.stderr
    assert not list(tmp_path.iterdir())


def test_compressed_embeddings_are_not_searched(compressed_dir, model_dir):
    with pytest.raises(InputError, match="compressed embeddings: run build_index"):
        Searcher(compressed_dir, model_dir, "cpu")


def test_a_killed_compression_goes_on(compressed_dir, embedding_arguments, tmp_path):
    folder = shutil.copytree(compressed_dir, tmp_path / "embeddings")
    (folder / "meta.json").unlink()
    (folder / "parts" / "1.json").unlink()
    (folder / "parts" / "1.fine.npy").write_bytes(b"half")
    succeed(run_stage_cli("doc2embedding.py", *embedding_arguments, "--bits", 4, "--nlist", 4, "--output_dir", folder))
    for path in (compressed_dir / "parts").glob("*.npy"):
        assert path.read_bytes() == (folder / "parts" / path.name).read_bytes()
