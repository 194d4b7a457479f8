"""Text to word pieces: one way for all stages, and quick to import, for the processes that do nothing else."""

import numpy as np

MARKERS = {"query": "[Q]", "passage": "[D]"}  # tokens of their own, after [CLS] (paper, section 3.2)
FRAME = 3  # [CLS], the marker and [SEP] around the word pieces


def prepare_texts(texts: list[str], kind: str, settings: dict) -> list[str]:
    """Texts of a kind, each with its prompt, without the white space around it: `settings` of ColBERTConfig.texts."""
    if settings[kind]:
        texts = [settings[kind] + text for text in texts]
    return [text.strip() for text in texts] if settings["strip"] else texts


def tokenize(tokenizer, texts: list[str], maxlen: int) -> tuple[np.ndarray, np.ndarray]:
    """Word-piece ids (T,) int32 of the texts one after the other and their lengths (n,), cut to `maxlen` less FRAME.

    tokenizer: of transformers, or the one of the tokenizers library that it is built on.

    No special tokens are added, and none is recognised in the text: "[MASK]" in a passage is three word pieces.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    backend.encode_special_tokens = True
    backend.no_padding()
    backend.enable_truncation(maxlen - FRAME)
    ids = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return np.fromiter((i for row in ids for i in row), np.int32, lengths.sum()), lengths
