"""Documents as people have them: what a field is, what an error says, and that cutting loses no word."""

import csv
import datetime
import decimal
import gzip
import json
import random
import sys
import tracemalloc

import pytest

from nanocolbert.cli import InputError
from nanocolbert.storage import tsv
from nanocolbert.storage.documents import (
    Document,
    Fields,
    read_documents,
    read_queries,
)

COLLECTION, QUERIES = "collection: pid, passage", "queries: qid, query"


def write(path, content):
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def jsonl(*records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def read(path, content, what=COLLECTION, **fields):
    return list(read_documents(write(path, content), what, Fields(**fields)))


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz", "a.txt", "a"])
def test_a_tsv_without_header_is_taken_to_the_letter(tmp_path, name):
    content = '1\t"quoted\nb-é\tx\x0by\u2028z\x85\nc\tcrlf\r\nd\t\nid\ttext\ne\t title end'
    assert read(tmp_path / name, content) == [
        Document(1, "1", '"quoted', None),
        Document(2, "b-é", "x\x0by\u2028z\x85", None),  # only \n ends a line
        Document(3, "c", "crlf", None),
        Document(4, "d", "", None),
        Document(5, "id", "text", None),  # a header is a first line
        Document(6, "e", " title end", None),
    ]


TABLE = [
    ("docno", "Title", "year", "text", "note"),
    ("d1", "Boats", "1984", 'say "hi", twice', ""),
    ("7", "", "x", "", "-2.5"),
]
TABLE_READ = [
    Document(2, "d1", 'Boats say "hi", twice', {"year": 1984, "note": None, "title": "Boats"}, "Boats"),
    Document(3, "7", "", {"year": "x", "note": -2.5}, ""),
]


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz", "a.csv", "a.CSV.gz"])
def test_a_header_line_names_the_columns(tmp_path, name):
    path = tmp_path / name
    with open(tmp_path / "plain", "w", newline="") as file:
        if "csv" in name.lower():
            csv.writer(file).writerows(TABLE)
        else:
            file.writelines("\t".join(row) + "\n" for row in TABLE)
    content = (tmp_path / "plain").read_bytes()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    path.write_bytes(content)
    assert list(read_documents(path, COLLECTION)) == TABLE_READ


def test_a_csv_has_quotes_and_lines_within_them(tmp_path):
    content = 'x,"one\ntwo, ""three"""\r\n\r\ny,plain\n"z","\n\n"\nw,last'
    found = read(tmp_path / "a.csv", content)
    assert [tuple(document[:3]) for document in found] == [
        (1, "x", 'one\ntwo, "three"'),
        (4, "y", "plain"),
        (5, "z", "\n\n"),
        (8, "w", "last"),
    ]
    long = "word " * 100_000  # longer than csv's own limit
    assert read(tmp_path / "a.csv", f"id,text\n1,{long}\n")[0].text == long


def test_a_column_without_a_name_is_left_out(tmp_path):
    """As pandas writes row numbers."""
    assert read(tmp_path / "a.csv", ",id,text\n0,a,one\n1,b,two\n") == [
        Document(2, "a", "one", None),
        Document(3, "b", "two", None),
    ]


def test_jsonl(tmp_path):
    beir = [
        {"_id": "4983", "title": "Boats", "text": "They sail.", "metadata": {"url": "u", "year": 2020}},
        {"_id": 17, "title": "", "text": "n\u00e9e \ud83d\ude00\n\ttwo", "metadata": {}},
        {"_id": "x", "title": None, "text": ""},
        {"_id": "y", "title": "Only a title", "text": "", "metadata": "a word", "tags": ["a", 1.5, None]},
        {"_id": "z", "text": "no title", "id": "another"},
    ]
    for name in ("a.jsonl", "a.jsonl.gz", "a.ndjson", "a.json"):
        assert read(tmp_path / name, jsonl(*beir) + "\n  \n") == [
            Document(1, "4983", "Boats They sail.", {"url": "u", "year": 2020, "title": "Boats"}, "Boats"),
            Document(2, "17", "née 😀\n\ttwo", None),
            Document(3, "x", "", None),
            Document(
                4,
                "y",
                "Only a title",
                {"metadata": "a word", "tags": ["a", 1.5, None], "title": "Only a title"},
                "Only a title",
            ),
            Document(5, "z", "no title", {"id": "another"}),
        ]
    assert read(tmp_path / "empty.jsonl", "") == [] == read(tmp_path / "empty.csv", "\n\n")


@pytest.mark.parametrize("pid", ["id", "_id", "docno", "doc_id", "pid", "ID", "corpus-id"])
@pytest.mark.parametrize("text", ["text", "passage", "contents", "body", "Abstract"])
def test_usual_names(tmp_path, pid, text):
    expected = [Document(2, "a", "one", None)]
    for end, separator in ((".tsv", "\t"), (".csv", ",")):
        for columns, row in (((pid, text), ("a", "one")), ((text, pid), ("one", "a"))):
            content = "".join(separator.join(line) + "\n" for line in (columns, row))
            assert read(tmp_path / f"a{end}", content) == expected
    assert read(tmp_path / "a.jsonl", jsonl({text: "one", pid: "a"})) == [expected[0]._replace(number=1)]


def test_queries_have_names_of_their_own_first(tmp_path):
    both = {"qid": "q1", "query": "find boats", "pid": "p1", "text": "a boat"}
    for name, content in (
        ("a.jsonl", jsonl(both)),
        ("a.csv", ",".join(both) + "\n" + ",".join(both.values()) + "\n"),
    ):
        as_query, as_passage = read(tmp_path / name, content, QUERIES), read(tmp_path / name, content)
        assert [(as_query[0].id, as_query[0].text)] == [("q1", "find boats")]
        assert [(as_passage[0].id, as_passage[0].text)] == [("p1", "a boat")]
    assert read_queries(write(tmp_path / "q.jsonl", jsonl({"_id": 5, "text": "five"}, {"_id": "x", "text": ""}))) == {
        "5": "five",
        "x": "",
    }


def test_named_fields(tmp_path):
    names = {"id": "key", "title": "head", "text": "context"}
    record = {"id": "other", "key": "k1", "head": "A title", "context": "the text", "text": "more"}
    wanted = {"id": "other", "text": "more", "title": "A title"}
    for name, content in (
        ("a.jsonl", jsonl({"key": "k0", "context": "one"}, record)),
        ("a.tsv", "\t".join(record) + "\nx\tk0\t\tone\t\n" + "\t".join(record.values()) + "\n"),
        ("a.csv", ",".join(record) + "\nx,k0,,one,\n" + ",".join(record.values()) + "\n"),
    ):
        first, last = read(tmp_path / name, content, **names)
        assert first.text == "one" and not first.title
        assert (last.id, last.text, last.title, last.metadata) == ("k1", "A title the text", "A title", wanted)
    only = read(tmp_path / "b.jsonl", jsonl({"id": 1, "title": "the text"}), text="title")
    assert only == [Document(1, "1", "the text", None)]


MISTAKES = [
    ("a.tsv", "a\tb\nc\n", {}, r":2: found 1 column\(s\), expected 2 \(id, text\), separated by tabs"),
    ("a.tsv", "a\tb\tc\n", {}, r":1: found 3 column\(s\), expected 2 .*, a header line with their names"),
    ("a.csv", "a,b\nc,d,e\n", {}, r":2: found 3 column\(s\), expected 2 \(id, text\), separated by commas"),
    ("a.csv", "key;text\n", {}, r":1: found 1 column"),
    ("a.tsv", "id\ttext\na\tb\tc\n", {}, r":2: found 3 column\(s\), expected 2 \(as the header says: 'id', 'text'\)"),
    ("a.csv", "id,text\na\n", {}, r":2: found 1 column\(s\), expected 2 \(as the header says"),
    ("a.csv", "id,text,text\n", {}, r":1: two columns are called 'text'"),
    (
        "a.tsv",
        "id\tsentence\n",
        {},
        r":1: no field has a usual name of texts .* 'id', 'sentence'\).*--text_field",
    ),
    ("a.tsv", "a\tb\n", {"text": "body"}, r":1: no field 'body' \(it has 'a', 'b'\): give --text_field another"),
    ("a.csv", "id,text\n", {"title": "head"}, r":1: no field 'head'.*--title_field"),
    ("a.csv", 'id,text\n1,"a"b\n', {}, r":2: not CSV \(.*: close each quote"),
    ("a.csv", 'id,text\n1,a\n2,"never closed\n3,c\n', {}, r":3: not CSV \(unexpected end of data\)"),
    ("a.csv", "id,text\n1,a\nb c,d\n", {}, r":3: id 'b c' is empty or has white space"),
    ("a.csv", b"id,text\n1,a\n2,caf\xe9\n", {}, r":3: byte 0xe9 at column 6 is not UTF-8"),
    ("a.jsonl", b'{"id": 1, "text": "caf\xe9"}\n', {}, r":1: byte 0xe9"),
    ("a.jsonl", '{"id": 1, "text": "a"}\n{"id": 2, "text": "b"\n', {}, r":2: not JSON \(.*: give one object a line"),
    ("a.json", '[\n{"id": 1, "text": "a"}]\n', {}, r":1: not JSON"),
    ("a.json", '[{"id": 1, "text": "a"}]\n', {}, r":1: JSON, but not an object .*: give one object a line"),
    ("a.jsonl", '"a"\n', {}, r":1: JSON, but not an object"),
    ("a.jsonl", "[" * 100_000, {}, r":1: not JSON"),
    ("a.jsonl", jsonl({"text": "a", "title": "b"}), {}, r":1: no field has a usual name of ids .*--id_field"),
    ("a.jsonl", jsonl({"id": 1, "title": "b"}), {}, r":1: no field has a usual name of texts .*--text_field"),
    ("a.jsonl", jsonl({"id": 1, "text": "a"}, {"id": 2}), {}, r":2: 'text' is missing or null, not a text"),
    ("a.jsonl", jsonl({"id": 1, "text": None}), {}, r":1: 'text' is missing or null"),
    ("a.jsonl", jsonl({"id": 1, "text": 5}), {}, r":1: 'text' is 5, not a text: give a string"),
    ("a.jsonl", jsonl({"id": 1, "text": "a", "title": ["b"]}), {}, r""":1: 'title' is \["b"\], not a text"""),
    ("a.jsonl", jsonl({"id": 1, "text": "a"}, {"text": "b"}), {}, r":2: 'id' is missing or null, not an id"),
    ("a.jsonl", jsonl({"id": True, "text": "a"}), {}, r":1: 'id' is true, not an id"),
    ("a.jsonl", jsonl({"id": 1.0, "text": "a"}), {}, r":1: 'id' is 1.0, not an id: give a string or a whole number"),
    ("a.jsonl", jsonl({"id": "a b", "text": "a"}), {}, r":1: id 'a b' is empty or has white space"),
    ("a.jsonl", jsonl({"id": "a\0b", "text": "a"}), {}, r":1: id .* control character"),
    ("a.jsonl", jsonl({"id": "a", "text": "x\ud800y"}), {}, r":1: half of a surrogate pair"),
    ("a.jsonl", jsonl({"id": "a", "text": "x", "more": {"y": "\udfff"}}), {}, r":1: half of a surrogate pair"),
    ("a.jsonl", jsonl({"id": "a", "text": "x", "more": float("nan")}), {}, r":1: not JSON \(NaN is no number"),
    ("a.jsonl", '{"id": "a", "text": "x", "more": [1e999]}\n', {}, r":1: not JSON \(1e999 is no number"),
    ("a.jsonl", jsonl({"id": "a", "text": "x"}), {"title": "head"}, r"a\.jsonl: no object has a field 'head'"),
    ("a.jsonl", jsonl({"id": "a", "text": "x"}), {"text": "t"}, r":1: no field 't' \(it has 'id', 'text'\)"),
    ("a.jsonl", jsonl({"id": "a", "text": "x"}), {"text": "id", "id": "id"}, r"'id', 'id': name a field of its own"),
]


@pytest.mark.parametrize("name, content, fields, message", MISTAKES)
def test_errors_name_the_line(tmp_path, name, content, fields, message):
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path / name, content, **fields)
    assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.csv.gz", "a.jsonl.gz"])
