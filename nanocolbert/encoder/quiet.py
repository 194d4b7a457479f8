"""transformers' bars and warnings, silenced while a model is read or written: what is to be said, its caller says."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

_lock = threading.Lock()
_blocks, _before = 0, ()  # how many are open, of all threads, and what the first one found


@contextmanager
def quietly() -> Iterator[None]:
    """No bars and warnings of transformers until the block ends, of any thread's; then they are as they were.

    The switch itself is set, not disable_progress_bar(): that also turns off the hub's bars, for good.
    """
    global _blocks, _before
    with _lock:
        if not _blocks:
            _before = logging.get_verbosity(), logging._tqdm_active
            logging.set_verbosity_error()
            logging._tqdm_active = False
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if not _blocks:
                logging.set_verbosity(_before[0])
                logging._tqdm_active = _before[1]
