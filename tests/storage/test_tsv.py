"""Tab-separated files: plain lines, and errors that name the file and the line."""

import gzip
import random

import pytest

from nanocolbert.cli import InputError
from nanocolbert.storage import tsv
from nanocolbert.storage.tsv import check_id, read_rows


def write(path, content: bytes):
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz"])
def test_lines_are_no_csv(tmp_path, name):
    path = write(tmp_path / name, 'a\t"quoted\nb\tx\x0by\u2028z\x85\n\u00e9\tcrlf\r\nd\t\ne\tend'.encode())
    assert list(read_rows(path, "pid, passage", "collection")) == [
        (1, ["a", '"quoted']),
        (2, ["b", "x\x0by\u2028z\x85"]),  # only \n ends a line
        (3, ["é", "crlf"]),
        (4, ["d", ""]),
        (5, ["e", "end"]),
    ]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"a\tb\nc\n", r"a\.tsv:2: found 1 column.*expected 2 \(id, text\)"),
        (b"a\tb\n\nc\td\n", r"a\.tsv:2: found 1 column"),
        (b"a\tb\tc\n", r"a\.tsv:1: found 3 column"),
        (b"a\tb\nc\tx\xe9y\n", r"a\.tsv:2: byte 0xe9 at column 4 is not UTF-8"),
        (b"a\tb\n\tx\n", r"a\.tsv:2: id '' is empty"),
        (b"a b\tx\n", r"a\.tsv:1: id 'a b' is empty or has white space"),
        (b" a\tx\n", r"a\.tsv:1: id ' a'"),
        ("a\u00a0b\tx\n".encode(), r"a\.tsv:1: id .* white space"),
        (b"5\0\tx\n", r"a\.tsv:1: id '5\\x00' has a control character"),
        (b"a\tb\nc\x1bd\tx\n", r"a\.tsv:2: id 'c\\x1bd' has a control"),
        ("a\tb\n".encode("utf-16"), r"a\.tsv:1: UTF-16 .*convert the file to UTF-8"),
        (b"a" * 257 + b"\tx\n", r"a\.tsv:1: id of 257 bytes, at most 256"),
    ],
)
def test_errors_name_the_line(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        for number, (identifier, _) in read_rows(write(tmp_path / "a.tsv", content), "id, text", "collection"):
            check_id(tmp_path / "a.tsv", number, identifier)


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz"])
def test_a_byte_order_mark_is_no_part_of_an_id(tmp_path, name):
    path = write(tmp_path / name, b"\xef\xbb\xbfq1\tone\nid\ttwo\n")
    assert list(read_rows(path, "id, text", "collection")) == [(1, ["q1", "one"]), (2, ["id", "two"])]


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(InputError, match=r"none\.tsv: no such file \(collection\)"):
        list(read_rows(tmp_path / "none.tsv", "a, b", "collection"))
    whole = gzip.compress(b"a\tb\n" * 1000)
    for name, content in (("cut.gz", whole[:-20]), ("not.gz", b"a\tb\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}: broken gzip file .*fetch it again"):
            list(read_rows(tmp_path / name, "a, b", "collection"))


def test_damaged_gzip_is_an_input_error(tmp_path):
    whole = gzip.compress(b"".join(b"%d\tb%d\n" % (i, i * i) for i in range(5000)))
    for start in range(20, len(whole) - 60, len(whole) // 20):  # some break the stream, some only the text
        damaged = whole[:start] + random.Random(start).randbytes(40) + whole[start + 40 :]
        (tmp_path / "bits.gz").write_bytes(damaged)
        with pytest.raises(InputError):
            list(read_rows(tmp_path / "bits.gz", "a, b", "collection"))


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz"])
def test_how_far_a_reader_has_come(tmp_path, name, monkeypatch):
    """In bytes on disk: of a .gz too, whose size unpacked nobody knows."""
    monkeypatch.setattr(tsv, "TOLD", 10)
    generator = random.Random(0)
    path = write(tmp_path / name, b"".join(b"%d\t%x\n" % (i, generator.getrandbits(9999)) for i in range(1000)))
    told, size = [], path.stat().st_size
    assert len(list(read_rows(path, "pid, passage", "collection", told.append))) == 1000
    assert len(told) == 101 and told == sorted(told) and told[-1] == size
    assert all(abs(n - size * (i + 1) / 100) < 0.2 * size for i, n in enumerate(told[:-1]))
