"""The pictures of the README, drawn from the result lines: python bench/plot.py

reads   results/bench/*.jsonl: the last line of each benchmark that was measured on --device
writes  results/bench/speed.png: how many times as fast we are, stage by stage; search.png: recall and time of search
        engines, where they were measured. What was not measured is left out.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from measure import add_results_flag

OTHERS = {  # way of a row: what the legend says, and the colour
    "reference": ("the reference's way", "#4477aa"),
    "sentence-transformers": ("sentence-transformers", "#ccbb44"),
    "pylate": ("PyLate", "#aa3377"),
}

SEARCH = {  # how the name of a search system begins: its colour
    "ours": "#4477aa",
    "ivfpq": "#228833",
    "exact": "0.3",
    "plaid": "#ee6677",
    "fast-plaid": "#ccbb44",
    "warp": "#aa3377",
}
MARKERS = {"1": "v", "2": "o", "4": "s", "8": "^", "vectors": "D"}  # how it ends: bits, or bits and vectors


def last_rows(args, name: str) -> list[dict]:
    """Rows of the last line of a benchmark on the device asked for; none if it was not measured."""
    path = args.results / f"{name}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    lines = [line for line in lines if line["args"].get("device", "cpu") == args.device]
    return lines[-1]["rows"] if lines else []


def stages(args) -> list[tuple[str, str, dict]]:
    """(stage, what we do there, {other: how many times as fast we are}) of every stage measured."""
    found = []
    if rows := [row for row in last_rows(args, "tokenize") if row["way"] == "ours"]:
        row = min(rows, key=lambda row: abs(row["passage_repeats"] - 9))  # as often as in MS MARCO
        found.append(("tokenise", f"{row['triples_per_second']:,} triples/s", {"reference": row["speed_ratio"]}))
    rows = {row["way"]: row for row in last_rows(args, "encode")}
    if "ours" in rows:
        ours = rows["ours"]["passages_per_second"]
        ratios = {way: ours / rows[way]["passages_per_second"] for way in OTHERS if way in rows}
        found.append(("embed passages", f"{ours:,} passages/s", ratios))
    rows = {row["way"]: row for row in last_rows(args, "train")}
    if {"ours", "reference"} <= rows.keys():
        seconds = rows["ours"]["seconds"]["median"]
        found.append(("training step", f"{seconds:.2f} s", {"reference": rows["ours"]["speed_ratio"]}))
    for what, stage in (("scoring", "MaxSim"), ("training", "MaxSim in training")):
        if rows := [row for row in last_rows(args, "maxsim") if row["what"] == what]:
            found.append((stage, f"{rows[-1]['ms']['median']:.0f} ms", {"reference": rows[-1]["speed_ratio"]}))
    rows = {row["way"]: row for row in last_rows(args, "retrieve")}
    if "ours" in rows:
        found.append(("search", f"{rows['ours']['mean_ms']:.0f} ms/query", {"reference": rows["ours"]["speed_ratio"]}))
    return found


def draw_speed(args) -> Path | None:
    """Bars of our speed over the others', one group a stage."""
    groups = stages(args)
    if not groups:
        return None
    bars = [(stage, other, ratio) for stage, _, ratios in groups for other, ratio in ratios.items()]
    figure, axis = plt.subplots(figsize=(7.2, 1.3 + 0.3 * len(bars) + 0.15 * len(groups)))
    place, ticks = 0.0, []
    for stage, ours, ratios in groups:
        ticks.append((place + (len(ratios) - 1) / 2, f"{stage}\n{ours}"))
        for other, ratio in ratios.items():
            axis.barh(place, ratio, height=0.85, color=OTHERS[other][1])
            axis.text(ratio, place, f" {ratio:.1f} ×", va="center", fontsize=9)
            place += 1
        place += 0.7
    axis.axvline(1, color="0.3", linewidth=0.8, linestyle=":")
    axis.set_yticks(*zip(*ticks, strict=True), fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.12 * max(ratio for *_, ratio in bars))
    axis.set_xlabel("how many times as fast we are (dotted: as fast)")
    axis.spines[["top", "right"]].set_visible(False)
    used = [other for other in OTHERS if other in {other for _, other, _ in bars}]
    handles = [plt.Rectangle((0, 0), 1, 1, color=OTHERS[other][1]) for other in used]
    labels, above = [OTHERS[other][0] for other in used], {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}
    axis.legend(handles, labels, title="our speed beside that of", ncols=len(used), frameon=False, **above)
    return save(figure, args, "speed")


def draw_search(args) -> Path | None:
    """Recall@10 against milliseconds a query, a line of settings for each system."""
    rows = last_rows(args, "search")
    if not rows:
        return None
    figure, axis = plt.subplots(figsize=(8.6, 4.8))
    for system in dict.fromkeys(row["system"] for row in rows):
        points = sorted((row["ms_at_10"], row["recall_at_10"]) for row in rows if row["system"] == system)
        size = next(row["bytes_per_token"] for row in rows if row["system"] == system)
        color = next(SEARCH[start] for start in sorted(SEARCH, key=len, reverse=True) if system.startswith(start))
        marker = MARKERS.get(system.rsplit("-", 1)[-1], "P")
        look = {"color": color, "marker": marker, "markersize": 7, "linewidth": 1, "markeredgecolor": "white"}
        axis.plot(*zip(*points, strict=True), label=f"{system}, {size:.0f} B/token", **look)
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    ticks = [digit * 10.0**power for power in range(-2, 5) for digit in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("ms a query, one thread")
    axis.set_ylabel("recall@10 of exact search")
    axis.grid(color="0.9", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    return save(figure, args, "search")


def save(figure, args, name: str) -> Path:
    path = args.results / f"{name}.png"
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})  # the same figures give the same file
    plt.close(figure)
    return path


FIGURES = (draw_speed, draw_search)


def main(args):
    for draw in FIGURES:
        path = draw(args)
        print(f"→ {path}" if path else f"{draw.__name__}: nothing was measured")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it was measured (default cpu)")
    add_results_flag(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
