"""One way of training, measured on real collections: bash bench/quality.sh NAME

    bash bench/quality.sh --list                       # the names, and what each changes
    bash bench/quality.sh bm25; bash bench/quality.sh mean_pool                    # what others are compared with
    bash bench/quality.sh squad-plus --seeds 1 2       # two trainings and what they find: hours on two cores
    bash bench/quality.sh squad-plus --for_choosing    # the collections that recipes are chosen on, not reported

reads   the recipe: a config and what a row changes in it; the shared collections (--data)
writes  results/quality/NAME.json: of each collection its measure for each seed, and paired tests against BM25 and the
        encoder's mean-pooled vector where these were measured before; of each training seconds and memory.
        experiments/quality/ holds what was made on the way, and is used again: remove NAME there to repeat it

Search is by the index with vectors (on SQuAD 0.988 of exact search's best ten: README). Passages that train.py saw are
SQuAD's alone.
"""

import argparse
import gzip
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from measure import DATA, REPO, command_flags, commit, hardware, run_command

from evaluate import compare, measure_method
from nanocolbert.storage.artifact import write_json
from nanocolbert.storage.runs import parse_measures, read_qrels
from nanocolbert.storage.tsv import open_bytes

WORK, RESULTS = REPO / "experiments" / "quality", REPO / "results" / "quality"
BASELINES = ("bm25", "mean_pool")
LONGEST = 256  # tokens of a passage that rows may read
K = 100  # passages that are retrieved: the measures look at ten


class Row(NamedTuple):
    """A recipe: a file of configs/, and arguments of train.py that come after the config's own."""

    config: str
    changes: tuple[str, ...] = ()
    says: str = ""
    without: tuple[str, ...] = ()  # flags of the config's that a row leaves out


class Collection(NamedTuple):
    """Where queries are searched, and what is measured."""

    folder: str
    queries: str
    qrels: str
    measure: str = "nDCG@10"


REPORTED = {
    "squad": Collection("squad", "queries.dev.tsv", "qrels.dev.tsv", "MRR@10"),
    "dl19": Collection("msmarco-dl19-20", "queries.dl19.tsv", "qrels.dl19.tsv"),
    "dl20": Collection("msmarco-dl19-20", "queries.dl20.tsv", "qrels.dl20.tsv"),
    "scifact": Collection("scifact", "queries.test.tsv", "qrels.test.tsv"),
    "cranfield": Collection("cranfield", "queries.tsv", "qrels.tsv"),
    "squadshifts-amazon": Collection("squadshifts-amazon", "queries.tsv", "qrels.tsv"),
}

HELD_OUT = 17_391  # SQuAD's train paragraphs from this pid on are not trained on: recipes are chosen on their questions
CHOOSING = ("choosing-squad", "choosing-scifact", "choosing-wiki")
CHOOSING = {name: Collection(name, "queries.tsv", "qrels.tsv") for name in CHOOSING}

PLUS, SHORT = "configs/squad-plus.sh", ("--max_steps", "60")
SUM = ("--teacher_similarity", "sum", "--lr", "3e-5")
ROWS = {
    "squad": Row("configs/squad.sh", says="as before: [MASK] fill, markers, in-batch negatives, lr 1e-4"),
    "untrained": Row(
        PLUS, ("--max_steps", "0"), "the recipe's start: principal directions, no fill, no markers, 256 dimensions"
    ),
    "untrained-128": Row(PLUS, ("--max_steps", "0", "--dim", "128"), "the same in 128 dimensions"),
    "untrained-v1": Row("configs/squad.sh", ("--max_steps", "0"), "untrained-128 with v1's fill and markers"),
    "squad-plus": Row(PLUS, says="labels and the encoder's own MaxSim, 256 dimensions"),
    "squad-plus-sum": Row(PLUS, SUM, "towards the sum with its mean-pooled vector, by three times the learning rate"),
    "squad-plus-128": Row(PLUS, ("--dim", "128"), "squad-plus in 128 dimensions"),
    "distil": Row(PLUS, ("--loss", "distil", *SUM, *SHORT), "squad-plus-sum without the labels, half of the steps"),
    "labels": Row(PLUS, ("--loss", "in_batch", *SHORT), "the labels alone, in as few", ("teacher_similarity",)),
}


