"""Layouts: vectors as the other libraries gave them, every way in and out of a folder, and what must be refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import call_stage, succeed
from golden_checkpoints import (
    CHECKPOINTS,
    GOLDEN,
    NATIVE,
    PYLATE,
    ST,
    STANFORD,
    VARIANTS,
    assert_same,
    change,
    copy_of,
    largest_difference,
    stanford_state,
    v1_file,
    variant_of,
    vectors,
)
from safetensors.torch import save_file

from model import ColBERT
from nanocolbert.checkpoints import LAYOUTS, layouts
from nanocolbert.checkpoints.layouts import model_fingerprint
from nanocolbert.cli import InputError
from nanocolbert.encoder.pretrained import SETTINGS_FILES, load_tokenizer

pytestmark = pytest.mark.usefixtures("fp32")  # as the libraries computed

CASES = [(folder.name, path.stem) for folder in sorted(GOLDEN.iterdir()) for path in sorted(folder.glob("*.npz"))]


@pytest.fixture(scope="module")
def colbert(encoder_dir):
    """Of lengths that are nobody's default."""
    torch.manual_seed(1)
    return ColBERT.from_base(encoder_dir, dim=16, query_maxlen=20, doc_maxlen=50).eval()


@pytest.mark.parametrize("checkpoint, variant", CASES)
def test_golden_vectors(checkpoint, variant, tmp_path):
    model = ColBERT.from_pretrained(variant_of(checkpoint, variant, tmp_path / checkpoint))
    assert not model.training
    assert largest_difference(vectors(model), dict(np.load(GOLDEN / checkpoint / f"{variant}.npz"))) < 1e-5


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_every_option_changes_vectors(checkpoint):
    """The golden vectors can tell the variants apart: else the test above would pass with an option ignored."""
    plain = dict(np.load(GOLDEN / checkpoint / "as-saved.npz"))
    variants = [path for path in (GOLDEN / checkpoint).glob("*.npz") if path.stem != "as-saved"]
    assert len(variants) >= 3
    for path in variants:
        other = dict(np.load(path))
        same = all(plain[key].shape == other[key].shape and np.allclose(plain[key], other[key]) for key in plain)
        assert not same, path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_of_our_model(colbert, layout, tmp_path):
    colbert.save_pretrained(tmp_path / "model", layout=layout)
    assert layouts.detect(tmp_path / "model") == layout
    assert_same(colbert, ColBERT.from_pretrained(tmp_path / "model"))


def test_round_trip_without_markers_and_fill(encoder_dir, tmp_path):
    model = ColBERT.from_base(encoder_dir, dim=16, markers=False, query_maxlen=19, doc_maxlen=49, expand_queries_to=0)
    for layout in ("nanocolbert", "pylate", "sentence-transformers"):
        model.save_pretrained(tmp_path / layout, layout=layout)
        other = ColBERT.from_pretrained(tmp_path / layout)
        other.config.strip_texts = False
        assert_same(model.eval(), other)
        assert (other.config.query_maxlen, other.config.expand_queries_to, other.config.markers("query")) == (19, 0, [])
    with pytest.raises(InputError, match="the stanford layout cannot hold this model"):
        model.save_pretrained(tmp_path / "stanford", layout="stanford")


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_round_trip_of_other_models(checkpoint, tmp_path):
    """Into every layout that can hold it (a Stanford model has one plain layer), and out again."""
    model = ColBERT.from_pretrained(copy_of(checkpoint, tmp_path))
    written = []
    for layout in LAYOUTS:
        try:
            model.save_pretrained(tmp_path / layout, layout=layout)
        except InputError as error:
            assert f"the {layout} layout cannot hold this model" in str(error)
            continue
        written.append(layout)
        other = ColBERT.from_pretrained(tmp_path / layout)
        other.config.strip_texts = model.config.strip_texts  # white space around a text: of the library, not the model
        assert_same(model, other)
    own = next(layout for layout in VARIANTS if checkpoint.startswith(layout))
    assert {"nanocolbert", own} <= set(written)
    if checkpoint.startswith(("stanford", "pylate")):  # prompts as text can say all that markers can
        assert "sentence-transformers" in written


