"""Artifacts: the folders that stages hand to each other.

An artifact is a folder of plain arrays with a `meta.json`. It is written under a temporary name and renamed
when whole, so a folder with a `meta.json` is finished, whatever happened to the process that wrote it. `meta.json` says
what kind of folder it is, so that nothing else is ever replaced, and lists its files with their sizes, which every
reader checks, and their checksums, which --verify checks.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import resource
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nanocolbert.cli import InputError, first_line, held
from nanocolbert.storage.checksums import BLOCK, Spans, check_sizes, check_sums, sums_of

SUM = "checksum"  # the key of our JSON files that holds the checksum of all others


def check_file(path, what: str) -> Path:
    """The path of an existing file. Raises InputError, naming `what` it should have been."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: a folder, not a file ({what})")
    if not path.exists():
        raise InputError(f"{path}: no such file ({what})")
    return path


# ------------------------------------------------------------------------------------------------------------ outputs


def check_output_dir(output_dir, kind: str, *inputs) -> Path:
    """Where the links of output_dir lead, if it may be (re)placed: it is not there, empty, or of this kind.

    Raises InputError if it is something else, holds one of the inputs, or files that no stage wrote.
    """
    target = Path(os.path.realpath(output_dir))
    check_apart(output_dir, *inputs)
    if not target.exists():
        return target
    if not target.is_dir():
        raise InputError(f"{output_dir}: a file, not a folder: give another --output_dir")
    found = {path.name for path in target.iterdir()}
    if not found:
        return target
    try:
        meta = read_json(target / "meta.json") if "meta.json" in found else {}
    except InputError:
        meta = {}
    if meta.get("kind") != kind:
        what = f"{meta['kind']!r}" if meta.get("kind") else f"what is no {kind} folder ({min(found)})"
        raise InputError(f"{output_dir}: holds {what}: remove it, or give another --output_dir")
    if "files" in meta:
        written = {name.split("/")[0] for name in meta["files"]} | {"meta.json", *meta.get("also", ())}
        if found - written:
            raise InputError(
                f"{output_dir}: to be written anew, but {min(found - written)} in it is not a part of it: move that "
                "elsewhere, or give another --output_dir"
            )
    return target


def check_apart(output, *inputs) -> None:
    """Raise InputError if an output is, or holds, one of the inputs (None: not given)."""
    target = Path(os.path.realpath(output))
    for path in filter(None, inputs):
        real = Path(os.path.realpath(path))
        if os.path.exists(real) and target in (real, *real.parents):
            raise InputError(f"{output}: holds what is read, {path}: give another output")


def check_output_file(output, *inputs) -> Path:
    """Where the links of an output file lead, if it may be written. Raises InputError as check_output_dir."""
    target = Path(os.path.realpath(output))
    if target.is_dir():
        raise InputError(f"{output}: a folder: give a file")
    if not is_device(target):
        check_apart(output, *inputs)
    return target


def is_device(path: Path) -> bool:
    """Whether a path is something to be written to as it is: a device, a pipe, a socket."""
    return path.exists() and not path.is_file() and not path.is_dir()


def lock(path, what, flags: int = os.O_RDONLY | os.O_DIRECTORY, wait: bool = False) -> int:
    """Open and lock a folder, or a file by its flags; the lock holds until the descriptor is closed.

    `what`: the output, for messages; wait: until no other process holds it. Raises InputError if one does, or if it is
    a symbolic link.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if Path(path).is_symlink():
            raise InputError(f"{path}: a symbolic link, which is not followed: remove it") from None
        raise error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(f"{what}: another process is writing it: wait for it, or give another output") from None
    except OSError:
        pass  # a file system without locks
    return descriptor


@contextlib.contextmanager
def locked(*args, **options) -> Iterator[int]:
    """Hold a `lock` while the block runs."""
    descriptor = lock(*args, **options)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def is_at(descriptor: int, path) -> bool:
    """Whether a path still names what was opened."""
    with contextlib.suppress(FileNotFoundError):
        found, opened = os.lstat(path), os.fstat(descriptor)
        return (found.st_dev, found.st_ino) == (opened.st_dev, opened.st_ino)
    return False


def identity(path) -> tuple[int, ...] | None:
    """What changes when another file takes the place of one; None where there is none."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def beside(path, suffix: str) -> Path:
    """The same path with something after its name."""
    path = Path(path)
    return path.with_name(path.name + suffix)


