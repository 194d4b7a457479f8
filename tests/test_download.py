import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "download.sh"
ARCHIVES = ["collectionandqueries.tar.gz", "triples.train.small.tar.gz", "top1000.dev.tar.gz"]
MEMBERS = {
    "collection.tsv": b"0\tone\n1\ttwo\n",
    "queries.train.tsv": b"7\twhat\n",
    "triples.train.small.tsv": b"what\tone\ttwo\n" * 3,
    "top1000.dev": b"9\t0\twho\tone\n",
}
CONTENTS = dict(
    zip(ARCHIVES, [["collection.tsv", "queries.train.tsv"], ["triples.train.small.tsv"], ["top1000.dev"]], strict=True)
)

pytestmark = pytest.mark.skipif(not all(map(shutil.which, ["bash", "curl", "tar", "md5sum"])), reason="needs curl, tar")


class RangeHandler(BaseHTTPRequestHandler):
    """Serves {name: bytes} with "Range: bytes=N-", and keeps (name, N) of every request."""

    def __init__(self, files, requests, *args):
        self.files, self.requests = files, requests
        super().__init__(*args)

    def do_GET(self):
        name = self.path.removeprefix("/")
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        self.requests.append((name, start))
        body = self.files.get(name)
        if body is None or start >= len(body):
            self.send_response(404 if body is None else 416)
            body = b""
        else:
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            body = body[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def make_archive(members) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in members:
            info = tarfile.TarInfo(name)
            info.size = len(MEMBERS[name])
            archive.addfile(info, io.BytesIO(MEMBERS[name]))
    return buffer.getvalue()


class Mirror:
    """A small MS MARCO on localhost: its files, the requests it got, and the script run against it."""

    def __init__(self, folder: Path):
        self.folder, self.manifest = folder / "msmarco", folder / "manifest"
        self.files = {name: make_archive(members) for name, members in CONTENTS.items()} | {
            "ids.tsv.gz": b"\x1f\x8b ids"
        }
        self.requests = []
        self.lines = {name: MEMBERS[name].count(b"\n") for name in MEMBERS}
        self.write_manifest()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(RangeHandler, self.files, self.requests))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def write_manifest(self):
        with open(self.manifest, "w") as file:
            print("# archive md5 member lines", file=file)
            for name, content in self.files.items():
                for member in CONTENTS.get(name, ["-"]):
                    print(name, hashlib.md5(content).hexdigest(), member, self.lines.get(member, "-"), file=file)

    def download(self, *archives):
        url = f"http://127.0.0.1:{self.server.server_port}"
        env = os.environ | {
            "MSMARCO_URL": url,
            "MSMARCO_MANIFEST": str(self.manifest),
            "NO_PROXY": "*",
            "no_proxy": "*",
        }
        command = ["bash", SCRIPT, self.folder, *archives]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


@pytest.fixture
def mirror(tmp_path):
    mirror = Mirror(tmp_path)
    yield mirror
    mirror.server.shutdown()
    mirror.server.server_close()


def assert_unpacked(mirror):
    assert {path.name for path in mirror.folder.iterdir()} == {*ARCHIVES, *MEMBERS}
    assert all((mirror.folder / name).read_bytes() == content for name, content in MEMBERS.items())


def test_download_then_skip(mirror):
    done = mirror.download()
    assert done.returncode == 0, done.stderr
    assert_unpacked(mirror)
    assert "triples.train.small.tsv: 3 lines" in done.stdout
    for archive in ARCHIVES:
        (mirror.folder / archive).unlink()  # not needed any more
    mirror.requests.clear()
    done = mirror.download()
    assert done.returncode == 0 and mirror.requests == []
    assert all(f"{archive}: already unpacked, skipped" in done.stdout for archive in ARCHIVES)


def test_resume(mirror):
    mirror.folder.mkdir()
    name, whole = ARCHIVES[0], mirror.files[ARCHIVES[0]]
    (mirror.folder / f"{name}.partial").write_bytes(whole[:50])
    (mirror.folder / f"{ARCHIVES[1]}.partial").write_bytes(mirror.files[ARCHIVES[1]])  # killed just before the rename
    (mirror.folder / f"{name}.unpacking").mkdir()
    (mirror.folder / f"{name}.unpacking" / "collection.tsv").write_text("half")
    done = mirror.download()
    assert done.returncode == 0, done.stderr
    assert mirror.requests[0] == (name, 50)
    assert_unpacked(mirror)


def test_wrong_md5(mirror):
    good, name = mirror.files[ARCHIVES[0]], ARCHIVES[0]
    mirror.files[name] = good[:-1] + b"!"
    done = mirror.download()
    assert done.returncode == 1
    assert "download.sh: error:" in done.stderr.splitlines()[-1] and "md5 is" in done.stderr.splitlines()[-1]
    assert list(mirror.folder.iterdir()) == []
    mirror.files[name] = good
    assert mirror.download().returncode == 0
    assert_unpacked(mirror)


def test_damaged_archive_on_disk(mirror):
    mirror.folder.mkdir()
    (mirror.folder / ARCHIVES[0]).write_bytes(b"damaged")
    done = mirror.download()
    assert done.returncode == 1 and "delete it and run this again" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name, lines", [("collection.tsv", 3), ("queries.train.tsv", 2)])
def test_wrong_line_count_leaves_nothing_unpacked(mirror, name, lines):
    found, mirror.lines[name] = mirror.lines[name], lines
    mirror.write_manifest()
    done = mirror.download()
    assert done.returncode == 1 and f"{name} has {found} lines, expected {lines}" in done.stderr.splitlines()[-1]
    assert [path.name for path in mirror.folder.iterdir()] == [ARCHIVES[0]]


def test_member_missing_from_the_archive(mirror):
    with open(mirror.manifest, "a") as file:
        print(ARCHIVES[0], hashlib.md5(mirror.files[ARCHIVES[0]]).hexdigest(), "qrels.tsv", 1, file=file)
    done = mirror.download()
    assert done.returncode == 1 and "has no qrels.tsv" in done.stderr


def test_named_archives_only(mirror):
    for expected in ("downloading from", "already downloaded"):
        done = mirror.download("ids.tsv.gz")
        assert done.returncode == 0 and f"ids.tsv.gz: {expected}" in done.stdout
    assert (mirror.folder / "ids.tsv.gz").read_bytes() == mirror.files["ids.tsv.gz"]
    assert {name for name, _ in mirror.requests} == {"ids.tsv.gz"} and len(list(mirror.folder.iterdir())) == 1
    done = mirror.download("other.tar.gz")
    assert done.returncode == 1 and "other.tar.gz: not in" in done.stderr


def test_server_without_the_file(mirror):
    del mirror.files[ARCHIVES[0]]
    done = mirror.download()
    assert done.returncode == 1 and "curl stopped with code 22" in done.stderr.splitlines()[-1]
    assert not (mirror.folder / ARCHIVES[0]).exists()


def test_manifest_of_the_repository():
    rows = [line.split() for line in (SCRIPT.parent / "msmarco.manifest").read_text().splitlines() if line[0] != "#"]
    assert all(len(row) == 4 and len(row[1]) == 32 for row in rows)
    lines = {member: n for _, _, member, n in rows}
    assert lines["collection.tsv"] == "8841823" and lines["triples.train.small.tsv"] == "39780811"
