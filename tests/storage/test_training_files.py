"""Training files: each format's rows as they were written, told apart by themselves, errors that name the line."""

import gzip
import json
import random

import numpy as np
import pytest

from nanocolbert.cli import InputError
from nanocolbert.storage import training_files
from nanocolbert.storage.ragged import IdWriter
from nanocolbert.storage.training_files import guess_format, read_training, write_training

QUERIES = "q1\tfind boat\n7\tfind drum\nq3\ta cloud\n"
PIDS = ["p0", "p1", "p2", "p3", "40", "41"]
FILES = {  # {format: what it looks like, [(ids, scores) of its rows]}
    "id": [
        ("q1\tp0\tp1\n7\t40\tp1\n", [("q1 p0 p1", None), ("7 40 p1", None)]),
        ("7\tp0\tp1\tp2\t41\n", [("7 p0 p1 p2 41", None)]),
    ],
    "nway": [
        (
            '["q1", ["p0", 1.5], [40, -2]]\n\n[7, ["p1", 0], [41, 1e3]]',
            [("q1 p0 40", [1.5, -2]), ("7 p1 41", [0, 1e3])],
        ),
        ('["q1", "p0", 40, "p1"]\n', [("q1 p0 40 p1", None)]),
        ("[7, 40]\n", [("7 40", None)]),
        ('{"query_id": 7, "document_ids": [40, "p1"], "scores": [0.5, 2]}\n', [("7 40 p1", [0.5, 2])]),
        ('{"qid": "q3", "pids": ["p1", "p2"]}\n', [("q3 p1 p2", None)]),
    ],
    "scored": [("3.5\t-1\tq1\tp0\tp1\n2\t2\t7\t40\t41\n", [("q1 p0 p1", [3.5, -1]), ("7 40 41", [2, 2])])],
    "qrels": [
        ("q1 0 p0 1\nq1 0 p1 0\n7 0 40 2\n", [("q1 p0", None), ("7 40", None)]),
        ("7\tQ0\tp1\t1\n", [("7 p1", None)]),
        ("query-id\tcorpus-id\tscore\nq1\tp0\t1\nq1\tp2\t0\n", [("q1 p0", None)]),
        ("qid\titer\tpid\trel\nq1\t0\tp0\t1\n", [("q1 p0", None)]),
    ],
}
CASES = [(kind, *case) for kind, cases in FILES.items() for case in cases]


@pytest.fixture
def write(tmp_path):
    def write(text, name="t.tsv"):
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return tmp_path / name

    write(QUERIES, "q.tsv")
    return write


def plain(rows) -> list:
    return [(" ".join(row.ids), row.scores) for row in rows]


@pytest.mark.parametrize("name", ["t.tsv", "t.tsv.gz"])
@pytest.mark.parametrize("kind, text, rows", CASES)
def test_formats(write, kind, text, rows, name):
    path = write(text, name)
    assert plain(read_training(path, kind)) == rows
    assert guess_format(path, path.parent / "q.tsv", path, None) == kind


def test_texts_are_told_from_all_others(write):
    for text in ("find boat\tthe boat\ta drum\n", "boat\tdrum\ta cloud\n", "[1]\t[a b]\t[3]\n", "1 0 2 1\tx\ty\n"):
        path = write(text)
        assert guess_format(path, path.parent / "q.tsv", path, None) == "text"


def test_the_name_says_jsonl(write):
    path = write("q1\tp0\tp1\n", "t.jsonl.gz")
    assert guess_format(path, None, None, None) == "nway"


def test_only_the_first_lines_are_looked_at(write):
    path = write("q1 0 p0 1\n" * 3 + "a text\twith\ttabs\n")
    assert guess_format(path, path.parent / "q.tsv", path, 3) == "qrels"
    assert guess_format(path, path.parent / "q.tsv", path, None) == "text"


