import contextlib
import io
import json
import os
import pty
import subprocess
import sys
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from evaluate import main, parse_args, randomisation_test
from nanocolbert.cli import run_stage

ROOT = Path(__file__).parent.parent
DL = ROOT.parent / "shared" / "data" / "msmarco-dl19-20"

QRELS = "1 0 a 1\n1 0 b 3\n2 0 c 2\n3 0 d 1\n4 0 e 0\n"
RUN = "1\tx\t1\n1\ta\t2\n1\tb\t3\n2\tc\t1\n4\te\t1\n9\tz\t1\n"  # 3 has no ranking, 4 nothing relevant, 9 is unjudged
OTHER = "1 Q0 b 1 2.0 t\n1 Q0 a 2 2.0 t\n2 Q0 x 1 9 t\n3 Q0 d 1 1 t\n"


def evaluate(*args):
    return subprocess.run([sys.executable, ROOT / "evaluate.py", *args], capture_output=True, text=True)


@pytest.fixture
def files(tmp_path):
    for name, text in [("qrels", QRELS), ("run", RUN), ("other", OTHER)]:
        (tmp_path / name).write_text(text)
    return tmp_path


def test_by_hand(files):
    output = files / "new" / "metrics.json"
    done = evaluate("--qrels", files / "qrels", "--run", files / "run", "--output", output)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads(output.read_text())
    assert list(output.parent.iterdir()) == [output]
    assert result["MRR@10"] == pytest.approx((1 / 2 + 1 + 0 + 0) / 4)
    assert result["MAP"] == pytest.approx(((1 / 2 + 2 / 3) / 2 + 1) / 4)
    assert result["Recall@50"] == result["Recall@1000"] == pytest.approx((1 + 1) / 4)
    assert (result["Success@1"], result["Success@5"]) == (0.25, 0.5)
    discounts = 1 / np.log2([2, 3, 4])
    assert result["nDCG@10"] == pytest.approx(((discounts @ [0, 1, 3]) / (discounts @ [3, 1, 0]) + 1) / 4)
    counts = ("judged_queries", "judged_queries_without_ranking", "judged_queries_without_relevant", "unjudged_queries")
    assert [result[key] for key in counts] == [4, 1, 1, 1]
    assert len(done.stdout.splitlines()) == 1  # a pipe: for programs
    for note in ("1 judged queries have no ranking", "1 judged queries have nothing", "1 queries are not judged"):
        assert note in done.stderr


def test_a_terminal_is_given_a_table(files):
    command = [sys.executable, ROOT / "evaluate.py", "--qrels", files / "qrels", "--run", files / "run"]
    read, write = pty.openpty()
    subprocess.run(command, stdout=write, stderr=subprocess.DEVNULL, check=True)
    os.close(write)
    shown = os.read(read, 1 << 16).decode()
    os.close(read)
    assert "MRR@10           0.3750" in shown and "{" not in shown
    assert evaluate(*command[2:], "--no-json").stdout == shown.replace("\r", "")


