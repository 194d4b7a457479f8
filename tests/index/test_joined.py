"""Several indexes searched as one: shards of a collection rank as the whole of it does, by one process and by two."""

import json
import random
import re
import shutil

import numpy as np
import pytest
from conftest import call_stage, launch_cli, run_stage_cli, succeed

from nanocolbert.cli import InputError
from nanocolbert.storage.artifact import read_json, write_json
from nanocolbert.storage.documents import read_queries
from search import Index, Searcher

N, ABOUT = 3, 0.05  # passages are batched otherwise, perhaps in bf16
ALL = {"nprobe": 4, "n_coarse": 1000, "n_fine": 1000}  # nothing is left out


@pytest.fixture(scope="module")
def shard_dirs(codes_dir, model_dir, toy_dir, tmp_path_factory) -> list:
    """An index of every third passage each, with the codec of the index of all."""
    folder = tmp_path_factory.mktemp("shards")
    for i in range(1, N + 1):
        tokens, embeddings = folder / f"{i}/tokens", folder / f"{i}/embeddings"
        what = ("--collection", toy_dir / "collection.tsv", "--tokenizer", model_dir, "--workers", 1)
        succeed(call_stage("tsv2mmap.py", *what, "--shard", f"{i}/{N}", "--output_dir", tokens))
        made = ("--cpu", "--tokens_dir", tokens, "--model", model_dir, "--output_dir", embeddings)
        compressed = ("--bits", 4, "--codec", codes_dir) if i == 2 else ()  # in one of the two ways
        succeed(call_stage("doc2embedding.py", *made, *compressed))
        codec = () if compressed else ("--codec", codes_dir)
        made = ("--embedding_dir", embeddings, "--output_dir", folder / f"{i}/index")
        succeed(call_stage("build_index.py", *made, *codec))
    return [folder / f"{i}/index" for i in range(1, N + 1)]


def found_by(searcher: Searcher, queries: list[str], **how) -> list[dict]:
    """{pid: score} of each query's best 15."""
    return [{hit.pid: hit.score for hit in hits} for hits in searcher.search(queries, 15, **how)]


@pytest.mark.parametrize("how", [ALL, {"exact": True, "by_codes": True}])
def test_shards_find_what_the_whole_finds(shard_dirs, codes_dir, model_dir, toy_dir, how):
    whole, parts = (Searcher(folder, model_dir, "cpu") for folder in (codes_dir, shard_dirs))
    assert len(parts) == len(whole) and [len(one) for one in parts.index.indexes] == [14, 13, 13]
    queries = [*read_queries(toy_dir / "queries.tsv").values()]
    for fast, slow in zip(found_by(parts, queries, **how), found_by(whole, queries, **how), strict=True):
        assert len(fast) == 15 and sorted(fast.values()) == pytest.approx(sorted(slow.values()), abs=ABOUT)
        assert all(fast[pid] == pytest.approx(slow[pid], abs=ABOUT) for pid in fast.keys() & slow.keys())


def test_what_is_told_of_rows(shard_dirs, model_dir):
    searcher = Searcher(shard_dirs, model_dir, "cpu")
    index = searcher.index
    pids = [f"p{i}" for i in (7, 0, 5, 31)]
    rows = index.rows([*pids, "nobody"])
    assert rows[-1] == -1 and index.ids(rows[:-1]) == pids and len(index.alive()) == len(index)
    texts = [Searcher(shard_dirs[int(pid[1:]) % N]).index for pid in pids]
    assert index.texts(rows[:-1]) == [one.texts(one.rows([pid]))[0] for one, pid in zip(texts, pids, strict=True)]
    assert index.vectors(rows[:-1]) is None and index.metadata(rows[:-1]) == [None] * 4
    assert {hit.pid for hit in searcher.search("house", among=pids)} == set(pids)
    exact = {"among": pids, "exact": True, "by_codes": True}
    assert found_by(searcher, ["house"], among=pids) == found_by(searcher, ["house"], **exact)
    assert [one.score for one in searcher.explain("house", pids[:2])]


