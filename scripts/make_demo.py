"""Make the demo's retrieval collection from documentation that every installation has: docstrings.

A public docstring's first sentence is a query, the rest of it the passage that answers it. The sources of the packages
are parsed, never imported. Whole subpackages (`torch.nn`, `email`) go to training or to dev, so that the modules of the
dev queries are unseen in training; all queries search the whole collection. Ids are qualified names. Other versions of
the packages give another collection; the same versions give the same bytes.

Writes into --output_dir: collection.tsv, queries.{train,dev}.tsv, qrels.{train,dev}.tsv and triples.train.tsv
(qid, positive pid, negative pid), meta.json.

    python scripts/make_demo.py --output_dir data/demo      # 17 s on two cores, 2.5 MB
"""

import argparse
import ast
import importlib.util
import multiprocessing
import random
import re
import sys
import sysconfig
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanocolbert import cli
from nanocolbert.cli import InputError, run_stage
from nanocolbert.storage.artifact import check_output_dir, fingerprint, publish, write_meta

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "_vendor", "idlelib", "lib2to3", "distutils"}
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
MIN_QUERY_WORDS, MAX_QUERY_WORDS = 4, 30
MIN_PASSAGE_WORDS, MAX_PASSAGE_WORDS = 20, 60  # 60 words of code and prose are about 90 tokens
BM25_RANKS = 30  # hard negatives come from the passages at ranks 2 to 30


def package_folder(package: str) -> Path:
    """The folder of a package's sources, found without importing it; "stdlib" is the standard library's."""
    if package == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"--packages {package}: no such package here: install it or leave it out")
    return Path(spec.submodule_search_locations[0])


def read_docstrings(package: str) -> Iterator[tuple[str, str]]:
    """Yield (qualified name, docstring) of a package's public names, files sorted, private folders left out."""
    folder = package_folder(package)
    files, modules, prefix = [], [], () if package == "stdlib" else (package,)
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).parts):
        parts = path.relative_to(folder).parts
        private = any(part.startswith("_") and part != "_core" for part in parts[:-1])  # np.sum lies in numpy/_core
        if private or SKIPPED_FOLDERS & set(parts) or path.name.startswith(("modular_", "convert_")):
            continue  # the last two are transformers' second copies of what a modeling_ file says
        files.append(path)
        modules.append(".".join((*prefix, *parts[:-1], *(() if path.stem == "__init__" else (path.stem,)))))
    with multiprocessing.Pool() as pool:
        for found in pool.imap(parse_file, zip(files, modules, strict=True), chunksize=16):
            yield from found


def parse_file(file: tuple[Path, str]) -> list[tuple[str, str]]:
    """(qualified name, docstring) of what a file, of a module's name, defines; of a broken one nothing."""
    try:
        return list(walk_definitions(ast.parse(file[0].read_bytes()), file[1]))
    except (SyntaxError, ValueError):  # templates and deliberately broken files
        return []


