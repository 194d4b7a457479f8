# A data set in BEIR's format, without training: bash scripts/run_colbert.sh configs/beir.sh FOLDER [MODEL]
# FOLDER has corpus.jsonl, queries.jsonl and qrels/test.tsv. MODEL is a ColBERT of any layout: a folder, or a name on
# the hub (default: the demo's). Beside it BM25, and MiniLM's mean-pooled vector.
[ -d "${1:-}" ] || fail "${1:-no FOLDER}: give a folder with corpus.jsonl, queries.jsonl and qrels/:" \
    "run_colbert.sh configs/beir.sh FOLDER [MODEL]"
FOLDER=$1
OUT=experiments/beir/$(basename -- "$FOLDER")
COLLECTION=$OUT/data/collection.jsonl
DEV_QUERIES=$OUT/data/queries.tsv
DEV_QRELS=$OUT/data/qrels.tsv
EVALUATE=(--measures nDCG@10 Recall@100)
source configs/minilm.sh
model_or_demo "${2:-}"

prepare() {
    stage "$OUT/data/meta.json" python scripts/import.py beir "$FOLDER" --output_dir "$OUT/data"
}

compare() {
    baseline bm25
    baseline mean_pool --model "$BASE_MODEL"
    python scripts/report.py BM25="$OUT/bm25.json" "MiniLM, mean-pooled=$OUT/mean_pool.json" ColBERT="$OUT/colbert.json"
}