def test_rel_and_measures(files):
    done = evaluate(
        "--qrels", files / "qrels", "--run", files / "run", "--rel", "2", "--measures", "RR@10", "P@3", "RR@2"
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["RR@10"] == pytest.approx((1 / 3 + 1) / 4)
    assert (result["RR@2"], result["P@3"]) == (0.25, pytest.approx((1 / 3 + 1 / 3) / 4))
    assert result["judged_queries_without_relevant"] == 2 and "MRR@10" not in result


def test_by_document(files):
    """A document is where its best passage is, and counts once."""
    (files / "qrels").write_text("query-id\tcorpus-id\tscore\n1\tb\t1\n2\ta\t1\n")
    (files / "run").write_text("1\ta#3\t1\n1\ta#1\t2\n1\tb#2\t3\n1\tb#1\t4\n2\ta\t1\n")
    (files / "other").write_text("1 Q0 b#1 1 2.0 t\n2 Q0 b#1 1 2.0 t\n2 Q0 a#1 2 1.0 t\n")
    arguments = ("--qrels", files / "qrels", "--run", files / "run", "--measures", "RR@10", "P@2")
    result = json.loads(evaluate(*arguments, "--by_document", "--compare", files / "other").stdout)
    assert result["RR@10"] == pytest.approx((1 / 2 + 1) / 2) and result["P@2"] == 0.5
    assert result["compare"]["measures"]["RR@10"]["other"] == pytest.approx((1 + 1 / 2) / 2)
    assert (result["by_document"], result["passages_of_deepest_ranking"]) == (True, 2)
    result = json.loads(evaluate(*arguments).stdout)
    assert result["RR@10"] == 0.5 and result["by_document"] is False


def test_compare(files):
    done = evaluate("--qrels", files / "qrels", "--run", files / "run", "--compare", files / "other", "--show", "2")
    result = json.loads(done.stdout.splitlines()[-1])
    row = result["compare"]["measures"]["MRR@10"]
    assert row["other"] == pytest.approx((1 + 0 + 1) / 4)
    assert row["difference"] == pytest.approx(result["MRR@10"] - row["other"])
    assert (row["queries_better"], row["queries_worse"]) == (1, 2)
    assert result["compare"]["changed"] == [{"qid": "2", "other": 0, "run": 1}, {"qid": "3", "other": 1, "run": 0}]
    done = evaluate("--qrels", files / "qrels", "--run", files / "run", "--compare", files / "run")
    compared = json.loads(done.stdout.splitlines()[-1])["compare"]
    assert compared["changed"] == [] and all(row["p"] == 1 for row in compared["measures"].values())
    table = evaluate(
        "--qrels", files / "qrels", "--run", files / "run", "--compare", files / "other", "--no-json"
    ).stdout
    assert "queries whose MRR@10 changed most (qid, other, run)\n  2 " in table and "{" not in table


def test_randomisation_test_against_all_flips():
    differences = np.random.default_rng(1).normal(0.4, 1, (10, 2))
    flips = np.array(list(product([-1, 1], repeat=10))) @ differences  # (1024, 2)
    exact = (np.abs(flips) >= np.abs(differences.sum(0)) * (1 - 1e-9)).mean(0)
    assert randomisation_test(differences, 20_000) == pytest.approx(exact, abs=0.015)
    assert randomisation_test(np.full((1, 1), 0.5)) == 1  # one query tells nothing
    assert randomisation_test(np.full((40, 1), 0.5)) < 0.001


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("run", "1\ta\t1\n1\tb\t2\n1\ta\t3\n", "run:3: passage a a second time for query 1"),
        ("qrels", "1 0 a 1\n1 0 a 2\n", "qrels:2: passage a judged a second time for query 1"),
        ("run", "7\ta\t1\n", "none of its 1 queries is judged"),
        ("other", "1\ta\n", "other:1: found 2 column"),
    ],
)
def test_mistakes_end_with_one_line(files, name, text, message):
    (files / name).write_text(text)
    args = ["--qrels", files / "qrels", "--run", files / "run", "--compare", files / "other", "--output", files / "out"]
    done = evaluate(*args)
    errors = [line for line in done.stderr.splitlines() if not line.startswith("note:")]
    assert done.returncode == 2 and done.stdout == "" and len(errors) == 1 and message in errors[0]
    assert not (files / "out").exists()


@pytest.mark.parametrize(
    "args, message",
    [
        (["--run", "none"], "none: no such file"),
        (["--measures", "MRR@ten"], "measure 'MRR@ten'"),
        (["--rel", "0"], "'0' is not a whole number above 0"),
        (["--metrics", "MAP"], "unrecognized arguments"),
    ],
)
def test_bad_arguments(files, args, message):
    done = evaluate("--qrels", files / "qrels", "--run", files / "run", *args)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(not (DL / "runs").exists(), reason="needs the TREC Deep Learning runs")
@pytest.mark.parametrize("run, ndcg", [("BM25.dl19", 0.5058), ("D_BERT_KD_TASB.dl19", 0.7210), ("BM25.dl20", 0.4827)])
def test_published_runs(run, ndcg):
    """Published runs over the whole collection, 100 passages a query: not pool scores."""
    year = run.rsplit(".", 1)[1]
    done = evaluate("--qrels", DL / f"qrels.{year}.tsv", "--run", DL / "runs" / f"{run}.tsv", "--rel", "2")
    assert json.loads(done.stdout.splitlines()[-1])["nDCG@10"] == pytest.approx(ndcg, abs=1e-4)


def called(*args) -> str:
    """What the stage prints, called in this process."""
    command, out = ["evaluate.py", *map(str, args)], io.StringIO()
    with mock.patch.object(sys, "argv", command), contextlib.redirect_stdout(out):
        run_stage(main, parse_args())
    return out.getvalue()


def as_json(*args) -> dict:
    return json.loads(called(*args))


