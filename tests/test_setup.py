"""scripts/setup.sh with Pythons that only pretend: which is taken, what is said, what a failed set-up leaves."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

# A Python of the version, written beside it, that can make an environment of itself, and notes what pip is to install.
FAKE = """#!/bin/sh
if [ "$1" = -c ]; then
    case $2 in *version_info*) echo VERSION; exit RECENT ;; *ensurepip*) exit ENSUREPIP ;; esac
elif [ "$2" = venv ]; then
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
elif [ "$2" = pip ]; then
    echo "$*" >> "$LOG"
    case "$*" in *"$BROKEN"*) echo "pip: no such package" >&2; exit 1 ;; esac
fi
"""


class Setup:
    """A copy of the script in an oddly named folder, and a PATH of fake Pythons and the few tools it needs."""

    def __init__(self, folder):
        self.root, self.bin, self.log = folder / 'a "b" $c', folder / "bin", folder / "log"
        for path in (self.root / "scripts", self.bin):
            path.mkdir(parents=True)
        shutil.copy(ROOT / "scripts/setup.sh", self.root / "scripts")
        for path in ROOT.glob("requirements*.txt"):
            shutil.copy(path, self.root)
        for tool in ("bash", "sh", "cat", "cksum", "dirname", "mkdir", "touch", "rm", "sed", "grep", "cp", "sleep"):
            (self.bin / tool).symlink_to(shutil.which(tool))
        if shutil.which("flock"):
            (self.bin / "flock").symlink_to(shutil.which("flock"))

    def python(self, name: str, version: str, ensurepip: bool = True):
        text = FAKE.replace("VERSION", version).replace("RECENT", "01"[int(version.split(".")[1]) < 11])
        (self.bin / name).write_text(text.replace("ENSUREPIP", "10"[ensurepip]))
        (self.bin / name).chmod(0o755)

    def start(self, broken="nothing", then="command -v python", first='source "$0"', **environment) -> subprocess.Popen:
        environment |= {"PATH": str(self.bin), "LOG": str(self.log), "BROKEN": broken}
        script = f"set -euo pipefail; {first}; {then}"
        command = [str(self.bin / "bash"), "-c", script, str(self.root / "scripts/setup.sh")]
        return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, *arguments, **environment) -> tuple[int, str, str]:
        process = self.start(*arguments, **environment)
        out, err = process.communicate()
        return process.returncode, out, err

    def installs(self) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.write_text("")
        return lines


@pytest.fixture
def setup(tmp_path) -> Setup:
    return Setup(tmp_path)


WHICH = 'type -P python; python -c "print version_info"'


def test_a_python_that_is_too_old_is_one_line(setup):
    setup.python("python3", "3.10")
    code, out, err = setup.run()
    assert (code, out) == (2, "")
    assert err == f"setup.sh: error: needs Python 3.11 or later, found 3.10 at {setup.bin}/python3\n"
    assert setup.installs() == [] and not (setup.root / ".venv").exists()


def test_a_newer_python_beside_the_old_one_is_taken(setup):
    setup.python("python3", "3.9")
    setup.python("python3.12", "3.12")
    code, out, _ = setup.run(then=WHICH)
    assert code == 0 and out.splitlines()[1:] == [f"{setup.root}/.venv/bin/python", "3.12"]


def test_no_venv_package_is_one_line(setup):
    setup.python("python3", "3.11", ensurepip=False)
    code, _, err = setup.run()
    assert code == 2 and "python3-venv" in err and err.count("\n") == 1


def test_set_up_once_without_a_gpu_and_again_for_other_requirements(setup):
    setup.python("python3", "3.11")
    assert setup.run()[0] == 0
    torch, rest, demo = setup.installs()
    pinned = next(line.split()[0] for line in (ROOT / "requirements.txt").open() if line.startswith("torch=="))
    assert torch.endswith(f" --no-deps {pinned}+cpu") and "-r requirements.txt" in rest and "demo" in demo
    assert "-r requirements-serve.txt" in rest
    assert setup.run()[0] == 0 and setup.installs() == []
    with (setup.root / "requirements.txt").open("a") as file:
        file.write("another==1\n")
    assert setup.run()[0] == 0 and len(setup.installs()) == 3


def test_the_build_without_cuda_need_not_be_offered(setup):
    setup.python("python3", "3.11")
    assert setup.run(broken="+cpu")[::2] == (0, "")


@pytest.mark.parametrize("broken", ["requirements.txt", "requirements-demo.txt"])
def test_a_failed_set_up_is_not_taken_for_one_and_repaired(setup, broken):
    setup.python("python3", "3.11")
    code, out, err = setup.run(broken, then="echo entered")
    assert code == 2 and "run this again" in err and "entered" not in out
    assert not (setup.root / ".venv/ready").exists()
    (setup.root / ".venv/half-made").touch()
    setup.installs()
    assert setup.run()[0] == 0 and len(setup.installs()) == 3
    assert not (setup.root / ".venv/half-made").exists()


def test_a_failure_counts_where_set_e_does_not(setup):
    setup.python("python3", "3.11")
    process = setup.start("requirements.txt", first='if source "$0"; then echo entered; fi', then="true")
    assert "entered" not in process.communicate()[0]
    assert not (setup.root / ".venv/ready").exists()


def test_a_gpu_takes_its_own_builds_and_replaces_those_without(setup):
    setup.python("python3", "3.11")
    assert setup.run()[0] == 0
    (setup.root / ".venv/stale").touch()
    setup.installs()
    (setup.bin / "nvidia-smi").symlink_to(shutil.which("true"))
    assert setup.run()[0] == 0
    installs = setup.installs()
    assert "requirements-gpu.txt" in installs[0] and not any("+cpu" in line for line in installs)
    assert not (setup.root / ".venv/stale").exists()
    (setup.bin / "nvidia-smi").unlink()  # a machine that shares the folder
    assert setup.run()[0] == 0 and setup.installs() == []


@pytest.mark.skipif(not shutil.which("flock"), reason="needs flock")
def test_two_at_once_set_up_once(setup):
    setup.python("python3", "3.11")
    both = [setup.start() for _ in range(2)]
    assert [process.communicate() and process.returncode for process in both] == [0, 0]
    assert len(setup.installs()) == 3


def test_a_python_of_one_s_own_is_used_as_it_is(setup, tmp_path):
    then = 'python -c "import sys; print(sys.executable)"'
    code, out, err = setup.run(then=then, NANOCOLBERT_PYTHON=sys.executable)
    assert (code, out, err) == (0, f"{sys.executable}\n", "")
    assert not (setup.root / ".venv").exists()
    os.symlink(sys.executable, setup.bin / "python9")  # of any name
    assert setup.run(then='python -c "print(1)"', NANOCOLBERT_PYTHON="python9")[:2] == (0, "1\n")
    code, _, err = setup.run(NANOCOLBERT_PYTHON="/no/python")
    assert code == 2 and err == "setup.sh: error: NANOCOLBERT_PYTHON=/no/python: no such program\n"
