"""Batches: of a step alone, and embedded as each text by itself."""

import numpy as np
import pytest
import torch

from model import ColBERT
from nanocolbert.cli import InputError
from nanocolbert.training.losses import Objective
from nanocolbert.training.triples import Triples, collate


@pytest.mark.parametrize("packed", [False, True])
def test_embeddings_of_a_batch(tokens_dir, model_dir, packed):
    """Of each text alone, however the batch is computed."""
    model, data = ColBERT.from_pretrained(model_dir), Triples(tokens_dir, 8, None)
    rows = data.rows(1).copy()
    rows[3, 1], rows[5:, 2] = rows[2, 1], rows[4, 2]
    batch = collate(data, rows, model, 64, packed)
    lengths = [data.passages.lengths(np.unique(rows[:, 1:])).sum(), len(np.unique(rows[:, 1:])) * 3]  # frames
    assert batch["tokens"] == 8 * model.config.query_maxlen + sum(lengths)  # each passage once
    assert (len(batch["inputs"]["batches"]) == 1) == packed
    Q, P = model(**batch["inputs"])
    for query, row in zip(Q, rows[:, 0], strict=True):
        alone = model.embed(model.frame_queries(*data.queries.gather(np.array([row]))))[0]
        assert torch.allclose(query, alone, atol=1e-5)
    for passage, mask, row in zip(P, batch["mask"], rows[:, 1:].reshape(-1), strict=True):
        ids, attention_mask = model.frame_passages(*data.passages.gather(np.array([row])))
        alone = model.embed((ids, attention_mask))[model.kept(ids, attention_mask)]
        assert torch.allclose(passage[mask], alone, atol=1e-5)


def test_packed_and_padded_gradients_agree(tokens_dir, model_dir):
    model, data = ColBERT.from_pretrained(model_dir), Triples(tokens_dir, 8, None)
    gradients = []
    for packed in (False, True):
        batch = collate(data, data.rows(1), model, 64, packed)
        loss = Objective(["in_batch"])(*model(**batch["inputs"]), batch["mask"], batch["rows"])["loss"]
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for padded, packed in zip(*gradients, strict=True):
        assert torch.allclose(padded, packed, atol=1e-5), (padded - packed).abs().max()


def test_batches_in_file_order_begin_again(tokens_dir):
    triples = np.load(tokens_dir / "triples.npy").tolist()
    data = Triples(tokens_dir, 24, None)
    found = [row for step in range(6) for row in data.rows(step).tolist()]
    assert found == (triples * 3)[:144]


def test_shuffled_epochs(tokens_dir):
    triples = np.load(tokens_dir / "triples.npy").tolist()
    data = Triples(tokens_dir, 24, 1)
    found = [row for step in range(8) for row in data.rows(step).tolist()]  # 192 = 3 epochs of 64
    epochs = [found[:64], found[64:128], found[128:]]
    assert all(sorted(epoch) == sorted(triples) and epoch != triples for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert Triples(tokens_dir, 24, 1).rows(5).tolist() == found[120:144]  # a step needs no step before it
    assert Triples(tokens_dir, 24, 2).rows(0).tolist() != found[:24]


@pytest.fixture
def scored_dir(tokens_dir, tmp_path):
    """The toy tokens, with scores that say which triple and which passage they are of."""
    for path in tokens_dir.iterdir():
        (tmp_path / path.name).symlink_to(path)
    n, width = np.load(tokens_dir / "triples.npy").shape
    np.save(tmp_path / "scores.npy", (np.arange(n)[:, None] + np.arange(width - 1) / 2).astype(np.float32))
    return tmp_path


@pytest.mark.parametrize("seed", [None, 1])
def test_scores_are_of_the_rows_beside_them(scored_dir, tokens_dir, seed):
    """Also over the end of an epoch."""
    triples = np.load(tokens_dir / "triples.npy")
    data = Triples(scored_dir, 24, seed)
    data.check()
    for step in range(6):
        scores = data.scores_of(step)
        assert scores.shape == (24, 2) and scores.dtype == np.float32
        assert (scores[:, 1] - scores[:, 0] == 0.5).all()
        assert data.rows(step).tolist() == triples[scores[:, 0].astype(int)].tolist()
    assert Triples(tokens_dir, 24, seed).scores_of(0) is None


def test_queries_with_one_passage_each(scored_dir, tokens_dir, model_dir):
    """As qrels alone give them."""
    (scored_dir / "triples.npy").unlink()
    np.save(scored_dir / "triples.npy", np.load(tokens_dir / "triples.npy")[:, :2])
    with pytest.raises(InputError, match=r"scores\.npy: of shape 64 x 2, not 64 x 1"):
        Triples(scored_dir, 8, None)
    (scored_dir / "scores.npy").unlink()
    data = Triples(scored_dir, 8, None)
    data.check()
    batch = collate(data, data.rows(0), ColBERT.from_pretrained(model_dir), 64, False)
    assert batch["rows"].tolist() == np.load(tokens_dir / "triples.npy")[:8, :2].tolist()


def test_scores_that_are_no_numbers(scored_dir):
    scores = np.load(scored_dir / "scores.npy")
    scores[40, 1] = np.nan
    np.save(scored_dir / "scores.npy", scores)
    with pytest.raises(InputError, match=r"scores\.npy: the scores of triple 40 are \[40\.0, nan\]"):
        Triples(scored_dir, 8, None).check()
