"""scripts/terrier.py: PyTerrier's frames in, ours out, the same rankings as Searcher's, in an experiment too."""

import pytest

pt = pytest.importorskip("pyterrier", reason="PyTerrier is not installed: pip install python-terrier")

import pandas as pd
from pyterrier.measures import R, nDCG

from scripts.terrier import ColBERTReranker, ColBERTRetriever
from search import Searcher

TOPICS = pd.DataFrame([["q1", "a boat"], ["q2", "the drum"]], columns=["qid", "query"])


def ranking(frame: pd.DataFrame, qid: str) -> list[tuple]:
    return list(frame[frame.qid == qid].sort_values("rank")[["docno", "score", "rank", "text"]].itertuples(index=False))


@pytest.fixture(scope="module")
def searcher(codes_dir):
    return Searcher(codes_dir)


def test_the_retriever_finds_what_the_searcher_finds(searcher, codes_dir):
    colbert = ColBERTRetriever(codes_dir, k=5, quality="best")
    found = colbert(TOPICS.assign(query_0="before"))
    assert list(found.columns) == ["qid", "query", "query_0", "docno", "score", "text", "rank"]
    for qid, query in TOPICS.itertuples(index=False):
        hits = searcher.search(query, k=5, quality="best")
        assert ranking(found, qid) == [(hit.pid, hit.score, rank, hit.text) for rank, hit in enumerate(hits)]
    assert colbert.search("a boat").docno.tolist() == [hit.pid for hit in searcher.search("a boat", 5, quality="best")]
    empty = colbert(TOPICS.iloc[:0])
    assert len(empty) == 0 and {"qid", "query", "docno", "score", "rank"} <= set(empty.columns)
    with pytest.raises(KeyError, match="query"):
        colbert(TOPICS.drop(columns="query"))


def test_the_reranker_scores_what_it_is_given(searcher, codes_dir):
    first = ColBERTRetriever(codes_dir, k=4)
    given = pd.concat([first(TOPICS), pd.DataFrame([["q1", "a boat", "unknown"]], columns=["qid", "query", "docno"])])
    ranked = ColBERTReranker(codes_dir, by_codes=True)(given.assign(score=0.0, label=1))
    for qid, query in TOPICS.itertuples(index=False):
        among = set(given[given.qid == qid].docno) - {"unknown"}
        hits = [hit for hit in searcher.search(query, k=40, exact=True, by_codes=True) if hit.pid in among]
        assert ranking(ranked, qid) == [(hit.pid, hit.score, rank, hit.text) for rank, hit in enumerate(hits)]
    assert ranked.label.tolist() == [1] * len(ranked) == [1] * 8


def test_in_an_experiment(codes_dir):
    colbert = ColBERTRetriever(codes_dir, k=10)
    best = colbert(TOPICS).query("rank == 0")
    qrels = best[["qid", "docno"]].assign(label=1)
    systems = [colbert, colbert % 3 >> ColBERTReranker(codes_dir, by_codes=True)]
    table = pt.Experiment(systems, TOPICS, qrels, [nDCG @ 10, R @ 5])
    assert table["R@5"].tolist() == [1, 1] and table["nDCG@10"].iloc[0] == 1
