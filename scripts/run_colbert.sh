#!/usr/bin/env bash
# From raw text to metrics: bash scripts/run_colbert.sh [CONFIG]. CONFIG is a file of shell variables (configs/), its
# paths seen from the repository; without one: MS MARCO where scripts/download.sh has put it, else the built-in demo.
# What is done is skipped, what was interrupted goes on, what another command or other inputs made is made again.
set -euo pipefail
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then sed -n '2,4s/^# //p' "$0"; exit; fi
if [ -e "${1:-}" ]; then set -- "$(realpath -- "$1")"; fi  # setup.sh leaves the folder it is given from
source "$(dirname -- "$0")/setup.sh"
default=configs/demo.sh
[ -e data/msmarco/collection.tsv ] && default=configs/msmarco.sh
config=${1:-$default}
if [ ! -f "$config" ]; then
    echo "run_colbert.sh: error: $config: no such config: give one of" configs/*.sh >&2
    exit 2
fi
source "$config"

stage() {  # stage FILE COMMAND...: run COMMAND, which ends by writing FILE, unless that is done (scripts/stage.py)
    python scripts/stage.py "$OUT" "$@"
}

retrieve() {  # retrieve NAME ARGUMENTS...: search the dev queries into $OUT/NAME.run, measure into NAME.json
    stage "$OUT/$1.run" python retrieve.py --queries "$DEV_QUERIES" --output "$OUT/$1.run" "${@:2}"
    stage "$OUT/$1.json" python evaluate.py --qrels "$DEV_QRELS" --run "$OUT/$1.run" --output "$OUT/$1.json"
}

prepare
stage "$OUT/tokens/meta.json" python tsv2mmap.py --collection "$COLLECTION" --queries "$TRAIN_QUERIES" \
    --triples "$TRIPLES" --tokenizer "$BASE_MODEL" --output_dir "$OUT/tokens"
stage "$OUT/model/meta.json" "${LAUNCH[@]}" train.py --tokens_dir "$OUT/tokens" --base_model "$BASE_MODEL" \
    --output_dir "$OUT/model" --resume "${TRAIN[@]}"
stage "$OUT/embeddings/meta.json" "${LAUNCH[@]}" doc2embedding.py --tokens_dir "$OUT/tokens" --model "$OUT/model" \
    --output_dir "$OUT/embeddings"
stage "$OUT/index/meta.json" python build_index.py --embedding_dir "$OUT/embeddings" --output_dir "$OUT/index" \
    "${INDEX[@]}"
retrieve colbert --model "$OUT/model" --index_dir "$OUT/index" "${SEARCH[@]}"
compare
