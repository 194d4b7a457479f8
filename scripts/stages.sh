# Sourced by run_colbert.sh, index.sh and slurm.sh: the stages, each of which is skipped where it is done (scripts/stage.py).
# They read what a config sets: OUT, COLLECTION, MODEL, LAUNCH, INDEX, DEV_QUERIES, DEV_QRELS; and these, if it does.
DEMO_MODEL=experiments/demo/model
MODEL=  # one that is trained already
TOKENS=(${TOKENS:-}) EMBEDDINGS=(${EMBEDDINGS:-})  # more arguments of tsv2mmap.py and doc2embedding.py, as the user says
EVALUATE=()  # and of evaluate.py

fail() { echo "$(basename -- "$0"): error: $*" >&2; exit 2; }

absolute() {  # print a path from the root on (setup.sh leaves the folder it is given from), other words as they are
    if [ -e "$1" ]; then realpath -- "$1"; else echo "$1"; fi
}

model_or_demo() {  # model_or_demo [MODEL]: set MODEL to it, by default to the demo's
    MODEL=${1:-$DEMO_MODEL}
    [ -n "${1:-}" ] || [ -e "$DEMO_MODEL/meta.json" ] || fail "$DEMO_MODEL: not there yet:" \
        "run bash scripts/run_colbert.sh configs/demo.sh (minutes), or give a MODEL: a folder, or a name on the hub"
}

stage() {  # stage FILE COMMAND...: run COMMAND, which ends by writing FILE, unless that is done
    python scripts/stage.py "$OUT" "$@"
}

tokens() {  # tokens MODEL ARGUMENTS...: the collection as word pieces of a model
    stage "$OUT/tokens/meta.json" python tsv2mmap.py --collection "$COLLECTION" --tokenizer "$1" \
        --output_dir "$OUT/tokens" "${@:2}" "${TOKENS[@]}"
}

train() {  # the tokens' triples by TRAIN, into $OUT/model, which is MODEL from then on
    MODEL=$OUT/model
    stage "$MODEL/meta.json" "${LAUNCH[@]}" train.py --tokens_dir "$OUT/tokens" --base_model "$BASE_MODEL" \
        --output_dir "$MODEL" --resume "${TRAIN[@]}"
}

index() {  # the embeddings of the tokens by MODEL, and an index of them
    stage "$OUT/embeddings/meta.json" "${LAUNCH[@]}" doc2embedding.py --tokens_dir "$OUT/tokens" --model "$MODEL" \
        --output_dir "$OUT/embeddings" "${EMBEDDINGS[@]}"
    stage "$OUT/index/meta.json" python build_index.py --embedding_dir "$OUT/embeddings" --output_dir "$OUT/index" \
        "${INDEX[@]}"
}

retrieve() {  # retrieve NAME ARGUMENTS...: search the dev queries into $OUT/NAME.run, measure into NAME.json
    stage "$OUT/$1.run" python retrieve.py --queries "$DEV_QUERIES" --output "$OUT/$1.run" "${@:2}"
    measure "$1"
}

measure() {  # measure NAME: the dev queries' ranking in $OUT/NAME.run, into NAME.json
    stage "$OUT/$1.json" python evaluate.py --qrels "$DEV_QRELS" --run "$OUT/$1.run" --output "$OUT/$1.json" \
        "${EVALUATE[@]}"
}
