"""The kinds of faults. A case ends as

same     exit code 0, and the result is what it is without the fault
clear    exit code 2 (130 or 143 after a signal), one line that says what is wrong and what to do, nothing destroyed
unclear  it failed in any other way: a traceback, a crash, a hang, another exit code, something left behind
silent   exit code 0 with another result, or a file changed or destroyed that was not to be
"""

import contextlib
import ctypes
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .server import Done
from .world import READERS, STAGES, TIMEOUT, Stage, World, differences, is_clear, is_ended, snapshot

UNSEEN = "unseen"  # a damage that no size shows, without --verify: by design
TRAINED = ("model", "distilled")
RESUMED = (*TRAINED, "embeddings", "bits")  # what lies there half done is gone on with
IMPORTS = 5  # seconds that an interpreter of its own takes longer
UPDATES = ("added", "deleted", "compacted")
Outcome = tuple[str, str]  # verdict and, where it is none of the good ones, what happened


@dataclass(frozen=True)
class Case:
    kind: str
    name: str
    run: Callable[[World], Outcome]

    def __call__(self, world: World) -> Outcome:
        try:
            return self.run(world)
        except KeyError as error:
            return "unclear", f"{error} could not be made without a fault"
        except Exception as error:
            return "unclear", f"the harness failed: {type(error).__name__}: {error}"


def unclear(done: Done, what: str = "") -> Outcome:
    return "unclear", f"{what}{what and ': '}{done}"


# ------------------------------------------------------------------------------------------------ kills and signals


def finish(world: World, stage: Stage, folder: Path, before: dict, first: Done | None = None) -> Outcome:
    """Run the command again, or for the first time: what it gives must be what it always gives, nothing else new."""
    done = world.run(stage.command, folder)
    found, wanted = snapshot(folder / "out"), world.wanted[stage.output]
    if done.code != 0 and not (first and is_clear(done) and found == wanted):  # the first had got to the end
        return unclear(done, "run again")
    if found != wanted and stage.output == "compacted":  # compacted before the end, and once more
        wanted = {name.replace("segments/3", "segments/4"): value for name, value in wanted.items()}
        found["compacted/state.json"] = wanted["compacted/state.json"]
    if first and "stopped by" in first.err:  # the step it stopped at is saved in place of another
        wanted, found = ({k: v for k, v in names.items() if "/checkpoints/" not in k} for names in (wanted, found))
    if changed := differences(wanted, found):
        return "silent", f"another result: {changed}\n{first or ''}\n{done}"
    if changed := differences(before, snapshot(folder, "out")):
        return "silent", f"{changed}\n{done}"
    return "same", ""


def torn(world: World, stage: Stage, folder: Path) -> str:
    """What is wrong with an output that looks whole."""
    output, wanted = folder / "out" / stage.output, world.wanted[stage.output]
    if stage.output in UPDATES or not (output.is_file() or (output / "meta.json").is_file()):
        return ""
    found = {name: value for name, value in snapshot(folder / "out").items() if name.split("/")[0] == stage.output}
    found = {name: value for name, value in found.items() if not name.endswith(".partial")}
    return differences(wanted, found)


def struck(stage: Stage, moment: float, number: int, by_time: bool, there: bool, plain: bool = False) -> Callable:
    """A stage is sent a signal at a moment (0 to 1) of its changes of files, or of its time; then run again."""

    def run(world: World) -> Outcome:
        with world.copy(stage, there) as folder:
            before, at_first = snapshot(folder, "out"), snapshot(folder / "out")
            at = {} if by_time else {"at": 1 + int(moment * world.counts[stage.output]), "signal": number}
            job = world.start(stage.command, folder, plain=plain, **at)
            if by_time:
                job.await_handlers()
                time.sleep(moment * (world.seconds[stage.output] + IMPORTS * plain))
                job.send(number, group=number == signal.SIGINT)
            done = job.wait(TIMEOUT)
            if number == signal.SIGKILL and done.code not in (0, -number):
                return unclear(done)
            if number != signal.SIGKILL and done.code and not is_ended(done, signal.Signals(number).name, number):
                return unclear(done)
            if wrong := torn(world, stage, folder):
                return "silent", f"looks whole, but {wrong}\n{done}"
            found = snapshot(folder / "out")
            changed = differences(at_first, found) and differences(world.wanted[stage.output], found)
            if number != signal.SIGKILL and done.code and stage.output not in RESUMED and changed:
                return unclear(done, f"left behind {changed}")
            return finish(world, stage, folder, before, done)

    return run


