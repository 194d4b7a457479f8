# MS MARCO by ColBERTv2's recipe (arXiv 2112.01488): 64 passages a query, a cross-encoder's scores of them distilled.
# EXAMPLES are rows `[qid, [pid, score], ...]` of MS MARCO's ids, such as Stanford's 64-way examples.json.
source configs/msmarco.sh
EXAMPLES=${EXAMPLES:-data/msmarco/examples.64.json}
OUT=experiments/msmarco-v2
TRIPLES=$EXAMPLES
TOKENS+=(--nway 64)
TRAIN=(--max_steps 400000 --batch_size 32 --lr 1e-5 --warmup_steps 20000 --schedule linear --loss kl in_batch
       --similarity cosine --cached_parts 4 --shuffle)
INDEX=()
SEARCH=(--k 1000)

prepare() {
    [ -e "$EXAMPLES" ] || fail "$EXAMPLES: not there: give 64-way rows as EXAMPLES=FILE (scripts/score.py makes some)"
    bash scripts/download.sh data/msmarco
}
