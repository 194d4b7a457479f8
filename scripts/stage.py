"""Run one stage of the pipeline, unless it is done: FILE is there, made by the same command from the same inputs.

    python scripts/stage.py OUT FILE COMMAND...    # FILE is the last thing that COMMAND writes

reads   OUT/stages.json; of an argument that is a file its size and time, of a stage's folder meta.json, weights and
        settings, of another folder (a base model) all contents, again only when sizes or times have changed
writes  OUT/stages.json: for each FILE the arguments that matter, what the inputs were, and what came of it

What another command made, or this one from other inputs, is removed and made again; a model is moved to NAME.old. What
was interrupted goes on. What has no record is taken as it is, and recorded. A record is written before COMMAND starts,
while FILE is not there: where both are, the record is true, whoever was killed when. One run at a time works in OUT.
"""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

FREE = (  # arguments (by how they begin) that change where and how fast results come, not what they are
    *("--output", "--workers", "--cpu", "--no-cpu", "--resume", "--no-resume", "--save_steps", "--keep_checkpoints"),
    *("--log_steps", "--eval_steps", "--dev_", "--wandb_", "--verify", "--no-verify"),
)
FACTS = ("kind", "fingerprint", "query_maxlen", "doc_maxlen", "texts")  # of meta.json, that the next stage depends on


