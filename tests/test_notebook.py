"""The notebook runs from top to bottom, offline, on the tests' own model and index, and shows what it promises."""

import re

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from search import Searcher

PATH = ROOT / "notebooks" / "colbert.ipynb"
QUERY = "how do I read the lines of a gzip file?"


@pytest.fixture(scope="module")
def outputs(model_dir, index_dir, tmp_path_factory) -> dict[str, dict]:
    """What each code cell showed, by the cell's source: {"text": what it printed, mime type: its last value}."""
    folder = tmp_path_factory.mktemp("notebook")
    for name, target in (("model", model_dir), ("index", index_dir)):
        (folder / name).symlink_to(target)
    notebook = nbformat.read(PATH, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLBERT_DEMO", str(folder))
        for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
            patch.setenv(name, str(folder / name))
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(PATH.parent)}}).execute()
    shown = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            shown[cell.source] = {"text": ""}
            for output in cell.outputs:
                if output.output_type == "stream" and output.name == "stdout":
                    shown[cell.source]["text"] += output.text
                shown[cell.source] |= output.get("data", {})
    return shown


def shown_by(outputs: dict, start: str) -> dict:
    """The output of the one cell that has a line beginning with `start`."""
    (found,) = [shown for source, shown in outputs.items() if re.search(rf"^{re.escape(start)}", source, re.M)]
    return found


def test_encoding(outputs):
    lines = shown_by(outputs, "queries, query_tokens =")["text"].splitlines()
    assert lines[0].startswith("queries (1, 32, 16) passages [(")
    assert lines[1].startswith("[CLS] [Q]") and lines[2].endswith("[SEP]")
    assert "torch.float16 offsets (41,)" in shown_by(outputs, "values, offsets =")["text"]


def test_scores_by_hand_and_ranking(outputs):
    pairs = [line.split() for line in shown_by(outputs, "by_hand =")["text"].splitlines()]
    assert len(pairs) == 4
    assert all(float(ours) == pytest.approx(float(by_hand), abs=2e-3) for ours, by_hand in pairs)
    ranked = [line.split()[:2] for line in shown_by(outputs, "for position, score in model.rank")["text"].splitlines()]
    expected = sorted(((float(ours), i) for i, (ours, _) in enumerate(pairs)), key=lambda pair: -pair[0])
    assert [int(position) for _, position in ranked] == [i for _, i in expected]
    assert [float(score) for score, _ in ranked] == pytest.approx([score for score, _ in expected], abs=0.02)


def test_search(outputs, index_dir):
    searcher = Searcher(index_dir)
    lines = [line.split(maxsplit=2) for line in shown_by(outputs, "hits =")["text"].splitlines()]
    expected = searcher.search(QUERY, k=5)
    assert [line[1] for line in lines] == [hit.pid for hit in expected]
    assert [" ".join(line[2:]) for line in lines] == [hit.text[:80].strip() for hit in expected]
    found = shown_by(outputs, "exact =")["text"].splitlines()
    assert found[-1] == "nprobe 32: 10 of 10" and len(found) == 3  # four lists in all


def test_explanation(outputs):
    page = shown_by(outputs, "explanation = explain")
    score = float(re.search(r"score ([\d.]+) = ", page["text/html"])[1])
    assert "<ruby" in page["text/html"] and page["text/plain"].startswith(f"score {score:.2f} = ")
    hits = shown_by(outputs, "hits =")["text"].splitlines()
    assert score == pytest.approx(float(hits[0].split()[0]), abs=0.05)
    assert len(shown_by(outputs, "for match in")["text"].splitlines()) == 12
    assert len(shown_by(outputs, "explanation.heatmap")["image/png"]) > 5000


def test_before_the_demo_has_run_it_says_what_makes_its_model(tmp_path, monkeypatch):
    notebook = nbformat.read(PATH, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "code"][:1]
    for name in ("COLBERT_DEMO", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(PATH.parent)}})
    with pytest.raises(CellExecutionError):
        client.execute()
    (output,) = notebook.cells[0].outputs
    assert output.ename == "NotThere" and len(output.traceback) == 1
    assert output.traceback[0].startswith(f"no model in {tmp_path}")
    command = re.search("`bash (.*) (.*)`", "".join(cell.source for cell in notebook.cells))
    assert all((ROOT / name).is_file() for name in command.groups())


def test_as_committed_it_is_small_and_of_no_machine():
    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        assert not re.search(r"(^|[\s\"'(])(/|~/|[A-Z]:\\)\w", cell.source), cell.source
    assert PATH.stat().st_size < 20_000
