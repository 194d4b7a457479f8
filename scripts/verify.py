"""Check that folders are what the stages wrote: the checksum of every file, as recorded when it was published.

    python scripts/verify.py experiments/demo/tokens experiments/demo/model experiments/demo/index

reads   meta.json of tokens, models, embeddings or indexes, and all that it lists; state.json of an index
writes  nothing

About 2 GB/s a core, where the disk gives as much. Stages that read do the same with --verify.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanocolbert.cli import run_stage, start
from nanocolbert.storage.artifact import verify


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="what a stage wrote")
    return parser.parse_args()


def main(args) -> dict:
    started = time.time()
    size = sum(map(verify, args.folders))
    return {"folders": len(args.folders), "bytes": size, "seconds": round(time.time() - started, 2)}


if __name__ == "__main__":
    run_stage(main, start(parse_args))