def walk_definitions(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yield (qualified name, docstring) of a node and of the public classes, methods and functions within."""
    if docstring := ast.get_docstring(node):
        yield name, docstring
    if isinstance(node, (ast.Module, ast.ClassDef)):
        for child in node.body:
            if isinstance(child, DEFINITIONS) and not child.name.startswith("_"):
                yield from walk_definitions(child, f"{name}.{child.name}")


def clean(text: str) -> str:
    """Plain text on one line: examples, rules, reStructuredText and Markdown taken out."""
    text = re.sub(r"```.*?(```|\Z)", " ", text, flags=re.S)  # fenced code
    text = re.sub(r"^[ \t]*>>>.*?(?=\n[ \t]*\n|\Z)", " ", text, flags=re.S | re.M)  # a doctest, to the next blank line
    text = re.sub(r"^[ \t]*[-=~^*#]{3,}[ \t]*$", " ", text, flags=re.M)  # the rules under headings
    text = re.sub(r"\.\. (\w+)::", r"\1:", text)  # .. note::
    text = re.sub(r":[\w:]+:`~?([^`<]*?)\s*(?:<[^`]*>)?`", r"\1", text)  # :func:`~torch.add`
    text = re.sub(r"\[`*~?([^`\]]+)`*\](\([^)]*\))?", r"[\1]", text)  # [`~PreTrainedModel`], [text](url)
    text = re.sub(r"`+|\*\*(?=\S)(.+?)(?<=\S)\*\*|</?\w+>", lambda match: match[1] or "", text)
    return " ".join(text.split())


def split_docstring(docstring: str) -> tuple[str, str] | None:
    """(query, passage): the first sentence and the rest, cleaned; None where either has too few words."""
    first, _, rest = docstring.partition("\n\n")
    first, *more = re.split(r"(?<=[a-z)`]\.)\s+(?=[A-Z`\[])", first, maxsplit=1)
    query = clean(first).rstrip(".:")
    words = clean("\n\n".join((*more, rest))).split()
    if not MIN_QUERY_WORDS <= len(query.split()) <= MAX_QUERY_WORDS or len(words) < MIN_PASSAGE_WORDS:
        return None
    if re.match(r"\w+ ?\(", query):  # an argument described where a summary should stand
        return None
    passage = " ".join(words[:MAX_PASSAGE_WORDS])
    return None if query.lower() in passage.lower() else (query, passage)


class Repeats:
    """Tells texts that have mostly been seen: transformers documents every model with the same words."""

    def __init__(self, shingle: int):
        self.shingle, self.seen = shingle, set()

    def __call__(self, text: str) -> bool:
        # Names (CamelCase, under_scores, digits) are what differs between two copies of one sentence.
        words = [word for word in re.findall(r"\w+", text) if word[1:].isalpha() and word[1:].islower()] or [text]
        words = [word.lower() for word in words]
        shingles = {tuple(words[i : i + self.shingle]) for i in range(max(1, len(words) - self.shingle + 1))}
        repeated = 2 * len(shingles & self.seen) > len(shingles)
        self.seen |= shingles
        return repeated


def choose(packages: list[str], max_passages: int) -> dict[str, tuple[str, str]]:
    """{name: (query, passage)}, as many from each package as there are, in an order that does not follow the files."""
    names, passage_repeats, query_repeats = {}, Repeats(shingle=5), Repeats(shingle=MAX_QUERY_WORDS)
    ranked = []
    for package in packages:
        kept = []
        for name, docstring in read_docstrings(package):
            pair = split_docstring(docstring)
            if pair and name not in names and not passage_repeats(pair[1]) and not query_repeats(pair[0]):
                names[name] = pair
                kept.append(name)
        print(f"  {package}: {len(kept):,} docstrings that say something of their own")
        ranked += [(rank, package, name) for rank, name in enumerate(sorted(kept, key=fingerprint))]
    return {name: names[name] for _, _, name in sorted(ranked)[:max_passages]}


def split_by_group(names: list[str], n_dev: int) -> tuple[list[str], list[str]]:
    """(train names, dev names): whole subpackages in hashed order go to dev as long as they fit into `n_dev`."""
    groups = defaultdict(list)
    for name in names:
        groups[group_of(name)].append(name)
    dev = []
    for group in sorted(groups, key=fingerprint):
        if len(dev) + len(groups[group]) <= n_dev:
            dev += groups[group]
    return sorted(set(names) - set(dev)), sorted(dev)


def group_of(name: str) -> str:
    """The subpackage that is not divided: `torch.nn`, `transformers.models.bert`, `email`."""
    parts = name.split(".")
    depth = 1 + (parts[0] in ("numpy", "torch", "transformers")) + (parts[:2] == ["transformers", "models"])
    return ".".join(parts[:depth])


def mine_negatives(queries: tuple[str, ...], passages: tuple[str, ...], n_hard: int, seed: int) -> list[list[int]]:
    """For query i, whose passage is i: `n_hard` passages from BM25's ranks 2 to BM25_RANKS, and one at random."""
    import bm25s
    import Stemmer

    def words(texts):
        return bm25s.tokenize(list(texts), stopwords="en", stemmer=Stemmer.Stemmer("english"), show_progress=False)

    bm25 = bm25s.BM25(k1=0.9, b=0.4)
    bm25.index(words(passages), show_progress=False)
    ranked, _ = bm25.retrieve(words(queries), k=min(BM25_RANKS, len(passages)), show_progress=False)
    rng = random.Random(seed)
    negatives = []
    for i, ranking in enumerate(ranked.tolist()):
        hard = [j for j in ranking[1:] if j != i]
        hard = rng.sample(hard, min(n_hard, len(hard)))
        other = next(j for j in rng.sample(range(len(passages)), n_hard + 2) if j != i and j not in hard)
        negatives.append([*hard, other])
    return negatives


def write_lines(path: Path, rows) -> None:
    """Write rows as tab-separated lines and say how many."""
    lines = ["\t".join(row) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")
    print(f"  {path.name}: {len(lines):,} lines, {path.stat().st_size / 1e6:.2f} MB")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to make, e.g. data/demo")
    parser.add_argument("--packages", nargs="+", default=["stdlib", "numpy", "torch", "transformers"], help="sources")
    parser.add_argument("--max_passages", type=cli.positive, default=2000, help="passages in the collection")
    parser.add_argument("--dev_share", type=cli.share, default=0.15, help="share of passages that become dev queries")
    parser.add_argument("--n_hard", type=cli.positive, default=3, help="BM25 negatives of a query; one random is added")
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the negatives and the order of the triples")
    return parser.parse_args()


def main(args):
    started = time.time()
    check_output_dir(args.output_dir, "demo collection")
    print(f"reading docstrings of {', '.join(args.packages)}")
    pairs = choose(args.packages, args.max_passages)
    train, dev = split_by_group(list(pairs), round(len(pairs) * args.dev_share))
    if not dev or len(train) <= args.n_hard + 1:
        raise InputError(f"{len(train)} train and {len(dev)} dev passages: raise --max_passages or --dev_share")

    negatives = mine_negatives(*zip(*(pairs[name] for name in train), strict=True), args.n_hard, args.seed)
    triples = [(f"q:{name}", name, train[j]) for name, row in zip(train, negatives, strict=True) for j in row]
    random.Random(args.seed).shuffle(triples)

    print(f"writing {args.output_dir}")
    with publish(args.output_dir) as folder:
        write_lines(folder / "collection.tsv", ((name, pairs[name][1]) for name in sorted(pairs)))
        for split, names in (("train", train), ("dev", dev)):
            write_lines(folder / f"queries.{split}.tsv", ((f"q:{name}", pairs[name][0]) for name in names))
            write_lines(folder / f"qrels.{split}.tsv", ((f"q:{name}", "0", name, "1") for name in names))
        write_lines(folder / "triples.train.tsv", triples)
        counts = {"n_passages": len(pairs), "n_train": len(train), "n_dev": len(dev), "n_triples": len(triples)}
        made_from = fingerprint(*(path for path in sorted(folder.iterdir())))
        meta = write_meta(folder, "demo collection", made_from, started, args, **counts)
    return {"output_dir": str(args.output_dir), **counts, "seconds": meta["seconds"]}


if __name__ == "__main__":
    run_stage(main, cli.start(parse_args))
