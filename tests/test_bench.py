"""Benchmarks: the fast way of training comes to what the plain one comes to; pictures are drawn of what there is."""

import gzip
import importlib
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
from conftest import ROOT, run_stage_cli, succeed

from nanocolbert.storage.ragged import Ragged


def test_fast_training_is_as_good(tokens_dir, encoder_dir, toy_dir, tmp_path):
    arguments = {"--tokens_dir": tokens_dir, "--base_model": encoder_dir, "--results": tmp_path, "--seeds": 3}
    arguments |= {"--queries": toy_dir / "queries.tsv", "--qrels": toy_dir / "qrels.tsv", "--every": 1}
    arguments |= {"--max_steps": 4, "--dim": 16, "--warmup_steps": 1, "--batch_size": 4}
    succeed(run_stage_cli("bench/bench_quality.py", *(part for pair in arguments.items() for part in pair)))
    line = json.loads((tmp_path / "quality.jsonl").read_text())
    assert [row["way"] for row in line["rows"]] == ["padded", "fast"]
    difference = line["differences"][0]
    assert difference["questions"] == 16 and difference["largest_loss_difference"] < 0.05


def test_training_step(encoder_dir, toy_dir, tmp_path):
    arguments = {"--model": encoder_dir, "--collection": toy_dir / "collection.tsv", "--results": tmp_path}
    arguments |= {"--queries": toy_dir / "queries.tsv", "--n_passages": 30, "--n_triples": 8, "--batch_size": 4}
    arguments |= {"--warmup": 0, "--steps": 1, "--repeats": 1}
    succeed(run_stage_cli("bench/bench_train.py", *(part for pair in arguments.items() for part in pair)))
    rows = json.loads((tmp_path / "train.jsonl").read_text())["rows"]
    assert [row["way"] for row in rows if row["way"] != "ours_fp32"] == ["reference", "ours"]  # where "ours" is not
    assert len({row["tokens_a_step"] for row in rows}) == 1


def test_search_against_exact(embedding_dir, tmp_path):
    vectors, queries = Ragged(embedding_dir), tmp_path / "queries.npy"
    np.save(queries, np.stack([vectors.values[start : start + 8] for start in (0, 30, 60)]).astype(np.float32))
    arguments = ["--embedding_dir", embedding_dir, "--n_passages", 39, "--queries", queries, "--results", tmp_path]
    arguments += ["--rounds", 1, "--work", tmp_path, "--systems", "ours-2-vectors", "exact", "plaid-2"]
    succeed(run_stage_cli("bench/bench_search.py", *arguments))
    rows = json.loads((tmp_path / "search.jsonl").read_text())["rows"]
    steps = ["fast", "nprobe 16, n_coarse 2000", "default", "nprobe 48, n_coarse 6400", "best"]
    assert [row["setting"] for row in rows] == [*steps, "every passage"]  # no PLAID without its environment
    assert [row["recall_at_10"] for row in rows[-2:]] == [1, 1] and rows[0]["bytes_per_token"] > 32
    succeed(run_stage_cli("bench/plot.py", "--results", tmp_path))
    assert (tmp_path / "search.png").is_file()


def test_pooling(model_dir, toy_dir, tmp_path):
    arguments = [
        "--models",
        model_dir,
        "--data",
        toy_dir,
        "--n_passages",
        35,
        "--results",
        tmp_path,
        "--work",
        tmp_path,
    ]
    succeed(run_stage_cli("bench/bench_pooling.py", *arguments, "--factors", 1, 3, "--bits", 4))
    line = json.loads((tmp_path / "pooling.jsonl").read_text())
    assert (line["passages"], line["queries"]) == (35, 16)
    rows = line["rows"]
    assert [(row["factor"], row["bits"]) for row in rows] == [(1, 16), (1, 4), (3, 16), (3, 4)]
    assert rows[2]["bytes_per_passage"] < rows[0]["bytes_per_passage"] / 2
    assert rows[0]["ndcg_at_10"] > 0.2  # every query's passage has its topic
    succeed(run_stage_cli("bench/plot.py", "--results", tmp_path))
    assert (tmp_path / "pooling.png").is_file()


def test_server_under_load(codes_dir, model_dir, toy_dir, tmp_path):
    pytest.importorskip("fastapi", reason="serve.py's packages are optional: pip install -r requirements-serve.txt")
    arguments = ["--index_dir", codes_dir, "--model", model_dir, "--queries", toy_dir / "queries.tsv", "--k", 5]
    arguments += ["--clients", 1, 3, "--seconds", 0.3, "--results", tmp_path, "--work", tmp_path]
    succeed(run_stage_cli("bench/bench_serve.py", *arguments))
    line = json.loads((tmp_path / "serve.jsonl").read_text())
    assert [(row["clients"], row["changes"] > 0) for row in line["rows"]] == [(1, 0), (3, 0), (1, 1), (3, 1)]
    assert all(row["searches"] and not row["failed"] and not row["wrong"] for row in line["rows"])
    assert line["killed"]["wrong"] == 0 and line["killed"]["searches"] == 16 and line["memory"]["private_mb"] > 0


