#!/usr/bin/env bash
# Lint and test everything: bash scripts/test.sh [pytest arguments]. Sets up .venv first where it is missing.
set -euo pipefail
source "$(dirname -- "$0")/setup.sh"
python -m ruff check .
python -m ruff format --check .
python -m pytest -q "$@"
