"""import.py: BEIR's folders and ir_datasets' data sets become files that the stages read."""

import gzip
import importlib
import json
import sys
import types
from typing import NamedTuple

import pytest
from conftest import ROOT, run_stage_cli, succeed

from nanocolbert.cli import InputError
from nanocolbert.storage.documents import read_documents, read_queries
from nanocolbert.storage.runs import read_qrels

importer = importlib.import_module("import")
CORPUS = [
    {"_id": "d1", "title": "Boats", "text": "They sail.\nFar.", "metadata": {"year": 2020}},
    {"_id": "d2", "title": "", "text": "née 😀", "metadata": {}},
    {"_id": "7", "title": "Drums", "text": ""},
]
QUERIES = [
    {"_id": "q1", "text": "what\tsails\n far?", "metadata": {}},
    {"_id": "q2", "text": "of train"},
    {"_id": "3", "text": ""},
]


@pytest.fixture
def beir(tmp_path):
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text("".join(json.dumps(record) + "\n" for record in CORPUS))
    (folder / "queries.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(q) + "\n" for q in QUERIES).encode()))
    header = "query-id\tcorpus-id\tscore\n"
    (folder / "qrels/test.tsv").write_text(header + "q1\td1\t2\nq1\td2\t0\n3\t7\t1\n")
    (folder / "qrels/train.tsv").write_text(header + "q2\td2\t1\nq2\tgone\t1\n")
    return folder


def read(folder) -> tuple[dict, dict, dict]:
    """({pid: (text, metadata)}, queries, qrels) as the stages read them."""
    documents = read_documents(folder / "collection.jsonl", "collection: pid, passage")
    texts = {document.id: (document.text, document.metadata) for document in documents}
    return texts, read_queries(folder / "queries.tsv"), read_qrels(folder / "qrels.tsv")


def test_beir(beir, tmp_path):
    done = succeed(run_stage_cli("scripts/import.py", "beir", beir, "--output_dir", tmp_path / "out"))
    texts, queries, qrels = read(tmp_path / "out")
    assert texts == {
        "d1": ("Boats They sail.\nFar.", {"year": 2020, "title": "Boats"}),
        "d2": ("née 😀", None),
        "7": ("Drums", {"title": "Drums"}),
    }
    assert queries == {"q1": "what sails far?", "3": ""} and qrels == {"q1": {"d1": 2, "d2": 0}, "3": {"7": 1}}
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["documents"], report["queries"], report["judgments"]) == (3, 2, 3)
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert meta["kind"] == "collection" and meta["counts"] == {"documents": 3, "queries": 2, "judgments": 3}
    assert sorted(meta["files"]) == ["collection.jsonl", "qrels.tsv", "queries.tsv"]


def call(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["import.py", *map(str, arguments)])
        return importer.main(importer.parse_args())


def test_another_split_and_judged_documents_that_are_not_there(beir, tmp_path, capsys):
    call("beir", beir, "--split", "train", "--output_dir", tmp_path / "out")
    texts, queries, qrels = read(tmp_path / "out")
    assert len(texts) == 3 and queries == {"q2": "of train"} and qrels == {"q2": {"d2": 1, "gone": 1}}
    assert "note: 1 judged documents are not in" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("corpus.jsonl", None, r"corpus\.jsonl: no such file \(of a BEIR folder\)"),
        ("queries.jsonl.gz", None, r"queries\.jsonl: no such file"),
        ("qrels/test.tsv", None, r"qrels: no test\.tsv \(splits: train\): give --split another name"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq9\td1\t1\n", "has 0 of the 1 queries that test.tsv judges"),
        ("qrels/test.tsv", "q1\td1\t1\n", r"test\.tsv:1: found 3 column\(s\), as a run has"),
        ("corpus.jsonl", '{"_id": "a b", "text": "x"}\n', r"corpus\.jsonl:1: id 'a b' is empty or has white space"),
        ("corpus.jsonl", "", r"beir: no documents"),
    ],
)
def test_mistakes_of_a_folder(beir, tmp_path, name, content, message):
    (beir / name).unlink()
    if content is not None:
        (beir / name).write_text(content)
    with pytest.raises(InputError, match=message):
        call("beir", beir, "--output_dir", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["beir"]
    with pytest.raises(InputError, match="holds what is read"):
        call("beir", beir, "--output_dir", beir)


# ---------------------------------------------------------------------------------------------------------- ir_datasets


class Doc(NamedTuple):
    doc_id: str
    title: str
    body: str
    raw: bytes
    year: int
    score: float

    def default_text(self):
        return f"{self.title} {self.body}"


class Plain(NamedTuple):
    doc_id: str
    text: str
    note: str


class Query(NamedTuple):
    query_id: str
    title: str
    narrative: str

    def default_text(self):
        return self.title


class Qrel(NamedTuple):
    query_id: str
    doc_id: str
    relevance: int


class Dataset:
    def __init__(self, **parts):
        self.parts = parts

    def __getattr__(self, name):
        kind, _, verb = name.rpartition("_")
        if kind == "has":
            return lambda: verb in self.parts
        return lambda: iter(self.parts[kind])


NAN = float("nan")
DATASETS = {
    "mine": Dataset(
        docs=[
            Doc("d1", "Boats", "They sail.", b"x", 2020, NAN),
            Plain("d2", "née", "at length " * 200),
            Plain("7", "", ""),
        ],
        queries=[Query("q1", "what\tsails\n far?", "more"), Query("3", "", "")],
        qrels=[Qrel("q1", "d1", 1), Qrel("3", "7", 0), Qrel("q1", "d1", 2)],
        scoreddocs=[Qrel("q1", "d2", 0), Qrel("q1", "d1", 0), Qrel("3", "7", 0)],
    ),
    "documents": Dataset(docs=[Plain("d1", "one", "two")]),
    "no documents": Dataset(queries=[]),
    "bad ids": Dataset(docs=[Plain("d1", "one", ""), Plain("a b", "", "")]),
    "broken": Dataset(docs=map(int, ["x"])),
    "no relevance": Dataset(docs=[Plain("d1", "one", "")], qrels=[Query("q1", "d1", "")]),
}


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "ir_datasets", types.SimpleNamespace(load=DATASETS.__getitem__))


