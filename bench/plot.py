"""The pictures of the README, drawn from the result lines: python bench/plot.py

reads   results/bench/*.jsonl: the last line of each benchmark that was measured on --device
writes  results/bench/speed.png: how many times as fast we are, stage by stage; search.png: recall and time of search
        engines; pooling.png: quality against bytes of pooled passages. What was not measured is left out.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import ticker
from matplotlib.transforms import Bbox
from measure import add_results_flag
from tables import ZEN3, name_of

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
PARAGRAPHS = 20_958  # of SQuAD: a benchmark takes them first
PLACES = [  # of a name beside the end of its line, the first that is free: points right and up, alignment
    ((7, 0), "left", "center"),
    ((0, 8), "center", "bottom"),
    ((4, 8), "right", "bottom"),
    ((-4, 8), "left", "bottom"),
    ((7, -4), "left", "top"),
    ((4, -9), "left", "top"),
    ((0, -8), "center", "top"),
    ((-8, 0), "right", "center"),
    ((0, 20), "center", "bottom"),
]
BETTER = {"xycoords": "axes fraction", "textcoords": "axes fraction", "color": "0.4", "fontsize": 10}


def last_line(args, name: str) -> dict | None:
    """The last line of a benchmark on the device asked for; of the CPU with AVX-512 bf16 where both were measured."""
    path = args.results / f"{name}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    lines = [line for line in lines if line["args"].get("device", "cpu") == args.device]
    first = [line for line in lines if ZEN3 not in line["hardware"]["cpu"]]
    return (first or lines or [None])[-1]


def last_rows(args, name: str) -> list[dict]:
    """Rows of `last_line`; none if it was not measured."""
    line = last_line(args, name)
    return line["rows"] if line else []


def hardware_of(line: dict) -> str:
    """The machine of a line, as people name it."""
    machine = line["hardware"]
    if line["args"].get("device") == "cuda":
        return machine.get("gpu", "a GPU")
    return machine["cpu"] + ("" if "family" in machine["cpu"] else " with AVX-512 bf16") + ", one core"


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
    axis.set_xlabel("how many times as fast we are (dotted: as fast)      better →")
    axis.spines[["top", "right"]].set_visible(False)
    used = [other for other in OTHERS if other in {other for _, other, _ in bars}]
    handles = [plt.Rectangle((0, 0), 1, 1, color=OTHERS[other][1]) for other in used]
    labels, inside = [OTHERS[other][0] for other in used], {"loc": "upper right", "fontsize": 9}
    axis.legend(handles, labels, title="our speed beside that of", frameon=False, **inside)
    line = last_line(args, "encode") or last_line(args, "train") or last_line(args, "maxsim")
    where = f" ({hardware_of(line)})" if line else ""
    axis.set_title(f"MiniLM on MS MARCO's text; tokenising (two cores) and search: SQuAD\n{where[2:-1]}", fontsize=11)
    figure.tight_layout()
    return save(figure, args, "speed")


def draw_search(args) -> Path | None:
    """Recall@10 against milliseconds a query, a line of settings for each system, its name at the line's end."""
    line = last_line(args, "search")
    if not line:
        return None
    figure, axis = plt.subplots(figsize=(9.2, 5.4))
    names, rows = [], line["rows"]
    for system in dict.fromkeys(row["system"] for row in rows):
        here = sorted((row for row in rows if row["system"] == system), key=lambda row: row["ms_at_10"])
        points = [(row["ms_at_10"], row["recall_at_10"]) for row in here]
        color = next(SEARCH[start] for start in sorted(SEARCH, key=len, reverse=True) if system.startswith(start))
        marker = MARKERS.get(system.rsplit("-", 1)[-1], "P")
        look = {"color": color, "marker": marker, "markersize": 7, "linewidth": 1, "markeredgecolor": "white"}
        axis.plot(*zip(*points, strict=True), **look)
        names.append((name_of(here[0]), color, points))
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    high *= 2.5  # room for the names at the right
    ticks = [digit * 10.0**power for power in range(-2, 5) for digit in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    bottom, top = axis.get_ylim()
    axis.set(xlim=(low, high), ylim=(bottom, top + 0.12 * (top - bottom)))
    axis.set_xlabel("ms a query, one thread, without the query encoder")
    axis.set_ylabel("recall@10 of exact search")
    axis.grid(color="0.9", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    what = "paragraphs of SQuAD" if line["passages"] <= PARAGRAPHS else "passages of SQuAD and Wikipedia"
    axis.set_title(
        f"{line['passages']:,} {what}, {line['tokens'] / 1e6:.1f} M tokens\n{hardware_of(line)}", fontsize=11
    )
    arrow = {"arrowstyle": "-|>", "color": "0.4", "linewidth": 1.4}
    axis.annotate("better", (0.02, 0.97), (0.09, 0.86), arrowprops=arrow, **BETTER)
    figure.tight_layout()
    write_names(axis, names)
    return save(figure, args, "search")


def draw_pooling(args) -> Path | None:
    """nDCG@10 against bytes a passage: a line for each model and width of codes, a point for each pool factor."""
    line = last_line(args, "pooling")
    if not line:
        return None
    figure, axis = plt.subplots(figsize=(7.2, 4.6))
    rows = line["rows"]
    models, widths = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "bits"))
    for model, bits in itertools.product(models, widths):
        here = [row for row in rows if (row["model"], row["bits"]) == (model, bits)]
        points = [(row["bytes_per_passage"] / 1024, row["ndcg_at_10"]) for row in here]
        name = "fp16 vectors" if bits == 16 else f"{bits} bit" + "s" * (bits > 1)
        look = {"color": f"C{widths.index(bits)}", "linestyle": ("-", "--", ":", "-.")[models.index(model) % 4]}
        axis.plot(*zip(*points, strict=True), marker="o", label=name + f", {model}" * (len(models) > 1), **look)
        for row, point in zip(here, points, strict=True):
            axis.annotate(f"{row['factor']}", point, (3, 4), textcoords="offset points", fontsize=8)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.set(xlabel="KB a passage (numbers: the pool factor)", ylabel="nDCG@10")
    axis.grid(color="0.9", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axis.set_title(f"{line['passages']:,} passages of {line['args']['data']}, {line['queries']:,} queries", fontsize=11)
    figure.tight_layout()
    return save(figure, args, "pooling")


def write_names(axis, names: list[tuple[str, str, list]]) -> None:
    """Write each name (text, colour, points of its line) at the last of its points, where nothing else is."""
    figure = axis.figure
    renderer, taken = figure.canvas.get_renderer(), []
    along = [axis.transData.transform(points) for *_, points in names]  # pixels
    for points in along:
        for start, end in zip(points, [*points[1:], points[-1]], strict=True):
            taken += [Bbox.from_bounds(*(start + (end - start) * share / 8 - 3), 6, 6) for share in range(9)]
    for (text, color, points), pixels in zip(names, along, strict=True):
        for number, (offset, side, level) in enumerate(PLACES, 1):
            place = {"ha": side, "va": level, "textcoords": "offset points", "color": color, "fontsize": 9}
            name = axis.annotate(text, points[-1], offset, annotation_clip=False, **place)
            box = name.get_window_extent(renderer)
            is_inside = figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= axis.bbox.y1
            own = Bbox.from_bounds(*(pixels[-1] - 3), 6, 6)
            others = [other for other in taken if not other.overlaps(own)]
            if (is_inside and not any(box.overlaps(other) for other in others)) or number == len(PLACES):
                taken.append(box)
                break
            name.remove()


def save(figure, args, name: str) -> Path:
    path = args.results / f"{name}.png"
    figure.savefig(path, dpi=110, metadata={"Software": None})  # the same figures give the same file
    plt.close(figure)
    return path


FIGURES = (draw_speed, draw_search, draw_pooling)


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
