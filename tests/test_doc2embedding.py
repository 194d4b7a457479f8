"""doc2embedding: the model's own vectors, in the collection's order, whoever computed them and however often."""

import io
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import call_stage, launch_cli, succeed
from tqdm import tqdm

from model import ColBERT
from nanocolbert.config import Pooling
from nanocolbert.encoder.pooling import pool_passages
from nanocolbert.encoder.soundness import EmbeddingError
from nanocolbert.storage.artifact import lock, read_meta, verify
from nanocolbert.storage.ragged import Ids, Ragged

ARRAYS = ("values.npy", "offsets.npy", "pids.npy")


def arrays(folder) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ARRAYS}


def test_values_are_the_models(embedding_dir, model_dir, toy_dir):
    passages = dict(line.split("\t") for line in (toy_dir / "collection.tsv").read_text().splitlines())
    model, stored = ColBERT.from_pretrained(model_dir), Ragged(embedding_dir)
    assert stored.values.dtype == np.float16 and stored.values.shape == (stored.offsets[-1], 16)
    pids = Ids(embedding_dir / "pids.npy").text(np.arange(len(stored)))
    assert pids == list(passages)
    for row, text in enumerate(passages.values()):
        alone = model.encode_passages([text])[0].float()
        vectors = torch.from_numpy(stored[row].astype(np.float32))
        assert vectors.shape == alone.shape, text
        assert torch.allclose(vectors.norm(dim=-1), torch.ones(len(vectors)), atol=2e-3)
        assert (vectors * alone).sum(-1).min() > 0.998, text  # batched otherwise, perhaps in bf16
    assert len(stored[pids.index("p8")]) == 3 and len(stored[pids.index("p9")]) == 180
    meta = json.loads((embedding_dir / "meta.json").read_text())
    assert meta["kind"] == "embeddings" and meta["passages"] == 40 and meta["embeddings"] == len(stored.values)


def test_two_processes_write_the_same_files(embedding_dir, embedding_arguments, tmp_path):
    assert embedding_arguments[0] == "--cpu"  # not given here: they find each other all the same
    done = succeed(launch_cli(2, "doc2embedding.py", *embedding_arguments[1:], "--output_dir", tmp_path / "e"))
    assert arrays(tmp_path / "e") == arrays(embedding_dir)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["processes"] == 2 and report["passages"] == 40
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


