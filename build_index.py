"""Build an index over all token embeddings: compressed codes (codec.py, search.py), or FAISS IVFPQ (paper, 3.6).

    python build_index.py --embedding_dir embeddings --output_dir index                 # 2 bits a dimension
    python build_index.py --embedding_dir embeddings --output_dir index --keep_vectors  # and an exact last step
    python build_index.py --embedding_dir embeddings --output_dir index --method ivfpq  # the reference's way

reads   embeddings/ (doc2embedding.py, with vectors or already compressed)
writes  index/: codes: the codec and segments/; ivfpq: faiss.index. Kept embeddings (ivfpq: always) are hard links: an
        index is all that retrieve.py needs, and costs no second copy on disk

Trained on a seeded sample of whole passages; embeddings are read and added block by block. On a GPU if there is one
(IVFPQ: where the installed faiss has them, requirements-gpu.txt), else on all cores. Reference: 21 minutes for 600 M
embeddings.
"""

import argparse
import math
import time
from pathlib import Path

from knobs import BITS


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embedding_dir", type=Path, required=True, help="what doc2embedding.py wrote")
    parser.add_argument("--output_dir", type=Path, required=True, help="the index folder to write")
    parser.add_argument(
        "--method", choices=("codes", "ivfpq"), default="codes", help="compressed codes, or FAISS IVFPQ (default codes)"
    )
    parser.add_argument("--bits", type=int, choices=BITS, help="codes: bits a dimension (default 2)")
    parser.add_argument(
        "--keep_vectors",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="codes: link the fp16 embeddings, for an exact last step",
    )
    parser.add_argument("--nlist", type=int, help="inverted lists (default: the power of two near 4 sqrt(embeddings))")
    parser.add_argument("--m", type=int, help="ivfpq: bytes of an embedding's code (default 16)")
    parser.add_argument("--nbits", type=int, help="ivfpq: bits of a sub-quantiser (default 8, fewer if tiny)")
    parser.add_argument("--sample", type=int, help="embeddings to train on (default: 40 a centroid)")
    parser.add_argument("--seed", type=int, default=12345, help="of the sample and of k-means")
    parser.add_argument(
        "--gpu", action=argparse.BooleanOptionalAction, default=True, help="train on GPUs where there are any"
    )
    return parser.parse_args()


if __name__ == "__main__":  # before the imports that take seconds: --help, or a wrong flag, is answered at once
    ARGS = parse_args()

import numpy as np
import torch

from artifact import fingerprint, link, publish, read_meta, seen_from, write_meta
from cli import InputError, run_stage
from codec import MOST_CENTROIDS, PER_CENTROID, Codec, Codes, default_nlist, sample_passages
from compute import default_device
from progress import progress
from ragged import Ids, Ragged, neighbours
from search import create

BLOCK = 1 << 16  # embeddings converted to fp32 and added at a time
CODES_BLOCK = 1 << 18  # embeddings compressed at a time


