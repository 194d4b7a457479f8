"""The toy pipeline that faults are put into: its commands, what they give without a fault, how two results compare."""

import contextlib
import gzip
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import conftest  # it sets the environment, too

from .server import Done, Server

TIMEOUT = 60
TIMES = re.compile(  # keys of JSON that are no result: model_path is seen from where a link leads to
    r"seconds|peak_memory_mb|_per_second|ms_per_query|checksum$|^versions$|^verify$|^model_path$"
)
EMBED = "doc2embedding.py --cpu --tokens_dir tokens --model model --part_size 9"
SEARCH = "retrieve.py --cpu --model model --queries queries.tsv --k 10"
UPDATE = "update_index.py --index_dir out/"


@dataclass(frozen=True)
class Stage:
    """A command that writes out/`output`. start: what lies there before; it is changed."""

    output: str
    command: str
    start: str = ""

    @property
    def script(self) -> str:
        return self.command.split()[0]


STAGES = {
    stage.output: stage
    for stage in (
        Stage(
            "tokens",
            "tsv2mmap.py --collection collection.tsv --queries queries.tsv --triples triples.tsv --tokenizer encoder "
            "--workers 1 --output_dir out/tokens",
        ),
        Stage(
            "model",
            "train.py --cpu --tokens_dir tokens --base_model encoder --dim 16 --batch_size 8 --max_steps 8 --lr 2e-3 "
            "--dropout 0 --mixed_precision no --save_steps 3 --wandb_mode disabled --resume --output_dir out/model",
        ),
        Stage("embeddings", f"{EMBED} --output_dir out/embeddings"),
        Stage("bits", f"{EMBED} --bits 2 --nlist 8 --output_dir out/bits"),
        Stage("codes", "build_index.py --embedding_dir embeddings --nlist 8 --output_dir out/codes"),
        Stage("vectors", "build_index.py --embedding_dir embeddings --nlist 8 --keep_vectors --output_dir out/vectors"),
        Stage("collected", "build_index.py --embedding_dir bits --output_dir out/collected"),
        Stage(
            "ivfpq",
            "build_index.py --embedding_dir embeddings --method ivfpq --nlist 4 --m 8 --nbits 6 --output_dir out/ivfpq",
        ),
        Stage("codes.run", f"{SEARCH} --index_dir codes --output out/codes.run"),
        Stage("vectors.run", f"{SEARCH} --index_dir vectors --output out/vectors.run"),
        Stage("ivfpq.run", f"{SEARCH} --index_dir ivfpq --output out/ivfpq.run"),
        Stage("exact.run", f"{SEARCH} --index_dir embeddings --exact --output out/exact.run"),
        Stage("reranked.run", f"{SEARCH} --index_dir vectors --candidates candidates.tsv --output out/reranked.run"),
        Stage("measures.json", "evaluate.py --qrels qrels.tsv --run codes.run --output out/measures.json"),
        Stage(
            "mined.jsonl",
            "scripts/mine.py --run exact.run --qrels qrels.tsv --ranks 1 10 --negatives 3 --output out/mined.jsonl",
        ),
        Stage(
            "scored.jsonl",
            "scripts/score.py --teacher encoder --similarity sum --collection collection.tsv "
            "--queries queries.tsv --rows mined.jsonl --output out/scored.jsonl",
        ),
        Stage(
            "scored",
            "tsv2mmap.py --collection collection.tsv --queries queries.tsv --triples scored.jsonl --tokenizer encoder "
            "--workers 1 --output_dir out/scored",
        ),
        Stage(
            "distilled",
            "train.py --cpu --tokens_dir scored --base_model encoder --dim 16 --batch_size 4 --cached_parts 2 "
            "--loss kl distil in_batch=0.5 --no-markers --expand_queries_to 0 --max_steps 6 --lr 2e-3 --dropout 0 "
            "--mixed_precision no --save_steps 2 --wandb_mode disabled --resume --output_dir out/distilled",
        ),
        Stage("pylate", "scripts/convert.py --model model --layout pylate --output_dir out/pylate"),
        Stage("added", f"{UPDATE}added --cpu --model model --add more.tsv", "vectors"),
        Stage("deleted", f"{UPDATE}deleted --delete pids.txt", "codes"),
        Stage("compacted", f"{UPDATE}compacted --compact", "deleted"),
        Stage(
            "unzipped",
            "tsv2mmap.py --collection zipped.tsv.gz --tokenizer encoder --workers 1 --output_dir out/unzipped",
        ),
    )
}
READERS = {  # who reads an artifact
    "tokens": ("model", "embeddings"),
    "mined.jsonl": ("scored.jsonl",),
    "scored.jsonl": ("scored",),
    "scored": ("distilled",),
    "model": ("codes.run", "embeddings"),
    "checkpoints": ("model",),
    "embeddings": ("vectors", "ivfpq", "exact.run"),
    "bits": ("collected",),
    "codes": ("codes.run", "deleted"),
    "vectors": ("vectors.run", "added"),
    "ivfpq": ("ivfpq.run",),
    "codes.run": ("measures.json",),
    "qrels.tsv": ("measures.json",),
    "queries.tsv": ("codes.run",),
    "zipped.tsv.gz": ("unzipped",),
}


