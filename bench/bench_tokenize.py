"""Triples of text to word pieces: tsv2mmap.py, the whole command, against the reference's way on the same file.

    python bench/bench_tokenize.py --tokenizer bert-base-uncased

The triples are SQuAD's id triples written out as texts, the form of MS MARCO's triples.train.small.tsv. How much is
won depends on how often a passage occurs, so it is reported: in MS MARCO 9 times (79.6 million places, 8.8 million
passages), in SQuAD's first 20,000 triples 2.5, first 85,000 9, in all 350,394 37. Ours is measured with the start of
the interpreter and its workers (the time for one triple, reported too), the reference without; its rate is the same
for every number of triples and is measured on the first size only. Needs about 2.5 kB of scratch a triple.
"""

import argparse
import gzip
import itertools
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import reference
from measure import DATA, MINILM, add_results_flag, hardware, run_command, spread, timed, write_result

from nanocolbert.storage.documents import read_queries


def write_text_triples(path, folder: Path, n_triples: int) -> tuple[int, float]:
    """Write the first n id triples of a collection's folder as texts; (how many, times a passage occurs)."""
    queries, passages = (read_queries(folder / name) for name in ("queries.train.tsv", "collection.tsv"))
    used, count = set(), 0
    with gzip.open(folder / "qidpidtriples.train.tsv.gz", "rt") as lines, open(path, "w") as out:
        for line in itertools.islice(lines, n_triples):
            qid, positive, negative = line.split()
            out.write(f"{queries[qid]}\t{passages[positive]}\t{passages[negative]}\n")
            used.update((positive, negative))
            count += 1
    return count, 2 * count / len(used)


def main(args):
    machine = hardware()
    tokenizer = reference.load_tokenizer(args.tokenizer)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # the reference's parallelism: the tokenizer's own threads
    rows = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        scratch, triples = Path(scratch), Path(scratch) / "triples.tsv"

        def run_ours() -> dict:
            return run_command(
                "tsv2mmap.py",
                triples=triples,
                triples_format="text",
                tokenizer=args.tokenizer,
                output_dir=scratch / "tokens",
                workers=args.workers,
            )

        write_text_triples(triples, args.data, 1)
        startup = run_ours()["seconds"]
        print(f"ours      {startup} s for one triple")
        for size in args.sizes:
            n, repeats = write_text_triples(triples, args.data, size)
            seconds = {"reference": [], "ours": []}
            sizes = {}
            for _ in range(args.repeats if not rows else 1):
                if not rows:
                    sizes["reference"], elapsed = timed(reference.tokenize_triples, triples, n, scratch, tokenizer)
                    seconds["reference"].append(elapsed)
                ours = run_ours()
                seconds["ours"].append(ours["seconds"])
                sizes["ours"] = ours["output"]["bytes"]
            for way in ("reference", "ours") if not rows else ("ours",):
                time = spread(seconds[way])
                rows.append(
                    {
                        "way": way,
                        "triples": n,
                        "passage_repeats": round(repeats, 1),
                        "seconds": time,
                        "triples_per_second": round(n / time["median"]),
                        "bytes_per_triple": round(sizes[way] / n, 1),
                    }
                )
                row = rows[-1]
                row["speed_ratio"] = round(row["triples_per_second"] / rows[0]["triples_per_second"], 2)
                row["size_ratio"] = round(rows[0]["bytes_per_triple"] / row["bytes_per_triple"], 2)
                print(
                    f"{way:9} {n:8,} triples (a passage {row['passage_repeats']:4} times) {time['median']:8.2f} s "
                    f"[{time['low']:.2f}, {time['high']:.2f}] {row['triples_per_second']:8,} triples/s "
                    f"{row['bytes_per_triple']:6} bytes each: {row['speed_ratio']} x as fast, "
                    f"{row['size_ratio']} x smaller",
                    flush=True,
                )
    write_result("tokenize", args, machine, startup_seconds=startup, rows=rows)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA / "squad", help="collection, queries.train, qidpidtriples")
    parser.add_argument("--tokenizer", default=MINILM, help="model name or folder (default: MiniLM)")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[20_000, 85_000, 350_394],
        help="triples to convert; both ways on the first, ours on all",
    )
    parser.add_argument("--repeats", type=int, default=3, help="alternating runs of the first size")
    parser.add_argument("--workers", type=int, help="tsv2mmap.py's processes (default: its own default, all cores)")
    parser.add_argument("--scratch", type=Path, help="folder for temporary files (default: the system's)")
    add_results_flag(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
