"""From a file of documents to a first hit, as a newcomer goes: scripts/index.sh, then two lines of Python.

    python bench/bench_documents.py                       # SQuAD's 20,958 paragraphs as jsonl, with titles
    python bench/bench_documents.py --n_passages 200      # the first 200

Seconds of each stage as scripts/stage.py counts them, with the start of its Python; of the first search in a new
Python, from its start to the printed hit; and disk: what each folder holds, and all of them with each file counted
once (kept vectors are in two folders and on the disk once).
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from measure import DATA, REPO, add_results_flag, hardware, write_result

from nanocolbert.storage.tsv import read_rows

SEARCH = """from search import Searcher
print(Searcher(INDEX).search(QUERY, k=5)[0])"""
STAGES = ("tokens", "embeddings", "index")


def write_jsonl(source: Path, target: Path, n: int | None) -> int:
    """Write the first n paragraphs (default: all) as JSON, a title and a text each; returns how many there were."""
    titles = {row[0]: row[1] for _, row in read_rows(source / "pids.tsv", "pid, title, number, split", "titles")}
    rows = itertools.islice(read_rows(source / "collection.tsv", "pid, passage", "collection"), n)
    lines = [json.dumps({"id": pid, "title": titles[pid], "text": text}, ensure_ascii=False) for _, (pid, text) in rows]
    target.write_text("".join(line + "\n" for line in lines))
    return len(lines)


def run_index(command: list[str], folder: Path) -> tuple[float, dict[str, int]]:
    """(seconds, {stage: seconds}) of index.sh, given in a folder."""
    started, stages = time.perf_counter(), {}
    environment = os.environ | {"NANOCOLBERT_PYTHON": sys.executable}
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        print(line, end="", flush=True)
        if line.startswith("== ") and " s: " in line:
            seconds, file = line.removeprefix("== ").strip().split(" s: ")
            stages[Path(file).parent.name] = int(seconds)
    if process.wait():
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}")
    return time.perf_counter() - started, stages


def first_search(index: Path, query: str) -> tuple[float, str]:
    """(seconds, what was printed) of the two lines in a new Python."""
    lines = SEARCH.replace("INDEX", repr(str(index))).replace("QUERY", repr(query))
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", lines], cwd=REPO, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return time.perf_counter() - started, done.stdout.strip()


def disk(out: Path) -> dict[str, float]:
    """MB (10^6 bytes) of each stage's folder by itself, and of all of them."""

    def size(files) -> float:
        stats = [file.stat() for file in files if file.is_file()]
        return round(sum({stat.st_ino: stat.st_size for stat in stats}.values()) / 1e6, 1)

    return {name: size((out / name).rglob("*")) for name in STAGES} | {"in_all": size(out.rglob("*"))}


def main(args) -> None:
    machine = hardware()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder, name = Path(scratch), "squad.jsonl"
        n = write_jsonl(args.data, folder / name, args.n_passages)
        megabytes = round((folder / name).stat().st_size / 1e6, 1)
        script, model = str(REPO / "scripts/index.sh"), str(args.model.resolve())
        seconds, stages = run_index(["bash", script, name, model, "index of squad"], folder)
        again = run_index(["bash", script, name, model, "index of squad"], folder)[0]
        search, hit = first_search(folder / "index of squad/index", args.query)
        print(hit)
        figures = {
            "passages": n,
            "file_mb": megabytes,
            "seconds_to_first_hit": round(seconds + search, 1),
            "seconds": {"index.sh": round(seconds, 1), **stages, "first_search": round(search, 1)},
            "again_seconds": round(again, 1),
            "lines_typed": {"shell": 1, "python": len(SEARCH.splitlines())},
            "disk_mb": disk(folder / "index of squad"),
            "hit": hit[:200],
        }
    print(json.dumps(figures, indent=1))
    write_result("documents", args, machine, **figures)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA / "squad", help="folder of collection.tsv and pids.tsv")
    parser.add_argument("--n_passages", type=int, help="the first so many (default: all)")
    parser.add_argument(
        "--model", type=Path, default=REPO / "experiments/demo/model", help="ColBERT (default: the demo's)"
    )
    parser.add_argument("--query", default="What does the term matter mean in physics?", help="to search for")
    parser.add_argument("--scratch", type=Path, help="folder for temporary files (all of SQuAD: 1 GB)")
    add_results_flag(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
