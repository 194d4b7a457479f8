"""Why a passage scores as it does: which passage token each query token matched, and how strongly.

    hit = Searcher("index").search("how do I read a gzip file?", k=1)[0]
    found = explain(model, "how do I read a gzip file?", hit)    # or a text in place of the hit
    found                # in a notebook: the passage in colour, over its tokens the query tokens that matched them
    found.matches()      # rows (query token, passage token, similarity, position); their similarities make found.score
    found.heatmap()      # the similarities, as a matplotlib figure

The score is a sum over query tokens (MaxSim; paper, eq. 3), so nothing here is an approximation. Where a model or an
index pools passages, a vector is of several tokens: what is explained is then the score without pooling. The [MASK]
fill of a query scores too (query augmentation); it is shown as one, in grey.
"""

import html
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nanocolbert.cli import InputError
from nanocolbert.text import prepare_texts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 45  # passage tokens side by side in a heatmap; of a longer passage those that matter
CELL = 0.24  # inches
DIGITS = 3  # of a similarity in JSON
NAMES = 3  # query tokens written over a passage token in HTML; more are counted
FAINT = "opacity: 0.55"
GAP = "⋯"  # stands for columns that are left out


class Match(NamedTuple):
    """A query token and the passage token most similar to it; position counts the passage's tokens from 0."""

    query_token: str
    passage_token: str
    similarity: float
    position: int


class Token(NamedTuple):
    """A token: the piece of text that it stands for, or its name if it is special; where that lies in the text."""

    text: str
    span: tuple[int, int]  # of no width where the token is special
    continues: bool  # the word that the token before it began

    @property
    def label(self) -> str:
        """As word pieces are written: ## before what goes on with a word."""
        return f"##{self.text}" if self.continues else self.text

    @property
    def is_special(self) -> bool:
        return self.span[0] == self.span[1]


class Piece(NamedTuple):
    """A piece of the passage as it is shown: what matched one place, or the text up to the next such place."""

    text: str
    matched: list[tuple[Token, float]]  # query tokens that matched it, with their similarities
    n_fill: int  # [MASK] that matched it
    is_special: bool  # a special token's name, which is not in the text
    is_read: bool  # False: the model does not read this far

    def to_dict(self) -> dict:
        """Itself for JSON; what is nothing is left out."""
        found = {"text": self.text}
        if self.matched:
            found["similarity"] = round(max(similarity for _, similarity in self.matched), DIGITS)
            found["matched"] = [[token.label, round(similarity, DIGITS)] for token, similarity in self.matched]
        found |= {"fill": self.n_fill} if self.n_fill else {}
        return found | ({"special": True} if self.is_special else {}) | ({} if self.is_read else {"unread": True})


