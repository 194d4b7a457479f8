"""Embed every passage of the collection: unit token embeddings, fp16, punctuation dropped.

    python doc2embedding.py --tokens_dir tokens --model model --output_dir embeddings
    accelerate launch --multi_gpu --num_processes 8 --num_machines 1 --mixed_precision no --dynamo_backend no \\
        doc2embedding.py ...                            # the same files, eight times as fast
    python doc2embedding.py ... --bits 2                                    # compressed at once: a seventh of the disk

reads   tokens/ (tsv2mmap.py) and model/ (train.py)
writes  embeddings/: a ragged array (values.npy, offsets.npy) in the order of the collection, pids.npy, meta.json; with
        --bits no values.npy, but codec/, trained on a sample that is embedded first, and codes in parts/ (codec.py)

Which tokens are kept follows from the word pieces alone, so every passage's place is known before the first one is
embedded: parts of `--part_size` passages are written into one file, by any number of processes, and a run that was
killed goes on with the parts that are missing. Memory holds one part. Reference: 329 passages/s on each of 8 A100.
"""

import argparse
import contextlib
import functools
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from nanocolbert import cli
from nanocolbert.cli import InputError, check_launch, positive, run_stage, seed
from nanocolbert.index.knobs import BITS, LONGEST


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens_dir", type=Path, required=True, help="what tsv2mmap.py wrote, with a collection")
    parser.add_argument("--model", required=True, help="ColBERT of any layout: folder, hub name, .dnn file")
    parser.add_argument("--output_dir", type=Path, required=True, help="the embeddings folder to write or complete")
    parser.add_argument("--part_size", type=positive, default=10_000, help="passages in a part (default 10000)")
    parser.add_argument("--pool_factor", type=positive, help="embeddings that become one (default: the model's own)")
    parser.add_argument("--bits", type=int, choices=BITS, help="compress at once, to so many bits a dimension")
    parser.add_argument("--nlist", type=positive, help="--bits: centroids (default: near 4 sqrt(embeddings))")
    parser.add_argument("--codec", type=Path, help="--bits: take the codec of this index, or embeddings; train none")
    parser.add_argument("--seed", type=seed, default=12345, help="--bits: of the sample that the codec is trained on")
    parser.add_argument("--tokens_per_batch", type=positive, help="positions in a batch (default: by device)")
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--verify", action=switch, default=False, help="check the checksums of what is read first")
    parser.add_argument("--cpu", action=switch, default=False, help="use the CPU all the same")
    return parser.parse_args()


if __name__ == "__main__":  # before the imports that take seconds: --help, or a wrong flag, is answered at once
    ARGS = cli.start(parse_args)

import numpy as np
import torch
from accelerate import PartialState

from model import ColBERT
from nanocolbert.checkpoints.layouts import model_fingerprint
from nanocolbert.compute import fast_dtype
from nanocolbert.encoder.soundness import EmbeddingError
from nanocolbert.progress import progress
from nanocolbert.storage.artifact import (
    check_apart,
    fingerprint,
    locked,
    naming,
    publish,
    read_json,
    read_meta,
    remove,
    replacing,
    seen_from,
    verify,
    write_json,
    write_meta,
)
from nanocolbert.storage.checksums import span
from nanocolbert.storage.ragged import Ids, NpyWriter, Ragged, allocate_npy, load_npy
from nanocolbert.storage.texts import FOLDER as TEXTS
from nanocolbert.storage.texts import link_texts
from nanocolbert.text import tokenizer_fingerprint


def layout(model: ColBERT, passages: Ragged, n_passages: int, given, args, folder: Path) -> None:
    """Write offsets.npy, and a values.npy of the right size, still without values, or a codec: as given, or trained."""
    offsets = NpyWriter(folder / "offsets.npy", np.int64)
    offsets.append(np.zeros(1, np.int64))
    total = 0
    for start in range(0, n_passages, args.part_size):
        tokens = passages.slice(start, min(n_passages, start + args.part_size))
        model.check_ids(args.tokens_dir / "passages/values.npy", tokens[0])
        counts = model.kept_counts(*tokens, args.pool_factor)
        check_counts(counts, start, args)
        offsets.append(total + np.cumsum(counts))
        total += int(counts.sum())
    offsets.close()
    link_texts(args.tokens_dir, folder, n_passages)
    if not args.bits:
        allocate_npy(folder / "values.npy", np.float16, (total, model.config.dim))
        return
    from nanocolbert.index.centroids import MOST_CENTROIDS, PER_CENTROID, default_nlist, sample_passages
    from nanocolbert.index.codec import Codec

    (folder / "codec").mkdir()
    if given:
        given.codec.save(folder / "codec")
        return
    nlist = args.nlist or default_nlist(total, MOST_CENTROIDS)
    rows = sample_passages(load_npy(folder / "offsets.npy"), nlist * PER_CENTROID, args.seed)
    pieces = passages.gather(rows)
    values, lengths, _ = model.embed_passages(*pieces, args.tokens_per_batch, pool_factor=args.pool_factor)
    Codec.train(values, lengths, args.bits, nlist, args.seed, model.device).save(folder / "codec")


