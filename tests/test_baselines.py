"""Baselines: BM25 finds the obvious, batched mean pooling equals one text at a time; the report shows it."""

import json
import subprocess
import sys
from pathlib import Path

import baselines
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent

WORDS = ["cat", "dog", "sun", "moon", "sea", "ship", "tree", "leaf"]
PASSAGES = ["the cat and the dog", "sun and moon and stars", "ships at sea", "a tree has leaves", "the dog barks"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "collection.tsv").write_text("".join(f"p{i}\t{text}\n" for i, text in enumerate(PASSAGES)))
    (folder / "queries.tsv").write_text("q0\tleaf of a tree\nq1\tship\nq2\tcat dog\nq3\tzebra\n")
    (folder / "qrels.tsv").write_text("q0 0 p3 1\nq1 0 p2 1\n")
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny random BERT, saved with its tokenizer."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    # Weights are drawn wide, so that the vectors of different texts differ by more than bf16 rounds away.
    BertModel(BertConfig(vocab_size=len(tokenizer), initializer_range=0.5, **size)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(script, *arguments):
    command = [sys.executable, f"scripts/{script}.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_bm25_and_report(data):
    arguments = ("--collection", data / "collection.tsv", "--queries", data / "queries.tsv")
    done = run("baselines", "--method", "bm25", *arguments, "--output", data / "run.tsv", "--k", 3)
    assert done.returncode == 0, done.stderr
    ranking = {}
    for line in (data / "run.tsv").read_text().splitlines():
        ranking.setdefault(line.split()[0], []).append(line.split()[2])
    assert ranking == {"q0": ["p3"], "q1": ["p2"], "q2": ["p0", "p4"]}  # stems match; no shared word, no passage

    (data / "bm25.json").write_text(json.dumps({"MRR@10": 1.0, "nDCG@10": 0.5}))
    shown = run(
        "report", f"BM25={data}/bm25.json", "--show_run", data / "run.tsv", *arguments, "--qrels", data / "qrels.tsv"
    )
    assert shown.returncode == 0, shown.stderr
    assert "1.0000" in shown.stdout and "*1. p3: a tree has leaves" in shown.stdout
    wrong = run("report", "--show_run", data / "run.tsv", *arguments, "--qid", "q3")
    assert wrong.returncode == 2 and "no ranking for query 'q3'" in wrong.stderr


def test_bm25_over_fewer_passages_than_k():
    found = list(baselines.search_bm25(["a", "b"], ["one cat", "two dogs"], {"q": "dog"}, k=1000))
    assert [(qid, pids) for qid, pids, _ in found] == [("q", ["b"])]


def test_mean_pool_equals_one_text_at_a_time(encoder):
    import torch
    from transformers import AutoModel, AutoTokenizer

    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, n)) for n in (1, 9, 3, 30, 2, 5, 1)]
    vectors = baselines.load_encoder(str(encoder), max_tokens=12, batch_size=3)(texts)
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
    for text, vector in zip(texts, vectors, strict=True):
        ids = tokenizer(text, truncation=True, max_length=12, return_tensors="pt")
        with torch.no_grad():
            mean = model(**ids).last_hidden_state[0].mean(0).numpy()  # (D,)
        assert abs(np.linalg.norm(vector) - 1) < 1e-5
        assert vector @ mean / np.linalg.norm(mean) > 0.999, text  # bf16 against fp32


def test_search_vectors_merges_chunks(monkeypatch):
    rng = np.random.default_rng(0)
    vectors = {f"text {i}": rng.integers(-2, 3, 4).astype(np.float32) for i in range(50)}  # small integers: many ties
    texts = list(vectors)
    pids, queries = [f"p{i}" for i in range(45)], {f"q{i}": texts[45 + i] for i in range(5)}
    monkeypatch.setattr(baselines, "CHUNK", 7)
    found = list(
        baselines.search_vectors(lambda some: np.stack([vectors[t] for t in some]), pids, texts[:45], queries, 10)
    )
    for qid, ranked, scores in found:
        exact = np.array([vectors[text] @ vectors[queries[qid]] for text in texts[:45]])
        order = np.lexsort((range(45), -exact))
        assert scores == exact[order][:10].tolist() and scores == [exact[pids.index(pid)] for pid in ranked]
        above = [pids[i] for i in order if exact[i] > scores[-1]]  # those equal to the last may be any of its kind
        assert ranked[: len(above)] == above and len(set(ranked)) == 10


def test_mistakes_are_one_line(data):
    (data / "twice.tsv").write_text("p1\tone\np1\ttwo\n")
    for collection, message in (("twice.tsv", "twice.tsv:2: pid 'p1' a second time"), ("none.tsv", "no such file")):
        arguments = ("--collection", data / collection, "--queries", data / "queries.tsv", "--output", data / "x.tsv")
        done = run("baselines", "--method", "bm25", *arguments)
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (data / "x.tsv").exists()
