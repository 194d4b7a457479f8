"""scripts/score.py: the rows of a file come back with the scores that its teacher gives their texts."""

import gzip
import json
import os

import pytest
import score
from conftest import call_stage, run_stage_cli, succeed, toy_inputs
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from model import ColBERT
from nanocolbert.storage.documents import read_documents, read_queries
from nanocolbert.training.teachers import LateInteraction, load_teacher, score_rows


@pytest.fixture(scope="module")
def inputs(toy_dir) -> list:
    return ["--collection", toy_dir / "collection.tsv", "--queries", toy_dir / "queries.tsv"]


def texts_of(toy_dir) -> tuple[dict, dict]:
    passages = {read.id: read.text for read in read_documents(toy_dir / "collection.tsv", "collection: pid, passage")}
    return read_queries(toy_dir / "queries.tsv"), passages


def run(*arguments):
    return call_stage("score.py", *arguments)


def read(path) -> list:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as file:
        return [json.loads(line) for line in file]


def test_id_triples_by_an_encoder(tmp_path, toy_dir, encoder_dir, inputs, monkeypatch):
    monkeypatch.setattr(score, "PAIRS", 30)  # several chunks
    monkeypatch.setattr(score, "ROWS", 9)
    rows, output = toy_dir / "triples.tsv", tmp_path / "new" / "scored.jsonl"
    flags = ["--teacher", encoder_dir, "--similarity", "sum", "--rows", rows, "--output", output, "--fp32"]
    done = succeed(run(*inputs, *flags))
    ids = [line.split("\t") for line in rows.read_text().splitlines()]
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["rows"], result["pairs"]) == (len(ids), 2 * len(ids))
    assert os.listdir(output.parent) == [output.name]  # and nothing else is left
    written = read(output)
    assert [[qid, *(pid for pid, _ in pairs)] for qid, *pairs in written] == ids
    queries, passages = texts_of(toy_dir)
    teacher = load_teacher(encoder_dir, "sum", fp32=True)
    for qid, *pairs in written:  # one row at a time
        wanted = score_rows(teacher, [(queries[qid], [passages[pid] for pid, _ in pairs])])[0]
        assert [value for _, value in pairs] == pytest.approx(wanted.tolist(), abs=1e-3)


@pytest.fixture(scope="module")
def colbert_dir(tmp_path_factory, colbert):
    folder = tmp_path_factory.mktemp("colbert") / "model"
    colbert.save_pretrained(folder)
    return folder


def make_tokens(folder, toy_dir, encoder_dir, *flags):
    inputs = [*toy_inputs(toy_dir), "--tokenizer", encoder_dir, "--output_dir", folder, "--workers", 1]
    succeed(call_stage("tsv2mmap.py", *inputs, *flags))
    return folder


def test_uneven_rows_by_a_colbert(tmp_path, toy_dir, encoder_dir, colbert_dir, inputs):
    """Some with scores, as .gz; and passages of a tokens folder are those of its collection."""
    lines = ['["q0", ["p1", 0.5], ["p2", 9]]', '["q1", "p8"]', '["q0", "p9", "p1", "p3", "p4"]']
    rows, output = tmp_path / "rows.jsonl.gz", tmp_path / "scored.jsonl.gz"
    rows.write_bytes(gzip.compress("\n".join(lines).encode()))
    flags = ["--teacher", colbert_dir, "--rows", rows, "--output", output, "--fp32"]
    succeed(run(*inputs, *flags))
    queries, passages = texts_of(toy_dir)
    wanted = [("q0", ["p1", "p2"]), ("q1", ["p8"]), ("q0", ["p9", "p1", "p3", "p4"])]
    texts = [(queries[qid], [passages[pid] for pid in pids]) for qid, pids in wanted]
    scores = score_rows(LateInteraction(ColBERT.from_pretrained(colbert_dir), fp32=True), texts)
    for (qid, *pairs), (of, pids), values in zip(read(output), wanted, scores, strict=True):
        assert (qid, [pid for pid, _ in pairs]) == (of, pids)
        assert [value for _, value in pairs] == pytest.approx(values.tolist(), rel=1e-5)
    before = output.read_bytes()
    tokens = make_tokens(tmp_path / "tokens", toy_dir, encoder_dir)
    succeed(run(*inputs[2:], "--collection", tokens, *flags))
    assert output.read_bytes() == before  # also: written again, it is the same