def test_folders_that_are_refused(encoder_dir, colbert, tmp_path):
    with pytest.raises(InputError, match=r"an encoder, no ColBERT model: train one on it with train\.py"):
        ColBERT.from_pretrained(encoder_dir)
    with pytest.raises(InputError, match=r"config\.json: missing"):
        ColBERT.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="a local checkpoint has no revisions"):
        ColBERT.from_pretrained(encoder_dir, revision="v2")
    with pytest.raises(InputError, match="neither a folder nor a model that the hub gives out"):
        ColBERT.from_pretrained("nobody/nothing")
    with pytest.raises(InputError, match="no code of a checkpoint is run here"):
        ColBERT.from_pretrained(GOLDEN / PYLATE, trust_remote_code=True)
    with pytest.raises(InputError, match="subfolder is no option here"):
        ColBERT.from_pretrained(GOLDEN / PYLATE, subfolder="x")
    with pytest.raises(InputError, match="layout 'colbert': not one of nanocolbert, stanford"):
        colbert.save_pretrained(tmp_path, layout="colbert")
    folder = copy_of(STANFORD, tmp_path)
    weights = stanford_state()
    del weights["bert.encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 weights of the encoder are missing, encoder\.layer\.1\.output"):
        ColBERT.from_pretrained(folder)


def test_fingerprints(colbert, tmp_path):
    with pytest.raises(InputError, match=r"no model here .*run train\.py first"):
        model_fingerprint(tmp_path)
    colbert.save_pretrained(tmp_path)
    before = model_fingerprint(tmp_path)
    assert model_fingerprint(shutil.copytree(tmp_path, tmp_path.with_name("copy"))) == before
    other = ColBERT.from_pretrained(tmp_path)
    with torch.no_grad():
        other.linear.weight[0, 0] += 1
    other.save_pretrained(tmp_path)
    assert model_fingerprint(tmp_path) != before


@pytest.fixture
def hub(monkeypatch):
    """The hub gives out a golden checkpoint, whatever is asked for; returns what is asked."""
    calls = []

    def download(name, revision, allow_patterns, ignore_patterns):
        calls.append((name, revision, allow_patterns))
        return str(GOLDEN / PYLATE)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return calls


def test_names_on_the_hub(hub):
    model = ColBERT.from_pretrained("some/model", revision="v2")
    assert largest_difference(vectors(model), dict(np.load(GOLDEN / PYLATE / "as-saved.npz"))) < 1e-5
    assert hub == [("some/model", "v2", SETTINGS_FILES)]  # the weights were there already


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_fingerprints_of_other_models(checkpoint, tmp_path):
    """A copy has the same; one setting or one weight gives another; pickles count where there is nothing else."""
    before = model_fingerprint(copy_of(checkpoint, tmp_path))
    assert model_fingerprint(copy_of(checkpoint, tmp_path / "again")) == before
    (tmp_path / checkpoint / "pytorch_model.bin").write_bytes(b"")
    assert model_fingerprint(tmp_path / checkpoint) == before
    for part in ("config.json", "model.safetensors"):
        folder = copy_of(checkpoint, tmp_path / part)
        (folder / part).write_bytes((folder / part).read_bytes() + b" ")
        assert model_fingerprint(folder) != before


def test_fingerprints_of_names_and_files(hub, tmp_path):
    assert model_fingerprint("some/model") == model_fingerprint(GOLDEN / PYLATE)
    (tmp_path / "a.dnn").write_text("a")
    (tmp_path / "b.dnn").write_text("b")
    assert model_fingerprint(tmp_path / "a.dnn") != model_fingerprint(tmp_path / "b.dnn")


