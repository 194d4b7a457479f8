"""Batches of a size for the device."""

import torch

from model import ColBERT
from nanocolbert.encoder.batches import tokens_per_batch


def test_other_devices_have_a_batch_size(colbert, monkeypatch):
    monkeypatch.setattr(ColBERT, "device", torch.device("mps"))
    assert tokens_per_batch(colbert.device, 10) > 0 and not colbert.packs()
    assert colbert.autocast()._enabled is False
