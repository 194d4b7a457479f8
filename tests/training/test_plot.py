"""loss.png: one panel for each thing that a log knows."""

import json

import matplotlib.figure
import pytest

from nanocolbert.training.plot import plot_loss

STEPS = [{"step": step, "loss": 1 / step, "lr": 1e-3} for step in range(1, 201)]
TERMS = [{"step": n, "loss": 1, "loss_kl": 0.2, "loss_in_batch": 0.8, "lr": 1e-3, "temperature": 1} for n in (1, 2)]
DEV = [{"step": step, "dev_mrr@10": 0.5} for step in (100, 200)]


@pytest.mark.parametrize(
    "lines, panels",
    [
        ([{"step": 1, "loss": 0.5}], ["loss\n↓ better"]),
        (STEPS, ["loss\n↓ better", "learning\nrate"]),
        (TERMS, ["loss\n↓ better", "kl\n↓ better", "in_batch\n↓ better", "tempera-\nture", "learning\nrate"]),
        (STEPS + DEV, ["loss\n↓ better", "MRR@10\n↑ better", "learning\nrate"]),
    ],
)
def test_panels(tmp_path, monkeypatch, lines, panels):
    drawn, savefig = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *args, **kw: (drawn.append(self), savefig(self, *args, **kw))
    )
    log = tmp_path / "run" / "model" / "log.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_loss(log, log.parent / "loss.png")
    assert (log.parent / "loss.png").read_bytes()[:4] == b"\x89PNG"
    (figure,) = drawn
    assert [axis.get_ylabel() for axis in figure.axes] == panels and figure.axes[-1].get_xlabel() == "step"
    assert figure.axes[0].get_title(loc="left") == "training of run/model"
    ends = [text.get_text() for axis in figure.axes for text in axis.texts]
    if lines[: len(STEPS)] == STEPS:
        assert ends[:2] == ["one step", "mean of 4\n0.005"] and ends[-1] == "0.001"
