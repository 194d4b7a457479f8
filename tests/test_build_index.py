"""build_index: an IVFPQ over every embedding, the same for the same seed, and refusals in one line."""

import json
import shutil
from pathlib import Path

import faiss
import numpy as np
import pytest
from conftest import call_stage, run_stage_cli, succeed
from made import change

from build_index import sample_embeddings
from nanocolbert.cli import InputError
from nanocolbert.index.centroids import default_nlist
from nanocolbert.index.compressed import CompressedIndex
from nanocolbert.storage.artifact import read_json, write_json
from nanocolbert.storage.ragged import Ragged
from search import Searcher


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
        (("--nlist", 400, "--sample", 1), "raise --sample"),
        (("--nbits", 17), "give at most 16"),
        (("--embedding_dir", "nowhere"), "nowhere: not a finished embeddings folder"),
    ],
)
def test_refusals(index_arguments, tmp_path, flags, message):
    done = call_stage("build_index.py", *index_arguments, "--output_dir", tmp_path / "index", *flags)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--nlist", "--m", "--nbits", "--sample", "--seed"])
def test_numbers_below_what_they_may_be(index_arguments, tmp_path, flag):
    done = call_stage("build_index.py", *index_arguments, "--output_dir", tmp_path / "index", flag, -1)
    assert done.returncode == 2 and "'-1' is not a whole number" in done.stderr and not list(tmp_path.iterdir())


def make_embeddings(source: Path, folder: Path, lengths, scale: float = 1.0, **facts) -> Path:
    """Embeddings of passages of these lengths, each vector of length `scale`."""
    rng, meta = np.random.default_rng(0), json.loads((source / "meta.json").read_text())
    values = rng.normal(size=(sum(lengths), meta["dim"]))
    values *= scale / np.linalg.norm(values, axis=1, keepdims=True)
    folder.mkdir()
    np.save(folder / "values.npy", values.astype(np.float16))
    np.save(folder / "offsets.npy", np.append(0, np.cumsum(lengths)))
    np.save(folder / "pids.npy", 100 + np.arange(len(lengths)))
    del meta["files"], meta["checksum"]
    meta |= {"passages": len(lengths), "embeddings": sum(lengths), **facts}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.mark.parametrize(
    ("lengths", "how", "message"),
    [
        ([9] * 40, {"scale": 3.0}, "not of unit length (one is 3 long)"),
        ([9] * 40, {"normalized": False}, "not of unit length (by its meta.json)"),
        ([9] * 20 + [0] + [9] * 19, {}, "passage 120 has 0 embeddings"),
        ([9] * 39 + [0], {}, "passage 139 has 0 embeddings"),
        ([9] * 39 + [1024], {}, "passage 139 has 1024 embeddings"),
        ([9] * 40, {"passages": 41}, "40 passages, 41 by its meta.json"),
        ([9] * 40, {"embeddings": 361}, "360 embeddings, 361 by its meta.json"),
    ],
)
def test_embeddings_that_no_index_can_hold(embedding_dir, model_dir, toy_dir, tmp_path, lengths, how, message):
    source = make_embeddings(embedding_dir, tmp_path / "embeddings", lengths, **how)
    for method in ("codes", "ivfpq"):
        flags = ("--embedding_dir", source, "--output_dir", tmp_path / "index", "--method", method)
        flags += ("--nlist", 4, *(("--m", 8, "--nbits", 4) if method == "ivfpq" else ()))
        done = call_stage("build_index.py", *flags)
        if method == "ivfpq" and max(lengths) == 1024:
            succeed(done)
        else:
            assert done.returncode == 2 and message in done.stderr, done.stderr
            assert sorted(path.name for path in tmp_path.iterdir()) == ["embeddings"]
    if 0 in lengths:  # exact search on the embeddings
        flags = ("--index_dir", source, "--queries", toy_dir / "queries.tsv", "--output", tmp_path / "run", "--exact")
        done = call_stage("retrieve.py", "--cpu", "--model", model_dir, *flags)
        assert done.returncode == 2 and "no embeddings: leave it out" in done.stderr


def test_embeddings_are_not_replaced_nor_what_no_stage_wrote(embedding_dir, tmp_path):
    source = shutil.copytree(embedding_dir, tmp_path / "embeddings")
    flags = ("--embedding_dir", source, "--nlist", 4, "--output_dir")
    for output in (source, tmp_path):
        done = call_stage("build_index.py", *flags, output)
        assert done.returncode == 2 and "holds what is read" in done.stderr
    assert Ragged(source)
    succeed(call_stage("build_index.py", *flags, tmp_path / "index"))
    (tmp_path / "pids").write_text("p3\n")
    succeed(call_stage("update_index.py", "--index_dir", tmp_path / "index", "--delete", tmp_path / "pids"))
    (tmp_path / "index/state.json.partial").touch()  # of a change that was killed
    succeed(call_stage("build_index.py", *flags, tmp_path / "index"))
    (tmp_path / "index/notes").write_text("mine")
    done = call_stage("build_index.py", *flags, tmp_path / "index")
    assert done.returncode == 2 and "notes in it is not a part of it" in done.stderr


