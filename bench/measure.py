"""What the benchmarks share: seconds and their spread, memory of a command, and the result line.

Every benchmark appends one JSON line to results/bench/<name>.jsonl, with the commit and the hardware it ran on.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from nanocolbert.compute import fast_dtype

REPO = Path(__file__).resolve().parent.parent
DATA = REPO.parent / "shared" / "data"  # real collections in MS MARCO's format, where there are any
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
VECTOR_UNITS = ("avx", "fma", "amx", "asimd", "sve", "bf16")  # beginnings of what /proc/cpuinfo calls them
MASKS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "NUMBA_CPU_NAME")
INTERVAL = 0.02  # seconds between two looks at the memory of a command


def hardware() -> dict:
    """The CPU, its vector units and what masks them, cores this process may use, torch version, the GPU if any."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    family = [f"{name} {fields[name]}" for name in ("cpu family", "model") if name in fields]
    flags = fields.get("flags", fields.get("Features", "")).split()
    facts = {
        "cpu": ", ".join([fields.get("model name", platform.processor()), *family]),
        "flags": [flag for flag in flags if flag.startswith(VECTOR_UNITS)],
        "masked": {name: os.environ[name] for name in MASKS if name in os.environ},
        "compute": str(fast_dtype("cpu")).removeprefix("torch."),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),  # a busy machine shows here
        "torch": torch.__version__,
    }
    return facts | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def commit() -> dict:
    """The commit measured, and whether tracked files differed from it; nothing where git or its folder is missing."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=REPO, capture_output=True, text=True).stdout.strip()

    if not shutil.which("git"):
        return {"commit": "", "modified": False}
    return {
        "commit": git("rev-parse", "--short", "HEAD"),
        "modified": bool(git("status", "--porcelain", "--untracked-files=no")),
    }


def write_result(name: str, args, hardware: dict, **figures) -> None:
    """Append one JSON line to results/bench/<name>.jsonl; `hardware` as it was found before the measurement."""
    path = args.results / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {key: shorten(value) for key, value in vars(args).items() if key != "results"}
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), **commit(), "hardware": hardware, "args": settings, **figures}
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")
    print(f"→ {path}")


def shorten(value):
    """An absolute path as its last part: the rest says nothing about the measurement."""
    if isinstance(value, Path | str):
        return Path(value).name if os.path.isabs(value) else str(value)
    return value


def add_results_flag(parser) -> None:
    parser.add_argument("--results", type=Path, default=REPO / "results" / "bench", help="folder of the result lines")


def add_machine_flags(parser) -> None:
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1: one core)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="torch device")
    add_results_flag(parser)


def spread(values: list[float], digits: int = 3) -> dict:
    """Median, lowest and highest of some measurements, and how many there were."""
    median, low, high = (round(f(values), digits) for f in (statistics.median, min, max))
    return {"median": median, "low": low, "high": high, "runs": len(values)}


def timed(function, *args):
    """(result, seconds) of a call."""
    started = time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - started


def matmul_gflops(dtype: torch.dtype, device="cpu", n: int = 2048) -> float:
    """GFLOP/s of an (n, n) matmul, the best of five: the roof that the rest is held against."""
    a = torch.randn(n, n, device=device).to(dtype)
    (a @ a).sum().item()
    return max(2 * n**3 / timed(lambda: (a @ a)[0, 0].item())[1] / 1e9 for _ in range(5))


def run_command(script: str, python=sys.executable, **flags) -> dict:
    """Run a stage as a user does, `python SCRIPT --flag value ...`, and measure it; a flag that is True has no value.

    Returns its last line of output (JSON) as `output`, wall `seconds`, `processor_seconds` (of all threads and of its
    processes), and two memory peaks in MB (10^6 bytes):
    `private_mb`, memory of all its processes that no file backs, looked at every 20 ms: what the machine must have;
    `rss_mb`, resident memory of its largest process, to which pages of memory-mapped files count that the kernel may
    drop at any time.
    """
    words = command_flags(flags)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started, private = time.perf_counter(), 0
        process = subprocess.Popen(
            [str(python), str(REPO / script), *words], stdout=out, stderr=err, start_new_session=True
        )
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            private = max(private, private_bytes(process.pid))
            time.sleep(INTERVAL)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(ended[1])
        out.seek(0)
        err.seek(0)
        if process.returncode:
            sys.exit(f"{script} {' '.join(words)}: exit code {process.returncode}\n{err.read()[-2000:]}")
        output = json.loads(out.read().splitlines()[-1])
    return {
        "output": output,
        "seconds": round(seconds, 2),
        "processor_seconds": round(ended[2].ru_utime + ended[2].ru_stime, 2),
        "private_mb": round(private / 1e6),
        "rss_mb": round(ended[2].ru_maxrss * 1024 / 1e6),
    }


def command_flags(flags: dict) -> list[str]:
    """Words of a command line; True: the flag alone, None: not given, a list: all its words."""
    words = []
    for flag, value in flags.items():
        if value is not None:
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{flag}", *map(str, values)]
    return words


def private_bytes(session: int) -> int:
    """Anonymous resident memory of all processes of a session (Linux)."""
    total = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.getsid(int(pid)) == session:
                total += status_bytes("RssAnon", pid)
        except OSError:  # it has ended since it was listed
            continue
    return total


def status_bytes(field: str, pid="self") -> int:
    """A figure of /proc/PID/status in bytes (Linux); 0 for a process that has just ended."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0]) if f"{field}:" in status else 0


def working_memory(function) -> dict:
    """Call a function and give the peak of resident memory in MB (10^6 bytes), and how far it was above the start."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = status_bytes("VmRSS")
    function()
    peak = status_bytes("VmHWM")
    return {"peak_mb": round(peak / 1e6), "working_mb": round((peak - before) / 1e6)}