def test_processes_that_share_indexes_rank_as_one_does(shard_dirs, model_dir, toy_dir, tmp_path):
    asked = ("--model", model_dir, "--queries", toy_dir / "queries.tsv", "--k", 15, "--batch_size", 3)
    for name, how in {"found": (), "candidates": ("--candidates", toy_dir / "candidates.tsv", "--by_codes")}.items():
        flags = ("--index_dir", *shard_dirs, *asked, *how, "--output")
        succeed(run_stage_cli("retrieve.py", "--cpu", *flags, tmp_path / f"{name}.one"))
        done = succeed(launch_cli(2, "retrieve.py", *flags, tmp_path / f"{name}.two"))
        assert json.loads(done.stdout.splitlines()[-1])["queries"] == len(read_queries(toy_dir / "queries.tsv"))
        one, two = ((tmp_path / f"{name}.{n}").read_bytes() for n in ("one", "two"))
        assert one == two and one.count(b"\n") == 15 * len(read_queries(toy_dir / "queries.tsv"))


def test_processes_that_share_indexes_merge_documents(model_dir, tmp_path):
    """Parts of a document in two indexes are one document."""
    texts = {"a#1": "red house", "a#2": "red boat", "b#1": "blue boat", "c#1": "red apple"}
    for name, pids in {"x": ["a#1", "b#1"], "y": ["a#2", "c#1"]}.items():
        Index.build(tmp_path / name, model_dir, [texts[pid] for pid in pids], pids)
    (tmp_path / "queries.tsv").write_text("q\tred boat\n")
    flags = (
        "--index_dir",
        tmp_path / "x",
        tmp_path / "y",
        "--queries",
        tmp_path / "queries.tsv",
        "--by_document",
        "--k",
        2,
    )
    succeed(call_stage("retrieve.py", "--cpu", *flags, "--output", tmp_path / "one"))
    succeed(launch_cli(2, "retrieve.py", *flags, "--output", tmp_path / "two"))
    found = [line.split()[2] for line in (tmp_path / "one").read_text().splitlines()]
    assert len(set(found)) == 2 and (tmp_path / "two").read_text() == (tmp_path / "one").read_text()


@pytest.mark.parametrize("quality", ["fast", "default"])
def test_documents_are_the_same_however_many_processes_share_indexes(model_dir, tmp_path, quality):
    """One index has a document of many passages, so that each looks for more to another depth."""
    rng = random.Random(0)
    words = ("red", "blue", "house", "boat", "apple", "cloud", "drum", "eagle")

    def build(name: str, documents: dict[str, int]) -> None:
        pids = [f"{doc}#{n}" for doc, count in documents.items() for n in range(1, count + 1)]
        texts = [" ".join(rng.choices(words, k=4)) for _ in pids]
        Index.build(tmp_path / name, model_dir, texts, pids, bits=1, nlist=8)

    build("x", {"a": 60})
    build("y", dict.fromkeys("bcdef", 8))
    one, first, second = (Searcher([tmp_path / "x", tmp_path / "y"], device="cpu") for _ in range(3))
    first.index.search_only(0, 2)
    second.index.search_only(1, 2)
    asked = one.encode([" ".join(rng.choices(words, k=3)) for _ in range(12)])
    how = {"by_document": True, "quality": quality, "n_coarse": 2, "nprobe": 1}
    parts = zip(first.rankings(asked, 2, **how), second.rankings(asked, 2, **how), strict=True)
    for slow, rankings in zip(one.rankings(asked, 2, **how), parts, strict=True):
        rows, scores = first.index.merge(rankings, 2, by_document=True)
        assert np.array_equal(rows, slow[0]) and np.array_equal(scores, slow[1]) and len(rows) == 2


