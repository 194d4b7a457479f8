"""The two drawings of the documentation: python bench/pictures.py

reads   experiments/demo/ (bash scripts/run_colbert.sh configs/demo.sh): the passage in the README's picture, as explain
        sees it
writes  docs/overview.png: a passage coloured by explain, beside the pipeline; docs/search.png: how a passage is written
        in the compressed index, and how a query is narrowed down
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import transformers
from matplotlib.patches import FancyBboxPatch

from nanocolbert.explain import Explanation, Token, explain
from search import Searcher

QUERY = "how do I read lines from a gzip file?"
PID = "gzip.GzipFile"
BLUE, ORANGE, GREY = "#1f77b4", "#ee9933", "0.45"
PIPELINE = [  # what is there, what makes it of what stands above
    ("collection, queries, triples", None),
    ("tokens/", "tsv2mmap.py"),
    ("model/", "train.py"),
    ("embeddings/", "doc2embedding.py"),
    ("index/", "build_index.py"),
    ("run: passages a query", "retrieve.py"),
    ("MRR, recall, nDCG", "evaluate.py"),
]
PASSAGE = [("centroid", 2, 0.35), ("norm", 1, 0.5), ("coarse", 12, 0.65), ("fine", 22, 0.3)]  # bytes, strength
FOLLOWER = [("representative", 1, 0.35), ("norm", 1, 0.5), ("code", 24, 0.3)]
FUNNEL = [  # step, passages that reach it, what it reads
    ("1  probe: 32 lists a query token", "20,958", "centroids and lists"),
    ("2  coarse: MaxSim by coarse codes", "3,220", "15 bytes a representative"),
    ("3  fine: MaxSim by all codes", "180", "36 bytes a token"),
    ("4  exact: MaxSim in fp32, if vectors are kept", "30", "256 bytes a token"),
    ("answer", "10", ""),
]


def blank(width: float, height: float):
    """A figure of inches whose units are hundredths of an inch, the origin at its upper left."""
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 100 * width), ylim=(100 * height, 0))
    axes.axis("off")
    return figure, axes


def box(axes, x, y, width, height, color, alpha=1.0, edge="none") -> None:
    look = {"boxstyle": "round,pad=0,rounding_size=4", "facecolor": (*matplotlib.colors.to_rgb(color), alpha)}
    axes.add_patch(FancyBboxPatch((x, y), width, height, edgecolor=edge, linewidth=1, **look))


def write(axes, x, y, text, size=10, **look):
    return axes.text(x, y, text, fontsize=size, parse_math=False, **{"va": "center", **look})


def width_of(axes, text: str, size: float) -> float:
    """Width of a text in the units of `blank`."""
    drawn = write(axes, 0, 0, text, size)
    found = drawn.get_window_extent(axes.figure.canvas.get_renderer()).width * 100 / axes.figure.dpi
    drawn.remove()
    return found


# ------------------------------------------------------------------------------------------------------------ overview


def overview(path: Path, index: Path) -> None:
    """The pipeline on the left; on the right a query and a passage in the colours of their similarities."""
    searcher = Searcher(index, device="cpu")
    hit = next(hit for hit in searcher.search(QUERY, k=20) if hit.pid == PID)
    found = explain(searcher.model, QUERY, hit)
    figure, axes = blank(10.4, 4.0)
    draw_pipeline(axes, 20, 28)
    left, right = 318, 1025
    axes.plot([left - 28, left - 28], [15, 385], color="0.85", linewidth=1)
    write(axes, left, 28, "a query; with each token the similarity of its best match", 10, color=GREY)
    words = [(token, match) for token, match in found._words() if not token.is_special]
    pieces = [(token.label, match.similarity, f"{match.similarity:.2f}", 9) for token, match in words]
    y = flow(axes, pieces, left, right, 76)
    write(axes, left, y + 54, f"a passage, {hit.pid}; above a token the query tokens that matched it", 10, color=GREY)
    y = flow(axes, list(passage_pieces(found)), left, right, y + 112)
    write(axes, left, y + 58, "score = Σ over query tokens of the highest similarity", 12, color="black")
    total = f"{found.score:.2f} here; [CLS], the markers, [SEP] and the [MASK] fill of the query count too"
    write(axes, left, y + 80, total, 10, color=GREY)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def draw_pipeline(axes, x: float, y: float) -> None:
    write(axes, x, y, "from text to figures, a script a stage", 10, color=GREY)
    for number, (what, script) in enumerate(PIPELINE):
        top = y + 20 + number * 48
        if script:
            arrow = {"arrowstyle": "-|>", "color": GREY, "linewidth": 1.2}
            axes.annotate("", (x + 22, top), (x + 22, top - 20), arrowprops={**arrow, "shrinkA": 0, "shrinkB": 0})
            write(axes, x + 34, top - 10, script, 10, color=BLUE, family="monospace")
        box(axes, x, top, 240, 28, BLUE, 0.12)
        write(axes, x + 12, top + 14, what, 10.5)


def flow(axes, pieces, left: float, right: float, y: float, size: float = 13) -> float:
    """Write pieces (text, strength or None, what stands above, space after it) in lines; y of the last line."""
    x = left
    for text, strength, above, space in pieces:
        width = max(width_of(axes, text, size), width_of(axes, above, 8) + 2 if above else 0)
        if x + width > right:
            x, y = left, y + 54
        if strength is not None:
            box(axes, x - 2, y - 12, width + 4, 24, BLUE, max(0.0, strength) ** 2)
        write(axes, x + width / 2, y, text, size, ha="center")
        if above:
            write(axes, x + width / 2, y - 20, above, 8, ha="center", color="0.25")
        x += width + space
    return y


def passage_pieces(found: Explanation):
    """Pieces of the passage for `flow`: words, and between them the tokens that were matched."""
    matched: dict[int, list[tuple[Token, float]]] = {}
    for token, match in found._words():
        if not token.is_special:
            matched.setdefault(match.position, []).append((token, match.similarity))
    end = 0
    text = found.passage
    for at in sorted(at for at in matched if not found.tokens[at].is_special):
        start, stop = found.tokens[at].span
        yield from ((word, None, "", 8) for word in text[end:start].split())
        names = " · ".join(token.label for token, _ in matched[at])
        is_inside = stop < len(text) and text[stop].isalnum()
        yield text[start:stop], max(strength for _, strength in matched[at]), names, 3 if is_inside else 9
        end = stop
    yield from ((word, None, "", 8) for word in text[end:].split())


# -------------------------------------------------------------------------------------------------------------- search


def search(path: Path) -> None:
    """How a passage is written at 2 bits, and the four steps of a query at the default effort, k = 10."""
    figure, axes = blank(10.4, 3.6)
    write(axes, 20, 28, "a passage at 2 bits a dimension, in bytes", 11, weight="bold")
    draw_bytes(axes, 20, 70, "a representative: 37 bytes", PASSAGE)
    draw_bytes(axes, 20, 160, "a follower, told from its representative: 26 bytes", FOLLOWER)
    box(axes, 20, 264, 410, 26, ORANGE, 0.3)
    write(axes, 20, 250, "with --keep_vectors: fp16, 256 bytes a token (not to scale)", 10, color=GREY)
    write(axes, 225, 277, "128 numbers", 10, ha="center")
    write(axes, 20, 325, "against 256 bytes in fp16, it comes to 36 bytes a token,", 10, color=GREY)
    write(axes, 20, 342, "with lists, centroids and offsets", 10, color=GREY)
    axes.plot([462, 462], [15, 345], color="0.85", linewidth=1)
    write(axes, 490, 28, "a query: passages that each step looks at (default, k = 10)", 11, weight="bold")
    widths = [530, 440, 390, 350, 130]
    for number, ((step, passages, reads), width) in enumerate(zip(FUNNEL, widths, strict=True)):
        y, x = 52 + 60 * number, 490
        box(axes, x, y, width, 44, BLUE, 0.1 + 0.12 * number)
        write(axes, x + 12, y + 14, step, 10.5)
        write(axes, x + 12, y + 32, f"{passages} passages" + (f", reads {reads}" if reads else ""), 9.5, color="0.3")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def draw_bytes(axes, x: float, y: float, title: str, parts) -> None:
    """Boxes as wide as their bytes."""
    write(axes, x, y, title, 10, color=GREY)
    narrow = []
    for name, n, strength in parts:
        width = 11 * n
        box(axes, x, y + 14, width - 2, 26, BLUE, strength)
        if n > 2:
            write(axes, x + width / 2, y + 27, f"{name} {n}", 10, ha="center")
        else:
            narrow.append(f"{name} {n}")
        x += width
    write(axes, 20, y + 50, f"{', '.join(narrow)}, …", 8.5, color=GREY)


def main(args):
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    search(ROOT / "docs" / "search.png")
    overview(ROOT / "docs" / "overview.png", args.index_dir)
    print("→ docs/overview.png, docs/search.png")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index_dir", type=Path, default=ROOT / "experiments/demo/index", help="the demo's index")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
