"""Command lines: number types, errors in one line, and how a signal ends a stage."""

import argparse
import errno
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from nanocolbert import cli


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (cli.positive, ["1", "400000"], ["0", "-5", "1.5", "x", "", "nan", "9" * 30]),
        (cli.count, ["0", "7"], ["-1", "1e3", "inf"]),
        (cli.seed, ["0", "4294967295"], ["-1", "4294967296"]),
        (cli.positive_float, ["1e-6", "3"], ["0", "-1", "nan", "inf", "x"]),
        (cli.not_negative_float, ["0", "2.5"], ["-0.1", "nan", "inf"]),
        (cli.share, ["0", "1", "0.5"], ["-0.1", "1.1", "nan"]),
        (cli.maxlen, ["4", "180"], ["3", "0", "-1", "x"]),
        (cli.word, ["run-1", "é"], ["my run", "", " a", "a\n", "a\0b"]),
    ],
)
def test_types(kind, good, bad):
    for text in good:
        assert str(kind(text)) == text or float(kind(text)) == float(text)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=r"is not|leave no room"):
            kind(text)


def test_shards():
    assert [cli.shard(text) for text in ("1/1", "8/8", "3/100")] == [(1, 1), (8, 8), (3, 100)]
    for text in ("0/2", "3/2", "1", "1/", "a/b", "-1/2", "1/2/3", " 1/2"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not i/n, the i-th of n"):
            cli.shard(text)


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/b"), "a/b: No space left on device: free some space"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "a"), "a: Permission denied: change its permissions"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "a"), "a: Read-only file system: give a place"),
        (MemoryError(), "out of memory: give smaller batches"),
        (cli.InputError("two\nlines"), "two lines"),
    ],
)
def test_what_can_be_mended_is_one_line(capsys, error, said):
    def stage(_):
        raise error

    with pytest.raises(SystemExit) as end:
        cli.run_stage(stage, None)
    shown = capsys.readouterr()
    assert end.value.code == 2 and shown.out == ""
    assert f": error: {said}" in shown.err and len(shown.err.splitlines()) == 1


SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
from nanocolbert import cli
def main(args):
    print("ready", flush=True)
    try:
        {work}
    finally:
        print("cleaned", flush=True)
cli.run_stage(main, cli.start(lambda: None))
"""
STUCK = "while True:\n            try: time.sleep(60)\n            except SystemExit: pass"
SOFT = "soft = cli.stop_softly()\n        while not soft: time.sleep(0.01)\n        sys.exit(128 + soft[0])"


def test_a_reader_that_has_gone_is_no_error():
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom nanocolbert import cli\n"
    script += "cli.run_stage(lambda _: {'done': sys.stdin.readline()}, None)"
    stage = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    stage.stdout.close()
    _, said = stage.communicate(b"a table\n")
    assert (stage.returncode, said) == (0, b"")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("work", ["time.sleep(60)", STUCK, SOFT])
def test_signals(tmp_path, work, number, code):
    (tmp_path / "stage.py").write_text(SCRIPT.format(root=str(ROOT), work=work))
    command = [sys.executable, str(tmp_path / "stage.py")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code
    if work == SOFT:
        assert (out, err) == ("cleaned\n", "")
    else:
        assert err == f"stage.py: ended by {number.name}\n" and (work == STUCK or out == "cleaned\n")


def test_second_signal_ends_a_soft_stop(tmp_path):
    work = "cli.stop_softly(); time.sleep(0.2); [time.sleep(1) for _ in range(60)]"
    (tmp_path / "stage.py").write_text(SCRIPT.format(root=str(ROOT), work=work))
    command = [sys.executable, str(tmp_path / "stage.py")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert process.wait(30) == 143 and process.stderr.read() == "stage.py: ended by SIGTERM\n"


def test_what_ends_a_forked_child_is_not_heard_by_its_parent(tmp_path):
    work = "child = os.fork() or time.sleep(60); os.kill(child, 15); code = os.waitpid(child, 0)[1]; time.sleep(0.5)"
    script = SCRIPT.format(root=str(ROOT), work=work + "; print(code, flush=True)").replace(
        "import sys", "import os, sys"
    )
    (tmp_path / "stage.py").write_text(script)
    done = subprocess.run([sys.executable, str(tmp_path / "stage.py")], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ready\n15\ncleaned\n", "")