def test_pictures_of_what_was_measured(tmp_path):
    for name, found in (("all", ROOT / "results/bench"), ("none", tmp_path)):
        (tmp_path / name).mkdir()
        for path in found.glob("*.jsonl"):
            shutil.copyfile(path, tmp_path / name / path.name)
        done = succeed(run_stage_cli("bench/plot.py", "--results", tmp_path / name))
        assert (tmp_path / name / "speed.png").is_file() == (name == "all"), done.stdout


def test_documents_and_their_disk(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    from bench_documents import STAGES, disk, write_jsonl

    (tmp_path / "pids.tsv").write_text("7\tA boat\t0\ttrain\n8\tA drum\t1\tdev\n")
    (tmp_path / "collection.tsv").write_text("7\tIt floats \u2013.\n8\tIt sounds.\n")
    assert write_jsonl(tmp_path, tmp_path / "all.jsonl", None) == 2 and write_jsonl(tmp_path, tmp_path / "one", 1) == 1
    first = json.loads((tmp_path / "all.jsonl").read_text().splitlines()[0])
    assert first == {"id": "7", "title": "A boat", "text": "It floats \u2013."}

    for name in STAGES:
        (tmp_path / name).mkdir()
    (tmp_path / "embeddings/values.npy").write_bytes(bytes(3_000_000))
    os.link(tmp_path / "embeddings/values.npy", tmp_path / "index/values.npy")
    (tmp_path / "index/codes.npy").write_bytes(bytes(500_000))
    assert disk(tmp_path) == {"tokens": 0, "embeddings": 3, "index": 3.5, "in_all": 3.5}


def test_a_way_of_training(toy_dir, encoder_dir, tmp_path, monkeypatch):
    """A row of bench/quality.py from files to its result; the second time nothing is made again."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    quality = importlib.import_module("quality")
    for folder in ("squad", "cranfield"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for name in ("collection", "queries", "qrels"):
            text = re.sub(r"\b[pq](\d+)\b", r"\1", (toy_dir / f"{name}.tsv").read_text())
            for copy in (f"{name}.tsv", f"{name}.train.tsv"):
                (tmp_path / "data" / folder / copy).write_text(text)
    rows = re.sub("[pq]", "", (toy_dir / "triples.tsv").read_text())
    with gzip.open(tmp_path / "data" / "squad" / "qidpidtriples.train.tsv.gz", "wt") as file:
        file.write(rows + f"1\t{quality.HELD_OUT}\t2\n")
    config, array = tmp_path / "config.sh", quality.array
    config.write_text(
        f'BASE_MODEL="{encoder_dir}"\nTOKENS=(--query_maxlen 16 --doc_maxlen 40)\nTRAIN=(--dim 16 --batch_size 8 '
        "--loss in_batch --lr 1e-3 --max_steps 9 --warmup_steps 1 --wandb_mode disabled --mixed_precision no --cpu)\n"
    )
    monkeypatch.setattr(quality, "array", lambda _, name: array(str(config), name))
    monkeypatch.setattr(quality, "WORK", tmp_path / "work")
    monkeypatch.setattr(quality, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(quality, "REPO", tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["quality.py", "untrained", "--data", str(tmp_path / "data"), "--only", "cranfield"]
    )
    (tmp_path / "work" / "bm25").mkdir(parents=True)
    (tmp_path / "work" / "bm25" / "cranfield.run").write_text("0 Q0 30 1 1.0 none\n")
    quality.main(quality.parse_args())
    result = json.loads((tmp_path / "results" / "untrained.json").read_text())
    found = result["collections"]["cranfield"]
    assert found["queries"] == 16 and found["measure"] == "nDCG@10"
    assert found["bm25"]["difference"] == pytest.approx(found["seeds"][0], abs=1e-3) and 0 < found["bm25"]["p"] <= 1
    assert [one["seed"] for one in result["training"]] == [1]
    assert (tmp_path / "work" / "triples.tsv").read_text() == rows  # not what touches held-out paragraphs
    assert not (tmp_path / "work" / "untrained" / "1" / "made").exists()
    monkeypatch.setattr(quality, "run_command", lambda *_, **__: pytest.fail("made again"))
    quality.main(quality.parse_args())
    again = json.loads((tmp_path / "results" / "untrained.json").read_text())
    assert again["collections"]["cranfield"]["seeds"] == found["seeds"]
    config.write_text(config.read_text().replace("1e-3", "2e-3"))
    with pytest.raises(SystemExit, match="was made by other arguments: remove "):
        quality.main(quality.parse_args())
