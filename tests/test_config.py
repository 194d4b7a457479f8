"""Whether word pieces and tokenizers of other stages are this model's."""

import pytest

from nanocolbert.cli import InputError
from nanocolbert.config import ColBERTConfig, check_fits
from nanocolbert.text import tokenizer_fingerprint


def test_tokens_of_another_model(colbert):
    meta = {"tokenizer": "x", "tokenizer_fingerprint": "other", "query_maxlen": 32, "doc_maxlen": 180}
    with pytest.raises(InputError, match="another tokenizer"):
        colbert.check_tokens("m", "t", meta)
    meta["tokenizer_fingerprint"] = tokenizer_fingerprint(colbert.tokenizer)
    colbert.check_tokens("m", "t", meta | {"doc_maxlen": 300})
    with pytest.raises(InputError, match=r"cut to doc_maxlen 100, m reads 180: run tsv2mmap\.py with --doc_maxlen 180"):
        colbert.check_tokens("m", "t", meta | {"doc_maxlen": 100})


def test_an_index_made_with_another_tokenizer(colbert):
    colbert.check_tokenizer("index", {})  # made before it was written down
    colbert.check_tokenizer("index", {"tokenizer_fingerprint": tokenizer_fingerprint(colbert.tokenizer)})
    with pytest.raises(InputError, match="index: made with another tokenizer than the model now has"):
        colbert.check_tokenizer("index", {"tokenizer_fingerprint": "0"})


def test_queries_are_filled_to_their_length_at_most():
    ids = dict.fromkeys(("cls_token_id", "sep_token_id", "mask_token_id", "pad_token_id"), 0)
    for fill in (0, 16, 32, None):
        check_fits("m", ColBERTConfig(expand_queries_to=fill, **ids), 512, 100)
    with pytest.raises(InputError, match="m: expand_queries_to 600: queries have 32 tokens"):  # the encoder takes 512
        check_fits("m", ColBERTConfig(expand_queries_to=600, **ids), 512, 100)