def strikes(full: bool, rng: random.Random) -> list[Case]:
    """kill -9, Ctrl-C and SIGTERM, at moments of each stage."""
    cases = []
    for stage in STAGES.values():
        for kind, numbers, n in (
            ("kill", [signal.SIGKILL], 20 if full else 3),
            ("signal", [signal.SIGINT, signal.SIGTERM], 10 if full else 2),
        ):
            for i in range(n):
                by_time, number = i % 3 == 2 or (kind == "signal" and i % 5 == 0), numbers[i % len(numbers)]
                there = i % 2 == 1 and stage.output not in TRAINED and not stage.start
                moment = (i + rng.random()) / n
                how = "time" if by_time else "file changes"
                name = f"{stage.output}, {number.name} at {moment:.0%} of its {how}{', over an old one' * there}"
                cases.append(Case(kind, name, struck(stage, moment, number, by_time, there)))
    for output in ("tokens", "model") if not full else STAGES:
        number = rng.choice([signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
        kind = "kill" if number == signal.SIGKILL else "signal"
        moment = rng.uniform(0.3, 1)
        run = struck(STAGES[output], moment, number, by_time=True, there=False, plain=True)
        cases.append(Case(kind, f"{output}, {number.name} at {moment:.0%} of its time, its own interpreter", run))
    return cases


# ------------------------------------------------------------------------------------------------------- two at once


def twice(stage: Stage, wait: float, there: bool, plain: bool = False) -> Callable:
    """The same command two times at once: one or both succeed, the result is one's."""

    def run(world: World) -> Outcome:
        with world.copy(stage, there) as folder:
            before = snapshot(folder, "out")
            first = world.start(stage.command, folder, plain=plain)
            time.sleep(wait * world.seconds[stage.output])
            jobs = [first, world.start(stage.command, folder, plain=plain)]
            ends = [job.wait(TIMEOUT) for job in jobs]
            for done in ends:
                if done.code != 0 and not is_clear(done):
                    return unclear(done)
            if all(done.code for done in ends):
                return unclear(ends[0], "both failed")
            found, wanted = snapshot(folder / "out"), world.wanted[stage.output]
            if found != wanted and stage.output == "compacted" and not ends[0].code and not ends[1].code:
                found = {name.replace("segments/4", "segments/3"): value for name, value in found.items()}
                found["compacted/state.json"] = wanted["compacted/state.json"]
            if changed := differences(wanted, found) or differences(before, snapshot(folder, "out")):
                return "silent", f"{changed}\n{ends[0]}\n{ends[1]}"
            return ("clear" if any(done.code for done in ends) else "same"), ""

    return run


def beside_readers(stage: Stage, n: int, may_fail: bool) -> Callable:
    """While an index is changed or replaced, others search it: each finds what was there before, or after."""
    output = stage.output
    search = f"{STAGES['codes.run'].command.replace('codes', output, 1).replace('out/codes.run', 'out/{}.run')}"
    search = search.replace(f"--index_dir {output}", f"--index_dir out/{output}")

    def run(world: World) -> Outcome:
        with world.copy(stage, there=not stage.start) as folder:

            def read(number) -> tuple[Done, bytes]:
                done = world.run(search.format(number), folder)
                path = folder / f"out/{number}.run"
                return done, path.read_bytes() if path.exists() else b""

            known, writer = {read("before")[1]}, world.start(stage.command, folder)
            readers = []
            for number in range(n):
                readers.append(world.start(search.format(number), folder))
                time.sleep(world.seconds[output] / n)
            ends = [job.wait(TIMEOUT) for job in readers]
            done = writer.wait(TIMEOUT)
            if done.code:
                return unclear(done)
            known.add(read("after")[1])
            for number, reader in enumerate(ends):
                if reader.code != 0 and not (may_fail and is_clear(reader)):
                    return unclear(reader)
                if reader.code == 0 and (folder / f"out/{number}.run").read_bytes() not in known:
                    return "silent", f"found neither what was there before, nor after\n{reader}"
            return "same", ""

    return run


def at_once(full: bool, rng: random.Random) -> list[Case]:
    """Two of the same command, and readers beside a writer."""
    cases, outputs = [], [name for name in STAGES if name not in ("unzipped", "reranked.run", "exact.run")]
    for output in outputs:
        for wait in (0, 0.3, 0.6) if full else (0,):
            for there in (False, True) if full and output not in TRAINED and not STAGES[output].start else (False,):
                name = f"{output}, the second after {wait:.0%}{', over an old one' * there}"
                cases.append(Case("two at once", name, twice(STAGES[output], wait, there)))
    for output in ("codes", "added", "deleted", "compacted"):
        run = beside_readers(STAGES[output], 8 if full else 3, may_fail=output == "codes")
        cases.append(Case("two at once", f"{output}, beside readers", run))
    cases.append(
        Case("two at once", "tokens, interpreters of their own", twice(STAGES["tokens"], 0, False, plain=True))
    )
    return cases


# --------------------------------------------------------------------------------------------------------------- disk

LIBC = ctypes.CDLL(None, use_errno=True)
READ_ONLY, REMOUNT = 1, 32


def mount(folder: Path, options: str, flags: int = 0) -> None:
    if LIBC.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))


