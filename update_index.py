"""Add passages to a compressed index, delete passages from it, or compact it; nothing is rebuilt.

    python update_index.py --index_dir index --model model --add more.tsv     # pid, passage
    python update_index.py --index_dir index --delete pids.txt                # one id a line
    python update_index.py --index_dir index --compact                        # one segment, the deleted left out

Whoever searches meanwhile goes on with the index as it was opened. A process killed at any time leaves the index before
the change, or the one after it. Passages are coded with the index's own centroids and codewords: build the index anew
once most of it is of another kind than what it was trained on.
"""

import argparse
import time
from pathlib import Path


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index_dir", type=Path, required=True, help="what build_index.py wrote")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--add", type=Path, help="collection of new passages: pid, passage (.tsv or .tsv.gz)")
    what.add_argument("--delete", type=Path, help="ids of passages, one a line")
    what.add_argument("--compact", action="store_true", help="make one segment of all, without what was deleted")
    parser.add_argument("--model", type=Path, help="for --add: the ColBERT model folder that the index was made from")
    parser.add_argument("--cpu", action=argparse.BooleanOptionalAction, default=False, help="use the CPU all the same")
    return parser.parse_args()


if __name__ == "__main__":  # before the imports that take seconds: --help, or a wrong flag, is answered at once
    ARGS = parse_args()

import transformers

import search
from artifact import check_file, read_meta
from cli import InputError, run_stage
from compute import default_device
from model import ColBERT, model_fingerprint
from tsv import batched, read_id_text

PASSAGES = 4096  # embedded and added at a time


def embed(model: ColBERT, path):
    """Yield (values (T, D) fp16, lengths (n,), pids) of the passages of a collection, block by block."""
    passages = ((pid, text) for _, pid, text in read_id_text(path, "collection: pid, passage"))
    for block in batched(passages, PASSAGES):
        pids, texts = zip(*block, strict=True)
        values, lengths, _ = model.embed_passages(*model.tokenize(list(texts), "passage"))
        yield values, lengths, list(pids)


def read_pids(path) -> list[str]:
    """The ids in a file, one a line. Raises InputError for an empty line."""
    pids = check_file(path, "ids of passages, one a line").read_text().splitlines()
    for number, pid in enumerate(pids, 1):
        if not pid or pid != pid.strip():
            raise InputError(f"{path}:{number}: {pid!r} is not an id: give one a line, without white space")
    return pids


def main(args):
    started = time.time()
    transformers.logging.set_verbosity_error()
    meta = read_meta(args.index_dir, "index", "build_index.py")
    if meta["method"] != "codes":
        raise InputError(f"{args.index_dir}: IVFPQ, which is not changed: build it anew, or with --method codes")
    if args.compact:
        changed = search.compact(args.index_dir)
    elif args.delete:
        changed = search.delete(args.index_dir, read_pids(args.delete))
    else:
        if not args.model:
            raise InputError("--add needs the model that the index was made from: give --model")
        if model_fingerprint(args.model) != meta["model_fingerprint"]:
            raise InputError(f"{args.index_dir}: made from another model ({meta['model']}) than {args.model}")
        check_file(args.add, "collection: pid, passage")
        model = ColBERT.from_pretrained(args.model, device="cpu" if args.cpu else default_device())
        changed = search.add(args.index_dir, embed(model, args.add))
    index = search.CompressedIndex(args.index_dir)
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
