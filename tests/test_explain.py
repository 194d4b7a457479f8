"""explain: its rows and its sum against plain loops and `score`; its pictures by what they hold."""

import io
import itertools
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib.patches import Rectangle
from test_model import modernbert, train_tokenizer, xlm_roberta

from model import ColBERT
from nanocolbert.cli import InputError
from nanocolbert.explain import COLUMNS, GAP, explain
from search import Hit

QUERY = "find the $old$ boat, and <b>drums</b>?"
PASSAGES = [
    "The old boat, and a drum!",
    "",
    "?!...",
    "house " * 600,
    "a <script>alert('boat & drum')</script>   \"eagle\"\n grape",
    "\u00e9 \u65e5\u672c \u2014 Unknown, boats",
]


@pytest.fixture(scope="module")
def colbert(encoder_dir):
    torch.manual_seed(1)
    return ColBERT.from_base(encoder_dir, dim=16).eval()


@pytest.fixture(autouse=True)
def fp32(monkeypatch):
    monkeypatch.setattr("nanocolbert.compute.fast_dtype", lambda device: torch.float32)


@pytest.mark.parametrize("passage", PASSAGES)
def test_rows_are_the_loop_and_sum_to_the_score(colbert, passage):
    found = explain(colbert, QUERY, passage)
    query, tokens = colbert.encode_queries([QUERY])[0].tolist(), found.passage_tokens
    stored = colbert.encode_passages([passage])[0].float().tolist()
    assert len(found.matches()) == 32 and len(stored) == len(tokens) == len(found.tokens)
    for q, match in zip(query, found.matches(), strict=True):
        similarities = [sum(a * b for a, b in zip(q, d, strict=True)) for d in stored]
        assert match.similarity == pytest.approx(max(similarities), abs=1e-5)
        assert similarities[match.position] == pytest.approx(max(similarities), abs=1e-5)
        assert match.passage_token == tokens[match.position]
    score = colbert.score([QUERY], [passage]).item()
    assert found.score == pytest.approx(score, abs=1e-4)
    assert sum(match.similarity for match in found.matches()) == pytest.approx(score, abs=1e-4)
    assert repr(found).startswith(f"score {found.score:.2f} = ")


def test_tokens_are_pieces_of_the_texts(colbert):
    found = explain(colbert, "Find the EAGLE, [MASK]", "A flute; [SEP] floats")
    words = ["Find", "the", "EAGLE", ",", "[", "m", "a", "s", "k", "]"]
    assert [token.lower() for token in found.query_tokens[2:12]] == [word.lower() for word in words]
    assert found.query_tokens[:2] == ["[CLS]", "[Q]"] and found.query_tokens[12] == "[SEP]"
    assert found.query_tokens[13:] == ["[MASK]"] * 19 and found.is_fill.tolist() == [False] * 13 + [True] * 19
    assert found.passage_tokens[:4] == ["[CLS]", "[D]", "A", "flute"] and found.passage_tokens[-1] == "[SEP]"
    assert "".join(found.passage_tokens[4:-1]) == "SEPfloats"  # brackets and the semicolon are dropped
    assert all(found.passage[slice(*token.span)] == token.text for token in found.tokens[2:-1])
    assert [token.span for token in found.tokens[:2]] == [(0, 0)] * 2
    assert found.tokens[-1].span == (len(found.passage),) * 2
    assert [token.label for token in found.query[6:10]] == ["[", "M", "##A", "##S"]
    assert all(token.is_special == token.text.startswith("[") for token in found.tokens)


def test_what_the_model_does_not_read_is_told_apart(colbert):
    found = explain(colbert, QUERY, "house " * 600)
    assert found.tokens[-1].span == (177 * 6 - 1,) * 2
    shown = Page(found)
    assert shown.unread == " house" * 423 + " " and shown.text == found.passage
    assert Page(explain(colbert, QUERY, "house " * 177)).unread == ""


