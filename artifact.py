"""Artifacts: the folders that stages hand to each other.

An artifact is a folder of plain arrays with a `meta.json`. It is written under a temporary name and renamed
when whole, so a folder with a `meta.json` is finished, whatever happened to the process that wrote it.
"""

import contextlib
import hashlib
import json
import os
import platform
import resource
import shutil
import sys
import time
from pathlib import Path

import numpy as np


class InputError(Exception):
    """A mistake of the user's. Its message says where, what was found and what to do; `run_stage` exits with 2."""


def run_stage(main, args) -> None:
    """Run `main(args)` and print its result as one line of JSON; an InputError ends in one line and exit code 2."""
    try:
        result = main(args)
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    finish(result)


def finish(result: dict | None) -> None:
    """Print a stage's result as one line of JSON; a process that is one of several ends here, at once.

    Torn down object by object, gloo's threads in one process may wait for ever for another that has gone.
    """
    if result is not None:
        print(json.dumps(result))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def check_file(path, what: str) -> Path:
    """The path of an existing file. Raises InputError, naming `what` it should have been."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file ({what})")
    return Path(path)


@contextlib.contextmanager
def publish(output_dir):
    """Give a temporary folder that becomes `output_dir` when the block ends without an exception.

    A folder left behind by a killed run is removed first; on an exception nothing is left.
    """
    output_dir = Path(output_dir)
    partial = output_dir.with_name(output_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if output_dir.exists():
        retired = output_dir.with_name(output_dir.name + ".retired")
        shutil.rmtree(retired, ignore_errors=True)
        output_dir.rename(retired)
        partial.rename(output_dir)
        shutil.rmtree(retired)
    else:
        partial.rename(output_dir)


def link(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write_json(path, value) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, path)


def make_meta(kind: str, fingerprint: str, started: float, args, **facts) -> dict:
    """What goes into `meta.json`: what this is, what it was made from, how, by which versions, at what cost."""
    import torch
    import transformers

    return {
        "kind": kind,
        "fingerprint": fingerprint,
        **facts,
        "args": plain_args(args),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seconds": round(time.time() - started, 2),
        "peak_memory_mb": peak_memory_mb(),
    }


def seen_from(folder, path) -> str:
    """`path` relative to `folder`, for its `meta.json`: folders that are moved together find each other."""
    return os.path.relpath(Path(path).resolve(), Path(folder).resolve())


def plain_args(args) -> dict:
    """Arguments as JSON can hold them."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}


def write_meta(folder, *args, **facts) -> dict:
    """Write `make_meta(*args, **facts)` as the folder's `meta.json`, and return it."""
    meta = make_meta(*args, **facts)
    write_json(Path(folder) / "meta.json", meta)
    return meta


def read_meta(folder, kind: str, made_by: str, *or_kind: str) -> dict:
    """The `meta.json` of a finished artifact of this kind (or of `or_kind`). Raises InputError naming a stage."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        raise InputError(f"{folder}: not a finished {kind} folder (no meta.json): run {made_by} first")
    try:
        meta = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}): remove {folder} and run {made_by} again") from None
    if meta.get("kind") not in (kind, *or_kind):
        raise InputError(f"{folder}: holds {meta.get('kind')!r}, not {kind!r}: give the folder written by {made_by}")
    return meta


def fingerprint(*parts) -> str:
    """32 hex digits over strings, numbers, bytes and the contents of files (given as Path)."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Path):
            with open(part, "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        else:
            digest.update(part if isinstance(part, bytes) else str(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def peak_memory_mb() -> int:
    """Peak resident memory in MB (10^6 bytes): of this process, or of its largest finished child if that is more."""
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return round(peak * (1024 if sys.platform != "darwin" else 1) / 1e6)