@pytest.mark.parametrize(
    "text, message",
    [
        ("7\t7\tq3\t7\t41\n", "t.tsv:1: may be five ids, or two scores and three ids: give --triples_format id, or"),
        (
            "7\t0\t40\t41\n",
            "t.tsv: may be qrels, or rows of ids whose positive is '0': give",
        ),
        ("q9\tp0\tp1\n", "'q9' is neither an id nor a text of"),
    ],
)
def test_what_may_be_either(write, text, message):
    path = write(text)
    with pytest.raises(InputError) as refused:
        guess_format(path, path.parent / "q.tsv", path, None)
    assert message in str(refused.value) and "--triples_format" in str(refused.value)


def test_scores_with_a_point_are_no_ids(write):
    """Although the first column is a query's id, too."""
    path = write("7\t0.5\tq3\tp0\tp1\n")
    assert guess_format(path, path.parent / "q.tsv", path, None) == "scored"


@pytest.mark.parametrize("kind, line", [("id", "q\tp0\tp1\tp2\tp3"), ("nway", '["q", "p0", "p1", "p2", "p3"]')])
def test_nway(write, kind, line):
    path = write(f"{line}\n")
    assert plain(read_training(path, kind, 1)) == [("q p0", None)]
    assert plain(read_training(path, kind, 4)) == plain(read_training(path, kind)) == [("q p0 p1 p2 p3", None)]
    with pytest.raises(InputError, match=r"t\.tsv:1: .*--nway 5"):
        list(read_training(path, kind, 5))


def test_nway_of_rows_that_differ(write):
    path = write('["q", ["a", 1], ["b", 2], ["c", 3]]\n["q", ["a", 4], ["b", 5]]\n')
    assert plain(read_training(path, "nway", 2)) == [("q a b", [1, 2]), ("q a b", [4, 5])]
    with pytest.raises(InputError, match=r"t\.tsv:2: 2 passage\(s\), line 1 has 3: give --nway N"):
        list(read_training(path, "nway"))
    path = write('["q", "a"]\n["q", "a", "b"]\n')
    with pytest.raises(InputError, match=r"t\.tsv:2: 2 passage\(s\), line 1 has 1: give --nway N"):
        list(read_training(path, "nway"))


@pytest.mark.parametrize(
    "kind, text, message",
    [
        ("id", "q\tp\tn\nq\tp\n", "2: found 2 column(s), expected 3 (qid, positive pid, negative pid)"),
        ("id", "q\tp\n", "1: found 2 column(s), expected 3"),
        ("nway", '["q", "a"\n', "1: not JSON"),
        ("nway", '["q", ["a", NaN]]\n', "1: not JSON (NaN is no number"),
        ("nway", '["q", ["a", 1e400]]\n', "1: not JSON (1e400 is no number"),
        ("nway", "[" * 100_000 + "\n", "1: not JSON"),
        ("nway", '"q"\n', '1: "q": give [qid, [pid, score], ...]'),
        ("nway", '["q"]\n', "give [qid, [pid, score], ...]"),
        ("nway", '["q", ["a", 1], "b"]\n', '1: "b" is no [pid, score]'),
        ("nway", '["q", ["a", 1, 2]]\n', '1: ["a", 1, 2] is no [pid, score]'),
        ("nway", '["q", ["a", 1]]\n["q", "a"]\n', "2: no scores, where line 1 has scores"),
        ("nway", '["q", "a"]\n["q", ["a", 1]]\n', "2: scores, where line 1 has none"),
        ("nway", '["q", ["a", "1x"]]\n', '1: score "1x" is not a finite number'),
        ("nway", '["q", ["a", true]]\n', "1: score true is not a finite number"),
        ("nway", '["q", ["a", 1e39]]\n', "1: score 1e+39 is not a finite number"),
        ("nway", f'["q", ["a", 1{"0" * 400}]]\n', "is not a finite number"),
        ("nway", '[1.5, "a"]\n', "1: 1.5 is not an id"),
        ("nway", '["q", true]\n', "1: true is not an id"),
        ("nway", '{"query_id": "q", "document_ids": ["a"], "scores": [1, 2]}\n', "1: 1 passages, but 2 scores"),
        ("nway", '{"query": "q", "document_ids": ["a"]}\n', 'give {"query_id": ..., "document_ids": [...]'),
        ("scored", "1\t2\tq\tp\n", "1: found 4 column(s), expected 5 (score of the positive"),
        ("scored", "1\t2\tq\tp\tn\n1\tnan\tq\tp\tn\n", "2: score 'nan' is not a finite number"),
        ("qrels", "q 0 p 1\nq 0 p\n", "2: found 3 column(s), expected 4 (qid, 0, pid, relevance)"),
        ("qrels", "qid pid score\nq 0 p 1\n", "2: found 4 column(s), expected 3"),
        ("qrels", "q 0 p 1.0\n", "1: relevance '1.0' is not an integer"),
        ("qrels", "q 0 p 0\n", " no passage is of relevance 1 or more"),
        ("qrels", b"q 0 p\xff 1\n", "1: byte 0xff at column 6 is not UTF-8"),
    ],
)
def test_errors_name_the_line(write, kind, text, message):
    path = write(text)
    with pytest.raises(InputError) as refused:
        list(read_training(path, kind))
    assert f"{path}:{message}" in str(refused.value) or message in str(refused.value).removeprefix(str(path))
    assert str(refused.value).startswith(f"{path}:")


