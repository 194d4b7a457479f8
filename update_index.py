"""Add passages to a compressed index, delete passages from it, or compact it; nothing is rebuilt.

    python update_index.py --index_dir index --add more.tsv                   # pid, passage; or .csv, .jsonl, ...
    python update_index.py --index_dir index --add more.tsv --replace         # also of passages that are there
    python update_index.py --index_dir index --delete pids.txt                # one id a line
    python update_index.py --index_dir index --compact                        # one segment, the deleted left out

Whoever searches meanwhile goes on with the index as it was opened. A process killed at any time leaves the index before
the change, or the one after it. Passages are coded with the index's own centroids and codewords: build the index anew
once most of it is of another kind than what it was trained on.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from nanocolbert import cli
from nanocolbert.cli import InputError, run_stage


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index_dir", type=Path, required=True, help="what build_index.py wrote")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--add", type=Path, help="collection of new passages, in any format of tsv2mmap.py")
    parser.add_argument(
        "--replace", action="store_true", help="with --add: passages whose ids are there take their place"
    )
    what.add_argument("--delete", type=Path, help="ids of passages, one a line")
    what.add_argument("--compact", action="store_true", help="make one segment of all, without what was deleted")
    parser.add_argument("--id_field", help="for --add: field of the ids (default: a usual name)")
    parser.add_argument("--title_field", help="for --add: field of the titles (default: title)")
    parser.add_argument("--text_field", help="for --add: field of the texts (default: a usual name)")
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
from nanocolbert import indexing
from nanocolbert.checkpoints.layouts import check_made_by, model_of
from nanocolbert.compute import default_device
from nanocolbert.index import changes
from nanocolbert.index.compressed import CompressedIndex
from nanocolbert.indexing import Passage
from nanocolbert.storage.artifact import check_file, read_meta, verify
from nanocolbert.storage.cutting import read_passages
from nanocolbert.storage.documents import Fields
from nanocolbert.storage.tsv import check_id, read_lines


def read_new(args, cut: dict) -> Iterator[Passage]:
    """Yield the passages of the collection to be added, documents cut as those of the index were."""
    fields = Fields(args.id_field, args.title_field, args.text_field)
    passage = None
    for passage in read_passages(args.add, "collection: pid, passage", fields, **cut):
        yield Passage(f"{args.add}:{passage.number}", passage.id, passage.text, passage.metadata)
    if passage is None:
        raise InputError(f"{args.add}: empty, expected a collection")


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
    if args.replace and not args.add:
        raise InputError("--replace says nothing without --add: leave it out")
    cut = meta.get("documents", {})
    if args.compact:
        changed = changes.compact(args.index_dir)
    elif args.delete:
        changed = changes.delete(args.index_dir, *read_pids(args.delete), of_documents=bool(cut))
    else:
        folder = args.model or model_of(args.index_dir, meta)
        check_made_by(folder, args.index_dir, meta)
        check_file(args.add, "collection: pid, passage")
        if args.verify and (Path(folder) / "meta.json").is_file():  # it comes with checksums
            verify(folder)
        model = ColBERT.from_pretrained(folder, device="cpu" if args.cpu else default_device())
        model.check_tokenizer(args.index_dir, meta)
        is_file = args.add.is_file()  # a pipe can be read once only
        changed = indexing.add(args.index_dir, model, meta, lambda: read_new(args, cut), is_file, args.replace)
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
