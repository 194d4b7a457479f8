"""serve.py over a real index: its answers are what Searcher finds, while the index changes too; its start, its end."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT, call_stage, run_stage_cli, succeed

pytest.importorskip("fastapi", reason="serve.py's packages are optional: pip install -r requirements-serve.txt")

import httpx
from toy_searcher import CHANGES, TOKEN, serving

import serve
from search import Searcher

TEXTS = ["red apple", "find the boat", "old drum and a cloud", "the new house", "eagle", ""]
ODD = "a <script>alert('boat & drum')</script>"


@pytest.fixture
def index(codes_dir, tmp_path):
    return shutil.copytree(codes_dir, tmp_path / "index")


@pytest.fixture
def searcher(index, model_dir) -> Searcher:
    return Searcher(index, model_dir, "cpu")


def ask(client, q: str, **settings) -> list[dict]:
    response = client.post("/search", json={"q": q, **settings})
    assert response.status_code == 200, response.text
    return response.json()["hits"]


def same(hits: list[dict], expected: list) -> bool:
    """Whether hits are those of a Searcher; a batch may round otherwise."""
    scores = [hit.score for hit in expected]
    assert [hit["score"] for hit in hits] == pytest.approx(scores, abs=1e-2)
    return {hit["pid"]: hit["text"] for hit in hits} == {hit.pid: hit.text for hit in expected}


def test_answers_are_the_searcher_s(searcher, codes_dir, model_dir):
    alone = Searcher(codes_dir, model_dir, "cpu")
    with serving(searcher) as client:
        for text in TEXTS:
            assert same(ask(client, text, k=40), alone.search(text, k=40))
        hits = alone.search("drum", k=4)
        among = [hits[1].pid, hits[3].pid, "nobody"]
        assert [hit["pid"] for hit in ask(client, "drum", among=among)] == among[:2]
        assert len(ask(client, "drum", quality="best", k=3, by_document=True)) == 3
        shown = ask(client, "the old boat", k=5, explain=True)
        for hit in shown:
            text = "".join(piece["text"] for piece in hit["pieces"] if not piece.get("special"))
            assert text == hit["text"]
        pid = shown[0]["pid"]
        found = client.post("/explain", json={"query": "the old boat", "pid": pid}).json()
        assert sum(token["similarity"] for token in found["query"]) == pytest.approx(found["score"], abs=0.02)
        assert found["score"] == pytest.approx(alone.explain("the old boat", [pid])[0].score, abs=0.01)
        assert [max(row) for row in found["similarity"]] == [token["similarity"] for token in found["query"]]


def test_changes_are_found_and_filtered(searcher):
    with serving(searcher) as client:
        new = {"ids": ["n1", "n2"], "texts": [ODD, "grape"], "metadata": [{"year": 2020}, {"year": 1990}]}
        assert client.post("/add", json=new, headers=CHANGES).json()["passages"] == 42
        assert client.get("/health").json()["fields"] == ["year"]
        (hit,) = ask(client, "boat", where="year >= 2000")
        assert hit["text"] == ODD and hit["metadata"] == {"year": 2020}
        for where in ("year >= ", "nothing = 1", "1=1) UNION SELECT 1,2 --", "year = 1; DROP TABLE passages", "\0"):
            response = client.post("/search", json={"q": "boat", "where": where})
            assert response.status_code == 422 and "\n" not in response.json()["error"], where
        assert "n1 already" in client.post("/add", json=new, headers=CHANGES).json()["error"]
        new = {"ids": ["n1"], "texts": ["grape"], "metadata": [{"year": 2021}]}
        assert client.post("/upsert", json=new, headers=CHANGES).json()["passages"] == 42
        assert ask(client, "boat", where="year >= 2000")[0]["text"] == "grape"
        for wrong in ({"ids": ["a b"], "texts": ["x"]}, {"ids": ["a", "a"], "texts": ["x", "y"]}):
            assert client.post("/add", json=wrong, headers=CHANGES).status_code == 422
        gone = client.post("/delete", json={"ids": ["n1", "n2"]}, headers=CHANGES)
        assert gone.json()["passages"] == 40
        assert client.post("/delete", json={"ids": ["n1"]}, headers=CHANGES).status_code == 422


def test_a_changed_index_is_picked_up(searcher, index, model_dir, tmp_path):
    (tmp_path / "more.tsv").write_text("new\tzebra crossing\n")
    with serving(searcher) as client:
        assert "new" not in [hit["pid"] for hit in ask(client, "zebra crossing", k=40)]
        succeed(
            call_stage("update_index.py", "--index_dir", index, "--model", model_dir, "--add", tmp_path / "more.tsv")
        )
        assert "new" in [hit["pid"] for hit in ask(client, "zebra crossing", k=41)]  # a toy model's order is nobody's


def test_many_at_once_while_the_index_changes(searcher, codes_dir, model_dir):
    """Each answer is that of the index alone, but for the passages that come and go."""
    alone, ended = Searcher(codes_dir, model_dir, "cpu"), threading.Event()
    expected = {text: alone.search(text, k=40) for text in TEXTS}

    def change(client) -> int:
        rounds = 0
        while not ended.is_set():
            new = {"ids": ["x1", "x2"], "texts": ["red boat", "drum"]}
            for path, body in (("/add", new), ("/upsert", new), ("/delete", {"ids": ["x1", "x2"]})):
                response = client.post(path, json=body, headers=CHANGES)
                assert response.status_code == 200, response.text
            rounds += 1
        return rounds

    def search(client, text: str) -> bool:
        hits = [hit for hit in ask(client, text, k=42) if hit["pid"] not in ("x1", "x2")]
        return same(hits, expected[text])

    with serving(searcher) as client, ThreadPoolExecutor(9) as threads:
        changes = threads.submit(change, client)
        try:
            assert all(threads.map(lambda text: search(client, text), TEXTS * 12))
        finally:
            ended.set()
        assert changes.result() > 0


@pytest.fixture(scope="module")
def index_of_process(codes_dir, tmp_path_factory):
    return shutil.copytree(codes_dir, tmp_path_factory.mktemp("served") / "index")


@pytest.fixture(scope="module")
def process(index_of_process, model_dir):
    """python serve.py, and the address that it says."""
    command = [
        sys.executable,
        "serve.py",
        "--index_dir",
        index_of_process,
        "--model",
        model_dir,
        "--port",
        "0",
        "--cpu",
    ]
    command += ["--writable", "--max_k", "50"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"NANOCOLBERT_TOKEN": TOKEN}
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, **pipes)
    line = process.stderr.readline()
    assert re.fullmatch(r"serve\.py: http://127\.0\.0\.1:\d+  40 passages\n", line), line + process.stderr.read()
    yield process, line.split()[1]
    process.kill()
    process.communicate()


def test_as_a_process(process):
    _, address = process
    assert len(httpx.get(f"{address}/search?q=boat&k=50").json()["hits"]) == 40
    assert "less than or equal to 50" in httpx.get(f"{address}/search?q=boat&k=1000000000").json()["error"]
    assert httpx.post(f"{address}/delete", json={"ids": ["p1"]}).status_code == 401
    assert httpx.post(f"{address}/delete", json={"ids": ["p1"]}, headers=CHANGES).json()["passages"] == 39
    assert "<title>nanoColBERT</title>" in httpx.get(address).text


def test_a_port_in_use(process, index_of_process, model_dir):
    _, address = process
    done = call_stage(
        "serve.py", "--index_dir", index_of_process, "--model", model_dir, "--port", address.split(":")[2]
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "cannot listen at 127.0.0.1" in done.stderr and "--port" in done.stderr


def test_sigterm_ends_it_when_what_runs_is_done(process):
    running, address = process
    before = httpx.get(f"{address}/health").json()["searches"]
    with ThreadPoolExecutor(4) as threads:
        body = {"q": "boat " * 300, "k": 50, "explain": True}
        answers = [threads.submit(httpx.post, f"{address}/search", json=body, timeout=30) for _ in range(4)]
        while httpx.get(f"{address}/health").json()["searches"] < before + 4:
            time.sleep(0.01)
        running.send_signal(signal.SIGTERM)
        assert {answer.result().status_code for answer in answers} == {200}
    out, err = running.communicate(timeout=60)
    assert running.returncode == 0 and err == "" and json.loads(out)["searches"] == before + 4


@pytest.mark.parametrize(
    "flags, told",
    [
        (("--index_dir", "nowhere"), "nowhere"),
        (("--port", "65536"), "65536 is not a port"),
        (("--port", "http"), "'http' is not a whole number"),
        (("--host", "no.such.host.invalid"), "cannot listen at no.such.host.invalid"),
        (("--host", "192.0.2.1"), "cannot listen at 192.0.2.1"),
        (("--token", "long-enough"), "--writable"),
        (("--index_dir", "a", "b", "--writable"), "--writable: of one index"),
        (("--index_dir", "a", "b"), "a: not a finished index folder"),
        (("--writable", "--token", "short"), "8 characters"),
        (("--writable", "--token", "of two words"), "not one word"),
        (("--max_k", "0"), "'0' is not a whole number above 0"),
    ],
)
def test_wrong_flags_are_one_line(flags, told, tmp_path):
    done = call_stage("serve.py", "--index_dir", tmp_path / "none", "--port", 0, *flags)
    assert done.returncode == 2 and told in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr


def test_a_token_is_made_up_and_told_once(monkeypatch, tmp_path):
    monkeypatch.delenv("NANOCOLBERT_TOKEN", raising=False)
    done = call_stage("serve.py", "--index_dir", tmp_path / "none", "--port", 0, "--writable")
    assert re.search(r"Authorization: Bearer [\w-]{32}\n", done.stderr) and done.returncode == 2
    monkeypatch.setenv("NANOCOLBERT_TOKEN", "short")
    done = call_stage("serve.py", "--index_dir", tmp_path / "none", "--port", 0, "--writable")
    assert done.returncode == 2 and "NANOCOLBERT_TOKEN: a token has 8 characters at least" in done.stderr


def test_without_its_packages_it_says_which(tmp_path):
    (tmp_path / "uvicorn.py").write_text("raise ModuleNotFoundError(name='uvicorn')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = run_stage_cli("serve.py", "--index_dir", tmp_path, env=environment)
    assert done.returncode == 2
    assert done.stderr == "serve.py: error: uvicorn is not installed: pip install -r requirements-serve.txt\n"


def test_small_answers_are_sent_at_once():
    with serve.listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_an_address_of_version_6():
    assert serve.bracketed("::1") == "[::1]" and serve.bracketed("127.0.0.1") == "127.0.0.1"
    try:
        listener = serve.listen("::1", 0)
    except serve.InputError:
        pytest.skip("this machine has no ::1")
    with listener:
        assert listener.family == socket.AF_INET6
