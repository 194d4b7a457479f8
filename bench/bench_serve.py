"""serve.py under load, over loopback: searches a second, milliseconds, memory, while the index changes; kill -9.

    python bench/bench_serve.py --index_dir experiments/squad/index

A copy of the index is served by a process of its own; clients are threads here, each of which asks for one query after
another, so they take a part of the cores too. Every answer is checked: each hit has the score that a Searcher gives to
that passage, and its text, and they are those that a Searcher finds alone, but while the index changes. At the end the
server is killed amid changes and started anew: its answers must be right again.
"""

import argparse
import contextlib
import http.client
import itertools
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import transformers
from measure import DATA, INTERVAL, REPO, add_results_flag, hardware, private_bytes, status_bytes, write_result

from nanocolbert.checkpoints.layouts import model_of
from nanocolbert.storage.documents import read_queries
from search import Searcher

TOKEN = "bench-serve-token"
TOLERANCE = 0.05  # of a score: queries encoded together are rounded otherwise
SCORED = 300  # passages whose scores are known
CHANGED = [f"bench-{i}" for i in range(8)]  # ids that are added, replaced and deleted


class Server:
    """python serve.py, and its peak of memory."""

    def __init__(self, index_dir: Path, model: str):
        command = [sys.executable, REPO / "serve.py", "--index_dir", index_dir, "--model", model, "--port", 0]
        command += ["--cpu", "--writable", "--token", TOKEN]
        started = time.perf_counter()
        self.process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        line = self.process.stderr.readline()
        if "passages" not in line:
            sys.exit(f"serve.py: {line}{self.process.stderr.read()}")
        self.seconds = time.perf_counter() - started
        self.port, self.private = int(line.split()[1].rsplit(":", 1)[1]), 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while self.process.poll() is None:
            self.private = max(self.private, private_bytes(self.process.pid))
            time.sleep(10 * INTERVAL)

    def end(self, number: int) -> None:
        """By a signal; SIGTERM must end it well."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=30)
        if number == signal.SIGTERM and (self.process.returncode or err):
            sys.exit(f"serve.py ended with {self.process.returncode}: {out}{err}")


class Client:
    """One connection that is kept."""

    def __init__(self, port: int):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def ask(self, path: str, body: dict | None = None) -> tuple[int, dict]:
        """(status, answer); status 0 where there is none."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
        try:
            self.connection.request("POST" if body else "GET", path, json.dumps(body) if body else None, headers)
            response = self.connection.getresponse()
            return response.status, json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.connection.close()
            return 0, {"error": repr(error)}


class Truth(NamedTuple):
    """What a Searcher finds alone, and some SCORED of the best passages with their scores."""

    hits: list
    scored: dict


def is_right(hits: list[dict], truth: Truth, k: int, changing: bool) -> bool:
    """Whether hits have the scores and the texts that are theirs, the best first; unless passages are changing, whether
    they are those that a Searcher finds, but for ties. Of those that come and go nothing is known.
    """
    scores = [hit["score"] for hit in hits]
    if len(hits) != len(truth.hits) or scores != sorted(scores, reverse=True):
        return False
    if not changing and any(abs(a - b.score) > TOLERANCE for a, b in zip(scores, truth.hits, strict=True)):
        return False
    known = [(hit, truth.scored.get(hit["pid"])) for hit in hits if hit["pid"] not in CHANGED]
    return all(own and abs(hit["score"] - own.score) < TOLERANCE and hit["text"] == own.text for hit, own in known)


def search_until(end: float, server: Server, queries, truth: dict, args, first: int, changing: bool) -> list[tuple]:
    """One client's searches: (milliseconds, whether it was answered, whether that was right)."""
    client, found = Client(server.port), []
    for at in itertools.count(first):
        text = queries[at % len(queries)]
        started = time.perf_counter()
        if started > end:
            return found
        status, answer = client.ask("/search", {"q": text, "k": args.k, "explain": args.explain})
        ms = 1000 * (time.perf_counter() - started)
        found.append((ms, status == 200, status == 200 and is_right(answer["hits"], truth[text], args.k, changing)))
    return found


def change_until(end: float, server: Server, texts: list[str]) -> tuple[int, int]:
    """Add, replace and delete passages in turn; returns (changes, those that failed)."""
    client, n, failed = Client(server.port), 0, 0
    bodies = itertools.cycle(
        [
            ("/add", {"ids": CHANGED, "texts": texts}),
            ("/upsert", {"ids": CHANGED, "texts": texts[::-1]}),
            ("/delete", {"ids": CHANGED}),
        ]
    )
    for path, body in bodies:
        if time.perf_counter() > end and path == "/add":  # the index is as it was
            return n, failed
        status, answer = client.ask(path, body)
        if status != 200:
            print(f"{path}: {status} {answer}")
        n, failed = n + 1, failed + (status != 200)
    return n, failed


