"""build_index: an IVFPQ over every embedding, the same for the same seed, and refusals in one line."""

import json

import faiss
import numpy as np
import pytest
from conftest import call_stage, succeed

from build_index import sample_embeddings
from codec import default_nlist
from ragged import Ragged


def test_index_holds_every_embedding(index_dir, embedding_dir):
    meta, embeddings = json.loads((index_dir / "meta.json").read_text()), Ragged(embedding_dir)
    index = faiss.read_index(str(index_dir / "faiss.index"))
    assert index.ntotal == meta["embeddings"] == len(embeddings.values)
    assert index.nlist == meta["nlist"] == 4 and index.metric_type == faiss.METRIC_INNER_PRODUCT
    index.nprobe = index.nlist
    values = embeddings.values.astype(np.float32)
    _, found = index.search(values, 50)
    assert np.mean([i in row for i, row in enumerate(found)]) > 0.9  # ids are positions: each finds itself


def test_linked_not_copied(index_dir, embedding_dir):
    for name in ("values.npy", "offsets.npy", "pids.npy"):
        assert (index_dir / name).samefile(embedding_dir / name)


def test_same_seed_same_index(index_dir, index_arguments, tmp_path):
    succeed(call_stage("build_index.py", *index_arguments, "--output_dir", tmp_path / "again"))
    succeed(call_stage("build_index.py", *index_arguments, "--output_dir", tmp_path / "other", "--seed", 7))
    built = [(folder / "faiss.index").read_bytes() for folder in (index_dir, tmp_path / "again", tmp_path / "other")]
    assert built[0] == built[1] != built[2]


@pytest.mark.parametrize(("n", "nlist"), [(100, 2), (10_000, 256), (2_500_000, 8192), (600_000_000, 131072)])
def test_default_nlist(n, nlist):
    assert default_nlist(n) == nlist


def test_sample_is_whole_passages_drawn_by_seed(embedding_dir):
    embeddings = Ragged(embedding_dir)
    sample, again, other = (sample_embeddings(embeddings, 100, seed)[0] for seed in (1, 1, 2))
    assert np.array_equal(sample, again) and not np.array_equal(sample, other)
    assert 100 <= len(sample) <= len(embeddings.values) and sample.dtype == np.float32
    everything, lengths = sample_embeddings(embeddings, 10**9, 1)
    assert np.array_equal(lengths, np.diff(embeddings.offsets))
    assert np.array_equal(everything, embeddings.values.astype(np.float32))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--m", 7), "--m 7 does not divide the dimension 16"),
        (("--nlist", 10**6), "embeddings cannot train 1000000 lists"),
        (("--embedding_dir", "nowhere"), "nowhere: not a finished embeddings folder"),
    ],
)
def test_refusals(index_arguments, tmp_path, flags, message):
    done = call_stage("build_index.py", *index_arguments, "--output_dir", tmp_path / "index", *flags)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
