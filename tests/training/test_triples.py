"""Batches: of a step alone, and embedded as each text by itself."""

import numpy as np
import pytest
import torch

from model import ColBERT
from nanocolbert.training.losses import Objective
from nanocolbert.training.triples import Triples, collate


@pytest.mark.parametrize("packed", [False, True])
def test_embeddings_of_a_batch(tokens_dir, model_dir, packed):
    """Of each text alone, however the batch is computed."""
    model, data = ColBERT.from_pretrained(model_dir), Triples(tokens_dir, 8, None)
    rows = data.rows(1)
    batch = collate(data, rows, model, 64, packed)
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
        loss = Objective(["in_batch"])(*model(**batch["inputs"]), batch["mask"], batch["passage_rows"])["loss"]
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
