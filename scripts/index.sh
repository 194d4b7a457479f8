#!/usr/bin/env bash
# From documents to an index that is ready to search: bash scripts/index.sh COLLECTION [MODEL] [OUT]
#   COLLECTION  ids and texts: .tsv, .csv, .jsonl (each also .gz) or .parquet; titles are put before their texts
#   MODEL       a ColBERT of any layout: a folder, or a name on the hub (default: the demo's, experiments/demo/model)
#   OUT         folder for tokens/, embeddings/ and index/ (default: experiments/NAME of the repository, from NAME.csv)
# What is done is skipped, what was interrupted goes on, what another COLLECTION or MODEL concerns is made again.
# Vectors are kept beside their codes, for the best ranking: 36 KB a paragraph. Variables give stages more arguments:
#   TOKENS="--passage_words 120 --overlap 20"   tsv2mmap.py's: long documents are cut into passages
#   EMBEDDINGS="--bits 4" INDEX=""              doc2embedding.py's, build_index.py's: codes alone, 8 KB a paragraph
set -euo pipefail
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then sed -n '2,9s/^# //p' "$0"; exit; fi
source "$(dirname -- "$0")/stages.sh"
[ $# -ge 1 ] && [ $# -le 3 ] || fail "give COLLECTION [MODEL] [OUT], not $# words: see --help"
[ -f "$1" ] || fail "$1: no such file: give a collection (.tsv, .csv, .jsonl, .parquet)"
COLLECTION=$(absolute "$1") MODEL=$(absolute "${2:-}")
OUT=${3:-} from=$PWD
case $OUT in '' | /*) ;; *) OUT=$from/$OUT ;; esac
LAUNCH=(python) INDEX=(${INDEX---keep_vectors})
source "$(dirname -- "$0")/setup.sh"
model_or_demo "$MODEL"
[ -e "$MODEL/config.json" ] || [ ! -e "$MODEL/model/config.json" ] ||  # before what is there is made again
    fail "$MODEL: no model in it (config.json): did you mean $MODEL/model?"
if [ -z "$OUT" ]; then  # the name may be that of another collection
    name=$(basename -- "${COLLECTION%.gz}")
    OUT=experiments/${name%.*}
    [ ! -e "$OUT" ] || [ "$(readlink "$OUT/collection")" = "$COLLECTION" ] ||
        fail "$OUT: made from something else than $COLLECTION: give another OUT, after the MODEL"
    mkdir -p "$OUT"
    ln -sfn "$COLLECTION" "$OUT/collection"
fi

tokens "$MODEL"
index
cat << END
Ready to search. From here ($PWD), in Python:
    from search import Searcher
    Searcher("$OUT/index").search("your question", k=5)
or in a browser:
    python serve.py --index_dir $(printf %q "$OUT/index")
END
