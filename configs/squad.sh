# SQuAD 1.1 as retrieval: MiniLM, id triples, 10,570 dev questions among all 20,958 paragraphs. Queries and passages are
# framed as v1 does, and trained on the labels alone; configs/squad-plus.sh is the better way.
# SQUAD is a folder with collection.tsv, queries.{train,dev}.tsv, qrels.dev.tsv and qidpidtriples.train.tsv.gz.
SQUAD=${SQUAD:-../shared/data/squad}
OUT=experiments/squad
COLLECTION=$SQUAD/collection.tsv
TRAIN_QUERIES=$SQUAD/queries.train.tsv
TRIPLES=$SQUAD/qidpidtriples.train.tsv.gz
DEV_QUERIES=$SQUAD/queries.dev.tsv
DEV_QRELS=$SQUAD/qrels.dev.tsv
source configs/minilm.sh
TRAIN=(--batch_size 32 --loss in_batch --similarity cosine --projection principal --dropout 0 --lr 1e-4
       --max_steps 1000 --warmup_steps 100 --schedule linear --save_steps 100 --wandb_mode disabled)

prepare() { :; }

compare() {
    baseline bm25
    baseline mean_pool --model "$BASE_MODEL"
    python scripts/report.py BM25="$OUT/bm25.json" "MiniLM, mean-pooled=$OUT/mean_pool.json" \
        ColBERT="$OUT/colbert.json" \
        --show_run "$OUT/colbert.run" --collection "$COLLECTION" --queries "$DEV_QUERIES" --qrels "$DEV_QRELS"
}
