"""The bash driver: every stage in order from raw text to metrics, then nothing left to do; and the final report."""

import json
import os
import shutil
import subprocess
import sys

from conftest import ROOT, TRAIN_STEPS, run_stage_cli, succeed

CONFIG = """
OUT={out}
COLLECTION={toy}/collection.tsv TRAIN_QUERIES={toy}/queries.tsv TRIPLES={toy}/triples.tsv
DEV_QUERIES={toy}/queries.tsv DEV_QRELS={toy}/qrels.tsv
BASE_MODEL={encoder}
LAUNCH=(python)
TRAIN=(--dim 16 --max_steps {steps} --batch_size 8 --wandb_mode disabled)
INDEX=(--nlist 4)
SEARCH=(--k 10)
prepare() {{ :; }}
compare() {{
    python scripts/report.py ColBERT="$OUT/colbert.json" --show_run "$OUT/colbert.run" --collection "$COLLECTION" \\
        --queries "$DEV_QUERIES" --qrels "$DEV_QRELS"
}}
"""


ENVIRONMENT = os.environ | {"NANOCOLBERT_PYTHON": sys.executable}  # sets nothing up


def run_driver(*words, script="run_colbert.sh", repository=ROOT, env=ENVIRONMENT, **options):
    command = ["bash", str(repository / "scripts" / script), *map(str, words)]
    options = {"cwd": repository, "env": env, "stdin": subprocess.DEVNULL} | options
    return subprocess.run(command, capture_output=True, text=True, **options)


def made(done: subprocess.CompletedProcess) -> list[str]:
    """What a run made, in order."""
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split(" s: ")[1] for line in done.stdout.splitlines() if " s: " in line]


def test_driver_does_every_stage_once_and_again_what_a_changed_setting_changes(toy_dir, encoder_dir, tmp_path):
    config, out = tmp_path / "config.sh", tmp_path / "out"
    text = CONFIG.format(out=out, toy=toy_dir, encoder=encoder_dir, steps=TRAIN_STEPS)
    config.write_text(text)
    artifacts = [f"{out}/{name}" for name in ("tokens/meta.json", "model/meta.json", "embeddings/meta.json")]
    artifacts += [f"{out}/{name}" for name in ("index/meta.json", "colbert.run", "colbert.json")]

    first = run_driver(config)
    assert made(first) == artifacts
    metrics = json.loads((out / "colbert.json").read_text())
    assert metrics["judged_queries"] == 16 and 0 <= metrics["MRR@10"] <= 1
    table = next(line for line in first.stdout.splitlines() if line.startswith("ColBERT"))
    assert table.split()[1] == f"{metrics['MRR@10']:.4f}"

    times = {path: os.stat(path).st_mtime_ns for path in artifacts}
    second = run_driver(config.name, cwd=tmp_path)  # from elsewhere: found from where one stands
    assert made(second) == []
    assert second.stdout.splitlines()[:6] == [f"== done: {path}" for path in artifacts]
    assert times == {path: os.stat(path).st_mtime_ns for path in artifacts}

    config.write_text(text.replace("--nlist 4", "--nlist 2"))
    third = run_driver(config)
    assert made(third) == artifacts[3:]
    assert [line for line in third.stdout.splitlines() if line.startswith("== again: ")] == [
        f"== again: {out}/index (--nlist 2, was 4)",
        f"== again: {out}/colbert.run ({out}/index has changed)",
        f"== again: {out}/colbert.json ({out}/colbert.run has changed)",
    ]


def test_verify(tokens_dir, tmp_path):
    shutil.copytree(tokens_dir, tmp_path / "tokens")
    done = succeed(run_stage_cli("scripts/verify.py", tokens_dir, tmp_path / "tokens"))
    size = sum(path.stat().st_size for path in tokens_dir.rglob("*.npy"))
    assert json.loads(done.stdout)["bytes"] == 2 * size
    data = bytearray((tmp_path / "tokens/triples.npy").read_bytes())
    data[-1] ^= 4
    (tmp_path / "tokens/triples.npy").write_bytes(data)
    done = run_stage_cli("scripts/verify.py", tokens_dir, tmp_path / "tokens")
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert f"{tmp_path}/tokens/triples.npy: damaged" in done.stderr


def test_driver_names_a_missing_configuration():
    done = run_driver("configs/none.sh")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("run_colbert.sh: error: configs/none.sh: no such config")
    assert "configs/demo.sh" in last


def test_driver_says_what_it_is():
    done = run_driver("--help")
    assert done.returncode == 0 and done.stdout.startswith("From raw text to metrics: bash scripts/run_colbert.sh")
    assert len(done.stdout.splitlines()) == 4