def test_byte_order_marks_broken_gzip_and_no_file(tmp_path, name):
    text = "id,text\nq1,one\n" if "csv" in name else jsonl({"id": "q1", "text": "one"})
    assert [document.id for document in read(tmp_path / name, b"\xef\xbb\xbf" + text.encode())] == ["q1"]
    with pytest.raises(InputError, match=r":1: UTF-16 .*convert the file to UTF-8"):
        read(tmp_path / name, text.encode("utf-16"))
    with pytest.raises(InputError, match=r"no such file \(collection: pid, passage\)"):
        list(read_documents(tmp_path / f"none{name}", COLLECTION))
    if name.endswith(".gz"):
        whole = gzip.compress(text.encode() * 1000)
        (tmp_path / name).write_bytes(whole[:-20])
        with pytest.raises(InputError, match="broken gzip file"):
            list(read_documents(tmp_path / name, COLLECTION))


def test_read_queries(tmp_path):
    path = write(tmp_path / "q.tsv", "9\tnine\nx\t\n1\tone  two\n")
    assert list(read_queries(path).items()) == [("9", "nine"), ("x", ""), ("1", "one  two")]
    path = write(tmp_path / "q.csv", 'qid,query\na,"x\ny"\nb,y\na,z\n')
    with pytest.raises(InputError, match=r"q\.csv:5: qid 'a' a second time"):
        read_queries(path)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.jsonl.gz"])
