"""How a stage shows that it lives: a bar on a terminal; elsewhere (nohup, CI, a log) a plain line now and then."""

import io
import sys
import time

from tqdm import tqdm

FIRST, EVERY = 5, 30  # seconds until the first line, and between two


class Lines(tqdm):
    """tqdm in plain lines: how much of how much, rate and time left; nothing where all is done in FIRST seconds."""

    def __init__(self, iterable=None, **settings):
        total, left = ("{n_fmt} of {total_fmt}", ", {remaining} left") if settings.get("total") else ("{n_fmt}", "")
        name, unit = (settings.get(key, "") for key in ("desc", "unit"))
        settings["bar_format"] = f"{name}{': ' if name else ''}{total}{unit}, {{rate_fmt}}{left}{{postfix}}"
        self.shown, self.due = None, 0.0  # what the last line said, and when the next one is due
        super().__init__(iterable, file=io.StringIO(), delay=FIRST, mininterval=FIRST, maxinterval=EVERY, **settings)

    def display(self, *_, **__):
        """Print the line, unless it would say the same again, or is not due; the last one always is.

        mininterval stays as it was: tqdm's loop keeps a copy, and would count twice where the two differ.
        """
        if self.n != self.shown and (self.disable or time.monotonic() >= self.due):  # close() disables the bar first
            print(self, file=sys.stderr, flush=True)
            self.shown, self.due = self.n, time.monotonic() + EVERY


def progress(iterable=None, show: bool = True, **settings) -> tqdm:
    """`tqdm(iterable, **settings)` as the place it is shown in allows; `show`: not at all if false."""
    if hasattr(iterable, "__len__"):
        settings.setdefault("total", len(iterable))
    if not show or sys.stderr.isatty():
        return tqdm(iterable, disable=not show, **settings)
    return Lines(iterable, **settings)
