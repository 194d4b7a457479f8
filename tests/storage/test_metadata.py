"""Metadata: what is written is read, conditions find rows, and a stranger's condition does nothing else."""

import functools
import random

import numpy as np
import pytest

from nanocolbert.cli import InputError
from nanocolbert.storage import metadata
from nanocolbert.storage.artifact import identity
from nanocolbert.storage.metadata import Metadata, MetadataWriter

OBJECTS = [
    {"year": 2020, "lang": "en", "Year": 3, "a'b": 1, 'q"': 2},
    None,
    {"year": 1999, "tags": ["x"]},
    {"ok": True},
]


def write(path, objects, size: int = 1000) -> Metadata:
    writer = MetadataWriter(path)
    for first in range(0, len(objects), size):
        writer.append(first, objects[first : first + size])
    writer.close()
    return Metadata(path, identity(path))


def test_what_is_written_is_read(tmp_path):
    rng = random.Random(0)
    values = [None, True, -3, 1.5, "é'\"", [1, {"x": None}], {"y": []}, 1 << 70]
    objects = [rng.choice([None, {rng.choice("abc "): rng.choice(values) for _ in range(3)}]) for _ in range(2000)]
    found = write(tmp_path / "a b?#%.sqlite", objects, 700)
    rows = np.array(rng.choices(range(2000), k=1500))
    assert found.objects(rows) == [objects[row] for row in rows]
    assert set(found.fields) == set("abc ")


def test_without_metadata_there_is_no_file(tmp_path):
    found = write(tmp_path / "m", [None, {}, None])
    assert list(tmp_path.iterdir()) == [] and found.fields == []
    assert found.objects(np.arange(3)) == [None] * 3 and not len(found.where("nonsense", ["year"]))


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("year > 2000", [0]),
        ("YEAR = 2020 AND lang = 'en'", [0]),
        ("lang IS NULL", [2, 3]),
        ("ok", [3]),
        ('"a\'b" = 1', [0]),
        ("other IS NULL -- a field of another segment", [0, 2, 3]),
        ("tags LIKE '%x%'", [2]),
        ("1) LIMIT (2", [0, 2]),  # no harm
    ],
)
def test_conditions(tmp_path, condition, rows):
    found = write(tmp_path / "m", OBJECTS)
    assert found.where(condition, [*found.fields, "other"]).tolist() == rows


def test_fields_whatever_they_are_called(tmp_path):
    names = ["a.b", "a\\b", "a\nb", "a'b", "é", "É", "row", "json", "rowid", "select", "x[0]", "\u2028"]
    found = write(tmp_path / "m", [{name: n for n, name in enumerate(names)}, {"row": -1}, {"long" * 200_000: 1}])
    for n, name in enumerate(names):
        assert found.where(f'"{name}" = {n}', found.fields).tolist() == [0], name
    assert found.where("row < 0", found.fields).tolist() == [1]
    odd = write(tmp_path / "odd", [{'"': 1}, {"": 1}])  # which no condition can name
    assert odd.where("1", odd.fields).tolist() == [0, 1]


def test_the_largest_object_can_be_filtered(tmp_path):
    largest = {"x": "é" * (metadata.LONGEST // 2 - 5)}
    found = write(tmp_path / "m", [largest])
    assert found.where("x LIKE 'éé%'", found.fields).tolist() == [0] and found.objects(np.arange(1)) == [largest]
    with pytest.raises(InputError, match="1000001 bytes: at most 1000000"):
        write(tmp_path / "more", [{"x": largest["x"] + "é"}])


@pytest.mark.parametrize(
    "condition",
    [
        "nope = 1",
        "",
        "(",
        "1; DROP TABLE passages",
        "1) UNION SELECT 5 WHERE (1",
        "EXISTS (SELECT 1)",
        "row IN (SELECT row FROM fields)",
        "1) UNION SELECT name FROM sqlite_master WHERE (1",
        "load_extension('x')",
        "writefile('x', 'y')",
        "randomblob(2000000000) > 1",
        "year = :a",
        "\0",
        "\ud800",
    ],
)
def test_what_is_no_condition_is_refused_and_changes_nothing(tmp_path, condition):
    found = write(tmp_path / "m", OBJECTS)
    before = (tmp_path / "m").read_bytes()
    with pytest.raises(InputError, match="give a condition as SQL has it") as error:
        found.where(condition, found.fields)
    assert len(str(error.value).encode(errors="replace").splitlines()) == 1 or condition == "\0"
    assert (tmp_path / "m").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_condition_has_an_end(tmp_path, monkeypatch):
    found = write(tmp_path / "m", [{"text": "a" * 900}] * 300)
    monkeypatch.setattr(metadata, "SECONDS", 0.0)
    with pytest.raises(InputError, match="takes more than 0 seconds"):
        found.where("text LIKE '%a%a%a%b'", found.fields)


DEEP = functools.reduce(lambda inner, _: {"x": inner}, range(100_000), 1)


@pytest.mark.parametrize("value", [[1], "x", {1: 2}, {"x": float("nan")}, {"x": object()}, {"x": "\ud800"}, DEEP])
def test_what_is_no_json_object_is_refused(tmp_path, value):
    with pytest.raises(InputError, match="metadata"):
        MetadataWriter(tmp_path / "m").append(0, [value])


def test_a_damaged_file_is_told(tmp_path):
    write(tmp_path / "m", OBJECTS)
    (tmp_path / "m").write_bytes((tmp_path / "m").read_bytes()[:3000])
    with pytest.raises(InputError, match="damaged"):
        Metadata(tmp_path / "m", identity(tmp_path / "m")).objects(np.array([0]))
