"""The demo's collection: the same bytes every time, an honest split, triples that mean what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from make_demo import Repeats, clean, group_of, split_docstring, walk_definitions

ROOT = Path(__file__).resolve().parent.parent

FILES = (
    "collection.tsv",
    "queries.train.tsv",
    "queries.dev.tsv",
    "qrels.train.tsv",
    "qrels.dev.tsv",
    "triples.train.tsv",
)


def make_demo(folder, *arguments, hash_seed="0"):
    return subprocess.run(
        [sys.executable, "scripts/make_demo.py", "--output_dir", str(folder), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
    )


def read(path):
    return [line.split("\t") for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """The same small demo made twice, with different string hashes."""
    folder = tmp_path_factory.mktemp("demo")
    for hash_seed in ("1", "2"):
        done = make_demo(folder / hash_seed, "--packages", "numpy", "--max_passages", "300", hash_seed=hash_seed)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["n_passages"] == 300
    return folder / "1", folder / "2"


def test_same_bytes_twice(demos):
    one, two = demos
    assert sorted(path.name for path in one.iterdir()) == sorted((*FILES, "meta.json"))
    for name in FILES:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    fingerprints = {json.loads((folder / "meta.json").read_text())["fingerprint"] for folder in demos}
    assert len(fingerprints) == 1


def test_split_by_subpackage_and_no_query_in_its_passage(demos):
    collection = dict(read(demos[0] / "collection.tsv"))
    assert len(set(collection.values())) == len(collection) == 300
    splits, groups, texts = {}, {}, []
    for split in ("train", "dev"):
        queries = dict(read(demos[0] / f"queries.{split}.tsv"))
        texts += queries.values()
        splits[split] = {qid.removeprefix("q:") for qid in queries}
        groups[split] = {group_of(name) for name in splits[split]}
        qrels = read(demos[0] / f"qrels.{split}.tsv")
        assert qrels == [[qid, "0", qid.removeprefix("q:"), "1"] for qid in queries]
        for qid, query in queries.items():
            assert query.lower() not in collection[qid.removeprefix("q:")].lower()
    assert not groups["train"] & groups["dev"]
    assert splits["train"] | splits["dev"] == set(collection)
    assert 0 < len(splits["dev"]) <= 45
    assert len(set(texts)) == len(texts)


def test_triples_stay_in_the_training_split(demos):
    train = {qid for qid, _ in read(demos[0] / "queries.train.tsv")}
    triples = read(demos[0] / "triples.train.tsv")
    assert len(triples) == len({tuple(triple) for triple in triples}) == 4 * len(train)
    for qid, positive, negative in triples:
        assert qid in train and qid == f"q:{positive}" and f"q:{negative}" in train and positive != negative


def test_unknown_package_is_one_line_and_leaves_nothing(tmp_path):
    done = make_demo(tmp_path / "demo", "--packages", "no_such_package")
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "make_demo.py: error: --packages no_such_package: no such package here: install it or leave it out"
    )
    assert list(tmp_path.iterdir()) == []


def test_split_docstring():
    rest = "It takes **kwargs and " + "words " * 20
    query, passage = split_docstring(f"Compute the ``dot`` product of\ntwo arrays. See also.\n\n{rest}")
    assert query == "Compute the dot product of two arrays"
    assert passage.startswith("See also. It takes **kwargs and words")
    assert split_docstring(f"Too short.\n\n{rest}") is None
    assert split_docstring("A summary of enough words.\n\nToo short a body.") is None
    assert split_docstring(f"A summary of enough words.\n\nA summary of enough words. {rest}") is None


def test_clean():
    assert clean("See :func:`~torch.add` or [`~Trainer`].\n\n>>> 1 + 1\n2\n\nReturns\n-------\nx : int\n\tOne.") == (
        "See torch.add or [Trainer]. Returns x : int One."
    )
    assert clean(".. note::\n\n   Some **bold** text.\n\n```python\nx = 1\n```\n") == "note: Some bold text."


def test_private_and_local_names_are_left_out():
    import ast

    source = 'class A:\n "a"\n def b(self):\n  "b"\n  def c():\n   "c"\n def _d(self):\n  "d"\ndef e():\n "e"\n'
    assert list(walk_definitions(ast.parse(source), "m")) == [("m.A", "a"), ("m.A.b", "b"), ("m.e", "e")]


def test_repeats_sees_through_names():
    repeats = Repeats(shingle=3)
    assert not repeats("Construct a BertTokenizer from a vocabulary file of the given path")
    assert repeats("Construct a GPT2Tokenizer from a vocabulary file of the given path")
    assert not repeats("Something else that nobody has said before")
