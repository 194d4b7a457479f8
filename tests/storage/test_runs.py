import gzip
import random

import numpy as np
import pytest

from nanocolbert.cli import InputError
from nanocolbert.storage import runs
from nanocolbert.storage.ragged import Ids


def msmarco_official(qrels, rankings, k):
    """MRR@k and Recall@k as MS MARCO defines them: {qid: (reciprocal rank, recall)} over the judged queries."""
    values = {}
    for qid, judged in qrels.items():
        relevant = {pid for pid, relevance in judged.items() if relevance > 0}
        top = rankings.get(qid, [])[:k]
        ranks = [rank for rank, pid in enumerate(top, 1) if pid in relevant]
        values[qid] = (1 / ranks[0] if ranks else 0.0, len(ranks) / len(relevant) if relevant else 0.0)
    return values


def make_rankings(rng, n_queries=40, n_passages=60):
    """Random (qrels, {qid: pids}, {qid: scores}): tied scores, unjudged and unranked queries, grades from 0 to 3."""
    pids = [str(pid) for pid in range(n_passages)]
    judged_qids = [f"q{i}" for i in range(n_queries)]
    qrels = {qid: {pid: rng.choice([0, 0, 1, 2, 3]) for pid in rng.sample(pids, 5)} for qid in judged_qids}
    ranked_qids = [*judged_qids[: n_queries - 5], "unjudged1", "unjudged2"]
    rankings = {qid: rng.sample(pids, rng.randint(1, n_passages)) for qid in ranked_qids}
    scores = {qid: sorted((rng.randint(0, 5) / 2 for _ in top), reverse=True) for qid, top in rankings.items()}
    return qrels, rankings, scores


@pytest.mark.parametrize("format", ["trec", "msmarco"])
@pytest.mark.parametrize("seed", range(3))
def test_measures_are_those_of_the_official_definition(tmp_path, format, seed):
    qrels, rankings, scores = make_rankings(random.Random(seed))
    path = tmp_path / "run.tsv"
    runs.write_run(path, ((qid, rankings[qid], scores[qid]) for qid in rankings), format=format)
    names = ["MRR@10", "Recall@10", "Recall@50"]
    values = runs.measure_queries(qrels, runs.read_run(path), names)
    at10, at50 = msmarco_official(qrels, rankings, 10), msmarco_official(qrels, rankings, 50)
    assert values["MRR@10"] == pytest.approx({qid: rr for qid, (rr, _) in at10.items()})
    assert values["Recall@10"] == pytest.approx({qid: recall for qid, (_, recall) in at10.items()})
    assert values["Recall@50"] == pytest.approx({qid: recall for qid, (_, recall) in at50.items()})
    means = runs.measure(qrels, runs.read_run(path), names)
    assert means["MRR@10"] == pytest.approx(sum(rr for rr, _ in at10.values()) / len(qrels))


def test_rankings_one_by_one(tmp_path):
    """As the whole run has them, with the scores of the file; the order of lines is not the ranking."""
    lines = ["q2 Q0 a 3 -1 t", "q2 Q0 b 1 2.5 t", "q2 Q0 c 2 2.5 t", "q1 Q0 a 1 7 t"]
    (tmp_path / "run").write_text("\n".join(lines))
    (tmp_path / "run.tsv").write_text("q\tb\t2\nq\ta\t1\n")
    assert list(runs.read_rankings(tmp_path / "run")) == [("q2", ["b", "c", "a"], [2.5, 2.5, -1]), ("q1", ["a"], [7])]
    assert list(runs.read_rankings(tmp_path / "run.tsv")) == [("q", ["a", "b"], None)]
    _, rankings, scores = make_rankings(random.Random(0))
    runs.write_run(tmp_path / "r.gz", ((qid, rankings[qid], scores[qid]) for qid in rankings))
    found, whole = list(runs.read_rankings(tmp_path / "r.gz")), runs.read_run(tmp_path / "r.gz")
    assert found == [(qid, rankings[qid], scores[qid]) for qid in rankings]
    assert [(qid, pids) for qid, pids, _ in found] == [
        (qid, sorted(whole[qid], key=lambda p: -whole[qid][p])) for qid in whole
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "run: an empty file"),
        ("q\ta\t1\nr\ta\t1\nq\tb\t2\n", "run:3: query q again, after others: sort the run"),
        ("q\ta\t1\nq\ta\t2\n", "run:2: passage a a second time for query q"),
        ("q Q0 a 1 1 t\nq Q0 b 2 2 t\n", "run:2: query q has score 2.0 at rank 2, above"),
        ("q\ta\t2\n", "run:1: query q has rank 2 where 1 should come"),
    ],
)
def test_rankings_one_by_one_are_checked(tmp_path, text, message):
    (tmp_path / "run").write_text(text)
    with pytest.raises(InputError) as refused:
        list(runs.read_rankings(tmp_path / "run"))
    assert message in str(refused.value)