def fail(message) -> None:
    print(f"stage.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def say(line: str) -> None:
    print(f"== {line}", flush=True)  # before what COMMAND prints


def read_json(path: Path) -> dict:
    """A file of JSON, {} where there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        fail(f"{path}: not JSON ({error}): remove it")


def digest(value) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()


class Records:
    """OUT/stages.json: how each FILE was made, and the digests of the folders read for it."""

    def __init__(self, out: Path):
        self.out, self.path = out, out / "stages.json"
        saved = read_json(self.path)
        self.stages, self.contents = saved.get("stages", {}), saved.get("contents", {})

    def name(self, file: Path) -> str:
        return os.path.relpath(file, self.out)

    def put(self, name: str, made_from: dict, output: str | None, made: bool) -> None:
        """Record how FILE was made (by this driver or not) or, without an output, is about to be."""
        self.stages[name] = {"from": made_from, "output": output, "made": made}
        partial = self.path.with_name("stages.json.partial")
        partial.write_text(json.dumps({"stages": self.stages, "contents": self.contents}, indent=1) + "\n")
        os.replace(partial, self.path)

    def identity(self, path: Path, flag: str = "") -> str | None:
        """What changes when a file or folder does, for the stage that reads it by this flag; None where neither is."""
        if path.is_dir():
            meta = read_json(path / "meta.json")
            files = {*path.glob("*.safetensors"), *path.glob("*.json")} - {path / "meta.json"}
            if flag == "--codec":
                files -= {path / "state.json"}  # what is added to an index does not touch its codec
            return digest([[meta.get(fact) for fact in FACTS], self.read(path, files if meta else path.rglob("*"))])
        return f"{path.stat().st_size} bytes, {path.stat().st_mtime_ns}" if path.is_file() else None

    def read(self, folder: Path, files) -> str:
        """Digest of the contents of the folder's files, as remembered while no size and no time has changed."""
        files = sorted(path for path in files if path.is_file())
        seen = digest([(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files])
        name = self.name(folder)
        if self.contents.get(name, [None])[0] != seen:
            hashes = []
            for path in files:
                with open(path, "rb") as file:
                    hashes.append((str(path.relative_to(folder)), hashlib.file_digest(file, "blake2b").hexdigest()))
            self.contents[name] = [seen, digest(hashes)]
        return self.contents[name][1]


def parse(command: list[str]) -> dict[str, list[str]]:
    """{flag: words after it} from the *.py word on, whatever launches it, and {"": [script]}; the last use counts."""
    start = next((i for i, word in enumerate(command) if word.endswith(".py")), 0)
    flag, flags = "", {"": [command[start]]}
    for word in command[start + 1 :]:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            flags[flag] = [value] if equals else []
        else:
            flags[flag].append(word)
    return flags


def changes(before: dict, now: dict) -> list[str]:
    """What differs between two {flag: [[word, identity], ...]}. An input that is not there any more is as it was."""
    found = []
    for flag in sorted({*before, *now}):
        old, new = before.get(flag), now.get(flag)
        was, given = (" ".join([flag, *(word for word, _ in part or [])]).strip() for part in (old, new))
        if new is None:
            found.append(f"no longer {was}")
        elif old is None:
            found.append(f"{given}, was not given")
        elif was == given:
            found += [f"{a[0]} has changed" for a, b in zip(old, new, strict=True) if b[1] not in (None, a[1])]
        elif [b for _, b in old] != [b for _, b in new] or None in [b for _, b in new]:
            found.append(f"{given}, was {was.removeprefix(flag).strip()}")
            if any(" bytes" in (a or "") and not b for (_, a), (_, b) in zip(old, new, strict=False)):  # what both name
                fail(f"{found[-1]}: no such file")  # before anything is removed
    return found


def inputs(made_from: dict) -> list[Path]:
    return [Path(word) for part in made_from.values() for word, identity in part if identity]


def remade_since(file: Path, made_from: dict, records: Records) -> list[str]:
    """The inputs that this driver made after FILE, of which there is no record."""
    ends = {path: path / "meta.json" if path.is_dir() else path for path in inputs(made_from)}
    made = [path for path, end in ends.items() if records.stages.get(records.name(end), {}).get("made")]
    return [f"{path} has changed" for path in made if ends[path].stat().st_mtime_ns > file.stat().st_mtime_ns]


def put_away(target: Path, out: Path, made_from: dict, why: str) -> str:
    """Remove what a stage wrote, or move a model to NAME.old; returns what to say of it. Else it is an error."""
    meta, real = read_json(target / "meta.json") if target.is_dir() else {}, target.resolve()
    doubt = ""
    if out.resolve() not in real.parents and meta.get("kind") != "demo collection":
        doubt = f"is not within {out}"
    if any(real in (path.resolve(), *path.resolve().parents) for path in inputs(made_from)):
        doubt = "holds what it is made from"
    if target.is_symlink():
        doubt = "is a symbolic link"
    if doubt:
        fail(f"{target}: is to be made again ({why}), but {doubt}: remove it, or give another output")
    if target.is_file():
        target.unlink()
        return ""
    old, retired = target.with_name(f"{target.name}.old"), target.with_name(f"{target.name}.retired")
    begun = (target / "checkpoints").is_dir() and not (old / "meta.json").exists()
    shutil.rmtree(retired, ignore_errors=True)
    if meta.get("kind") == "model" or begun:
        if old.exists():
            old.rename(retired)
            shutil.rmtree(retired)
        target.rename(old)
        return f"; what was there is now {old}"
    target.rename(retired)  # at once: what is half removed must not look whole
    shutil.rmtree(retired)
    return ""


def run(command: list[str], lock: int) -> int:
    """The exit status of a command, which holds the lock as long as it lives; Ctrl-C is for it to answer."""
    command = [sys.executable if command[0] == "python" else command[0], *command[1:]]
    signal.signal(signal.SIGINT, lambda *_: None)
    process = subprocess.Popen(command, pass_fds=(lock,))
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    status = process.wait()
    return status if status >= 0 else 128 - status


def stage(out: Path, file: Path, command: list[str], lock: int) -> int:
    records, flags = Records(out), parse(command)
    target = file.parent if file.name == "meta.json" else file
    if target not in [Path(word) for flag in flags if flag.startswith("--output") for word in flags[flag]]:
        fail(f"{file}: not the --output or --output_dir of {' '.join(command)}")
    made_from = {
        flag: [[word, records.identity(Path(word), flag) if word != flags[""][0] else None] for word in words]
        for flag, words in flags.items()
        if not flag.startswith(FREE)
    }
    name, whole, there = records.name(file), file.exists(), target.exists() or target.is_symlink()
    record = records.stages.get(name, {})
    why = changes(record["from"], made_from) if record else []
    if whole and not record:
        why = remade_since(file, made_from, records)
    if whole and not why:
        output = records.identity(target)
        if record.get("output", output) not in (None, output):
            record, found = {}, " (as found: changed since it was made)"
        else:
            found = "" if record else " (as found: no record of how it was made)"
        say(f"done: {file}{found}")
        records.put(name, record.get("from", made_from), output, record.get("made", False))
        return 0

    if there and why:
        why = "; ".join(why)
        say(f"again: {target} ({why})" + put_away(target, out, made_from, why))
    elif record.get("output") and not there:
        say(f"again: {target} ({'; '.join(['it is gone', *why])})")
    records.put(name, made_from, None, True)
    say(" ".join(command))
    started = time.monotonic()
    status = run(command, lock)
    if status:
        return status
    if not file.exists():
        fail(f"{' '.join(command)}: ended without {file}")
    records.put(name, made_from, records.identity(target), True)
    say(f"{time.monotonic() - started:.0f} s: {file}")
    return 0


def lock_folder(out: Path) -> int:
    """Make and lock a folder, until this process and its command have ended. Another's lock is an error."""
    out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{out}: another run is at work there: wait for it, or end it")
    except OSError:
        pass  # a file system without locks
    return lock


def main() -> int:
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print("usage: stage.py OUT FILE COMMAND...", __doc__, sep="\n\n", end="")
        return 0
    if len(sys.argv) < 4:
        fail("give OUT FILE COMMAND...")
    out, file, command = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    try:
        return stage(out, file, command, lock_folder(out))
    except OSError as error:
        fail(error)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
