"""FAISS IVFPQ over all token embeddings, the reference's and the paper's way (section 3.6): built, and searched.

For each query token the `faiss_depth` nearest embeddings in `nprobe` lists are looked up; their passages are ordered by
the sum of what was found (a token that found nothing of a passage counts as its last hit), and the first `rerank_depth`
are scored exactly. FAISS is imported when first needed: a compressed index needs none.
"""

import math
import threading
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from nanocolbert.cli import InputError
from nanocolbert.index.centroids import default_nlist
from nanocolbert.index.exact import ExactIndex
from nanocolbert.index.knobs import Depths
from nanocolbert.index.ranking import Ranking, highest
from nanocolbert.progress import progress
from nanocolbert.storage.ragged import Ragged

BLOCK = 1 << 16  # embeddings converted to fp32 and added at a time
MOST_BITS = 16  # of a sub-quantiser


class IVFPQ(ExactIndex):
    """Stored embeddings, and a FAISS index that finds the nearest of them."""

    def __init__(self, folder, meta: dict, device="cpu", on_gpu: bool = False):
        """As ExactIndex; the FAISS index is opened when first needed. on_gpu: put it on the GPUs that FAISS has."""
        super().__init__(folder, meta, device)
        self.on_gpu, self._lock = on_gpu, threading.RLock()

    @cached_property
    def faiss(self):
        """The FAISS index. Raises InputError if it is damaged, or another's."""
        import faiss

        path, wanted = self.folder / "faiss.index", self.embeddings.values.shape
        try:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
        except (RuntimeError, MemoryError) as error:
            raise InputError(f"{path}: damaged ({str(error).splitlines()[-1]}): make {self.folder} again") from None
        if (index.ntotal, index.d) != wanted:
            raise InputError(f"{path}: {index.ntotal} x {index.d}, not {wanted}: make {self.folder} again")
        return to_gpus(index) if self.on_gpu else index

    def search(self, queries: Tensor, k: int, effort: Depths, allowed=None) -> list[Ranking]:
        """The k best rows that are found for each query (B, Lq, D), scored exactly; `allowed` is not supported."""
        assert allowed is None
        return self.rank(queries, self.candidates(queries, effort), k)

    def candidates(self, queries: Tensor, effort: Depths) -> list[np.ndarray]:
        """Rows of the passages that IVFPQ finds for each query (B, Lq, D), at most `effort.rerank_depth`."""
        B, Lq, D = queries.shape
        with self.clock("IVFPQ"):
            vectors = queries.reshape(B * Lq, D).cpu().numpy()
            similarities, ids = self._nearest(vectors, effort)
            ids[(ids < 0) | (ids >= len(self.embeddings.values))] = -1  # the latter: a damaged index
            ids[~vectors.any(1)] = -1  # rows of zeros pad a query: they score 0 everywhere, and find nothing
        with self.clock("candidates"):
            rows = np.searchsorted(self.embeddings.offsets, ids.reshape(-1), side="right") - 1
            rows = rows.reshape(B, Lq, -1)  # -1 where FAISS found nothing (its id is -1)
            similarities = similarities.reshape(B, Lq, -1)
            return [best_candidates(*pair, effort.rerank_depth) for pair in zip(rows, similarities, strict=True)]

    def _nearest(self, vectors: np.ndarray, effort: Depths) -> tuple[np.ndarray, np.ndarray]:
        """Similarities and ids (n, faiss_depth) of the embeddings that FAISS finds for vectors (n, D)."""
        with self._lock:  # one that is opened for all
            index = self.faiss
        import faiss

        nprobe = min(effort.nprobe, self.meta["nlist"])
        if self.on_gpu and hasattr(faiss, "GpuParameterSpace"):
            with self._lock:
                faiss.GpuParameterSpace().set_index_parameter(index, "nprobe", nprobe)
                return index.search(vectors, effort.faiss_depth)
        return index.search(vectors, effort.faiss_depth, params=faiss.SearchParametersIVF(nprobe=nprobe))


def best_candidates(rows: np.ndarray, similarities: np.ndarray, n: int) -> np.ndarray:
    """The n passages whose found embeddings promise the highest MaxSim, as rows (<= n,), in order.

    rows, similarities (Lq, k'): the passages of the embeddings found for each query token, the nearest first; row -1
    stands for nothing found. A token that found nothing of a passage adds what its last hit had.
    """
    found = rows >= 0
    unique, column = np.unique(rows[found], return_inverse=True)
    if len(unique) <= n:
        return unique
    last = np.where(found, similarities, np.inf).min(1)  # (Lq,)
    last[~found.any(1)] = 0.0  # the same for every passage
    best = np.repeat(last[:, None], len(unique), axis=1)  # (Lq, candidates)
    np.maximum.at(best, (np.nonzero(found)[0], column), similarities[found])
    return unique[highest(best.sum(0), n)]


# -------------------------------------------------------------------------------------------------------------- build


def settings(embeddings: Ragged, nlist: int | None, m: int | None, nbits: int | None, folder) -> tuple[int, int, int]:
    """Lists, bytes of a code, and bits of a sub-quantiser: as asked for, else fit. Raises InputError if they cannot be.

    folder: where the embeddings are, for messages.
    """
    n_embeddings, dim = embeddings.values.shape
    nlist, m = nlist or default_nlist(n_embeddings), m or max(n for n in range(1, 17) if dim % n == 0)
    nbits = nbits or min(8, int(math.log2(n_embeddings)))
    if dim % m:
        raise InputError(f"--m {m} does not divide the dimension {dim}: give a divisor of {dim}")
    if nbits > MOST_BITS:
        raise InputError(f"--nbits {nbits}: give at most {MOST_BITS}")
    if n_embeddings < max(nlist, 2**nbits):
        raise InputError(
            f"{folder}: {n_embeddings} embeddings cannot train {nlist} lists and codebooks of {2**nbits}: "
            "lower --nlist and --nbits"
        )
    return nlist, m, nbits


def make_index(dim: int, nlist: int, m: int, nbits: int, seed: int):
    """An untrained IVFPQ by inner product. The vectors are unit vectors, so l2 ranks alike; inner product needs one
    look-up table a query where l2 needs one a query and list."""
    import faiss

    index = faiss.IndexIVFPQ(faiss.IndexFlatIP(dim), dim, nlist, m, nbits, faiss.METRIC_INNER_PRODUCT)
    seed %= 1 << 31  # it is an int
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


def count_gpus() -> int:
    """GPUs that the installed faiss can use."""
    import faiss

    return getattr(faiss, "get_num_gpus", int)()


def to_gpus(index):
    """The index on all GPUs that FAISS has, if there are any."""
    import faiss

    return faiss.index_cpu_to_all_gpus(index) if count_gpus() else index


def write(index, path: Path, from_gpus: bool, folder) -> float:
    """Write an index; returns the imbalance of its lists. Raises InputError, naming `folder`, if that fails."""
    import faiss

    if from_gpus:
        index = faiss.index_gpu_to_cpu(index)
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise InputError(f"{folder}: faiss.index not written ({reason}): free some space") from None
    return faiss.extract_index_ivf(index).invlists.imbalance_factor()
