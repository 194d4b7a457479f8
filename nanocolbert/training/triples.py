"""Training triples and the batches made of them: a batch is a function of its step."""

from pathlib import Path

import numpy as np
import torch

from nanocolbert.cli import InputError
from nanocolbert.encoder.attention import pack
from nanocolbert.storage.ragged import Ragged, length_batches, load_npy
from nanocolbert.text import FRAME

TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 1 << 16}  # passages that go through the encoder together, if padded
ROWS = 1 << 20  # triples that are checked at a time


class Triples:
    """The training batches: a function of the step, so that nothing has to be remembered to resume."""

    def __init__(self, tokens_dir, batch_size: int, shuffle_seed: int | None):
        self.folder = Path(tokens_dir)
        self.passages, self.queries = Ragged(self.folder / "passages"), Ragged(self.folder / "queries")
        self.triples = load_npy(self.folder / "triples.npy", "i4", (None, None))  # (n, 1 + K): a query, its passages
        scores = self.folder / "scores.npy"  # of the passages, where the training file had some
        n, width = self.triples.shape
        self.scores = load_npy(scores, "f4", (n, width - 1)) if scores.exists() else None  # (n, K)
        self.batch_size, self.shuffle_seed = batch_size, shuffle_seed
        self.epoch, self.order = -1, None

    def check(self) -> None:
        """Raise InputError where a triple names a query or a passage that is not there, or a score is no number."""
        path, n_queries, n_passages = self.folder / "triples.npy", len(self.queries), len(self.passages)
        if not len(self.triples) or self.triples.shape[1] < 2:
            raise InputError(f"{path}: {self.triples.shape} holds no triples: run tsv2mmap.py again")
        for start in range(0, len(self.triples), ROWS):
            rows = self.triples[start : start + ROWS].view(np.uint32)  # below 0 is beyond all
            passages = rows if n_passages >= n_queries else rows[:, 1:]  # faster where it is all of them
            if rows[:, 0].max() >= n_queries or passages.max() >= n_passages:
                row = int(((rows[:, 0] >= n_queries) | (rows[:, 1:] >= n_passages).any(1)).argmax())
                raise InputError(
                    f"{path}: triple {start + row} is {self.triples[start + row].tolist()}, of {n_queries} queries and "
                    f"{n_passages} passages: run tsv2mmap.py again"
                )
            if self.scores is not None and not np.isfinite(self.scores[start : start + ROWS]).all():
                row = start + int((~np.isfinite(self.scores[start : start + ROWS])).any(1).argmax())
                raise InputError(
                    f"{self.folder / 'scores.npy'}: the scores of triple {row} are {self.scores[row].tolist()}: run "
                    "tsv2mmap.py again"
                )

    def rows(self, step: int) -> np.ndarray:
        """Triples (batch_size, 1 + K) of a step, counted from 0; the data starts again when it is used up."""
        return self.triples[self._places(step)]

    def scores_of(self, step: int) -> np.ndarray | None:
        """Scores (batch_size, K) fp32 of the passages of `rows(step)`; None where there are none."""
        return None if self.scores is None else self.scores[self._places(step)]

    def _places(self, step: int) -> np.ndarray:
        """Which triples a step has (batch_size,)."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        n = len(self.triples)
        if self.shuffle_seed is None:
            return positions % n
        epochs = positions // n
        parts = [self._order(epoch)[positions[epochs == epoch] % n] for epoch in np.unique(epochs).tolist()]
        return np.concatenate(parts)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch != self.epoch:
            rng = np.random.default_rng([self.shuffle_seed, epoch])
            self.epoch, self.order = epoch, rng.permutation(np.arange(len(self.triples), dtype=np.int32))
        return self.order


def collate(data: Triples, rows: np.ndarray, model, tokens_per_batch: int, packed: bool) -> dict:
    """A micro-batch of triples (B, 1 + K): framed queries and passages in batches of like length, or all packed.

    A passage of several rows is embedded once. Returns the arguments of model.forward ("inputs"), what the loss needs
    beside the embeddings it gives ("mask", "rows"), and how many tokens there are, padding aside.
    """
    passage_rows = rows[:, 1:].reshape(-1)  # (N,), N = B * K: each query's positive, then its negatives
    different, which = np.unique(passage_rows, return_inverse=True)
    lengths = data.passages.lengths(different)
    groups = length_batches(lengths + FRAME, (1 << 62) if packed else tokens_per_batch)
    queries, passages = data.queries.gather(rows[:, 0]), [data.passages.gather(different[group]) for group in groups]
    for name, (values, _) in (("queries", queries), *(("passages", part) for part in passages)):
        model.check_ids(data.folder / name / "values.npy", values)  # on a GPU an error that names nothing
    input_ids, attention_mask = model.frame_queries(*queries)
    batches = [model.frame_passages(*part) for part in passages]
    tokens = input_ids.numel() + sum(int(mask.sum()) for _, mask in batches)
    kept = [model.kept(*batch) for batch in batches]  # (B', L) each
    counts = torch.cat([part.sum(1) for part in kept])  # of each different passage, in the order of the batches
    if packed:
        kept = [part[mask.bool()] for part, (_, mask) in zip(kept, batches, strict=True)]
        everything = torch.ones_like(input_ids)  # the fill has outputs, too
        batches = [pack((input_ids, attention_mask, everything), *((ids, mask, mask) for ids, mask in batches))]
    else:
        batches = [(input_ids, attention_mask), *batches]
    mask = torch.arange(int(counts.max())) < counts[:, None]
    slots = torch.zeros(mask.shape, dtype=torch.int64)
    slots[mask] = torch.cat([part.view(-1) for part in kept]).nonzero()[:, 0] + input_ids.numel()
    back = torch.from_numpy(np.argsort(np.concatenate(groups))[which])  # (N,) to where each passage is
    return {
        "inputs": {"batches": batches, "scored": model.scored(attention_mask), "slots": slots[back]},
        "mask": mask[back],
        "rows": torch.from_numpy(rows.astype(np.int64)),
        "tokens": tokens,
    }
