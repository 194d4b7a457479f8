"""The projection: its first rows are the principal directions, whatever else it is made of."""

import torch

from model import ColBERT
from nanocolbert.text import tokenize


def test_project_on_principal(encoder_dir, fp32):
    colbert = ColBERT.from_base(encoder_dir, dim=8).eval()
    texts = ["the old boat, and a drum", "eagle", "grape flute cloud", "apple apple house"]
    pieces = tokenize(colbert.tokenizer, texts, 180)
    colbert.project_on_principal(*pieces)
    weight = colbert.linear.weight.detach()
    assert torch.allclose(weight @ weight.T, torch.eye(8), atol=1e-5)
    ids, mask = colbert.frame_passages(*pieces)
    with torch.no_grad():
        hidden = colbert.encoder(ids, mask).last_hidden_state[colbert.kept(ids, mask)]
    hidden = torch.nn.functional.normalize(hidden, dim=-1)
    singular = torch.linalg.svdvals(hidden)
    assert torch.allclose((hidden @ weight.T).square().sum(), singular[:8].square().sum(), rtol=1e-4)