def sample_embeddings(embeddings: Ragged, wanted: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """At least `wanted` embeddings (T, D) fp32, or all, of passages drawn at random, and the passages' lengths."""
    rows = sample_passages(embeddings.offsets, wanted, seed)
    sample = np.empty((int(embeddings.lengths(rows).sum()), embeddings.values.shape[1]), np.float32)
    filled = 0
    for block in np.array_split(rows, math.ceil(len(rows) / 1000)):
        values, _ = embeddings.gather(block)
        sample[filled : filled + len(values)] = values
        filled += len(values)
    return sample, embeddings.lengths(rows)


def make_index(dim: int, nlist: int, m: int, nbits: int, seed: int):
    """An untrained IVFPQ by inner product. The vectors are unit vectors, so l2 ranks alike; inner product needs one
    look-up table a query where l2 needs one a query and list."""
    import faiss

    index = faiss.IndexIVFPQ(faiss.IndexFlatIP(dim), dim, nlist, m, nbits, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = seed
    index.cp.spherical = True
    index.cp.max_points_per_centroid = 1 << 30  # the sample is ours to choose
    index.pq.cp.seed = seed
    return index


def fill(index, embeddings: Ragged) -> None:
    """Add every embedding, in order: faiss's id is the position in embeddings.values."""
    starts = range(0, len(embeddings.values), BLOCK)
    for start in progress(starts, desc="add", unit=" blocks"):
        index.add(embeddings.values[start : start + BLOCK].astype(np.float32))


def build_ivfpq(embeddings: Ragged, args, partial: Path) -> dict:
    """Write faiss.index and links to the embeddings; returns facts for meta.json."""
    import faiss  # the other method needs none

    n_embeddings, dim = embeddings.values.shape
    nlist, m = args.nlist or default_nlist(n_embeddings), args.m or 16
    nbits = args.nbits or min(8, int(math.log2(n_embeddings)))
    if dim % m:
        raise InputError(f"--m {m} does not divide the dimension {dim}: give a divisor of {dim}")
    if n_embeddings < max(nlist, 2**nbits):
        raise InputError(
            f"{args.embedding_dir}: {n_embeddings} embeddings cannot train {nlist} lists and codebooks of {2**nbits}: "
            "lower --nlist and --nbits"
        )
    index = make_index(dim, nlist, m, nbits, args.seed)
    n_gpus = getattr(faiss, "get_num_gpus", int)() if args.gpu else 0
    if n_gpus:
        index = faiss.index_cpu_to_all_gpus(index)
    sample = sample_embeddings(embeddings, args.sample or max(nlist, 2**nbits) * PER_CENTROID, args.seed)[0]
    print(f"{n_embeddings} embeddings: {nlist} lists, {m} x {nbits} bits, trained on {len(sample)}", flush=True)
    clock = time.time()
    index.train(sample)
    del sample
    train_seconds, clock = time.time() - clock, time.time()
    fill(index, embeddings)
    add_seconds = time.time() - clock
    if n_gpus:
        index = faiss.index_gpu_to_cpu(index)
    faiss.write_index(index, str(partial / "faiss.index"))
    for name in ("values.npy", "offsets.npy", "pids.npy"):
        link(args.embedding_dir / name, partial / name)
    return {
        "nlist": nlist,
        "m": m,
        "nbits": nbits,
        "gpus": n_gpus,
        "imbalance": round(faiss.extract_index_ivf(index).invlists.imbalance_factor(), 3),
        "bytes_per_embedding": round((partial / "faiss.index").stat().st_size / n_embeddings, 2),
        "train_seconds": round(train_seconds, 2),
        "add_seconds": round(add_seconds, 2),
    }


def build_codes(embeddings: Ragged, args, partial: Path) -> dict:
    """Write a compressed index; returns facts for meta.json."""
    n_embeddings = len(embeddings.values)
    nlist, bits = args.nlist or default_nlist(n_embeddings, MOST_CENTROIDS), args.bits or 2
    sample, lengths = sample_embeddings(embeddings, args.sample or nlist * PER_CENTROID, args.seed)
    print(f"{n_embeddings} embeddings: {nlist} centroids, {bits} bits, trained on {len(sample)}", flush=True)
    device, clock = default_device() if args.gpu else torch.device("cpu"), time.time()
    codec = Codec.train(sample, lengths, bits, nlist, args.seed, device)
    del sample
    train_seconds, clock = time.time() - clock, time.time()
    pids = Ids(args.embedding_dir / "pids.npy")

    def blocks():
        slices = neighbours(np.diff(embeddings.offsets), CODES_BLOCK)
        for part in progress(slices, desc="compress", unit=" blocks"):
            values, lengths = embeddings.slice(part.start, part.stop)
            yield codec.encode(values, lengths, device), pids.text(np.arange(part.start, part.stop))

    create(partial, codec, blocks(), args.embedding_dir / "values.npy" if args.keep_vectors else None)
    return {
        "bits": bits,
        "keep_vectors": args.keep_vectors,
        "nlist": nlist,
        "train_seconds": round(train_seconds, 2),
        "add_seconds": round(time.time() - clock, 2),
    }


def collect_codes(source_meta: dict, args, partial: Path) -> dict:
    """Write a compressed index of what doc2embedding.py has compressed already; returns facts for meta.json."""
    if args.method != "codes" or args.keep_vectors:
        raise InputError(f"{args.embedding_dir}: compressed, without vectors: run doc2embedding.py without --bits")
    if args.nlist or args.bits not in (None, source_meta["bits"]):
        raise InputError(
            f"{args.embedding_dir}: compressed with {source_meta['bits']} bits, {source_meta['nlist']} centroids: "
            "give neither --bits nor --nlist"
        )
    pids, first = Ids(args.embedding_dir / "pids.npy"), 0
    parts = args.embedding_dir / "parts"

    def blocks():
        nonlocal first
        for number in range(len(list(parts.glob("*.json")))):
            codes = Codes(*(np.load(parts / f"{number}.{name}.npy") for name in Codes._fields))
            yield codes, pids.text(np.arange(first, first + len(codes.sizes)))
            first += len(codes.sizes)

    create(partial, Codec.load(args.embedding_dir / "codec"), blocks())
    return {"bits": source_meta["bits"], "keep_vectors": False, "nlist": source_meta["nlist"]}


def check_flags(args) -> None:
    """Raises InputError for a flag of the other method."""
    flags = {"codes": ("bits", "keep_vectors"), "ivfpq": ("m", "nbits")}
    other = "ivfpq" if args.method == "codes" else "codes"
    for name in flags[other]:
        if getattr(args, name):
            raise InputError(f"--{name} says nothing to --method {args.method}: leave it out, or give --method {other}")


def main(args):
    started = time.time()
    check_flags(args)
    source_meta = read_meta(args.embedding_dir, "embeddings", "doc2embedding.py")
    with publish(args.output_dir) as partial:
        if source_meta.get("bits"):
            facts = collect_codes(source_meta, args, partial)
        else:
            build = {"codes": build_codes, "ivfpq": build_ivfpq}[args.method]
            facts = build(Ragged(args.embedding_dir), args, partial)
        if args.method == "codes":
            files = (path for path in partial.rglob("*.npy") if path.name not in ("vectors.npy", "pids.npy"))
            size = sum(path.stat().st_size for path in files)
            facts["bytes_per_embedding"] = round(size / source_meta["embeddings"], 2)
        paths = {
            key: seen_from(args.output_dir, args.embedding_dir.resolve() / source_meta[key])
            for key in ("model_path", "collection_path")
            if source_meta.get(key)
        }
        facts = {
            "method": args.method,
            "embeddings_fingerprint": source_meta["fingerprint"],
            "model": source_meta["model"],
            "model_fingerprint": source_meta["model_fingerprint"],
            **paths,
            **{key: source_meta[key] for key in ("passages", "embeddings", "dim")},
            **facts,
        }
        settings = ("method", "nlist", "m", "nbits", "bits", "keep_vectors", "sample", "seed")
        source = fingerprint(source_meta["fingerprint"], *(f"{name} {getattr(args, name)}" for name in settings))
        meta = write_meta(partial, "index", source, started, args, **facts)
    return {"output_dir": str(args.output_dir), "seconds": meta["seconds"], **facts}


if __name__ == "__main__":
    run_stage(main, ARGS)