def test_cross_encoder_and_numbers_as_ids(tmp_path, encoder_dir):
    """By the command line, as a user would."""
    tokenizer = AutoTokenizer.from_pretrained(encoder_dir)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(tokenizer), num_labels=1, initializer_range=0.5, **size)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "cross")
    tokenizer.save_pretrained(tmp_path / "cross")
    (tmp_path / "passages.tsv").write_text("1\ta boat\n2\tan eagle\n")
    (tmp_path / "queries.tsv").write_text("7\told boat\n")
    (tmp_path / "rows.jsonl").write_text("[7, 1, 2]\n")
    flags = ["--collection", tmp_path / "passages.tsv", "--queries", tmp_path / "queries.tsv", "--fp32"]
    flags += ["--rows", tmp_path / "rows.jsonl", "--output", tmp_path / "scored.jsonl", "--teacher", tmp_path / "cross"]
    succeed(run_stage_cli("scripts/score.py", *flags))
    wanted = score_rows(load_teacher(tmp_path / "cross", fp32=True), [("old boat", ["a boat", "an eagle"])])[0]
    first, second = (pytest.approx(value, rel=1e-5) for value in wanted.tolist())
    assert read(tmp_path / "scored.jsonl") == [["7", ["1", first], ["2", second]]]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("rows.jsonl", '["q0", "p1"]\n["q0", "p1", "p777"]\n', "rows.jsonl:2: pid 'p777' is not in"),
        ("rows.tsv", "q0\tp1\tp2\nq99\tp1\tp2\n", "rows.tsv:2: qid 'q99' is not in"),
        ("rows.jsonl", '["q0", "p1"]\n["q0"]\n', "rows.jsonl:2: "),
        ("rows.jsonl", '["q0", ["p1"]]\n', "rows.jsonl:1: "),
        ("rows.jsonl", '["q0", true]\n', "rows.jsonl:1: "),
        ("rows.jsonl", "q0\tp1\n", "rows.jsonl:1: "),
        ("rows.tsv", "", "empty, expected training rows"),
        ("queries.tsv", "q0\ta\nq0\tb\n", "queries.tsv: id 'q0' a second time"),
        ("queries.tsv", "", "queries.tsv: empty, expected queries"),
    ],
)
def test_mistakes_in_files(tmp_path, toy_dir, encoder_dir, name, text, message):
    """Found before the teacher is loaded; nothing is left."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_text(text)
    rows = tmp_path / "in" / name if name.startswith("rows") else toy_dir / "triples.tsv"
    queries = tmp_path / "in" / name if name.startswith("queries") else toy_dir / "queries.tsv"
    flags = ["--collection", toy_dir / "collection.tsv", "--queries", queries, "--rows", rows]
    done = run(*flags, "--teacher", tmp_path / "none", "--output", tmp_path / "out" / "scored.jsonl")
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.returncode == 2 and len(errors) == 1 and message in errors[0], done.stderr
    assert not os.path.exists(tmp_path / "out") or os.listdir(tmp_path / "out") == []


def test_mistakes_in_flags(tmp_path, toy_dir, encoder_dir, colbert_dir, inputs):
    rows, output = toy_dir / "triples.tsv", tmp_path / "scored.jsonl"
    for flags, message in (
        ((*inputs, "--teacher", colbert_dir, "--similarity", "mean"), "a ColBERT, which knows how to compare texts"),
        ((*inputs, "--teacher", encoder_dir), "say how it compares texts by --similarity mean, maxsim, sum"),
        ((*inputs, "--teacher", tmp_path / "none"), "none: no such folder"),
        ((*inputs[2:], "--collection", encoder_dir, "--teacher", encoder_dir), "not a finished tokens folder"),
    ):
        done = run(*flags, "--rows", rows, "--output", output)
        assert done.returncode == 2 and message in done.stderr, done.stderr
    done = run(*inputs, "--rows", rows, "--output", rows, "--teacher", encoder_dir, "--similarity", "mean")
    assert done.returncode == 2 and "holds what is read" in done.stderr
    assert not output.exists() and os.listdir(tmp_path) == []


def test_tokens_without_texts(tmp_path, toy_dir, encoder_dir):
    tokens = make_tokens(tmp_path / "tokens", toy_dir, encoder_dir, "--no-keep_texts")
    flags = ["--rows", toy_dir / "triples.tsv", "--output", tmp_path / "out.jsonl", "--teacher", encoder_dir]
    done = run("--collection", tokens, "--queries", toy_dir / "queries.tsv", *flags)
    assert done.returncode == 2 and "run tsv2mmap.py again, with --keep_texts" in done.stderr


def test_a_teacher_that_fails_leaves_what_was_there(tmp_path, toy_dir, encoder_dir, inputs, monkeypatch):
    output = tmp_path / "scored.jsonl"
    output.write_text("of before\n")
    monkeypatch.setattr(score, "PAIRS", 30)
    calls = []

    def score_chunk(*arguments):
        if calls:
            raise OSError(28, "No space left on device")
        calls.append(arguments)
        return ["half\n"]

    monkeypatch.setattr(score, "score_chunk", score_chunk)
    flags = ["--teacher", encoder_dir, "--similarity", "mean", "--rows", toy_dir / "triples.tsv", "--output", output]
    done = run(*inputs, *flags)
    assert done.returncode == 2 and "No space left" in done.stderr
    assert calls and output.read_text() == "of before\n" and os.listdir(tmp_path) == [output.name]
