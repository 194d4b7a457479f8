"""Compiled loops: where they are kept, and what they hold on to."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from made import DIM, NLIST, make_passages, make_query, offsets_of
from numba import njit

from nanocolbert.compute import compiled
from nanocolbert.index.codec import Codec
from nanocolbert.index.kernels.score import LANES


def test_compiled_without_a_folder_to_write_to():
    names = {}
    exec(compile("def double(x):\n    return 2 * x", "/nowhere/loops.py", "exec"), names)
    with pytest.raises(RuntimeError, match="no locator available"):
        njit(cache=True)(names["double"])
    assert compiled()(names["double"])(21) == 42


def test_no_array_is_freed_while_its_address_is_used(tmp_path):
    """Where every array is a mapping of its own, which is gone once it is freed, a use of it ends the process."""
    codec = Codec.train(*make_passages(300, 1), 2, NLIST, seed=0)
    codes, tables, book = codec.encode(*make_passages(5, 2)), codec.tables(make_query(LANES, 3)), codec.books[0]
    score = (np.arange(5), *codes[:2], offsets_of(codec, codes), codes.sizes, codec.M, tables.centroids, *tables.books)
    vectors, codes = np.ones((3, DIM), np.float32), np.zeros((3, sum(map(len, book.codewords))), np.uint8)
    quantise = (vectors, book.columns, *book.codewords, *book.edges, book.within, 8, codes, np.stack([vectors] * 2))
    with open(tmp_path / "calls", "wb") as file:
        calls = [("score", "score_fine", (*score, codec.factors, np.zeros(5, np.int32)))]
        pickle.dump([*calls, ("quantise", "quantise", quantise)], file)
    program = (
        "import importlib, pickle, sys\n"
        "for file, name, arguments in pickle.load(open(sys.argv[1], 'rb')):\n"
        "    getattr(importlib.import_module(f'nanocolbert.index.kernels.{file}'), name)(*arguments)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "calls"], cwd=ROOT, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "64"}
    )
    assert done.returncode == 0