def test_several_runs(files):
    """Each as it is by itself; --compare names a base among them, or another."""
    alone = {name: as_json("--qrels", files / "qrels", "--run", files / name) for name in ("run", "other")}
    both = as_json("--qrels", files / "qrels", "--run", f"ours={files / 'run'}", files / "other", "--compare", "ours")
    assert list(both["methods"]) == ["ours", str(files / "other")]
    for name, measured in zip(("run", "other"), both["methods"].values(), strict=True):
        (file,) = measured["runs"]
        assert file == {key: alone[name][key] for key in file}
        assert measured["mean"] == measured["lowest"] == measured["highest"]
        assert measured["mean"].items() <= file.items() and "MRR@10" in measured["mean"]
    compared = as_json("--qrels", files / "qrels", "--run", files / "other", "--compare", files / "run")["compare"]
    assert both["compare"] == "ours" and "compare" not in both["methods"]["ours"]
    assert both["methods"][str(files / "other")]["compare"] == compared["measures"]
    again = as_json("--qrels", files / "qrels", "--run", f"A={files / 'other'}", "--compare", f"B={files / 'run'}")
    assert list(again["methods"]) == ["B", "A"] and again["compare"] == "B"
    assert again["methods"]["A"]["compare"] == compared["measures"]


def test_seeds_of_a_method(files):
    """Means, spread, and the test of each query's mean over the seeds."""
    run, other = files / "run", files / "other"
    (files / "base").write_text("1\tb\t1\n2\tx\t1\n2\tc\t2\n")  # reciprocal ranks 1, 1/2, 0, 0
    common = ("--qrels", files / "qrels", "--compare", f"base={files / 'base'}", "--measures", "RR@10", "P@1")
    found = as_json(*common, "--run", f"ours={run},{other}")["methods"]["ours"]
    assert [file["run"] for file in found["runs"]] == [str(run), str(other)]
    assert found["mean"]["RR@10"] == pytest.approx((3 / 8 + 1 / 2) / 2)
    assert (found["lowest"]["RR@10"], found["highest"]["RR@10"]) == pytest.approx((3 / 8, 1 / 2))
    ours = np.array([(1 / 2 + 1) / 2, (1 + 0) / 2, (0 + 1) / 2, 0])
    row = found["compare"]["RR@10"]
    assert row["other"] == pytest.approx(3 / 8) and row["difference"] == pytest.approx(ours.mean() - 3 / 8)
    assert (row["queries_better"], row["queries_worse"]) == (1, 1)
    assert row["p"] == pytest.approx(randomisation_test((ours - [1, 1 / 2, 0, 0])[:, None])[0])
    assert as_json(*common, "--run", f"ours={run}", f"ours={other}")["methods"]["ours"] == found


def test_table_of_several(files):
    runs = (f"ours={files / 'run'},{files / 'other'}", f"alone={files / 'run'}")
    flags = ("--compare", "alone", "--measures", "RR@10", "P@1", "--no-json")
    shown = called("--qrels", files / "qrels", "--run", *runs, *flags).splitlines()
    cells = [line.split() for line in shown]
    assert cells == [
        ["RR@10", "P@1"],
        ["ours", "(mean", "of", "2)", "0.4375", "0.3750"],
        ["lowest", "0.3750", "0.2500"],
        ["highest", "0.5000", "0.5000"],
        ["less", "alone", "+0.0625", "+0.1250"],
        ["p", *cells[5][1:]],
        ["alone", "0.3750", "0.2500"],
    ]
    assert len({len(line) for line in shown}) == 1


def test_a_path_with_signs_in_its_name(files):
    (files / "a=b,c").write_text(RUN)
    result = as_json("--qrels", files / "qrels", "--run", files / "a=b,c")
    assert result["run"] == str(files / "a=b,c") and "methods" not in result
    assert list(as_json("--qrels", files / "qrels", "--run", f"x={files / 'a=b,c'}")["methods"]) == ["x"]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--run", "ours="], "ours=: give NAME=PATH"),
        (["--run", "ours=run,"], "ours=run,: give NAME=PATH"),
        (["--run", "=run"], "=run: give NAME=PATH"),
        (["--run", "ours=run,run"], "run: a second time for ours"),
        (["--run", "run", "run"], "run: a second time: give it once"),
        (["--run", "a=run", "--compare", "a=other"], "a is a --run already: give --compare a"),
        (["--run", "run", "other", "--compare", "none"], "none: no such file"),
        (["--run", "run", "other", "--output", "other"], "other: holds what is read"),
    ],
)
def test_several_runs_given_wrongly(files, args, message, monkeypatch, capsys):
    monkeypatch.chdir(files)
    with pytest.raises(SystemExit, match="2"):
        called("--qrels", "qrels", *args)
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note:")]
    assert len(errors) == 1 and message in errors[0] and (files / "other").read_text() == OTHER