def load(server: Server, n_clients: int, queries: list[str], truth: dict, args, texts: list[str] | None) -> dict:
    """Load by some clients for some seconds, while passages change if `texts` are given."""
    before, started = Client(server.port).ask("/health")[1], time.perf_counter()
    end = started + args.seconds
    with ThreadPoolExecutor(n_clients + 1) as threads:
        changes = threads.submit(change_until, end, server, texts) if texts else None
        step = max(1, len(queries) // n_clients)
        given = end, server, queries, truth, args
        jobs = [threads.submit(search_until, *given, i * step, texts is not None) for i in range(n_clients)]
        found = [one for job in jobs for one in job.result()]
        seconds = time.perf_counter() - started
        n_changes, failed_changes = changes.result() if changes else (0, 0)
    after = Client(server.port).ask("/health")[1]
    ms = [one[0] for one in found]
    row = {"clients": n_clients, "changes": n_changes, "searches": len(found)}
    row["searches_per_s"] = round(len(found) / seconds, 1)
    row |= {f"p{share}_ms": round(float(np.percentile(ms, share)), 1) for share in (50, 95, 99)}
    done, batches = (after[name] - before[name] for name in ("searches", "batches"))
    row["mean_batch"] = round(done / max(1, batches), 1)
    row["failed"] = sum(not is_answered for _, is_answered, _ in found) + failed_changes
    row["wrong"] = sum(is_answered and not right for _, is_answered, right in found)
    print(
        f"{n_clients:3} clients, {n_changes:3} changes: {row['searches_per_s']:7.1f} searches/s, "
        f"p50 / 95 / 99 {row['p50_ms']:.0f} / {row['p95_ms']:.0f} / {row['p99_ms']:.0f} ms, "
        f"{row['mean_batch']} a batch, {row['failed']} failed, {row['wrong']} wrong"
    )
    return row


def kill_amid_changes(server: Server, index_dir: Path, model: str, queries, truth, args, texts) -> dict:
    """kill -9 while passages change, and start anew: seconds to the first answer, answers that are wrong."""
    with ThreadPoolExecutor(1) as threads, contextlib.redirect_stdout(None):
        changes = threads.submit(change_until, time.perf_counter() + 1, server, texts)
        time.sleep(min(1.0, args.seconds) / 2)
        server.end(signal.SIGKILL)
        changes.result()
    again = Server(index_dir, model)
    client, wrong = Client(again.port), 0
    for text in queries[:50]:
        status, answer = client.ask("/search", {"q": text, "k": args.k})
        wrong += status != 200 or not is_right(answer["hits"], truth[text], args.k, True)
    again.end(signal.SIGTERM)
    print(f"after kill -9: ready in {again.seconds:.1f} s, {wrong} of {len(queries[:50])} answers wrong")
    return {"ready_seconds": round(again.seconds, 2), "searches": len(queries[:50]), "wrong": wrong}


def truth_of(alone: Searcher, text: str, k: int) -> Truth:
    """By a search alone, and by scoring what a search for more finds in the way of its last step."""
    given = {"exact": True, "by_codes": not alone.meta.get("keep_vectors", True)}
    among = [hit.pid for hit in alone.search(text, k=SCORED, quality="best")]
    return Truth(alone.search(text, k=k), {hit.pid: hit for hit in alone.search(text, SCORED, among=among, **given)})


def main(args):
    machine = hardware()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        index_dir = Path(shutil.copytree(args.index_dir, Path(work) / "index"))
        alone = Searcher(args.index_dir, args.model, device="cpu")
        model = args.model or model_of(args.index_dir, alone.meta)
        texts = list(read_queries(args.queries).values())
        texts = [texts[i] for i in np.linspace(0, len(texts) - 1, min(args.n_queries, len(texts))).astype(int)]
        truth = {text: truth_of(alone, text, args.k) for text in texts}
        new = [found.hits[0].text or text for text, found in itertools.islice(truth.items(), len(CHANGED))]
        new += ["a passage"] * (len(CHANGED) - len(new))
        facts = {key: alone.meta[key] for key in ("passages", "dim", "bits", "keep_vectors") if key in alone.meta}
        server = Server(index_dir, str(model))
        load(server, 1, texts, truth, argparse.Namespace(**vars(args) | {"seconds": 0.5}), None)  # warm up
        rows = [load(server, n, texts, truth, args, None) for n in args.clients]
        rows += [load(server, n, texts, truth, args, new) for n in args.clients]
        peak = status_bytes("VmHWM", server.process.pid)
        memory = {"private_mb": round(server.private / 1e6), "rss_mb": round(peak / 1e6)}
        print(f"memory of the server: {memory['private_mb']} MB, ready in {server.seconds:.1f} s")
        killed = kill_amid_changes(server, index_dir, str(model), texts, truth, args, new)
    figures = {"ready_seconds": round(server.seconds, 2), "memory": memory, "rows": rows, "killed": killed}
    write_result("serve", args, machine, index=facts, **figures)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index_dir", type=Path, default=REPO / "experiments/squad/index", help="what is served")
    parser.add_argument("--model", type=Path, help="its model, if it was moved (default: as the index says)")
    parser.add_argument("--queries", type=Path, default=DATA / "squad" / "queries.dev.tsv", help="qid, query")
    parser.add_argument("--n_queries", type=int, default=64, help="spread evenly over the file")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="that ask at once")
    parser.add_argument("--seconds", type=float, default=8, help="of each load")
    parser.add_argument("--k", type=int, default=10, help="passages a search")
    parser.add_argument("--explain", action="store_true", help="ask for what each passage matched, too")
    parser.add_argument("--work", type=Path, help="where the copy is made (default: the system's own place)")
    add_results_flag(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