def test_how_a_user_pads_and_cuts_is_of_no_matter(colbert):
    expected = explain(colbert, QUERY, "house " * 600)
    colbert.tokenizer(["boat " * 9], padding="max_length", truncation=True, max_length=5)
    found = explain(colbert, QUERY, "house " * 600)
    assert found.tokens == expected.tokens and found.query == expected.query
    assert np.array_equal(found.similarity, expected.similarity)


class Page(HTMLParser):
    """The passage as the HTML shows it, without special tokens and what stands over the words; and its unread end."""

    def __init__(self, found):
        super().__init__()
        self.text, self.unread, self.titles, self.over, self.open = "", "", [], [], []
        page = found._repr_html_()
        self.query, passage, foot = page.split("<hr>")
        self.feed(passage)
        self.close()
        assert self.open == [] and page.startswith("<div") and foot.endswith("</div>")
        self.open = None

    def handle_starttag(self, tag, attributes):
        title = dict(attributes).get("title", "")
        self.titles += [title] if title else []
        self.open.append(tag if "not read" not in title else "unread")

    def handle_endtag(self, tag):
        if tag != "div":
            assert self.open.pop() in (tag, "unread")

    def handle_data(self, data):
        if "rt" in self.open:
            self.over.append(data)
        elif "small" not in self.open:
            self.text += data
            self.unread += data if "unread" in self.open else ""


@pytest.mark.parametrize("passage", PASSAGES)
def test_html_shows_the_passage_as_it_is(colbert, passage):
    found = explain(colbert, QUERY, passage)
    page = Page(found)
    assert page.text == passage
    assert "<script" not in found._repr_html_() and "<b>drums" not in found._repr_html_()
    titles = ", ".join(page.titles)
    words = [match for match, is_fill in zip(found.matches(), found.is_fill, strict=True) if not is_fill]
    assert all(f"{match.query_token} {match.similarity:.2f}" in titles for match in words)
    assert page.query.count("<sub") == len(words)
    n_fill = sum(int(part.split()[0]) for part in titles.split(", ") if part.endswith(" [MASK]"))
    assert n_fill == found.is_fill.sum()


@pytest.mark.parametrize("passage", PASSAGES)
def test_pieces_and_json(colbert, passage):
    found = explain(colbert, QUERY, passage)
    pieces, told = found.pieces(), json.loads(json.dumps(found.to_dict()))
    assert "".join(piece.text for piece in pieces if not piece.is_special) == passage
    matched = [(token.label, similarity) for piece in pieces for token, similarity in piece.matched]
    words = [match for match, is_fill in zip(found.matches(), found.is_fill, strict=True) if not is_fill]
    assert sorted(similarity for _, similarity in matched) == sorted(match.similarity for match in words)
    assert sum(piece.n_fill for piece in pieces) == found.is_fill.sum()
    plain = [not piece.matched and not piece.n_fill and not piece.is_special and piece.is_read for piece in pieces]
    assert not any(one and other for one, other in itertools.pairwise(plain))  # as long as can be
    assert [match.passage_token for match in found.matches()] == [
        found.passage_tokens[token["position"]] for token in told["query"]
    ]
    assert np.allclose(told["similarity"], found.similarity, atol=6e-4)
    assert sum(token["similarity"] for token in told["query"]) == pytest.approx(told["score"], abs=0.02)
    assert [token["span"] for token in told["tokens"]] == [list(token.span) for token in found.tokens]
    assert [piece["text"] for piece in told["pieces"]] == [piece.text for piece in pieces]
    for piece, shown in zip(told["pieces"], pieces, strict=True):
        assert ("matched" in piece) == bool(shown.matched) == ("similarity" in piece)
        assert piece.get("special", False) == shown.is_special and piece.get("unread", False) != shown.is_read


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("passage", PASSAGES)
@pytest.mark.parametrize("columns", (40, 8))
def test_heatmap_shows_what_matters(colbert, passage, columns):
    found = explain(colbert, QUERY, passage)
    figure = found.heatmap(columns)
    axes = figure.axes[0]  # the other one is the colour bar
    shown, n_words = found._columns(columns), int((~found.is_fill).sum())
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == [found.tokens[at].label if at >= 0 else GAP for at in shown]
    positions = [at for at in shown if at >= 0]
    assert {match.position for match in found.matches()} <= set(positions)
    if len(found.tokens) <= columns:
        assert positions == list(range(len(found.tokens)))
    frames = [(patch.get_y() + 0.5, shown[round(patch.get_x() + 0.5)]) for patch in axes.patches]
    assert all(isinstance(patch, Rectangle) for patch in axes.patches)
    assert sorted(frames) == [(row, match.position) for row, match in enumerate(found.matches()[:n_words])]
    assert sum(int(text.get_text()) for text in axes.texts) == 32 - n_words
    drawn = axes.images[0].get_array()
    assert np.array_equal(drawn[:, np.array(shown) >= 0], found.similarity[:n_words][:, positions])
    assert np.ma.getmaskarray(drawn).all(0).tolist() == [at < 0 for at in shown]
    picture = io.BytesIO()
    figure.savefig(picture, dpi=40)
    assert picture.getvalue()[:4] == b"\x89PNG"


