"""What every stage's command line has in common: its number types, its errors in one line, and how a signal ends it.

Quick to import: a wrong flag is answered before torch is loaded.
"""

import argparse
import contextlib
import errno
import json
import math
import os
import re
import signal
import sys
import threading
import time

if sys.platform == "win32":
    sys.exit("nanoColBERT runs on Linux and macOS; on Windows, in WSL")

GRACE = 3.0  # seconds that a process which was told to end may take to clean up
ECHO = 1.0  # seconds in which a launcher of several processes passes on the Ctrl-C that they have heard themselves


class InputError(Exception):
    """A mistake of the user's. Its message says where, what was found and what to do; `run_stage` exits with 2."""


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line; its type, where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# ------------------------------------------------------------------------------------------------------- number types


def _number(kind: type, least, what: str, above: bool = False, most=math.inf):
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if math.isfinite(value) and (value > least if above else value >= least) and value <= most:
            return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")

    return parse


positive = _number(int, 1, "a whole number above 0", most=(1 << 63) - 1)
count = _number(int, 0, "a whole number, 0 or above", most=(1 << 63) - 1)
seed = _number(int, 0, "a whole number from 0 to 2^32 - 1", most=(1 << 32) - 1)
positive_float = _number(float, 0, "a number above 0", above=True)
not_negative_float = _number(float, 0, "a number, 0 or above")
share = _number(float, 0, "a number from 0 to 1", most=1)


def rate(text: str) -> float:
    """A dropout rate."""
    value = share(text)
    if value == 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to below 1")
    return value


def maxlen(text: str) -> int:
    """Tokens of a text: [CLS], the marker, one word piece and [SEP] at least."""
    value = positive(text)
    if value < 4:
        raise argparse.ArgumentTypeError(f"{text!r} tokens leave no room for a word piece: give at least 4")
    return value


def shard(text: str) -> tuple[int, int]:
    """Which of how many parts: (i, n) of "i/n", i from 1 on."""
    found = re.fullmatch(r"([1-9][0-9]{0,8})/([1-9][0-9]{0,8})", text)
    if not found or int(found[1]) > int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not i/n, the i-th of n, as 1/8 ... 8/8")
    return int(found[1]), int(found[2])


def word(text: str) -> str:
    """A name that a column of a run file can hold."""
    if text.split() != [text] or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} is not one word, without white space")
    return text


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ------------------------------------------------------------------------------------------------------------ signals

_requests: list[int] = []  # signals that a stage which stops softly has been sent
_is_soft = False
_held: list[int] | None = None  # signals that have come while `held`


@contextlib.contextmanager
def held():
    """Clean up without being interrupted: a signal's SystemExit is raised when the block has ended."""
    global _held
    if _held is not None:  # within another
        yield
        return
    _held = heard = []
    try:
        yield
    finally:
        _held = None
        if heard:
            raise SystemExit(128 + heard[0])


def stop_softly() -> list[int]:
    """From now on the first Ctrl-C and the first SIGTERM are only put into this list: the stage is to look at it."""
    global _is_soft
    _is_soft = True
    return _requests


def catch_signals() -> None:
    """From now on Ctrl-C and SIGTERM end the process in one line, with exit code 130 or 143.

    SystemExit is raised, so that what is half done is removed. What does not end within GRACE, as a loop in C that
    hears nothing, is cut off by a thread: files are safe from kill -9 too.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    said, handled = threading.Lock(), {}

    def say_why(number: int) -> None:
        if said.acquire(blocking=False):  # os.write: what the main thread was printing may be half done
            os.write(2, f"{name()}: ended by {signal.Signals(number).name}\n".encode())

    def is_last(number: int, heard: dict[int, float]) -> bool:  # heard: when each first came
        echo = ECHO if int(os.environ.get("WORLD_SIZE", 1)) > 1 else 0
        return not _is_soft or time.monotonic() - heard.setdefault(number, time.monotonic()) > echo

    def handle(number, _) -> None:  # by the main thread, when it is back from C
        if is_last(number, handled):
            say_why(number)
            if _held is None:
                raise SystemExit(128 + number)
            _held.append(number)
        elif number not in _requests:
            _requests.append(number)

    def watch() -> None:  # at once
        heard = {}
        while (number := os.read(reader, 1)[0]) not in (signal.SIGINT, signal.SIGTERM) or not is_last(number, heard):
            pass
        say_why(number)
        time.sleep(GRACE)
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    threading.Thread(target=watch, daemon=True).start()
    masks = []  # of the threads that fork

    def forget() -> None:  # in the child: what ends it would be heard by its parent
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, masks.pop())

    os.register_at_fork(
        before=lambda: masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, masks.pop()),
        after_in_child=forget,
    )


# -------------------------------------------------------------------------------------------------------- run a stage


def name() -> str:
    """What the script is called."""
    return os.path.basename(sys.argv[0])


def say(line: str) -> None:
    """One line on stderr, after the name of the script."""
    print(f"{name()}: {line}", file=sys.stderr, flush=True)


def start(parse_args) -> argparse.Namespace:
    """What a stage begins with: its arguments, once signals are answered."""
    catch_signals()
    return parse_args()


def check_launch() -> None:
    """Raise InputError in the one process that `accelerate launch` starts where several were asked for on a CPU."""
    sizes = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    if {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= set(os.environ) and not any(size in os.environ for size in sizes):
        raise InputError(
            "launched as one process, where several were asked for: on CPUs, too, it is "
            f"accelerate launch --multi_gpu --num_processes N {name()} ... --cpu (--cpu after the script, not before)"
        )


def run_stage(main, args) -> None:
    """Run `main(args)` and print its result as one line of JSON; what can be mended ends in one line, exit code 2."""
    try:
        result = main(args)
    except InputError as error:
        fail(str(error))
    except MemoryError as error:
        fail(f"out of memory{f' ({error})' if str(error) else ''}: give smaller batches or parts, or free some")
    except OSError as error:
        fail(os_message(error))
    finish(result)


def os_message(error: OSError) -> str:
    """What the system refused, on which file, and what to do."""
    remedies = {
        errno.ENOSPC: "free some space, then run this again",
        errno.EDQUOT: "free some space, then run this again",
        errno.EROFS: "give a place that can be written to",
        errno.EACCES: "change its permissions, or give another place",
        errno.EPERM: "change its permissions, or give another place",
        errno.ENOENT: "it is gone, or never was: make it again",
        errno.EMFILE: "raise the limit (ulimit -n)",
        errno.EPIPE: "what was to read it has ended: run this again",
    }
    where = f"{error.filename}: " if error.filename is not None else ""
    remedy = remedies.get(error.errno, "look at the disk, then run this again")
    return f"{where}{error.strerror or error}: {remedy}"


def fail(message: str) -> None:
    """End in one line, with exit code 2; a process that is one of several at once, lest the others wait for it."""
    say("error: " + " ".join(message.split("\n")))
    end(2)


def finish(result: dict | None) -> None:
    """Print a stage's result as one line of JSON; a process that is one of several ends here, at once.

    The work is done by then: where nobody reads any more, as behind `| head -1`, that is no error.
    Torn down object by object, gloo's threads in one process may wait for ever for another that has gone.
    """
    try:
        if result is not None:
            print(json.dumps(result), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer goes there
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        end(0)


def end(code: int) -> None:
    """End this process; one of several at once, as `finish` and `fail` do."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