@contextlib.contextmanager
def own_folder(folder: Path, output) -> Iterator[None]:
    """A folder that is this process's while the block runs, and empty at first, whatever a killed run left in it.

    It is removed afterwards, unless it was moved. output: what it is for. Raises InputError if another process has it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    descriptor = None
    try:
        with held():
            while descriptor is None:
                with contextlib.suppress(FileExistsError):
                    folder.mkdir()
                with contextlib.suppress(FileNotFoundError):
                    descriptor = lock(folder, output)
                    if not is_at(descriptor, folder):
                        os.close(descriptor)
                        descriptor = None
        for left in folder.iterdir():
            remove(left)
        yield
    finally:
        if descriptor is not None:
            with held():
                if is_at(descriptor, folder):
                    shutil.rmtree(folder, ignore_errors=True)
                os.close(descriptor)


@contextlib.contextmanager
def publish(output_dir) -> Iterator[Path]:
    """Give a temporary folder that becomes `output_dir` when the block ends without an exception.

    One process at a time (InputError). What a killed run left behind is removed, or put back, first; on an exception
    nothing is left. Whether output_dir may be replaced is `check_output_dir`'s to say, before any work.
    """
    output_dir = Path(os.path.realpath(output_dir))
    partial, retired = beside(output_dir, ".partial"), beside(output_dir, ".retired")
    with own_folder(partial, output_dir):
        try:
            if retired.is_dir() and not output_dir.exists():
                retired.rename(output_dir)  # killed between the renames below
            remove(retired)
            with naming(output_dir):
                yield partial
            with held():
                if output_dir.exists():
                    output_dir.rename(retired)
                partial.rename(output_dir)
        finally:
            with held():
                if retired.exists() and not output_dir.exists():
                    retired.rename(output_dir)
                shutil.rmtree(retired, ignore_errors=True)


@contextlib.contextmanager
def replacing(path) -> Iterator:
    """Give a binary file that becomes `path` when the block ends without an exception; a reader sees the old till then.

    Links are followed, devices and pipes written to as such. One process at a time (InputError).
    """
    path = Path(os.path.realpath(path))
    if is_device(path):
        with open(path, "wb") as file:
            yield file
        return
    partial, descriptor = beside(path, ".partial"), None
    try:
        while True:
            descriptor = lock(partial, path, os.O_RDWR | os.O_CREAT)
            if os.fstat(descriptor).st_nlink == 1 and is_at(descriptor, partial):
                break
            if os.fstat(descriptor).st_nlink > 1:  # planted: another file's name
                partial.unlink(missing_ok=True)
            os.close(descriptor)
            descriptor = None
        with naming(path), open(descriptor, "wb", closefd=False) as file:
            file.truncate()
            yield file
        os.replace(partial, path)
    except BaseException:
        if descriptor is not None and is_at(descriptor, partial):
            partial.unlink()
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextlib.contextmanager
def naming(path) -> Iterator[None]:
    """Say which output an error is about: OSErrors of a write name no file, and libraries have errors of their own."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        signs = ("PytorchStreamWriter", "inline_container", "iostream", "os error")  # torch's, and those of Rust
        if type(error).__name__ == "SafetensorError" or any(sign in str(error) for sign in signs):
            raise InputError(
                f"{path}: not written ({first_line(error)}): free some space, then run this again"
            ) from None
        raise


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there; a folder at once, so that nothing half removed looks whole."""
    if path.is_dir() and not path.is_symlink():
        meta = path / "meta.json"
        meta.unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def link(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


# --------------------------------------------------------------------------------------------------------------- JSON


def write_json(path, value, summed: bool = False) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one; `summed`: with its checksum."""
    value = {**value, SUM: json_sum(value)} if summed else value
    with replacing(path) as file:
        file.write(json.dumps(value, indent=1).encode() + b"\n")