@dataclass(repr=False)
class Explanation:
    """The similarities behind one score.

    query (Lq) and tokens (Ld) of the passage; is_fill (Lq,): true at the [MASK] fill; similarity (Lq, Ld) fp32.
    """

    passage: str
    query: list[Token]
    tokens: list[Token]
    is_fill: np.ndarray
    similarity: np.ndarray

    @property
    def query_tokens(self) -> list[str]:
        """What the query's tokens stand for."""
        return [token.text for token in self.query]

    @property
    def passage_tokens(self) -> list[str]:
        """What the passage's tokens stand for."""
        return [token.text for token in self.tokens]

    @property
    def score(self) -> float:
        """MaxSim."""
        return float(self.similarity.max(1).sum())

    def matches(self) -> list[Match]:
        """What each query token matched, in the order of the query."""
        best = self.similarity.argmax(1).tolist()
        return [
            Match(token.text, self.tokens[at].text, float(row[at]), at)
            for token, at, row in zip(self.query, best, self.similarity, strict=True)
        ]

    def __repr__(self) -> str:
        best, n_fill = self.similarity.max(1), int(self.is_fill.sum())
        words = f"score {self.score:.2f} = {best[~self.is_fill].sum():.2f} from {len(best) - n_fill} tokens"
        return words + (f" + {best[self.is_fill].sum():.2f} from {n_fill} [MASK]" if n_fill else "")

    def _words(self) -> list[tuple[Token, Match]]:
        """Tokens and matches of the query without its fill."""
        pairs = zip(self.query, self.matches(), self.is_fill, strict=True)
        return [(token, match) for token, match, is_fill in pairs if not is_fill]

    def pieces(self) -> list[Piece]:
        """The passage in order, special tokens and the text that is not read among it; the other texts make it up."""
        words, pieces, plain, end = self._words(), [], "", 0
        fill = np.bincount(self.similarity[self.is_fill].argmax(1), minlength=len(self.tokens))  # (Ld,)
        spans = [token.span for token in self.tokens]
        for (start, stop), group in itertools.groupby(range(len(spans)), spans.__getitem__):
            plain += self.passage[end:start]
            end = stop
            group = list(group)  # tokens of one place are pieces of one character; special tokens have none
            for ats in [group] if stop > start else [[at] for at in group]:
                matched = [(token, match.similarity) for token, match in words if match.position in ats]
                n_fill, text = int(fill[ats].sum()), self.passage[start:stop]
                if text and not matched and not n_fill:
                    plain += text
                    continue
                pieces += [Piece(plain, [], 0, False, True)] * bool(plain)
                pieces.append(Piece(text or self.tokens[ats[0]].text, matched, n_fill, not text, True))
                plain = ""
        pieces += [Piece(plain, [], 0, False, True)] * bool(plain)
        return pieces + [Piece(self.passage[end:], [], 0, False, False)] * (end < len(self.passage))

    def to_dict(self) -> dict:
        """All of it for JSON: tokens with their spans, each query token's match, similarities rounded to 3 digits."""
        rows = zip(self.query, self.matches(), self.is_fill.tolist(), strict=True)
        return {
            "score": round(self.score, DIGITS),
            "passage": self.passage,
            "query": [
                {
                    "token": token.label,
                    "special": token.is_special,
                    "fill": is_fill,
                    "similarity": round(match.similarity, DIGITS),
                    "position": match.position,
                }
                for token, match, is_fill in rows
            ],
            "tokens": [{"token": t.label, "span": t.span, "special": t.is_special} for t in self.tokens],
            "similarity": np.round(self.similarity.astype(float), DIGITS).tolist(),
            "pieces": [piece.to_dict() for piece in self.pieces()],
        }

    # ------------------------------------------------------------------------------------------------------------ HTML

    def _repr_html_(self) -> str:
        """The query, each token with its similarity; the passage, over its tokens those that matched them; a legend."""
        query = " ".join(chip(token, match.similarity) for token, match in self._words())
        passage = "".join(map(annotate, self.pieces()))
        style = "max-width: 60em; line-height: 2.6; font-family: sans-serif"
        head, foot = f"<b>{self!r}</b><br>{query}", legend(bool(self.is_fill.any()))
        return f'<div style="{style}">{head}<hr>{passage}<hr>{foot}</div>'

    # --------------------------------------------------------------------------------------------------------- heatmap

    def heatmap(self, columns: int = COLUMNS) -> "Figure":
        """Similarities of query tokens (rows) and passage tokens (columns); the [MASK] fill is one grey row of means.

        Beside each row stands its highest similarity, which is framed. Numbers in the grey row: how many [MASK] have
        their highest similarity there. A passage of more than `columns` tokens is shown by those that matter: what was
        matched, then what is most similar; "⋯" stands for the rest.
        """
        from matplotlib.figure import Figure  # takes half a second, and HTML needs none
        from matplotlib.patches import Rectangle

        words, fill = self.similarity[~self.is_fill], self.similarity[self.is_fill]  # (n, Ld), (Lq - n, Ld)
        labels = [f"{token.label}  {match.similarity:.2f}" for token, match in self._words()]
        if len(fill):
            labels.append(f"{len(fill)} [MASK]  {fill.max(1).sum():.2f}")
        shown = self._columns(columns)  # positions, -1 for a gap
        place = {at: column for column, at in enumerate(shown) if at >= 0}
        width, height = len(shown), len(labels)
        longest = max((len(self.tokens[at].label) for at in place), default=0)
        figure = Figure(figsize=(width * CELL + 3.2, (height + 3) * CELL + 0.08 * longest), layout="constrained")
        axes = figure.subplots()
        scale = {"vmin": 0, "vmax": max(1.0, float(self.similarity.max())), "aspect": "equal"}
        image = axes.imshow(
            pick(words, shown), cmap="Blues", extent=(-0.5, width - 0.5, len(words) - 0.5, -0.5), **scale
        )
        for row, at in enumerate(words.argmax(1).tolist()):
            frame = Rectangle((place[at] - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="darkorange", lw=2)
            axes.add_patch(frame).set_clip_on(False)
        if len(fill):
            mean = pick(fill.mean(0, keepdims=True), shown)
            axes.imshow(mean, cmap="Greys", extent=(-0.5, width - 0.5, height - 0.5, height - 1.5), **scale)
            for at, n in zip(*np.unique(fill.argmax(1), return_counts=True), strict=True):
                axes.text(place[int(at)], height - 1, n, ha="center", va="center", fontsize=9)
        axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
        style = {"fontsize": 9, "parse_math": False}  # a "$" is a "$"
        axes.set_xticks(range(width), [self.tokens[at].label if at >= 0 else GAP for at in shown], rotation=90, **style)
        axes.set_yticks(range(height), labels, **style)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        figure.suptitle(repr(self), fontsize=10)
        bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02, label="similarity (grey row: mean of the fill)")
        bar.outline.set_visible(False)
        return figure

    def _columns(self, n: int) -> list[int]:
        """Positions of the tokens that a heatmap of n columns shows, in order; -1 where some are left out."""
        Ld = len(self.tokens)
        if Ld <= n:
            return list(range(Ld))
        chosen = set(self.similarity.argmax(1).tolist())
        best = self.similarity[~self.is_fill].max(0, initial=0.0)
        for at in np.argsort(-best, kind="stable").tolist():
            if len(with_gaps(chosen | {at}, Ld)) <= n:
                chosen.add(at)
        return with_gaps(chosen, Ld)