def test_the_model_of_an_index(hub, colbert, tmp_path):
    """Beside it as it was, then where it was, then on the hub: not there, if it lay on a disk."""
    copy_of(PYLATE, tmp_path / "old")
    beside, given = tmp_path / "moved" / "model", tmp_path / "old" / PYLATE
    meta = {"model_path": "../model", "model": str(given)}
    assert layouts.model_of(tmp_path / "moved" / "index", meta) == str(given)
    colbert.save_pretrained(beside)
    assert layouts.model_of(tmp_path / "moved" / "index", meta) == str(beside)
    with pytest.raises(InputError, match="index: its model, a/b/c, is not there: give its folder as model"):
        layouts.model_of(tmp_path / "index", {"model_path": "../none", "model": "a/b/c"})
    assert layouts.model_of(tmp_path / "index", {"model_path": None, "model": "some/model"}) == "some/model"


def test_stages_with_a_checkpoint_of_another_library(toy_dir, encoder_dir, tmp_path):
    """No marker, but a prompt of text: the stages give what encode_passages gives, or say what to do."""
    model = variant_of(NATIVE, "prompts", tmp_path / "model")
    tokens, embeddings = tmp_path / "tokens", tmp_path / "embeddings"
    collection = ("--collection", toy_dir / "collection.tsv", "--workers", 1, "--output_dir", tokens)

    def embed():
        return call_stage(
            "doc2embedding.py", "--cpu", "--tokens_dir", tokens, "--model", model, "--output_dir", embeddings
        )

    lengths = ("--query_maxlen", 16, "--doc_maxlen", 40)
    succeed(call_stage("tsv2mmap.py", *collection, "--tokenizer", model, *lengths))
    failed = embed()  # a query without a marker has room for one word piece more
    assert failed.returncode == 2 and "run tsv2mmap.py with --query_maxlen 17" in failed.stderr
    succeed(call_stage("tsv2mmap.py", *collection, "--tokenizer", model))  # by default as long as it reads
    meta = json.loads((tokens / "meta.json").read_text())
    assert (meta["query_maxlen"], meta["doc_maxlen"]) == (17, 40)
    succeed(embed())
    texts = [line.split("\t")[1] for line in (toy_dir / "collection.tsv").read_text().splitlines()]
    expected = torch.cat(ColBERT.from_pretrained(model).encode_passages(texts)).numpy()
    assert np.abs(np.load(embeddings / "values.npy") - expected).max() < 1e-3

    change(model, ST, prompts={})
    shutil.rmtree(embeddings)
    assert "without the prompts that" in embed().stderr
    assert model_fingerprint(model) != model_fingerprint(GOLDEN / NATIVE)


def test_stages_with_names_and_files(hub, toy_dir, tmp_path):
    """A name on the hub and v1's file are taken as a folder is."""
    torch.save(v1_file(), tmp_path / "colbert.dnn")
    (tmp_path / "some.tsv").write_text("p0\tthe old boat\np1\ta drum, (late)\n")
    for name, source in (("some/model", PYLATE), (tmp_path / "colbert.dnn", STANFORD)):
        tokens, embeddings = tmp_path / source / "tokens", tmp_path / source / "embeddings"
        arguments = ("--collection", tmp_path / "some.tsv", "--workers", 1, "--tokenizer", name, "--output_dir", tokens)
        succeed(call_stage("tsv2mmap.py", *arguments, "--query_maxlen", 16, "--doc_maxlen", 40))
        arguments = ("--tokens_dir", tokens, "--model", name, "--output_dir", embeddings)
        succeed(call_stage("doc2embedding.py", "--cpu", *arguments))
        expected = ColBERT.from_pretrained(GOLDEN / source).encode_passages(["the old boat", "a drum, (late)"])
        assert np.abs(np.load(embeddings / "values.npy") - torch.cat(expected).numpy()).max() < 1e-3
        meta = json.loads((embeddings / "meta.json").read_text())
        assert meta["model_fingerprint"] == model_fingerprint(name)
        assert layouts.model_of(embeddings, meta) == (name if name == "some/model" else str(name))


def test_training_goes_on_from_another_library(tmp_path, encoder_dir):
    assert layouts.is_colbert(GOLDEN / PYLATE) and layouts.is_colbert(GOLDEN / STANFORD)
    assert not layouts.is_colbert(encoder_dir) and not layouts.is_colbert(tmp_path / "none")
    assert load_tokenizer(GOLDEN / PYLATE).mask_token_id is not None