def test_tied_scores_keep_their_order_in_every_measure():
    for pids in (["a", "b"], ["b", "a"]):
        values = runs.measure({"q": {"a": 1}}, {"q": dict.fromkeys(pids, 1.0)}, ["MRR@10", "MAP", "Success@1"])
        expected = 1.0 if pids[0] == "a" else 0.5
        assert values == {"MRR@10": expected, "MAP": expected, "Success@1": float(pids[0] == "a")}


def test_relevant_from_moves_binary_measures_only():
    qrels, run = {"q": {"a": 1, "b": 2}}, {"q": {"a": 2.0, "b": 1.0}}
    names = ["MRR@10", "nDCG@10", "P(rel=1)@2"]
    low, high = runs.measure(qrels, run, names), runs.measure(qrels, run, names, relevant_from=2)
    assert (low["MRR@10"], high["MRR@10"]) == (1.0, 0.5)
    assert low["nDCG@10"] == high["nDCG@10"] == pytest.approx((1 + 2 / 1.5849625) / (2 + 1 / 1.5849625))
    assert low["P(rel=1)@2"] == high["P(rel=1)@2"] == 1.0


def test_empty_rankings_count_zero():
    assert runs.measure({"q": {"a": 1}, "r": {"b": 0}}, {}, ["MRR@10"]) == {"MRR@10": 0.0}
    assert runs.measure({"q": {"a": 1}, "r": {"b": 0}}, {"q": {"a": 1.0}, "r": {}}, ["MRR@10"]) == {"MRR@10": 0.5}


def test_nan_scores_are_not_measured():
    with pytest.raises(AssertionError, match="NaN"):
        runs.measure({"q": {"a": 1}}, {"q": {"a": float("nan")}})


@pytest.mark.parametrize("name", ["foo@3", "P@", "P", "alpha_DCG@10", "__import__('os')"])
def test_unknown_measure(name):
    with pytest.raises(InputError, match="measure"):
        runs.parse_measures([name])


@pytest.mark.parametrize("name", ["run.tsv", "run.tsv.gz"])
@pytest.mark.parametrize("format", ["trec", "msmarco"])
def test_write_then_read(tmp_path, name, format):
    path = tmp_path / "new" / name
    rankings = [("7", ["b", "a"], [-1.5, -1.5]), ("x", ["é"], [3.0]), ("empty", [], [])]
    assert runs.write_run(path, iter(rankings), format=format) == 3
    assert runs.read_run(path) == {"7": {"b": -1.0, "a": -2.0}, "x": {"é": -1.0}}
    assert [file.name for file in path.parent.iterdir()] == [name]
    text = (gzip.open if name.endswith(".gz") else open)(path, "rt", encoding="utf-8").read()
    first = {"trec": "7 Q0 b 1 -1.500000 nanocolbert", "msmarco": "7\tb\t1"}
    assert text.splitlines()[0] == first[format]


def test_a_run_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.tsv"
    runs.write_run(path, [("q", ["a"], [1.0])])
    before = path.read_bytes()
    for bad in (("r", ["a", "a"], [2.0, 1.0]), ("r", ["a", "b"], [1.0, 2.0]), ("r", ["a"], [float("nan")])):
        with pytest.raises(AssertionError):
            runs.write_run(path, [("q", ["b"], [1.0]), bad])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_lines_in_any_order_and_trec_ranks_from_zero(tmp_path):
    path = tmp_path / "run.txt"
    path.write_text("q Q0 c 2 0.5 t\nr Q0 a 0 1 t\nq Q0 b 1 0.5 t\nq\tQ0\ta 0 7e-1 t\r\n")
    assert sorted(runs.read_run(path)["q"].items(), key=lambda item: -item[1]) == [("a", 0.0), ("b", -1.0), ("c", -2.0)]