# --------------------------------------------------------------------------------------------------------- from a row


def array(config: str, name: str) -> list[str]:
    """A bash array that a config sets."""
    script = f'source "{config}"; printf "%s\\0" "${{{name}[@]}}"'
    found = subprocess.run(["bash", "-c", script], cwd=REPO, check=True, capture_output=True, text=True).stdout
    return found.split("\0")[:-1]


def flags_of(words: list[str]) -> dict:
    """{flag: its words} of a command line; the last of a flag holds."""
    flags, name = {}, None
    for word in words:
        if word.startswith("--"):
            name = word[2:]
            flags[name] = []
        else:
            flags[name].append(word)
    return flags


def run(script: str, log: Path, **flags) -> dict:
    """Run a stage and measure it, unless `log` says that it was run by the same words; exits where by others."""
    words = command_flags(flags)
    if log.exists():
        found = json.loads(log.read_text())
        if found["words"] != words:
            sys.exit(f"{log}: was made by other arguments: remove {log.parent}")
        return found
    print(f"== {script} → {log.with_suffix('').relative_to(WORK)}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    found = {"words": words, **run_command(script, **flags)}
    write_json(log, found)
    return found


def training_file(data: Path) -> Path:
    """SQuAD's id triples without those that touch paragraphs held out."""
    path = WORK / "triples.tsv"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with gzip.open(data / "squad" / "qidpidtriples.train.tsv.gz", "rt") as triples, open(partial, "w") as file:
            file.writelines(line for line in triples if max(map(int, line.split()[1:])) < HELD_OUT)
        partial.rename(path)
    return path


def tokens_of(name: str, folder: Path, base: str, **more) -> Path:
    """The tokens of a collection, long enough for any row."""
    out = WORK / "tokens" / name
    made = {"collection": folder / "collection.tsv", "tokenizer": base, "output_dir": out}
    made |= {"query_maxlen": 64, "doc_maxlen": LONGEST, **more}
    run("tsv2mmap.py", out.with_suffix(".json"), **made)
    return out


def train(name: str, row: Row, seed: int, args) -> tuple[Path, dict]:
    """The model of a row and a seed, and what training it took."""
    squad, out = args.data / "squad", WORK / name / str(seed)
    base = array(row.config, "BASE_MODEL")[0]
    recipe = flags_of([*array(row.config, "TRAIN"), *row.changes])
    recipe = {flag: words for flag, words in recipe.items() if flag not in row.without}
    triples = {"queries": squad / "queries.train.tsv", "triples": training_file(args.data)}
    lengths = flags_of(array(row.config, "TOKENS"))
    name_of_tokens = "-".join(["training", *(word for words in lengths.values() for word in words)])
    tokens = tokens_of(name_of_tokens, squad, base, **triples, **{"query_maxlen": 32, "doc_maxlen": 180, **lengths})
    made = {"tokens_dir": tokens, "base_model": base, "output_dir": out / "model", **recipe, "seed": seed}
    return out / "model", run("train.py", out / "model.json", **made, shuffle=True)


def search(name: str, collection: Collection, model: Path, queries: Path, tokens: Path) -> Path:
    """The run of a model on a collection, by an index with vectors."""
    path, folder = model.parent / f"{name}.run", model.parent / "made"
    log = path.with_suffix(".json")
    embeddings, index = (folder / f"{collection.folder}-{what}" for what in ("embeddings", "index"))
    if not log.exists():  # then there may be no index any more
        made = {"tokens_dir": tokens, "model": model, "output_dir": embeddings}
        run("doc2embedding.py", embeddings.with_suffix(".json"), **made)
        made = {"embedding_dir": embeddings, "output_dir": index, "keep_vectors": True}
        run("build_index.py", index.with_suffix(".json"), **made)
    run("retrieve.py", log, model=model, index_dir=index, queries=queries, output=path, k=K)
    return path


def baseline(method: str, name: str, folder: Path, queries: Path) -> Path:
    """The run of a baseline on a collection."""
    path = WORK / method / f"{name}.run"
    flags = {"method": method, "collection": folder / "collection.tsv", "queries": queries, "output": path, "k": K}
    if method == "mean_pool":
        flags["model"] = array("configs/minilm.sh", "BASE_MODEL")[0]
    run("scripts/baselines.py", path.with_suffix(".json"), **flags)
    return path


# ------------------------------------------------------------------------------------------------------------ measured


def measured(name: str, collection: Collection, paths: list[Path], folder: Path) -> dict:
    """The measure of each seed's run, and the mean of the seeds against the baselines that have a run."""
    measure, qrels = collection.measure, read_qrels(folder / collection.qrels)
    how = (qrels, parse_measures([measure]), 1)
    of_runs, values = measure_method(paths, *how)
    found = {"measure": measure, "queries": len(qrels), "seeds": [round(run[measure], 4) for run in of_runs["runs"]]}
    for method in BASELINES:
        path = WORK / method / f"{name}.run"
        if path.exists() and path not in paths:
            change = compare(values, measure_method([path], *how)[1], 0)["measures"][measure]
            found[method] = {key: round(change[key], 4) for key in ("difference", "p")}
    return {**found, **commit()}


def found_by(name: str, seed: int, collections: dict[str, Collection], args) -> tuple[dict[str, Path], dict]:
    """The run of a row and a seed on each collection, and what training took."""
    training, paths, base = {}, {}, array("configs/minilm.sh", "BASE_MODEL")[0]
    if name in ROWS:
        model, facts = train(name, ROWS[name], seed, args)
        training = {"seed": seed, **{key: facts[key] for key in ("seconds", "processor_seconds", "private_mb")}}
    for of, collection in collections.items():
        folder = (WORK if args.for_choosing else args.data) / collection.folder
        queries = folder / collection.queries
        if name in BASELINES:
            paths[of] = baseline(name, of, folder, queries)
        else:
            paths[of] = search(of, collection, model, queries, tokens_of(collection.folder, folder, base))
    shutil.rmtree(WORK / name / str(seed) / "made", ignore_errors=True)  # gigabytes, and searched
    return paths, training


def main(args) -> None:
    if args.list or args.name not in (*BASELINES, *ROWS):
        for name, row in ROWS.items():
            print(f"{name:28} {row.says} ({' '.join((row.config, *row.changes))})")
        sys.exit(0 if args.list else f"{args.name}: none of {', '.join((*BASELINES, *ROWS))}")
    machine, collections = hardware(), {**REPORTED}
    if args.for_choosing:
        collections = CHOOSING
        write_choosing(args.data)
    if unknown := [name for name in args.only or () if name not in collections]:
        sys.exit(f"--only {unknown[0]}: none of {', '.join(collections)}")
    if args.only:
        collections = {name: collections[name] for name in args.only}
    seeds = args.seeds if args.name in ROWS else [0]
    made = [found_by(args.name, seed, collections, args) for seed in seeds]
    result = {"name": args.name, "hardware": machine}
    result |= ROWS[args.name]._asdict() if args.name in ROWS else {}
    result["training"] = [training for _, training in made if training]
    for name, collection in collections.items():
        folder = (WORK if args.for_choosing else args.data) / collection.folder
        found = measured(name, collection, [paths[name] for paths, _ in made], folder)
        result.setdefault("collections", {})[name] = found
        print(f"{name:20} {found['measure']:8} {' '.join(f'{value:.4f}' for value in found['seeds'])}")
    folder = RESULTS / "choosing" if args.for_choosing else RESULTS
    path = folder / f"{args.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and args.only:  # those measured before stay, with the commit that they were measured at
        before = json.loads(path.read_text())
        seeds_before, seeds_now = ([one["seed"] for one in found["training"]] for found in (before, result))
        if seeds_before != seeds_now:
            sys.exit(f"{path}: of other seeds: give the same ones, or leave out --only")
        result["collections"] = {**before["collections"], **result["collections"]}
    write_json(path, result)
    print(f"→ {path.relative_to(REPO)}")


# --------------------------------------------------------------------------------------------------- chosen on, only


def write_choosing(data: Path) -> None:
    """Write the collections that recipes are chosen on, none of whose queries is reported.

    squad: 1,500 train paragraphs that no row is trained on, 600 of their questions. scifact: train claims, among the
    passages judged for them and others that no test claim is judged with. wiki: second sentences of paragraphs, to
    find the paragraph without it.
    """
    rng = random.Random(7)
    if (WORK / CHOOSING["choosing-wiki"].folder).exists():
        return

    def rows(path) -> list[list[str]]:
        with open_bytes(data / path, "collection") as file:
            return [line.decode("utf-8", "replace").rstrip("\n").split("\t") for line in file]

    def write(name: str, passages, queries, judged) -> None:
        partial = WORK / f"{CHOOSING[name].folder}.partial"
        partial.mkdir(parents=True, exist_ok=True)
        for file, lines in (("collection", passages), ("queries", queries), ("qrels", judged)):
            (partial / f"{file}.tsv").write_text("".join("\t".join(line) + "\n" for line in lines))
        partial.rename(partial.with_suffix(""))

    texts, questions = rows("squad/collection.tsv"), dict(rows("squad/queries.train.tsv"))
    kept = {pid for pid, _ in texts if HELD_OUT <= int(pid) < HELD_OUT + 1500}
    judged = rng.sample([row for row in rows("squad/qrels.train.tsv") if row[2] in kept], 600)
    write(
        "choosing-squad",
        [row for row in texts if row[0] in kept],
        [[row[0], questions[row[0]]] for row in judged],
        judged,
    )

    texts, claims = rows("scifact/collection.tsv"), dict(rows("scifact/queries.train.tsv"))
    judged, tested = rows("scifact/qrels.train.tsv"), {row[2] for row in rows("scifact/qrels.test.tsv")}
    asked = set(rng.sample(sorted({row[0] for row in judged}), 300))
    judged = [row for row in judged if row[0] in asked]
    kept = {row[2] for row in judged}
    kept |= set(rng.sample([pid for pid, _ in texts if pid not in tested | kept], 900 - len(kept)))
    write(
        "choosing-scifact",
        [row for row in texts if row[0] in kept],
        [[q, t] for q, t in claims.items() if q in asked],
        judged,
    )

    passages, queries = [], []
    for pid, text in rng.sample(rows("wiki-300k/collection.tsv.gz")[200_000:], 5000):
        sentences = re.split(r"(?<=[.!?]) (?=[A-Z])", text)
        if len(sentences) > 3 and 8 <= len(sentences[1].split()) <= 25:
            passages.append([pid, " ".join((sentences[0], *sentences[2:]))])
            queries.append([pid, sentences[1]])
    passages, queries = passages[:1000], queries[:300]
    write("choosing-wiki", passages, queries, [[pid, "0", pid, "1"] for pid, _ in queries])


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="", help=f"{', '.join(BASELINES)}, or a row of --list")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="a training each (default 1)")
    parser.add_argument("--data", type=Path, default=DATA, help="the shared collections")
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--for_choosing", action=switch, default=False, help="the collections to choose on instead")
    parser.add_argument("--only", nargs="+", help="of the collections these only")
    parser.add_argument("--list", action=switch, default=False, help="say which rows there are")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
