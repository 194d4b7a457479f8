"""The compressed index on a GPU: the steps of compressed.py in PyTorch, on whatever device the arrays were put.

Everything but kept vectors lies on the device: about as many bytes a token as build_index.py reports. There products
are cheaper than look-ups, so the codes of the passages in question are decoded, in fp16, and multiplied with the query.
"""

import threading

import numpy as np
import torch
from torch import Tensor

from nanocolbert.index.book import Book
from nanocolbert.index.compressed import CompressedIndex
from nanocolbert.index.kernels.score import SCALE
from nanocolbert.index.segments import BLOCK, Segment
from nanocolbert.maxsim import maxsim_packed


class GpuIndex(CompressedIndex):
    """An open compressed index whose arrays are on `device`; searched as CompressedIndex is."""

    def __init__(self, folder, device):
        """Raises InputError if there is no index."""
        super().__init__(folder)
        self._lock = threading.Lock()
        self.device, codec, self.on_device = torch.device(device), self.codec, {}
        self.dtype = torch.float16 if self.device.type == "cuda" else torch.float32  # CPUs are slow with fp16
        self.rotation = torch.from_numpy(codec.rotation).to(self.device)
        self.centroids = torch.from_numpy(codec.centroids).to(self.device, self.dtype)
        self.norms = torch.from_numpy(codec.norms).to(self.device, self.dtype)
        self.books = [GpuBook(book, self.device, self.dtype) for book in codec.books]

    def check(self) -> None:
        """Before the first search, not before, put the segments on the device: another process may search them."""
        with self._lock:
            if not self.on_device:
                super().check()
                self.on_device = {segment.first_row: GpuSegment(segment, self.device) for segment in self.segments}

    def _prepare(self, query: Tensor) -> tuple[Tensor, Tensor]:
        self.check()
        query = query[query.any(1)].to(self.device)
        return query, (query @ self.rotation).to(self.dtype)

    def _probe(self, query: Tensor, n_tokens: int, nprobe: int, n: int, allowed) -> np.ndarray:
        """Step 1: the n most promising rows, in order; query (Lq, D) is rotated, as it is in all that follows."""
        similarities = (query @ self.centroids.T).float()  # (Lq, C)
        values, probes = similarities.topk(min(nprobe, len(self.centroids)))
        gains = ((values - values[:, -1:]) * SCALE).int() + 1
        promises = torch.zeros(len(self), dtype=torch.int32, device=self.device)
        for segment in self.on_device.values():
            for number, starts in enumerate(segment.starts):
                begins = starts[probes]  # (Lq, P)
                lengths = (starts[probes + 1] - begins).flatten()
                passages = segment.lists[spans(begins.flatten(), lengths)].long()
                token = torch.arange(n_tokens, device=self.device).repeat_interleave(lengths.view(n_tokens, -1).sum(1))
                # a passage counts once a query token, by its best list, which comes first
                keys, order = (token * BLOCK + passages).sort(stable=True)
                is_first = torch.ones_like(keys, dtype=torch.bool)
                is_first[1:] = keys[1:] != keys[:-1]
                gain = gains.flatten().repeat_interleave(lengths)[order[is_first]]
                rows = segment.first_row + number * BLOCK + keys[is_first] % BLOCK
                promises.index_add_(0, rows, gain)
            promises[segment.first_row :][: len(segment.alive)] *= segment.alive
        if allowed is not None:
            promises *= torch.from_numpy(allowed).to(self.device)
        keys = (promises.long() << 32) - torch.arange(len(promises), device=self.device)  # the first of equal ones
        best = keys.topk(min(n, len(keys)))
        return best.indices[best.values > 0].sort().values.cpu().numpy()

    def _scores(self, rows: np.ndarray, query: Tensor, fine: bool) -> np.ndarray:
        """MaxSim (n,) of rows in order, by coarse codes or by all codes."""
        scores = np.zeros(len(rows), np.float32)
        for segment, part in self.parts(rows):
            local = torch.from_numpy(rows[part] - segment.first_row).to(self.device)
            vectors, lengths = self._decode(self.on_device[segment.first_row], local, fine)
            scores[part] = maxsim_packed(query[None], vectors, lengths)[0].cpu().numpy()
        return scores

    def _decode(self, segment: "GpuSegment", rows: Tensor, fine: bool) -> tuple[Tensor, Tensor]:
        """Vectors (T, D) of passages, rotated, one passage after the other, and the passages' lengths (n,)."""
        (at, fine_at), (n, f), M = segment.offsets[rows].T, segment.sizes[rows].T, self.codec.M.tolist()
        pairs = segment.coarse[spans(at, 2 * n)].view(-1, 2).long()
        vectors = self.centroids[(pairs[:, 0] + 256 * pairs[:, 1]).clamp_(max=len(self.centroids) - 1)]
        self.books[0].add_to(vectors, segment.coarse[spans(at + 3 * n, M[0] * n)], levels=[0])
        norms = segment.coarse[spans(at + 2 * n, n)].long()
        if not fine:
            return vectors * self.norms[0, norms, None], n
        self.books[0].add_to(vectors, segment.fine[spans(fine_at + 2 * f, M[1] * n)], levels=[1])
        parents = torch.minimum(segment.fine[spans(fine_at, f)].long(), (n - 1).repeat_interleave(f))
        parents += (n.cumsum(0) - n).repeat_interleave(f)
        followers = vectors[parents]
        self.books[1].add_to(followers, segment.fine[spans(fine_at + 2 * f + M[1] * n, M[2] * f)], levels=[0, 1])
        vectors *= self.norms[1, norms, None]
        followers *= self.norms[2, segment.fine[spans(fine_at + f, f)].long(), None]
        passage = torch.arange(len(rows), device=self.device)
        order = torch.cat([passage.repeat_interleave(n), passage.repeat_interleave(f)]).argsort(stable=True)
        return torch.cat([vectors, followers])[order], n + f


