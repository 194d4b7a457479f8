"""Write a ColBERT checkpoint of any library in the layout of another: see docs/checkpoints.md.

    python scripts/convert.py --model colbert-ir/colbertv2.0 --output_dir model                # into this project's own
    python scripts/convert.py --model model --layout sentence-transformers --output_dir for_st     # out of it

reads   a folder, a name on the hub, or ColBERT-v1's .dnn file, in any layout that nanocolbert/checkpoints/ reads
writes  a model folder with its card, which the library that --layout names opens; the layout `nanocolbert` is this
        project's own, not that of Hannibal046's nanoColBERT, which is read (as `reference`) and not written
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanocolbert.checkpoints import LAYOUTS
from nanocolbert.cli import run_stage, start

HELP = "to write; the default, nanocolbert, is this project's own (not that of Hannibal046's nanoColBERT)"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="ColBERT checkpoint of any layout: folder, hub name, .dnn file")
    parser.add_argument("--revision", help="version of a model on the hub: branch, tag or commit")
    parser.add_argument("--layout", choices=LAYOUTS, default=LAYOUTS[0], help=HELP)
    parser.add_argument("--output_dir", type=Path, required=True, help="the model folder to write")
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--verify", action=switch, default=False, help="check the checksums of what is read first")
    return parser.parse_args()


if __name__ == "__main__":  # before the imports that take seconds: --help, or a wrong flag, is answered at once
    ARGS = start(parse_args)

from model import ColBERT
from nanocolbert.checkpoints.card import write_card
from nanocolbert.checkpoints.layouts import model_fingerprint
from nanocolbert.storage.artifact import check_output_dir, publish, verify, write_json, write_meta
from nanocolbert.storage.checksums import sums_of


def main(args):
    started = time.time()
    check_output_dir(args.output_dir, "model", args.model)
    if args.verify:
        verify(args.model)
    model = ColBERT.from_pretrained(args.model, revision=args.revision, device="cpu")
    with publish(args.output_dir) as folder:
        model.save_pretrained(folder, layout=args.layout)
        write_card(folder, args.layout, model, args.output_dir.name)
        facts = {"layout": args.layout, "converted_from": args.model}
        if model.meta is None:
            write_meta(folder, "model", model_fingerprint(folder), started, args, **facts)
        else:  # what is known of its training stays
            meta = {**model.meta, "kind": "model", **facts, "files": sums_of(folder)}
            write_json(folder / "meta.json", meta, summed=True)
    return {"output_dir": str(args.output_dir), "layout": args.layout, "dim": model.config.dim}


if __name__ == "__main__":
    run_stage(main, ARGS)
