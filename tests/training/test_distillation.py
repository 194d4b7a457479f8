"""An encoder's own similarity of a batch equals what its teacher says of one pair of texts after the other."""

import json

import numpy as np
import pytest
import torch

from nanocolbert.cli import InputError
from nanocolbert.training import teachers
from nanocolbert.training.distillation import Distillation
from nanocolbert.training.teachers import SIMILARITIES, load_teacher, score_rows

QUERIES = ["the old boat", "eagle?", "find a new house near the drum"]
PASSAGES = ["a boat, and a house!", "eagle", "grape [SEP] flute", "cloud " * 40, "the drum; (old) -- apple's"]


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_scores_equal_those_of_pairs(encoder_dir, similarity, monkeypatch):
    monkeypatch.setattr(teachers, "tokens_per_batch", lambda device, total: 40)
    teacher = load_teacher(encoder_dir, similarity, max_tokens=24, fp32=True)
    which = torch.tensor([3, 0, 1, 2, 4, 1])
    found = Distillation(teacher).score(teacher.pieces(QUERIES), teacher.pieces(PASSAGES), which)
    wanted = np.stack(score_rows(teacher, [(query, [PASSAGES[i] for i in which]) for query in QUERIES]))
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-4)
    assert not found.requires_grad


def test_longer_texts_are_cut_and_processes_see_all_passages(encoder_dir):
    teacher = load_teacher(encoder_dir, "maxsim", max_tokens=8, fp32=True)
    long, short = (np.arange(20, 40), np.array([20])), (np.arange(20, 26), np.array([6]))
    alone, which = Distillation(teacher), torch.tensor([0])
    torch.testing.assert_close(alone.score(long, long, which), alone.score(short, short, which))
    twice = Distillation(teacher, lambda tensor: torch.cat([tensor, tensor]))
    torch.testing.assert_close(twice.score(long, long, which), alone.score(long, long, which).repeat(1, 2))


def test_a_cross_encoder_compares_no_batch(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertForSequenceClassification"]}))
    with pytest.raises(InputError, match=r"a cross-encoder, and distil wants an encoder: .* scripts/score.py"):
        Distillation.load(tmp_path, "sum", "tokens", {}, torch.device("cpu"))
