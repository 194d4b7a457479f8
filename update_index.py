"""Add passages to a compressed index, delete passages from it, or compact it; nothing is rebuilt.

    python update_index.py --index_dir index --add more.tsv                   # pid, passage
    python update_index.py --index_dir index --delete pids.txt                # one id a line
    python update_index.py --index_dir index --compact                        # one segment, the deleted left out

Whoever searches meanwhile goes on with the index as it was opened. A process killed at any time leaves the index before
the change, or the one after it. Passages are coded with the index's own centroids and codewords: build the index anew
once most of it is of another kind than what it was trained on.
"""

import argparse
import time
from pathlib import Path

from nanocolbert import cli
from nanocolbert.cli import InputError, run_stage
from nanocolbert.index.knobs import LONGEST


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index_dir", type=Path, required=True, help="what build_index.py wrote")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--add", type=Path, help="collection of new passages: pid, passage (.tsv or .tsv.gz)")
    what.add_argument("--delete", type=Path, help="ids of passages, one a line")
    what.add_argument("--compact", action="store_true", help="make one segment of all, without what was deleted")
    parser.add_argument(
        "--model", help="for --add: the model that the index was made from (default: as the index says)"
    )
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--verify", action=switch, default=False, help="check the checksums of what is read first")
    parser.add_argument("--cpu", action=switch, default=False, help="use the CPU all the same")
    return parser.parse_args()


if __name__ == "__main__":  # before the imports that take seconds: --help, or a wrong flag, is answered at once
    ARGS = cli.start(parse_args)


from model import ColBERT
from nanocolbert.checkpoints.layouts import check_made_by, model_of
from nanocolbert.compute import default_device
from nanocolbert.index import changes
from nanocolbert.index.compressed import CompressedIndex
from nanocolbert.storage.artifact import check_file, read_meta, verify
from nanocolbert.storage.tsv import batched, check_id, read_id_text, read_lines

PASSAGES = 4096  # embedded and added at a time


def read_new(path):
    """Yield (line number, pid, text) of a collection. Raises InputError for a pid that comes twice."""
    lines = {}
    for number, pid, text in read_id_text(path, "collection: pid, passage"):
        if lines.setdefault(pid, number) != number:
            raise InputError(f"{path}:{number}: id {pid!r} a second time (first in line {lines[pid]}): leave one out")
        yield number, pid, text


def check_new(index: CompressedIndex, model: ColBERT, path) -> None:
    """Read a collection through, and raise InputError, naming the line, if a passage cannot be added."""
    for block in batched(read_new(path), PASSAGES):
        numbers, pids, texts = zip(*block, strict=True)
        there = index.rows(list(pids)) >= 0
        if there.any():
            at = int(there.argmax())
            raise InputError(
                f"{path}:{numbers[at]}: {index.folder} has a passage {pids[at]} already: delete it first, or leave "
                "it out"
            )
        if model.config.doc_maxlen >= LONGEST:
            counts = model.kept_counts(*model.tokenize(list(texts), "passage"))
            at = int(counts.argmax())
            if counts[at] >= LONGEST:
                raise InputError(
                    f"{path}:{numbers[at]}: passage {pids[at]} has {counts[at]} embeddings, at most {LONGEST - 1} can "
                    "be compressed: shorten it"
                )


def embed(model: ColBERT, path):
    """Yield (values (T, D) fp16, lengths (n,), pids) of the passages of a collection, block by block."""
    for block in batched(read_new(path), PASSAGES):
        _, pids, texts = zip(*block, strict=True)
        values, lengths, _ = model.embed_passages(*model.tokenize(list(texts), "passage"))
        yield values, lengths, list(pids)


def read_pids(path) -> tuple[list[str], list[str]]:
    """The ids in a file, one a line, and where each stands. Raises InputError for an empty line."""
    pids, places = [], []
    for number, pid in read_lines(path, "ids of passages, one a line"):
        check_id(path, number, pid)
        pids.append(pid)
        places.append(f"{path}:{number}")
    return pids, places


def main(args):
    started = time.time()
    meta = read_meta(args.index_dir, "index", "build_index.py", check=args.verify)
    if meta["method"] != "codes":
        raise InputError(f"{args.index_dir}: IVFPQ, which is not changed: build it anew, or with --method codes")
    if args.compact:
        changed = changes.compact(args.index_dir)
    elif args.delete:
        changed = changes.delete(args.index_dir, *read_pids(args.delete))
    else:
        folder = args.model or model_of(args.index_dir, meta)
        check_made_by(folder, args.index_dir, meta)
        check_file(args.add, "collection: pid, passage")
        if args.verify and (Path(folder) / "meta.json").is_file():  # it comes with checksums
            verify(folder)
        model = ColBERT.from_pretrained(folder, device="cpu" if args.cpu else default_device())
        model.check_tokenizer(args.index_dir, meta)
        # a pipe can be read once only
        check = (lambda index: check_new(index, model, args.add)) if args.add.is_file() else (lambda index: None)
        changed = changes.add(args.index_dir, embed(model, args.add), check)
    index = CompressedIndex(args.index_dir)
    return {
        "index_dir": str(args.index_dir),
        "changed": changed,
        "passages": int(index.alive().sum()),
        "segments": len(index.segments),
        "version": index.state["version"],
        "seconds": round(time.time() - started, 2),
    }


if __name__ == "__main__":
    run_stage(main, ARGS)
