# Two rounds of configs/squad-plus.sh: the second trains on negatives that the first one's model ranks high.
# Beside what configs/squad.sh reads, SQUAD has qrels.train.tsv.
source configs/squad-plus.sh
OUT=experiments/squad-mined
MINE=(--ranks 5 100 --margin 0.95 --negatives 1)

first_round() {  # in OUT: a model, and how it ranks the training queries
    tokens "$BASE_MODEL" --queries "$TRAIN_QUERIES" --triples "$TRIPLES"
    train
    index
    stage "$OUT/train.run" python retrieve.py --model "$MODEL" --index_dir "$OUT/index" --queries "$TRAIN_QUERIES" \
        --output "$OUT/train.run" --k 100
}

prepare() {
    OUT=$OUT/first MODEL= first_round  # for its time only
    stage "$OUT/mined.jsonl" python scripts/mine.py --run "$OUT/first/train.run" --qrels "$SQUAD/qrels.train.tsv" \
        --output "$OUT/mined.jsonl" "${MINE[@]}"
    TRIPLES=$OUT/mined.jsonl
}
