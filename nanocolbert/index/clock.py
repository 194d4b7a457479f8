"""Where the time of searches goes."""

import threading
import time
from contextlib import contextmanager


class Clock:
    """Seconds spent on each step; any number of threads may add to them."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, step: str):
        """Add what the block takes to a step."""
        started = time.perf_counter()
        yield
        with self._lock:
            self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - started
