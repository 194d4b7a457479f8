"""Long documents cut to passages: where they end, what they overlap by, and that no word is lost."""

import random

import pytest

from nanocolbert.cli import InputError
from nanocolbert.storage.cutting import WORD, cut, document_of, read_passages
from nanocolbert.storage.documents import Document

COLLECTION = "collection: pid, passage"


def passages(text: str, words: int, overlap: int = 0, title: str = "") -> list[str]:
    whole = f"{title} {text}" if title else text
    metadata = {"title": title} if title else None
    found = list(cut(Document(7, "doc", whole, metadata, title), words, overlap))
    assert [passage.id for passage in found] == [f"doc#{i}" for i in range(1, len(found) + 1)]
    assert all(passage.number == 7 and passage.metadata == metadata and passage.title == title for passage in found)
    return [passage.text for passage in found]


def test_passages_end_where_sentences_do():
    text = 'One two three. Four five six seven! "Eight nine?" Ten e.g. eleven, Dr. Twelve, J. Doe of the U.S. Navy.'
    assert passages(text, 7) == [
        "One two three. Four five six seven!",
        '"Eight nine?" Ten e.g. eleven, Dr. Twelve,',  # of a sentence of more than 7 words: cut at words
        "J. Doe of the U.S. Navy.",
    ]
    assert passages(text, 12)[1] == "Ten e.g. eleven, Dr. Twelve, J. Doe of the U.S. Navy."  # 10 words are not cut
    assert passages("a b\n\nc d e\nf g h", 7) == ["a b", "c d e\nf g h"]  # a blank line; a line's end is none
    assert passages("one two. three four. Five six", 5) == ["one two. three four.", "Five six"]
    assert passages("3.5 is 2.1 more", 2) == ["3.5 is", "2.1 more"]
    assert passages("short text.", 100) == ["short text."]


def test_scripts_without_spaces():
    assert passages("今日は晴れ。雨が降る。「雪だ。」と言う。", 6) == [
        "今日は晴れ。",
        "雨が降る。",
        "「雪だ。」と言う。",
    ]
    assert passages("一二三四五六七", 3) == ["一二三", "四五六", "七"]


def test_titles_come_before_each_passage():
    assert passages("one two. Three four.", 2, title="A title") == ["A title one two.", "A title Three four."]
    assert passages("", 2) == [""]
    assert [passage.text for passage in cut(Document(1, "d", "T", None, "T"), 2, 0)] == ["T"]


def test_overlap_is_of_whole_sentences_where_they_fit():
    text = "One two. Three four. Five six. Seven eight. Nine ten."
    for overlap in (2, 3):
        assert passages(text, 6, overlap) == [
            "One two. Three four. Five six.",
            "Five six. Seven eight. Nine ten.",
        ]
    assert passages(text, 6, 1)[1] == "six. Seven eight. Nine ten."
    assert passages("a b c d e f g h", 4, 1) == ["a b c d", "d e f g", "g h"]  # none: of words
    assert passages("a b cc. D e f g hh.", 5, 2) == ["a b cc.", "D e f g hh."]  # the next sentence would not fit


@pytest.mark.parametrize("seed", range(30))
def test_no_word_is_lost(seed):
    rng = random.Random(seed)
    pieces = ["word", "End.", "Why?", "etc.", "“So.”", "漢字", "。", "e.g.", "x" * 50, "A.", "…"]
    gaps = [" ", " ", "  ", "\n", "\n\n", "", "\t"]
    text = "".join(rng.choice(pieces) + rng.choice(gaps) for _ in range(rng.randrange(1, 300)))
    words, all_words = rng.randrange(1, 40), WORD.findall(text)
    overlap = rng.randrange(words)
    assert [word for passage in passages(text, words) for word in WORD.findall(passage)] == all_words
    assert all(0 < len(WORD.findall(passage)) <= words for passage in passages(text, words))
    end = 0
    for passage in passages(text, words, overlap):
        found = WORD.findall(passage)
        assert passage in text and len(found) <= words
        starts = [i for i in range(max(0, end - overlap), end + 1) if all_words[i : i + len(found)] == found]
        assert starts  # it begins at most `overlap` words before the last one's end
        end = max(start + len(found) for start in starts if start + len(found) > end)
    assert end >= len(all_words)


def test_read_passages(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('id,text\na,"one two.\nThree four."\nb,\n')
    assert [document.id for document in read_passages(path, COLLECTION)] == ["a", "b"]
    found = list(read_passages(path, COLLECTION, words=2))
    assert [document[:3] for document in found] == [
        (2, "a#1", "one two."),
        (2, "a#2", "Three four."),
        (4, "b#1", ""),
    ]
    path.write_text("id,text\na,one\nb#3,two\n")
    assert len(list(read_passages(path, COLLECTION))) == 2
    with pytest.raises(InputError, match=r"a\.csv:3: id 'b#3' ends as those of the passages that documents are cut to"):
        list(read_passages(path, COLLECTION, words=2))
    path.write_text(f"id,text\n{'x' * 255},one two three\n")
    with pytest.raises(InputError, match=r"a\.csv:2: id of 257 bytes"):
        list(read_passages(path, COLLECTION, words=1))


def test_document_of():
    ids = ["doc#2", "doc", "doc#", "#2", "a#1#12", "doc#x", "doc#2 ", "7#10"]
    assert list(map(document_of, ids)) == ["doc", "doc", "doc#", "#2", "a#1", "doc#x", "doc#2 ", "7"]
