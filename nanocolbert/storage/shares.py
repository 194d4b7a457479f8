"""One run file by several processes: each writes a share, which the first one joins."""

import gzip
import re
import shutil
from pathlib import Path

from nanocolbert.cli import InputError
from nanocolbert.storage import runs
from nanocolbert.storage.artifact import beside, check_output_file, is_device, replacing


def write_run(output, rankings, format: str, tag: str, state) -> None:
    """Write a run file as runs.write_run does: one process by itself, several a share each.

    state: accelerate's PartialState. Raises InputError if it cannot be written, by several to what is no file.
    """
    target = check_output_file(output)

    def rankings_alone():
        remove_shares(target)  # now that the file is locked
        yield from rankings

    if state.num_processes == 1:
        runs.write_run(target, rankings_alone(), format, tag)
        return
    if is_device(target):
        raise InputError(f"{output}: not a file, which several processes need: give a file, or one process")
    shares = [beside(target, f".partial.{i}") for i in range(state.num_processes)]
    if not state.is_main_process:
        state.wait_for_everyone()  # until the file is locked
        runs.write_run(shares[state.process_index], rankings, format, tag)
        state.wait_for_everyone()
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as file:
        try:
            remove_shares(target)
            state.wait_for_everyone()
            runs.write_run(shares[0], rankings, format, tag)
            state.wait_for_everyone()
            join(shares, file, target.suffix == ".gz")
        finally:
            remove_shares(target)


def join(shares: list[Path], file, packed: bool) -> None:
    """Copy the shares into an open file, one after the other."""
    target = gzip.GzipFile("", "wb", fileobj=file, mtime=0) if packed else file
    for share in shares:
        with share.open("rb") as part:
            shutil.copyfileobj(part, target)
    if packed:
        target.close()


def remove_shares(target: Path) -> None:
    """Remove shares of the processes that wrote to a run file, or were killed at it."""
    share = re.compile(re.escape(target.name) + r"\.partial\.\d+(\.partial)?")
    for path in target.parent.iterdir():
        if share.fullmatch(path.name):
            path.unlink(missing_ok=True)
