"""The worker: who is searched for together, what each gets, and that nothing ends it."""

import threading
import time

import pytest

pytest.importorskip("fastapi", reason="serve.py's packages are optional: pip install -r requirements-serve.txt")

from toy_searcher import ToySearcher

from nanocolbert.cli import InputError
from nanocolbert.server import worker as worker_module
from nanocolbert.server.worker import Job, Overload, Worker

SETTINGS = {"k": 2, "quality": "default"}


@pytest.fixture
def searcher() -> ToySearcher:
    return ToySearcher({"1": "red apple", "2": "blue boat", "3": "red boat"})


@pytest.fixture
def worker(searcher):
    worker = Worker(searcher, most=40)
    yield worker
    searcher.go_on.set()
    worker.close(5)


def busy(worker, searcher) -> Job:
    """Keep the worker at a first search until `go_on`."""
    searcher.go_on.clear()
    first = Job("red", SETTINGS)
    worker.submit(first)
    while not searcher.encoded:
        time.sleep(0.001)
    return first


def pids(job: Job) -> list[str]:
    return [hit.pid for hit in job.future.result(10)]


def test_one_search_waits_for_nobody(worker):
    job = Job("red boat", SETTINGS)
    worker.submit(job)
    assert pids(job) == ["3", "1"] and set(job.ms) == {"wait", "encode", "search"}


def test_those_that_wait_are_encoded_together_and_searched_for_by_settings(worker, searcher):
    first = busy(worker, searcher)
    jobs = [Job("red boat", SETTINGS), Job("apple", SETTINGS | {"k": 1}), Job("blue", SETTINGS)]
    jobs += [Job("boat", SETTINGS | {"among": ["2"]}), Job("red", SETTINGS | {"among": ["2"]})]
    for job in jobs:
        worker.submit(job)
    searcher.go_on.set()
    assert [pids(job) for job in (first, *jobs)] == [["1", "3"], ["3", "1"], ["1"], ["2", "1"], ["2"], ["2"]]
    assert searcher.encoded == [["red"], ["red boat", "apple", "blue", "boat", "red"]]
    assert [n for n, _ in searcher.searched] == [1, 2, 1, 2] and worker.batches == 2 and worker.searches == 6


def test_a_batch_has_32_and_too_many_are_refused(worker, searcher):
    busy(worker, searcher)
    jobs = [Job("boat", SETTINGS) for _ in range(40)]
    for job in jobs:
        worker.submit(job)
    with pytest.raises(Overload):
        worker.submit(Job("boat", SETTINGS))
    searcher.go_on.set()
    assert all(pids(job) == ["2", "3"] for job in jobs)
    assert list(map(len, searcher.encoded)) == [1, 32, 8]


def test_an_error_is_of_its_group_alone(worker, searcher):
    busy(worker, searcher)
    wrong, right = Job("red", SETTINGS | {"where": "nothing"}), Job("red", SETTINGS)
    for job in (wrong, right):
        worker.submit(job)
    searcher.go_on.set()
    assert pids(right) == ["1", "3"] and isinstance(wrong.future.exception(10), InputError)
    exploded = Job("explode", SETTINGS)
    worker.submit(exploded)
    assert isinstance(exploded.future.exception(10), RuntimeError)
    assert worker.submit(Job(call=lambda: 3)).result(10) == 3
    with pytest.raises(ZeroDivisionError):
        worker.submit(Job(call=lambda: 1 / 0)).result(10)
    after = Job("red", SETTINGS)
    worker.submit(after)
    assert pids(after) == ["1", "3"]


def test_who_has_gone_is_not_searched_for(worker, searcher):
    busy(worker, searcher)
    gone, there = Job("boat", SETTINGS), Job("red", SETTINGS)
    for job in (gone, there):
        worker.submit(job)
    assert gone.future.cancel()
    searcher.go_on.set()
    assert pids(there) == ["1", "3"] and searcher.encoded[1] == ["red"]


def test_an_index_that_cannot_be_opened_again_is_told_once(worker, searcher, capsys, monkeypatch):
    monkeypatch.setattr(worker_module, "IDLE", 0.01)
    searcher.complaint = InputError("half of it is gone")
    for _ in range(3):
        assert len(worker.submit(Job("red", SETTINGS)).result(10)) == 2
    assert capsys.readouterr().err.count("cannot be opened: half of it is gone") == 1


def test_a_changed_index_is_looked_for_without_a_search(searcher, monkeypatch):
    monkeypatch.setattr(worker_module, "IDLE", 0.01)
    looked = threading.Event()
    monkeypatch.setattr(searcher, "reload", looked.set)
    worker = Worker(searcher)
    assert looked.wait(10)
    worker.close(5)
    assert not worker._thread.is_alive()
