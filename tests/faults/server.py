"""Commands without the seconds that importing torch takes: a process that has imported it forks for each command.

What runs is the script itself, as `__main__`, in a process and a session of its own: exit codes, tracebacks, crashes,
signals and stray children are those of `python SCRIPT`. The process that forks has one thread.
"""

import atexit
import contextlib
import gc
import json
import os
import re
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WRITES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate", "os.chmod", "os.symlink"}


@dataclass
class Done:
    """How a command ended; code None: it hung and was killed. strays: commands of processes that it left running."""

    command: str
    code: int | None
    out: str
    err: str
    strays: list[str] = field(default_factory=list)

    @property
    def script(self) -> str:
        """What it calls itself in what it says."""
        return Path(self.command.split()[0]).name

    def __str__(self) -> str:
        strays = f"\nleft running: {self.strays}" if self.strays else ""
        return f"$ {self.command}\nexit code {self.code}{strays}\n{self.err[-3000:]}"


class Job:
    """A command under way."""

    def __init__(self, command: str, folder: Path, wait, pid: int):
        self.command, self.folder, self._wait, self.pid = command, folder, wait, pid

    def await_handlers(self) -> None:
        """Wait until the stage answers signals (before, it is only Python that starts), or has ended."""
        with contextlib.suppress(OSError):
            while True:
                status = dict(re.findall(r"(\w+):\s+(\w+)", Path(f"/proc/{self.pid}/status").read_text()))
                if status["State"] == "Z" or int(status["SigCgt"], 16) >> (signal.SIGTERM - 1) & 1:
                    return
                time.sleep(0.002)

    def send(self, number: int, group: bool = False) -> None:
        """Send a signal to the process, or as a terminal does to its group, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)

    def wait(self, timeout: float) -> Done:
        try:
            code = self._wait(timeout)
        except (TimeoutError, subprocess.TimeoutExpired):
            code = None
        until = time.time() + 5  # for children that are ending
        while (strays := session(self.pid)) and time.time() < until and code is not None:
            time.sleep(0.05)
        for pid in strays:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        out, err = ((self.folder / name).read_text(errors="replace") for name in ("stdout", "stderr"))
        return Done(self.command, code, out, err, list(strays.values()))


def session(leader: int) -> dict[int, str]:
    """{pid: command} of the processes of a session."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = stat.read_text().rpartition(")")[2].split()[:4]
            if int(of) == leader and state != "Z":
                found[int(stat.parent.name)] = (stat.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended
            continue
    return found


class Server:
    """Start commands, from any thread."""

    def __init__(self, folder: Path):
        self.address = str(folder / "server")
        self.log = open(folder / "server.log", "wb")  # noqa: SIM115
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, __file__, self.address]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log
        )
        assert self.process.stdout.readline() == b"ready\n", (folder / "server.log").read_text()

    def start(self, command: str, cwd: Path, io: Path, plain: bool = False, **strike) -> Job:
        """Start `python command` in cwd; stdout and stderr go to files in the folder io.

        plain: by an interpreter of its own. strike: `signal` is sent at the `at`-th change of a file below cwd/out;
        `count`, a file, takes how many there were. quick: without taking the interpreter apart at the end (0.4 s).
        """
        io.mkdir(parents=True, exist_ok=True)
        script, *arguments = shlex.split(command)
        argv = [str(ROOT / script), *arguments]
        if plain:
            with open(io / "stdout", "wb") as out, open(io / "stderr", "wb") as err:
                streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err}
                process = subprocess.Popen([sys.executable, *argv], cwd=cwd, start_new_session=True, **streams)
            return Job(command, io, process.wait, process.pid)
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.address)
        request = {"argv": argv, "cwd": str(cwd), "io": str(io), **strike}
        connection.sendall(json.dumps(request).encode() + b"\n")
        answers = connection.makefile()
        pid = int(answers.readline())

        def wait(timeout: float) -> int:
            with connection, answers:
                connection.settimeout(timeout)
                return int(answers.readline())

        return Job(command, io, wait, pid)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


