# SQuAD as in configs/squad.sh, by a recipe that keeps what the encoder knew: docs/log.md, "Training past v1".
source configs/squad.sh
OUT=experiments/squad-plus
TOKENS+=(--query_maxlen 64 --doc_maxlen 256)
TRAIN=(--batch_size 16 --loss in_batch distil=2 --similarity cosine --projection principal --dim 256 --no-markers
       --expand_queries_to 0 --dropout 0 --lr 1e-5 --max_steps 120 --warmup_steps 10 --schedule linear --save_steps 50
       --wandb_mode disabled --teacher_similarity maxsim)