def test_of_a_long_passage_the_heatmap_leaves_out_what_is_least_similar(colbert):
    found = explain(colbert, QUERY, "house " * 60 + "boat " + "flute drum " * 40)
    shown = found._columns(COLUMNS)
    assert len(shown) <= max(COLUMNS, 2 * len({match.position for match in found.matches()}) + 1) < len(found.tokens)
    assert all(before >= 0 or at >= 0 for before, at in itertools.pairwise(shown))
    assert [at for at in shown if at >= 0] == sorted({at for at in shown if at >= 0})


def test_a_hit_is_explained_by_its_text(colbert):
    hit = Hit("p1", 1.0, "The old boat")
    assert np.array_equal(explain(colbert, QUERY, hit).similarity, explain(colbert, QUERY, hit.text).similarity)
    with pytest.raises(InputError, match="p1: the index keeps no texts"):
        explain(colbert, QUERY, hit._replace(text=None))


def test_it_takes_no_matplotlib_to_import():
    code = "import sys, nanocolbert.explain; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_html_has_a_legend_and_pale_special_tokens(colbert):
    page = explain(colbert, QUERY, PASSAGES[0])._repr_html_()
    query, _, foot = page.split("<hr>")
    assert (
        "similarity" in foot
        and "[MASK]" in foot
        and "[MASK]" not in explain(colbert, "drum " * 40, "boat")._repr_html_()
    )
    pale = re.findall(r'<span style="[^"]*opacity[^"]*">([^<]*)</span>', query)
    assert pale == ["[CLS]", "[Q]", "[SEP]"]


def test_a_query_without_fill(colbert):
    found = explain(colbert, "drum " * 40, "boat")
    assert not found.is_fill.any() and "[MASK]" not in repr(found) + found._repr_html_()
    assert not found.heatmap().axes[0].texts


@pytest.mark.parametrize("build, kind", [(modernbert, "bpe"), (xlm_roberta, "unigram")])
def test_other_tokenizers(build, kind, tmp_path):
    """Their pieces hold the space before a word, or a part of a character."""
    tokenizer = train_tokenizer(kind)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("cls", "sep", "pad")}
    build(len(tokenizer), ids).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    colbert = ColBERT.from_base(tmp_path, dim=16).eval()
    for passage in ("the old boat, and  a drum", "apple cloud \u00e9 \u65e5\u672c", " eagle"):
        found = explain(colbert, "find the eagle", passage)
        assert found.score == pytest.approx(colbert.score(["find the eagle"], [passage]).item(), abs=1e-4)
        assert Page(found).text == passage
        for token, (start, stop), _ in found.tokens:
            if stop > start:
                assert token == passage[start:stop] == token.strip()
