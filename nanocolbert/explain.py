"""Why a passage scores as it does: which passage token each query token matched, and how strongly.

    found = explain(model, "how do I read a gzip file?", "Open a gzip-compressed file ...")
    found                # in a notebook: the passage in colour, over its tokens the query tokens that matched them
    found.matches()      # rows (query token, passage token, similarity, position); their similarities make found.score
    found.heatmap()      # every similarity, as a matplotlib figure

The score is a sum over query tokens (MaxSim; paper, eq. 3), so nothing here is an approximation. The [MASK] fill of a
query scores too (query augmentation); it is shown as one, in grey.
"""

import html
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from model import FRAME, ColBERT, prepare_texts, tokenize

COLUMNS = 45  # passage tokens side by side in a heatmap; more go into further panels, like lines of text
CELL = 0.24  # inches
NAMES = 3  # query tokens written over a passage token in HTML; more are counted
FAINT = 'style="opacity: 0.6"'


class Match(NamedTuple):
    """A query token and the passage token most similar to it; position counts the passage's tokens from 0."""

    query_token: str
    passage_token: str
    similarity: float
    position: int


@dataclass(repr=False)
class Explanation:
    """The similarities behind one score. A token is the piece of text it stands for, or its name if it is special.

    query_tokens (Lq), passage_tokens (Ld) and spans (Ld): where each lies in `passage`, empty for special tokens;
    is_fill (Lq,): true at the [MASK] fill; similarity (Lq, Ld) fp32.
    """

    passage: str
    query_tokens: list[str]
    passage_tokens: list[str]
    spans: list[tuple[int, int]]
    is_fill: np.ndarray
    similarity: np.ndarray

    @property
    def score(self) -> float:
        """MaxSim."""
        return float(self.similarity.max(1).sum())

    def matches(self) -> list[Match]:
        """What each query token matched, in the order of the query."""
        best = self.similarity.argmax(1).tolist()
        return [
            Match(token, self.passage_tokens[at], float(row[at]), at)
            for token, at, row in zip(self.query_tokens, best, self.similarity, strict=True)
        ]

    def __repr__(self) -> str:
        best, n_fill = self.similarity.max(1), int(self.is_fill.sum())
        words = f"score {self.score:.2f} = {best[~self.is_fill].sum():.2f} from {len(best) - n_fill} tokens"
        return words + (f" + {best[self.is_fill].sum():.2f} from {n_fill} [MASK]" if n_fill else "")

    def _repr_html_(self) -> str:
        """The query, each token with its similarity; the passage, over its tokens those that matched them."""
        words = [match for match, is_fill in zip(self.matches(), self.is_fill, strict=True) if not is_fill]
        fill = np.bincount(self.similarity[self.is_fill].argmax(1), minlength=len(self.spans))  # (Ld,)
        query = " ".join(
            f'<span style="{shade(match.similarity)}">{html.escape(match.query_token)}</span>'
            f"<sub {FAINT}>{match.similarity:.2f}</sub>"
            for match in words
        )
        passage, end = [], 0
        for (start, stop), group in itertools.groupby(range(len(self.spans)), lambda at: self.spans[at]):
            passage.append(html.escape(self.passage[end:start]))
            end = stop
            group = list(group)  # tokens of one place are pieces of one character; special tokens have none
            for ats in [group] if stop > start else [[at] for at in group]:
                text = self.passage[start:stop] or self.passage_tokens[ats[0]]
                found = [match for match in words if match.position in ats]
                passage.append(annotate(text, found, int(fill[ats].sum()), special=start == stop))
        cut = f'<span {FAINT} title="the model does not read this far">{html.escape(self.passage[end:])}</span>'
        style = "max-width: 60em; line-height: 2.4; font-family: sans-serif"
        return f'<div style="{style}"><b>{self!r}</b><br>{query}<hr>{"".join(passage)}{cut}</div>'

    def heatmap(self) -> Figure:
        """Similarities of query tokens (rows) and passage tokens (columns); the [MASK] fill is one grey row of means.

        Beside each row stands its highest similarity, which is framed. Numbers in the grey row: how many [MASK] have
        their highest similarity there.
        """
        words, fill = self.similarity[~self.is_fill], self.similarity[self.is_fill]  # (n, Ld), (Lq - n, Ld)
        tokens = [token for token, is_fill in zip(self.query_tokens, self.is_fill, strict=True) if not is_fill]
        labels = [f"{token}  {best:.2f}" for token, best in zip(tokens, words.max(1), strict=True)]
        if len(fill):
            labels.append(f"{len(fill)} [MASK]  {fill.max(1).sum():.2f}")
        Lq, Ld = len(labels), len(self.passage_tokens)
        n_panels = -(-Ld // COLUMNS)
        width = -(-Ld // n_panels)  # columns of a panel
        height = n_panels * (Lq * CELL + 1)
        figure = Figure(figsize=(width * CELL + 2, height), layout="constrained")
        figure.suptitle(repr(self))
        for panel, axes in enumerate(figure.subplots(n_panels, squeeze=False)[:, 0]):
            columns = range(panel * width, min(Ld, (panel + 1) * width))
            edges = (columns.start - 0.5, columns.stop - 0.5)
            scale = {"vmin": 0, "vmax": 1, "aspect": "equal"}
            axes.imshow(words[:, columns], cmap="Blues", extent=(*edges, len(tokens) - 0.5, -0.5), **scale)
            for row, at in enumerate(words.argmax(1)):
                if at in columns:
                    frame = Rectangle((at - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="darkorange", lw=2)
                    axes.add_patch(frame).set_clip_on(False)
            if len(fill):
                mean = fill.mean(0, keepdims=True)[:, columns]
                axes.imshow(mean, cmap="Greys", extent=(*edges, Lq - 0.5, Lq - 1.5), **scale)
                for at, n in zip(*np.unique(fill.argmax(1), return_counts=True), strict=True):
                    if at in columns:
                        axes.text(at, Lq - 1, n, ha="center", va="center", fontsize=9)
            axes.set(xlim=(columns.start - 0.5, columns.start + width - 0.5), ylim=(Lq - 0.5, -0.5))
            style = {"fontsize": 9, "parse_math": False}  # a "$" is a "$"
            axes.set_xticks(columns, [self.passage_tokens[at] for at in columns], rotation=90, **style)
            axes.set_yticks(range(Lq), labels, **style)
            axes.xaxis.tick_top()
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        return figure


def explain(model: ColBERT, query: str, passage: str) -> Explanation:
    """Explain `model.score([query], [passage])`: the embeddings and the sum are the same."""
    config, queries, passages = model.config, model.encode_queries([query]), model.encode_passages([passage])
    scored = queries[0].any(-1)  # (Lq,) not where the query is padded
    (query,), (passage,) = (
        prepare_texts([query], "query", config.texts()),
        prepare_texts([passage], "passage", config.texts()),
    )
    ids, _ = model.frame_queries(*tokenize(model.backend, [query], config.pieces("query") + FRAME))
    query_tokens, _ = spell(model, query, ids[0].tolist(), "query")
    is_fill = (ids[0] == config.mask_token_id).numpy()  # no text holds that id
    ids, mask = model.frame_passages(*tokenize(model.backend, [passage], config.pieces("passage") + FRAME))
    tokens, spans = spell(model, passage, ids[0].tolist(), "passage")
    kept = model.kept(ids, mask)[0].nonzero()[:, 0].tolist()
    return Explanation(
        passage,
        [query_tokens[at] for at in range(len(query_tokens)) if scored[at]],
        [tokens[at] for at in kept],
        [spans[at] for at in kept],
        is_fill[scored[: len(is_fill)].numpy()],
        (queries[0][scored] @ passages[0].float().T).numpy(),
    )


def spell(model: ColBERT, text: str, ids: list[int], kind: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The piece of text that each framed token stands for and where it lies; special tokens by name, at no width."""
    offsets = model.backend.encode(text, add_special_tokens=False).offsets
    n = model.config.pieces(kind)
    spans = [trim(text, *span) for span in offsets[:n]]
    for at, (this, following) in enumerate(itertools.pairwise(spans)):
        if this != following:  # a lone "▁" before a word may claim the word's first letter too
            spans[at] = (this[0], max(this[0], min(this[1], following[0])))
    end = spans[-1][1] if len(offsets) > n else len(text)
    n_head = len(model.config.frame(kind)[0])
    spans = [(0, 0)] * n_head + spans + [(end, end)] * (len(ids) - len(spans) - n_head)
    names = model.tokenizer.convert_ids_to_tokens(ids)
    return [text[slice(*span)] or name for span, name in zip(spans, names, strict=True)], spans


def trim(text: str, start: int, stop: int) -> tuple[int, int]:
    """The span without white space at its ends: some tokenizers count the space before a word to the word."""
    piece = text[start:stop]
    start += len(piece) - len(piece.lstrip())
    return start, max(start, stop - len(piece) + len(piece.rstrip()))


def annotate(text: str, found: list[Match], n_fill: int, special: bool) -> str:
    """A piece of the passage as HTML: shaded by its highest similarity, under the query tokens that matched it.

    Dots under it: [MASK] matched it. All of it with numbers where the pointer rests.
    """
    piece = html.escape(text)
    if found:
        names = [html.escape(match.query_token) for match in found]
        over = " ".join(names[:NAMES]) + (f" +{len(names) - NAMES}" if len(names) > NAMES else "")
        style = shade(max(match.similarity for match in found))
        piece = f'<ruby style="{style}">{piece}<rt style="font-size: 65%">{over}</rt></ruby>'
    title = [f"{match.query_token} {match.similarity:.2f}" for match in found] + [f"{n_fill} [MASK]"] * (n_fill > 0)
    if title:
        line = "border-bottom: 2px dotted gray" if n_fill else ""
        piece = f'<span title="{html.escape(", ".join(title))}" style="{line}">{piece}</span>'
    return f"<small {FAINT}> {piece} </small>" if special else piece


def shade(similarity: float) -> str:
    """A background whose strength is the similarity; see-through, so that it serves light and dark pages."""
    return f"background: rgba(31, 119, 180, {max(0.0, similarity) ** 2:.2f}); border-radius: 3px; padding: 1px 2px"
