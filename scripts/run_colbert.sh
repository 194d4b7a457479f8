#!/usr/bin/env bash
# From raw text to metrics: bash scripts/run_colbert.sh [CONFIG [ARGUMENTS]]. CONFIG is a file of shell variables
# (configs/), its paths seen from the repository; some take arguments. Without one: MS MARCO where scripts/download.sh
# has put it, else the built-in demo. What is done is skipped, what was interrupted goes on, what another command or
# other inputs made is made again. An index of your own texts, without training: scripts/index.sh.
set -euo pipefail
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then sed -n '2,5s/^# //p' "$0"; exit; fi
source "$(dirname -- "$0")/stages.sh"
words=()
for word in "$@"; do words+=("$(absolute "$word")"); done
source "$(dirname -- "$0")/setup.sh"
default=configs/demo.sh
[ -e data/msmarco/collection.tsv ] && default=configs/msmarco.sh
config=${words[0]:-$default}
[ -f "$config" ] || fail "$config: no such config: give one of" configs/*.sh
set -- "${words[@]:1}"  # the config's
source "$config"

prepare
if [ -z "$MODEL" ]; then
    tokens "$BASE_MODEL" --queries "$TRAIN_QUERIES" --triples "$TRIPLES"
    train
else
    tokens "$MODEL"
fi
index
retrieve colbert --model "$MODEL" --index_dir "$OUT/index" "${SEARCH[@]}"
compare
