"""On a GPU: packed texts give what a CPU gives in fp32, within the rounding of 16 bits. Skipped where there is none."""

import numpy as np
import pytest
import torch
from conftest import run_stage_cli, succeed

from attention import packable
from model import ColBERT, to_device
from ragged import Ragged
from train import Triples, collate, read_log, triples_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_batch(tokens_dir, model_dir, dtype):
    data, results = Triples(tokens_dir, 8, None), []
    for device in (torch.device("cpu"), torch.device("cuda")):
        model = ColBERT.from_pretrained(model_dir).to(device)
        packed = packable(model.encoder, device, dtype)
        assert packed == (device.type == "cuda")
        batch = to_device(collate(data, data.rows(0), model, 64, packed), device)
        with torch.autocast(device.type, dtype, enabled=packed):
            Q, P = model(**batch["inputs"])
        loss = triples_loss(Q, P, batch["mask"], batch["passage_rows"], 2.0, True)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        results.append([Q.cpu(), P[batch["mask"]].cpu(), torch.cat([part.flatten().cpu() for part in gradients])])
    for on_cpu, on_gpu in zip(*results, strict=True):
        assert torch.nn.functional.cosine_similarity(on_cpu.flatten(), on_gpu.flatten().float(), dim=0) > 0.999


def test_stages(tmp_path, train_arguments, embedding_arguments, embedding_dir):
    trained = tmp_path / "model"
    succeed(
        run_stage_cli("train.py", *train_arguments, "--output_dir", trained, "--no-cpu", "--mixed_precision", "bf16")
    )
    assert np.isfinite([line["loss"] for line in read_log(trained / "log.jsonl") if "loss" in line]).all()
    succeed(
        run_stage_cli("doc2embedding.py", *embedding_arguments, "--no-cpu", "--output_dir", tmp_path / "embeddings")
    )
    ours, cpus = Ragged(tmp_path / "embeddings"), Ragged(embedding_dir)
    assert np.array_equal(ours.offsets, cpus.offsets)
    assert (np.array(ours.values, np.float32) * np.array(cpus.values, np.float32)).sum(1).min() > 0.99
