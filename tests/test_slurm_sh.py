"""scripts/slurm.sh: a collection in shards, a job each, and what is asked of the scheduler."""

import os
import shlex
import subprocess

import numpy as np
import pytest
from conftest import call_stage, succeed
from test_index_sh import arguments, folder  # noqa: F401 (a fixture)
from test_scripts import ENVIRONMENT, made, run_driver

from search import Searcher

SBATCH = """#!/bin/sh
printf '%s\\n' "$@" >> {log}; echo "--" >> {log}
echo $(grep -c -e '^--$' {log})
"""


def run_slurm(*words, **options):
    return run_driver(*words, script="slurm.sh", **options)


@pytest.mark.parametrize(
    ("embeddings", "index"),
    [("", "--bits 4 --nlist 4 --sample 900"), ("--bits 4 --nlist 4", ""), ("", "--method ivfpq --nlist 4 --nbits 4")],
)
def test_shards_are_made_here_and_searched_together(toy_dir, model_dir, tmp_path, embeddings, index):
    words = toy_dir / "collection.tsv", model_dir, "out", 2
    for shard in (1, 2):
        env = ENVIRONMENT | {"EMBEDDINGS": embeddings, "INDEX": index, "TOKENS": "--workers 1", "SHARD": str(shard)}
        files = [f"{tmp_path}/out/{shard}/{stage}/meta.json" for stage in ("tokens", "embeddings", "index")]
        assert made(run_slurm(*words, cwd=tmp_path, env=env)) == files
    if "ivfpq" not in index:
        codebooks = [np.load(tmp_path / f"out/{shard}/index/representative_fine.npy") for shard in (1, 2)]
        assert np.array_equal(*codebooks)
        (tmp_path / "new.tsv").write_text("new\tthe red house\n")
        new = ("--cpu", "--index_dir", tmp_path / "out/1/index", "--add", tmp_path / "new.tsv")
        succeed(call_stage("update_index.py", *new))
        assert made(run_slurm(*words, cwd=tmp_path, env=env)) == []  # what is added to shard 1 is no other codec
        (tmp_path / "new.tsv").write_text("new\n")
        succeed(call_stage("update_index.py", *new[:3], "--delete", tmp_path / "new.tsv"))
    searcher = Searcher([tmp_path / "out/1/index", tmp_path / "out/2/index"], device="cpu")
    assert len(searcher) == 40 and any("drum" in hit.text for hit in searcher.search("drum", k=5))


def test_what_the_scheduler_is_asked_for(repository, folder, tmp_path):  # noqa: F811
    """The first shard, then the others, which wait for it; each makes its own, as the scheduler calls it."""
    log, bin = tmp_path / "asked", tmp_path / "bin"
    bin.mkdir()
    (bin / "sbatch").write_text(SBATCH.format(log=log))
    (bin / "sbatch").chmod(0o755)
    env = ENVIRONMENT | {"PATH": f"{bin}:{os.environ['PATH']}", "SBATCH": "--gres gpu:1 --mem 32G"}
    (folder / "a toy.tsv").rename(folder / "it's a toy.tsv")
    words, options = ("it's a toy.tsv", "a model", tmp_path / "out", 3), {"repository": repository, "cwd": folder}
    done = run_slurm(*words, env=env, **options)
    assert done.stdout == "shard 1: job 1\nshards 2 to 3: job 2\n" and done.returncode == 0
    first, others = (asked.split("\n") for asked in log.read_text().removesuffix("\n--\n").split("\n--\n"))
    assert first[-2:] == ["--array", "1"] and others[-4:] == ["--array", "2-3", "--dependency", "afterok:1"]
    assert first[:-2] == others[:-4] and first[5:10] == ["--gres", "gpu:1", "--mem", "32G", "--wrap"]
    (command,) = first[10:-2]
    assert shlex.split(command)[:2] == ["bash", str(repository / "scripts/slurm.sh")]
    for shard in (1, 3):
        env = ENVIRONMENT | {"SLURM_ARRAY_TASK_ID": str(shard)}
        subprocess.run(["sh", "-c", command], cwd="/", env=env, check=True, capture_output=True)
        tokens, index = (arguments(tmp_path / f"out/{shard}/{stage}/meta.json") for stage in ("tokens", "index"))
        assert tokens[tokens.index("--shard") + 1] == f"{shard}/3" and str(folder / "it's a toy.tsv") in tokens
        codec = ["--keep_vectors", "--codec", f"{tmp_path}/out/1/index"] if shard > 1 else ["--keep_vectors"]
        assert index[-len(codec) :] == codec


@pytest.mark.parametrize(
    ("words", "shard", "message"),
    [
        (("c", "m", "out", 1), "", "no sbatch here"),
        (("none", "m", "out", 1), "1", "none: no such file"),
        (("c", "m", "c", 1), "1", "c: cannot be made"),
        (("c", "m", "out[1]", 1), "1", "blanks, or one of"),
        (("c", "m", "out"), "1", "give COLLECTION MODEL OUT N, N a whole number"),
        (("c", "m", "out", "x"), "1", "give COLLECTION MODEL OUT N, N a whole number"),
        (("c", "m", "out", 2), "3", "shard 3: give 1 to 2"),
        (("c", "m", "out", 2), "2", "out/1/index: not there: make shard 1 first"),
        (("c", "m", "an out", 2), "1", "an out: blanks, or one of"),
    ],
)
def test_refusals(repository, tmp_path, words, shard, message):
    (tmp_path / "c").touch()
    done = run_slurm(*words, repository=repository, cwd=tmp_path, env=ENVIRONMENT | {"SHARD": shard})
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
