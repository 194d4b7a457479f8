"""Ragged arrays and ids: what was appended comes back, by every way of reading it."""

import numpy as np
import pytest

from nanocolbert.cli import InputError
from nanocolbert.storage.ragged import (
    Ids,
    IdWriter,
    NpyWriter,
    Ragged,
    RaggedWriter,
    allocate_npy,
    length_batches,
    neighbours,
    ranges,
)

ROWS = [[1, 2, 3], [], [4], [], [], [5, 6], [7, 8, 9, 10], []]


@pytest.fixture
def ragged(tmp_path):
    writer = RaggedWriter(tmp_path / "r", np.uint16)
    for rows in (ROWS[:2], [], ROWS[2:5], ROWS[5:]):
        lengths = np.array([len(row) for row in rows], np.int64)
        writer.append(np.array([value for row in rows for value in row], np.int64), lengths)
    assert len(writer) == len(ROWS)
    writer.close()
    return Ragged(tmp_path / "r")


def test_round_trip(ragged, tmp_path):
    assert len(ragged) == len(ROWS)
    assert [ragged[i].tolist() for i in range(len(ROWS))] == ROWS
    values, offsets = np.load(tmp_path / "r/values.npy"), np.load(tmp_path / "r/offsets.npy")
    assert values.dtype == np.uint16 and values.tolist() == [*range(1, 11)]
    assert offsets.dtype == np.int64 and offsets.tolist() == [0, 3, 3, 4, 4, 4, 6, 10, 10]


@pytest.mark.parametrize("rows", [[0], [1], [6, 0, 2], [1, 3, 5, 5, 7], [7, 6, 5, 4, 3, 2, 1, 0], []])
def test_gather_equals_one_row_at_a_time(ragged, rows):
    values, lengths = ragged.gather(np.array(rows, np.int64))
    assert values.tolist() == [value for row in rows for value in ROWS[row]]
    assert lengths.tolist() == ragged.lengths(np.array(rows, np.int64)).tolist() == [len(ROWS[row]) for row in rows]


@pytest.mark.parametrize("start, stop", [(0, 8), (0, 1), (1, 2), (2, 6), (4, 4), (7, 8)])
def test_slice_equals_one_row_at_a_time(ragged, start, stop):
    values, lengths = ragged.slice(start, stop)
    assert values.tolist() == [value for row in ROWS[start:stop] for value in row]
    assert lengths.tolist() == [len(row) for row in ROWS[start:stop]]


def test_rows_of_vectors(tmp_path):
    vectors = np.arange(20, dtype=np.float32).reshape(5, 4)
    writer = RaggedWriter(tmp_path, np.float16, (4,))
    writer.append(vectors[:2], np.array([2, 0]))
    writer.append(vectors[2:], np.array([3]))
    writer.close()
    ragged = Ragged(tmp_path)
    assert ragged.values.dtype == np.float16 and np.array_equal(ragged[2], vectors[2:])
    assert np.array_equal(ragged.gather(np.array([2, 1, 0]))[0], vectors[[2, 3, 4, 0, 1]])


def test_empty_array(tmp_path):
    RaggedWriter(tmp_path, np.uint16).close()
    with pytest.raises(AssertionError):  # not before it is closed does the length stand in the file
        writer = RaggedWriter(tmp_path / "x", np.uint16)
        writer.append(np.zeros(3), np.array([2]))
    assert len(np.load(tmp_path / "values.npy")) == 0 and np.load(tmp_path / "offsets.npy").tolist() == [0]


def test_cut_file_is_refused(ragged, tmp_path):
    np.save(tmp_path / "r/values.npy", np.zeros(9, np.uint16))
    with pytest.raises(InputError, match="not the offsets of 9 values"):
        Ragged(tmp_path / "r")


