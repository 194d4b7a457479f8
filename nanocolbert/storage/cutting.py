"""Long documents cut to passages, at ends of sentences; ids doc#1, doc#2, ... of a document doc."""

import bisect
import itertools
import re
from collections.abc import Iterator

from nanocolbert.cli import InputError
from nanocolbert.storage.documents import USUAL, Document, Fields, read_documents
from nanocolbert.storage.tsv import check_id

WHOLE = (1, 1)  # a collection that is no shard
PART = re.compile(r"(?<=.)#[0-9]+\Z", re.DOTALL)

# A word: what has no white space, or one character of a script that is written without, and the marks behind it.
CJK, CLOSING = "\u3041-\u30ff\u3400-\u9fff\uf900-\ufaff", "、。，．！？：；」』）】〉》｡…"
WORD = re.compile(rf"[{CJK}][{CLOSING}]*|[^\s{CJK}]+")
# Where a sentence may end: a blank line; a stop before white space; one of those scripts' stops, maybe in quotes.
END = re.compile(r"\n\s*\n|[.!?…][\"'”’»)\]]*(?=\s)|[。！？｡][\"'”’」』）】〉》]*")
BRIEF = re.compile(  # words with a dot, after which a sentence goes on
    r"\W*([^\W\d_]|[A-Za-z](\.[A-Za-z])+|Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|vs|Fig|Figs|Eq|No|Vol|al|cf|ca|approx)\.\Z"
)


def read_passages(
    path,
    what: str,
    fields: Fields = USUAL,
    words: int | None = None,
    overlap: int = 0,
    shard: tuple[int, int] = WHOLE,
    tell=None,
):
    """Documents of a file, cut to passages if `words` says so; shard (i, n): the i-th of every n documents alone.

    Raises InputError on ids that would look like those of passages.
    """
    for document in itertools.islice(read_documents(path, what, fields, tell), shard[0] - 1, None, shard[1]):
        if words is None:
            yield document
            continue
        yield from parts_of(path, document, words, overlap)


def parts_of(path, document: Document, words: int, overlap: int) -> list[Document]:
    """The passages of a document, as `cut` has them. Raises InputError on an id that would look like one of theirs."""
    if document_of(document.id) != document.id:
        raise InputError(
            f"{path}:{document.number}: id {document.id!r} ends as those of the passages that documents are cut to: "
            "rename it, or do not cut"
        )
    passages = list(cut(document, words, overlap))
    for passage in passages:
        check_id(path, document.number, passage.id)
    return passages


def document_of(pid: str) -> str:
    """The id of the document that a passage was cut from; another id as it is."""
    return PART.sub("", pid)


def cut(document: Document, words: int, overlap: int = 0) -> Iterator[Document]:
    """Yield a document's passages of at most `words` words, each after the title; ids doc#1, doc#2, ...

    A passage ends where a sentence does, and begins where one does, about `overlap` words before the last one's end. A
    sentence longer than `words` is cut at words. Together they hold every word, as it was written.
    """
    assert 0 <= overlap < words, (overlap, words)
    number, identifier, text, metadata, title = document
    body = text[len(title) + 1 :] if title else text
    spans = [found.span() for found in WORD.finditer(body)]
    if not spans:
        yield document._replace(id=f"{identifier}#1")
        return
    ends = sentence_ends(body, spans) if len(spans) > words else [len(spans)]
    for i, (start, end) in enumerate(windows(ends, words, overlap), 1):
        passage = body[spans[start][0] : spans[end - 1][1]]
        yield Document(number, f"{identifier}#{i}", f"{title} {passage}" if title else passage, metadata, title)


def sentence_ends(body: str, spans: list[tuple[int, int]]) -> list[int]:
    """How many words there are up to each end of a sentence, the text's own end last.

    A stop ends none where its word is short for another, or a small letter follows.
    """
    ends, n = [], len(spans)
    for found in END.finditer(body):
        at = bisect.bisect_left(spans, (found.end(),))  # words that begin before
        if not 0 < at < n or spans[at - 1][1] > found.end():
            continue
        start, end = spans[at - 1]
        is_stop = found[0][0] in ".!?…"
        if not (is_stop and (body[spans[at][0]].islower() or BRIEF.match(body, start, end))):
            ends.append(at)
    return [*dict.fromkeys(ends), n]


def windows(ends: list[int], words: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Yield (first word, last word + 1) of each passage, given the words up to each sentence's end."""
    n, start, end = ends[-1], 0, 0
    while end < n:
        limit = min(start + words, n)
        at = bisect.bisect_right(ends, limit) - 1  # the last sentence that ends within
        if limit < n and at >= 0 and ends[at] > end:
            whole = ends[at + 1] - ends[at] <= words  # the next one need not be cut
            limit = ends[at] if whole or 2 * (ends[at] - start) >= words else limit
        yield start, limit
        end = limit
        if end < n:
            at = bisect.bisect_right(ends, end)  # the sentence that goes on there, or begins
            is_start = at > 0 and ends[at - 1] == end
            fits = ends[at] - words if is_start and ends[at] - end <= words else 0  # for it to be there as a whole
            least = max(start + 1, end - overlap, fits)
            first = bisect.bisect_left(ends, least)  # the first sentence that begins there or later
            start = ends[first] if ends[first] < end else least
