"""Texts of passages: written in blocks, read by row, linked from folder to folder."""

import random

import numpy as np
import pytest

from nanocolbert.cli import InputError
from nanocolbert.storage.texts import FOLDER, Texts, TextWriter, link_texts, metadata_of, texts_of


def write(folder, texts, metadata=None, size: int = 7) -> None:
    writer = TextWriter(folder / FOLDER)
    for first in range(0, len(texts), size):
        writer.append(texts[first : first + size], metadata and metadata[first : first + size])
    writer.close()


def test_texts_by_row(tmp_path):
    rng = random.Random(0)
    texts = ["".join(rng.choices("aé \t\n\0😀", k=rng.randint(0, 9))) for _ in range(40)]
    metadata = [None if rng.random() < 0.5 else {"n": i} for i in range(40)]
    write(tmp_path, texts, metadata)
    found, rows = Texts.of(tmp_path, 40), np.array(rng.choices(range(40), k=60))
    assert texts_of(found, rows) == [texts[row] for row in rows]
    assert metadata_of(found, rows) == [metadata[row] for row in rows]
    (tmp_path / "other").mkdir()
    assert link_texts(tmp_path, tmp_path / "other", 40)
    assert texts_of(Texts.of(tmp_path / "other", 40), rows) == [texts[row] for row in rows]


def test_where_none_are_kept(tmp_path):
    assert Texts.of(tmp_path, 3) is None and not link_texts(tmp_path, tmp_path / "nowhere", 3)
    assert texts_of(None, np.arange(2)) == metadata_of(None, np.arange(2)) == [None, None]


def test_texts_that_do_not_fit_are_refused(tmp_path):
    write(tmp_path, ["é", "b"])
    with pytest.raises(InputError, match="2 texts of 3 passages"):
        Texts.of(tmp_path, 3)[0]
    values = tmp_path / FOLDER / "values.npy"
    values.write_bytes(values.read_bytes()[:-3] + b"\xff\xffb")
    with pytest.raises(InputError, match="text 0 is not UTF-8"):
        Texts.of(tmp_path, 2)[0]
