"""Search an index from Python, build one, and change it: what a notebook needs beside model.py.

    from search import Index, Searcher

    Index.build("index", "model", ["Open a gzip-compressed file ...", "Return the sine ..."])   # ids: 0, 1, ...
    searcher = Searcher("index")
    searcher.search("how do I read a gzip file?", k=10)                    # [Hit(pid, score, text, metadata), ...]
    searcher.add(["a", "b"], ["A new passage.", "Another."])               # and delete, upsert, reload
    searcher.explain("how do I read a gzip file?", ["0"])[0]               # in a notebook: coloured

The way of a query: the model encodes it, the index finds rows and scores for it (compressed.py, ivfpq.py and exact.py
in nanocolbert/index/ say how), and rows become ids, texts and metadata. retrieve.py does so for a file of queries.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model import ColBERT
from nanocolbert import indexing
from nanocolbert.checkpoints.layouts import check_made_by, model_of
from nanocolbert.cli import InputError
from nanocolbert.compute import default_device
from nanocolbert.explain import Explanation, explain_all
from nanocolbert.index import changes
from nanocolbert.index.compressed import CompressedIndex
from nanocolbert.index.documents import best_documents
from nanocolbert.index.exact import ExactIndex
from nanocolbert.index.gpu_index import GpuIndex
from nanocolbert.index.ivfpq import IVFPQ
from nanocolbert.index.joined import JoinedIndex
from nanocolbert.index.ranking import Ranking
from nanocolbert.progress import progress
from nanocolbert.storage.artifact import check_output_dir, read_meta
from nanocolbert.text import check_texts

BATCH_SIZE = 32  # queries at a time
FILTERS = 8  # whose rows are remembered


class Hit(NamedTuple):
    """A passage that was found; its text where the index keeps texts, its metadata where it has any."""

    pid: str
    score: float
    text: str | None = None
    metadata: dict | None = None


class Index:
    """The making of an index from Python; what it makes is opened by Searcher, and by retrieve.py."""

    @staticmethod
    def build(
        folder,
        model,
        passages: Iterable[str],
        ids: Iterable | None = None,
        metadata: Iterable[dict | None] | None = None,
        passage_words: int | None = None,
        overlap: int = 0,
        bits: int = 2,
        keep_vectors: bool = False,
        nlist: int | None = None,
        seed: int = 12345,
        pool_factor: int | None = None,
    ) -> "Searcher":
        """Build a compressed index in a folder, and open it.

        model: a folder, a name on the hub, or a ColBERT, which is saved in the index. passages: texts, taken as they
        come; ids: by default 0, 1, 2, ...; metadata: an object each or None, for filters. passage_words: texts are
        documents, to be cut to passages doc#1, doc#2, ... of so many words. pool_factor: see doc2embedding.py; the
        rest: see build_index.py.
        An index that is there is replaced once the new one is whole.
        Raises InputError for what cannot be indexed; nothing is left then.
        """
        if (passage_words is not None and passage_words < 1) or not 0 <= overlap < (passage_words or 1):
            raise InputError(f"overlap {overlap}, passage_words {passage_words}: give passage_words above the overlap")
        check_output_dir(folder, "index", *([] if isinstance(model, ColBERT) else [model]))
        name = None if isinstance(model, ColBERT) else str(model)
        model = model if name is None else ColBERT.from_pretrained(name)
        documents = {"words": passage_words, "overlap": overlap} if passage_words else None
        passages = indexing.passages_of(passages, ids, metadata, documents)
        settings = {"bits": bits, "keep_vectors": keep_vectors, "nlist": nlist, "seed": seed}
        indexing.build(folder, model, name, passages, documents, pool_factor, **settings)
        searcher = Searcher(folder)
        searcher.model = model
        return searcher


class Searcher:
    """An open index and its model. Rows are positions among its passages; `index.ids(rows)` gives their ids.

    Any number of threads may search at once, and go on with what they began with while another one changes the index.
    """

    def __init__(self, index_dir, model=None, device=None, gpu_index: bool = False, verify: bool = False):
        """Open an index folder, or a list of several, whose passages are searched as those of one.

        model: a folder or a name on the hub, by default where the index says that it was, looked for when first needed.
        device: by default the GPU if there is one. verify: check the checksums of the index first.
        Raises InputError where the folders do not fit together.
        """
        self.folders = [Path(one) for one in ([index_dir] if isinstance(index_dir, (str, PathLike)) else index_dir)]
        if not self.folders:
            raise InputError("no index: give the folder of one at least")
        places = [folder.resolve() for folder in self.folders]
        if twice := [folder for i, folder in enumerate(self.folders) if places[i] in places[:i]]:
            raise InputError(f"{twice[0]}: a second time: give each index once")
        self.index_dir, self.device = self.folders[0], torch.device(device or default_device())
        self._lock, self._filters, self.gpu_index = threading.RLock(), {}, gpu_index
        self._opened = [self._open(folder, verify) for folder in self.folders]
        self.meta, self.index = self._joined(self._opened)
        if model is not None:
            self.model = self._load(model)

    def __repr__(self) -> str:
        kinds = {"codes": f"compressed, {self.meta.get('bits')} bits", "ivfpq": "IVFPQ", None: "embeddings"}
        kind = kinds[self.meta.get("method")]
        return f"Searcher: {len(self):,} passages in {self.index.folder} ({kind}), on {self.device}"

    def __len__(self) -> int:
        """Passages that can be found."""
        return int(self.index.alive().sum())

    @property
    def fields(self) -> list[str]:
        """The names that metadata of passages have."""
        return self.index.fields

    @property
    def version(self) -> int:
        """How often the index has been changed, from 1."""
        return self.index.version

    @cached_property
    def model(self) -> ColBERT:
        """The model that the index was made from."""
        return self._load(model_of(self.index_dir, self.meta))

    def _open(self, folder: Path, verify: bool = False) -> tuple[dict, CompressedIndex | ExactIndex]:
        meta = read_meta(folder, "index", "build_index.py", "embeddings", check=verify)
        return meta, open_index(folder, meta, self.device, self.gpu_index)

    @staticmethod
    def _joined(opened: list[tuple]) -> tuple[dict, CompressedIndex | ExactIndex | JoinedIndex]:
        """The first one's meta.json, and one index of all."""
        return opened[0] if len(opened) == 1 else (opened[0][0], JoinedIndex(*zip(*opened, strict=True)))

    def _load(self, folder) -> ColBERT:
        check_made_by(folder, self.index_dir, self.meta)
        model = ColBERT.from_pretrained(folder, device=self.device)
        model.check_tokenizer(self.index_dir, self.meta)
        return model

    # --------------------------------------------------------------------------------------------------------- search

    def search(self, queries: str | list[str] | Tensor, k: int = 10, **effort) -> list[Hit] | list[list[Hit]]:
        """The k best passages for a query, the best first; a list of such lists for a list of queries.

        queries: a text, a list of them, or what `encode` made of one.
        effort, for this call only: exact=True scores every passage, with by_codes=True by its codes; quality="fast",
        "default" or "best", and nprobe, n_coarse, n_fine, n_exact (compressed index), nprobe, faiss_depth, rerank_depth
        (IVFPQ) are the flags of the same names. Of a compressed index: among=[pid, ...] searches these passages only,
        those that are there (skip_unknown=False: raise InputError for others); where="year >= 2020 AND lang = 'en'"
        those whose metadata fulfil it. by_document=True gives the k best documents, each by its best passage.
        Raises InputError where that cannot be.
        """
        if not isinstance(k, Integral) or k < 1:
            raise InputError(f"k is {k!r}: ask for one passage, or more")
        texts = [queries] if isinstance(queries, str) else queries
        texts = texts if isinstance(texts, Tensor) else check_texts(texts)
        if effort.get("among") is not None and not isinstance(effort["among"], str):
            effort["among"] = list(effort["among"])  # which may be looked at twice

        def find(index) -> list[list[Hit]]:
            most = min(int(k), len(index) or 1)
            return [self._hits(index, *ranking) for ranking in self.rankings(texts, most, index=index, **effort)]

        hits = self._while_it_is_there(find)
        return hits[0] if isinstance(queries, str) else hits

    def _while_it_is_there(self, call: Callable):
        """What call(index) gives, of the open index; of a newer one where files of that have been removed meanwhile.

        A thread goes on with the index that it began with, while another opens a newer one. What it has not opened yet,
        texts and metadata, is gone once the index is compacted, or built anew.
        """
        while True:
            index = self.index
            try:
                return call(index)
            except InputError:
                if index is self.index and not self.reload():
                    raise

    def _hits(self, index, rows: np.ndarray, scores: np.ndarray) -> list[Hit]:
        """What was found, with its ids, texts and metadata."""
        columns = index.ids(rows), scores.tolist(), index.texts(rows), index.metadata(rows)
        return [Hit(*parts) for parts in zip(*columns, strict=True)]

    def rankings(
        self,
        queries: list[str] | Tensor,
        k: int,
        candidates: list[np.ndarray] | None = None,
        exact: bool = False,
        by_codes: bool = False,
        quality: str = "default",
        among: Iterable | None = None,
        skip_unknown: bool = True,
        where: str | None = None,
        by_document: bool = False,
        batch_size: int = BATCH_SIZE,
        index=None,
        **knobs: int | None,
    ) -> Iterator[Ranking]:
        """Yield the k best rows and their scores for each query, in batches.

        Scored are the query's own `candidates` if they are given, every passage if `exact`, else what the index finds.
        by_codes: score these two not exactly, but by a compressed index' codes. index: one that was open before.
        knobs: those that `search` names; None is the default. The rest: as `search` says.
        """
        index = index or self.index
        self.check_scoring(exact or candidates is not None, by_codes)
        knobs = {name: value for name, value in knobs.items() if value is not None}
        index.effort(quality, k, **knobs)  # raises for what this index does not know
        allowed = self._allowed(index, among, skip_unknown, where)

        def answer(one, queries: Tensor, rows: list[np.ndarray] | None, allowed: np.ndarray | None) -> list[Ranking]:
            """Of one index."""

            def find(queries: Tensor, rows: list[np.ndarray] | None, k: int) -> list[Ranking]:
                if rows is None and not exact:
                    return one.search(queries, k, one.effort(quality, k, **knobs), allowed)
                if rows is None and allowed is not None:
                    rows = [np.flatnonzero(allowed)] * len(queries)
                return one.rank(queries, rows, k, by_codes)

            return best_documents(one, find, queries, rows, k) if by_document else find(queries, rows, k)

        size = max(1, len(queries)) if exact and index.streams else batch_size
        starts = range(0, len(queries), size)
        for start in progress(starts, len(starts) > 1, desc="search", unit=" batches"):
            part = queries[start : start + size]
            part = part if isinstance(part, Tensor) else self.encode(part)  # (B, Lq, D)
            rows = None if candidates is None else candidates[start : start + size]
            if isinstance(index, JoinedIndex):
                yield from index.ask(answer, part, rows, allowed, k, by_document)
            else:
                yield from answer(index, part, rows, allowed)

    def check_scoring(self, is_given: bool, by_codes: bool) -> None:
        """Raise InputError unless what is given, candidates or every passage, can be scored in this way."""
        if by_codes and not is_given:
            raise InputError("by_codes says how a compressed index scores --exact and --candidates: leave it out")
        if is_given:
            self.index.check_rank(by_codes)

    def _allowed(self, index, among: Iterable | None, skip_unknown: bool, where: str | None) -> np.ndarray | None:
        """Whether each row may be found (n,) bool, by ids, strings or numbers, and a condition; None: all may."""
        if among is None and where is None:
            return None
        if not index.has_filters:
            raise InputError("among and where are for a compressed index: build_index.py --method codes")
        allowed = np.ones(len(index), bool) if where is None else self._where(index, where)
        if among is None:
            return allowed
        pids = [among] if isinstance(among, str) else list(map(str, among))
        rows = index.rows(pids)
        if (rows < 0).any() and not skip_unknown:
            raise InputError(f"{index.folder}: has no passage {pids[int((rows < 0).argmax())]}: leave it out")
        chosen = np.zeros(len(index), bool)
        chosen[rows[rows >= 0]] = True
        return allowed & chosen

    def _where(self, index, where: str) -> np.ndarray:
        """The rows of a condition (n,) bool, remembered for the next time."""
        key = index, where  # not its version: an index that is built anew begins with 1 again
        fulfil = self._filters.get(key)
        if fulfil is None:
            fulfil = index.where(where)
            with self._lock:
                self._filters[key] = fulfil
                while len(self._filters) > FILTERS:
                    self._filters.pop(next(iter(self._filters)))
        return fulfil

    def encode(self, texts: list[str]) -> Tensor:
        """Query embeddings (B, Lq, D) fp32."""
        with self.index.clock("encode queries"):
            with self._lock:  # one that is opened for all
                model = self.model
            return model.encode_queries(texts, progress=False)

    def explain(self, query: str, pids: list[str]) -> list[Explanation]:
        """Why passages score as they do: which of their tokens each query token matched (nanocolbert/explain.py).

        By the vectors in the index where it keeps them, else each passage is embedded once more: token by token, also
        where the index pools them, so that the sum is not the score there.
        Raises InputError for a passage that is not there, or without its text.
        """
        pids = [pids] if isinstance(pids, str) else [str(pid) for pid in pids]
        return self._while_it_is_there(lambda index: self._explain(index, query, pids))

    def _explain(self, index, query: str, pids: list[str]) -> list[Explanation]:
        rows = index.rows(pids)
        if (rows < 0).any():
            raise InputError(f"{index.folder}: has no passage {pids[int((rows < 0).argmax())]}")
        texts = index.texts(rows)
        if None in texts:
            raise InputError(f"{index.folder}: keeps no texts: make it again, from tokens with --keep_texts")
        with self._lock:
            model = self.model
        is_pooled = self.meta.get("pool_factor", 1) > 1  # its vectors are of several tokens each
        return explain_all(model, query, texts, None if is_pooled else index.vectors(rows))

    # -------------------------------------------------------------------------------------------------------- changes
    # Other processes may search, or change, the same index meanwhile: changes.py.

    def reload(self) -> bool:
        """Open the index anew if it has been changed since; returns whether it has.

        Raises InputError where it was built anew from another model than the one that is open.
        """
        with self._lock:
            if self.index.is_current():
                return False
            opened = list(self._opened)
            for at, (folder, (_, index)) in enumerate(zip(self.folders, self._opened, strict=True)):
                if index.is_current():
                    continue
                opened[at] = self._open(folder)
                before, now = (meta.get("model_fingerprint") for meta in (self.meta, opened[at][0]))
                if "model" in vars(self) and now != before:
                    raise InputError(f"{folder}: built anew, from another model: open it again, with that")
            meta, index = self._joined(opened)
            index.clock = self.index.clock
            self._opened, self.meta, self.index, self._filters = opened, meta, index, {}
            return True

    def add(self, ids: Iterable, texts: Iterable[str], metadata: Iterable[dict | None] | None = None) -> int:
        """Add passages, with an object of metadata or None each; returns how many.

        Where the index is of documents that were cut to passages, so are these.
        Raises InputError where one cannot be added, as when its id is there already; the index is then as it was.
        """
        return self._add(ids, texts, metadata, replace=False)

    def upsert(self, ids: Iterable, texts: Iterable[str], metadata: Iterable[dict | None] | None = None) -> int:
        """As `add`, but the passages of these ids that are there already are replaced, in the same step."""
        return self._add(ids, texts, metadata, replace=True)

    def _add(self, ids: Iterable, texts: Iterable[str], metadata: Iterable | None, replace: bool) -> int:
        self._check_changes()
        cut = self.meta.get("documents")
        passages = list(indexing.passages_of(texts, ids, metadata, cut))
        if not self.index.keeps_texts and any(passage.metadata for passage in passages):
            raise InputError(f"{self.index_dir}: keeps no texts, and no metadata: leave that out, or make it again")
        with self._lock:
            model = self.model
        n = indexing.add(self.index_dir, model, self.meta, lambda: passages, replace=replace)
        self.reload()
        return n

    def delete(self, ids: Iterable) -> int:
        """Delete passages, or all of documents that were cut to passages; returns how many passages.

        Raises InputError if one is not there; the index is then as it was.
        """
        self._check_changes()
        pids = [ids] if isinstance(ids, str) else [str(pid) for pid in ids]
        n = changes.delete(self.index_dir, pids, of_documents="documents" in self.meta)
        self.reload()
        return n

    def compact(self) -> int:
        """Make one segment of all, without what was deleted; returns its passages."""
        self._check_changes()
        n = changes.compact(self.index_dir)
        self.reload()
        return n

    def _check_changes(self) -> None:
        if len(self.folders) > 1:
            raise InputError(f"{self.index.folder}: several indexes: open the one alone that is to be changed")
        if not isinstance(self.index, CompressedIndex):
            raise InputError(f"{self.index_dir}: only a compressed index is changed: build_index.py --method codes")
        self.reload()  # it may be another by now


def open_index(folder: Path, meta: dict, device: torch.device, on_gpu: bool) -> CompressedIndex | ExactIndex:
    """The index in a folder, of the kind that its meta.json says. Raises InputError if it cannot be searched."""
    if meta["kind"] == "embeddings":
        if meta.get("bits"):
            raise InputError(f"{folder}: compressed embeddings: run build_index.py, and give what it wrote")
        return ExactIndex(folder, meta, device)
    if meta.get("method") != "codes":
        return IVFPQ(folder, meta, device, on_gpu)
    return GpuIndex(folder, device) if on_gpu else CompressedIndex(folder)