def explain(model, query: str, passage) -> Explanation:
    """Explain `model.score([query], [passage])`: the embeddings and the sum are the same, but for pooling.

    model: a ColBERT. passage: a text, or a Hit of Searcher. Raises InputError for a hit without a text.
    """
    text = passage if isinstance(passage, str) else passage.text
    if text is None:
        raise InputError(f"passage {passage.pid}: the index keeps no texts: give the text itself")
    return explain_all(model, query, [text])[0]


def explain_all(model, query: str, texts: list[str], vectors: list[np.ndarray] | None = None) -> list[Explanation]:
    """Explain the scores of several passages for a query.

    vectors: the passages' embeddings (Ld, D) in the order of their tokens, where they are at hand, not pooled.
    """
    ids, _ = model.frame_queries(*model.tokenize([query], "query"))
    embedded = model.encode_queries([query])[0, : ids.shape[1]]  # (Lq, D) without the rows that pad a shorter query
    scored = embedded.any(-1)  # (Lq,)
    is_fill = ids[0] == model.config.mask_token_id  # no text holds that id
    (query,) = prepare_texts([query], "query", model.config.texts())
    tokens = spell(model, query, ids[0].tolist(), "query")
    tokens = [tokens[at] for at in scored.nonzero()[:, 0].tolist()]
    if vectors is None:
        vectors = [part.numpy() for part in model.encode_passages(texts, pool_factor=1)]
    found = []
    for text, own in zip(texts, vectors, strict=True):
        passage_ids, mask = model.frame_passages(*model.tokenize([text], "passage"))
        (text,) = prepare_texts([text], "passage", model.config.texts())
        passage = spell(model, text, passage_ids[0].tolist(), "passage")
        passage = [passage[at] for at in model.kept(passage_ids, mask)[0].nonzero()[:, 0].tolist()]
        if len(passage) != len(own):
            raise InputError(f"passage {text[:40]!r}: {len(own)} embeddings of {len(passage)} tokens: not this model's")
        similarity = embedded[scored].numpy() @ own.astype(np.float32).T
        found.append(Explanation(text, tokens, passage, is_fill[scored].numpy(), similarity))
    return found


# ----------------------------------------------------------------------------------------------------------- to tokens


def spell(model, text: str, ids: list[int], kind: str) -> list[Token]:
    """The piece of text that each framed token stands for; special tokens by name."""
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
    before = [(0, 0), *spans]
    return [
        Token(text[slice(*span)] or name, span, goes_on(name, text, *before[at], *span))
        for at, (span, name) in enumerate(zip(spans, names, strict=True))
    ]


