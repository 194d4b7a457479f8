"""From embeddings to a compressed index: a codec trained on a sample of whole passages, then block by block."""

import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from nanocolbert.cli import InputError
from nanocolbert.compute import default_device
from nanocolbert.index.centroids import MOST_CENTROIDS, PER_CENTROID, default_nlist, sample_passages
from nanocolbert.index.changes import create
from nanocolbert.index.codec import Codec
from nanocolbert.index.knobs import BITS
from nanocolbert.progress import progress
from nanocolbert.storage.artifact import read_meta
from nanocolbert.storage.ragged import Ids, Ragged, neighbours
from nanocolbert.storage.texts import FOLDER as TEXTS

BLOCK = 1 << 18  # embeddings compressed at a time
LOOKED_AT = 1 << 16  # embeddings whose length is looked at where none are needed to train
APART = 0.02  # what the length of an embedding may differ from 1 by: fp16, and bf16 before it
CHANGING = ("segments", "state.json", "state.json.partial", "lock")  # by changes.py: state.json lists them


def not_unit(folder, found: str) -> str:
    return (
        f"{folder}: embeddings not of unit length ({found}), which an index cannot hold: train with normalize, or "
        "search them without an index (retrieve.py --index_dir EMBEDDINGS --exact)"
    )


def check_unit(folder, sample: np.ndarray) -> None:
    """Raise InputError, naming what they are of, unless embeddings (T, D) are of unit length."""
    norms = np.sqrt(np.einsum("ij,ij->i", sample, sample))
    wrong = np.flatnonzero(~(np.abs(norms - 1) < APART))  # NaN is not
    if len(wrong):
        raise InputError(not_unit(folder, f"one is {norms[wrong[0]]:.3g} long"))


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


class Known(NamedTuple):
    """A codec that is there, of so many bits a dimension; mark: the fingerprint of what it was trained with."""

    codec: Codec
    bits: int
    mark: str


def known_codec(args, model_print: str, dim: int) -> Known | None:
    """The codec of --codec, an index' or compressed embeddings'; None without.

    Raises InputError unless it is for this model (its fingerprint), vectors of this size, and --bits, where given.
    """
    if not args.codec:
        return None
    meta = read_meta(args.codec, "index", "build_index.py", "embeddings", check=args.verify)
    if not meta.get("bits"):
        raise InputError(f"{args.codec}: has no codec: give a compressed index, or what doc2embedding.py --bits wrote")
    if (meta["model_fingerprint"], meta["dim"]) != (model_print, dim):
        raise InputError(f"{args.codec}: a codec for another model, {meta['model']}: give one that is for this one")
    for name in ("bits", "nlist"):
        if getattr(args, name) not in (None, meta[name]):
            found = f"--{name} {getattr(args, name)}: the codec in {args.codec} has {meta[name]}"
            raise InputError(f"{found}: leave it out, or --codec")
    folder = args.codec / "codec" if meta["kind"] == "embeddings" else args.codec
    return Known(Codec.load(folder), meta["bits"], meta["fingerprint"])


def build_codes(
    folder,
    source,
    bits: int = 2,
    nlist: int | None = None,
    sample: int | None = None,
    seed: int = 12345,
    keep_vectors: bool = False,
    gpu: bool = True,
    known: dict | None = None,
    codec: Codec | None = None,
) -> dict:
    """Write a compressed index into an empty folder; returns facts for its meta.json.

    source: the folder of the embeddings (values.npy, offsets.npy, pids.npy, texts/); nlist, sample: None for the
    default; known: checksums of the source's files; codec: one of these bits, of another index, in place of one that is
    trained. Raises InputError where nlist is too large, or vectors are not of unit length.
    """
    if bits not in BITS:
        raise InputError(f"bits {bits}: give one of {', '.join(map(str, BITS))}")
    source = Path(source)
    embeddings = Ragged(source, "f2")
    n_embeddings, pids = len(embeddings.values), Ids(source / "pids.npy", len(embeddings))
    most = min(n_embeddings, MOST_CENTROIDS)
    if nlist and not 0 < nlist <= most:
        raise InputError(f"--nlist {nlist}: more than {source} can train, or less than 1: give at most {most}")
    nlist = len(codec.centroids) if codec else nlist or default_nlist(n_embeddings, MOST_CENTROIDS)
    values, lengths = sample_embeddings(embeddings, sample or (LOOKED_AT if codec else nlist * PER_CENTROID), seed)
    check_unit(source, values)
    how = "by a codec that was there" if codec else f"trained on {len(values)}"
    print(f"{n_embeddings} embeddings: {nlist} centroids, {bits} bits, {how}", flush=True)
    device, clock = default_device() if gpu else torch.device("cpu"), time.time()
    codec = codec or Codec.train(values, lengths, bits, nlist, seed, device)
    del values
    train_seconds, clock = time.time() - clock, time.time()

    def blocks():
        slices = neighbours(np.diff(embeddings.offsets), BLOCK)
        for part in progress(slices, desc="compress", unit=" blocks"):
            values, lengths = embeddings.slice(part.start, part.stop)
            yield codec.encode(values, lengths, device), pids.text(np.arange(part.start, part.stop))

    vectors = source / "values.npy" if keep_vectors else None
    create(folder, codec, blocks(), vectors, source, sums_by_place(known or {}))
    return {
        "bits": bits,
        "keep_vectors": keep_vectors,
        "nlist": nlist,
        "train_seconds": round(train_seconds, 2),
        "add_seconds": round(time.time() - clock, 2),
        "bytes_per_embedding": round(codes_bytes(folder) / n_embeddings, 2),
    }


def sums_by_place(known: dict) -> dict:
    """Checksums of what a segment links of the embeddings, by the names that it has there."""
    vectors = {"vectors.npy": known["values.npy"]} if "values.npy" in known else {}
    return vectors | {name: sums for name, sums in known.items() if name.startswith(f"{TEXTS}/")}


def codes_bytes(folder: Path) -> int:
    """Bytes of a compressed index, without ids, texts and kept vectors."""
    apart = ("vectors.npy", "pids.npy")
    files = (path for path in Path(folder).rglob("*.npy") if path.name not in apart and path.parent.name != TEXTS)
    return sum(path.stat().st_size for path in files)