def test_npy_header_has_room_for_any_length(tmp_path):
    writer = NpyWriter(tmp_path / "a.npy", np.int8, (1,))
    for size in (0, 1, 9, 90, 12345):
        writer.append(np.full((size, 1), 7))
    writer.close()
    assert np.load(tmp_path / "a.npy").shape == (12445, 1)
    allocate_npy(tmp_path / "b.npy", np.float16, (3, 2))
    assert np.load(tmp_path / "b.npy").tolist() == [[0, 0]] * 3


def test_ranges():
    starts, lengths = np.array([5, 0, 9, 2]), np.array([3, 0, 1, 2])
    assert ranges(starts, lengths).tolist() == [5, 6, 7, 9, 2, 3]


def write_ids(path, ids, block=3):
    writer = IdWriter(path)
    for start in range(0, len(ids), block):
        writer.append(ids[start : start + block])
    writer.close()
    return Ids(path)


@pytest.mark.parametrize(
    "ids, kind",
    [
        (["7", "0", "42", "999999999999999999", "3"], "i"),
        (["d1", "d10", "d2", "a", "zz"], "S"),
        (["7", "007", "07"], "S"),  # three ids, not one
        (["1", "2", "x", "10"], "S"),
        (["-1", "+1", "1", "1.0", "1_0"], "S"),
        (["10000000000000000000", "9223372036854775808", "1"], "S"),  # past int64
        (["é", "e", "日本", "١", "²"], "S"),  # other digits are no numbers here
        (["5"], "i"),
        ([], "i"),
    ],
)
def test_ids_both_ways(tmp_path, ids, kind):
    stored = write_ids(tmp_path / "ids.npy", ids)
    assert len(stored) == len(ids) and np.load(tmp_path / "ids.npy").dtype.kind == kind
    assert [path.name for path in tmp_path.iterdir()] == ["ids.npy"]
    assert stored.text(np.arange(len(ids))) == ids and stored.text(np.arange(len(ids))[::-1]) == ids[::-1]
    assert stored.rows(ids[::-1]).tolist() == list(range(len(ids)))[::-1]
    unknown = ["nope", "8", "00", "0007", "", "-5", "d", "d11", "99999999999999999999", "é日", "a much longer id"]
    unknown += [f"{identifier}\0" for identifier in ids] + ["\ud800"]
    assert stored.rows(unknown).tolist() == [-1] * len(unknown)
    assert stored.rows([]).tolist() == [] and stored.duplicate() is None


def test_a_late_word_among_many_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("nanocolbert.storage.ragged.BLOCK", 16)  # several blocks when the ids are written
    ids = [*map(str, range(500)), "x", *map(str, range(500, 700))]
    stored = write_ids(tmp_path / "ids.npy", ids, block=64)
    assert stored.text(np.arange(len(ids))) == ids and stored.rows(["x", "500", "0"]).tolist() == [500, 501, 0]


@pytest.mark.parametrize(
    "ids, expected",
    [
        (["5", "3", "9", "3", "5"], ("3", 1, 3)),  # "3" is repeated before "5" is
        (["b", "a", "a", "b", "a"], ("a", 1, 2)),
        (["1", "01", "x", "01"], ("01", 1, 3)),
        (["ü", "u", "ü"], ("ü", 0, 2)),
    ],
)
def test_duplicates(tmp_path, ids, expected):
    assert write_ids(tmp_path / "ids.npy", ids).duplicate() == expected


def test_neighbours_hold_every_row_once():
    for lengths in ([], [5], [0, 0], [7, 1, 1, 9, 30, 2, 0, 4], [3] * 50):
        slices = neighbours(np.array(lengths, np.int64), 10)
        assert [row for part in slices for row in range(part.start, part.stop)] == list(range(len(lengths)))
        for part in slices:
            assert part.stop > part.start and sum(lengths[part][:-1]) < 20
        assert len(slices) <= 1 + sum(lengths) // 10


def test_length_batches():
    lengths = np.array([5, 180, 7, 7, 3, 60, 5])
    batches = length_batches(lengths, 20)
    assert sorted(np.concatenate(batches).tolist()) == list(range(7))
    assert [lengths[batch].tolist() for batch in batches] == [[180], [60], [7, 7], [5, 5, 3]]
