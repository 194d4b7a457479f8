"""mine: rows of a judged query, a positive and negatives that are none of the false ones, the same by every run."""

import gzip
import json
import random

import pytest
from conftest import call_stage, run_stage_cli, succeed
from mine import as_words, limit

QRELS = "q1\t0\ta\t1\nq1\t0\tz\t0\nq2\t0\tb\t2\nq2\t0\tc\t1\nq3\t0\ta\t1\n"


def trec(rankings: dict) -> str:
    """A run of {qid: {pid: score}}."""
    return "".join(
        f"{qid} Q0 {pid} {rank} {score} t\n"
        for qid, scores in rankings.items()
        for rank, (pid, score) in enumerate(scores.items(), 1)
    )


@pytest.fixture
def mine(tmp_path):
    """Write files, mine; returns (rows, report)."""

    def run(*flags, output="out.jsonl", **files):
        for name, text in ({"qrels": QRELS} | files).items():
            (tmp_path / name).write_text(text)
        given = [part for name in ("run", "qrels") for part in (f"--{name}", tmp_path / name)]
        flags = [tmp_path / flag if flag in files else flag for flag in flags]
        done = call_stage("mine.py", *given, *flags, "--output", tmp_path / output)
        if done.returncode:
            assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not done.stdout, done.stderr
            assert sorted(path.name for path in tmp_path.iterdir()) == sorted({"qrels"} | set(files))
            return done.stderr
        data = (tmp_path / output).read_bytes()
        data = gzip.decompress(data) if output.endswith(".gz") else data
        return [json.loads(line) for line in data.splitlines()], json.loads(done.stdout)

    return run


def test_a_row_for_each_query_and_positive(mine):
    """Of judged queries in the run, the positive found or not; what is judged relevant is no negative."""
    run = trec({"q9": {"x": 1}, "q2": {"x": 3, "c": 2, "y": 1}, "q1": {"y": 3, "z": 2, "x": 1}})
    rows, report = mine("--ranks", 1, 3, "--negatives", 2, run=run)
    assert [(row[:2], sorted(row[2:])) for row in rows[:2]] == [(["q2", "b"], ["x", "y"]), (["q2", "c"], ["x", "y"])]
    assert rows[2][:2] == ["q1", "a"] and set(rows[2][2:]) < {"x", "y", "z"} and len(rows) == report["rows"] == 3
    assert (report["queries_without_judgment"], report["judged_queries_without_ranking"]) == (1, 1)
    rows, _ = mine("--ranks", 1, 3, "--negatives", 2, "--rel", 2, run=run)
    assert [row[:2] for row in rows] == [["q2", "b"]]  # c is relevant, so no negative either


@pytest.mark.parametrize("seed", range(2))
def test_against_what_may_be_drawn(mine, seed):
    """All that may be drawn is drawn, by one seed or another, and nothing else."""
    rng = random.Random(seed)
    pids = [f"p{i}" for i in range(40)]
    rankings = {qid: dict.fromkeys(rng.sample(pids, 30)) for qid in ("q1", "q2")}
    for scores in rankings.values():
        scores.update(zip(scores, sorted((rng.randint(1, 60) for _ in scores), reverse=True), strict=True))
    judged = {qid: {pid: rng.randint(0, 2) for pid in rng.sample(list(rankings[qid]), 6)} for qid in rankings}
    qrels = "".join(f"{qid} 0 {pid} {rel}\n" for qid in judged for pid, rel in judged[qid].items())
    may, drawn = {}, {}
    for qid, scores in rankings.items():
        for positive in [pid for pid, rel in judged[qid].items() if rel]:
            may[qid, positive] = {
                pid
                for rank, pid in enumerate(scores, 1)
                if 5 <= rank <= 25 and not judged[qid].get(pid) and scores[pid] <= 0.9 * scores[positive]
            }
    for draw in range(40):
        flags = ("--ranks", 5, 25, "--negatives", 3, "--margin", 0.9, "--seed", draw)
        rows, report = mine(*flags, run=trec(rankings), qrels=qrels)
        assert draw or mine(*flags, run=trec(rankings), qrels=qrels)[0] == rows  # the same again
        for qid, positive, *negatives in rows:
            assert len(set(negatives)) == 3
            drawn.setdefault((qid, positive), set()).update(negatives)
        assert report["rows"] + report["positives_with_too_few"] == len(may)
    assert drawn == {row: found for row, found in may.items() if len(found) >= 3}


