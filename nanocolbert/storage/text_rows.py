"""Rows of texts that have been seen, found by a 64-bit hash of each: 12 bytes a text."""

import hashlib

import numpy as np


class TextRows:
    """Row of each distinct text, by 64-bit hash: a sorted array, and a small dict of what came since it was sorted."""

    def __init__(self):
        self.hashes, self.sorted_rows, self.recent = np.zeros(0, np.uint64), np.zeros(0, np.int32), {}

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """Row of each hash (n,) int64, -1 where it is new."""
        if len(self.recent) > max(1 << 16, len(self.hashes) // 4):
            self._merge()
        rows = np.full(len(hashes), -1, np.int64)
        if len(self.hashes):
            at = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
            rows = np.where(self.hashes[at] == hashes, self.sorted_rows[at], rows)
        new = np.flatnonzero(rows < 0)
        rows[new] = [self.recent.get(h, -1) for h in hashes[new].tolist()]
        return rows

    def add(self, hashes: np.ndarray, first_row: int) -> None:
        """Give rows first_row, first_row + 1, ... to the hashes; a text that came before keeps its first row."""
        for row, h in enumerate(hashes.tolist(), first_row):
            self.recent.setdefault(h, row)

    def _merge(self) -> None:
        hashes = np.concatenate([self.hashes, np.fromiter(self.recent.keys(), np.uint64, len(self.recent))])
        rows = np.concatenate([self.sorted_rows, np.fromiter(self.recent.values(), np.int32, len(self.recent))])
        order = np.argsort(hashes, kind="stable")
        self.hashes, self.sorted_rows, self.recent = hashes[order], rows[order], {}


def hash_texts(texts: list[str]) -> np.ndarray:
    """64-bit hash of each text (n,)."""
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, np.uint64)
