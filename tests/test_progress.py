"""Without a terminal: a plain line now and then; nothing of what is done at once."""

import itertools
import time

import pytest

from nanocolbert import progress


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(progress, "FIRST", 0.05)
    monkeypatch.setattr(progress, "EVERY", 0.1)


def slowly(items, seconds=0.02):
    for item in items:
        time.sleep(seconds)
        yield item


def test_lines(soon, capsys):
    assert list(progress.progress(slowly(range(20)), total=20, desc="add", unit=" blocks")) == list(range(20))
    lines = capsys.readouterr().err.splitlines()
    assert 2 < len(lines) < 12 and len(set(lines)) == len(lines)
    assert all(line.startswith("add: ") and " of 20 blocks, " in line and " left" in line for line in lines)
    assert lines[-1].startswith("add: 20 of 20 blocks") and "\r" not in "".join(lines)


def test_a_length_that_nobody_knows(soon, capsys):
    list(progress.progress(slowly(range(20)), desc="c.tsv", unit=" texts"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("c.tsv: 20 texts, ") and "left" not in lines[-1]


def test_no_line_counts_more_than_there_was(soon, monkeypatch):
    """Also where the first items take longest, so that tqdm looks at the clock more often than lines are printed."""
    given, counts = [], []
    monkeypatch.setattr(progress, "EVERY", 0.5)
    monkeypatch.setattr("builtins.print", lambda bar, **_: counts.append((bar.n, len(given))))
    for i in progress.progress(itertools.chain(slowly(range(10)), slowly(range(1000), 0.001))):
        given.append(i)
    assert len(counts) > 2 and all(n <= was + 1 for n, was in counts), counts


def test_what_is_soon_done_says_nothing(capsys):
    assert list(progress.progress([1, 2, 3])) == [1, 2, 3]
    bar = progress.progress(total=5)
    bar.update(5)
    bar.close()
    assert list(progress.progress(slowly([1]), show=False)) == [1]
    assert capsys.readouterr().err == ""


def test_a_line_can_be_asked_for(capsys):
    bar = progress.progress(total=50, desc="train", unit=" steps")
    bar.update()
    bar.set_postfix(loss="0.5")
    bar.refresh()  # nothing new
    bar.close()
    line = capsys.readouterr().err
    assert line.startswith("train: 1 of 50 steps, ") and line.endswith("loss=0.5\n") and line.count("\n") == 1