# ------------------------------------------------------------------------------------------------- the process itself


def preload() -> None:
    """Import what the stages import, also where they do so late."""
    import accelerate  # noqa: F401
    import faiss  # noqa: F401
    import ir_measures  # noqa: F401
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot
    import numpy as np
    import torch
    import tqdm
    import transformers.models.auto.modeling_auto
    import transformers.models.bert.modeling_bert
    import transformers.models.bert.tokenization_bert  # noqa: F401

    from nanocolbert import compute
    from nanocolbert.checkpoints import layouts  # noqa: F401
    from nanocolbert.index import changes, compressed
    from nanocolbert.index import codec as codec_module
    from nanocolbert.index.knobs import effort_for

    compute.bf16_pays()  # measured once: the same answer for all
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], fused=True)
    tqdm.tqdm.monitor_interval, interval = 0, tqdm.tqdm.monitor_interval  # no thread for it
    with tempfile.TemporaryDirectory() as folder:  # loads the compiled loops
        vectors, lengths = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float16), np.full(8, 8)
        codec = codec_module.Codec.train(vectors.astype(np.float32), lengths, 2, 8, 0, torch.device("cpu"))
        changes.create(folder, codec, [(codec.encode(vectors, lengths), list("abcdefgh"))])
        changes.compact(folder)
        index, query = compressed.CompressedIndex(folder), torch.from_numpy(vectors[:4]).float()
        index.search(query[None], 2, effort_for("fast", 2, n_coarse=4, n_fine=3))
    tqdm.tqdm.monitor_interval = interval


def serve(address: str) -> dict:
    """Fork for each request; returns it in the process that is to run it."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        assert threading.active_count() == 1 and len(os.listdir("/proc/self/task")) == 1, os.listdir("/proc/self/task")
        print("ready", flush=True)
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            with connection:
                if os.fork():
                    continue
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                request = json.loads(connection.makefile().readline())
                pid = os.fork()
                if not pid:
                    return request
                connection.sendall(f"{pid}\n".encode())
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                try:
                    connection.sendall(f"{code}\n".encode())
                finally:
                    os._exit(0)
    os._exit(0)


def become(request: dict) -> None:
    """Be `python argv`, as far as a process that was forked can be."""
    os.setsid()
    os.chdir(request["cwd"])
    for number, name in enumerate((os.devnull, "stdout", "stderr")):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC if number else os.O_RDONLY
        opened = os.open(os.path.join(request["io"], name), flags)
        os.dup2(opened, number)
        os.close(opened)
    sys.argv = request["argv"]
    watch_files(os.path.join(request["cwd"], "out"), request)


def watch_files(below: str, request: dict) -> None:
    """Count changes of files below a folder, and send this process a signal before the wanted one."""
    seen, below = 0, os.path.realpath(below)

    def hook(event: str, arguments) -> None:
        nonlocal seen
        if event == "open":
            if not isinstance(arguments[2], int) or not arguments[2] & (os.O_WRONLY | os.O_RDWR):
                return
        elif event not in WRITES:
            return
        path = arguments[0]
        is_relative = event not in ("open", "os.truncate") and arguments[-1] != -1  # to a folder that is open
        if isinstance(path, int) or is_relative or os.path.abspath(os.fsdecode(path)).startswith(below):
            seen += 1
            if seen == request.get("at"):
                os.kill(os.getpid(), request["signal"])

    def write_count() -> None:
        Path(request["count"]).write_text(str(seen))

    if "at" in request or "count" in request:
        sys.addaudithook(hook)
    if "count" in request:
        atexit.register(write_count)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    preload()
    gc.collect()
    gc.freeze()  # else each end of a process would look through all of it
    REQUEST = serve(sys.argv[1])
    become(REQUEST)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
        if not REQUEST.get("quick"):
            raise
    if REQUEST.get("quick"):
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
