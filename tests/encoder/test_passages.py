"""Many passages at once: the embeddings of one at a time; what is not to be used is named."""

import numpy as np
import pytest
import torch
from tiny_models import TEXTS, embed_alone

from model import ColBERT
from nanocolbert.cli import InputError
from nanocolbert.config import Pooling
from nanocolbert.encoder.pooling import pool_passages
from nanocolbert.encoder.soundness import EmbeddingError
from nanocolbert.text import tokenize


def test_padded_batch_equals_one_passage_at_a_time(colbert):
    ids, mask = colbert.frame_passages(*tokenize(colbert.tokenizer, TEXTS, 180))
    with torch.no_grad():
        together, kept = colbert.embed((ids, mask)), colbert.kept(ids, mask)
    for i, text in enumerate(TEXTS):
        alone, tokens = embed_alone(colbert, text)
        assert ids[i][kept[i]].tolist() == tokens, text
        assert torch.allclose(together[i][kept[i]], alone, atol=1e-5), text


@pytest.mark.parametrize("tokens_per_batch", [1, 200, 4096])
def test_embed_passages_equals_one_at_a_time(colbert, fp32, tokens_per_batch):
    pieces = tokenize(colbert.tokenizer, TEXTS, 180)
    embeddings, counts, padding = colbert.embed_passages(*pieces, tokens_per_batch)
    assert embeddings.dtype == np.float16 and 0 <= padding < 1
    assert (padding == 0) or tokens_per_batch > 1
    assert counts.tolist() == colbert.kept_counts(*pieces).tolist()
    for text, vectors in zip(TEXTS, np.split(embeddings, np.cumsum(counts)[:-1]), strict=True):
        assert np.allclose(vectors, embed_alone(colbert, text)[0], atol=1e-3), text


def test_embeddings_in_the_fast_type_are_close(colbert):
    for text, vectors in zip(TEXTS, colbert.encode_passages(TEXTS), strict=True):
        assert (vectors.float() * embed_alone(colbert, text)[0]).sum(-1).min() > 0.99, text


def test_embeddings_that_are_not_to_be_used(encoder_dir):
    """The text is named: by its place in the call, and in the message for a notebook."""
    colbert = ColBERT.from_base(encoder_dir, dim=16).eval()
    texts = ["the boat", *["house " * n for n in range(1, 40)], "old eagle", "a drum"]  # 40 has the eagle
    eagle = colbert.tokenizer.convert_tokens_to_ids("eagle")
    table = colbert.encoder.get_input_embeddings().weight
    kept = table[eagle].clone()

    def refused(message: str, passage: int = 40) -> None:
        for embed in (colbert.encode_passages, colbert.encode_queries):
            for fp32 in (False, True):
                with pytest.raises(EmbeddingError, match=rf"{passage}: an embedding is {message}") as caught:
                    embed(texts, fp32=fp32)
                assert caught.value.passage == passage
        for size in (None, 50):
            with pytest.raises(EmbeddingError, match=message) as caught:
                colbert.embed_passages(*tokenize(colbert.tokenizer, texts, 180), size)
            assert caught.value.passage == passage

    with torch.no_grad():
        for value in (torch.nan, torch.inf):
            table[eagle] = value
            refused("not finite")
        table[eagle] = kept
        assert len(colbert.encode_passages(texts)) == 42
        colbert.linear.weight.zero_()
        texts = texts[:1]
        refused("not of unit length", 0)
        colbert.config.normalize = False  # zeros are then as good as others
        assert not colbert.encode_passages(texts)[0].any()
        colbert.linear.weight.normal_(std=1e5)  # what is over 65504 is not finite in fp16
        with pytest.raises(EmbeddingError, match="passage 0: an embedding is not finite"):
            colbert.encode_passages(texts)
        assert colbert.encode_passages(texts, fp32=True)[0].abs().max() > 65504


def test_pooled_passages(colbert, fp32):
    plain = colbert.encode_passages(TEXTS, fp32=True)
    lengths, seen = np.array([len(vectors) for vectors in plain]), []
    expected, counts = pool_passages(torch.cat(plain).numpy(), lengths, Pooling(3))
    pieces = colbert.tokenize(TEXTS, "passage")
    assert colbert.kept_counts(*pieces, 3).tolist() == counts.tolist() and counts.sum() < lengths.sum() / 2
    for size in (50, None):
        found = colbert.embed_passages(*pieces, size, fp32=True, done=seen.append, pool_factor=3)
        assert found[1].tolist() == counts.tolist() and np.allclose(found[0], expected, atol=1e-5)
        assert sum(seen) == len(expected)
        seen.clear()
    assert np.allclose(torch.cat(colbert.encode_passages(TEXTS, fp32=True, pool_factor=3)), expected, atol=1e-5)
    with pytest.raises(InputError, match="return_tokens wants pool_factor=1"):
        colbert.encode_passages(TEXTS, return_tokens=True, pool_factor=2)
    with pytest.raises(InputError, match="a pool factor of 0"):
        colbert.encode_passages(TEXTS, pool_factor=0)
