# Two rounds of configs/squad-plus.sh: the second trains on negatives that the first one's model ranks high.
# Beside what configs/squad.sh reads, SQUAD has qrels.train.tsv.
source configs/squad-plus.sh
OUT=experiments/squad-mined
MINE=(--ranks 5 100 --margin 0.95 --negatives 1)

prepare() {
    local first=$OUT/first
    stage "$first/tokens/meta.json" python tsv2mmap.py --collection "$COLLECTION" --queries "$TRAIN_QUERIES" \
        --triples "$TRIPLES" --tokenizer "$BASE_MODEL" --output_dir "$first/tokens" "${TOKENS[@]}"
    stage "$first/model/meta.json" "${LAUNCH[@]}" train.py --tokens_dir "$first/tokens" --base_model "$BASE_MODEL" \
        --output_dir "$first/model" --resume "${TRAIN[@]}"
    stage "$first/embeddings/meta.json" "${LAUNCH[@]}" doc2embedding.py --tokens_dir "$first/tokens" \
        --model "$first/model" --output_dir "$first/embeddings"
    stage "$first/index/meta.json" python build_index.py --embedding_dir "$first/embeddings" \
        --output_dir "$first/index" "${INDEX[@]}"
    stage "$first/train.run" python retrieve.py --model "$first/model" --index_dir "$first/index" \
        --queries "$TRAIN_QUERIES" --output "$first/train.run" --k 100
    stage "$OUT/mined.jsonl" python scripts/mine.py --run "$first/train.run" --qrels "$SQUAD/qrels.train.tsv" \
        --output "$OUT/mined.jsonl" "${MINE[@]}"
    TRIPLES=$OUT/mined.jsonl
}
