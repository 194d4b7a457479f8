"""Embed every passage of the collection: unit token embeddings, fp16, punctuation dropped.

    python doc2embedding.py --tokens_dir tokens --model model --output_dir embeddings
    accelerate launch --multi_gpu --num_processes 8 doc2embedding.py ...   # the same files, eight times as fast
    python doc2embedding.py ... --bits 2                                    # compressed at once: a seventh of the disk

reads   tokens/ (tsv2mmap.py) and model/ (train.py)
writes  embeddings/: a ragged array (values.npy, offsets.npy) in the order of the collection, pids.npy, meta.json; with
        --bits no values.npy, but codec/, trained on a sample that is embedded first, and codes in parts/ (codec.py)

Which tokens are kept follows from the word pieces alone, so every passage's place is known before the first one is
embedded: parts of `--part_size` passages are written into one file, by any number of processes, and a run that was
killed goes on with the parts that are missing. Memory holds one part. Reference: 329 passages/s on each of 8 A100.
"""

import argparse
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from knobs import BITS


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens_dir", type=Path, required=True, help="what tsv2mmap.py wrote, with a collection")
    parser.add_argument("--model", required=True, type=Path, help="ColBERT model folder")
    parser.add_argument("--output_dir", type=Path, required=True, help="the embeddings folder to write or complete")
    parser.add_argument("--part_size", type=int, default=10_000, help="passages in a part (default 10000)")
    parser.add_argument("--bits", type=int, choices=BITS, help="compress at once, to so many bits a dimension")
    parser.add_argument("--nlist", type=int, help="--bits: centroids (default: near 4 sqrt(embeddings))")
    parser.add_argument("--seed", type=int, default=12345, help="--bits: of the sample that the codec is trained on")
    parser.add_argument("--tokens_per_batch", type=int, help="positions in a batch (default: by device)")
    parser.add_argument("--cpu", action=argparse.BooleanOptionalAction, default=False, help="use the CPU all the same")
    return parser.parse_args()


if __name__ == "__main__":  # before the imports that take seconds: --help, or a wrong flag, is answered at once
    ARGS = parse_args()

import numpy as np
import torch
import transformers
from accelerate import PartialState

from artifact import fingerprint, publish, read_meta, seen_from, write_json, write_meta
from cli import InputError, run_stage
from compute import fast_dtype
from model import ColBERT, model_fingerprint
from progress import progress
from ragged import NpyWriter, Ragged, allocate_npy


def layout(model: ColBERT, passages: Ragged, n_passages: int, args, folder: Path) -> None:
    """Write offsets.npy, and a values.npy of the right size, still without values, or a trained codec."""
    offsets = NpyWriter(folder / "offsets.npy", np.int64)
    offsets.append(np.zeros(1, np.int64))
    total = 0
    for start in range(0, n_passages, args.part_size):
        counts = model.kept_counts(*passages.slice(start, min(n_passages, start + args.part_size)))
        offsets.append(total + np.cumsum(counts))
        total += int(counts.sum())
    offsets.close()
    if not args.bits:
        allocate_npy(folder / "values.npy", np.float16, (total, model.config.dim))
        return
    from codec import MOST_CENTROIDS, PER_CENTROID, Codec, default_nlist, sample_passages

    (folder / "codec").mkdir()
    nlist = args.nlist or default_nlist(total, MOST_CENTROIDS)
    rows = sample_passages(np.load(folder / "offsets.npy", mmap_mode="r"), nlist * PER_CENTROID, args.seed)
    values, lengths, _ = model.embed_passages(*passages.gather(rows), args.tokens_per_batch)
    Codec.train(values, lengths, args.bits, nlist, args.seed, model.device).save(folder / "codec")


def claim(folder: Path, source: str, lay_out) -> None:
    """Make the folder, laid out, unless it is there from an earlier run; one made from something else is an error."""
    if not folder.exists():
        with publish(folder) as partial:
            lay_out(partial)
            (partial / "parts").mkdir()
            (partial / "source").write_text(source)
    elif not (folder / "source").is_file() or (folder / "source").read_text() != source:
        raise InputError(f"{folder}: holds something else, or embeddings of another model or collection: remove it")


