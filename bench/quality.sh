#!/usr/bin/env bash
# One way of training, measured on real collections: bash bench/quality.sh NAME [--seeds 1 2 ...], or --list
set -euo pipefail
source "$(dirname "$0")/../scripts/setup.sh"
exec python bench/quality.py "$@"
