# SQuAD as in configs/squad.sh, by a recipe that keeps what the encoder knew: docs/training.md says what each part gave.
source configs/squad.sh
OUT=experiments/squad-plus
TOKENS+=(--doc_maxlen 256)
TRAIN=(--batch_size 16 --loss in_batch distil --teacher_similarity sum --similarity cosine --projection principal
       --no-markers --expand_queries_to 0 --dropout 0 --lr 1e-5 --max_steps 400 --warmup_steps 40 --schedule linear
       --save_steps 100 --wandb_mode disabled)
