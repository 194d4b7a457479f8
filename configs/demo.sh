# The built-in demo: docstrings of the installed packages as passages, their summaries as queries; nothing to download.
DATA=data/demo
OUT=experiments/demo
COLLECTION=$DATA/collection.tsv
TRAIN_QUERIES=$DATA/queries.train.tsv
TRIPLES=$DATA/triples.train.tsv
DEV_QUERIES=$DATA/queries.dev.tsv
DEV_QRELS=$DATA/qrels.dev.tsv
source configs/minilm.sh
TRAIN+=(--max_steps 16 --warmup_steps 4 --save_steps 8)

prepare() {
    stage "$DATA/meta.json" python scripts/make_demo.py --output_dir "$DATA"
}

compare() {
    baseline bm25
    stage "$OUT/untrained/meta.json" python train.py --tokens_dir "$OUT/tokens" --base_model "$BASE_MODEL" \
        --output_dir "$OUT/untrained" "${TRAIN[@]}" --max_steps 0
    stage "$OUT/untrained-embeddings/meta.json" python doc2embedding.py --tokens_dir "$OUT/tokens" \
        --model "$OUT/untrained" --output_dir "$OUT/untrained-embeddings"
    retrieve untrained --model "$OUT/untrained" --index_dir "$OUT/untrained-embeddings" --exact
    python scripts/report.py BM25="$OUT/bm25.json" "before training=$OUT/untrained.json" ColBERT="$OUT/colbert.json" \
        --show_run "$OUT/colbert.run" --collection "$COLLECTION" --queries "$DEV_QUERIES" --qrels "$DEV_QRELS"
}