@contextlib.contextmanager
def disk(folder: Path):
    """A small file system of its own in a folder. Raises OSError where that may not be."""
    mount(folder, "size=64m")
    try:
        yield
    finally:
        LIBC.umount2(os.fsencode(folder), 2)


def can_mount(folder: Path) -> str:
    """Why there can be no such file system; empty if there can."""
    try:
        with disk(folder):
            return ""
    except OSError as error:
        return f"no file system can be mounted here ({error.strerror})"


def on_disk(stage: Stage, share: float | None, there: bool, inodes: bool = False) -> Callable:
    """The output's disk has room for a share of it (inodes: of its files), or none may write to it (None)."""

    def run(world: World) -> Outcome:
        size = world.bytes_of(stage.output)
        with world.copy() as folder, disk(folder / "out"):
            before = snapshot(folder, "out")
            world.put(stage, folder, there)
            at_first, used = snapshot(folder / "out"), os.statvfs(folder / "out")
            if share is None:
                mount(folder / "out", "size=64m", REMOUNT | READ_ONLY)
            elif inodes:
                taken = used.f_files - used.f_ffree
                mount(folder / "out", f"nr_inodes={taken + int(share * len(world.wanted[stage.output]))}", REMOUNT)
            else:
                taken = (used.f_blocks - used.f_bfree) * used.f_bsize
                mount(folder / "out", f"size={max(4096, taken + int(share * size))}", REMOUNT)
            done = world.run(stage.command, folder)
            mount(folder / "out", "size=64m,nr_inodes=0" if inodes else "size=64m", REMOUNT)
            if done.code != 0 and not is_clear(done):
                return unclear(done)
            found = snapshot(folder / "out")
            if done.code == 0 and found != world.wanted[stage.output]:
                return "silent", f"{differences(world.wanted[stage.output], found)}\n{done}"
            if wrong := torn(world, stage, folder):
                return "silent", f"looks whole, but {wrong}\n{done}"
            if done.code and stage.output not in RESUMED and (changed := differences(at_first, found)):
                return unclear(done, f"left behind {changed}")
            verdict, detail = finish(world, stage, folder, before, done)
            return ("clear" if verdict == "same" and done.code else verdict), detail

    return run


def read_only_inputs(stage: Stage) -> Callable:
    """All that is read lies on a disk that none may write to."""

    def run(world: World) -> Outcome:
        folder = world.new_folder()
        folder.mkdir()
        with disk(folder):
            shutil.copytree(world.base, folder, dirs_exist_ok=True)
            (folder / "out").mkdir()
            with disk(folder / "out"):
                mount(folder, "size=64m", REMOUNT | READ_ONLY)
                return finish(world, stage, folder, snapshot(folder, "out"))

    return run


def disks(full: bool, rng: random.Random) -> list[Case]:
    """Disks that are full, or read-only."""
    cases = []
    for stage in STAGES.values():
        changeable = stage.output not in TRAINED and not stage.start
        shares = [i / 8 for i in range(8)] if full else [rng.uniform(0.2, 0.9)]
        for share in shares:
            for there in (False, True) if full and changeable else (False,):
                name = f"{stage.output}, room for {share:.0%} of it{', over an old one' * there}"
                cases.append(Case("disk", name, on_disk(stage, share, there)))
        if full:
            run = on_disk(stage, 0.5, False, inodes=True)
            cases.append(Case("disk", f"{stage.output}, room for half its files", run))
        cases.append(Case("disk", f"{stage.output}, read-only", on_disk(stage, None, changeable)))
        if full and not stage.start:
            cases.append(Case("disk", f"{stage.output}, inputs read-only", read_only_inputs(stage)))
    return cases


# ------------------------------------------------------------------------------------------------------------- damage

ARRAYS = (".npy", ".safetensors", ".bin", ".pkl", ".index", ".pt")
TEXTS = (".run", ".tsv", ".jsonl")
HEADER = 128  # bytes of a .npy file's


def flip(path: Path, at: float) -> None:
    """Flip a bit at a share of the file's length; at 2 and above: of that byte."""
    data = bytearray(path.read_bytes())
    position = min(len(data) - 1, int(at if at >= 2 else at * len(data)))
    data[position] ^= 1 << position % 7
    path.write_bytes(data)


