"""The frame of queries and passages, and which of their tokens are kept."""

import string

import torch

from model import ColBERT
from nanocolbert.text import tokenize


def test_queries_are_framed(colbert):
    vocabulary = colbert.tokenizer.get_vocab()
    cls, sep, mask, marker = (vocabulary[token] for token in ("[CLS]", "[SEP]", "[MASK]", "[Q]"))
    texts = ["find the boat", "", "drum " * 29, "drum " * 30, "drum " * 600]
    ids, attention = colbert.frame_queries(*tokenize(colbert.tokenizer, texts, 32))
    assert ids.shape == attention.shape == (5, 32)
    drum, words = vocabulary["drum"], [vocabulary[word] for word in ("find", "the", "boat")]
    assert ids[0].tolist() == [cls, marker, *words, sep, *[mask] * 26]
    assert ids[1].tolist() == [cls, marker, sep, *[mask] * 29]
    assert ids[2].tolist() == ids[3].tolist() == ids[4].tolist() == [cls, marker, *[drum] * 29, sep]
    assert attention.tolist() == [[1] * n + [0] * (32 - n) for n in (6, 3, 32, 32, 32)]


def test_tokens_stored_longer_are_cut_the_same(colbert):
    """Word pieces cut to more than the model reads, as another model's tokens may be."""
    long = tokenize(colbert.tokenizer, ["drum " * 600, "boat"], 300)
    short = tokenize(colbert.tokenizer, ["drum " * 600, "boat"], 32)
    for a, b in zip(colbert.frame_queries(*long), colbert.frame_queries(*short), strict=True):
        assert torch.equal(a, b)
    short = tokenize(colbert.tokenizer, ["drum " * 600, "boat"], 180)
    for a, b in zip(colbert.frame_passages(*long), colbert.frame_passages(*short), strict=True):
        assert torch.equal(a, b)


def test_passages_are_framed(colbert):
    vocabulary = colbert.tokenizer.get_vocab()
    cls, sep, pad, marker = (vocabulary[token] for token in ("[CLS]", "[SEP]", "[PAD]", "[D]"))
    ids, attention = colbert.frame_passages(*tokenize(colbert.tokenizer, ["the boat.", "", "eagle"], 180))
    the, boat, dot, eagle = (vocabulary[word] for word in ("the", "boat", ".", "eagle"))
    assert ids.tolist() == [
        [cls, marker, the, boat, dot, sep],
        [cls, marker, sep, pad, pad, pad],
        [cls, marker, eagle, sep, pad, pad],
    ]
    assert attention.tolist() == [[1] * 6, [1] * 3 + [0] * 3, [1] * 4 + [0] * 2]
    ids, _ = colbert.frame_passages(*tokenize(colbert.tokenizer, ["eagle " * 600], 180))
    assert ids.tolist() == [[cls, marker, *[eagle] * 177, sep]]


def test_attend_to_mask_tokens(encoder_dir):
    colbert = ColBERT.from_base(encoder_dir, dim=16, attend_to_mask_tokens=True)
    ids, attention = colbert.frame_queries(*tokenize(colbert.tokenizer, ["boat"], 32))
    assert attention.sum() == 32 and (ids == colbert.tokenizer.mask_token_id).sum() == 28


def test_punctuation_is_dropped_and_the_frame_stays(colbert):
    ids, mask = colbert.frame_passages(*tokenize(colbert.tokenizer, ["boat, (drum)!", "?!..."], 180))
    kept = colbert.kept(ids, mask)
    tokens = [colbert.tokenizer.convert_ids_to_tokens(row[keep]) for row, keep in zip(ids, kept, strict=True)]
    assert tokens == [["[CLS]", "[D]", "boat", "drum", "[SEP]"], ["[CLS]", "[D]", "[SEP]"]]
    assert sorted(colbert.tokenizer.convert_ids_to_tokens(colbert.config.skiplist)) == sorted(string.punctuation)


def test_punctuation_can_be_kept(encoder_dir):
    colbert = ColBERT.from_base(encoder_dir, dim=16, mask_punctuation=False).eval()
    assert [len(vectors) for vectors in colbert.encode_passages(["boat, (drum)!", ""])] == [9, 3]
    assert colbert.kept_counts(*tokenize(colbert.tokenizer, ["boat, (drum)!", ""], 180)).tolist() == [9, 3]


def test_kept_counts_of_tokens_cut_longer(colbert):
    pieces = tokenize(colbert.tokenizer, ["a . " * 300, "boat", "b " * 400], 1000)
    assert colbert.kept_counts(*pieces).tolist() == colbert.embed_passages(*pieces)[1].tolist() == [92, 4, 180]
