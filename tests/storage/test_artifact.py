"""Artifacts appear when whole, or not at all."""

import argparse
import contextlib
import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from nanocolbert.cli import InputError, run_stage
from nanocolbert.storage.artifact import (
    check_output_dir,
    check_output_file,
    fingerprint,
    publish,
    read_json,
    read_meta,
    replacing,
    verify,
    write_json,
    write_meta,
)
from nanocolbert.storage.checksums import check_sums, span, sums_of


def test_publish_appears_when_whole(tmp_path):
    with publish(tmp_path / "sub/out") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "sub/out").exists()
    assert (tmp_path / "sub/out/a").read_text() == "1" and [p.name for p in (tmp_path / "sub").iterdir()] == ["out"]


@pytest.mark.parametrize("error", [InputError, KeyboardInterrupt, SystemExit])
def test_publish_leaves_nothing_and_spares_what_was_there(tmp_path, error):
    for there in (False, True):
        if there:
            (tmp_path / "out").mkdir()
            (tmp_path / "out/old").write_text("old")
        with pytest.raises(error), publish(tmp_path / "out") as folder:
            (folder / "a").write_text("1")
            raise error("x")
        assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == (["out", "out/old"] if there else [])


def test_publish_replaces_and_cleans_up_after_a_kill(tmp_path):
    for name in ("out", "out.partial", "out.retired"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"stale-{name}").write_text("x")
    with publish(tmp_path / "out") as folder:
        assert not list(folder.iterdir())
        (folder / "new").write_text("1")
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["out", "out/new"]


def test_meta(tmp_path):
    args = argparse.Namespace(output_dir=Path("x/y"), k=3)
    written = write_meta(tmp_path, "tokens", "abc", time.time() - 5, args, counts={"passages": 2})
    meta = read_meta(tmp_path, "tokens", "tsv2mmap.py")
    assert meta == written and meta["counts"] == {"passages": 2} and meta["args"] == {"output_dir": "x/y", "k": 3}
    assert 5 <= meta["seconds"] < 60 and meta["peak_memory_mb"] > 10 and set(meta["versions"]) >= {"torch", "numpy"}


def test_read_meta_says_what_to_run(tmp_path):
    with pytest.raises(InputError, match=r"not a finished tokens folder .*: run tsv2mmap\.py first"):
        read_meta(tmp_path, "tokens", "tsv2mmap.py")
    write_json(tmp_path / "meta.json", {"kind": "index"})
    with pytest.raises(InputError, match=r"holds 'index', not 'tokens': give the folder written by tsv2mmap\.py"):
        read_meta(tmp_path, "tokens", "tsv2mmap.py")
    (tmp_path / "meta.json").write_text('{"kind":')
    with pytest.raises(InputError, match=r"meta\.json: not JSON"):
        read_meta(tmp_path, "tokens", "tsv2mmap.py")