def test_checksums(embedding_dir, index_dir, tmp_path):
    """Of linked files those of the embeddings; --verify reads all."""
    sums = [json.loads((folder / "meta.json").read_text())["files"] for folder in (embedding_dir, index_dir)]
    for name in ("values.npy", "offsets.npy", "pids.npy"):
        assert sums[0][name] == sums[1][name]
    flags = ("--embedding_dir", embedding_dir, "--nlist", 4, "--keep_vectors", "--verify")
    succeed(call_stage("build_index.py", *flags, "--output_dir", tmp_path / "index"))
    state = json.loads((tmp_path / "index/state.json").read_text())
    assert state["segments"][0]["files"]["vectors.npy"] == sums[0]["values.npy"]
    done = succeed(call_stage("update_index.py", "--index_dir", tmp_path / "index", "--compact", "--verify"))
    fine = tmp_path / "index/segments/2/fine.npy"
    fine.write_bytes(fine.read_bytes()[:-1] + b"!")
    assert CompressedIndex(tmp_path / "index")
    done = call_stage("update_index.py", "--index_dir", tmp_path / "index", "--compact", "--verify")
    assert done.returncode == 2 and "fine.npy: damaged" in done.stderr and len(done.stderr.splitlines()) == 1
    source = shutil.copytree(embedding_dir, tmp_path / "embeddings")
    (source / "values.npy").write_bytes((source / "values.npy").read_bytes()[:-1] + b"!")
    flags = ("--embedding_dir", source, "--output_dir", tmp_path / "other", "--verify")
    done = call_stage("build_index.py", *flags)
    assert done.returncode == 2 and "values.npy: damaged" in done.stderr


# ------------------------------------------------------------------------------------------------- compressed at once


def test_meta_says_what_a_token_takes(codes_dir):
    meta = json.loads((codes_dir / "meta.json").read_text())
    files = (path for path in codes_dir.rglob("*.npy") if path.name != "pids.npy" and path.parent.name != "texts")
    size = sum(path.stat().st_size for path in files)
    assert meta["method"] == "codes" and meta["bytes_per_embedding"] == round(size / meta["embeddings"], 2)


@pytest.fixture(scope="module")
def compressed_dir(tmp_path_factory, embedding_arguments) -> Path:
    """doc2embedding.py --bits."""
    folder = tmp_path_factory.mktemp("compressed") / "embeddings"
    flags = [*embedding_arguments, "--bits", 4, "--nlist", 4, "--output_dir", folder]
    succeed(run_stage_cli("doc2embedding.py", *flags))
    return folder


def test_compressed_at_once(compressed_dir, codes_dir, model_dir, toy_dir, tmp_path):
    """No vectors on the disk, scores like those of vectors compressed later, and the texts."""
    texts = dict(line.split("\t") for line in (toy_dir / "collection.tsv").read_text().splitlines())
    assert not (compressed_dir / "values.npy").exists()
    succeed(call_stage("build_index.py", "--embedding_dir", compressed_dir, "--output_dir", tmp_path / "index"))
    meta = json.loads((tmp_path / "index" / "meta.json").read_text())
    assert meta["bits"] == 4 and meta["nlist"] == 4
    scores = []
    for folder in (tmp_path / "index", codes_dir):
        hits = Searcher(folder, model_dir, "cpu").search("red apple", k=1000, exact=True, by_codes=True)
        scores.append({hit.pid: hit.score for hit in hits})
        assert {hit.pid: hit.text for hit in hits} == texts
    assert scores[0].keys() == scores[1].keys()
    assert max(abs(scores[0][pid] - scores[1][pid]) for pid in scores[0]) < 1.0


