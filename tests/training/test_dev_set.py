"""Evaluation while training: what the finished model gives, and no other training."""

import json

import numpy as np
import pytest
from toy_training import train

from model import ColBERT
from nanocolbert.training.log import read_log


def test_evaluation_while_training(train_arguments, toy_dir, tmp_path):
    dev = {"queries": "queries.tsv", "qrels": "qrels.tsv", "candidates": "candidates.tsv"}
    flags = [part for name, file in dev.items() for part in (f"--dev_{name}", toy_dir / file)]
    folder = tmp_path / "model"
    with_dropout = (*train_arguments, "--dropout", 0.1)
    with_dev = train(with_dropout, folder, *flags, "--eval_steps", 3)
    lines = [line for line in read_log(folder / "log.jsonl") if "dev_mrr@10" in line]
    assert [line["step"] for line in lines] == [3, 6, 8]
    values = [line["dev_mrr@10"] for line in lines]
    assert all(0 < value <= 1 for value in values)
    meta = json.loads((folder / "meta.json").read_text())
    best = json.loads((folder / "best/meta.json").read_text())
    assert meta["best_dev_mrr@10"] == best["dev_mrr@10"] == max(values)
    assert best["step"] == lines[values.index(max(values))]["step"]

    # The last value is what the finished model gives by hand.
    model = ColBERT.from_pretrained(folder)
    rows = {name: [line.split("\t") for line in (toy_dir / name).read_text().splitlines()] for name in dev.values()}
    passages = dict(line.split("\t") for line in (toy_dir / "collection.tsv").read_text().splitlines())
    relevant = {qid: pid for qid, _, pid, _ in rows["qrels.tsv"]}
    scores = model.score([text for _, text in rows["queries.tsv"]], list(passages.values()))
    ranks = []
    for (qid, _), row in zip(rows["queries.tsv"], scores, strict=True):
        own = list(passages).index(relevant[qid])
        ranks.append(1 + int((row > row[own]).sum()))
    mrr = np.mean([1 / rank if rank <= 10 else 0 for rank in ranks])
    assert values[-1] == pytest.approx(mrr, abs=0.05)  # bf16, batched otherwise: near ties may change places

    # Looking does not change what is seen: dropout comes on again.
    assert with_dev == pytest.approx(train(with_dropout, tmp_path / "without"), rel=1e-6)
