"""update_index: passages added, deleted and compacted by the stage, and refusals that change nothing."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import call_stage, succeed

from model import ColBERT
from search import Index, Searcher


def test_update_stage(codes_dir, model_dir, toy_dir, tmp_path):
    texts = {"new2": "green apple"} | dict(
        line.split("\t") for line in (toy_dir / "collection.tsv").read_text().splitlines()
    )
    index = shutil.copytree(codes_dir, tmp_path / "index")
    (tmp_path / "more.tsv").write_text("new1\tred apple red apple\nnew2\tgreen apple\n")
    flags = ["--index_dir", index, "--model", model_dir, "--cpu"]
    done = succeed(call_stage("update_index.py", *flags, "--add", tmp_path / "more.tsv"))
    assert json.loads(done.stdout.splitlines()[-1])["changed"] == 2
    pids = [hit.pid for hit in Searcher(index, model_dir, "cpu").search("red apple", k=100)]
    assert {"new1", "new2"} <= set(pids)
    (tmp_path / "pids.txt").write_text("new1\n" + pids[-1] + "\n")
    succeed(call_stage("update_index.py", "--index_dir", index, "--delete", tmp_path / "pids.txt"))
    succeed(call_stage("update_index.py", "--index_dir", index, "--compact"))
    hits = Searcher(index, model_dir, "cpu").search("red apple", k=100)
    left = set(pids) - {"new1", pids[-1]}
    assert {hit.pid: hit.text for hit in hits} == {pid: texts[pid] for pid in left}  # though the rows have moved
    (tmp_path / "more.tsv").write_text("new2\told boat\n")
    succeed(call_stage("update_index.py", *flags, "--add", tmp_path / "more.tsv", "--replace"))
    hits = Searcher(index, model_dir, "cpu").search("red apple", k=100)
    assert {hit.pid: hit.text for hit in hits} == {pid: texts[pid] for pid in left} | {"new2": "old boat"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--add", "more.tsv"), "more.tsv:2: id 'new1' a second time"),
        (("--add", "nowhere.tsv"), "nowhere.tsv: no such file"),
        (("--delete", "pids.txt"), "pids.txt:1: "),
        (("--delete", "pids.txt", "--replace"), "--replace says nothing without --add"),
        (("--delete", "blank.txt"), "blank.txt:2: id '' is empty"),
    ],
)
def test_refusals_of_updates(codes_dir, model_dir, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    index = shutil.copytree(codes_dir, tmp_path / "index")
    Path("more.tsv").write_text("new1\tred apple\nnew1\tgreen apple\n")
    Path("pids.txt").write_text("nobody\n")
    Path("blank.txt").write_text("1\n\n")
    before = (index / "state.json").read_bytes()
    done = call_stage("update_index.py", "--index_dir", index, "--model", model_dir, "--cpu", *flags)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert (index / "state.json").read_bytes() == before and len(list((index / "segments").iterdir())) == 1


def test_ivfpq_is_not_updated(index_dir):
    done = call_stage("update_index.py", "--index_dir", index_dir, "--compact")
    assert done.returncode == 2 and "IVFPQ, which is not changed" in done.stderr


def test_long_passages_are_refused_before_anything_is_embedded(codes_dir, model_dir, tmp_path, monkeypatch):
    index = shutil.copytree(codes_dir, tmp_path / "index")
    (tmp_path / "more.tsv").write_text("new1\tred apple\nnew2\t" + "house " * 1100 + "\n")
    load = ColBERT.from_pretrained

    def longer(*args, **settings) -> ColBERT:
        model = load(*args, **settings)
        model.config.doc_maxlen = 2000
        return model

    monkeypatch.setattr(ColBERT, "from_pretrained", longer)
    monkeypatch.setattr(ColBERT, "embed_passages", None)
    flags = ("--index_dir", index, "--model", model_dir, "--cpu", "--add", tmp_path / "more.tsv")
    done = call_stage("update_index.py", *flags)
    assert done.returncode == 2 and "more.tsv:2: passage new2 has 1103 embeddings" in done.stderr, done.stderr


def test_the_model_is_found_by_itself(codes_dir, tmp_path):
    index = shutil.copytree(codes_dir, tmp_path / "index")
    (tmp_path / "more.tsv").write_text("new1\told drum\n")
    flags = ["--index_dir", index, "--cpu", "--add", tmp_path / "more.tsv"]
    assert json.loads(succeed(call_stage("update_index.py", *flags)).stdout.splitlines()[-1])["changed"] == 1
    meta = json.loads((index / "meta.json").read_text()) | {"model": "gone", "model_path": "../gone"}
    del meta["checksum"]
    (index / "meta.json").write_text(json.dumps(meta))
    done = call_stage("update_index.py", *flags)
    assert done.returncode == 2 and "its model, gone, is not there" in done.stderr and "--model" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_documents_with_metadata_are_added_and_deleted(encoder_dir, model_dir, tmp_path, monkeypatch):
    """From tsv2mmap.py --passage_words to update_index.py: cut alike, found by fields, deleted as a whole."""
    monkeypatch.chdir(tmp_path)
    rows = [{"id": f"d{i}", "title": "red boat", "text": "An old drum. " * i, "year": 2000 + i} for i in range(1, 6)]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    Path("b.jsonl").write_text(json.dumps({"key": "d5", **rows[4]}) + "\n" + json.dumps({"key": "d1", "text": "apple"}))
    Path("pids.txt").write_text("d4\n")
    flags = ("--collection", "a.jsonl", "--tokenizer", encoder_dir, "--passage_words", 6, "--output_dir", "tokens")
    succeed(call_stage("tsv2mmap.py", *flags, "--workers", 1))
    flags = ("--tokens_dir", "tokens", "--model", model_dir, "--output_dir", "embeddings", "--cpu")
    succeed(call_stage("doc2embedding.py", *flags))
    flags = ("--embedding_dir", "embeddings", "--output_dir", "index", "--nlist", 4, "--keep_vectors")
    succeed(call_stage("build_index.py", *flags))
    shutil.rmtree("embeddings")
    shutil.rmtree("tokens")
    more = ("--add", "b.jsonl", "--id_field", "key", "--replace", "--cpu")
    succeed(call_stage("update_index.py", "--index_dir", "index", *more))
    succeed(call_stage("update_index.py", "--index_dir", "index", "--delete", "pids.txt"))
    succeed(call_stage("update_index.py", "--index_dir", "index", "--compact"))
    searcher = Searcher("index", device="cpu")
    found = {hit.pid: (hit.text, (hit.metadata or {}).get("year")) for hit in searcher.search("drum", k=100)}
    two, one = "red boat An old drum. An old drum.", "red boat An old drum."
    assert found == {
        "d1#1": ("apple", None),
        "d2#1": (two, 2002),
        **{"d3#1": (two, 2003), "d3#2": (one, 2003)},
        **{"d5#1": (two, 2005), "d5#2": (two, 2005), "d5#3": (one, 2005)},
    }
    Path("queries.tsv").write_text("q1\tdrum\n")
    run = ("--index_dir", "index", "--queries", "queries.tsv", "--output", "run", "--by_document", "--k", 2, "--cpu")
    succeed(call_stage("retrieve.py", *run, "--where", "year > 2002"))
    assert {line.split()[2] for line in Path("run").read_text().splitlines()} == {"d3", "d5"}


@pytest.mark.parametrize("factor", [1, 4])
def test_passages_are_pooled_as_those_of_the_index(model_dir, tmp_path, factor):
    """Also where the model has another factor of its own; an explanation goes token by token all the same."""
    model = ColBERT.from_pretrained(model_dir)
    model.config.pool_factor = 2
    text = " ".join(["old boat and blue drum"] * 4)
    counts = {n: int(model.kept_counts(*model.tokenize([text], "passage"), n)[0]) for n in (1, 4)}
    settings = {"bits": 8, "keep_vectors": True, "nlist": 2, "pool_factor": factor}
    searcher = Index.build(tmp_path / "index", model, [text, "red apple"], **settings)
    other = len(model.encode_passages(["red apple"], pool_factor=factor)[0])
    assert searcher.meta["pool_factor"] == factor and searcher.meta["embeddings"] == counts[factor] + other
    searcher.add(["new"], [text])
    (tmp_path / "more.tsv").write_text(f"newer\t{text}\n")
    succeed(call_stage("update_index.py", "--index_dir", tmp_path / "index", "--cpu", "--add", tmp_path / "more.tsv"))
    searcher.reload()
    vectors = searcher.index.vectors(searcher.index.rows(["0", "new", "newer"]))
    assert [len(own) for own in vectors] == [counts[factor]] * 3 and counts[1] > 2 * counts[4]
    for own in vectors:
        assert np.allclose(own, model.encode_passages([text], pool_factor=factor)[0], atol=0.02)
    (found,) = searcher.explain("blue drum", ["0"])
    assert len(found.passage_tokens) == counts[1]
    unpooled = model.encode_passages([text], pool_factor=1)
    assert found.score == pytest.approx(model.score(["blue drum"], unpooled).item(), abs=0.1)
