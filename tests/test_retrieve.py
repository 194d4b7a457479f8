"""retrieve: at full effort the index finds what brute force finds, and brute force is three loops."""

import gzip
import json
import os
import shutil
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from conftest import call_stage, launch_cli, run_stage_cli, succeed

from model import ColBERT
from nanocolbert.cli import InputError
from nanocolbert.index.knobs import Depths
from nanocolbert.storage import runs
from nanocolbert.storage.artifact import lock
from nanocolbert.storage.documents import read_queries
from nanocolbert.storage.ragged import Ids, Ragged
from search import Searcher

FULL = ("--nprobe", 4, "--faiss_depth", 5000, "--rerank_depth", 40)  # more than there is: FAISS answers with -1


@pytest.fixture(scope="session")
def truth(embedding_dir, model_dir, toy_dir) -> dict[str, dict[str, float]]:
    """MaxSim of every query with every passage, by loops over the stored embeddings."""
    model, stored = ColBERT.from_pretrained(model_dir), Ragged(embedding_dir)
    pids = Ids(embedding_dir / "pids.npy").text(np.arange(len(stored)))
    scores = {}
    for qid, text in read_queries(toy_dir / "queries.tsv").items():
        query = model.encode_queries([text])[0].numpy()
        scores[qid] = {
            pid: sum(max(float(q @ d) for d in stored[row].astype(np.float32)) for q in query)
            for row, pid in enumerate(pids)
        }
    return scores


def read_scores(path) -> dict[str, dict[str, float]]:
    found = {}
    for line in path.read_text().splitlines():
        qid, _, pid, _, score, _ = line.split()
        found.setdefault(qid, {})[pid] = float(score)
    return found


def assert_is_top(found: dict, truth: dict, k: int) -> None:
    assert found.keys() == truth.keys()
    for qid, ranking in found.items():
        assert len(ranking) == min(k, len(truth[qid]))
        for pid, score in ranking.items():
            assert score == pytest.approx(truth[qid][pid], abs=0.05)  # queries are batched otherwise, perhaps in bf16
        assert min(ranking.values()) >= sorted(truth[qid].values())[-len(ranking)] - 0.05


@pytest.mark.parametrize("how", [("--exact",), FULL, (*FULL, "--batch_size", 3)])
def test_full_effort_is_three_loops(search_arguments, truth, tmp_path, how):
    succeed(call_stage("retrieve.py", *search_arguments, "--output", tmp_path / "run", *how))
    assert_is_top(read_scores(tmp_path / "run"), truth, 15)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_default_effort_is_full_on_a_small_collection(search_arguments, tmp_path):
    for name, how in (("exact", ["--exact"]), ("index", ["--nprobe", 4])):
        succeed(call_stage("retrieve.py", *search_arguments, "--output", tmp_path / name, *how))
    exact, found = read_scores(tmp_path / "exact"), read_scores(tmp_path / "index")
    assert all(exact[qid].keys() == found[qid].keys() for qid in exact)


def test_little_effort_loses_passages_and_nothing_else(search_arguments, truth, tmp_path):
    effort = ("--nprobe", 1, "--faiss_depth", 2, "--rerank_depth", 5)
    succeed(call_stage("retrieve.py", *search_arguments, "--output", tmp_path / "run", *effort))
    for qid, ranking in read_scores(tmp_path / "run").items():
        assert 1 <= len(ranking) <= 5
        for pid, score in ranking.items():
            assert score == pytest.approx(truth[qid][pid], abs=0.05)


@pytest.mark.parametrize(
    "shape", ["{q}\t{p}", "{q}\t{p}\ttext of the query\ttext", "{q}\t{p}\t{r}", "{q} Q0 {p} {r} 0 x"]
)
def test_candidates_are_all_that_is_scored(search_arguments, truth, tmp_path, shape):
    wanted = {qid: [f"p{(i * 7 + j) % 40}" for j in (3, 0, 9)] for i, qid in enumerate(truth)}
    lines = [shape.format(q=q, p=p, r=r) for q, pids in wanted.items() for r, p in enumerate(pids, 1)]
    (tmp_path / "candidates").write_text("\n".join(lines) + "\nq-unknown\tp1\n" * (shape == "{q}\t{p}"))
    flags = ("--candidates", tmp_path / "candidates", "--output", tmp_path / "run")
    succeed(call_stage("retrieve.py", *search_arguments, *flags))
    expected = {qid: {pid: truth[qid][pid] for pid in pids} for qid, pids in wanted.items()}
    assert_is_top(read_scores(tmp_path / "run"), expected, 15)


def test_more_asked_than_there_is_and_an_empty_query(search_arguments, tmp_path):
    (tmp_path / "queries").write_text("empty\t\nword\tapple\n")
    for how in ("--exact", "--no-exact"):
        flags = ("--queries", tmp_path / "queries", "--k", 1000, "--output", tmp_path / "run", how, "--nprobe", 4)
        succeed(call_stage("retrieve.py", *search_arguments, *flags))
        assert {qid: len(ranking) for qid, ranking in read_scores(tmp_path / "run").items()} == {
            "empty": 40,
            "word": 40,
        }


