"""Text to word pieces: no special tokens in them, one text as many, and a tokenizer that threads and users share."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tiny_models import TEXTS

from model import ColBERT
from nanocolbert.encoder.pretrained import load_tokenizer
from nanocolbert.text import own_backend, tokenize, tokenizer_fingerprint


def test_special_tokens_in_text_are_ordinary_text(colbert):
    for text in ("[MASK] [SEP] apple [D]", "[CLS]", "a[Q]b [PAD]"):
        values, lengths = tokenize(colbert.tokenizer, [text], 180)
        assert not set(values.tolist()) & set(colbert.tokenizer.all_special_ids), text
        assert lengths[0] == len(values) >= len(text.split())
    values, _ = tokenize(colbert.tokenizer, ["[m]"], 180)
    assert colbert.tokenizer.convert_ids_to_tokens(values) == ["[", "m", "]"]


def test_tokenize_equals_one_text_at_a_time(colbert):
    values, lengths = tokenize(colbert.tokenizer, TEXTS, 20)
    rows = np.split(values, np.cumsum(lengths)[:-1])
    for text, row in zip(TEXTS, rows, strict=True):
        ids = colbert.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert row.tolist() == ids[:17], text


def test_threads_share_a_tokenizer(encoder_dir):
    """Queries cut to 32 tokens in one thread, passages to 180 in another, and a user who pads and cuts as he likes."""
    colbert = ColBERT.from_base(encoder_dir, dim=16).eval()
    passages, sizes = ["house " * 170] * 64, range(5, 25)

    def of_passages() -> list[set]:
        return [set(colbert.tokenize(passages, "passage")[1].tolist()) for _ in sizes]

    def of_queries() -> list[set]:
        return [set(colbert.tokenize(["boat " * 100], "query")[1].tolist()) for _ in sizes for _ in range(20)]

    def of_user() -> list[int]:
        options = {"padding": "max_length", "truncation": True}
        return [len(colbert.tokenizer("house " * 9, max_length=n, **options)["input_ids"]) for n in sizes]

    with ThreadPoolExecutor(3) as threads:
        jobs = [threads.submit(work) for work in (of_passages, of_queries, of_user)]
        found = [job.result() for job in jobs]
    assert found == [[{170}] * 20, [{29}] * 400, list(sizes)]


def test_a_tokenizer_keeps_its_state(encoder_dir):
    """What its tokenizer.json says of cutting and padding is neither heeded nor changed."""
    tokenizer = load_tokenizer(encoder_dir)
    expected = [part.tolist() for part in tokenize(tokenizer, TEXTS, 180)]
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(5)
    backend.enable_padding(length=9)
    state = backend.to_str()
    for given in (tokenizer, backend, own_backend(tokenizer)):
        assert [part.tolist() for part in tokenize(given, TEXTS, 180)] == expected
    assert backend.to_str() == state and not backend.encode_special_tokens


def test_fingerprint_of_a_tokenizer(colbert, encoder_dir):
    """The same with [Q] and [D] and without."""
    assert tokenizer_fingerprint(load_tokenizer(encoder_dir)) == tokenizer_fingerprint(colbert.tokenizer)
