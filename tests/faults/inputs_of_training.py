"""Bad inputs of what makes training files: mining, scoring, n-way rows, qrels, and losses without what they need."""

from .harms import first, last, recode, weights, without, write
from .inputs import Bad, output_rows, path_rows
from .world import STAGES

MINED, SCORED, TOKENS, TRAINED = "mined.jsonl", "scored.jsonl", "scored", "distilled"
NWAY = {  # a line that is put before the others of an n-way file
    "no JSON": '["q1", "p2"\n',
    "an object of other fields": '{"query": "q1"}\n',
    "a query alone": '["q1"]\n',
    "a number for a row": "7\n",
    "a score that is a word": '["q1", ["p2", "high"], ["p3", 1.0], ["p4", 1], ["p5", 1]]\n',
    "a score of NaN": '["q1", ["p2", NaN], ["p3", 1.0], ["p4", 1], ["p5", 1]]\n',
    "a score beyond fp32": '["q1", ["p2", 1e99], ["p3", 1.0], ["p4", 1], ["p5", 1]]\n',
    "pids with and without scores": '["q1", ["p2", 1.0], "p3"]\n',
    "an id of 1.5": '["q1", 1.5, "p3"]\n',
    "deep": "[" * 100_000 + "\n",
    "not UTF-8": b'["q\xff", "p2", "p3", "p4"]\n',
    "zeros": bytes(1000),
}


def rows() -> list[Bad]:
    found = [
        # scripts/mine.py
        *path_rows(MINED, "--run", "file"),
        *path_rows(MINED, "--qrels", "file"),
        *path_rows(MINED, "--teacher", "file"),
        *path_rows(MINED, "--answers", "file"),
        Bad(MINED, "--ranks backwards", "--ranks 10 1", "--ranks"),
        Bad(MINED, "--ranks beyond the run", "--ranks 900 1000", "--ranks"),
        Bad(MINED, "--margin without scores", "--margin 0", "--margin"),
        Bad(
            MINED, "answers without passages", "--answers answers.tsv", "--collection", write("answers.tsv", "q1\ta\n")
        ),
        Bad(MINED, "a teacher without scores", "--teacher mined.jsonl", "mined.jsonl:1"),
        Bad(MINED, "qrels of other queries", words="--run --qrels", setup=write("qrels.tsv", "q77\t0\tp1\t1\n")),
        Bad(MINED, "none relevant", words="qrels --qrels", setup=write("qrels.tsv", "q1\t0\tp1\t0\n")),
        Bad(MINED, "empty run", words="exact.run", setup=write("exact.run", "")),
        Bad(MINED, "run in UTF-16", words="exact.run:1", setup=recode("exact.run", "utf-16")),
        *(
            Bad(MINED, f"teacher: {name}", "--teacher scored.jsonl", "scored.jsonl:1", first("scored.jsonl", line))
            for name, line in NWAY.items()
        ),
        # scripts/score.py
        *path_rows(SCORED, "--teacher", "folder", ("tokens",)),
        *path_rows(SCORED, "--collection", "file"),
        *path_rows(SCORED, "--queries", "file"),
        *path_rows(SCORED, "--rows", "file"),
        Bad(SCORED, "an encoder without --similarity", drop="--similarity", words="--similarity"),
        Bad(SCORED, "--similarity of a ColBERT", "--teacher model", "--similarity"),
        Bad(SCORED, "unknown pid", words="mined.jsonl", setup=last("mined.jsonl", '["q1", "p2", "p99", "p3"]\n')),
        Bad(SCORED, "unknown qid", words="mined.jsonl:1", setup=first("mined.jsonl", '["q99", "p2", "p3", "p4"]\n')),
        Bad(SCORED, "no rows", words="mined.jsonl", setup=write("mined.jsonl", "\n")),
        Bad(SCORED, "teacher: NaN", words="encoder", setup=weights("encoder/model.safetensors", value=float("nan"))),
        Bad(SCORED, "teacher without weights", words="encoder", setup=without("encoder/model.safetensors")),
        *(
            Bad(SCORED, f"rows: {name}", words="mined.jsonl:1", setup=first("mined.jsonl", line))
            for name, line in NWAY.items()
            if "score" not in name  # they are passed over
        ),
        # tsv2mmap.py
        Bad(TOKENS, "--nway beyond a row", "--nway 5", "scored.jsonl:1"),
        Bad(TOKENS, "--nway of one", "--nway 1", "--nway", expect="either"),
        Bad(TOKENS, "a row of fewer", words="scored.jsonl", setup=last("scored.jsonl", '["q1", ["p2", 1.0]]\n')),
        Bad(TOKENS, "unknown pid", "--nway 1", "scored.jsonl:1", first("scored.jsonl", '["q1", ["p99", 1.0]]\n')),
        Bad(TOKENS, "as another format", "--triples_format scored", "scored.jsonl:1"),
        Bad(TOKENS, "as qrels", "--triples_format qrels", "scored.jsonl:1"),
        Bad(TOKENS, "qrels, none relevant", "--triples none.tsv", "none.tsv", write("none.tsv", "q1\t0\tp1\t0\n")),
        *(
            Bad(TOKENS, f"rows: {name}", words="scored.jsonl", setup=first("scored.jsonl", line))
            for name, line in NWAY.items()
        ),
        # train.py
        Bad(TRAINED, "kl without scores", "--tokens_dir tokens", "--loss"),
        Bad(TRAINED, "a loss twice", "--loss kl kl", "--loss"),
        Bad(TRAINED, "a loss of no weight", "--loss kl=0", "--loss"),
        Bad(TRAINED, "an unknown loss", "--loss hinge", "--loss"),
        Bad(TRAINED, "a teacher that none wants", "--loss kl --teacher encoder", "--teacher"),
        Bad(TRAINED, "a ColBERT as teacher", "--teacher model", "model"),
        *path_rows(TRAINED, "--teacher", "folder", ("tokens",)),
        Bad(TRAINED, "--cached_parts not divided", "--cached_parts 3", "--batch_size"),
    ]
    for output, paths in {
        MINED: ["exact.run", "qrels.tsv"],
        SCORED: ["mined.jsonl", "collection.tsv", "queries.tsv"],
        TRAINED: ["scored", "encoder"],
    }.items():
        found += output_rows(STAGES[output], paths)
    return found