def test_msmarco_format(search_arguments, tmp_path):
    succeed(call_stage("retrieve.py", *search_arguments, "--format", "msmarco", "--output", tmp_path / "run"))
    assert tmp_path.joinpath("run").read_text().splitlines()[0].split("\t")[2] == "1"
    assert all(len(ranking) == 15 for ranking in runs.read_run(tmp_path / "run").values())


def test_two_processes_rank_alike(search_arguments, tmp_path):
    assert search_arguments[0] == "--cpu"
    succeed(run_stage_cli("retrieve.py", *search_arguments, "--output", tmp_path / "one", *FULL))
    (tmp_path / "two.gz.partial.7").write_text("of processes that were killed\n")
    done = succeed(launch_cli(2, "retrieve.py", *search_arguments[1:], "--output", tmp_path / "two.gz", *FULL))
    (tmp_path / "two").write_bytes(gzip.decompress((tmp_path / "two.gz").read_bytes()))
    one, two = (read_scores(tmp_path / name) for name in ("one", "two"))
    assert_is_top(two, one, 15)
    assert json.loads(done.stdout.splitlines()[-1])["queries"] == len(one)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two", "two.gz"]


def test_one_run_wins(search_arguments, tmp_path):
    """While another process writes the same file."""
    output, left = tmp_path / "run", tmp_path / "run.partial.3"
    descriptor = lock(tmp_path / "run.partial", output, os.O_CREAT | os.O_RDWR)
    left.write_text("a share")
    done = call_stage("retrieve.py", *search_arguments, "--output", output)
    assert done.returncode == 2 and "another process is writing it" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not output.exists() and left.exists()
    os.close(descriptor)
    succeed(call_stage("retrieve.py", *search_arguments, "--output", output))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_equal_passages_are_ranked_in_their_order(model_dir, embedding_dir, tmp_path, monkeypatch):
    """However they are searched, also at the border of k, of blocks, and of steps."""
    source, meta = tmp_path / "embeddings", json.loads((embedding_dir / "meta.json").read_text())
    source.mkdir()
    values = Ragged(embedding_dir)[3]
    np.save(source / "values.npy", np.tile(values, (40, 1)))
    np.save(source / "offsets.npy", np.arange(41) * len(values))
    np.save(source / "pids.npy", np.arange(40))
    del meta["files"], meta["checksum"]
    (source / "meta.json").write_text(json.dumps(meta | {"passages": 40, "embeddings": 40 * len(values)}))
    flags = ("--method", "ivfpq", "--nlist", 1, "--m", 8, "--nbits", 4)
    succeed(call_stage("build_index.py", "--embedding_dir", source, "--output_dir", tmp_path / "index", *flags))
    searcher = Searcher(tmp_path / "index", model_dir, "cpu")
    monkeypatch.setattr("nanocolbert.index.exact.EXACT_PASSAGES", 7)
    monkeypatch.setattr("nanocolbert.index.exact.EXACT_TOKENS", 5 * len(values))
    queries, index = searcher.encode(["red apple", "the sea"]), searcher.index
    for k in (1, 6, 40):
        for ranking in (*index.rank(queries, None, k), *index.rank(queries, [np.arange(40)[::-1].copy()] * 2, k)):
            assert ranking[0].tolist() == list(range(k))
        rows = index.candidates(queries, Depths(1, 10**4, k))
        assert all(found.tolist() == list(range(k)) for found in rows)


def test_a_run_file_is_no_input(search_arguments, index_dir, model_dir, toy_dir, tmp_path):
    queries = shutil.copy(toy_dir / "queries.tsv", tmp_path / "queries.tsv")
    (tmp_path / "candidates").write_text("q0\tp1\n")
    for output, message in (
        (queries, "holds what is read"),
        (tmp_path / "candidates", "holds what is read"),
        (tmp_path, "a folder"),
        (index_dir / "faiss.index", "inside"),
        (model_dir / "run", "inside"),
    ):
        flags = ("--queries", queries, "--candidates", tmp_path / "candidates", "--output", output)
        done = call_stage("retrieve.py", *search_arguments, *flags)
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    (tmp_path / "candidates").write_text("other\tp1\n")
    flags = ("--candidates", tmp_path / "candidates", "--output", tmp_path / "run")
    done = call_stage("retrieve.py", *search_arguments, *flags)
    assert done.returncode == 2 and "no candidates of any query" in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [("--k", 0), ("--k", -5), ("--tag", "my run"), ("--tag", ""), ("--faiss_depth", 0)])
def test_flags_that_would_write_odd_runs(search_arguments, tmp_path, flags):
    done = call_stage("retrieve.py", *search_arguments, *flags, "--output", tmp_path / "run")
    assert done.returncode == 2 and f"argument {flags[0]}" in done.stderr and not list(tmp_path.iterdir())


def unlist(folder) -> dict:
    """The meta.json of a folder, once it lists no files."""
    meta = json.loads((folder / "meta.json").read_text())
    del meta["files"], meta["checksum"]
    (folder / "meta.json").write_text(json.dumps(meta))
    return meta


