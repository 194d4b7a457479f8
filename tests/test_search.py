"""Searcher, retrieve.py's class for notebooks: what the command line finds, with texts, whatever the index."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import call_stage, succeed
from test_retrieve import read_scores, unlist

from nanocolbert.cli import InputError
from nanocolbert.storage.artifact import verify
from nanocolbert.storage.documents import read_queries
from search import Index, Searcher


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
    for k in (0, -1, 2.5, "3"):
        with pytest.raises(InputError, match="ask for one passage, or more"):
            searcher.search("drum", k)
    assert len(searcher.search("drum", 10**30)) == len(searcher.search("drum", 10**30, by_document=True)) == 40
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


def test_moved_together_the_folders_find_each_other(model_dir, index_dir, tmp_path, monkeypatch):
    load = Searcher._load
    base = model_dir.parent.parent
    assert index_dir.parent.parent == base
    for folder in (model_dir, index_dir):
        shutil.copytree(folder, tmp_path / folder.relative_to(base))
    searcher, loaded = Searcher(tmp_path / index_dir.relative_to(base)), []
    monkeypatch.setattr(Searcher, "_load", lambda self, folder: loaded.append(folder) or load(self, folder))
    assert searcher.search("drum", 1)[0].text
    assert all(tmp_path in Path(path).resolve().parents for path in loaded) and loaded


def test_a_model_that_is_gone(index_dir, model_dir, tmp_path):
    shutil.copytree(index_dir, tmp_path / "index")
    meta = unlist(tmp_path / "index")
    meta |= {"model": "gone", "model_path": "../gone"}
    (tmp_path / "index/meta.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match=r"its model, gone, is not there: give its folder as model"):
        Searcher(tmp_path / "index").search("drum")
    assert all(hit.text for hit in Searcher(tmp_path / "index", model_dir).search("drum", 2))


def test_an_index_without_texts(codes_dir, embedding_dir, model_dir, tmp_path):
    """As indexes were before, or with --no-keep_texts: hits have none, and what is added keeps none."""
    index = shutil.copytree(codes_dir, tmp_path / "index")
    (index / "state.json").write_text((index / "state.json").read_text())
    state = json.loads((index / "state.json").read_text())
    del state["checksum"], state["segments"][0]["files"]
    (index / "state.json").write_text(json.dumps(state))
    shutil.rmtree(index / "segments/1/texts")
    searcher = Searcher(index, model_dir, "cpu")
    searcher.add(["new"], ["red apple red apple"])
    with pytest.raises(InputError, match="keeps no texts, and no metadata"):
        searcher.add(["other"], ["red"], [{"year": 1}])
    hits = searcher.search("red apple", k=100)
    assert len(hits) == 41 and {hit.text for hit in hits} == {None} == {hit.metadata for hit in hits}
    with pytest.raises(InputError, match="keeps no texts"):
        searcher.explain("red apple", ["new"])


def test_among_and_effort_are_for_one_search(codes_dir, model_dir):
    searcher = Searcher(codes_dir, model_dir, "cpu")
    everything = searcher.search("red apple", k=10)
    among = [hit.pid for hit in everything[3:6]]
    assert [hit.pid for hit in searcher.search("red apple", k=10, among=iter(among))] == among
    some = {"nobody", *among, 7}  # a set, an id that is a number, two that are none
    assert [hit.pid for hit in searcher.search("red apple", k=10, among=some)] == among
    assert searcher.search("red apple", among=["nobody"]) == []
    assert [hit.pid for hit in searcher.search("red apple", among=among[0])] == among[:1]
    assert len(searcher.search("red apple", k=10, nprobe=1, n_coarse=2)) <= 10
    assert searcher.search("red apple", k=10) == everything
    for wrong, message in (
        ({"among": ["nobody"], "skip_unknown": False}, "has no passage nobody"),
        ({"among": [12], "skip_unknown": False}, "has no passage 12"),
        ({"where": "year > 3"}, "have no metadata"),
        ({"faiss_depth": 3}, "faiss_depth says nothing to a compressed index"),
        ({"nprobe": 0}, "nprobe is 0"),
        ({"quality": "great"}, "quality 'great'"),
    ):
        with pytest.raises(InputError, match=message):
            searcher.search("red apple", **wrong)


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
    hits = searcher.search("red apple", among=np.array([3, 17, 5]))
    assert sorted(hit.pid for hit in hits) == ["17", "3", "5"]


def test_a_searcher_says_what_it_is(codes_dir, index_dir, embedding_dir):
    for folder, kind in ((codes_dir, "compressed, 4 bits"), (index_dir, "IVFPQ"), (embedding_dir, "embeddings")):
        assert repr(Searcher(folder, device="cpu")) == f"Searcher: 40 passages in {folder} ({kind}), on cpu"


TEXTS = {"a": "red apple", "b": "old boat", "c": "red drum", "d": "the house and the boat"}
METADATA = [{"year": 2020, "lang": "en"}, {"year": 1999}, None, {"lang": "de", "tags": ["x", "ü"]}]


@pytest.fixture(scope="module")
def built_dir(model_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "index"
    Index.build(folder, model_dir, TEXTS.values(), TEXTS.keys(), iter(METADATA), bits=4, keep_vectors=True)
    return folder


def test_an_index_is_built_in_one_line(built_dir, model_dir, tmp_path):
    searcher = Searcher(built_dir, device="cpu")
    hits = searcher.search("red apple")
    assert {hit.pid: hit.text for hit in hits} == TEXTS and len(searcher) == 4
    assert {hit.pid: hit.metadata for hit in hits} == dict(zip(TEXTS, METADATA, strict=True))
    scores = searcher.model.score(["red apple"], list(TEXTS.values()))[0]
    assert np.allclose([hit.score for hit in hits], sorted(scores.tolist(), reverse=True), atol=1e-2)
    assert verify(built_dir)
    moved = shutil.copytree(built_dir, tmp_path / "elsewhere/index")
    assert Searcher(moved, model_dir, "cpu").search("red apple") == hits


def test_an_index_of_a_model_in_memory_has_it_within(colbert, tmp_path):
    searcher = Index.build(tmp_path / "index", colbert, (f"red apple {i}" for i in range(3)))
    hits = searcher.search("red apple 1", k=2)
    assert searcher.model is colbert and {hit.pid for hit in hits} < {"0", "1", "2"}
    (tmp_path / "index").rename(tmp_path / "moved")
    assert [hit.pid for hit in Searcher(tmp_path / "moved", device="cpu").search("red apple 1", k=2)] == [
        hit.pid for hit in hits
    ]


@pytest.mark.parametrize(
    ("passages", "others", "message"),
    [
        ([], {}, "no passages"),
        ("red apple", {}, "put it into a list"),
        (["red", 3], {}, "text 1 is of type int"),
        (["red", "\ud800"], {}, "text 1: half a character"),
        (["red", "apple"], {"ids": ["a"]}, "not as many ids, or metadata, as texts"),
        (["red", "apple"], {"ids": ["a", "a"]}, "passage 1: id 'a' a second time"),
        (["red", "apple"], {"ids": ["a", "b c"]}, "ids:1: id 'b c'"),
        (["red"], {"ids": ["\ud800"]}, "has a control character, or half of one"),
        (["red"], {"passage_words": -1}, "passage_words -1: give passage_words above"),
        (["red"], {"passage_words": 5, "overlap": 5}, "overlap 5"),
        (["red"], {"nlist": -1}, "nlist"),
        (["red"], {"metadata": [[1]]}, "not an object with names"),
        (["red"], {"metadata": [{"x": float("nan")}]}, "not what JSON can hold"),
        (["red"], {"nlist": 100_000}, "nlist"),
        (["red"], {"bits": 3}, "bits 3: give one of 1, 2, 4, 8"),
        (["red"], {"overlap": 3}, "give passage_words above the overlap"),
        (["red"], {"passage_words": 0}, "give passage_words above the overlap"),
    ],
)
def test_what_cannot_be_built_leaves_nothing(colbert, tmp_path, passages, others, message):
    with pytest.raises(InputError, match=message):
        Index.build(tmp_path / "index", colbert, passages, **others)
    assert list(tmp_path.iterdir()) == []


def test_an_index_is_not_built_over_something_else(colbert, model_dir, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="holds what is no index folder"):
        Index.build(tmp_path, colbert, ["red"])
    with pytest.raises(InputError, match="holds what is read"):
        Index.build(model_dir.parent, model_dir, ["red"])


def test_an_index_that_is_built_anew_is_taken_up(model_dir, tmp_path):
    folder = tmp_path / "index"
    searcher = Index.build(folder, model_dir, ["red apple"])
    Index.build(folder, model_dir, ["old boat", "drum"])
    assert searcher.reload() and len(searcher.search("boat")) == 2
    before = searcher.search("boat")
    assert [hit.score for hit in Searcher(folder, device="cpu").search("boat")] == [hit.score for hit in before]
    folder.rename(tmp_path / "away")  # as for a moment while an index is replaced
    assert not searcher.reload() and searcher.search("boat") == before


def test_changes_of_an_open_index(built_dir, tmp_path):
    folder = shutil.copytree(built_dir, tmp_path / "index")
    searcher, other = Searcher(folder, device="cpu"), Searcher(folder, device="cpu")
    searcher.model = other.model
    assert not searcher.reload() and searcher.version == 1
    assert searcher.add(["e", 6], ["red house", "old drum"], [None, {"lang": "fr"}]) == 2
    assert searcher.upsert(["b", "f"], ["red boat", "apple"], [{"year": 2001}, None]) == 2
    assert searcher.delete(["c", 6]) == 2 and len(searcher) == 5 and len(other) == 4
    expected = {"a": TEXTS["a"], "b": "red boat", "d": TEXTS["d"], "e": "red house", "f": "apple"}
    assert {hit.pid: hit.text for hit in searcher.search("red")} == expected
    assert {hit.pid for hit in other.search("red")} == set(TEXTS)  # as it was opened
    assert other.reload() and not other.reload() and other.search("red") == searcher.search("red")
    before = searcher.search("red")
    assert searcher.compact() == 5 and searcher.search("red") == before
    assert {hit.pid: hit.metadata for hit in before}["b"] == {"year": 2001} and verify(folder)
    for call, message in (
        (lambda: searcher.add(["a"], ["red"]), "has a passage a already"),
        (lambda: searcher.add(["g", "g"], ["red", "apple"]), "id 'g' a second time"),
        (lambda: searcher.upsert(["g", "g"], ["red", "apple"]), "id 'g' a second time"),
        (lambda: searcher.delete(["a", "nobody"]), "has no passage nobody"),
        (lambda: searcher.add(["g"], ["red"], [{1: 2}]), "not an object with names"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    assert searcher.version == 5 and not searcher.reload() and searcher.search("red") == before


def test_an_index_that_is_compacted_before_its_texts_are_opened(built_dir, tmp_path):
    """By another process: the files that a search had not opened yet are gone."""
    folder = shutil.copytree(built_dir, tmp_path / "index")
    changer, calls = Searcher(folder, device="cpu"), []
    for call in (
        lambda searcher: {hit.pid: (hit.text, hit.metadata) for hit in searcher.search("red")},
        lambda searcher: [hit.pid for hit in searcher.search("red", where="year > 2000", among=iter("abc"))],
        lambda searcher: [found.passage for found in searcher.explain("red", iter("ab"))],
        lambda searcher: searcher.search("red") and [hit.metadata for hit in searcher.search("boat", among=["b"])],
    ):
        late = Searcher(folder, device="cpu")
        late.model = changer.model
        if not calls:  # one that has opened the texts, but reads its metadata anew each time
            late.search("red")
        calls.append((late, call))
    changer.compact()
    for late, call in calls:
        assert call(late) == call(changer)
    with pytest.raises(InputError, match="no such column"):
        calls[0][0].search("red", where="nope = 1")


def test_an_index_that_is_built_anew_is_searched_by_its_own_model(colbert, model_dir, tmp_path):
    folder = tmp_path / "index"
    searcher = Index.build(folder, model_dir, ["red", "boat"], metadata=[{"year": 1}, {"year": 2}])
    assert [hit.pid for hit in searcher.search("red", where="year = 1")] == ["0"]
    old, opened, late = searcher.index, Searcher(folder), Searcher(folder)
    assert opened.search("boat")[0].metadata
    Index.build(folder, model_dir, ["red", "boat", "drum"], metadata=[{"year": 3}, {"year": 1}, None])
    for other in (opened, late):  # rows of the one index have no texts and metadata of the other
        found = {hit.pid: (hit.text, hit.metadata) for hit in other.search("boat")}
        assert found == {"0": ("red", {"year": 3}), "1": ("boat", {"year": 1}), "2": ("drum", None)}
    assert searcher.reload() and searcher.index is not old
    assert [hit.pid for hit in searcher.search("red", where="year = 1")] == ["1"] and searcher.version == 1
    Index.build(folder, colbert, ["red"])
    for call in (searcher.reload, lambda: searcher.add(["a"], ["boat"]), lambda: searcher.delete(["0"])):
        with pytest.raises(InputError, match="built anew, from another model"):
            call()
    assert len(Searcher(folder)) == 1


def test_passages_are_found_by_their_metadata(built_dir, tmp_path):
    searcher = Searcher(shutil.copytree(built_dir, tmp_path / "index"), device="cpu")
    assert searcher.fields == ["year", "lang", "tags"]

    def find(where: str, **others) -> set[str]:
        return {hit.pid for hit in searcher.search("red boat", where=where, **others)}

    assert find("year >= 2000") == {"a"} and find("year IS NULL") == {"d"} and find("1") == {"a", "b", "d"}
    assert find("lang IN ('de', 'en')", among=["a", "b", "nobody"]) == {"a"} and find("year > 3000") == set()
    assert find("year >= 2000", exact=True) == {"a"}
    searcher.add(["e"], ["red house"], [{"pages": 7, "year": 2024}])
    assert find("pages = 7") == {"e"} and find("year >= 2000 AND pages IS NULL") == {"a"}
    searcher.delete(["e"])
    assert find("year >= 2000") == {"a"}
    with pytest.raises(InputError, match="no such column: nope: give a condition"):
        find("nope = 1")


def test_explanations_of_what_is_in_the_index(built_dir, codes_dir):
    """By kept vectors, and by passages embedded once more."""
    searcher = Searcher(built_dir, device="cpu")
    for found, pid in zip(searcher.explain("red boat", ["d", "a"]), ("d", "a"), strict=True):
        slow = searcher.model.explain("red boat", TEXTS[pid])
        assert np.allclose(found.similarity, slow.similarity, atol=1e-2) and found.tokens == slow.tokens
    coded = Searcher(codes_dir, device="cpu")
    hit = coded.search("red boat", 1)[0]
    assert np.array_equal(
        coded.explain("red boat", [hit.pid])[0].similarity, coded.model.explain("red boat", hit).similarity
    )
    with pytest.raises(InputError, match="has no passage nobody"):
        searcher.explain("red boat", ["a", "nobody"])


def test_the_best_passage_of_a_document(colbert, tmp_path):
    texts = {f"{doc}#{n}": f"{text} {doc}" for doc in "xyz" for n, text in enumerate(("red apple", "boat", "red"), 1)}
    texts |= {"w": "red apple red"}
    searcher = Index.build(tmp_path / "index", colbert, texts.values(), texts.keys())
    everything = [hit.pid for hit in searcher.search("red apple", k=10)]
    expected = list({pid.split("#")[0]: pid for pid in reversed(everything)}.values())[::-1]  # the first of each
    expected.sort(key=everything.index)
    for k in (1, 2, 3, 4, 9):
        for effort in ({}, {"exact": True, "by_codes": True}):
            hits = searcher.search(["red apple", "boat"], k=k, by_document=True, **effort)
            assert [hit.pid for hit in hits[0]] == expected[:k] and len(hits[1]) == min(k, 4)


def test_queries_may_be_embeddings(built_dir):
    searcher = Searcher(built_dir, device="cpu")
    queries = ["red apple", "boat"]
    assert searcher.search(searcher.encode(queries), k=3) == searcher.search(queries, k=3)


def test_documents_are_cut_changed_and_deleted_as_a_whole(colbert, tmp_path):
    texts = ["The red apple is old. A boat. " * 3, "A drum."]
    searcher = Index.build(tmp_path / "index", colbert, texts, ["x", "y"], [{"n": 1}, None], passage_words=8, overlap=2)
    pids = [hit.pid for hit in searcher.search("boat", k=100)]
    assert len(searcher) == len(pids) > 3 and {pid.split("#")[0] for pid in pids} == {"x", "y"}
    assert sorted(hit.pid.split("#")[0] for hit in searcher.search("drum", by_document=True)) == ["x", "y"]
    assert {hit.metadata["n"] for hit in searcher.search("boat", where="n = 1")} == {1}
    searcher.upsert(["x"], ["The old house. A boat."])
    assert {hit.pid: hit.text for hit in searcher.search("boat")} == {"x#1": "The old house. A boat.", "y#1": "A drum."}
    searcher.add(["z"], [texts[0]])
    with pytest.raises(InputError, match="has a passage z#1 already"):
        searcher.add(["z"], ["A boat."])
    with pytest.raises(InputError, match="id 'a#2' ends as those"):
        searcher.add(["a#2"], ["A boat."])
    with pytest.raises(InputError, match="has no passage x#2"):
        searcher.delete(["z", "x#2"])
    searcher.delete(["z#1"])
    with pytest.raises(InputError, match="has passages of z already"):
        searcher.add(["z"], ["A boat."])
    n = len(searcher)
    assert searcher.delete(["z", "x#1"]) == n - 1 and len(searcher) == 1


def test_ids_with_numbers_are_no_documents_where_nothing_was_cut(colbert, tmp_path):
    searcher = Index.build(tmp_path / "index", colbert, ["red", "old", "the"], ["c#1", "c#2", "d"])
    searcher.upsert(["c#1"], ["a boat"])
    assert len(searcher) == 3
    with pytest.raises(InputError, match="has no passage c"):
        searcher.delete(["c"])
