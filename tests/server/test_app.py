"""The JSON interface over loopback, in front of a stand-in: what it answers, and what it refuses, in one line."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest

pytest.importorskip("fastapi", reason="serve.py's packages are optional: pip install -r requirements-serve.txt")

import httpx
from toy_searcher import CHANGES, ToySearcher, serving

from nanocolbert.cli import InputError
from nanocolbert.server import guard

PASSAGES = {"1": "red apple", "2": "blue <b>boat</b>", "3": 'red "boat"', "4": "drum"}


@pytest.fixture(scope="module")
def searcher() -> ToySearcher:
    return ToySearcher(PASSAGES)


@pytest.fixture(scope="module")
def client(searcher):
    with serving(searcher) as client:
        yield client


def error_of(response: httpx.Response, status: int) -> str:
    """The line of an error, after which the server still answers."""
    assert response.status_code == status, response.text
    (line,) = response.json().values()
    assert list(response.json()) == ["error"] and line and "\n" not in line and "Traceback" not in line
    return line


def test_search_by_body_and_by_address(client):
    found = client.post("/search", json={"q": "red", "k": 2}).json()
    assert [(hit["pid"], hit["score"]) for hit in found["hits"]] == [("1", 1.0), ("3", 1.0)]
    assert found["hits"][1] == {"pid": "3", "score": 1.0, "text": 'red "boat"', "metadata": {"year": 2020}}
    assert set(found["ms"]) == {"wait", "encode", "search"} and found["version"] == 1
    by_address = client.get("/search", params={"q": "red", "k": 2, "among": ["3", "4"]}).json()
    assert [hit["pid"] for hit in by_address["hits"]] == ["3", "4"]


def test_settings_reach_the_searcher(client, searcher):
    client.post("/search", json={"q": "red", "quality": "best", "among": [1, "2"], "by_document": True})
    n, settings = searcher.searched[-1]
    expected = {"k": 10, "quality": "best", "among": ["1", "2"], "where": None, "by_document": True}
    assert n == 1 and settings == expected


def test_search_with_what_matched(client):
    found = client.get("/search", params={"q": "red boat", "k": 1, "explain": True}).json()["hits"][0]
    matched = [["[CLS]", 1], ["boat", 0]]  # the best that there is
    assert found["pieces"][0] == {"text": "[CLS]", "similarity": 1, "matched": matched, "special": True}
    assert found["pieces"][1:] == [{"text": "red", "similarity": 1, "matched": [["red", 1]]}, {"text": " apple"}]


def test_a_hit_that_is_deleted_before_it_is_explained(client, searcher, monkeypatch):
    monkeypatch.setattr(searcher, "explain", lambda *_: searcher._explain("red", "gone"))
    found = client.get("/search", params={"q": "red", "k": 1, "explain": True}).json()["hits"]
    assert len(found) == 1 and "pieces" not in found[0]
    assert "no passage gone" in error_of(client.post("/highlight", json={"query": "red", "pids": ["gone"]}), 422)
    many = {"q": "red", "k": 101, "explain": True}
    assert "100 at most" in error_of(client.post("/search", json=many), 422)


def test_highlight(client):
    found = client.post("/highlight", json={"query": "red", "pids": ["1", "4"]}).json()
    assert found["pieces"]["1"][1:] == [{"text": "red", "similarity": 1, "matched": [["red", 1]]}, {"text": " apple"}]
    assert list(found["pieces"]) == ["1", "4"] and list(found["ms"]) == ["explain"]
    assert client.post("/highlight", json={"query": "red", "pids": []}).json() == {"pieces": {}, "ms": {}}


def test_explain(client):
    found = client.post("/explain", json={"query": "red boat", "pid": 1}).json()
    assert found["pid"] == "1" and found["score"] == 2 and found["passage"] == "red apple"
    assert [token["token"] for token in found["query"]] == ["[CLS]", "red", "boat"]
    assert [token["span"] for token in found["tokens"]] == [[0, 0], [0, 3], [4, 9]]
    assert found["similarity"] == [[1, 0, 0], [0, 1, 0], [0, 0, 0]] and found["query"][1]["position"] == 1


def test_health(client):
    told = client.get("/health").json()
    expected = {"passages": 4, "version": 1, "fields": ["year"], "index": "index", "writable": True, "max_k": 1000}
    assert expected.items() <= told.items() and told["uptime"] >= 0


def test_changes(monkeypatch):
    searcher = ToySearcher(PASSAGES)
    with serving(searcher) as client:
        new = {"ids": [8, "9"], "texts": ["green", "grey"], "metadata": [{"a": 1}, None]}
        changed = client.post("/add", json=new, headers=CHANGES)
        assert changed.json() == {"changed": 2, "passages": 6, "version": 2} and searcher.passages["8"] == "green"
        new = {"ids": ["8"], "texts": ["black"]}
        assert "already" in error_of(client.post("/add", json=new, headers=CHANGES), 422)
        assert client.post("/upsert", json=new, headers=CHANGES).json()["version"] == 3
        assert client.get("/search", params={"q": "black", "k": 1}).json()["hits"][0]["pid"] == "8"
        gone = client.post("/delete", json={"ids": ["8", "9"]}, headers=CHANGES)
        assert gone.json() == {"changed": 2, "passages": 4, "version": 4}
        assert "no passage 8" in error_of(client.post("/delete", json={"ids": ["8"]}, headers=CHANGES), 422)
        with monkeypatch.context() as patch:
            found = InputError("passage 0: /home/me/index has a passage 8 already")
            patch.setattr(searcher, "add", mock.Mock(side_effect=found))
            told = error_of(client.post("/add", json=new, headers=CHANGES), 422)
            assert told == "passage 0: the index has a passage 8 already"
        with monkeypatch.context() as patch:
            found = InputError("passage a is in /home/me/index/a and in /home/me/index2: delete it")
            patch.setattr(searcher, "add", mock.Mock(side_effect=found))
            told = error_of(client.post("/add", json=new, headers=CHANGES), 422)
            assert told == "passage a is in the index/a and in /home/me/index2: delete it"
        short = {"ids": ["8", "9"], "texts": ["black"]}
        assert "2 ids, but 1 texts" in error_of(client.post("/add", json=short, headers=CHANGES), 422)


@pytest.mark.parametrize(
    "asked, told",
    [
        ({"q": "red", "k": 10**9}, "k: Input should be less than or equal to 1000"),
        ({"q": "red", "k": 0}, "k: Input should be greater"),
        ({"q": "red", "k": "many"}, "k: Input should be a valid integer"),
        ({"q": "r" * 2001}, "q: String should have at most 2000"),
        ({"q": ["red"]}, "q: Input should be a valid string"),
        ({"q": None}, "q: Input should be a valid string"),
        ({}, "q: Field required"),
        ([], "body: Input should be a valid dictionary"),
        ({"q": "red", "quality": "great"}, "quality: Input should be 'fast', 'default' or 'best'"),
        ({"q": "red", "among": ["1"] * 10_001}, "bytes"),
        ({"q": "red", "where": "x" * 1001}, "where: String should have at most 1000"),
        ({"q": "red", "where": "1=1; DROP TABLE x"}, "where: no such field in"),
        ({"q": "red", "nprobes": 3}, "nprobes: Extra inputs are not permitted"),
        ({"q": "\ud800"}, ""),
    ],
)
def test_searches_that_are_refused(client, asked, told):
    body = json.dumps(asked).encode()
    response = client.post("/search", content=body, headers={"Content-Type": "application/json"})
    assert told in error_of(response, 413 if told == "bytes" else 422)
    assert client.get("/search", params={"q": "red"}).status_code == 200


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"q": red}', b"\xff\xfe", b"[" * 9_000, b'{"q": "a", "k": ' + b"9" * 5000 + b"}", b"null\x00"]
)
def test_what_is_no_json(client, body):
    response = client.post("/search", content=body, headers={"Content-Type": "application/json"})
    assert error_of(response, 422 if not body else 400)
    assert client.get("/search", params={"q": "red"}).status_code == 200


@pytest.mark.parametrize("path", ["/add", "/upsert", "/delete"])
def test_changes_need_the_token(client, searcher, path):
    body = {"ids": ["1"]} if path == "/delete" else {"ids": ["1"], "texts": ["x"]}
    for headers, told in (
        ({}, "Authorization: Bearer TOKEN"),
        ({"Authorization": "Basic Y29ycmVjdC1ob3JzZQ=="}, "Authorization: Bearer TOKEN"),
        ({"Authorization": "Bearer wrong"}, "not the token"),
        ({"Authorization": b"Bearer \xe4\xf6"}, "not the token"),
        ({"Authorization": "Bearer"}, "not the token"),
    ):
        response = client.post(path, json=body, headers=headers)
        assert told in error_of(response, 401) and response.headers["www-authenticate"] == "Bearer"
    assert searcher.passages == PASSAGES
    assert "application/json" in error_of(client.post(path, content="ids=1", headers=CHANGES), 415)
    with serving(ToySearcher(PASSAGES), token=None) as closed:
        assert "--writable" in error_of(closed.post(path, json=body, headers=CHANGES), 403)
        for end in ("%0A", "%0a%0D", "%00"):  # the routes' own patterns take /add\n for /add
            assert "control character" in error_of(closed.post(f"{path}{end}", json=body), 400)
        assert closed.get("/health").json()["version"] == 1


def test_pages_elsewhere_cannot_ask(client):
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "[::2]:80"):
        assert "is not served" in error_of(client.get("/search?q=red", headers={"Host": host}), 400)
    for host in ("localhost", "LOCALHOST:99", "127.0.0.1:1", "[::1]:8000"):
        assert client.get("/health", headers={"Host": host}).status_code == 200
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    preflight = client.options("/search", headers=headers)
    assert preflight.status_code == 405 and not any(name.startswith("access-control") for name in preflight.headers)
    assert error_of(client.post("/search", content='{"q": "red"}', headers={"Content-Type": "text/plain"}), 415)
    with serving(ToySearcher(PASSAGES), hosts=("*",)) as anyone:
        assert anyone.get("/health", headers={"Host": "search.example"}).status_code == 200


def chunks(n: int, size: int = 1000):
    for _ in range(n):
        yield b"x" * size


def test_bodies_that_are_too_large(client):
    headers = {"Content-Type": "application/json"}
    for content in (b"x" * 10_001, b"x" * 10**7, chunks(11), chunks(2000)):
        assert "10,000 bytes" in error_of(client.post("/search", content=content, headers=headers), 413)
    padded = b'{"q": "red"' + b" " * (10_000 - 12) + b"}"
    assert client.post("/search", content=padded, headers=headers).status_code == 200


def test_a_body_that_does_not_come(client, monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.1)
    head = b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 20\r\n\r\n{"
    address = (client.base_url.host, client.base_url.port)
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(head)
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(head)  # and hang up
    assert client.get("/search", params={"q": "red"}).status_code == 200


def test_other_paths_and_methods(client):
    assert "/nothing: nothing is here" in error_of(client.get("/nothing"), 404)
    assert error_of(client.get("/%2e%2e/serve.py"), 404) and error_of(client.get("/style.css/%2e%2e/serve.py"), 404)
    assert error_of(client.delete("/search"), 405) and error_of(client.get("/add", headers=CHANGES), 405)
    assert error_of(client.post("/explain", json={"query": "red", "pid": "nobody"}), 422) == "has no passage nobody"


def test_an_unexpected_error_is_one_line_and_the_server_goes_on(client, capfd):
    assert "failed" in error_of(client.get("/search", params={"q": "explode"}), 500)
    said, deadline = "", time.monotonic() + 20
    while "\n" not in said and time.monotonic() < deadline:  # once it has answered
        said += capfd.readouterr().err
    (line,) = said.splitlines()
    assert "GET /search: RuntimeError: exploded in two lines (" in line and "toy_searcher.py:" in line
    assert client.get("/search", params={"q": "red"}).status_code == 200


def test_a_full_disk_is_told(client, searcher, monkeypatch, capfd):
    def full(*_):
        raise OSError(28, "No space left on device", "/home/me/index/segments/3")

    monkeypatch.setattr(searcher, "add", full)
    told = error_of(client.post("/add", json={"ids": ["9"], "texts": ["red"]}, headers=CHANGES), 500)
    assert told == "the system refuses: No space left on device"
    assert "/home/me/index/segments/3: No space left on device: free some space" in capfd.readouterr().err


def test_under_load_what_waits_is_taken_together_and_too_much_is_put_off():
    searcher = ToySearcher(PASSAGES)
    with serving(searcher, most_waiting=2) as client, ThreadPoolExecutor(4) as threads:
        searcher.go_on.clear()

        def ask(q: str) -> httpx.Response:
            return httpx.get(f"{client.base_url}/search", params={"q": q}, timeout=30)

        answers = [threads.submit(ask, "red")]
        while len(searcher.encoded) < 1:
            time.sleep(0.001)
        answers += [threads.submit(ask, q) for q in ("blue", "boat")]
        while client.get("/health").json()["waiting"] < 2:
            time.sleep(0.001)
        refused = ask("drum")
        assert "try again" in error_of(refused, 503) and refused.headers["retry-after"] == "1"
        searcher.go_on.set()
        assert all(answer.result().status_code == 200 for answer in answers)
        assert sorted(map(len, searcher.encoded))[-1] == 2


def test_searches_go_on_while_the_index_changes(monkeypatch):
    searcher, added = ToySearcher(PASSAGES), threading.Event()
    add = searcher.add
    monkeypatch.setattr(searcher, "add", lambda *what: added.wait(30) and add(*what))
    with serving(searcher) as client, ThreadPoolExecutor(1) as threads:
        new = {"ids": ["9"], "texts": ["red"]}
        change = threads.submit(httpx.post, f"{client.base_url}/add", json=new, headers=CHANGES, timeout=30)
        assert all(len(client.get("/search?q=red").json()["hits"]) == 4 for _ in range(3)) and not change.done()
        added.set()
        assert change.result().json()["passages"] == 5


def test_the_page_and_its_headers(client):
    for path, kind in (("/", "text/html"), ("/style.css", "text/css"), ("/app.js", "text/javascript")):
        response = client.get(path)
        assert response.status_code == 200 and response.headers["content-type"].startswith(kind)
        assert "default-src 'self'" in response.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff" and "server" not in response.headers
    for path in ("/docs", "/docs.js", "/swagger-ui.css", "/swagger-ui-bundle.js", "/icon.svg"):
        assert client.get(path).status_code == 200, path
    for page in (client.get("/").text, client.get("/docs").text, client.get("/app.js").text):
        assert "http:" not in page and "https:" not in page  # nothing is fetched from elsewhere
    assert {"/search", "/explain", "/highlight", "/add", "/upsert", "/delete", "/health"} == {
        *client.get("/openapi.json").json()["paths"]
    }