@pytest.mark.parametrize(
    "text, message",
    [
        ("q\ta\t1\nq\ta\t2\n", ":2: passage a a second time for query q"),
        ("q\ta\t1\nr\ta\t1\nq\tb\t1\n", ":3: rank 1 a second time for query q .first in line 1"),
        ("q\ta\t1\nq\tb\t3\n", ":2: query q has rank 3 where 2 should come"),
        ("q\ta\t0\n", ":1: query q has rank 0 where 1 should come"),
        ("q\ta\t1\nq Q0 b 2 0.5 t\n", r":2: found 6 column\(s\), expected 3"),
        ("q\ta\tfirst\n", ":1: rank 'first' is not an integer"),
        ("q\ta\t1\n\n", r":2: found 0 column\(s\)"),
        ("q a\n", r":1: found 2 column\(s\), expected 6 .* or 3"),
        ("", "empty file"),
        ("q Q0 a 1 0.5 t\nq Q0 a 2 0.4 t\n", ":2: passage a a second time"),
        ("q Q0 a 1 0.5 t\nq Q0 b 2 0.6 t\n", ":2: query q has score 0.6 at rank 2, above score 0.5 at rank 1"),
        ("q Q0 a 1 nan t\n", ":1: score 'nan' is not a finite number"),
        ("q Q0 a 1 -inf t\n", ":1: score '-inf' is not a finite number"),
        ("q Q0 a 99999999999999999999 1 t\n", ":1: rank"),
    ],
)
def test_bad_runs(tmp_path, text, message):
    path = tmp_path / "run.tsv"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        runs.read_run(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_qrels(tmp_path):
    path = tmp_path / "qrels.tsv"
    path.write_text("q 0 a 3\nq\t0\tb\t-1\nr Q0 a 0\n")
    assert runs.read_qrels(path) == {"q": {"a": 3, "b": -1}, "r": {"a": 0}}
    for text, message in [
        ("q 0 a 1\nq 0 a 0\n", ":2: passage a judged a second time for query q"),
        ("q a 1\n", r":1: found 3 column\(s\), as a run has, expected 4 .* or 3 below a header line"),
        ("q 0 a 1\nq a 1\n", r":2: found 3 column\(s\), expected 4"),
        ("qid pid rel\nq a 1\nq 0 b 1\n", r":3: found 4 column\(s\), expected 3"),
        ("query-id corpus-id score\nq a yes\n", ":2: relevance 'yes' is not an integer"),
        ("query-id corpus-id score\n", "empty file"),
        ("query-id corpus-id\nq a\n", r":2: found 2 column\(s\), expected 4"),
        ("q 0 a yes\n", ":1: relevance 'yes' is not an integer"),
        ("", "empty file"),
    ]:
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            runs.read_qrels(path)
    for text in (
        "query-id\tcorpus-id\tscore\nq\ta\t3\nq\tb\t-1\n",
        "query_id iteration doc_id relevance\nq 0 a 3\nq 0 b -1\n",
    ):
        path.write_text(text)
        assert runs.read_qrels(path) == {"q": {"a": 3, "b": -1}}
    path.write_bytes(b"q 0 \xff 1\n")
    with pytest.raises(InputError, match=":1: byte 0xff at column 5 is not UTF-8"):
        runs.read_qrels(path)
    with pytest.raises(InputError, match="no such file"):
        runs.read_qrels(tmp_path / "none")


def test_by_document():
    run = {"q": {"b#2": -2.0, "a": -1.0, "b#1": -4.0, "c#1": -3.0, "a#7": -5.0, "d#x": -6.0}, "r": {}}
    documents = runs.by_document(run)
    assert documents == {"q": {"a": -1.0, "b": -2.0, "c": -3.0, "d#x": -6.0}, "r": {}}
    assert list(documents["q"]) == ["a", "b", "c", "d#x"]
    assert list(runs.by_document({"q": {"b#1": 0.5, "a#1": 0.5}})["q"]) == ["b", "a"]  # ties stay in order
    by_hand = runs.measure({"q": {"b": 1}}, documents, ["RR", "P@2", "nDCG@10"])
    assert by_hand == {"RR": 0.5, "P@2": 0.5, "nDCG@10": pytest.approx(1 / np.log2(3))}


def test_a_byte_order_mark_and_a_header(tmp_path):
    (tmp_path / "qrels").write_bytes(b"\xef\xbb\xbfq1 0 p1 1\n")
    (tmp_path / "run").write_bytes(b"\xef\xbb\xbfq1\tp1\t1\n")
    np.save(tmp_path / "pids.npy", np.array([b"p1"]))
    assert runs.read_qrels(tmp_path / "qrels") == {"q1": {"p1": 1}} and list(runs.read_run(tmp_path / "run")) == ["q1"]
    assert runs.read_candidates(tmp_path / "run", Ids(tmp_path / "pids.npy"), ["q1"])["q1"].tolist() == [0]
    (tmp_path / "header").write_text("qid\tpid\nq1\tp1\n")
    with pytest.raises(InputError, match=r"header:1: a header line"):
        runs.read_candidates(tmp_path / "header", Ids(tmp_path / "pids.npy"), ["q1"])


def test_a_run_is_the_same_bytes_each_time_gz_too(tmp_path):
    for name in ("run", "run.gz"):
        written = []
        for _ in range(2):
            runs.write_run(tmp_path / name, [("q1", ["é", "b"], [2.0, 1.0])])
            written.append((tmp_path / name).read_bytes())
        assert written[0] == written[1]
    assert gzip.decompress(written[0]) == (tmp_path / "run").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.gz"]