def read_json(path, remedy: str = "restore it, or make its folder again"):
    """What is in a JSON file, checked if it has a checksum.

    Raises InputError if it is missing, not JSON, or not what was written.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: missing: {remedy}") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one
        raise InputError(f"{path}: not JSON ({error}): {remedy}") from None
    if isinstance(value, dict) and SUM in value:
        found = value.pop(SUM)
        if found != json_sum(value):
            raise InputError(f"{path}: damaged, or changed by hand (its checksum is another): {remedy}")
    return value


def json_sum(value: dict) -> str:
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


# --------------------------------------------------------------------------------------------------------------- meta


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


def write_meta(folder, *args, known: dict[str, Spans] | None = None, also=(), **facts) -> dict:
    """Write `make_meta(*args, **facts)` and the checksums of all files as the folder's `meta.json`, and return it.

    known: checksums that need not be computed again; also: what is a part of the folder, but changes.
    """
    facts |= {"also": list(also)} if also else {}
    meta = {**make_meta(*args, **facts), "files": sums_of(folder, known, also)}
    write_json(Path(folder) / "meta.json", meta, summed=True)
    return meta


def read_meta(folder, kind: str, made_by: str, *or_kind: str, check: bool = False) -> dict:
    """The `meta.json` of a finished artifact of this kind (or of `or_kind`), its files being there.

    check: compare their checksums too (--verify). Raises InputError naming a stage.
    """
    path = Path(folder) / "meta.json"
    if not path.is_file():
        inside = Path(folder) / kind
        hint = f"did you mean {inside}?" if (inside / "meta.json").is_file() else f"run {made_by} first"
        raise InputError(f"{folder}: not a finished {kind} folder (no meta.json): {hint}")
    meta = read_json(path, f"remove {folder} and run {made_by} again")
    if not isinstance(meta, dict) or meta.get("kind") not in (kind, *or_kind):
        found = meta.get("kind") if isinstance(meta, dict) else type(meta).__name__
        raise InputError(f"{folder}: holds {found!r}, not {kind!r}: give the folder written by {made_by}")
    check_sizes(folder, meta.get("files", {}))
    if check:
        verify(folder)
    return meta


def verify(folder) -> int:
    """Check all checksums of an artifact, and of an index' segments; returns the bytes read.

    Raises InputError if a file is not what was published, or if there are no checksums.
    """
    folder = Path(folder)
    meta = read_json(folder / "meta.json", "give the folder that a stage wrote")
    if "files" not in meta:
        raise InputError(f"{folder / 'meta.json'}: without checksums (made before there were any): make it again")
    read = check_sums(folder, meta["files"])
    if (folder / "state.json").is_file():
        for entry in read_json(folder / "state.json")["segments"]:
            segment = folder / "segments" / entry["name"]
            if "files" not in entry:
                raise InputError(f"{segment}: without checksums (made before there were any): compact the index")
            read += check_sums(segment, entry["files"])
    return read


def fingerprint(*parts) -> str:
    """32 hex digits over strings, numbers, bytes and the contents of files (given as Path)."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Path):
            with open(part, "rb") as file:
                while block := file.read(BLOCK):
                    digest.update(block)
        else:
            digest.update(part if isinstance(part, bytes) else str(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def peak_memory_mb() -> int:
    """Peak resident memory in MB (10^6 bytes): of this process, or of its largest finished child if that is more."""
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return round(peak * (1024 if sys.platform != "darwin" else 1) / 1e6)