def test_indexes_that_change_and_conditions(model_dir, tmp_path):
    for name, lang in {"x": "de", "y": "en"}.items():
        metadata = [{"lang": lang, "only": name}, {name: 1}]
        Index.build(tmp_path / name, model_dir, ["red house", "blue boat"], [f"{name}1", f"{name}2"], metadata)
    searcher = Searcher([tmp_path / "x", tmp_path / "y"], device="cpu")
    assert searcher.fields == ["lang", "only", "x", "y"] and searcher.version == 1
    assert {hit.pid: hit.metadata for hit in searcher.search("house", where="lang = 'en' OR x = 1")} == {
        "y1": {"lang": "en", "only": "y"},
        "x2": {"x": 1},
    }
    with pytest.raises(InputError, match="several indexes: open the one alone"):
        searcher.add(["z"], ["green"])
    Searcher(tmp_path / "y", device="cpu").add(["x1"], ["green house"])
    assert searcher.reload() and not searcher.reload() and (len(searcher), searcher.version) == (5, 2)
    with pytest.raises(InputError, match=r"passage x1 is in .*x and in .*y: delete it from all but one"):
        searcher.search("house")
    with pytest.raises(InputError, match="passage x1 is in"):
        searcher.explain("house", ["x1"])
    (tmp_path / "x").rename(tmp_path / "away")  # as while it is replaced
    Searcher(tmp_path / "y", device="cpu").add(["y3"], ["red"])
    assert searcher.reload() and len(searcher) == 6
    (tmp_path / "away").rename(tmp_path / "x")
    Searcher(tmp_path / "x", device="cpu").delete(["x1"])
    Searcher(tmp_path / "y", device="cpu").delete(["y3"])
    searcher.reload()
    assert {hit.pid for hit in searcher.search("house")} == {"x2", "y1", "y2", "x1"}
    Searcher(tmp_path / "y", device="cpu").upsert(["y1"], ["a drum"])
    searcher.reload()
    assert searcher.index.ids(np.arange(len(searcher.index))).count("y1") == 2  # one of them is deleted


def test_indexes_that_do_not_go_together(shard_dirs, codes_dir, index_dir, model_dir, toy_dir, tmp_path):
    other = shutil.copytree(shard_dirs[0], tmp_path / "other")
    meta = read_json(other / "meta.json") | {"model_fingerprint": "0" * 32}
    write_json(other / "meta.json", meta, summed=True)
    for folder, what in ((other, "model_fingerprint"), (index_dir, "method ivfpq, codes in")):
        with pytest.raises(InputError, match=f"{re.escape(str(folder))}: {what}.*: only indexes of one kind"):
            Searcher([codes_dir, folder])
    (tmp_path / "link").symlink_to(codes_dir)
    with pytest.raises(InputError, match="link: a second time: give each index once"):
        Searcher([codes_dir, tmp_path / "link"])
    with pytest.raises(InputError, match="no index: give the folder"):
        Searcher([])
    flags = ("--index_dir", *shard_dirs[:2], "--model", model_dir, "--queries", toy_dir / "queries.tsv")
    done = launch_cli(3, "retrieve.py", *flags, "--output", tmp_path / "run")
    assert done.returncode and "2 indexes for 3 processes" in done.stderr and not (tmp_path / "run").exists()


def test_shards_that_cannot_be_searched_are_named(shard_dirs, model_dir, toy_dir, tmp_path):
    broken = shutil.copytree(shard_dirs[1], tmp_path / "broken")
    (broken / "segments/1/coarse.npy").write_bytes(b"")
    flags = ("--index_dir", shard_dirs[0], broken, "--model", model_dir, "--queries", toy_dir / "queries.tsv")
    for call in (call_stage, lambda *words: launch_cli(2, *words)):
        done = call("retrieve.py", *flags, "--output", tmp_path / "run")
        assert done.returncode and str(broken) in done.stderr and not (tmp_path / "run").exists()


def test_equal_scores_keep_the_order_of_the_indexes(model_dir, tmp_path):
    for name in "xyz":
        same = ["red house", "red house"], [f"{name}1", f"{name}2"]
        Index.build(tmp_path / name, model_dir, *same, keep_vectors=True)
    searcher = Searcher([tmp_path / name for name in "zxy"], device="cpu")
    hits = searcher.search("red house", 5)
    assert len({hit.score for hit in hits}) == 1
    assert [hit.pid for hit in hits] == ["z1", "z2", "x1", "x2", "y1"]