def test_what_is_drawn_depends_on_no_other_row(mine):
    scores = {f"p{i}": -i for i in range(50)}
    rows, _ = mine("--ranks", 1, 50, run=trec({"q1": scores, "q2": scores}))
    fewer, _ = mine("--ranks", 1, 50, run=trec({"q2": scores, "q1": scores}), qrels="q2 0 c 1\nq1 0 a 1\n")
    assert fewer == [rows[2], rows[0]] and len({tuple(row[2:]) for row in rows}) == 3


def test_limits():
    assert limit(10, 0.9, None) == 9 and limit(10, 0.9, 3) == 7 and limit(10, None, 0) == 10
    assert limit(-10, 0.9, None) == -11 and limit(0, 0.5, None) == 0


def test_difference(mine):
    run = trec({"q1": {"x": 9, "a": 5, "u": 4, "v": 3, "w": 1}})
    rows, report = mine("--ranks", 1, 5, "--negatives", 2, "--difference", 2, run=run)
    assert [sorted(row) for row in rows] == [["a", "q1", "v", "w"]] and report["negatives_by_score"] == 2


def test_a_positive_that_the_run_has_not_found_is_below_all_of_it(mine):
    run = trec({"q1": {"x": 9, "y": 5}, "q3": {"a": 3, "x": 1}})
    rows, report = mine("--ranks", 1, 2, "--negatives", 1, "--margin", 1, run=run)
    assert rows == [["q3", "a", "x"]] and report["positives_without_score"] == 1


TEACHER = '["q1", ["a", 2.5], ["x", -1]]\n["q2", ["b", 1]]\n["q2", ["c", 4], ["x", 2], ["y", 1e-3]]\n["q8", ["a", 1]]\n'


def test_a_teacher(mine):
    """Drops by its own scores, where it has some, and writes them."""
    run = trec({"q1": {"x": 9, "u": 8}, "q2": {"x": 2, "y": 1}, "q3": {"x": 1}})
    rows, report = mine(
        "--ranks", 1, 2, "--negatives", 1, "--margin", 0.9, "--teacher", "scores", run=run, scores=TEACHER
    )
    assert rows[:2] == [["q1", ["a", 2.5], ["x", -1]], ["q2", ["b", 1], ["y", 1e-3]]]
    assert rows[2] in [["q2", ["c", 4], ["x", 2]], ["q2", ["c", 4], ["y", 1e-3]]] and len(rows) == 3
    counted = ("passages_without_score", "negatives_by_score", "positives_without_score")
    assert [report[key] for key in counted] == [2, 1, 1]
    run = "q1\tx\t1\n"  # without scores of its own
    rows, _ = mine("--ranks", 1, 1, "--negatives", 1, "--margin", 0.9, "--teacher", "scores", run=run, scores=TEACHER)
    assert rows == [["q1", ["a", 2.5], ["x", -1]]]


COLLECTION = (
    "a\tThe answer: 20 Boats.\nx\ttwenty boats, 120 boats\ny\tit has\u00a020 BOATS!\n"
    "z\t20 boatsmen; \u96e8\u304c\u964d\u308b\n"
)


@pytest.mark.parametrize(
    "name, answers, negatives",
    [
        ("a.tsv", "q1\tno such\t20 boats\n", ["x", "z"]),
        ("a.tsv", "qid\tanswer\nq1\t20 boats\nq1\tTwenty\n", ["z"]),
        ("a.jsonl", '{"qid": "q1", "answers": ["\uff12\uff10 boats", "?"]}\n', ["x", "z"]),
        ("a.jsonl", '{"id": "q1", "question": "?", "answers": {"text": ["20"], "answer_start": [3]}}\n', ["x"]),
        ("a.jsonl", '{"qid": "q1", "answer": "\u96e8"}\n', ["x", "y"]),
        ("a.jsonl", '{"qid": "q1", "answers": []}\n', ["x", "y", "z"]),
    ],
)
def test_passages_that_hold_an_answer(mine, name, answers, negatives):
    run, flags = trec({"q1": {"y": 9, "z": 8, "x": 7}}), ("--ranks", 1, 3, "--answers", name, "--collection", "c.tsv")
    files = {"run": run, name: answers, "c.tsv": COLLECTION}
    rows, _ = mine(*flags, "--negatives", len(negatives), **files)
    assert [[*row[:2], *sorted(row[2:])] for row in rows] == [["q1", "a", *negatives]]
    if len(negatives) < 3:
        message = mine(*flags, "--negatives", len(negatives) + 1, output="other", **(files | {"out.jsonl": ""}))
        assert "positives have too few passages to draw from" in message