def snapshot(folder: Path, *passed_over: str) -> dict[str, str]:
    """{path: what is there} of all below a folder, followed into no link; times in JSON files are left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.split("/")[0] in passed_over or path.name == "lock":  # of an index: it stays
            continue
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            found[name] = f"link to {os.readlink(path)}"
        elif not stat.S_ISREG(mode):
            found[name] = f"type {stat.S_IFMT(mode):o}"
        else:
            found[name] = hashlib.blake2b(without_times(path), digest_size=8).hexdigest()
    return found


def without_times(path: Path) -> bytes:
    data = path.read_bytes()
    lines = data.splitlines() if path.suffix == ".jsonl" else [data]
    if data.startswith(b"{"):
        with contextlib.suppress(ValueError):
            return json.dumps([_drop_times(json.loads(line)) for line in lines], sort_keys=True).encode()
    return data


def _drop_times(value):
    if isinstance(value, dict):
        return {key: _drop_times(part) for key, part in value.items() if not TIMES.search(key)}
    return [_drop_times(part) for part in value] if isinstance(value, list) else value


def differences(wanted: dict, found: dict) -> str:
    """Paths that differ, in words; empty if none do."""
    words = {name: "changed" for name in wanted.keys() & found.keys() if wanted[name] != found[name]}
    words |= {name: "gone" for name in wanted.keys() - found.keys()}
    words |= {name: "new" for name in found.keys() - wanted.keys()}
    lines = [f"{name} {word}" for name, word in sorted(words.items())]
    return ", ".join(lines[:8]) + (f" and {len(lines) - 8} more" if len(lines) > 8 else "")


class Factory:
    """What conftest's makers of toy data ask for."""

    def __init__(self, folder: Path):
        self.folder = folder

    def mktemp(self, name: str) -> Path:
        (self.folder / name).mkdir()
        return self.folder / name


class World:
    """A folder with the inputs and the results of every stage, and copies of it to put faults into."""

    def __init__(self):
        self.top = Path(tempfile.mkdtemp(prefix="faults-"))
        self.base, self.numbers, self.lock = self.top / "base", itertools.count(), threading.Lock()
        (self.top / "toy").mkdir()
        conftest.encoder_dir.__wrapped__(Factory(self.top / "toy"))
        conftest.toy_dir.__wrapped__(Factory(self.top / "toy"))
        shutil.move(self.top / "toy" / "toy", self.base)
        shutil.move(self.top / "toy" / "encoder", self.base / "encoder")
        collection = (self.base / "collection.tsv").read_bytes()
        (self.base / "zipped.tsv.gz").write_bytes(gzip.compress(collection, mtime=0))
        (self.base / "more.tsv").write_text("n1\tthe old apple\nn2\ta blue boat near the cloud\n")
        (self.base / "pids.txt").write_text("p3\np8\np20\n")
        self.server = Server(self.top)
        self.wanted, self.counts, self.seconds = {}, {}, {}
        for stage in STAGES.values():
            self._make(stage)

    def _make(self, stage: Stage) -> None:
        """Run a stage without a fault, and keep what it gave as an input of the others."""
        out = self.base / "out"
        out.mkdir()
        if stage.start:
            shutil.copytree(self.base / stage.start, out / stage.output)
        started, count = time.time(), self.top / "count"
        done = self.server.start(stage.command, self.base, self.top / "io", count=str(count)).wait(TIMEOUT)
        if done.code:
            print(f"fails without a fault:\n{done}", file=sys.stderr)
            shutil.rmtree(out)
            return
        self.seconds[stage.output], self.counts[stage.output] = time.time() - started, int(count.read_text())
        self.wanted[stage.output] = snapshot(out)
        shutil.move(out / stage.output, self.base / stage.output)
        out.rmdir()

    @contextlib.contextmanager
    def copy(self, stage: Stage | None = None, there: bool = False):
        """A copy of all, with an empty folder out, or what the stage starts from in it. there: its result in it."""
        folder = self.new_folder()
        shutil.copytree(self.base, folder, symlinks=True)
        (folder / "out").mkdir()
        self.put(stage, folder, there)
        yield folder
        shutil.rmtree(folder)

    def new_folder(self) -> Path:
        with self.lock:
            return self.top / f"case-{next(self.numbers)}"

    def bytes_of(self, output: str) -> int:
        """What an output takes on a disk of blocks of 4096 bytes, folders left out."""
        top = self.base / output
        paths = top.rglob("*") if top.is_dir() else [top]
        return sum(-(-path.stat().st_size // 4096) * 4096 for path in paths if path.is_file())

    def put(self, stage: Stage | None, folder: Path, there: bool = False) -> None:
        start = stage and (stage.output if there else stage.start)
        if start:
            source = self.base / start
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, folder / "out" / stage.output)

    def run(self, command: str, folder: Path, **options) -> Done:
        return self.start(command, folder, **options).wait(TIMEOUT)

    def start(self, command: str, folder: Path, **options):
        with self.lock:
            io = self.top / "ios" / str(next(self.numbers))
        return self.server.start(command, folder, io, **options)

    def close(self) -> None:
        self.server.close()
        shutil.rmtree(self.top)


def is_clear(done: Done, *words: str) -> bool:
    """Whether it ended in one line that says what was wrong (with any of the words) and what to do."""
    lines = done.err.rstrip("\n").split("\n")
    shape = re.fullmatch(rf"{re.escape(done.script)}: error: (.*\S: .*\S)", lines[-1])
    return bool(
        done.code == 2
        and not done.strays
        and shape
        and (not words or any(word in shape[1] for word in words))
        and sum(": error: " in line for line in lines) == 1
        and not re.search(r"Traceback|Exception ignored|Fatal Python|unrecognized arguments", done.err)
    )


def is_ended(done: Done, name: str, number: int) -> bool:
    """Whether a signal ended it in one line, or came once the result had been printed, as the interpreter ended."""
    if done.code in (-number, 128 + number) and done.out.rstrip().endswith("}"):
        return True
    last = done.err.rstrip("\n").split("\n")[-1]
    return bool(
        done.code == 128 + number
        and not done.strays
        and re.match(rf"{re.escape(done.script)}: (ended|stopped) by {name}", last)
        and not re.search(r"Traceback|Exception ignored|Fatal Python", done.err)
    )