def embed_part(model: ColBERT, passages: Ragged, start: int, stop: int, folder: Path, number: int, args, done) -> None:
    """Embed passages start ... stop - 1, write them to their place in values.npy, and mark the part as done.

    done(n) is called whenever n passages have been embedded.
    """
    tokens = passages.slice(start, stop)
    embeddings, counts, padding = model.embed_passages(*tokens, args.tokens_per_batch, done=done)
    offsets = np.load(folder / "offsets.npy", mmap_mode="r")[start : stop + 1]
    assert np.array_equal(counts, np.diff(offsets)), "kept tokens differ from the layout"
    if args.bits:
        from codec import Codec  # compiled loops, which nothing else here needs

        codes = Codec.load(folder / "codec").encode(embeddings, counts, model.device)
        for name, array in codes._asdict().items():
            np.save(folder / "parts" / f"{number}.{name}.npy", array)
    else:
        values = np.load(folder / "values.npy", mmap_mode="r")
        with open(folder / "values.npy", "r+b") as file:
            file.seek(values.offset + int(offsets[0]) * embeddings[:1].nbytes)
            file.write(embeddings.data.cast("B"))
    facts = {"passages": stop - start, "embeddings": len(embeddings), "padding": float(padding)}
    write_json(folder / "parts" / f"{number}.json", facts)


def main(args):
    started = time.time()
    if args.nlist and not args.bits:
        raise InputError("--nlist says nothing without --bits: leave it out, or give --bits")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # Only where it knows that it is on CPUs does accelerate let several processes find each other.
    state = PartialState(cpu=args.cpu or not torch.accelerator.is_available())
    tokens_meta = read_meta(args.tokens_dir, "tokens", "tsv2mmap.py")
    n_passages = tokens_meta["counts"]["pids"]
    if not n_passages:
        raise InputError(f"{args.tokens_dir}: holds no collection: run tsv2mmap.py with --collection")
    model_print = model_fingerprint(args.model)
    model = ColBERT.from_pretrained(args.model, device=state.device)
    model.check_tokens(args.model, args.tokens_dir, tokens_meta)
    settings = (args.bits, args.nlist, args.seed) if args.bits else ()
    source = fingerprint(model_print, tokens_meta["fingerprint"], args.part_size, *settings)
    passages = Ragged(args.tokens_dir / "passages")
    folder = args.output_dir
    if state.is_main_process:
        claim(folder, source, lambda partial: layout(model, passages, n_passages, args, partial))
    state.wait_for_everyone()

    starts = range(0, n_passages, args.part_size)
    missing = [number for number in range(len(starts)) if not (folder / "parts" / f"{number}.json").exists()]
    bar = progress(total=n_passages, show=state.is_main_process, desc="embed", unit=" passages", unit_scale=True)
    bar.update(max(0, n_passages - len(missing) * args.part_size))
    done = lambda n: bar.update(n * state.num_processes)  # noqa: E731
    clock, embedded = time.time(), 0
    # On a GPU two parts are under way: while one is filtered, copied and written, the GPU computes the other.
    with ThreadPoolExecutor(2 if state.device.type == "cuda" else 1) as threads:
        jobs = {}
        for number in missing[state.process_index :: state.num_processes]:
            start, stop = starts[number], min(n_passages, starts[number] + args.part_size)
            jobs[threads.submit(embed_part, model, passages, start, stop, folder, number, args, done)] = stop - start
        try:
            for job in as_completed(jobs):
                job.result()
                embedded += jobs[job]
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    bar.close()
    seconds = time.time() - clock
    state.wait_for_everyone()
    if not state.is_main_process:
        return None

    shutil.copyfile(args.tokens_dir / "pids.npy", folder / "pids.npy")
    collection = tokens_meta.get("collection_path")
    parts = [json.loads((folder / "parts" / f"{number}.json").read_text()) for number in range(len(starts))]
    facts = {
        "model": str(args.model),
        "model_fingerprint": model_print,
        "model_path": seen_from(folder, args.model),
        "collection_path": collection and seen_from(folder, args.tokens_dir.resolve() / collection),
        "tokens_fingerprint": tokens_meta["fingerprint"],
        "processes": state.num_processes,
        "passages": n_passages,
        "embeddings": sum(part["embeddings"] for part in parts),
        "dim": model.config.dim,
        **({"bits": args.bits, "nlist": len(np.load(folder / "codec" / "centroids.npy"))} if args.bits else {}),
        "dtype": "uint8" if args.bits else "float16",
        "compute_dtype": str(fast_dtype(state.device)).removeprefix("torch."),
        "padding": round(sum(part["padding"] * part["passages"] for part in parts) / n_passages, 4),
        "passages_per_second": round(embedded * state.num_processes / seconds, 1),
    }
    meta = write_meta(folder, "embeddings", source, started, args, **facts)
    return {"output_dir": str(folder), "seconds": meta["seconds"], **facts}


if __name__ == "__main__":
    run_stage(main, ARGS)
