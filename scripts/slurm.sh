#!/usr/bin/env bash
# A collection in N shards, each an index of its own, made by a job each: bash scripts/slurm.sh COLLECTION MODEL OUT N
#   OUT       shard i goes into OUT/i; all are searched by: python retrieve.py --index_dir OUT/*/index ...
#   SBATCH    more words for sbatch: SBATCH="--gres gpu:1 --mem 32G --time 8:00:00"
#   TOKENS, EMBEDDINGS, INDEX   more arguments of the stages: scripts/index.sh
# Shard 1 comes first, and trains the codec that all others take. A job that was cut off goes on when it is sent again.
# Other schedulers, or none: SHARD=i bash scripts/slurm.sh COLLECTION MODEL OUT N makes shard i here and now.
set -euo pipefail
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then sed -n '2,7s/^# //p' "$0"; exit; fi
source "$(dirname -- "$0")/stages.sh"  # TOKENS and EMBEDDINGS are arrays from here on
[ $# = 4 ] && [[ $4 =~ ^[1-9][0-9]*$ ]] || fail "give COLLECTION MODEL OUT N, N a whole number: see --help"
COLLECTION=$(absolute "$1") MODEL=$(absolute "$2") OUT=$(realpath -m -- "$3") N=$4
HERE=$(cd -- "$(dirname -- "$0")" && pwd)
[ -f "$COLLECTION" ] || fail "$1: no such file: give a collection (.tsv, .csv, .jsonl, .parquet)"
[[ $OUT != *[[:space:]*?[]* ]] || fail "$OUT: blanks, or one of *?[, in its name: give another OUT"
mkdir -p "$OUT" 2> /dev/null || fail "$OUT: cannot be made: give another OUT"
SHARD=${SHARD:-${SLURM_ARRAY_TASK_ID:-}}
if [ -z "$SHARD" ]; then
    command -v sbatch > /dev/null || fail "no sbatch here: run this where Slurm is; or set SHARD to 1, then to 2 ... $N"
    job=
    for word in bash "$HERE/slurm.sh" "$COLLECTION" "$MODEL" "$OUT" "$N"; do job+="'${word//\'/\'\\\'\'}' "; done
    job=(sbatch --parsable --job-name colbert --chdir "$OUT" ${SBATCH:-} --wrap "$job")
    first=$("${job[@]}" --array 1)
    echo "shard 1: job $first"
    [ "$N" = 1 ] || echo "shards 2 to $N: job $("${job[@]}" --array "2-$N" --dependency "afterok:$first")"
    exit
fi
[[ $SHARD =~ ^[1-9][0-9]*$ ]] && [ "$SHARD" -le "$N" ] || fail "shard $SHARD: give 1 to $N"
index=${INDEX---keep_vectors} embeddings="${EMBEDDINGS[*]}"
if [ "$SHARD" != 1 ]; then
    [ -e "$OUT/1/index/meta.json" ] || fail "$OUT/1/index: not there: make shard 1 first, for its codec"
    if [[ " $embeddings" == *" --bits"* ]]; then embeddings+=" --codec $OUT/1/index"
    elif [[ $index != *ivfpq* ]]; then index+=" --codec $OUT/1/index"; fi
fi
exec env INDEX="$index" EMBEDDINGS="$embeddings" TOKENS="${TOKENS[*]} --shard $SHARD/$N" \
    bash "$HERE/index.sh" "$COLLECTION" "$MODEL" "$OUT/$SHARD"