def check_counts(counts: np.ndarray, first: int, args) -> None:
    """Raise InputError where passages from row `first` on have no embeddings, or more than a code can tell apart."""
    most = LONGEST - 1 if args.bits else np.inf
    wrong = np.flatnonzero((counts < 1) | (counts > most))
    if len(wrong):
        pid, n = Ids(args.tokens_dir / "pids.npy").text([first + wrong[0]])[0], counts[wrong[0]]
        reason = f"more than --bits can code, {most}: run tsv2mmap.py with a smaller --doc_maxlen"
        if not n:
            reason = "it cannot be found: leave it out of the collection"
        raise InputError(f"{args.tokens_dir}: passage {pid} has {n} embeddings, {reason}")


@contextlib.contextmanager
def claim(folder: Path, source: str, lay_out):
    """Make the folder, laid out, unless it is there from an earlier run; it is locked while the block runs.

    Raises InputError if there is something else, or if another process is at work there.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        with publish(folder) as partial:
            lay_out(partial)
            (partial / "parts").mkdir()
            (partial / "source").write_text(source)
    elif not (folder / "source").is_file() or (folder / "source").read_bytes() != source.encode():
        raise InputError(f"{folder}: holds something else, or embeddings of another model or collection: remove it")
    elif (folder / "meta.json").exists():
        read_meta(folder, "embeddings", "doc2embedding.py")
    with locked(folder.resolve(), folder):
        for left in (*folder.glob("*.partial"), *folder.glob("parts/*.partial")):  # by a run that was killed
            remove(left)
        yield


def embed_part(model: ColBERT, passages: Ragged, start: int, stop: int, folder: Path, number: int, args, done) -> None:
    """Embed passages start ... stop - 1, write them to their place in values.npy, and mark the part as done.

    done(n) is called whenever n more embeddings are there.
    """
    tokens = passages.slice(start, stop)
    model.check_ids(args.tokens_dir / "passages/values.npy", tokens[0])
    try:
        embeddings, counts, padding = model.embed_passages(
            *tokens, args.tokens_per_batch, done=done, pool_factor=args.pool_factor
        )
    except EmbeddingError as error:
        pid = Ids(args.tokens_dir / "pids.npy").text([start + error.passage])[0]
        raise InputError(f"{args.model}: passage {pid}: {error}") from None
    offsets = load_npy(folder / "offsets.npy", "i8", (len(passages) + 1,))[start : stop + 1]
    if not np.array_equal(counts, np.diff(offsets)):
        raise InputError(f"{folder / 'offsets.npy'}: not those of these passages: remove {folder}")
    facts = {"passages": stop - start, "embeddings": len(embeddings), "padding": float(padding)}
    if args.bits:
        from nanocolbert.index.codec import Codec  # compiled loops, which nothing else here needs

        codes = Codec.load(folder / "codec").encode(embeddings, counts, model.device)
        for name, array in codes._asdict().items():
            np.save(folder / "parts" / f"{number}.{name}.npy", array)
    else:
        values = load_npy(folder / "values.npy", "f2", (None, embeddings.shape[1]))
        with naming(folder / "values.npy"), open(folder / "values.npy", "r+b") as file:
            file.seek(values.offset + int(offsets[0]) * embeddings[:1].nbytes)
            file.write(embeddings.data.cast("B"))
        facts["span"] = span(embeddings)
    write_json(folder / "parts" / f"{number}.json", facts, summed=True)


def sums_of_values(folder: Path, parts: list[dict]) -> dict:
    """Checksums of values.npy from those of its parts, as far as they are known."""
    if not all("span" in part for part in parts):
        return {}
    header = load_npy(folder / "values.npy").offset
    with open(folder / "values.npy", "rb") as file:
        return {"values.npy": [span(file.read(header)), *(part["span"] for part in parts)]}


def embed_missing(state, model: ColBERT, passages: Ragged, n_passages: int, args) -> float:
    """Embed this process's share of the parts that are missing; returns passages a second, of all processes.

    The bar counts embeddings: passages do not take the same time each.
    """
    folder, starts = args.output_dir, range(0, n_passages, args.part_size)
    missing = [number for number in range(len(starts)) if not (folder / "parts" / f"{number}.json").exists()]
    state.wait_for_everyone()  # all have the same list, before the first part is done
    edges = load_npy(folder / "offsets.npy")[[*starts, n_passages]].tolist()  # of the parts
    there = edges[-1] - sum(edges[number + 1] - edges[number] for number in missing)
    show = state.is_main_process
    bar = progress(total=edges[-1], initial=there, show=show, desc="embed", unit=" embeddings", unit_scale=True)
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
    return embedded * state.num_processes / (time.time() - clock)


def check_fit(model: ColBERT, passages: Ragged, n_passages: int, tokens_meta: dict, args) -> None:
    """Raise InputError where the tokens are not this model's, or not whole, or where --bits cannot code its vectors."""
    model.check_tokens(args.model, args.tokens_dir, tokens_meta)
    if args.bits and not model.config.pooling(args.pool_factor).unit:
        remedy = "give --pool_factor" if model.config.normalize else "leave it out"
        raise InputError(f"{args.model}: its embeddings are not of unit length, which --bits cannot code: {remedy}")
    if len(passages) < n_passages:
        raise InputError(f"{args.tokens_dir}: {len(passages)} passages, {n_passages} ids: run tsv2mmap.py again")


