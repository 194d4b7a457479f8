"""Serve an index: a page that searches it as one types, and a JSON interface; docs/server.md tells of both.

    python serve.py --index_dir index                                 # then open http://127.0.0.1:8000
    python serve.py --index_dir index --writable                      # /add, /upsert and /delete with a token
    curl 'http://127.0.0.1:8000/search?q=late+interaction&k=3'

reads   index/ (build_index.py), its model, the page's files in page/
writes  the index, with --writable only

Only this machine may connect unless --host says otherwise. Searches that wait are encoded together; a changed index is
taken up without a restart. SIGTERM or Ctrl-C ends it: what is running is finished, within seconds. Needs what
requirements-serve.txt names.
"""

import argparse
import os
import secrets
import socket
import threading
import time
from pathlib import Path

from nanocolbert import cli
from nanocolbert.cli import InputError, count, positive, run_stage, say, word

HOSTS = ("127.0.0.1", "localhost", "[::1]")
WAITING_FILTERED, WAITING_EXPLANATIONS, WAITING_CHANGES = 32, 64, 8  # that may wait
CONNECTIONS = 512
GRACE = 5.0  # seconds that what is running may take to end
POLL = 0.1  # seconds between two looks at whether a signal has come
TOKEN = "NANOCOLBERT_TOKEN"


def secret(text: str) -> str:
    if len(word(text)) < 8:
        raise argparse.ArgumentTypeError("a token has 8 characters at least")
    return text


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--index_dir", type=Path, nargs="+", required=True, help="what build_index.py wrote")
    parser.add_argument("--model", help="the model that the index was made from (default: as the index says)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine)")
    parser.add_argument("--port", type=count, default=8000, help="0: any that is free (default 8000)")
    parser.add_argument(
        "--allowed_hosts",
        nargs="+",
        default=[],
        help="names under which it may be asked, besides localhost and --host; *: any",
    )
    parser.add_argument("--writable", action=switch, default=False, help="permit changes, with a token")
    parser.add_argument(
        "--token", type=secret, help=f"of --writable (default: ${TOKEN}, else a new one, which is printed)"
    )
    parser.add_argument("--cpu", action=switch, default=False, help="use the CPU even where there is a GPU")
    group = parser.add_argument_group("limits")
    group.add_argument("--max_k", type=positive, default=1000, help="passages a search (default 1000)")
    group.add_argument("--max_body", type=positive, default=1_000_000, help="bytes of a request (default 1000000)")
    group.add_argument("--max_waiting", type=positive, default=256, help="searches that may wait (default 256)")
    args = parser.parse_args()
    if args.port > 65535:
        parser.error(f"argument --port: {args.port} is not a port: 65535 is the last")
    if args.writable and len(args.index_dir) > 1:
        parser.error("argument --writable: of one index: give that alone")
    if args.token and not args.writable:
        parser.error("argument --token: it permits changes, as --writable does: give both")
    return args


if __name__ == "__main__":  # before the imports that take seconds: --help, or a wrong flag, is answered at once
    ARGS = cli.start(parse_args)

try:
    import uvicorn

    from nanocolbert.server.app import Settings, Workers, make_app
    from nanocolbert.server.worker import Worker
except ModuleNotFoundError as error:
    cli.fail(f"{error.name} is not installed: pip install -r requirements-serve.txt")

from search import Searcher


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises InputError where it cannot."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=CONNECTIONS)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else an answer's second part waits for 40 ms
        return listener
    except OSError as error:
        remedy = "give another by --port, or end what listens there" if port else "give another by --host"
        raise InputError(f"cannot listen at {host}, port {port} ({error.strerror}): {remedy}") from None


def choose_token(args) -> str | None:
    """The token that changes need; None where there are to be none."""
    if not args.writable:
        return None
    token = args.token or os.environ.get(TOKEN)
    if not token:
        token = secrets.token_urlsafe(24)
        say(f"changes need the header Authorization: Bearer {token}")
    try:
        return secret(token)
    except argparse.ArgumentTypeError as error:
        raise InputError(f"{TOKEN}: {error}") from None


def bracketed(host: str) -> str:
    """A host as addresses write it."""
    return f"[{host}]" if ":" in host else host


def run(app, listener: socket.socket, signals: list, ready: str = "") -> None:
    """Answer requests until there is a signal; then finish those that are running, within GRACE seconds."""
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,  # who asks is who connects
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=20,
            timeout_graceful_shutdown=int(GRACE),
        )
    )
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)  # signals are for the main thread
    thread.start()
    if ready:
        say(ready)
    while thread.is_alive() and not signals:
        thread.join(POLL)
    server.should_exit = True
    thread.join(GRACE + 1)


def main(args):
    listener = listen(args.host, args.port)  # before the seconds that a model takes
    token = choose_token(args)
    searcher = Searcher(args.index_dir, args.model, "cpu" if args.cpu else None)
    searcher.search("ready?", k=1)  # loads the model, compiles loops
    settings = Settings(
        page=Path(__file__).resolve().parent / "page",
        index=", ".join(folder.resolve().name for folder in args.index_dir),
        model=Path(args.model or searcher.meta.get("model", "")).name,
        hosts=(*HOSTS, bracketed(args.host), *args.allowed_hosts),
        token=token,
        max_k=args.max_k,
        max_body=args.max_body,
    )
    filtered, explanations = Worker(searcher, WAITING_FILTERED), Worker(most=WAITING_EXPLANATIONS)
    workers = Workers(Worker(searcher, args.max_waiting), filtered, explanations, Worker(most=WAITING_CHANGES))
    address = f"http://{bracketed(args.host)}:{listener.getsockname()[1]}"
    started = time.time()
    ready = f"{address}  {len(searcher):,} passages"
    run(make_app(searcher, workers, settings), listener, cli.stop_softly(), ready)
    workers.close(GRACE)
    done = {name: getattr(workers.searches, name) + getattr(filtered, name) for name in ("searches", "batches")}
    return done | {"seconds": round(time.time() - started, 2)}


if __name__ == "__main__":
    run_stage(main, ARGS)
