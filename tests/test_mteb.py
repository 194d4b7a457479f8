"""mteb measures our models as it does any of sentence-transformers' MultiVectorEncoder, and comes to our figures."""

import json

import pytest
from conftest import TOPICS

mteb = pytest.importorskip("mteb", reason="mteb is not installed: pip install mteb 'sentence-transformers>=6'")
sentence_transformers = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
if not hasattr(sentence_transformers, "MultiVectorEncoder"):
    pytest.skip("sentence-transformers is older than its MultiVectorEncoder, 6.0", allow_module_level=True)

from nanocolbert.storage.runs import means, measure_queries, parse_measures

DOCUMENTS = {f"d{i}": f"the {topic} near a {TOPICS[-1 - i]}" for i, topic in enumerate(TOPICS)}
DOCUMENTS |= {f"e{i}": f"{topic}, and an old {topic}; in (blue) {TOPICS[i - 1]}" for i, topic in enumerate(TOPICS)}
QUERIES = {f"q{i}": f"find the {topic}" for i, topic in enumerate(TOPICS)}
QRELS = {f"q{i}": {f"d{i}": 1, f"e{i}": 1} for i in range(len(TOPICS))}


class Toy(mteb.abstasks.AbsTaskRetrieval):
    """A retrieval task of a few lines, without a download."""

    metadata = mteb.TaskMetadata(
        name="Toy",
        description="a word of a query names its passages",
        dataset={"path": "toy", "revision": "1"},
        type="Retrieval",
        category="t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
    )

    def load_data(self, **_) -> None:
        self.corpus = {"test": {pid: {"title": "", "text": text} for pid, text in DOCUMENTS.items()}}
        self.queries, self.relevant_docs = {"test": QUERIES}, {"test": QRELS}
        self.data_loaded = True


def test_mteb_ranks_as_we_do(colbert, fp32, tmp_path):
    colbert.save_pretrained(tmp_path / "model", layout="sentence-transformers")
    theirs = sentence_transformers.MultiVectorEncoder(str(tmp_path / "model"), device="cpu")
    result = mteb.evaluate(theirs, Toy(), cache=None, prediction_folder=tmp_path, show_progress_bar=False)
    scores = result.task_results[0].scores["test"][0]

    found = json.loads((tmp_path / "Toy_predictions.json").read_text())["default"]["test"]
    pids, passages = list(DOCUMENTS), colbert.encode_passages(list(DOCUMENTS.values()))
    for qid, query in QUERIES.items():
        ours = {pids[i]: score for i, score in colbert.rank(query, passages, k=len(pids))}
        assert found[qid] == pytest.approx(ours, abs=0.01)  # our passages are kept in fp16

    measures = parse_measures(["nDCG@10", "Recall@10"], 1)
    figures = means(measure_queries(QRELS, found, measures, 1))
    assert 0.1 < figures["nDCG@10"] < 1
    assert scores["ndcg_at_10"] == pytest.approx(figures["nDCG@10"], abs=1e-4)
    assert scores["recall_at_10"] == pytest.approx(figures["Recall@10"], abs=1e-4)