def test_a_codec_that_is_there(codes_dir, compressed_dir, embedding_dir, tmp_path):
    """The very same index, by its own codec; that of compressed embeddings; and what cannot be."""
    flags = ("--embedding_dir", embedding_dir, "--output_dir", tmp_path / "index")
    succeed(call_stage("build_index.py", *flags, "--codec", codes_dir))
    state, meta = (json.loads((tmp_path / "index" / name).read_text()) for name in ("state.json", "meta.json"))
    assert state == json.loads((codes_dir / "state.json").read_text()) and (meta["bits"], meta["nlist"]) == (4, 4)
    succeed(call_stage("build_index.py", *flags, "--codec", compressed_dir))
    other = json.loads((tmp_path / "index/meta.json").read_text())
    assert other["fingerprint"] != meta["fingerprint"]
    codebook = "representative_coarse.npy"
    assert (tmp_path / "index" / codebook).read_bytes() == (compressed_dir / "codec" / codebook).read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--codec", "CODES", "--nlist", 3), "--nlist 3: the codec in CODES has 4"),
        (("--codec", "CODES", "--bits", 2), "--bits 2: the codec in CODES has 4"),
        (("--codec", "CODES", "--method", "ivfpq"), "--codec says nothing to --method ivfpq"),
        (("--codec", "EMBEDDINGS"), "EMBEDDINGS: has no codec"),
        (("--codec", "OTHER"), "OTHER: a codec for another model"),
        (("--codec", "DAMAGED", "--verify"), "DAMAGED/centroids.npy: damaged"),
        (("--codec", "nowhere"), "nowhere: not a finished index folder"),
        (("--codec", "CODES", "--embedding_dir", "COMPRESSED"), "compressed already, by a codec of its own"),
    ],
)
def test_refusals_of_a_codec(codes_dir, compressed_dir, embedding_dir, tmp_path_factory, tmp_path, flags, message):
    other = shutil.copytree(codes_dir, tmp_path_factory.mktemp("other") / "index")
    meta = read_json(other / "meta.json") | {"model_fingerprint": "0" * 32}
    write_json(other / "meta.json", meta, summed=True)
    damaged = shutil.copytree(codes_dir, other.parent / "damaged")
    change(damaged / "centroids.npy", lambda centroids: -centroids)
    places = {
        "DAMAGED": damaged,
        "CODES": codes_dir,
        "COMPRESSED": compressed_dir,
        "EMBEDDINGS": embedding_dir,
        "OTHER": other,
    }
    for name, place in places.items():
        message = message.replace(name, str(place))
    given = ("--embedding_dir", embedding_dir, "--output_dir", tmp_path / "index")
    done = call_stage("build_index.py", *given, *(places.get(flag, flag) for flag in flags))
    assert done.returncode == 2 and message in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--method", "ivfpq"), "compressed, without vectors"),
        (("--keep_vectors",), "compressed, without vectors"),
        (("--bits", 2), "compressed with 4 bits, 4 centroids"),
    ],
)
def test_refusals_of_compressed_embeddings(compressed_dir, tmp_path, flags, message):
    done = call_stage("build_index.py", "--embedding_dir", compressed_dir, "--output_dir", tmp_path / "index", *flags)
    assert done.returncode == 2 and message in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("parts/4.sizes.npy", None, "missing"),
        ("parts/1.coarse.npy", lambda codes: codes[:-1], "part 1 do not fit"),
        ("parts/1.sizes.npy", lambda sizes: sizes[:-1], "of shape"),
        ("parts/1.coarse.npy", lambda codes: np.full_like(codes, 255), "damaged codes"),
        ("pids.npy", lambda pids: pids[:0], "pids.npy: of shape"),
        ("codec/centroids.npy", lambda centroids: centroids[:, :-1], "centroids.npy: of shape"),
    ],
)
def test_parts_that_are_not_whole(compressed_dir, tmp_path, name, edit, message):
    source = shutil.copytree(compressed_dir, tmp_path / "embeddings")
    meta = json.loads((source / "meta.json").read_text())
    del meta["files"], meta["checksum"]  # else sizes tell
    (source / "meta.json").write_text(json.dumps(meta))
    change(source / name, edit) if edit else (source / name).unlink()
    done = call_stage("build_index.py", "--embedding_dir", source, "--output_dir", tmp_path / "index")
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["embeddings"]


def test_compressed_embeddings_are_not_searched(compressed_dir, model_dir):
    with pytest.raises(InputError, match="compressed embeddings: run build_index"):
        Searcher(compressed_dir, model_dir, "cpu")


def test_centroids_are_for_compression(embedding_arguments, tmp_path):
    done = call_stage("doc2embedding.py", *embedding_arguments, "--nlist", 4, "--output_dir", tmp_path / "embeddings")
    assert done.returncode == 2 and "--nlist says nothing without --bits" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_killed_compression_goes_on(compressed_dir, embedding_arguments, tmp_path):
    folder = shutil.copytree(compressed_dir, tmp_path / "embeddings")
    (folder / "meta.json").unlink()
    (folder / "parts" / "1.json").unlink()
    (folder / "parts" / "1.fine.npy").write_bytes(b"half")
    succeed(run_stage_cli("doc2embedding.py", *embedding_arguments, "--bits", 4, "--nlist", 4, "--output_dir", folder))
    for path in (compressed_dir / "parts").glob("*.npy"):
        assert path.read_bytes() == (folder / "parts" / path.name).read_bytes()
