"""tsv2mmap.py, doc2embedding.py and build_index.py as a user runs them: seconds, rate and peak memory, files written.

    python bench/bench_stages.py --sizes 30000 300000                                  # is memory flat?
    python bench/bench_stages.py --encoder bert-base --dim 128 --sizes 200000          # how fast, on a GPU

Memory that grew with the collection would be ten times as much in the second row. `private` is what the machine must
have: memory of all processes that no file backs. `rss` adds pages of memory-mapped files, which the kernel drops
when others need them. Weights do not matter here: they are random, of one layer of 64 unless --encoder says otherwise.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from measure import DATA, MINILM, add_results_flag, hardware, run_command, write_result

from model import ColBERT
from nanocolbert.storage.tsv import read_rows

ENCODERS = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 256},
    "bert-base": {},
}


def make_model(folder: Path, tokenizer_name, encoder: str, dim: int) -> Path:
    """Write a ColBERT on a random BERT with a real tokenizer; always the same weights."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_name)
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(tokenizer), **ENCODERS[encoder])
    transformers.BertModel(config).save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    ColBERT.from_base(str(folder / "encoder"), dim=dim).save_pretrained(folder / "model")
    return folder / "model"


def write_head(source, target: Path, n: int) -> int:
    """Write the first n lines of a collection; returns how many there were."""
    count = 0
    with open(target, "w") as out:
        for count, fields in read_rows(source, "pid, passage", "collection"):
            out.write("\t".join(fields) + "\n")
            if count == n:
                break
    return count


def main(args):
    machine = hardware()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows = []
    titles = ("passages", "writes MB", "seconds", "passages/s", "private MB", "rss MB")
    print(f"{'stage':18}" + "".join(f"{title:>11}" for title in titles))
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        scratch = Path(scratch)
        model = make_model(scratch, args.tokenizer, args.encoder, args.dim)
        for size in args.sizes:
            collection = scratch / "collection.tsv"
            folders = {name: scratch / f"{name}-{size}" for name in ("tokens", "embeddings", "index")}
            n = write_head(args.collection, collection, size)
            stages = {
                "tsv2mmap.py": {"collection": collection, "tokenizer": model, "workers": args.workers},
                "doc2embedding.py": {"tokens_dir": folders["tokens"], "model": model},
                "build_index.py": {"embedding_dir": folders["embeddings"], "method": args.method, "nlist": args.nlist},
            }
            for (script, flags), folder in list(zip(stages.items(), folders.values(), strict=True))[: args.stages]:
                measured = run_command(script, **flags, output_dir=folder)
                rate = measured.pop("output").get("passages_per_second", round(n / measured["seconds"], 1))
                new = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_nlink == 1]
                megabytes = round(sum(path.stat().st_size for path in new) / 1e6, 1)
                row = {"passages": n, "written_mb": megabytes, "passages_per_second": rate, **measured}
                rows.append({"stage": script, **row})
                order = ("passages", "written_mb", "seconds", "passages_per_second", "private_mb", "rss_mb")
                print(f"{script:18}" + "".join(f"{row[key]:11,}" for key in order), flush=True)
    write_result("stages", args, machine, rows=rows)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--collection", type=Path, default=DATA / "wiki-300k" / "collection.tsv.gz", help="pid, passage"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[30_000, 300_000], help="passages, the first lines")
    parser.add_argument("--tokenizer", default=MINILM, help="model name or folder (default: MiniLM)")
    parser.add_argument("--encoder", choices=ENCODERS, default="tiny", help="its shape (default tiny)")
    parser.add_argument("--stages", type=int, choices=(1, 2, 3), default=3, help="how many of them (default 3)")
    parser.add_argument("--dim", type=int, default=32, help="of an embedding (default 32, to save scratch)")
    parser.add_argument("--method", default="codes", help="build_index.py's --method (default codes)")
    parser.add_argument(
        "--nlist",
        type=int,
        help="build_index.py's --nlist (default: its own, 32768 lists at 300,000 passages: tens of minutes on two "
        "cores; 4096 takes a few)",
    )
    parser.add_argument("--workers", type=int, help="tsv2mmap.py's processes (default: all cores)")
    parser.add_argument(
        "--scratch",
        type=Path,
        help="folder for temporary files (default: the system's); 300,000 passages of 110 tokens need "
        "2.3 GB at --dim 32, 9 GB at --dim 128, and 0.6 GB for the index",
    )
    add_results_flag(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
