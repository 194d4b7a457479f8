"""On a GPU: all stages give what a CPU gives in fp32, within the rounding of 16 bits. Skipped where there is none."""

import numpy as np
import pytest
import torch
from conftest import run_stage_cli, succeed
from made import EVERYTHING, NLIST, block, make_index, make_passages, make_query, search_one

from model import ColBERT
from nanocolbert.encoder.attention import packable
from nanocolbert.encoder.batches import to_device
from nanocolbert.index.codec import Codec
from nanocolbert.index.compressed import CompressedIndex
from nanocolbert.index.gpu_index import GpuIndex
from nanocolbert.maxsim import maxsim, maxsim_packed
from nanocolbert.storage.ragged import Ragged
from nanocolbert.training.log import read_log
from nanocolbert.training.losses import Objective
from nanocolbert.training.triples import Triples, collate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_batch(tokens_dir, model_dir, dtype):
    data, results, ways = Triples(tokens_dir, 8, None), [], (("cpu", torch.float32), ("cpu", dtype), ("cuda", dtype))
    for device, compute_dtype in ((torch.device(name), compute_dtype) for name, compute_dtype in ways):
        model = ColBERT.from_pretrained(model_dir).to(device)
        packed = packable(model.encoder, device, dtype)
        assert packed == (device.type == "cuda")
        batch = to_device(collate(data, data.rows(0), model, 64, packed), device)
        with torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32):
            Q, P = (part.float() for part in model(**batch["inputs"]))
        loss = Objective(["in_batch"])(Q, P, batch["mask"], batch["rows"])["loss"]
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        results.append([Q.cpu(), P[batch["mask"]].cpu(), torch.cat([part.flatten().cpu() for part in gradients])])
    for exact, rounded, on_gpu in zip(*results, strict=True):
        apart = [1 - torch.cosine_similarity(exact.flatten(), part.flatten(), dim=0) for part in (rounded, on_gpu)]
        assert apart[1] < 1.5 * apart[0] + 1e-4 < 0.1  # no further than the same type's rounding on a CPU


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


@pytest.mark.parametrize("kind", ["queries", "passages"])
def test_encoding(model_dir, kind):
    texts = ["find the boat", "", "drum, eagle?", "the house " * 90] * 20
    on_gpu, on_cpu = (ColBERT.from_pretrained(model_dir, device=device) for device in ("cuda", "cpu"))
    full, fast, expected = (
        torch.cat(list(getattr(model, f"encode_{kind}")(texts, fp32=fp32))).float()
        for model, fp32 in ((on_gpu, True), (on_gpu, False), (on_cpu, True))
    )
    assert torch.allclose(full, expected, atol=1e-4)
    assert torch.nn.functional.cosine_similarity(fast, expected, dim=-1).min() > 0.99


def test_maxsim():
    lengths = torch.tensor([5, 1, 9, 30])
    queries, passages = torch.randn(3, 32, 16), torch.randn(int(lengths.sum()), 16)
    expected = maxsim_packed(queries, passages, lengths)
    found = maxsim_packed(queries.cuda(), passages.cuda(), lengths.cuda()).cpu()
    assert torch.allclose(found, expected, atol=1e-3)
    mask = torch.arange(30) < lengths[:, None]
    padded = torch.zeros(4, 30, 16)
    padded[mask] = passages
    assert torch.allclose(maxsim(queries.cuda(), padded.cuda(), mask.cuda()).cpu(), expected, atol=1e-3)


@pytest.mark.parametrize(("bits", "vectors"), [(1, False), (2, True), (4, False)])
def test_compressed_index(tmp_path, bits, vectors):
    codec = Codec.train(*make_passages(300, 1), bits, NLIST, 0, torch.device("cuda"))
    folder = make_index(tmp_path / "index", codec, block(200, 2), vectors=vectors)
    ours, theirs = GpuIndex(folder, "cuda"), CompressedIndex(folder)
    for seed in range(3):
        query = make_query(20, seed)
        (rows, scores), (found, found_scores) = (search_one(index, query, 10, EVERYTHING) for index in (theirs, ours))
        assert np.allclose(scores, found_scores, atol=0.1) and len(set(rows) & set(found)) >= 9


def test_search_stages(tmp_path, model_dir, embedding_dir, toy_dir):
    """build_index.py and retrieve.py, with the index on the GPU and on the CPU: the same best passages."""
    runs = []
    succeed(run_stage_cli("build_index.py", "--embedding_dir", embedding_dir, "--output_dir", tmp_path / "index"))
    common = ("--model", model_dir, "--index_dir", tmp_path / "index", "--queries", toy_dir / "queries.tsv", "--k", 5)
    for flags in (("--gpu_index",), ("--cpu",)):
        output = tmp_path / flags[0]
        succeed(run_stage_cli("retrieve.py", *common, *flags, "--output", output))
        runs.append([line.split()[:3] for line in output.read_text().splitlines()])
    same = sum(row in runs[1] for row in runs[0])
    assert len(runs[0]) == len(runs[1]) and same >= 0.9 * len(runs[0])
