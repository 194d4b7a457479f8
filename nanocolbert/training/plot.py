"""loss.png: the loss, its terms, the dev set's MRR@10, temperature and learning rate of a log.jsonl, what there is."""

import os
from pathlib import Path

import numpy as np

from nanocolbert.storage.artifact import replacing
from nanocolbert.training.log import read_log

PALE, STRONG, DEV, MUTED = "0.8", "C0", "C1", "0.45"  # colours
THIN = {"temperature": "tempera-\nture", "lr": "learning\nrate"}


def plot_loss(log: Path, picture: Path) -> None:
    """Draw a log, one panel below the other over the same steps: losses, MRR@10, temperature, learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_log(log)
    terms = dict.fromkeys(key for line in lines for key in line if key.startswith("loss_"))
    heights = {"loss": 5, **dict.fromkeys(terms, 3), "dev_mrr@10": 2, "temperature": 1, "lr": 1}
    curves = {key: np.array([(line["step"], line[key]) for line in lines if key in line]).T for key in heights}
    curves = {key: curve for key, curve in curves.items() if curve.size}
    figure, axes = plt.subplots(
        len(curves),
        figsize=(8, 3 + 0.75 * len(curves)),
        sharex=True,
        squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": [heights[key] for key in curves]},
    )
    for axis, (key, (steps, values)) in zip(axes[:, 0], curves.items(), strict=True):
        axis.spines[["top", "right"]].set_visible(False)
        if key.startswith("loss"):
            axis.set_ylabel(f"{key.removeprefix('loss_')}\n↓ better")
            draw_loss(axis, steps, values)
        elif key in THIN:
            axis.plot(steps, values, color=MUTED, linewidth=1)
            axis.set(ylabel=THIN[key], ylim=(0, None))
            label(axis, steps[-1], values[-1], f"{values[-1]:.2g}", MUTED, "bottom")
        else:
            axis.plot(steps, values, ".-", color=DEV)
            axis.set_ylabel("MRR@10\n↑ better")
            label(axis, steps[-1], values[-1], f"dev candidates\n{values[-1]:.3f}", DEV)
    axes[-1, 0].set_xlabel("step")
    axes[0, 0].set_title(
        f"training of {'/'.join(Path(os.path.abspath(picture)).parent.parts[-2:])}", loc="left", fontsize=11
    )
    with replacing(picture) as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


def draw_loss(axis, steps: np.ndarray, losses: np.ndarray) -> None:
    """The loss of every step (n,), and its running mean over a fiftieth of them."""
    window = max(1, len(losses) // 50)
    mean = np.convolve(losses, np.ones(window) / window, mode="valid")
    if window > 1:
        axis.plot(steps, losses, color=PALE, linewidth=0.8)
        above = losses[-1] > mean[-1]  # the two labels stand on either side of each other
        label(axis, steps[-1], losses[-1], "one step", MUTED, "bottom" if above else "top")
        label(axis, steps[-1], mean[-1], f"mean of {window}\n{mean[-1]:.3f}", STRONG, "top" if above else "bottom")
    else:
        label(axis, steps[-1], mean[-1], f"one step\n{mean[-1]:.3f}", STRONG)
    axis.plot(steps[window - 1 :], mean, color=STRONG)


def label(axis, x: float, y: float, text: str, color: str, place: str = "center") -> None:
    """Write beside the end (x, y) of a line; place: which edge of the text is level with it ("top": it hangs below)."""
    axis.annotate(text, (x, y), (6, 0), textcoords="offset points", va=place, color=color, fontsize=9)
