"""The compressed index on a device, here the CPU, finds what the look-ups find."""

import numpy as np
import pytest
import torch
from made import EVERYTHING, NLIST, block, make_index, make_passages, make_query, rank_one, search_one

from nanocolbert.index.changes import add, delete
from nanocolbert.index.codec import Codec
from nanocolbert.index.compressed import CompressedIndex
from nanocolbert.index.gpu_index import GpuIndex
from nanocolbert.index.knobs import Effort


@pytest.mark.parametrize(("bits", "vectors"), [(1, False), (4, False), (2, True)])
def test_finds_what_look_ups_find(tmp_path, monkeypatch, bits, vectors):
    for file in ("segments", "compressed", "gpu_index"):  # several blocks of lists
        monkeypatch.setattr(f"nanocolbert.index.{file}.BLOCK", 64)
    codec = Codec.train(*make_passages(300, 1), bits, NLIST, seed=0)
    folder = make_index(tmp_path / "index", codec, block(200, 2), vectors=vectors)
    delete(folder, [f"2-{i}" for i in range(0, 60, 3)])
    add(folder, [block(50, 3)])
    ours, theirs = GpuIndex(folder, "cpu"), CompressedIndex(folder)
    allowed = np.random.default_rng(0).random(len(ours)) < 0.7
    for seed, may in ((1, None), (2, allowed), (3, None)):
        query = make_query(20, seed)
        padded = torch.cat([query, torch.zeros(2, query.shape[1])])
        (rows, scores), (found, found_scores) = (
            search_one(index, padded, 10, EVERYTHING, may) for index in (theirs, ours)
        )
        assert np.allclose(scores, found_scores, atol=0.1) and len(set(rows) & set(found)) >= 9
        few = [set(search_one(index, padded, 10, Effort(3, 60, 25, 15), may)[0]) for index in (theirs, ours)]
        assert len(few[0] & few[1]) >= 6  # where promises are nearly equal, rounding chooses
        every = np.flatnonzero(theirs.alive())
        assert np.allclose(
            *(rank_one(index, query, every, 30, by_codes=not vectors)[1] for index in (ours, theirs)), atol=0.1
        )
