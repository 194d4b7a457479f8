"""Whether word pieces and tokenizers of other stages are this model's."""

import pytest

from nanocolbert.cli import InputError
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
