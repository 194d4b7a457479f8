"""The bash driver: every stage in order from raw text to metrics, then nothing left to do; and the final report."""

import json
import os
import subprocess

import pytest
from conftest import ROOT, TRAIN_STEPS

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


@pytest.mark.skipif(not (ROOT / ".venv/ready").exists(), reason="the driver would set up .venv")
def test_driver_runs_every_stage_once(toy_dir, encoder_dir, tmp_path):
    config, out = tmp_path / "config.sh", tmp_path / "out"
    config.write_text(CONFIG.format(out=out, toy=toy_dir, encoder=encoder_dir, steps=TRAIN_STEPS))
    command = ["bash", "scripts/run_colbert.sh", str(config)]

    def run() -> str:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    first = run()
    artifacts = [f"{out}/{name}" for name in ("tokens/meta.json", "model/meta.json", "embeddings/meta.json")]
    artifacts += [f"{out}/{name}" for name in ("index/meta.json", "colbert.run", "colbert.json")]
    assert [line.split(" s: ")[1] for line in first.splitlines() if " s: " in line] == artifacts
    metrics = json.loads((out / "colbert.json").read_text())
    assert metrics["judged_queries"] == 16 and 0 <= metrics["MRR@10"] <= 1
    table = next(line for line in first.splitlines() if line.startswith("ColBERT"))
    assert table.split()[1] == f"{metrics['MRR@10']:.4f}"
    times = {path: os.stat(path).st_mtime_ns for path in artifacts}
    assert run().splitlines()[:6] == [f"== done: {path}" for path in artifacts]
    assert times == {path: os.stat(path).st_mtime_ns for path in artifacts}


def test_driver_names_a_missing_configuration():
    command = ["bash", "scripts/run_colbert.sh", "configs/none.sh"]
    if not (ROOT / ".venv/ready").exists():
        pytest.skip("the driver would set up .venv")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "configs/none.sh" in done.stderr
