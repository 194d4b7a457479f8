"""sentence-transformers' layout: its options in and out again, and settings that must be refused."""

import json

import numpy as np
import pytest
import torch
from golden_checkpoints import NATIVE, ST, TEXTS, TRANSFORMER, assert_refused, assert_same, copy_of, variant_of

from model import ColBERT
from nanocolbert.cli import InputError
from nanocolbert.config import Pooling
from nanocolbert.encoder.pooling import pool_passages

pytestmark = pytest.mark.usefixtures("fp32")  # as the libraries computed


@pytest.mark.parametrize("variant", ["no-expansion", "min", "attend", "not-normalized"])
def test_round_trip_of_options(variant, tmp_path):
    model = ColBERT.from_pretrained(variant_of("sentence-transformers-modernbert", variant, tmp_path / "model"))
    for layout in ("nanocolbert", "sentence-transformers"):
        model.save_pretrained(tmp_path / layout, layout=layout)
        assert_same(model, ColBERT.from_pretrained(tmp_path / layout))
    for layout in ("stanford", "pylate"):
        if variant in ("min", "not-normalized") or layout == "stanford":
            with pytest.raises(InputError, match=f"the {layout} layout cannot hold this model"):
                model.save_pretrained(tmp_path / layout, layout=layout)


POOLING = {"path": "5_HierarchicalTokenPooling"}
POOLING |= {"type": "sentence_transformers.multi_vector_encoder.modules.token_pooling.HierarchicalTokenPooling"}


def with_pooling(tmp_path, *after: dict, at: int | None = None, **settings):
    """A golden checkpoint with a module of pooling after the others, or at a place among them."""
    folder = copy_of(NATIVE, tmp_path)
    modules = json.loads((folder / "modules.json").read_text())
    at = len(modules) if at is None else at
    modules[at:at] = [POOLING, *after]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / POOLING["path"]).mkdir()
    (folder / POOLING["path"] / "config.json").write_text(json.dumps(settings))
    return folder, modules


@pytest.mark.parametrize("is_unit", [False, True])
def test_pooling_goes_in_and_out(is_unit, tmp_path):
    settings = {"pool_factor": 3, "num_protected_tokens": 2, "tasks": ["document"]}
    normalize = {"path": "4_Normalize", "type": "sentence_transformers.base.modules.normalize.Normalize"}
    folder, modules = with_pooling(tmp_path, *[normalize] * is_unit, **settings)
    model = ColBERT.from_pretrained(folder)
    assert model.config.pooling() == (3, 2, is_unit)
    plain = ColBERT.from_pretrained(copy_of(NATIVE, tmp_path / "plain")).encode_passages(TEXTS["passages"], fp32=True)
    lengths = np.array([len(vectors) for vectors in plain])
    expected = pool_passages(torch.cat(plain).numpy(), lengths, Pooling(3, 2, is_unit))
    found = model.encode_passages(TEXTS["passages"], fp32=True)
    assert [len(vectors) for vectors in found] == expected[1].tolist() and max(lengths) > 9
    assert np.allclose(torch.cat(found), expected[0], atol=1e-6)
    for layout in ("nanocolbert", "sentence-transformers"):
        model.save_pretrained(tmp_path / layout, layout=layout)
        again = ColBERT.from_pretrained(tmp_path / layout)
        assert_same(model, again)
        assert again.config.pooling() == model.config.pooling()
    saved = json.loads((tmp_path / "sentence-transformers/modules.json").read_text())
    assert [module["type"] for module in saved] == [module["type"] for module in modules]
    (path,) = (tmp_path / "sentence-transformers").glob("*_HierarchicalTokenPooling/config.json")
    assert json.loads(path.read_text()) == settings
    for layout in ("stanford", "pylate"):
        with pytest.raises(InputError, match=f"the {layout} layout cannot hold this model"):
            model.save_pretrained(tmp_path / layout, layout=layout)


@pytest.mark.parametrize(
    ("settings", "at", "message"),
    [
        ({"pool_factor": 2, "tasks": ["query", "document"]}, None, "tasks .* cannot be honoured"),
        ({"pool_factor": 2.5}, None, "pool_factor 2.5: not a whole number from 1 on"),
        ({"num_protected_tokens": -1}, None, "num_protected_tokens -1: not a whole number from 0 on"),
        ({"pool_factor": 2, "linkage": "single"}, None, "unknown key 'linkage'"),
        ({"pool_factor": 2, "normalize_embeddings": None}, None, "normalize_embeddings .* cannot be honoured"),
        ({"pool_factor": 2}, 4, "can be honoured after a Normalize only"),
        ({"pool_factor": 2}, 3, "can be honoured after a Normalize only"),
    ],
)
def test_pooling_that_is_refused(settings, at, message, tmp_path):
    with pytest.raises(InputError, match=message):
        ColBERT.from_pretrained(with_pooling(tmp_path, at=at, **settings)[0])


def test_pooling_may_bring_its_means_to_unit_length_itself(tmp_path):
    for says in (True, False):
        folder, _ = with_pooling(tmp_path / str(says), pool_factor=2, normalize_embeddings=says)
        assert ColBERT.from_pretrained(folder).config.pooling() == (2, 1, says)


def test_pooling_that_does_nothing(tmp_path):
    model = ColBERT.from_pretrained(with_pooling(tmp_path, pool_factor=1)[0])
    assert model.config.pooling() == (1, 1, True)


MASK = "MultiVectorMask/config.json"


MISTAKES = [
    (ST, {"stride": 2}, (), "unknown key 'stride'"),
    (ST, {"model_type": "SentenceTransformer"}, (), "an encoder, no ColBERT model"),
    (TRANSFORMER, {"query_expansion": {"strategy": "random", "length": 9}}, (), "strategy 'random' cannot"),
    (TRANSFORMER, {"query_expansion": {"strategy": "fixed"}}, (), "key 'length' is missing"),
    (TRANSFORMER, {"query_expansion": {"strategy": "fixed", "length": 9, "x": 1}}, (), "unknown key 'x'"),
    (TRANSFORMER, {"transformer_task": "fill-mask"}, (), "transformer_task 'fill-mask' cannot be honoured"),
    (MASK, {"skiplist_tasks": ["query"]}, (), "skiplist_tasks .* cannot be honoured"),
    (MASK, {"keep_only_token_ids": [3]}, (), "keep_only_token_ids .* cannot be honoured"),
]


@pytest.mark.parametrize("name, settings, removed, message", MISTAKES)
def test_settings_that_are_refused(name, settings, removed, message, tmp_path):
    assert_refused(copy_of(NATIVE, tmp_path), name, settings, removed, message)