def test_write_json_replaces(tmp_path):
    for value in ({"a": 1}, [2]):
        write_json(tmp_path / "x.json", value)
        assert json.loads((tmp_path / "x.json").read_text()) == value
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_fingerprint(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert fingerprint("abc") == fingerprint(b"abc") == fingerprint(tmp_path / "f") and len(fingerprint("abc")) == 32
    assert len({fingerprint("ab", "c"), fingerprint("abc"), fingerprint("a", "bc"), fingerprint()}) == 4


def test_run_stage(capsys):
    run_stage(lambda args: {"n": args}, 3)
    assert capsys.readouterr().out == '{"n": 3}\n'

    def fail(args):
        raise InputError("file.tsv:3: found x: do y")

    with pytest.raises(SystemExit) as end:
        run_stage(fail, None)
    shown = capsys.readouterr()
    assert end.value.code == 2 and shown.out == ""
    assert shown.err.endswith(": error: file.tsv:3: found x: do y\n") and len(shown.err.splitlines()) == 1


# ------------------------------------------------------------------------------------------------------------ outputs


def tree(folder) -> dict:
    """What every path of a folder is, and holds."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def artifact_at(folder, kind="tokens"):
    folder.mkdir(parents=True)
    (folder / "a.npy").write_bytes(b"x" * 1000)
    (folder / "sub").mkdir()
    (folder / "sub/b.npy").write_bytes(bytes(range(256)))
    return write_meta(folder, kind, "abc", time.time(), argparse.Namespace())


@pytest.mark.parametrize(
    "prepare, message",
    [
        (lambda out: out.write_text("mine"), "a file, not a folder"),
        (lambda out: (out.mkdir(), (out / "thesis.tex").write_text("mine")), r"no tokens folder \(thesis\.tex\)"),
        (lambda out: artifact_at(out, "index"), "holds 'index'"),
        (lambda out: (artifact_at(out), (out / "notes.txt").write_text("mine")), r"notes\.txt in it is not a part"),
        (lambda out: (artifact_at(out), (out / "meta.json").write_text("{}")), "holds what is no tokens folder"),
    ],
)
def test_output_dir_that_is_not_the_stages_own_is_spared(tmp_path, prepare, message):
    prepare(tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(InputError, match=message):
        check_output_dir(tmp_path / "out", "tokens")
    assert tree(tmp_path) == before


def test_output_dir_that_may_be_written(tmp_path):
    assert check_output_dir(tmp_path / "new/one", "tokens") == tmp_path / "new/one"
    (tmp_path / "empty").mkdir()
    artifact_at(tmp_path / "old")
    (tmp_path / "link").symlink_to(tmp_path / "old")
    for name in ("empty", "old", "link"):
        check_output_dir(tmp_path / name, "tokens", None, tmp_path / "no such input")
    with publish(tmp_path / "link") as folder:
        (folder / "new").write_text("1")
    assert (tmp_path / "link").is_symlink() and [path.name for path in (tmp_path / "old").iterdir()] == ["new"]


@pytest.mark.parametrize("inside", ["data", "data/c.tsv"])
def test_output_that_holds_an_input(tmp_path, inside):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/c.tsv").write_text("1\ttext\n")
    (tmp_path / "other").symlink_to(tmp_path / "data")
    for output in ("data", "other", "data/../data"):
        with pytest.raises(InputError, match=r"holds what is read, .*data"):
            check_output_dir(tmp_path / output, "tokens", tmp_path / inside)
    with pytest.raises(InputError, match="holds what is read"):
        check_output_file(tmp_path / "other/c.tsv", tmp_path / "data/c.tsv")
    with pytest.raises(InputError, match="a folder: give a file"):
        check_output_file(tmp_path / "data")


def test_files_follow_links_and_devices_stay(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    with replacing(tmp_path / "link") as file:
        file.write(b"new")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with replacing(tmp_path / "pipe") as file:
        file.write(b"through")
    assert os.read(reader, 99) == b"through" and stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
    os.close(reader)
    assert (tmp_path / "target").read_text() == "new" and (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "target"]


@pytest.mark.parametrize("plant", ["symlink_to", "hardlink_to"])
def test_planted_links_are_not_followed(tmp_path, plant):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "folder").mkdir()
    getattr(tmp_path / "run.tsv.partial", plant)(tmp_path / "victim")
    with contextlib.suppress(InputError), replacing(tmp_path / "run.tsv") as file:
        file.write(b"new")
    if plant == "symlink_to":
        (tmp_path / "out.partial").symlink_to(tmp_path / "folder")
        with pytest.raises(InputError, match=r"out\.partial: a symbolic link"), publish(tmp_path / "out"):
            pass
    assert (tmp_path / "victim").read_text() == "mine" and (tmp_path / "folder").is_dir()


def test_one_at_a_time(tmp_path):
    for open_output in (publish, replacing):
        with open_output(tmp_path / "out") as mine:
            with pytest.raises(InputError, match="out: another process is writing it"), open_output(tmp_path / "out"):
                pass
            (mine / "a").write_text("1") if open_output is publish else mine.write(b"1")
        with open_output(tmp_path / "out"):
            pass
        shutil.rmtree(tmp_path / "out") if open_output is publish else (tmp_path / "out").unlink()
        assert not list(tmp_path.iterdir())


def test_killed_between_two_renames(tmp_path):
    (tmp_path / "out.retired").mkdir()
    (tmp_path / "out.retired/old").write_text("old")
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(InputError), publish(tmp_path / "out"):
        raise InputError("x")
    assert tree(tmp_path) == {"out": False, "out/old": b"old"}


@pytest.mark.parametrize("at", range(1, 10))
def test_a_signal_at_any_change_leaves_the_old_or_the_new(tmp_path, at):
    """In a process of its own: it sends itself a signal before the at-th change of a file."""
    (tmp_path / "out/sub").mkdir(parents=True)
    (tmp_path / "out/sub/a").write_text("old")
    done = subprocess.run([sys.executable, "-c", SIGNALLED, str(ROOT), str(tmp_path), str(at)], capture_output=True)
    assert done.returncode == 143 and done.stderr == b"-c: ended by SIGTERM\n", done.stderr
    found = tree(tmp_path)
    assert found in ({"out": False, "out/sub": False, "out/sub/a": value} for value in (b"old", b"new"))


SIGNALLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from nanocolbert import cli
from nanocolbert.storage.artifact import publish
cli.catch_signals()
left = int(sys.argv[3])
def hook(event, arguments):
    global left
    if event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGTERM)
sys.addaudithook(hook)
with publish(sys.argv[2] + "/out") as partial:
    (partial / "sub").mkdir()
    (partial / "sub/a").write_text("new")
left = min(left, 1)
hook("os.rename", ())
"""


def test_an_error_names_its_file(tmp_path):
    with pytest.raises(OSError, match="space") as error, publish(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as of a write
    assert error.value.filename == str(tmp_path / "out") and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------- checksums


def test_json_with_a_checksum(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1, "é": [2.5, None]}, summed=True)
    assert read_json(path) == {"a": 1, "é": [2.5, None]}
    path.write_text(path.read_text().replace("2.5", "2.6"))
    with pytest.raises(InputError, match=r"x\.json: damaged, or changed by hand"):
        read_json(path)
    for text in (b"", b"{", b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(text)
        with pytest.raises(InputError, match=r"x\.json: not JSON .*: restore it"):
            read_json(path)


def test_verify_finds_every_flipped_bit(tmp_path):
    artifact_at(tmp_path / "out")
    assert verify(tmp_path / "out") == 1256
    for name, at in (("a.npy", 0), ("a.npy", 999), ("sub/b.npy", 100)):
        data = bytearray((tmp_path / "out" / name).read_bytes())
        data[at] ^= 1
        (tmp_path / "out" / name).write_bytes(data)
        read_meta(tmp_path / "out", "tokens", "tsv2mmap.py")  # no size shows it
        with pytest.raises(InputError, match=rf"{name}: damaged within bytes 0 to \d+"):
            read_meta(tmp_path / "out", "tokens", "tsv2mmap.py", check=True)
        data[at] ^= 1
        (tmp_path / "out" / name).write_bytes(data)
    assert verify(tmp_path / "out") == 1256


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.unlink(), r"b\.npy: missing"),
        (lambda path: os.truncate(path, 100), r"b\.npy: 100 bytes, should be 256"),
        (lambda path: path.write_bytes(b"0" * 257), r"b\.npy: 257 bytes, should be 256"),
    ],
)
def test_opening_checks_sizes(tmp_path, damage, message):
    artifact_at(tmp_path / "out")
    damage(tmp_path / "out/sub/b.npy")
    with pytest.raises(InputError, match=message):
        read_meta(tmp_path / "out", "tokens", "tsv2mmap.py")