def test_a_data_set(stand_in, tmp_path, capsys):
    report = call("ir_datasets", "mine", "--output_dir", tmp_path / "out")
    texts, queries, qrels = read(tmp_path / "out")
    assert texts == {
        "d1": ("Boats They sail.", {"title": "Boats", "year": 2020}),
        "d2": ("née " + "at length " * 200, None),  # without a text of its own: all its texts
        "7": ("", None),
    }
    assert queries == {"q1": "what sails far?", "3": ""} and qrels == {"q1": {"d1": 2}, "3": {"7": 0}}
    assert (tmp_path / "out/candidates.tsv").read_text() == "q1\td2\nq1\td1\n3\t7\n"
    assert report["candidates"] == 3 and report["judgments"] == 2
    assert "note: 1 judgments are of a pair that was judged before" in capsys.readouterr().err
    call("ir_datasets", "documents", "--output_dir", tmp_path / "out")  # again, another one: no older file stays
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["collection.jsonl", "meta.json"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("none", "none: no data set of ir_datasets"),
        ("no documents", "no documents: has no documents"),
        ("bad ids", "bad ids: document:2: id 'a b' is empty or has white space"),
        ("broken", "ir_datasets broken: its documents cannot be read .invalid literal"),
        ("no relevance", r"no relevance: judgments without relevance \(query_id, title, narrative\)"),
    ],
)
def test_mistakes_of_a_data_set(stand_in, tmp_path, name, message):
    with pytest.raises(InputError, match=message):
        call("ir_datasets", name, "--output_dir", tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_ir_datasets_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ir_datasets", None)
    with pytest.raises(InputError, match="ir_datasets is not installed: pip install ir_datasets"):
        call("ir_datasets", "mine", "--output_dir", tmp_path / "out")


def test_the_real_ir_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("IR_DATASETS_HOME", str(tmp_path / "home"))
    ir_datasets = pytest.importorskip("ir_datasets", reason="ir_datasets is not installed")
    (tmp_path / "docs.tsv").write_text("d1\tThey sail.\n7\tnée 😀\n")
    (tmp_path / "queries.tsv").write_text("q1\twhat sails?\n")
    (tmp_path / "qrels").write_text("q1 0 d1 2\nq1 0 7 0\n")
    files = {"docs_tsv": "docs.tsv", "queries_tsv": "queries.tsv", "qrels_trec": "qrels"}
    dataset = ir_datasets.create_dataset(**{kind: str(tmp_path / name) for kind, name in files.items()})
    ir_datasets.registry.register(f"local/{tmp_path.name}", dataset)
    call("ir_datasets", f"local/{tmp_path.name}", "--output_dir", tmp_path / "out")
    texts, queries, qrels = read(tmp_path / "out")
    assert texts == {"d1": ("They sail.", None), "7": ("née 😀", None)}
    assert queries == {"q1": "what sails?"} and qrels == {"q1": {"d1": 2, "7": 0}}
    with pytest.raises(InputError, match="none/such: no data set of ir_datasets"):
        call("ir_datasets", "none/such", "--output_dir", tmp_path / "out2")


def test_help_of_each_source():
    for source in ("beir", "ir_datasets"):
        done = succeed(run_stage_cli(ROOT / "scripts/import.py", source, "--help"))
        assert "--output_dir" in done.stdout
