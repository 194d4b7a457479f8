"""The compressed index: its steps against brute force, and what a search of it may not touch."""

import numpy as np
import pytest
import torch
from made import (
    EVERYTHING,
    NLIST,
    block,
    brute_force,
    change,
    check_against,
    decoded,
    make_index,
    make_query,
    rank_one,
    search_one,
)

from nanocolbert.index.changes import add
from nanocolbert.index.compressed import CompressedIndex
from nanocolbert.index.gpu_index import GpuIndex
from nanocolbert.index.knobs import QUALITY, USUAL, Effort, effort_for
from nanocolbert.maxsim import maxsim_packed


@pytest.mark.parametrize("n_tokens", [3, 32, 70])
def test_finds_what_brute_force_finds(codec, tmp_path, monkeypatch, n_tokens):
    for file in ("segments", "compressed"):  # several blocks of lists
        monkeypatch.setattr(f"nanocolbert.index.{file}.BLOCK", 64)
    passages = block(300, 2)
    index = CompressedIndex(make_index(tmp_path / "index", codec, passages))
    assert len(index.segments[0].starts) == 5
    query = make_query(n_tokens, 3)
    check_against(index, decoded(codec, *passages), torch.cat([query, torch.zeros(2, query.shape[1])]))


def test_kept_vectors_make_the_last_step_exact(codec, tmp_path):
    values, lengths, pids = block(200, 2)
    folder = make_index(tmp_path / "index", codec, (values, lengths, pids), vectors=True)
    query, index = make_query(8, 3), CompressedIndex(folder)
    rows, scores = search_one(index, query, 10, Effort(4, 100, 50, 30))
    exact = maxsim_packed(query[None], torch.from_numpy(values).float(), torch.from_numpy(lengths))[0]
    assert np.allclose(scores, exact[torch.from_numpy(rows)], atol=1e-5)
    rows, scores = search_one(index, query, 10, EVERYTHING)
    assert np.allclose(scores, exact.topk(10).values, atol=1e-5)


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
            overlap += len(set(best) & set(index.ids(search_one(index, query, 10, effort)[0])))
        found[name] = overlap / 200
    assert found["little"] < found["best"] and found["fast"] <= found["default"] + 0.02
    assert found["best"] > 0.85  # coarse codes choose 400 of the 2,000; here they are weak, trained on a small sample
    assert found["all"] > 0.98  # every passage by all its codes: what is left is rounding


@pytest.mark.parametrize("quality", QUALITY)
def test_effort_grows_with_the_collection(quality, codec, tmp_path):
    few, usual, many = (effort_for(quality, 10, n) for n in (10, USUAL, 16 * USUAL))
    assert few == usual == effort_for(quality, 10)
    assert many.n_coarse == 4 * usual.n_coarse and 2.4 * usual.nprobe < many.nprobe < 2.6 * usual.nprobe
    assert all(value >= at_least for value, at_least in zip(many, usual, strict=True))
    assert effort_for(quality, 10, 16 * USUAL, n_coarse=7, nprobe=3)[:2] == (3, 7)  # as it was asked for
    index = CompressedIndex(make_index(tmp_path / "index", codec, block(50, 2)))
    assert index.effort(quality, 10) == usual
    index.n = 16 * USUAL
    assert index.effort(quality, 10) == many


@pytest.mark.parametrize("open_index", [CompressedIndex, lambda folder: GpuIndex(folder, "cpu")])
def test_what_codes_name_is_bounded(codec, tmp_path, open_index):
    """Centroids, parents and list entries that are none: other results, but no other memory."""
    folder, effort = make_index(tmp_path / "index", codec, block(100, 2)), Effort(NLIST, 50, 30, 30)
    add(folder, [block(80, 3)])
    for name in ("coarse", "fine", "lists"):
        change(folder / f"segments/1/{name}.npy", lambda array: np.full_like(array, np.iinfo(array.dtype).max))
    index, query = open_index(folder), make_query(8, 1)
    before, scores = search_one(index, query, 10, effort)
    assert len(before) == 10 and np.isfinite(scores).all()
    assert len(rank_one(index, query, np.arange(180), 180, by_codes=True)[0]) == 180
    after = search_one(index, query, 10, effort)[0]  # nothing of it is left behind
    assert before.tolist() == after.tolist()


@pytest.mark.parametrize("open_index", [CompressedIndex, lambda folder: GpuIndex(folder, "cpu")])
@pytest.mark.parametrize("vectors", [False, True])
def test_of_equal_passages_the_first_are_found(codec, tmp_path, open_index, vectors):
    values, lengths, _ = block(1, 2)
    same = (np.tile(values, (40, 1)), np.tile(lengths, 40), [f"p{i}" for i in range(40)])
    index, query = open_index(make_index(tmp_path / "index", codec, same, vectors=vectors)), make_query(8, 1)
    for k in (1, 7, 39):
        for effort in (Effort(2, k, k, k), Effort(2, 38, 20, 10), EVERYTHING):
            assert search_one(index, query, k, effort)[0].tolist() == list(range(k))
        assert rank_one(index, query, np.arange(40), k, by_codes=not vectors)[0].tolist() == list(range(k))
