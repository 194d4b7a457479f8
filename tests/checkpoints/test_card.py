"""The card, and what is uploaded."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from model import ColBERT
from nanocolbert.checkpoints import layouts

pytestmark = pytest.mark.usefixtures("fp32")  # as the libraries computed

META = {"base_model": "nreimers/MiniLM", "steps": 400, "loss_of_last_100_steps": 0.25, "best_dev_mrr@10": 0.77}
META |= {"args": {"tokens_dir": "/home/me/data/tokens", "batch_size": 32, "lr": 3e-6}, "versions": {"torch": "2.13"}}


def test_push_to_hub(colbert, monkeypatch):
    """What is uploaded opens again, in the layout asked for, and its card tells data, steps and metrics."""
    api, seen = mock.Mock(), {}
    api.create_repo.return_value = "https://hub/me/model"

    def upload_folder(repo_id, folder_path, commit_message):
        seen["card"] = (Path(folder_path) / "README.md").read_text()
        seen["model"] = ColBERT.from_pretrained(folder_path)
        seen["layout"] = layouts.detect(Path(folder_path))

    api.upload_folder.side_effect = upload_folder
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    monkeypatch.setattr(colbert, "meta", META)
    assert colbert.push_to_hub("me/model", layout="pylate", private=True) == "https://hub/me/model"
    api.create_repo.assert_called_once_with("me/model", exist_ok=True, private=True)
    assert seen["layout"] == "pylate"
    assert all(torch.equal(weight, colbert.state_dict()[name]) for name, weight in seen["model"].state_dict().items())
    for text in ("| steps | 400 |", "| MRR@10 on the dev candidates | 0.77 |", "| data | data/tokens |"):
        assert text in seen["card"]
    assert 'models.ColBERT("me/model")' in seen["card"] and 'base_model: "nreimers/MiniLM"' in seen["card"]
    assert "/home/me" not in seen["card"]