def write_ids(folder):
    for name, ids in (("qids", ["q1", "7", "q3"]), ("pids", PIDS)):
        writer = IdWriter(folder / f"{name}.npy")
        writer.append(ids)
        writer.close()


@pytest.mark.parametrize("chunk", [1, 7, 60_000])
def test_arrays_are_the_rows_that_are_named(write, tmp_path, chunk, monkeypatch):
    monkeypatch.setattr(training_files, "IDS", chunk)
    write_ids(tmp_path)
    rng = random.Random(0)
    rows = [[rng.choice(["q1", "7", "q3"]), *rng.choices(PIDS, k=3)] for _ in range(20)]
    scores = [[rng.random() for _ in range(3)] for _ in rows]
    pairs = [zip(pids, values, strict=True) for (_, *pids), values in zip(rows, scores, strict=True)]
    lines = [[row[0], *map(list, pair)] for row, pair in zip(rows, pairs, strict=True)]
    path = write("\n".join(map(json.dumps, lines)))
    assert write_training(path, read_training(path, "nway"), tmp_path, "nway") == (20, 3, True)
    found, values = np.load(tmp_path / "triples.npy"), np.load(tmp_path / "scores.npy")
    assert (found.dtype, values.dtype) == (np.int32, np.float32)
    assert found.tolist() == [[["q1", "7", "q3"].index(qid), *map(PIDS.index, pids)] for qid, *pids in rows]
    assert values.tolist() == np.array(scores, np.float32).tolist()


@pytest.mark.parametrize(
    "kind, text, message",
    [
        ("id", "q1\tp0\tp1\nq1\tp0\tp9\n", "t.tsv:2: pid 'p9' in column 3 is not among the collection"),
        ("nway", '["q1", ["p0", 1]]\n\n["q2", ["p0", 1]]\n', "t.tsv:3: qid 'q2' is not among the queries"),
        ("nway", '["q1", "p0\\ud800"]\n', "pid 'p0\\ud800' is not among the collection"),
        ("qrels", "q1 0 p0 1\nq1 0 p8 0\nq1 0 p9 1\n", "t.tsv:3: pid 'p9' is not among the collection"),
        ("id", "", "t.tsv: empty, expected triples"),
        ("qrels", "", "t.tsv: empty, expected triples"),
    ],
)
def test_unknown_ids(write, tmp_path, kind, text, message):
    write_ids(tmp_path)
    path = write(text)
    with pytest.raises(InputError) as refused:
        write_training(path, read_training(path, kind), tmp_path, kind)
    assert message in str(refused.value)
