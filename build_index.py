"""Build a FAISS IVFPQ index over all token embeddings (paper, section 3.6).

    python build_index.py --embedding_dir embeddings --output_dir index

reads   embeddings/ (doc2embedding.py)
writes  index/: faiss.index, and hard links to the embeddings and pids, so that it is all that retrieve.py needs and
        costs no second copy on disk

Trained on a seeded sample of whole passages; embeddings are read and added block by block. On GPUs where the
installed faiss has them (requirements-gpu.txt), else on all cores. Reference: 21 minutes for 600 M embeddings.
"""

import argparse
import math
import os
import shutil
import time
from pathlib import Path

import faiss
import numpy as np
from tqdm import tqdm

from artifact import InputError, fingerprint, publish, read_meta, run_stage, seen_from, write_meta
from ragged import Ragged

BLOCK = 1 << 16  # embeddings converted to fp32 and added at a time
FAISS_MINIMUM = 39  # training embeddings per centroid under which faiss warns


def default_nlist(n_embeddings: int) -> int:
    """The power of two nearest to 4 * sqrt(n), and never more lists than can be trained."""
    wanted = 2 ** round(math.log2(4 * math.sqrt(n_embeddings)))
    return max(1, min(wanted, n_embeddings // FAISS_MINIMUM))


def sample_embeddings(embeddings: Ragged, wanted: int, seed: int) -> np.ndarray:
    """At least `wanted` embeddings (n, D) fp32 if there are so many, of passages drawn at random, read one by one."""
    rng = np.random.default_rng(seed)
    n_passages, n_embeddings = len(embeddings), len(embeddings.values)
    n_drawn = min(n_passages, math.ceil(1.05 * wanted * n_passages / n_embeddings) + 10)
    rows = np.sort(rng.choice(n_passages, n_drawn, replace=False))
    sample = np.empty((int(embeddings.lengths(rows).sum()), embeddings.values.shape[1]), np.float32)
    filled = 0
    for block in np.array_split(rows, math.ceil(n_drawn / 1000)):
        values, _ = embeddings.gather(block)
        sample[filled : filled + len(values)] = values
        filled += len(values)
    return sample


def make_index(dim: int, nlist: int, m: int, nbits: int, seed: int):
    """An untrained IVFPQ by inner product. The vectors are unit vectors, so l2 ranks alike; inner product needs one
    look-up table a query where l2 needs one a query and list."""
    index = faiss.IndexIVFPQ(faiss.IndexFlatIP(dim), dim, nlist, m, nbits, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = seed
    index.cp.spherical = True
    index.cp.max_points_per_centroid = 1 << 30  # the sample is ours to choose
    index.pq.cp.seed = seed
    return index


def fill(index, embeddings: Ragged) -> None:
    """Add every embedding, in order: faiss's id is the position in embeddings.values."""
    starts = range(0, len(embeddings.values), BLOCK)
    for start in tqdm(starts, disable=None, desc="add", unit=" blocks"):
        index.add(embeddings.values[start : start + BLOCK].astype(np.float32))


def link(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def main(args):
    started = time.time()
    source_meta = read_meta(args.embedding_dir, "embeddings", "doc2embedding.py")
    embeddings = Ragged(args.embedding_dir)
    n_embeddings, dim = embeddings.values.shape
    nlist = args.nlist or default_nlist(n_embeddings)
    nbits = args.nbits or min(8, int(math.log2(n_embeddings)))
    if dim % args.m:
        raise InputError(f"--m {args.m} does not divide the dimension {dim}: give a divisor of {dim}")
    if n_embeddings < max(nlist, 2**nbits):
        raise InputError(
            f"{args.embedding_dir}: {n_embeddings} embeddings cannot train {nlist} lists and codebooks of {2**nbits}: "
            "lower --nlist and --nbits"
        )
    index = make_index(dim, nlist, args.m, nbits, args.seed)
    n_gpus = getattr(faiss, "get_num_gpus", int)() if args.gpu else 0
    if n_gpus:
        index = faiss.index_cpu_to_all_gpus(index)
    sample = sample_embeddings(embeddings, args.sample or max(nlist, 2**nbits) * (FAISS_MINIMUM + 1), args.seed)
    print(f"{n_embeddings} embeddings: {nlist} lists, {args.m} x {nbits} bits, trained on {len(sample)}", flush=True)
    clock = time.time()
    index.train(sample)
    del sample
    train_seconds, clock = time.time() - clock, time.time()
    fill(index, embeddings)
    add_seconds = time.time() - clock
    if n_gpus:
        index = faiss.index_gpu_to_cpu(index)
    with publish(args.output_dir) as partial:
        faiss.write_index(index, str(partial / "faiss.index"))
        for name in ("values.npy", "offsets.npy", "pids.npy"):
            link(args.embedding_dir / name, partial / name)
        paths = {
            key: seen_from(args.output_dir, args.embedding_dir.resolve() / source_meta[key])
            for key in ("model_path", "collection_path")
            if source_meta.get(key)
        }
        facts = {
            "embeddings_fingerprint": source_meta["fingerprint"],
            "model": source_meta["model"],
            "model_fingerprint": source_meta["model_fingerprint"],
            **paths,
            "passages": len(embeddings),
            "embeddings": n_embeddings,
            "dim": dim,
            "nlist": nlist,
            "m": args.m,
            "nbits": nbits,
            "gpus": n_gpus,
            "imbalance": round(faiss.extract_index_ivf(index).invlists.imbalance_factor(), 3),
            "bytes_per_embedding": round((partial / "faiss.index").stat().st_size / n_embeddings, 2),
            "train_seconds": round(train_seconds, 2),
            "add_seconds": round(add_seconds, 2),
        }
        source = fingerprint(source_meta["fingerprint"], nlist, args.m, nbits, args.seed)
        meta = write_meta(partial, "index", source, started, args, **facts)
    return {"output_dir": str(args.output_dir), "seconds": meta["seconds"], **facts}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embedding_dir", type=Path, required=True, help="what doc2embedding.py wrote")
    parser.add_argument("--output_dir", type=Path, required=True, help="the index folder to write")
    parser.add_argument("--nlist", type=int, help="inverted lists (default: the power of two near 4 sqrt(embeddings))")
    parser.add_argument("--m", type=int, default=16, help="bytes (sub-quantisers) of an embedding's code (default 16)")
    parser.add_argument("--nbits", type=int, help="bits of a sub-quantiser (default 8, fewer for tiny collections)")
    parser.add_argument("--sample", type=int, help="embeddings to train on (default: 40 a centroid)")
    parser.add_argument("--seed", type=int, default=12345, help="of the sample and of k-means")
    parser.add_argument(
        "--gpu", action=argparse.BooleanOptionalAction, default=True, help="use GPUs where faiss has them"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_stage(main, parse_args())