def test_sums_of_parts_that_are_known(tmp_path):
    (tmp_path / "v").write_bytes(b"headbody1body2")
    (tmp_path / "w.partial").write_bytes(b"half")
    spans = [span(b"head"), span(np.frombuffer(b"body1", np.uint8)), span(b"body2")]
    sums = sums_of(tmp_path, {"v": spans})
    assert sums == {"v": spans} and check_sums(tmp_path, sums) == 14
    (tmp_path / "v").write_bytes(b"headbody1body3")
    with pytest.raises(InputError, match="v: damaged within bytes 9 to 14"):
        check_sums(tmp_path, sums)


def test_published_files_are_readable_by_others(tmp_path):
    (tmp_path / "weights").write_bytes(b"x")
    (tmp_path / "weights").chmod(0o600)
    mask = os.umask(0o022)
    try:
        sums_of(tmp_path)
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "weights").stat().st_mode) == 0o644


def test_old_folders_open_and_cannot_be_verified(tmp_path):
    (tmp_path / "meta.json").write_text('{"kind": "tokens"}')
    assert read_meta(tmp_path, "tokens", "tsv2mmap.py") == {"kind": "tokens"}
    with pytest.raises(InputError, match="without checksums"):
        read_meta(tmp_path, "tokens", "tsv2mmap.py", check=True)