def test_words():
    assert as_words("The\tCaf\u00e9's 1,5 \u96e8\u304c") == " the caf\u00e9 s 1 5 \u96e8 \u304c "


def test_the_output_may_be_gz_and_is_a_training_file(mine, tmp_path, encoder_dir):
    run = trec({"q1": {"x": 9, "y": 8}, "q2": {"y": 2, "x": 1}})
    rows, _ = mine("--ranks", 1, 2, "--negatives", 2, run=run, output="m.jsonl.gz")
    (tmp_path / "c").write_text("".join(f"{pid}\ttext\n" for pid in "abcxyz"))
    (tmp_path / "q").write_text("q1\tboat\nq2\tdrum\nq3\thouse\n")
    files = ("--collection", tmp_path / "c", "--queries", tmp_path / "q", "--triples", tmp_path / "m.jsonl.gz")
    done = call_stage("tsv2mmap.py", *files, "--tokenizer", encoder_dir, "--output_dir", tmp_path / "tokens")
    assert json.loads(succeed(done).stdout)["triples"] == len(rows) == 3


RUN = trec({"q1": {"x": 9, "y": 8}})


@pytest.mark.parametrize(
    "flags, files, message",
    [
        (("--ranks", 5, 6), {}, "--ranks 5 6: not as many as --negatives 4"),
        (("--ranks", 6, 5), {}, "--ranks 6 5: not as many as --negatives 4"),
        ((), {}, "no row to write: 2 judged queries are not in the run; 1 positives have too few passages"),
        ((), {"qrels": "q1 0 a 0\n"}, "no row to write: nothing is judged relevant"),
        (("--margin", 0.9), {"run": "q1\tx\t1\n"}, "run: no scores in it, by which --margin"),
        ((), {"run": "q1\tx\t1\nq2\tx\t1\nq1\ty\t2\n"}, "run:3: query q1 again, after others"),
        (("--teacher", "t"), {"t": '["q1", "a"]\n'}, "t:1: no scores: give what scripts/score.py wrote"),
        (("--teacher", "t"), {"t": "q1 a\n"}, "t:1: not JSON"),
        (("--teacher", "none"), {}, "none: no such file"),
        (("--answers", "run"), {}, "--answers and --collection: give both"),
        (
            ("--ranks", 1, 4, "--answers", "a", "--collection", "c"),
            {"a": "q1\tb\n", "c": "x\tb\n"},
            "c: pid 'y' of the run is not in it",
        ),
        (("--answers", "a", "--collection", "c"), {"a": "q1\n", "c": "x\tb\n"}, "a:1: no answer"),
        (("--answers", "a", "--collection", "c"), {"a": "", "c": "x\tb\n"}, "a: empty, expected answers"),
        (
            ("--answers", "a.jsonl", "--collection", "c"),
            {"a.jsonl": '{"qid": 1}\n', "c": "x\tb\n"},
            'a.jsonl:1: {"qid"',
        ),
    ],
)
def test_mistakes(mine, flags, files, message):
    assert message in mine(*flags, **({"run": RUN} | files))


def test_the_output_is_none_of_the_inputs(mine):
    assert "holds what is read" in mine("--ranks", 1, 9, run=RUN, output="run")


def test_the_command_line(mine, tmp_path):
    rows, _ = mine("--ranks", 1, 2, "--negatives", 2, run=RUN)
    flags = ("--run", tmp_path / "run", "--qrels", tmp_path / "qrels", "--ranks", 1, 2, "--negatives", 2)
    done = succeed(run_stage_cli("scripts/mine.py", *flags, "--output", tmp_path / "again.jsonl"))
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()
    assert json.loads(done.stdout)["rows"] == len(rows) == 1 and "mine.py: note: 2 judged queries" in done.stderr
