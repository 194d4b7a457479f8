"""Searcher, retrieve.py's class for notebooks: what the command line finds, with texts, whatever the index."""

import gzip
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import call_stage, succeed
from test_retrieve import read_scores, unlist

from nanocolbert.cli import InputError
from nanocolbert.storage.documents import read_queries
from retrieve import Searcher


@pytest.fixture(scope="module")
def searcher(index_dir) -> Searcher:
    """As a notebook opens it: the model and the collection are found by themselves."""
    return Searcher(index_dir)


def test_searcher_gives_what_the_command_line_gives(searcher, search_arguments, toy_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    queries, passages = (read_queries(toy_dir / f"{name}.tsv") for name in ("queries", "collection"))
    for flags, effort in (((), {}), (("--exact",), {"exact": True}), (("--nprobe", 1), {"nprobe": 1})):
        succeed(call_stage("retrieve.py", *search_arguments, *flags, "--output", tmp_path / "run"))
        found = searcher.search(list(queries.values()), 15, **effort)
        expected = read_scores(tmp_path / "run")
        assert len(found) == len(expected) == 16
        for hits, (qid, ranking) in zip(found, expected.items(), strict=True):
            assert [hit.pid for hit in hits] == list(ranking), qid
            assert np.allclose([hit.score for hit in hits], list(ranking.values()), atol=1e-3)
            assert [hit.text for hit in hits] == [passages[pid] for pid in ranking]


def test_search_of_one_text_of_several_and_of_none(searcher):
    hits = searcher.search("find the boat", 3)
    assert len(hits) == 3 and hits[0].score >= hits[1].score >= hits[2].score
    both = searcher.search(["find the boat", ""], 3)
    assert [hit.pid for hit in both[0]] == [hit.pid for hit in hits] and len(both[1]) == 3
    assert searcher.search([]) == [] and len(searcher.search("drum")) == 10 and len(searcher.search("drum", 99)) == 40
    assert len(searcher.search(["drum"] * 70, 1)) == 70  # more than a batch
    for k in (0, -1):
        with pytest.raises(InputError, match="ask for at least one passage"):
            searcher.search("drum", k)
    with pytest.raises(InputError, match="text 0 is of type int"):
        searcher.search([1])
    with pytest.raises(InputError, match="nprobes says nothing to IVFPQ"):
        searcher.search("drum", nprobes=3)


def test_settings_do_not_stick(searcher):
    before = searcher.search("drum and eagle", 40)
    little = searcher.search("drum and eagle", 40, nprobe=1, faiss_depth=2, rerank_depth=3)
    assert len(little) <= 3 < len(before)
    assert searcher.search("drum and eagle", 40) == before
    exact = searcher.search("drum and eagle", 40, exact=True)
    assert searcher.search("drum and eagle", 40) == before
    assert [hit.pid for hit in exact] == [hit.pid for hit in before]


def test_moved_together_the_folders_find_each_other(model_dir, index_dir, toy_dir, tmp_path, monkeypatch):
    load = Searcher._load
    base = model_dir.parent.parent
    assert index_dir.parent.parent == toy_dir.parent == base
    for folder in (model_dir, index_dir, toy_dir):
        shutil.copytree(folder, tmp_path / folder.relative_to(base))
    searcher, loaded = Searcher(tmp_path / index_dir.relative_to(base)), []
    monkeypatch.setattr(Searcher, "_load", lambda self, folder: loaded.append(folder) or load(self, folder))
    assert searcher.search("drum", 1)[0].text
    assert all(tmp_path in Path(path).resolve().parents for path in (*loaded, searcher.collection.path)) and loaded


def test_a_folder_that_is_gone(index_dir, toy_dir, model_dir, tmp_path):
    shutil.copytree(index_dir, tmp_path / "index")
    meta = unlist(tmp_path / "index")
    meta |= {"model": "gone", "model_path": "../gone", "collection_path": None}
    (tmp_path / "index/meta.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match=r"its model, gone, is not there: give its folder as model"):
        Searcher(tmp_path / "index").search("drum")
    assert [hit.text for hit in Searcher(tmp_path / "index", model_dir).search("drum", 2)] == [None, None]

    lines = (toy_dir / "collection.tsv").read_bytes().splitlines(keepends=True)
    (tmp_path / "right.tsv.gz").write_bytes(gzip.compress(b"".join(lines)))
    hits = Searcher(tmp_path / "index", model_dir, collection=tmp_path / "right.tsv.gz").search("drum", 40)
    assert {f"{hit.pid}\t{hit.text}\n".encode() for hit in hits} == set(lines)
    for wrong, message in (
        (lines[1:] + lines[:1], r"wrong\.tsv:\d+: pid 'p\d+', but 'p\d+' in"),
        (lines[:1], "pid None"),
    ):
        (tmp_path / "wrong.tsv").write_bytes(b"".join(wrong))
        with pytest.raises(InputError, match=message):
            Searcher(tmp_path / "index", model_dir, collection=tmp_path / "wrong.tsv").search("drum", 2)
    with pytest.raises(InputError, match="no such file"):
        Searcher(tmp_path / "index", model_dir, collection=tmp_path / "none.tsv")


def test_among_and_effort_are_for_one_search(codes_dir, model_dir):
    searcher = Searcher(codes_dir, model_dir, "cpu")
    everything = searcher.search("red apple", k=10)
    among = [hit.pid for hit in everything[3:6]]
    assert [hit.pid for hit in searcher.search("red apple", k=10, among=iter(among))] == among
    some = {"nobody", *among, 7}  # a set, an id that is a number, two that are none
    assert [hit.pid for hit in searcher.search("red apple", k=10, among=some, skip_unknown=True)] == among
    assert searcher.search("red apple", among=["nobody"], skip_unknown=True) == []
    assert [hit.pid for hit in searcher.search("red apple", among=among[0])] == among[:1]
    assert len(searcher.search("red apple", k=10, nprobe=1, n_coarse=2)) <= 10
    assert searcher.search("red apple", k=10) == everything
    for wrong, message in (
        ({"among": ["nobody"]}, "has no passage nobody"),
        ({"among": [12]}, "has no passage 12"),
        ({"faiss_depth": 3}, "faiss_depth says nothing to a compressed index"),
        ({"nprobe": 0}, "nprobe is 0"),
        ({"quality": "great"}, "quality 'great'"),
    ):
        with pytest.raises(InputError, match=message):
            searcher.search("red apple", **wrong)


def test_another_collection_is_refused(codes_dir, model_dir, tmp_path):
    (tmp_path / "other.tsv").write_text("x\tred apple\n")
    with pytest.raises(InputError, match="give the collection that the index was made from"):
        Searcher(codes_dir, model_dir, "cpu", collection=tmp_path / "other.tsv").search("red apple")


def test_many_threads_search_at_once(codes_dir, index_dir, model_dir):
    texts = [f"{a} {b}" for a in ("red", "old", "find", "the") for b in ("apple", "boat", "drum", "house")]
    for folder, efforts in ((codes_dir, [{}, {"nprobe": 1}]), (index_dir, [{"nprobe": 4}, {"nprobe": 1}])):
        jobs = [(text, effort) for text in texts for effort in efforts] * 2
        alone = Searcher(folder, model_dir, "cpu")
        expected = [alone.search(text, k=10, **effort) for text, effort in jobs]
        shared = Searcher(folder, device="cpu")  # whose model and index are loaded by whoever comes first
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda job, searcher=shared: searcher.search(job[0], k=10, **job[1]), jobs))
        assert found == expected


def test_ids_that_are_numbers(codes_dir, model_dir, tmp_path):
    index = shutil.copytree(codes_dir, tmp_path / "index")
    unlist(index)
    state = json.loads((index / "state.json").read_text())
    del state["checksum"], state["segments"][0]["files"]
    (index / "state.json").write_text(json.dumps(state))
    np.save(index / "segments/1/pids.npy", np.arange(40))
    searcher = Searcher(index, model_dir, "cpu")
    searcher.collection = None
    hits = searcher.search("red apple", among=np.array([3, 17, 5]))
    assert sorted(hit.pid for hit in hits) == ["17", "3", "5"]


def test_a_searcher_says_what_it_is(codes_dir, index_dir, embedding_dir):
    for folder, kind in ((codes_dir, "compressed, 4 bits"), (index_dir, "IVFPQ"), (embedding_dir, "embeddings")):
        assert repr(Searcher(folder, device="cpu")) == f"Searcher: 40 passages in {folder} ({kind}), on cpu"
