"""Exact search of stored embeddings: against three loops, however blocks fall, and what it refuses."""

import numpy as np
import pytest
import torch
from made import DIM, make_passages, make_query

from nanocolbert.cli import InputError
from nanocolbert.index import exact
from nanocolbert.index.exact import ExactIndex
from nanocolbert.index.knobs import depths_for


def write_embeddings(folder, values: np.ndarray, lengths: np.ndarray) -> ExactIndex:
    np.save(folder / "values.npy", values)
    np.save(folder / "offsets.npy", np.append(0, np.cumsum(lengths)))
    np.save(folder / "pids.npy", np.arange(len(lengths)) * 10)
    return ExactIndex(folder, {"embeddings": len(values), "dim": DIM})


def test_against_three_loops(tmp_path, monkeypatch):
    monkeypatch.setattr(exact, "EXACT_TOKENS", 100)
    monkeypatch.setattr(exact, "EXACT_PASSAGES", 7)
    monkeypatch.setitem(exact.ROWS_TOKENS, "cpu", 50)
    values, lengths = make_passages(60, 1)
    index, queries = write_embeddings(tmp_path, values, lengths), torch.stack([make_query(6, seed) for seed in (2, 3)])
    passages = np.split(values.astype(np.float32), np.cumsum(lengths)[:-1])
    for query, every, some in zip(
        queries.numpy(), index.rank(queries, None, 9), index.rank(queries, [np.array([7, 50, 2])] * 2, 9), strict=True
    ):
        slow = [sum(max(float(q @ d) for d in passage) for q in query) for passage in passages]
        best = sorted(range(60), key=lambda row: -slow[row])
        assert every[0].tolist() == best[:9] and np.allclose(every[1], [slow[row] for row in best[:9]], atol=1e-4)
        assert some[0].tolist() == [row for row in best if row in (2, 7, 50)]
    assert index.ids(np.array([3])) == ["30"] and index.rows(["30", "31"]).tolist() == [3, -1]
    assert index.clock.seconds.keys() == {"MaxSim", "merge", "read embeddings"}


def test_refusals(tmp_path):
    values, lengths = make_passages(5, 1)
    index, query = write_embeddings(tmp_path, values, lengths), make_query(4, 1)[None]
    with pytest.raises(InputError, match="embeddings without an index: run build_index"):
        index.search(query, 3, depths_for("default", 3))
    with pytest.raises(InputError, match="by_codes says how a compressed index scores"):
        index.rank(query, None, 3, by_codes=True)
    with pytest.raises(InputError, match="among and quality are for a compressed index"):
        index.effort("best", 3)
    with pytest.raises(InputError, match=r"values\.npy: of shape"):
        ExactIndex(tmp_path, {"embeddings": len(values) + 1, "dim": DIM})
    np.save(tmp_path / "offsets.npy", np.array([0, 0, len(values)]))
    np.save(tmp_path / "pids.npy", np.array([4, 5]))
    with pytest.raises(InputError, match="passage 4 has no embeddings"):
        ExactIndex(tmp_path, {"embeddings": len(values), "dim": DIM})
