"""Build an index over all token embeddings: compressed codes, or FAISS IVFPQ (paper, section 3.6).

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
import time
from pathlib import Path

from nanocolbert import cli
from nanocolbert.cli import InputError, positive, run_stage, seed
from nanocolbert.index.knobs import BITS, LONGEST


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
    parser.add_argument(
        "--nlist", type=positive, help="inverted lists (default: the power of two near 4 sqrt(embeddings))"
    )
    parser.add_argument(
        "--codec", type=Path, help="codes: take the codec of this index, or of these compressed embeddings; train none"
    )
    parser.add_argument("--m", type=positive, help="ivfpq: bytes of an embedding's code (default: 16, or a divisor)")
    parser.add_argument("--nbits", type=positive, help="ivfpq: bits of a sub-quantiser (default 8, fewer if tiny)")
    parser.add_argument("--sample", type=positive, help="embeddings to train on (default: 40 a centroid)")
    parser.add_argument("--seed", type=seed, default=12345, help="of the sample and of k-means")
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--verify", action=switch, default=False, help="check the checksums of what is read first")
    parser.add_argument("--gpu", action=switch, default=True, help="train on GPUs where there are any")
    return parser.parse_args()


if __name__ == "__main__":  # before the imports that take seconds: --help, or a wrong flag, is answered at once
    ARGS = cli.start(parse_args)

import numpy as np

from nanocolbert.index import ivfpq
from nanocolbert.index.building import (
    CHANGING,
    build_codes,
    check_unit,
    codes_bytes,
    known_codec,
    not_unit,
    sample_embeddings,
    sums_by_place,
)
from nanocolbert.index.centroids import PER_CENTROID
from nanocolbert.index.changes import create
from nanocolbert.index.codec import Codec, Codes
from nanocolbert.storage.artifact import check_output_dir, fingerprint, link, publish, read_meta, seen_from, write_meta
from nanocolbert.storage.ragged import Ids, Ragged, load_npy
from nanocolbert.storage.texts import link_texts


def check_embeddings(embeddings: Ragged, pids: Ids, source_meta: dict, args) -> None:
    """Raise InputError for embeddings that are not whole, or that an index cannot hold."""
    folder, meta = args.embedding_dir, source_meta
    found = {"passages": len(embeddings), "embeddings": len(embeddings.values), "dim": embeddings.values.shape[1]}
    for name, n in found.items():
        if meta.get(name, n) != n:
            raise InputError(f"{folder}: {n} {name}, {meta[name]} by its meta.json: run doc2embedding.py again")
    if not len(embeddings):
        raise InputError(f"{folder}: no passages: run doc2embedding.py on a collection")
    if not meta.get("normalized", True):
        raise InputError(not_unit(folder, "by its meta.json"))
    lengths = np.diff(embeddings.offsets)
    longest = LONGEST - 1 if args.method == "codes" else np.inf
    wrong = np.flatnonzero((lengths < 1) | (lengths > longest))
    if len(wrong):
        pid, n = pids.text(wrong[:1])[0], lengths[wrong[0]]
        remedy = "leave it out of the collection" if n < 1 else "cut it (tsv2mmap.py --doc_maxlen), or --method ivfpq"
        raise InputError(f"{folder}: passage {pid} has {n} embeddings, at least 1, at most {longest}: {remedy}")


def build_ivfpq(embeddings: Ragged, source_meta: dict, args, partial: Path) -> tuple[dict, dict]:
    """Write faiss.index and links to the embeddings; returns facts for meta.json, and checksums that are known."""
    (n_embeddings, dim), (nlist, m, nbits) = embeddings.values.shape, ivfpq_settings(embeddings, args)
    index = ivfpq.make_index(dim, nlist, m, nbits, args.seed)
    n_gpus = ivfpq.count_gpus() if args.gpu else 0
    if n_gpus:
        index = ivfpq.to_gpus(index)
    sample = sample_embeddings(embeddings, args.sample or max(nlist, 2**nbits) * PER_CENTROID, args.seed)[0]
    check_unit(args.embedding_dir, sample)
    if len(sample) < max(nlist, 2**nbits):
        raise InputError(f"{len(sample)} embeddings to train {nlist} lists and codebooks of {2**nbits}: raise --sample")
    print(f"{n_embeddings} embeddings: {nlist} lists, {m} x {nbits} bits, trained on {len(sample)}", flush=True)
    clock = time.time()
    index.train(sample)
    del sample
    train_seconds, clock = time.time() - clock, time.time()
    ivfpq.fill(index, embeddings)
    add_seconds = time.time() - clock
    imbalance = ivfpq.write(index, partial / "faiss.index", bool(n_gpus), args.output_dir)
    linked = ("values.npy", "offsets.npy", "pids.npy")
    for name in linked:
        link(args.embedding_dir / name, partial / name)
    link_texts(args.embedding_dir, partial, len(embeddings))
    known = {
        name: sums for name, sums in source_meta.get("files", {}).items() if name in linked or name.startswith("texts/")
    }
    return {
        "nlist": nlist,
        "m": m,
        "nbits": nbits,
        "gpus": n_gpus,
        "imbalance": round(imbalance, 3),
        "bytes_per_embedding": round((partial / "faiss.index").stat().st_size / n_embeddings, 2),
        "train_seconds": round(train_seconds, 2),
        "add_seconds": round(add_seconds, 2),
    }, known


def ivfpq_settings(embeddings: Ragged, args) -> tuple[int, int, int]:
    """Lists, bytes of a code, and bits of a sub-quantiser. Raises InputError where they cannot be."""
    return ivfpq.settings(embeddings, args.nlist, args.m, args.nbits, args.embedding_dir)


def collect_codes(source_meta: dict, args, partial: Path) -> dict:
    """Write a compressed index of what doc2embedding.py has compressed already; returns facts for meta.json."""
    if args.method != "codes" or args.keep_vectors:
        raise InputError(f"{args.embedding_dir}: compressed, without vectors: run doc2embedding.py without --bits")
    if args.nlist or args.bits not in (None, source_meta["bits"]):
        raise InputError(
            f"{args.embedding_dir}: compressed with {source_meta['bits']} bits, {source_meta['nlist']} centroids: "
            "give neither --bits nor --nlist"
        )
    folder, n, size = args.embedding_dir, source_meta["passages"], source_meta["args"]["part_size"]
    pids, codec, total = Ids(folder / "pids.npy", n), Codec.load(folder / "codec"), 0

    def blocks():
        nonlocal total
        for number, first in enumerate(range(0, n, size)):
            codes = read_part(folder / "parts", number, min(size, n - first), codec)
            total += int(codes.sizes.sum(dtype=np.int64))
            yield codes, pids.text(np.arange(first, first + len(codes.sizes)))

    create(partial, codec, blocks(), texts=folder, known=sums_by_place(source_meta.get("files", {})))
    if total != source_meta["embeddings"]:
        raise InputError(
            f"{folder}: {total} embeddings, {source_meta['embeddings']} by its meta.json: run doc2embedding.py again"
        )
    return {
        "bits": source_meta["bits"],
        "keep_vectors": False,
        "nlist": source_meta["nlist"],
        "bytes_per_embedding": round(codes_bytes(partial) / total, 2),
    }


def read_part(parts: Path, number: int, n: int, codec: Codec) -> Codes:
    """A part of n compressed passages. Raises InputError unless its arrays are there and fit each other."""
    kinds = {"coarse": ("u1", (None,)), "fine": ("u1", (None,)), "sizes": ("u2", (n, 2))}
    codes = Codes(*(load_npy(parts / f"{number}.{name}.npy", *kinds[name], mmap=False) for name in Codes._fields))
    sizes = codes.sizes.astype(np.int64)
    wanted = codec.passage_bytes(sizes).sum(0).tolist()
    if [len(codes.coarse), len(codes.fine)] != wanted or not sizes[:, 0].all() or sizes.sum(1).max() >= LONGEST:
        raise InputError(f"{parts}: the arrays of part {number} do not fit each other: run doc2embedding.py again")
    return codes


def check_flags(args) -> None:
    """Raises InputError for a flag of the other method."""
    flags = {"codes": ("bits", "keep_vectors", "codec"), "ivfpq": ("m", "nbits")}
    other = "ivfpq" if args.method == "codes" else "codes"
    for name in flags[other]:
        if getattr(args, name):
            raise InputError(f"--{name} says nothing to --method {args.method}: leave it out, or give --method {other}")


def made_from(source_meta: dict, args) -> dict:
    """What the index was made from, for its meta.json: paths as seen from it."""
    path, optional = source_meta.get("model_path"), ("tokenizer_fingerprint", "documents", "pool_factor")
    return {
        "method": args.method,
        "embeddings_fingerprint": source_meta["fingerprint"],
        "model": source_meta["model"],
        "model_fingerprint": source_meta["model_fingerprint"],
        **({"model_path": seen_from(args.output_dir, args.embedding_dir.resolve() / path)} if path else {}),
        **{key: source_meta[key] for key in optional if key in source_meta},
        **{key: source_meta[key] for key in ("passages", "embeddings", "dim")},
    }


def main(args):
    started = time.time()
    check_flags(args)
    check_output_dir(args.output_dir, "index", args.embedding_dir, args.codec)
    source_meta = read_meta(args.embedding_dir, "embeddings", "doc2embedding.py", check=args.verify)
    is_compressed, known = bool(source_meta.get("bits")), None
    if is_compressed and args.codec:
        raise InputError(f"{args.embedding_dir}: compressed already, by a codec of its own: leave --codec out")
    given = known_codec(args, source_meta["model_fingerprint"], source_meta["dim"])
    if not is_compressed:
        embeddings = Ragged(args.embedding_dir, "f2")
        pids = Ids(args.embedding_dir / "pids.npy", len(embeddings))
        check_embeddings(embeddings, pids, source_meta, args)
        if args.method == "ivfpq":
            ivfpq_settings(embeddings, args)
    with publish(args.output_dir) as partial:
        if is_compressed:
            facts = collect_codes(source_meta, args, partial)
        elif args.method == "codes":
            bits = given.bits if given else args.bits or 2
            settings = bits, args.nlist, args.sample, args.seed, args.keep_vectors, args.gpu
            facts = build_codes(partial, args.embedding_dir, *settings, source_meta.get("files"), given and given.codec)
        else:
            facts, known = build_ivfpq(embeddings, source_meta, args, partial)
        facts = {**made_from(source_meta, args), **facts}
        settings = ("method", "nlist", "m", "nbits", "bits", "keep_vectors", "sample", "seed")
        settings = [f"{name} {getattr(args, name)}" for name in settings] + ([given.mark] if given else [])
        source = fingerprint(source_meta["fingerprint"], *settings)
        also = CHANGING if args.method == "codes" else ()
        meta = write_meta(partial, "index", source, started, args, known=known, also=also, **facts)
    return {"output_dir": str(args.output_dir), "seconds": meta["seconds"], **facts}


if __name__ == "__main__":
    run_stage(main, ARGS)
