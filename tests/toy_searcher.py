"""What stands in for a Searcher where a test is of the server alone; a server of it, or of a real one, at a port."""

import contextlib
import threading
from typing import NamedTuple

import httpx
import numpy as np
from conftest import ROOT

import serve
from nanocolbert.cli import InputError
from nanocolbert.explain import Explanation, Token
from nanocolbert.server.app import Settings, Workers, make_app
from nanocolbert.server.worker import Worker

TOKEN = "correct-horse"
CHANGES = {"Authorization": f"Bearer {TOKEN}"}


class Hit(NamedTuple):
    pid: str
    score: float
    text: str | None
    metadata: dict | None


class ToySearcher:
    """Passages score by how many words of the query they have; a query's "embedding" is itself."""

    fields, folders = ("year",), ["/home/me/index"]

    def __init__(self, passages: dict[str, str]):
        self.passages, self.version = dict(passages), 1
        self.encoded: list[list[str]] = []  # what was asked, batch by batch
        self.searched: list[tuple[int, dict]] = []  # how many at once, with which settings
        self.go_on = threading.Event()  # encoding waits for it
        self.go_on.set()
        self.complaint: Exception | None = None  # of reload

    def __len__(self) -> int:
        return len(self.passages)

    def reload(self) -> bool:
        if self.complaint:
            raise self.complaint
        return False

    def encode(self, texts: list[str]) -> np.ndarray:
        self.encoded.append(texts)
        assert self.go_on.wait(30)
        if "explode" in texts:
            raise RuntimeError("exploded\nin two lines")
        return np.array(texts, object)

    def search(self, queries: np.ndarray, k: int, quality: str, among=None, where=None, by_document=False):
        settings = {"k": k, "quality": quality, "among": among, "where": where, "by_document": by_document}
        self.searched.append((len(queries), settings))
        if where:
            raise InputError(f"where: no such field\nin {where!r}")
        return [self._search(query.split(), k, among) for query in queries]

    def _search(self, words: list[str], k: int, among) -> list[Hit]:
        scores = {pid: sum(word in text.split() for word in words) for pid, text in self.passages.items()}
        best = sorted(scores, key=lambda pid: -scores[pid])
        hits = [Hit(pid, float(scores[pid]), self.passages[pid], {"year": 2020}) for pid in best]
        return [hit for hit in hits if among is None or hit.pid in among][:k]

    def explain(self, query: str, pids: list[str]) -> list[Explanation]:
        return [self._explain(query, pid) for pid in pids]

    def _explain(self, query: str, pid: str) -> Explanation:
        if pid not in self.passages:
            raise InputError(f"{self.folders[0]}: has no passage {pid}")
        text, (asked, tokens) = self.passages[pid], ([*spell(query)], [*spell(self.passages[pid])])
        same = np.array([[float(a.text == b.text) for b in tokens] for a in asked], np.float32)
        return Explanation(text, asked, tokens, np.zeros(len(asked), bool), same)

    def add(self, ids, texts, metadata=None) -> int:
        if there := self.passages.keys() & set(ids):
            raise InputError(f"has a passage {min(there)} already")
        return self.upsert(ids, texts, metadata)

    def upsert(self, ids, texts, metadata=None) -> int:
        self.passages |= dict(zip(ids, texts, strict=True))
        self.version += 1
        return len(ids)

    def delete(self, ids) -> int:
        if gone := set(ids) - self.passages.keys():
            raise InputError(f"has no passage {min(gone)}")
        for pid in ids:
            del self.passages[pid]
        self.version += 1
        return len(ids)


def spell(text: str):
    """A Token a word, and [CLS]."""
    yield Token("[CLS]", (0, 0), False)
    end = 0
    for word in text.split():
        start = text.index(word, end)
        end = start + len(word)
        yield Token(word, (start, end), False)


@contextlib.contextmanager
def serving(searcher, most_waiting: int = 256, **settings):
    """A client of a server of the searcher, on a port that was free."""
    listener, ends = serve.listen("127.0.0.1", 0), []
    workers = Workers(Worker(searcher, most_waiting), Worker(searcher), Worker(), Worker(most=8))
    settings = {"page": ROOT / "page", "token": TOKEN, "max_body": 10_000} | settings
    app = make_app(searcher, workers, Settings(**settings))
    thread = threading.Thread(target=serve.run, args=(app, listener, ends), daemon=True)
    thread.start()
    try:
        port = listener.getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
            yield client
    finally:
        ends.append(15)
        thread.join(20)
        workers.close(5)