class GpuSegment:
    """Arrays of a segment on a device."""

    def __init__(self, segment: Segment, device):
        move = lambda array: torch.from_numpy(array).to(device)  # noqa: E731
        self.first_row = segment.first_row
        self.coarse, self.fine, self.alive = move(segment.coarse), move(segment.fine), move(segment.alive)
        self.offsets, self.starts = move(segment.offsets), move(segment.starts)
        self.sizes, self.lists = move(segment.sizes.astype(np.int64)), move(segment.lists.view(np.int16)).int() & 0xFFFF
        if len(segment):  # what the last block's lists may name
            self.lists[segment.starts[-1, 0] :].clamp_(max=(len(segment) - 1) % BLOCK)


class GpuBook:
    """Both levels of a book on a device: codewords (M, 256, d), and the columns of each part."""

    def __init__(self, book: Book, device, dtype):
        self.codewords = [torch.from_numpy(words).to(device, dtype) for words in book.codewords]
        columns = torch.from_numpy(book.columns).to(device)
        self.columns = [columns.tensor_split(torch.from_numpy(edges[1:-1])) for edges in book.edges]

    def add_to(self, vectors: Tensor, codes: Tensor, levels: list[int]) -> None:
        """Add what codes (n * M,) uint8 of these levels stand for to vectors (n, D)."""
        codes = codes.view(len(vectors), sum(len(self.columns[level]) for level in levels)).long()
        for level in levels:
            for m, columns in enumerate(self.columns[level]):
                vectors[:, columns] += self.codewords[level][m, codes[:, m], : len(columns)]
            codes = codes[:, len(self.columns[level]) :]


def spans(starts: Tensor, lengths: Tensor) -> Tensor:
    """start, start + 1, ..., start + length - 1 of each span, one after the other: (sum of lengths,) int64."""
    shifts = starts - lengths.cumsum(0) + lengths
    return torch.arange(int(lengths.sum()), device=starts.device) + shifts.repeat_interleave(lengths)
