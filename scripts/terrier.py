"""An index in PyTerrier: a retriever and a reranker, for its pipelines and experiments (pip install python-terrier).

    import pyterrier as pt
    from pyterrier.measures import R, nDCG
    from scripts.terrier import ColBERTReranker, ColBERTRetriever    # from this folder

    colbert, bm25 = ColBERTRetriever("my/index"), pt.Transformer.from_df(pt.io.read_results("bm25.run"))
    colbert.search("how do I read a gzip file?")
    pt.Experiment([colbert, bm25 % 100 >> ColBERTReranker("my/index")], topics, qrels, [nDCG @ 10, R @ 100])

These two need no Java. What further arguments there are, such as quality="best", are those of Searcher.search.
"""

import sys
from pathlib import Path

import pandas as pd
import pyterrier as pt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from search import Searcher


class ColBERTRetriever(pt.Transformer):
    """Queries (qid, query) to what an index finds for them (qid, query, docno, score, rank, text)."""

    def __init__(self, index_dir, k: int = 1000, **effort):
        self.searcher, self.k, self.effort = Searcher(index_dir), k, effort

    def __repr__(self) -> str:
        return f"ColBERTRetriever({str(self.searcher.index_dir)!r})"

    def transform(self, topics: pd.DataFrame) -> pd.DataFrame:
        pt.validate.query_frame(topics, ["query"])
        found = self.searcher.search(topics["query"].tolist(), self.k, **self.effort)
        rows = [(qid, *hit[:3]) for qid, hits in zip(topics["qid"], found, strict=True) for hit in hits]
        return joined(topics, rows, ["qid"])


class ColBERTReranker(pt.Transformer):
    """Results (qid, query, docno) with the scores of an index, of its vectors or by_codes=True of its codes.

    A passage that is not in the index is left out.
    """

    def __init__(self, index_dir, **effort):
        self.searcher, self.effort = Searcher(index_dir), {"exact": True} | effort

    def __repr__(self) -> str:
        return f"ColBERTReranker({str(self.searcher.index_dir)!r})"

    def transform(self, results: pd.DataFrame) -> pd.DataFrame:
        pt.validate.result_frame(results, ["query"])
        rows = []
        for qid, group in results.groupby("qid", sort=False):
            hits = self.searcher.search(group["query"].iloc[0], len(group), among=group["docno"], **self.effort)
            rows += [(qid, *hit[:3]) for hit in hits]
        return joined(results.drop(columns=["score", "rank", "text"], errors="ignore"), rows, ["qid", "docno"])


def joined(frame: pd.DataFrame, rows: list[tuple], on: list[str]) -> pd.DataFrame:
    """A frame with (qid, docno, score, text) of each hit, and the rank in its query."""
    hits = pd.DataFrame(rows, columns=["qid", "docno", "score", "text"])
    return pt.model.add_ranks(frame.merge(hits.astype({"qid": frame["qid"].dtype}), on=on))