@pytest.mark.parametrize("part_size", [1, 40, 10_000])
def test_part_size_is_no_matter(embedding_dir, embedding_arguments, tmp_path, part_size):
    done = call_stage(
        "doc2embedding.py", *embedding_arguments, "--part_size", part_size, "--output_dir", tmp_path / "e"
    )
    succeed(done)
    expected, found = Ragged(embedding_dir), Ragged(tmp_path / "e")
    assert np.array_equal(found.offsets, expected.offsets)
    cosines = (found.values.astype(np.float32) * expected.values.astype(np.float32)).sum(-1)
    assert cosines.min() > 0.998
    assert len(list((tmp_path / "e/parts").iterdir())) == -(-40 // part_size)


def test_part_size_is_no_matter_at_all_in_fp32(embedding_arguments, tmp_path, monkeypatch):
    for module in ("nanocolbert.compute", "doc2embedding"):
        monkeypatch.setattr(f"{module}.fast_dtype", lambda device: torch.float32)
    values = []
    for part_size in (3, 40):
        folder = tmp_path / str(part_size)
        arguments = (*embedding_arguments, "--part_size", part_size, "--output_dir", folder, "--tokens_per_batch", 300)
        succeed(call_stage("doc2embedding.py", *arguments))
        values.append(np.load(folder / "values.npy").astype(np.float32))
    assert np.allclose(values[0], values[1], atol=1e-3)


@pytest.mark.parametrize("lost", [[2], [0, 4], [0, 1, 2, 3, 4]])
def test_a_killed_run_is_completed(embedding_dir, embedding_arguments, tmp_path, lost):
    """As a kill leaves it: parts without their .json, of which anything may have been written; no meta.json."""
    folder = tmp_path / "e"
    shutil.copytree(embedding_dir, folder)
    for name in ("meta.json", "pids.npy"):
        (folder / name).unlink()
    for name in ("meta.json", "parts/9.json"):
        (folder / f"{name}.partial").write_text("{")
    values, offsets = np.load(folder / "values.npy", mmap_mode="r+"), np.load(folder / "offsets.npy")
    for number in lost:
        (folder / "parts" / f"{number}.json").unlink()
        (folder / "parts" / f"{number}.json.partial").write_text("{")
        values[offsets[9 * number] : offsets[min(40, 9 * number + 9)]] = 7
    values.flush()
    kept = {number: (folder / f"parts/{number}.json").stat().st_mtime_ns for number in {*range(5)} - {*lost}}
    succeed(call_stage("doc2embedding.py", *embedding_arguments, "--output_dir", folder))
    assert arrays(folder) == arrays(embedding_dir)
    for number, written in kept.items():
        assert (folder / f"parts/{number}.json").stat().st_mtime_ns == written  # not computed again
    assert read_meta(folder, "embeddings", "doc2embedding.py", check=True)["embeddings"] == len(values)
    assert not list(folder.rglob("*.partial"))


def test_the_bar_counts_embeddings(embedding_dir, embedding_arguments, tmp_path, monkeypatch):
    """Those that are there at first, and all in the end."""
    shutil.copytree(embedding_dir, tmp_path / "e")
    for name in ("meta.json", "parts/1.json"):
        (tmp_path / "e" / name).unlink()
    bars = []

    def progress(show, **settings):
        bars.append(tqdm(file=io.StringIO(), **settings))
        return bars[-1]

    monkeypatch.setattr("doc2embedding.progress", progress)
    succeed(call_stage("doc2embedding.py", *embedding_arguments, "--output_dir", tmp_path / "e"))
    (bar,), offsets = bars, np.load(embedding_dir / "offsets.npy")
    assert bar.initial == offsets[-1] - (offsets[18] - offsets[9]) and bar.n == bar.total == offsets[-1]


def test_a_kill_while_the_folder_is_laid_out(embedding_dir, embedding_arguments, tmp_path):
    (tmp_path / "e.partial").mkdir()
    (tmp_path / "e.partial/values.npy").write_text("half")
    succeed(call_stage("doc2embedding.py", *embedding_arguments, "--output_dir", tmp_path / "e"))
    assert arrays(tmp_path / "e") == arrays(embedding_dir) and [path.name for path in tmp_path.iterdir()] == ["e"]


def test_a_finished_folder_is_left_as_it_is(embedding_dir, embedding_arguments, tmp_path):
    shutil.copytree(embedding_dir, tmp_path / "e")
    succeed(call_stage("doc2embedding.py", *embedding_arguments, "--output_dir", tmp_path / "e"))
    assert arrays(tmp_path / "e") == arrays(embedding_dir)


def refused(*arguments) -> str:
    done = call_stage("doc2embedding.py", *arguments)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_mistakes(embedding_dir, embedding_arguments, model_dir, tmp_path):
    model = ColBERT.from_pretrained(model_dir)
    with torch.no_grad():
        model.linear.weight[0, 0] += 0.1
    model.save_pretrained(tmp_path / "other")
    shutil.copytree(embedding_dir, tmp_path / "e")
    message = refused(*embedding_arguments, "--model", tmp_path / "other", "--output_dir", tmp_path / "e")
    assert "embeddings of another model or collection: remove it" in message
    assert arrays(tmp_path / "e") == arrays(embedding_dir)

    output = ("--output_dir", tmp_path / "new")
    assert "run train.py first" in refused(*embedding_arguments, "--model", tmp_path / "none", *output)
    assert "run tsv2mmap.py first" in refused(*embedding_arguments, "--tokens_dir", tmp_path / "none", *output)
    assert "give the folder written by tsv2mmap.py" in refused(
        *embedding_arguments, "--tokens_dir", embedding_dir, *output
    )
    assert not (tmp_path / "new").exists()


def test_a_codec_that_is_there(embedding_arguments, codes_dir, embedding_dir, tmp_path):
    """That of an index, or of embeddings, is taken; what was begun with another is not gone on with."""
    flags, (first, second) = (*embedding_arguments, "--bits", 4), (tmp_path / "first", tmp_path / "second")
    for out, codec in ((first, codes_dir), (second, first)):
        succeed(call_stage("doc2embedding.py", *flags, "--output_dir", out, "--codec", codec))
    made = sorted([*first.glob("codec/*"), *first.glob("parts/*.npy")])
    assert len(made) > 20 and all(path.read_bytes() == (second / path.relative_to(first)).read_bytes() for path in made)
    assert (first / "codec/centroids.npy").read_bytes() == (codes_dir / "centroids.npy").read_bytes()
    assert "embeddings of another model or collection" in refused(*flags, "--output_dir", first, "--codec", second)
    out = ("--output_dir", tmp_path / "new")
    assert "--codec says nothing without --bits" in refused(*embedding_arguments, *out, "--codec", codes_dir)
    assert "--nlist 3: the codec in" in refused(*flags, *out, "--codec", codes_dir, "--nlist", 3)
    assert "has no codec" in refused(*flags, *out, "--codec", embedding_dir)
    assert "the codec in" in refused(*embedding_arguments, "--bits", 2, *out, "--codec", codes_dir)
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_found_or_coded_is_said_before_work(embedding_arguments, tokens_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("doc2embedding.LONGEST", 100)
    message = refused(*embedding_arguments, "--bits", 2, "--output_dir", tmp_path / "e")
    assert "passage p9 has " in message and "run tsv2mmap.py with a smaller --doc_maxlen" in message
    monkeypatch.setattr(ColBERT, "kept_counts", lambda self, values, lengths, factor: np.zeros(len(lengths), np.int64))
    message = refused(*embedding_arguments, "--output_dir", tmp_path / "e")
    assert "passage p0 has 0 embeddings" in message and "leave it out of the collection" in message
    assert not list(tmp_path.iterdir())


def test_a_bad_embedding_names_its_passage(embedding_arguments, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise EmbeddingError("its embeddings are not finite", 2)

    monkeypatch.setattr(ColBERT, "embed_passages", fail)
    assert "passage p2: its embeddings are not finite" in refused(*embedding_arguments, "--output_dir", tmp_path / "e")
    assert not (tmp_path / "e/meta.json").exists()


@pytest.mark.parametrize("name", ["values.npy", "offsets.npy", "parts/1.json", "pids.npy"])
def test_a_damaged_folder_is_not_finished_again(embedding_dir, embedding_arguments, tmp_path, name):
    shutil.copytree(embedding_dir, tmp_path / "e")
    (tmp_path / "e" / name).write_bytes((embedding_dir / name).read_bytes()[:-7])
    assert f"{name}: " in refused(*embedding_arguments, "--output_dir", tmp_path / "e")


def test_checksums_of_all_files(embedding_dir, embedding_arguments, tokens_dir, tmp_path):
    size = sum(path.stat().st_size for path in embedding_dir.rglob("*") if path.is_file())
    assert verify(embedding_dir) == size - (embedding_dir / "meta.json").stat().st_size
    spans = json.loads((embedding_dir / "meta.json").read_text())["files"]["values.npy"]
    assert len(spans) == 6  # the header, five parts
    shutil.copytree(tokens_dir, tmp_path / "tokens")
    with open(tmp_path / "tokens/passages/values.npy", "r+b") as file:
        file.seek(200)
        file.write(b"\xff")
    arguments = (*embedding_arguments, "--tokens_dir", tmp_path / "tokens", "--verify", "--output_dir", tmp_path / "e")
    assert "passages/values.npy: damaged" in refused(*arguments)


def test_one_at_a_time(embedding_arguments, embedding_dir, tmp_path):
    shutil.copytree(embedding_dir, tmp_path / "e")
    descriptor = lock(tmp_path / "e", "e", os.O_RDONLY)
    assert "another process is writing it" in refused(*embedding_arguments, "--output_dir", tmp_path / "e")
    os.close(descriptor)


def test_another_models_tokens(embedding_arguments, toy_dir, encoder_dir, tmp_path):
    collection = ("--collection", toy_dir / "collection.tsv", "--tokenizer", encoder_dir, "--doc_maxlen", 50)
    succeed(call_stage("tsv2mmap.py", *collection, "--output_dir", tmp_path / "tokens"))
    message = refused(*embedding_arguments, "--tokens_dir", tmp_path / "tokens", "--output_dir", tmp_path / "e")
    assert "cut to doc_maxlen 50" in message and "run tsv2mmap.py with --doc_maxlen 180" in message


def test_pooled(embedding_dir, embedding_arguments, model_dir, tmp_path):
    """A factor that is given, or that the model has, is the same; one that is given goes before the model's."""
    pooled = tmp_path / "pooled"
    arguments = (*embedding_arguments, "--pool_factor", 3)
    succeed(call_stage("doc2embedding.py", *arguments, "--output_dir", pooled))
    stored, plain = Ragged(pooled), Ragged(embedding_dir)
    assert np.diff(stored.offsets).tolist() == [1 + max(1, (n - 1) // 3) for n in np.diff(plain.offsets)]
    assert read_meta(pooled, "embeddings", "doc2embedding.py", check=True)["pool_factor"] == 3
    assert read_meta(embedding_dir, "embeddings", "doc2embedding.py")["pool_factor"] == 1
    for row in range(len(plain)):
        vectors = plain[row].astype(np.float32)
        own = pool_passages(vectors, np.array([len(vectors)]), Pooling(3))[0]
        assert np.allclose(stored[row], own, atol=2e-3), row
    done = call_stage("doc2embedding.py", *embedding_arguments, "--output_dir", pooled)
    assert done.returncode == 2 and "holds something else" in done.stderr

    model = ColBERT.from_pretrained(model_dir)
    model.config.pool_factor = 3
    model.save_pretrained(tmp_path / "model")
    arguments = (*embedding_arguments, "--model", tmp_path / "model")
    succeed(call_stage("doc2embedding.py", *arguments, "--output_dir", tmp_path / "own"))
    assert arrays(tmp_path / "own") == arrays(pooled)
    succeed(call_stage("doc2embedding.py", *arguments, "--pool_factor", 1, "--output_dir", tmp_path / "off"))
    assert arrays(tmp_path / "off") == arrays(embedding_dir)


def test_means_of_other_lengths_are_not_coded(embedding_arguments, model_dir, tmp_path):
    """As a checkpoint of sentence-transformers has them: by vectors only, unless a factor is given."""
    model = ColBERT.from_pretrained(model_dir)
    model.config.pool_factor, model.config.normalize_pooled = 2, False
    model.save_pretrained(tmp_path / "model")
    arguments = (*embedding_arguments, "--model", tmp_path / "model", "--output_dir", tmp_path / "e")
    done = call_stage("doc2embedding.py", *arguments, "--bits", 4)
    assert done.returncode == 2 and "--bits cannot code: give --pool_factor" in done.stderr
    succeed(call_stage("doc2embedding.py", *arguments, "--bits", 4, "--pool_factor", 2, "--nlist", 4))
    shutil.rmtree(tmp_path / "e")
    succeed(call_stage("doc2embedding.py", *arguments))
    lengths = np.linalg.norm(Ragged(tmp_path / "e").values.astype(np.float32), axis=1)
    assert lengths.min() < 0.99 and lengths.max() < 1.01
    assert not read_meta(tmp_path / "e", "embeddings", "doc2embedding.py")["normalized"]
