"""sentence-transformers' layout: its options in and out again, and settings that must be refused."""

import pytest
from golden_checkpoints import NATIVE, ST, TRANSFORMER, assert_refused, assert_same, copy_of, variant_of

from model import ColBERT
from nanocolbert.cli import InputError

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
