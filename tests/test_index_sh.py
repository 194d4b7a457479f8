"""scripts/index.sh: from a file of texts to an index, in one command, from wherever one stands."""

import json
import shlex
import shutil

import pytest
from test_scripts import ENVIRONMENT, made, run_driver

STAGES = ("tokens/meta.json", "embeddings/meta.json", "index/meta.json")


@pytest.fixture
def folder(tmp_path, toy_dir):
    """Where the user stands: a collection and a model in folders with blanks in their names."""
    folder = tmp_path / "my texts"
    (folder / "a model").mkdir(parents=True)
    (folder / "a model/meta.json").write_text("{}")
    shutil.copy(toy_dir / "collection.tsv", folder / "a toy.tsv")
    return folder


def arguments(path) -> list[str]:
    """Those of the stage, or its stand-in, that wrote a meta.json."""
    return json.loads(path.read_text())["fingerprint"]


def test_from_a_collection_to_a_search(folder, model_dir):
    from search import Searcher

    done = run_driver("a toy.tsv", model_dir, "an index", script="index.sh", cwd=folder)
    assert made(done) == [f"{folder}/an index/{stage}" for stage in STAGES]
    ready = done.stdout.split("Ready to search")[1].splitlines()
    assert f'    Searcher("{folder}/an index/index").search("your question", k=5)' in ready
    assert shlex.split(ready[-1]) == ["python", "serve.py", "--index_dir", f"{folder}/an index/index"]
    searcher = Searcher(folder / "an index/index")
    assert searcher.meta["keep_vectors"] and len(searcher.index) == 40
    assert "drum" in searcher.search("drum", k=1)[0].text


def test_only_what_changed_is_made_again(repository, folder):
    def index(**variables):
        words, env = ("a toy.tsv", "a model", "an index"), ENVIRONMENT | variables
        return run_driver(*words, script="index.sh", repository=repository, cwd=folder, env=env)

    files = made(index())
    assert files == [f"{folder}/an index/{stage}" for stage in STAGES]
    assert arguments(folder / "an index/index/meta.json")[-1] == "--keep_vectors"
    assert made(index()) == []
    with open(folder / "a toy.tsv", "a") as file:
        file.write("p99\tan eagle\n")
    again = index()
    assert made(again)[0] == files[0] and "a toy.tsv has changed)" in again.stdout
    assert made(index(INDEX="--bits  4")) == files[2:]
    assert arguments(folder / "an index/index/meta.json")[-2:] == ["--bits", "4"]
    assert made(index(INDEX="", EMBEDDINGS="--bits 2", TOKENS="--doc_maxlen 200")) == files
    assert [arguments(folder / "an index" / stage)[-2] for stage in STAGES] == [
        "--doc_maxlen",
        "--bits",
        "--output_dir",
    ]


def test_by_default_the_demo_s_model_and_a_folder_named_after_the_collection(repository, folder):
    def index(*words):
        return run_driver(*words, script="index.sh", repository=repository, cwd=folder)

    before = index("a toy.tsv")
    assert before.returncode == 2 and "experiments/demo/model: not there yet: run bash" in before.stderr
    assert not (repository / "experiments").exists()

    shutil.copytree(folder / "a model", repository / "experiments/demo/model")
    assert made(index("a toy.tsv")) == [f"experiments/a toy/{stage}" for stage in STAGES]
    assert made(index("a toy.tsv")) == []
    assert "experiments/demo/model" in arguments(repository / "experiments/a toy/tokens/meta.json")

    (folder / "other").mkdir()
    for path in (folder / "other/a toy.tsv", folder / "demo.tsv"):  # whose folders are taken
        shutil.copy(folder / "a toy.tsv", path)
        done = index(path.relative_to(folder))
        assert done.returncode == 2 and f"{path.stem}: made from something else than {path}" in done.stderr


def test_a_mistake_ends_in_one_line(folder):
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text("{}")
    for words, what in (
        ((), "give COLLECTION [MODEL] [OUT], not 0 words"),
        (("a toy.tsv", "a model", "o", "more"), "not 4 words"),
        (("none.tsv",), "none.tsv: no such file"),
        (("a toy.tsv", "a modle", "o"), "a modle"),
        (("a toy.tsv", ".", "o"), "no model in it (config.json): did you mean"),
    ):
        done = run_driver(*words, script="index.sh", cwd=folder)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and what in done.stderr, done.stderr
        assert not (folder / "o/tokens").exists()


def test_it_says_what_it_is():
    done = run_driver("--help", script="index.sh")
    assert done.returncode == 0 and done.stdout.startswith("From documents to an index")
    assert "TOKENS=" in done.stdout and "set -euo" not in done.stdout and "#" not in done.stdout