def test_damaged_index(index_dir, model_dir, tmp_path):
    folder = shutil.copytree(index_dir, tmp_path / "index")
    path, data = folder / "faiss.index", (index_dir / "faiss.index").read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(InputError, match=r"faiss\.index: .* bytes, should be"):
        Searcher(folder)
    meta = unlist(folder)
    for damaged, message in ((data[: len(data) // 9], "damaged"), (b"", "damaged"), (b"X" + data[1:], "damaged")):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=message):
            Searcher(folder, model_dir, "cpu").search("drum")
    faiss.write_index(faiss.IndexFlatIP(16), str(path))
    with pytest.raises(InputError, match=r"faiss\.index: 0 x 16, not"):
        Searcher(folder, model_dir, "cpu").search("drum")
    (folder / "meta.json").write_text(json.dumps(meta | {"tokenizer_fingerprint": "another"}))
    with pytest.raises(InputError, match="another tokenizer"):
        Searcher(folder, model_dir, "cpu")
    np.save(folder / "pids.npy", np.load(folder / "pids.npy")[:0])
    with pytest.raises(InputError, match=r"pids\.npy: of shape 0, not 40"):
        Searcher(folder, model_dir, "cpu")


def test_embeddings_without_an_index(search_arguments, embedding_dir, tmp_path):
    flags = ("--index_dir", embedding_dir, "--output", tmp_path / "run")
    succeed(call_stage("retrieve.py", *search_arguments, *flags, "--exact"))
    (tmp_path / "run").unlink()
    done = call_stage("retrieve.py", *search_arguments, *flags)
    assert done.returncode == 2 and "run build_index.py, or use --exact" in done.stderr
    assert not list(tmp_path.iterdir())


def test_refusals(search_arguments, model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "other")
    model = ColBERT.from_pretrained(model_dir)
    torch.nn.init.normal_(model.linear.weight)
    model.save_pretrained(tmp_path / "other")
    (tmp_path / "candidates").write_text("q0\tp1\nq0\tp999\n")
    for flags, message in (
        (("--model", tmp_path / "other"), "made from another model"),
        (("--index_dir", tmp_path), "not a finished index folder"),
        (("--candidates", tmp_path / "candidates"), "candidates:2: pid 'p999' is not in the collection"),
        (("--queries", tmp_path / "none.tsv"), "none.tsv: no such file"),
    ):
        done = call_stage("retrieve.py", *search_arguments, "--output", tmp_path / "run", *flags)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists() and not (tmp_path / "run.partial").exists()


# ------------------------------------------------------------------------------------------------- compressed index


@pytest.fixture(scope="module")
def queries_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("queries") / "queries.tsv"
    path.write_text("q1\tred apple\nq2\tthe sea\n")
    return path


def read_rankings(path: Path) -> list[tuple[str, str]]:
    return [tuple(line.split()[:3:2]) for line in path.read_text().splitlines()]


def test_the_stages_agree_with_the_notebook(codes_dir, model_dir, queries_file, tmp_path):
    flags = ["--cpu", "--index_dir", codes_dir, "--queries", queries_file, "--k", 5]  # the model is found by itself
    succeed(call_stage("retrieve.py", *flags, "--output", tmp_path / "run", "--quality", "best"))
    searcher = Searcher(codes_dir, model_dir, "cpu")
    hits = searcher.search(["red apple", "the sea"], k=5, quality="best")
    expected = [(qid, hit.pid) for qid, found in zip(("q1", "q2"), hits, strict=True) for hit in found]
    assert read_rankings(tmp_path / "run") == expected
    succeed(call_stage("retrieve.py", *flags, "--output", tmp_path / "run", "--exact", "--by_codes"))
    assert read_rankings(tmp_path / "run") == expected
    (tmp_path / "candidates").write_text("".join(f"{qid}\t{pid}\n" for qid, pid in expected))
    flags += ["--candidates", tmp_path / "candidates", "--by_codes"]
    succeed(call_stage("retrieve.py", *flags, "--output", tmp_path / "run"))
    assert read_rankings(tmp_path / "run") == expected


def test_exact_is_not_by_codes_unless_asked_for(codes_dir, model_dir, queries_file, toy_dir, tmp_path):
    flags = ["--cpu", "--model", model_dir, "--index_dir", codes_dir, "--queries", queries_file, "--k", 5]
    (tmp_path / "candidates").write_text("q1\tp1\n")
    for how in (["--exact"], ["--candidates", tmp_path / "candidates"]):
        done = call_stage("retrieve.py", *flags, *how, "--output", tmp_path / "run")
        assert done.returncode == 2 and "keeps no vectors" in done.stderr and "--keep_vectors" in done.stderr
        assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()
    done = succeed(call_stage("retrieve.py", *flags, *how, "--by_codes", "--output", tmp_path / "run"))
    assert "no candidates for 1 of 2 queries, q2 among them" in done.stderr
    done = call_stage("retrieve.py", *flags, "--by_codes", "--output", tmp_path / "run")
    assert done.returncode == 2 and "leave it out" in done.stderr
    with pytest.raises(InputError, match="keeps no vectors"):
        Searcher(codes_dir, model_dir, "cpu").search("red apple", exact=True)
