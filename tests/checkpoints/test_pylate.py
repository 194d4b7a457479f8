"""PyLate's layout: queries without a fill, and settings that must be refused."""

import pytest
import torch
from golden_checkpoints import PYLATE, ST, TRANSFORMER, assert_refused, copy_of, variant_of

from model import ColBERT
from nanocolbert.maxsim import maxsim

pytestmark = pytest.mark.usefixtures("fp32")  # as the libraries computed


def test_without_expansion_padding_adds_nothing_to_maxsim(tmp_path):
    model = ColBERT.from_pretrained(variant_of("pylate-bert", "no-expansion", tmp_path / "model"))
    queries = model.encode_queries(["boats", "what is late interaction and why?"])
    lengths = queries.any(-1).sum(1).tolist()
    assert lengths[0] < lengths[1] <= queries.shape[1] == model.config.query_maxlen
    assert torch.allclose(queries[0, : lengths[0]], model.encode_queries(["boats"])[0, : lengths[0]], atol=1e-5)
    passages, mask = torch.randn(4, 6, 8), torch.ones(4, 6, dtype=torch.bool)
    without = maxsim(queries[:1, : lengths[0]], passages, mask)
    assert torch.allclose(maxsim(queries[:1], passages, mask), without, atol=1e-5)


MISTAKES = [
    (ST, {"stride": 2}, (), "unknown key 'stride'"),
    (ST, {"query_prefix": "[X] "}, (), r"'\[X\] ' is no token"),
    (TRANSFORMER, {"do_lower_case": True}, (), "do_lower_case True cannot be honoured"),
    (TRANSFORMER, {"model_args": {"x": 1}}, (), "model_args .* cannot be honoured"),
    (TRANSFORMER, {"window": 1}, (), "unknown key 'window'"),
    ("Dense/config.json", {}, ("activation_function",), "key 'activation_function' is missing"),
    ("Dense/config.json", {}, ("in_features",), "key 'in_features' is missing"),
    ("Dense/config.json", {"scale": 2}, (), "unknown key 'scale'"),
    ("Dense/config.json", {"activation_function": "my.code.Act"}, (), "'my.code.Act' cannot be honoured"),
]


@pytest.mark.parametrize("name, settings, removed, message", MISTAKES)
def test_settings_that_are_refused(name, settings, removed, message, tmp_path):
    assert_refused(copy_of(PYLATE, tmp_path), name, settings, removed, message)