def zero(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    start = int(at * len(data))
    data[start : start + 512] = bytes(len(data[start : start + 512]))
    path.write_bytes(data)


def swap(path: Path, base: Path) -> None:
    """Put another artifact's file of the same name in its place, one of the same size if there is any."""
    others = (other for other in base.rglob(path.name) if other.is_file() and other.read_bytes() != path.read_bytes())
    best = min(others, key=lambda other: (abs(other.stat().st_size - path.stat().st_size), str(other)))
    shutil.copyfile(best, path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damaged(artifact: str, name: str, reader: str, harm: Callable, unseen: bool, verify: bool) -> Callable:
    """A file of an artifact is damaged, and the artifact read. unseen: that may change the result, but not crash."""

    def run(world: World) -> Outcome:
        stage = STAGES[reader]
        with world.copy() as folder:
            target = folder / artifact
            if artifact == "checkpoints":  # of a run that was not finished
                target = folder / "out/model"
                shutil.copytree(folder / "model", target)
                for path in target.iterdir():
                    if path.name not in ("checkpoints", "log.jsonl"):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
            if stage.start == artifact:
                target = folder / "out" / reader
                shutil.copytree(folder / artifact, target)
            path = target / name if name else target
            kept = path.read_bytes()
            harm(path)
            if path.exists() and path.read_bytes() == kept:
                return "same", ""
            before, at_first = snapshot(folder, "out"), snapshot(folder / "out")
            done = world.run(stage.command + " --verify" * verify, folder, quick=True)
            left = differences(at_first, snapshot(folder / "out"))
            if changed := differences(before, snapshot(folder, "out")):
                return "silent", f"{changed}\n{done}"
            if is_clear(done, path.name, f"{artifact}/", f"{artifact}:", f"{artifact}'s", f"out/{reader}", "out/model"):
                if left and (reader not in RESUMED or torn(world, stage, folder)):
                    return unclear(done, f"left behind {left}")
                return "clear", ""
            if done.code != 0:
                return unclear(done)
            found = snapshot(folder / "out")
            if artifact in (stage.start, "checkpoints"):  # what is damaged may still be there: no other file differs
                found[f"{reader}/{name}"] = world.wanted[reader].get(f"{reader}/{name}")
            changed = differences(world.wanted[reader], found)
            return (UNSEEN if unseen else "silent", f"{changed}\n{done}") if changed else ("same", "")

    return run


def damages(full: bool, rng: random.Random, world: World) -> list[Case]:
    """Every file of every artifact, damaged in every way."""
    cases = []
    for artifact, readers in READERS.items():
        top = world.base / ("model" if artifact == "checkpoints" else artifact)
        paths = [path for path in sorted(top.rglob("*")) if path.is_file()] if top.is_dir() else [top]
        for path in paths:
            name = path.relative_to(top).as_posix() if top.is_dir() else ""
            if name.startswith("checkpoints") != (artifact == "checkpoints"):
                continue
            if name.startswith("parts/") and name.split("/")[1][0] not in "03":
                continue
            for what, harm, is_hidden in harms(path, world.base, rng):
                for reader in readers if full else (rng.choice(readers),):
                    if reader not in world.wanted:
                        continue
                    unseen = is_hidden == "body"
                    for verify in (False, True) if is_hidden and reader != "measures.json" else (False,):
                        title = f"{artifact}{name and '/'}{name} {what}, {reader}{' --verify' * verify}"
                        run = damaged(artifact, name, reader, harm, unseen and not verify, verify)
                        cases.append(Case("damage", title, run))
    return cases


def harms(path: Path, base: Path, rng: random.Random):
    """(in words, what it does to a file, whether no size shows it: in a body of numbers, or elsewhere)."""
    yield "deleted", Path.unlink, ""
    yield "emptied", lambda path: path.write_bytes(b""), ""
    if path.suffix not in TEXTS:  # what is left of a text is a text
        yield "cut in half", cut, ""
    if path.suffix in TEXTS:
        yield "with a byte that is not UTF-8", lambda path: path.write_bytes(b"\xff" + path.read_bytes()), ""
        return
    if path.stat().st_size == 0:
        return
    is_array = path.suffix in ARRAYS
    heads = [3.0, 8.0, float(rng.randrange(10, 60))] if is_array else []
    for at in (*heads, 0.1, rng.uniform(0.3, 0.9), 1.0):
        in_body = is_array and ((at < 2 and at * path.stat().st_size >= HEADER) or path.suffix != ".npy")
        where = f"byte {at:.0f}" if at >= 2 else f"{at:.0%}"
        yield f"with a bit flipped at {where}", lambda path, at=at: flip(path, at), "body" if in_body else "head"
    at = rng.uniform(0.3, 0.7)
    yield f"with zeros from {at:.0%} on", lambda path: zero(path, at), "body" if is_array else "head"
    if any(other.read_bytes() != path.read_bytes() for other in base.rglob(path.name) if other.is_file()):
        yield "swapped", lambda path: swap(path, base), "body" if is_array else "head"