def test_a_stream(tmp_path, name, monkeypatch):
    """No file is held in memory, and how far a reader has come is told in bytes on disk."""
    monkeypatch.setattr(tsv, "TOLD", 10)
    generator = random.Random(0)
    texts = ((i, f"{generator.getrandbits(30_000):x}") for i in range(1000))
    if "csv" in name:
        content = "id,text\n" + "".join(f"{i},{text}\n" for i, text in texts)
    else:
        content = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in texts)
    path, told = write(tmp_path / name, content), []
    tracemalloc.start()
    assert sum(1 for _ in read_documents(path, COLLECTION, tell=told.append)) == 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(content) / 10
    assert len(told) >= 100 and told == sorted(told) and told[-1] == path.stat().st_size


# ------------------------------------------------------------------------------------------------------------ parquet


def test_parquet_wants_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"a\.parquet: \.parquet is read by pyarrow: pip install pyarrow"):
        read(tmp_path / "a.parquet", b"PAR1")


def test_parquet(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow, which reads .parquet, is not installed")
    table = __import__("pyarrow").Table.from_pylist
    monkeypatch.setattr("nanocolbert.storage.documents.ROWS", 2)
    rows = [
        {"id": 1, "title": "Boats", "text": "sail", "year": 2020, "price": 1.5, "day": datetime.date(2020, 1, 2)},
        {"id": 2, "title": None, "text": "é", "year": None, "price": float("nan"), "day": None},
        {"id": 3, "title": "", "text": "", "year": -1, "price": 0.0, "day": None},
    ]
    path, told = tmp_path / "a.parquet", []
    parquet.write_table(table(rows), path)
    assert list(read_documents(path, COLLECTION, tell=told.append)) == [
        Document(1, "1", "Boats sail", {"year": 2020, "price": 1.5, "day": "2020-01-02", "title": "Boats"}, "Boats"),
        Document(2, "2", "é", {"year": None, "price": None, "day": None}),
        Document(3, "3", "", {"year": -1, "price": 0.0, "day": None}),
    ]
    assert told[-1] == path.stat().st_size and len(told) == 2
    named = read_documents(path, COLLECTION, Fields(id="year", text="title"))
    with pytest.raises(InputError, match=r"a\.parquet:2: 'year' is missing or null, not an id"):
        list(named)
    nested = {"id": "a", "text": "b", "more": {"x": [decimal.Decimal("1.50"), None]}, "metadata": {"y": 1}}
    parquet.write_table(table([nested]), tmp_path / "nested.parquet")
    found = list(read_documents(tmp_path / "nested.parquet", COLLECTION))
    assert found == [Document(1, "a", "b", {"more": {"x": [1.5, None]}, "y": 1})]
    (tmp_path / "cut.parquet").write_bytes(path.read_bytes()[:-20])
    write(tmp_path / "none.parquet", "id,text\n")
    parquet.write_table(table([{"id": "a", "text": "b", "image": b"x"}]), tmp_path / "b.parquet")
    for name, message in (
        ("cut.parquet", "cut.parquet: not a whole parquet file"),
        ("none.parquet", "none.parquet: not a whole parquet file"),
        ("b.parquet", "b.parquet:1: 'image' holds bytes, which JSON has not"),
    ):
        with pytest.raises(InputError, match=message):
            list(read_documents(tmp_path / name, COLLECTION))


# -------------------------------------------------------------------------------------------------------------- cutting
