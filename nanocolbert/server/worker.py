"""One thread that works through what is waiting: searches in micro-batches, other calls one by one.

The model encodes 32 queries in little more than the time of a few, so searches that wait while others are answered are
taken together. A search that comes alone waits for nobody.
"""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from nanocolbert.cli import say

TOGETHER = 32  # searches at a time
IDLE = 1.0  # seconds without work after which the index is looked at: has it changed?


class Overload(Exception):
    """As many wait as may: try again later."""


@dataclass
class Job:
    """A search, or with `call` anything else to be called; `future` gets what it gives."""

    text: str = ""
    settings: dict = field(default_factory=dict)  # of Searcher.search
    call: Callable | None = None
    future: Future = field(default_factory=Future)
    since: float = field(default_factory=time.perf_counter)
    ms: dict[str, float] = field(default_factory=dict)  # milliseconds of each step

    @property
    def group(self) -> tuple:
        """Searches of one group have the same settings."""
        return tuple((name, tuple(v) if isinstance(v, list) else v) for name, v in sorted(self.settings.items()))


class Worker:
    """Runs jobs in a thread of its own, which ends with the process."""

    def __init__(self, searcher=None, most: int = 256):
        """searcher: a Searcher, for searches. most: jobs that may wait."""
        self.searcher, self.most, self.complaint = searcher, most, ""
        self.searches = self.batches = 0  # that were done
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs that wait."""
        return self._jobs.qsize()

    def submit(self, job: Job) -> Future:
        """Put a job behind those that wait. Raises Overload if too many do."""
        if self.waiting >= self.most:
            raise Overload
        self._jobs.put(job)
        return job.future

    def close(self, seconds: float) -> None:
        """End the thread once it has done what waits, or give it up after some seconds."""
        self._jobs.put(None)
        self._thread.join(seconds)

    def _work(self) -> None:
        is_open = True
        while is_open:
            batch = self._take()
            is_open = None not in batch
            jobs = [job for job in batch if job and job.future.set_running_or_notify_cancel()]
            self._reload()
            searches = [job for job in jobs if job.call is None]
            if searches:
                self._search(searches)
            for job in jobs:
                if job.call:
                    settle([job], job.call)

    def _take(self) -> list[Job | None]:
        """What waits, TOGETHER jobs at most; after IDLE seconds without any, nothing."""
        try:
            batch = [self._jobs.get(timeout=IDLE if self.searcher else None)]
        except queue.Empty:
            return []
        while len(batch) < TOGETHER and batch[-1] and not self._jobs.empty():  # nobody else takes any
            batch.append(self._jobs.get())
        return batch

    def _reload(self) -> None:
        """Take up a changed index; where that fails, say so once and go on with the one that is open."""
        try:
            if self.searcher:
                self.searcher.reload()
            self.complaint = ""
        except Exception as error:
            if str(error) != self.complaint:
                say(f"the index has changed, but cannot be opened: {error}")
            self.complaint = str(error)

    def _search(self, jobs: list[Job]) -> None:
        """Encode all queries at once, then search for each group of equal settings."""
        self.searches, self.batches = self.searches + len(jobs), self.batches + 1
        started = time.perf_counter()
        try:
            queries = self.searcher.encode([job.text for job in jobs])  # (B, Lq, D)
        except Exception as error:
            for job in jobs:
                job.future.set_exception(error)
            return
        encoded = time.perf_counter()
        groups: dict[tuple, list[int]] = {}
        for at, job in enumerate(jobs):
            job.ms |= {"wait": 1000 * (started - job.since), "encode": 1000 * (encoded - started)}
            groups.setdefault(job.group, []).append(at)
        for ats in groups.values():
            group = [jobs[at] for at in ats]
            settle(group, lambda ats=ats, group=group: self._search_group(group, queries[ats]))

    def _search_group(self, jobs: list[Job], queries) -> list[list]:
        """The hits of each of the jobs, whose settings are the same."""
        started = time.perf_counter()
        found = self.searcher.search(queries, **jobs[0].settings)
        for job in jobs:
            job.ms["search"] = 1000 * (time.perf_counter() - started)
        return found


def settle(jobs: list[Job], call: Callable) -> None:
    """Give each job what the call gives: a list for several searches, itself for one other call; or its error."""
    try:
        results = call()
    except Exception as error:
        for job in jobs:
            job.future.set_exception(error)
        return
    for job, result in zip(jobs, [results] if jobs[0].call else results, strict=True):
        job.future.set_result(result)
