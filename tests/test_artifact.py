"""Artifacts appear when whole, or not at all."""

import argparse
import json
import time
from pathlib import Path

import pytest

from artifact import fingerprint, publish, read_meta, write_json, write_meta
from cli import InputError, run_stage


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
