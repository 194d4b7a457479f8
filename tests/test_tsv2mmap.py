"""tsv2mmap: every text once, every triple as the rows it names, and nothing half-written."""

import csv
import gzip
import io
import json
import shutil
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from conftest import ROOT, call_stage, run_stage_cli, succeed, toy_inputs
from tqdm import tqdm

from nanocolbert import cli
from nanocolbert.encoder.pretrained import load_tokenizer
from nanocolbert.storage.documents import read_documents
from nanocolbert.storage.ragged import Ids, Ragged
from tsv2mmap import TextRows, TokenWriter, below_a_bar

DOC_MAXLEN, QUERY_MAXLEN, FRAME = 180, 32, 3
FILES = [
    "meta.json",
    "passages/offsets.npy",
    "passages/values.npy",
    "pids.npy",
    "qids.npy",
    "queries/offsets.npy",
    "queries/values.npy",
    "texts/offsets.npy",
    "texts/values.npy",
    "triples.npy",
]


def rows_of(path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()]


def arrays(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.npy"))}


def convert(encoder_dir, output_dir, **files):
    """Convert files in this process; returns (meta, triples as lists, passages, queries)."""
    flags = [part for name, value in files.items() for part in (f"--{name}", value)]
    succeed(call_stage("tsv2mmap.py", *flags, "--tokenizer", encoder_dir, "--output_dir", output_dir, "--workers", 2))
    meta = json.loads((output_dir / "meta.json").read_text())
    triples = np.load(output_dir / "triples.npy").tolist() if "triples" in files else None
    return meta, triples, Ragged(output_dir / "passages"), Ragged(output_dir / "queries")


def check_tokens(ragged, texts, encoder_dir, maxlen):
    """Row i holds text i as the tokenizer alone gives it."""
    tokenizer = load_tokenizer(encoder_dir)
    assert len(ragged) == len(texts)
    for i, text in enumerate(texts):
        assert ragged[i].tolist() == tokenizer.encode(text, add_special_tokens=False)[: maxlen - FRAME], (i, text)


def test_id_triples(tokens_dir, toy_dir, encoder_dir):
    assert sorted(str(path.relative_to(tokens_dir)) for path in tokens_dir.rglob("*.*")) == FILES
    assert sorted(path.name for path in tokens_dir.parent.iterdir()) == ["tokens"]
    pids, passages = zip(*rows_of(toy_dir / "collection.tsv"), strict=True)
    qids, queries = zip(*rows_of(toy_dir / "queries.tsv"), strict=True)
    assert Ids(tokens_dir / "pids.npy").text(np.arange(len(pids))) == list(pids)
    assert Ids(tokens_dir / "qids.npy").text(np.arange(len(qids))) == list(qids)
    check_tokens(Ragged(tokens_dir / "passages"), passages, encoder_dir, DOC_MAXLEN)
    check_tokens(Ragged(tokens_dir / "queries"), queries, encoder_dir, QUERY_MAXLEN)
    triples = np.load(tokens_dir / "triples.npy")
    assert triples.dtype == np.int32 and np.load(tokens_dir / "passages/values.npy").dtype == np.uint16
    expected = [[qids.index(q), pids.index(p), pids.index(n)] for q, p, n in rows_of(toy_dir / "triples.tsv")]
    assert triples.tolist() == expected  # file order
    meta = json.loads((tokens_dir / "meta.json").read_text())
    assert meta["counts"] == {"qids": 16, "pids": 40, "triples": 64, "passages": 40, "queries": 16}


def test_empty_and_long_passages_keep_their_ids(tokens_dir):
    passages, pids = Ragged(tokens_dir / "passages"), Ids(tokens_dir / "pids.npy")
    empty, long, after = pids.rows(["p8", "p9", "p10"])
    assert len(passages[empty]) == 0 and len(passages[long]) == DOC_MAXLEN - FRAME and len(passages[after]) > 0


def test_two_workers_write_the_same_files(tokens_dir, toy_dir, encoder_dir, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/left by a kill").write_text("x")
    arguments = (*toy_inputs(toy_dir), "--tokenizer", encoder_dir, "--output_dir", tmp_path / "out", "--workers", 2)
    done = succeed(run_stage_cli("tsv2mmap.py", *arguments))
    assert arrays(tmp_path / "out") == arrays(tokens_dir)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")) == FILES
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["pids"] == 40 and report["output_dir"] == str(tmp_path / "out")


def test_chunks_leave_no_trace(tokens_dir, toy_dir, encoder_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("tsv2mmap.CHUNK", 3)
    arguments = (*toy_inputs(toy_dir), "--tokenizer", encoder_dir, "--output_dir", tmp_path / "out", "--workers", 2)
    succeed(call_stage("tsv2mmap.py", *arguments))
    assert arrays(tmp_path / "out") == arrays(tokens_dir)


def test_gz_gives_the_same(tokens_dir, toy_dir, encoder_dir, tmp_path):
    files = {}
    for name in ("collection", "queries", "triples"):
        files[name] = tmp_path / f"{name}.tsv.gz"
        files[name].write_bytes(gzip.compress((toy_dir / f"{name}.tsv").read_bytes()))
    meta, *_ = convert(encoder_dir, tmp_path / "out", **files)
    assert arrays(tmp_path / "out") == arrays(tokens_dir)
    assert meta["fingerprint"] == json.loads((tokens_dir / "meta.json").read_text())["fingerprint"]


def test_text_triples_of_the_collection_are_the_id_triples(tokens_dir, toy_dir, encoder_dir, tmp_path):
    files = {name: toy_dir / f"{name}.tsv" for name in ("collection", "queries")}
    meta, triples, *_ = convert(encoder_dir, tmp_path / "out", triples=toy_dir / "triples.text.tsv", **files)
    assert triples == np.load(tokens_dir / "triples.npy").tolist()
    assert meta["counts"] == json.loads((tokens_dir / "meta.json").read_text())["counts"]


@pytest.mark.parametrize("chunk", [1, 2, 2000])
def test_each_distinct_text_is_stored_once(encoder_dir, tmp_path, chunk, monkeypatch):
    monkeypatch.setattr("tsv2mmap.CHUNK", chunk)
    (tmp_path / "c.tsv").write_text("p1\tthe boat\np2\tthe cloud\np3\tthe boat\n")
    (tmp_path / "q.tsv").write_text("q1\tfind boat\n")
    lines = [
        ("find boat", "the cloud", "a new drum"),
        ("find drum", "a new drum", "the boat"),
        ("find drum", "an eagle", "a new drum"),
        ("find boat", "the boat", "an eagle"),
        ("the boat", "find boat", "find drum"),  # queries and passages are stored apart
    ]
    (tmp_path / "t.tsv").write_text("".join("\t".join(line) + "\n" for line in lines))
    files = {"collection": tmp_path / "c.tsv", "queries": tmp_path / "q.tsv", "triples": tmp_path / "t.tsv"}
    meta, triples, passages, queries = convert(encoder_dir, tmp_path / "out", **files)
    new_passages = ["a new drum", "an eagle", "find boat", "find drum"]
    order = {tuple(row.tolist()): i for i, row in enumerate(passages)}
    tokenizer = load_tokenizer(encoder_dir)
    assert len(passages) == 3 + len(new_passages) and len(queries) == 3
    check_tokens(queries, ["find boat", "find drum", "the boat"], encoder_dir, QUERY_MAXLEN)
    passage_row = {text: order[tuple(tokenizer.encode(text, add_special_tokens=False))] for text in new_passages}
    passage_row |= {"the boat": 0, "the cloud": 1}  # the first of two equal passages
    assert sorted(passage_row.values()) == [0, 1, 3, 4, 5, 6]
    query_row = {"find boat": 0, "find drum": 1, "the boat": 2}
    assert triples == [[query_row[q], passage_row[p], passage_row[n]] for q, p, n in lines]
    assert len(np.load(tmp_path / "out/pids.npy")) == 3 and len(np.load(tmp_path / "out/qids.npy")) == 1
    assert meta["counts"] == {"qids": 1, "pids": 3, "triples": 5, "passages": 7, "queries": 3}


def test_text_triples_alone(encoder_dir, tmp_path):
    (tmp_path / "t.tsv").write_text("find boat\tthe boat\ta cloud\nfind boat\ta cloud\tthe boat\n")
    meta, triples, passages, _ = convert(encoder_dir, tmp_path / "out", triples=tmp_path / "t.tsv")
    assert sorted(triples[0][1:]) == [0, 1] and triples[1] == [0, triples[0][2], triples[0][1]]
    assert len(passages) == 2 and meta["counts"]["pids"] == 0 and len(np.load(tmp_path / "out/pids.npy")) == 0


def test_text_rows_equal_a_dict():
    rng, table, plain = np.random.default_rng(0), TextRows(), {}
    for step in range(40):
        hashes = rng.integers(0, 150_000, 5000).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # all bits in use
        assert table.find(hashes).tolist() == [plain.get(h, -1) for h in hashes.tolist()], step
        table.add(hashes, 5000 * step)
        for row, h in enumerate(hashes.tolist(), 5000 * step):
            plain.setdefault(h, row)
    assert len(table.hashes) > 1 << 16  # some were sorted, some were recent


def test_texts_without_spaces_are_no_ids(encoder_dir, tmp_path):
    lines = {"c": "p1\t今日は晴れ\np2\t雨が降る\n", "q": "q1\t天気\nq2\t雪\n", "t": "天気\t今日は晴れ\t雨が降る\n"}
    for name, text in lines.items():
        (tmp_path / name).write_text(text)
    files = {"collection": tmp_path / "c", "queries": tmp_path / "q", "triples": tmp_path / "t"}
    meta, triples, *_ = convert(encoder_dir, tmp_path / "out", **files)
    assert triples == [[0, 0, 1]] and meta["counts"] == {
        "qids": 2,
        "pids": 2,
        "triples": 1,
        "passages": 2,
        "queries": 2,
    }


def test_other_formats_give_the_same(tokens_dir, toy_dir, encoder_dir, tmp_path):
    """A header, CSV and JSON, other names: the same word pieces and ids."""
    collection, queries = rows_of(toy_dir / "collection.tsv"), rows_of(toy_dir / "queries.tsv")
    lines = [json.dumps({"key": pid, "body": text, "n": i}) for i, (pid, text) in enumerate(collection)]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    with open(tmp_path / "q.csv", "w", newline="") as file:
        csv.writer(file).writerows([("query", "qid"), *(row[::-1] for row in queries)])
    files = {"collection": tmp_path / "c.jsonl", "queries": tmp_path / "q.csv", "triples": toy_dir / "triples.tsv"}
    meta, *_ = convert(encoder_dir, tmp_path / "out", id_field="key", text_field="body", **files)
    assert arrays(tmp_path / "out") == arrays(tokens_dir)
    assert (meta["args"]["id_field"], meta["args"]["text_field"]) == ("key", "body") and "documents" not in meta


def test_titles_and_long_documents(encoder_dir, tmp_path):
    records = [
        {"_id": "d1", "title": "a cloud", "text": "the boat. An eagle in a house. A drum."},
        {"_id": "d2", "title": "", "text": ""},
        {"_id": "3", "text": "find apple"},
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    meta, _, passages, _ = convert(encoder_dir, tmp_path / "whole", collection=tmp_path / "c.jsonl")
    check_tokens(passages, [f"a cloud {records[0]['text']}", "", "find apple"], encoder_dir, DOC_MAXLEN)
    assert Ids(tmp_path / "whole/pids.npy").text(np.arange(3)) == ["d1", "d2", "3"]
    flags = {"passage_words": 5, "overlap": 2}
    meta, _, passages, _ = convert(encoder_dir, tmp_path / "cut", collection=tmp_path / "c.jsonl", **flags)
    texts = ["a cloud the boat.", "a cloud An eagle in a house.", "a cloud a house. A drum.", "", "find apple"]
    check_tokens(passages, texts, encoder_dir, DOC_MAXLEN)
    assert Ids(tmp_path / "cut/pids.npy").text(np.arange(5)) == ["d1#1", "d1#2", "d1#3", "d2#1", "3#1"]
    assert meta["documents"] == {"words": 5, "overlap": 2} and meta["counts"]["pids"] == 5
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*records, records[0]]))
    command = ("--collection", tmp_path / "c.jsonl", "--tokenizer", encoder_dir, "--output_dir", tmp_path / "out")
    done = call_stage("tsv2mmap.py", *command, "--passage_words", 5)
    check_mistake(done, tmp_path, {}, "c.jsonl:4: id 'd1#1' a second time (first on line 1)")


def test_shards_hold_every_document_once(encoder_dir, tmp_path):
    """Whole documents, so that the passages of one are together; titles, lines of mistakes and ids as they were."""
    lines = ["id\ttext", *(f"d{i}\tfind apple. A drum in a house." for i in range(5))]
    (tmp_path / "c.tsv").write_text("\n".join(lines) + "\n")
    flags, found = ("--collection", tmp_path / "c.tsv", "--tokenizer", encoder_dir, "--passage_words", 4), []
    for i in (1, 2, 3):
        out = tmp_path / f"shards/{i}"
        succeed(call_stage("tsv2mmap.py", *flags, "--shard", f"{i}/3", "--output_dir", out))
        found.append(Ids(out / "pids.npy").text(np.arange(len(np.load(out / "pids.npy")))))
    assert [sorted({pid.partition("#")[0] for pid in pids}) for pids in found] == [["d0", "d3"], ["d1", "d4"], ["d2"]]
    assert all(pids == sorted(pids) and len(pids) == 2 * len({*pids}) // 2 for pids in found)
    (tmp_path / "c.tsv").write_text("\n".join([*lines, "d3\tagain"]) + "\n")
    out = ("--output_dir", tmp_path / "out")
    done = call_stage("tsv2mmap.py", *flags, "--shard", "1/1", *out)
    assert "c.tsv:7: id 'd3#1' a second time (first on line 5)" in done.stderr
    done = call_stage("tsv2mmap.py", *flags, "--shard", "9/9", *out)
    assert done.returncode == 2 and "c.tsv: no line for shard 9, expected collection" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_killed_worker_ends_it_at_once(encoder_dir, tmp_path):
    words = "the boat of a cloud near an old house " * 40
    (tmp_path / "c.tsv").write_text("".join(f"p{i}\t{words}\n" for i in range(60_000)))
    flags = ("--collection", tmp_path / "c.tsv", "--tokenizer", encoder_dir, "--output_dir", tmp_path / "out")
    command = [sys.executable, ROOT / "tsv2mmap.py", *flags, "--workers", "2"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        parent, workers = psutil.Process(process.pid), []
        while len(workers) < 2 and process.poll() is None:
            time.sleep(0.05)
            workers = [child for child in parent.children() if "spawn_main" in " ".join(child.cmdline())]
        time.sleep(0.5)
        workers[0].kill()
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    error = [line for line in err.splitlines() if "tsv2mmap.py: error: a tokenising worker was killed" in line]
    assert process.returncode == 2 and len(error) == 1 and error[0].endswith("give fewer --workers"), err
    assert "Traceback" not in err and [path.name for path in tmp_path.iterdir()] == ["c.tsv"]
    psutil.wait_procs(workers, timeout=10)
    assert not any(worker.is_running() for worker in workers)


def test_the_folder_of_the_collection_is_spared(encoder_dir, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/c.tsv").write_text("p1\tthe boat\n")
    flags = ("--collection", tmp_path / "data/c.tsv", "--tokenizer", encoder_dir, "--output_dir", tmp_path / "data")
    done = call_stage("tsv2mmap.py", *flags)
    assert done.returncode == 2 and "holds what is read" in done.stderr and len(done.stderr.splitlines()) == 1
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["c.tsv"]


def test_more_negatives_and_max_triples(encoder_dir, tmp_path):
    (tmp_path / "c.tsv").write_text("7\tthe boat\n007\tthe cloud\n5\ta drum\n")
    (tmp_path / "q.tsv").write_text("2\tboat\n1\tcloud\n")
    (tmp_path / "t.tsv").write_text("1\t007\t7\t5\n2\t7\t5\t007\n2\t7\t007\t5\nlines past the limit are not read\n")
    files = {"collection": tmp_path / "c.tsv", "queries": tmp_path / "q.tsv", "triples": tmp_path / "t.tsv"}
    meta, triples, *_ = convert(encoder_dir, tmp_path / "out", max_triples=3, **files)
    assert triples == [[1, 1, 0, 2], [0, 0, 2, 1], [0, 0, 1, 2]] and meta["counts"]["triples"] == 3


TRAINING_FILES = {  # {format: the file, K, the rows' passages as places in the collection, scores}
    "nway": ('[2, [7, 0.5], ["007", 2]]\n[1, ["007", 1], [5, -1]]\n', 2, [[0, 1], [1, 2]], [[0.5, 2], [1, -1]]),
    "scored": ("0.5\t2\t2\t7\t007\n1\t-1\t1\t007\t5\n", 2, [[0, 1], [1, 2]], [[0.5, 2], [1, -1]]),
    "qrels": ("2\t0\t7\t1\n2\t0\t5\t0\n1\t0\t007\t1\n", 1, [[0], [1]], None),
}


@pytest.mark.parametrize("form", TRAINING_FILES)
def test_other_training_files(encoder_dir, tmp_path, form):
    text, n_passages, passages, scores = TRAINING_FILES[form]
    (tmp_path / "c.tsv").write_text("7\tthe boat\n007\tthe cloud\n5\ta drum\n")
    (tmp_path / "q.tsv").write_text("2\tboat\n1\tcloud\n")
    (tmp_path / "t").write_text(text)
    files = {"collection": tmp_path / "c.tsv", "queries": tmp_path / "q.tsv", "triples": tmp_path / "t"}
    meta, triples, *_ = convert(encoder_dir, tmp_path / "out", **files)
    assert triples == [[i, *row] for i, row in enumerate(passages)]
    found = (meta["triples_format"], meta["passages_per_query"], meta["scored"], meta["counts"]["triples"])
    assert found == (form, n_passages, scores is not None, 2)
    assert (tmp_path / "out/scores.npy").exists() == ("scores.npy" in meta["files"]) == (scores is not None)
    if scores:
        assert np.load(tmp_path / "out/scores.npy").tolist() == scores


def test_max_triples_and_nway(encoder_dir, tmp_path):
    """Rows are cut, and what is past the limit is not read."""
    (tmp_path / "c.tsv").write_text("7\tthe boat\n8\tthe cloud\n")
    (tmp_path / "q.tsv").write_text("2\tboat\n")
    (tmp_path / "t.jsonl").write_text("[2, [7, 1], [8, 2], [99, 3]]\nno JSON\n")
    files = {"collection": tmp_path / "c.tsv", "queries": tmp_path / "q.tsv", "triples": tmp_path / "t.jsonl"}
    _, triples, *_ = convert(encoder_dir, tmp_path / "out", max_triples=1, nway=2, **files)
    assert triples == [[0, 0, 1]] and np.load(tmp_path / "out/scores.npy").tolist() == [[1, 2]]


MISTAKES = {
    "missing file": ({"collection": None}, "{collection}: no such file"),
    "columns of the collection": (
        {"collection": b"p1\ta\np2\tb\tc\n"},
        "{collection}:2: found 3 column(s), expected 2",
    ),
    "blank line": ({"collection": b"p1\ta\n\np2\tb\n"}, "{collection}:2: found 1 column(s)"),
    "duplicate pid": (
        {"collection": b"p1\ta\np2\tb\np1\tc\n"},
        "{collection}:3: id 'p1' a second time (first on line 1)",
    ),
    "duplicate qid": ({"queries": b"q1\ta\nq1\ta\n"}, "{queries}:2: id 'q1' a second time"),
    "bytes": ({"collection": b"p1\ta\np2\tcaf\xe9\n"}, "{collection}:2: byte 0xe9 at column 7 is not UTF-8"),
    "unknown pid": ({"triples": b"q1\tp1\tp2\nq1\tp1\tp3\n"}, "{triples}:2: pid 'p3' in column 3 is not among"),
    "unknown qid": ({"triples": b"q1\tp1\tp2\nq1\tp1\tp2\nq2\tp1\tp2\n"}, "{triples}:3: qid 'q2' in column 1 is not"),
    "a header without texts": ({"collection": b"docid\tnote\np1\ta\n"}, "{collection}:1: no field has a usual name"),
    "a pid twice below a header": (
        {"collection": b"pid\ttext\np1\ta\np2\tb\np1\tc\n"},
        "{collection}:4: id 'p1' a second time (first on line 2)",
    ),
    "a header of triples": ({"triples": b"query\tpositive\tnegative\na b\tc\td\n"}, "{triples}:1: a header line"),
    "ids or texts": ({"queries": b"q1\tq1\n"}, "'q1' is both an id and a text of"),
    "neither": ({"triples": b"q9\tp1\tp2\n"}, "'q9' is neither an id nor a text of"),
    "a triple cut short": ({"triples": b"q1\tp1\tp2\nq1\tp1\n"}, "{triples}:2: found 2 column(s), expected 3"),
    "a pair": ({"triples": b"q1\tp1\n"}, "{triples}:1: found 2 column(s), expected 3"),
    "text triples of four": ({"triples": b"find a\tthe b\tthe c\tthe d\n"}, "{triples}:1: found 4 column(s)"),
    "JSON": ({"triples": b'["q1", "p1"]\n["q1", 2'}, "{triples}:2: not JSON"),
    "qrels of nothing": ({"triples": b"q1\t0\tp1\t0\n"}, "{triples}: no passage is of relevance 1 or more"),
    "bytes of a triple": ({"triples": b"q1\tp1\tp2\nq1\tp\xff1\tp2\n"}, "{triples}:2: byte 0xff at column 5"),
}


def write_mistake(tmp_path, changed) -> tuple[dict, list]:
    files = {"collection": b"p1\ta\np2\tb\n", "queries": b"q1\ta\n", "triples": b"q1\tp1\tp2\n"} | changed
    paths = {name: tmp_path / f"{name}.tsv" for name in files}
    for name, content in files.items():
        if content is not None:
            paths[name].write_bytes(content)
    return paths, [part for name, path in paths.items() for part in (f"--{name}", path)]


def check_mistake(done, tmp_path, paths, message):
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and message.format(**paths) in done.stderr, done.stderr
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake, encoder_dir, tmp_path):
    changed, message = MISTAKES[mistake]
    paths, flags = write_mistake(tmp_path, changed)
    done = call_stage("tsv2mmap.py", *flags, "--tokenizer", encoder_dir, "--output_dir", tmp_path / "out")
    check_mistake(done, tmp_path, paths, message)


def test_a_mistake_on_the_command_line(encoder_dir, tmp_path):
    paths, flags = write_mistake(tmp_path, MISTAKES["duplicate pid"][0])
    flags += ["--tokenizer", encoder_dir, "--output_dir", tmp_path / "out", "--workers", 1]
    check_mistake(run_stage_cli("tsv2mmap.py", *flags), tmp_path, paths, MISTAKES["duplicate pid"][1])


def test_other_mistakes(encoder_dir, toy_dir, tmp_path):
    shutil.copy(toy_dir / "triples.tsv", tmp_path / "t.tsv")
    collection = ("--collection", toy_dir / "collection.tsv")
    for flags, message in (
        ((*collection, "--tokenizer", tmp_path / "none"), "none: no such folder"),
        (("--tokenizer", encoder_dir), "nothing to do: give --collection, or --triples, or both"),
        (
            (*collection, "--triples", tmp_path / "t.tsv", "--triples_format", "id", "--tokenizer", encoder_dir),
            "triples of ids need --collection and --queries",
        ),
        ((*collection, "--tokenizer", encoder_dir, "--overlap", 3), "--overlap 3: give --passage_words above it"),
        (
            (*collection, "--tokenizer", encoder_dir, "--passage_words", 3, "--overlap", 3),
            "--overlap 3: give --passage_words above it",
        ),
        (
            (*collection, "--triples", toy_dir / "qrels.tsv", "--tokenizer", encoder_dir),
            "qrels.tsv: qrels need --collection and --queries",
        ),
        ((*toy_inputs(toy_dir), "--tokenizer", encoder_dir, "--shard", "1/2"), "--shard is of a --collection that"),
        ((*collection, "--tokenizer", encoder_dir, "--nway", 2), "--nway is of --triples: give them"),
        (
            (*toy_inputs(toy_dir), "--triples", toy_dir / "qrels.tsv", "--tokenizer", encoder_dir, "--nway", 1),
            "qrels.tsv is read as qrels, whose rows are all alike: leave it out",
        ),
        (
            ("--triples", tmp_path / "t.tsv", "--tokenizer", encoder_dir, "--text_field", "body"),
            "--text_field are of a --collection: give it",
        ),
    ):
        check_mistake(call_stage("tsv2mmap.py", *flags, "--output_dir", tmp_path / "out"), tmp_path, {}, message)


def test_bars(tmp_path, monkeypatch):
    """Of bytes where a file is read to its end, of rows where they are limited."""
    (tmp_path / "c.tsv").write_text("".join(f"{i}\ttext\n" for i in range(2500)))
    bars = []

    def progress(iterable=None, **settings):
        bars.append(tqdm(iterable, disable=False, file=io.StringIO(), **settings))
        return bars[-1]

    monkeypatch.setattr("tsv2mmap.progress", progress)
    read = lambda tell: read_documents(tmp_path / "c.tsv", "collection: pid, passage", tell=tell)  # noqa: E731
    assert len(list(below_a_bar(tmp_path / "c.tsv", read))) == 2500
    assert len(list(below_a_bar(tmp_path / "c.tsv", read, 7))) == 7
    size = (tmp_path / "c.tsv").stat().st_size
    assert [(bar.n, bar.total, bar.unit) for bar in bars] == [(size, size, "B"), (7, 7, " rows")]


def test_a_signal_waits_until_a_worker_is_started(tmp_path):
    """Heard by another thread, it would end the parent between a worker's start and the pool's knowing of it."""
    heard = []

    class Pool:
        def submit(self, *job):
            cli._held.append(15)  # as the handler does
            heard.append(job)

    writer = TokenWriter(tmp_path / "passages", Pool(), 9, "uint16", "passage", 99)
    with pytest.raises(SystemExit) as ended:
        writer.append(["a text"])
    assert ended.value.code == 143 and len(heard) == len(writer.pending) == 1