def goes_on(name: str, text: str, start: int, stop: int, first: int, end: int) -> bool:
    """Whether the token at text[first:end] goes on with the word of the one before it, at text[start:stop].

    WordPiece says so by ##; other tokenizers mark the beginnings of words.
    """
    if name.startswith("##"):
        return True
    is_inside = start < stop == first < end and text[stop - 1].isalnum() and text[first].isalnum()
    return is_inside and not name.startswith(("▁", "Ġ")) and not is_ideograph(text[first])


def is_ideograph(letter: str) -> bool:
    """Whether each letter of the script is a word to WordPiece."""
    return "\u2e80" <= letter <= "\u9fff"


def trim(text: str, start: int, stop: int) -> tuple[int, int]:
    """The span without white space at its ends: some tokenizers count the space before a word to the word."""
    piece = text[start:stop]
    start += len(piece) - len(piece.lstrip())
    return start, max(start, stop - len(piece) + len(piece.rstrip()))


# ----------------------------------------------------------------------------------------------------------- to figures


def with_gaps(chosen: set[int], n: int) -> list[int]:
    """Chosen positions among n in order, and -1 where some between them, or at the end, are left out."""
    shown, end = [], 0
    for at in sorted(chosen):
        shown += [-1] * (at > end) + [at]
        end = at + 1
    return shown + [-1] * (end < n)


def pick(similarity: np.ndarray, shown: list[int]) -> np.ma.MaskedArray:
    """Columns (n, len(shown)) of similarities (n, Ld), nothing at a gap."""
    is_gap = np.broadcast_to(np.array(shown) < 0, (len(similarity), len(shown)))
    return np.ma.array(similarity[:, shown], mask=is_gap)


# -------------------------------------------------------------------------------------------------------------- to HTML


def chip(token: Token, similarity: float) -> str:
    """A query token with its highest similarity; pale if it is special."""
    style = shade(similarity) + (f"; {FAINT}" if token.is_special else "")
    name = f'<span style="{style}">{html.escape(token.label)}</span>'
    return f'{name}<sub style="{FAINT}; margin-right: 0.4em">{similarity:.2f}</sub>'


def annotate(piece: Piece) -> str:
    """A piece of the passage as HTML: shaded by its highest similarity, under the query tokens that matched it.

    Dots under it: [MASK] matched it. All of it with numbers where the pointer rests.
    """
    shown, matched = html.escape(piece.text), piece.matched
    if not piece.is_read:
        return f'<span style="{FAINT}" title="the model does not read this far">{shown}</span>'
    if matched:
        words = sorted(matched, key=lambda pair: pair[0].is_special)  # they tell more than [CLS] and the like
        names = [over(token) for token, _ in words[:NAMES]] + [f"+{len(words) - NAMES}"] * (len(words) > NAMES)
        style = shade(max(similarity for _, similarity in matched))
        rt = f'<rt style="font-size: 65%">&nbsp;{" · ".join(names)}&nbsp;</rt>'
        shown = f'<ruby style="{style}; margin: 0 1px">{shown}{rt}</ruby>'
    title = [f"{token.text} {similarity:.2f}" for token, similarity in matched]
    title += [f"{piece.n_fill} [MASK]"] * (piece.n_fill > 0)
    if title:
        line = "border-bottom: 2px dotted gray" if piece.n_fill else ""
        shown = f'<span title="{html.escape(", ".join(title))}" style="{line}">{shown}</span>'
    return f'<small style="{FAINT}"> {shown} </small>' if piece.is_special else shown


def over(token: Token) -> str:
    """A query token as it stands over what it matched."""
    name = html.escape(token.label)
    return f'<span style="{FAINT}">{name}</span>' if token.is_special else name


def legend(has_fill: bool) -> str:
    """What colours, small print and dots mean, in one line."""
    scale = " ".join(f'<span style="{shade(level)}">{level:g}</span>' for level in (0.25, 0.5, 0.75, 1.0))
    parts = [
        f"similarity {scale}",
        "above a token: the query tokens that matched it",
        "pale: special tokens, text not read",
    ]
    if has_fill:
        parts.insert(2, '<span style="border-bottom: 2px dotted gray">dots</span>: the [MASK] fill matched it')
    return f'<small style="opacity: 0.75">{" &nbsp;|&nbsp; ".join(parts)}</small>'


def shade(similarity: float) -> str:
    """A background whose strength is the similarity; see-through, so that it serves light and dark pages."""
    return f"background: rgba(31, 119, 180, {max(0.0, similarity) ** 2:.2f}); border-radius: 3px; padding: 1px 2px"
