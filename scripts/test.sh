#!/usr/bin/env bash
# Lint and test everything: bash scripts/test.sh [pytest arguments]. Sets up .venv first where it is missing.
# Where the CPU has AVX-512, the numeric tests run once more as on a CPU without it; where there is a GPU, so do its own.
set -euo pipefail
source "$(dirname -- "$0")/setup.sh"
python -m ruff check .
python -m ruff format --check .
if [ $# -gt 0 ]; then exec "$nanocolbert_python" -m pytest -q "$@"; fi
two=(-n 2 --dist loadfile)  # processes; the tests keep to one thread each
python -m pytest -q "${two[@]}"
if has_gpu; then python -m pytest -q tests/test_gpu.py; fi
if grep -qs avx512 /proc/cpuinfo; then
    numeric=(encoder index training test_{compute,doc2embedding,framing,maxsim,model,train}.py)
    export ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 NUMBA_CPU_NAME=x86-64-v3
    python -m pytest -q "${two[@]}" "${numeric[@]/#/tests/}"
fi
