# MS MARCO passage ranking by the reference's recipe (nanoColBERT): BERT-base, 400k steps of 32 text triples.
OUT=experiments/msmarco
COLLECTION=data/msmarco/collection.tsv
TRAIN_QUERIES=data/msmarco/queries.train.tsv
TRIPLES=data/msmarco/triples.train.small.tsv
DEV_QUERIES=data/msmarco/queries.dev.small.tsv
DEV_QRELS=data/msmarco/qrels.dev.small.tsv
BASE_MODEL=bert-base-uncased
GPUS=$(nvidia-smi -L 2> /dev/null | wc -l)
LAUNCH=(python)  # one process; of several the launcher is told all that it would else give advice about
[ "$GPUS" -gt 1 ] && LAUNCH=(python -m accelerate.commands.launch --multi_gpu --num_processes "$GPUS" --num_machines 1
    --mixed_precision no --dynamo_backend no)  # train.py finds out its own
TRAIN=(--max_steps 400000 --batch_size 32 --lr 3e-6 --similarity l2 --shuffle)
INDEX=(--method ivfpq --nlist 32768 --m 16 --nbits 8)
SEARCH=(--k 1000 --nprobe 32 --faiss_depth 1024)

prepare() {
    bash scripts/download.sh data/msmarco
}

compare() {
    python scripts/report.py ColBERT="$OUT/colbert.json"
}