def facts_of(model: ColBERT, model_print: str, tokens_meta: dict, processes: int, rate: float, args) -> dict:
    """What meta.json says of finished embeddings, beside what it says of all folders."""
    folder, n_passages = args.output_dir, tokens_meta["counts"]["pids"]
    parts = read_parts(folder, n_passages, args.part_size)
    return {
        "model": args.model,
        "model_fingerprint": model_print,
        "tokenizer_fingerprint": tokenizer_fingerprint(model.tokenizer),
        "normalized": model.config.pooling(args.pool_factor).unit,
        "pool_factor": model.config.pooling(args.pool_factor).factor,
        "model_path": seen_from(folder, args.model) if Path(args.model).exists() else None,  # on the hub
        **{key: tokens_meta[key] for key in ("documents",) if key in tokens_meta},
        "tokens_fingerprint": tokens_meta["fingerprint"],
        "processes": processes,
        "passages": n_passages,
        "embeddings": sum(part["embeddings"] for part in parts),
        "dim": model.config.dim,
        **({"bits": args.bits, "nlist": len(load_npy(folder / "codec" / "centroids.npy"))} if args.bits else {}),
        "dtype": "uint8" if args.bits else "float16",
        "compute_dtype": str(fast_dtype(model.device)).removeprefix("torch."),
        "padding": round(sum(part["padding"] * part["passages"] for part in parts) / n_passages, 4),
        "passages_per_second": round(rate, 1),
    }


def read_parts(folder: Path, n_passages: int, part_size: int) -> list[dict]:
    """What is noted of each part, in order."""
    return [read_json(folder / "parts" / f"{number}.json") for number in range(-(-n_passages // part_size))]


def main(args):
    started = time.time()
    check_launch()
    for name in ("nlist", "codec"):
        if getattr(args, name) and not args.bits:
            raise InputError(f"--{name} says nothing without --bits: leave it out, or give --bits")
    # Only where it knows that it is on CPUs does accelerate let several processes find each other.
    state = PartialState(cpu=args.cpu or not torch.accelerator.is_available())
    tokens_meta = read_meta(args.tokens_dir, "tokens", "tsv2mmap.py", check=args.verify)
    n_passages = tokens_meta["counts"]["pids"]
    if not n_passages:
        raise InputError(f"{args.tokens_dir}: holds no collection: run tsv2mmap.py with --collection")
    folder = args.output_dir
    check_apart(folder, args.tokens_dir, args.model, args.codec)
    if args.verify and (Path(args.model) / "meta.json").is_file():  # it comes with checksums
        verify(args.model)
    model_print = model_fingerprint(args.model)
    model = ColBERT.from_pretrained(args.model, device=state.device)
    passages, pids = Ragged(args.tokens_dir / "passages", "u2 u4"), Ids(args.tokens_dir / "pids.npy", n_passages)
    check_fit(model, passages, n_passages, tokens_meta, args)
    given = None
    if args.codec:
        from nanocolbert.index.building import known_codec  # compiled loops, which nothing else here needs

        given = known_codec(args, model_print, model.config.dim)
    settings = (args.bits, args.nlist, args.seed, *([given.mark] if given else [])) if args.bits else ()
    pooling = model.config.pooling(args.pool_factor)
    settings += () if pooling == model.config.pooling() else tuple(pooling)
    source = fingerprint(model_print, tokens_meta["fingerprint"], args.part_size, *settings)
    lay_out = functools.partial(layout, model, passages, n_passages, given, args)
    with claim(folder, source, lay_out) if state.is_main_process else contextlib.nullcontext():
        state.wait_for_everyone()
        total = int(load_npy(folder / "offsets.npy", "i8", (n_passages + 1,))[-1])
        if not args.bits:
            load_npy(folder / "values.npy", "f2", (total, model.config.dim))
        rate = embed_missing(state, model, passages, n_passages, args)
        state.wait_for_everyone()
        if not state.is_main_process:
            return None
        with replacing(folder / "pids.npy") as file:
            np.save(file, pids.ids)
        facts = facts_of(model, model_print, tokens_meta, state.num_processes, rate, args)
        known = {name: sums for name, sums in tokens_meta.get("files", {}).items() if name.startswith(f"{TEXTS}/")}
        if not args.bits:
            known |= sums_of_values(folder, read_parts(folder, n_passages, args.part_size))
        meta = write_meta(folder, "embeddings", source, started, args, known=known, **facts)
    return {"output_dir": str(folder), "seconds": meta["seconds"], **facts}


if __name__ == "__main__":
    run_stage(main, ARGS)
