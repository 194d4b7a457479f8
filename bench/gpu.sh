#!/usr/bin/env bash
# All that needs a GPU, in five minutes on one H200: bash bench/gpu.sh [COLLECTION QUERIES]. Checks the GPU paths against
# the CPU's, then measures training, embedding and MaxSim beside the reference's way, at the shape of BERT-base. Result
# lines go to results/bench/. COLLECTION (pid, passage) and QUERIES (qid, query) default to the demo's.
set -euo pipefail
source "$(dirname "$0")/../scripts/setup.sh"
source configs/minilm.sh
python -c "import torch, sys; torch.cuda.is_available() or sys.exit('bench/gpu.sh: no GPU that PyTorch can use')"
collection=${1:-data/demo/collection.tsv}
queries=${2:-data/demo/queries.train.tsv}
[ -e "$collection" ] || python scripts/make_demo.py --output_dir data/demo

python -m pytest -q tests/test_gpu.py
texts=(--collection "$collection" --queries "$queries")
base=(--model "$BASE_MODEL" --bert_base --device cuda --threads 8 --warmup 10 --steps 20)
python bench/bench_train.py "${base[@]}" "${texts[@]}" --batch_size 32
python bench/bench_train.py "${base[@]}" "${texts[@]}" --batch_size 256 --n_triples 2560 --ways ours
python bench/bench_encode.py --model "$BASE_MODEL" --bert_base --collection "$collection" --n_passages 8000 \
    --device cuda --threads 8 --repeats 3
python bench/bench_stages.py --encoder bert-base --tokenizer "$BASE_MODEL" --dim 128 --collection "$collection" \
    --sizes 30000 --stages 2
python bench/bench_maxsim.py --device cuda --n_passages 10000 --batch_size 64
