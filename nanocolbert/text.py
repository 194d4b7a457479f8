"""Text to word pieces: one way for all stages. Quick to import: the processes that only tokenise load no torch."""

import json
import string

import numpy as np
from tokenizers import Tokenizer

from nanocolbert.cli import InputError
from nanocolbert.storage.artifact import fingerprint

MARKERS = {"query": "[Q]", "passage": "[D]"}  # tokens of their own, after [CLS] (paper, section 3.2)
FRAME = 3  # [CLS], the marker and [SEP] around the word pieces


def prepare_texts(texts: list[str], kind: str, settings: dict) -> list[str]:
    """Texts of a kind, each with its prompt, without the white space around it: `settings` of ColBERTConfig.texts."""
    if settings[kind]:
        texts = [settings[kind] + text for text in texts]
    return [text.strip() for text in texts] if settings["strip"] else texts


def own_backend(tokenizer) -> Tokenizer:
    """A copy that nobody else sets: it neither pads nor cuts, and knows no special token when it sees one in a text.

    tokenizer: of transformers, of the tokenizers library that it is built on, or the latter's JSON.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    copy = Tokenizer.from_str(backend if isinstance(backend, str) else backend.to_str())
    copy.no_padding()
    copy.no_truncation()
    copy.encode_special_tokens = True
    return copy


def tokenize(tokenizer, texts: list[str], maxlen: int) -> tuple[np.ndarray, np.ndarray]:
    """Word-piece ids (T,) int32 of the texts one after the other and their lengths (n,), cut to `maxlen` less FRAME.

    tokenizer: what `own_backend` gave; of any other a copy is made for this call. It is left as it is, so threads may
    share it.

    No special tokens are added, and none is recognised in the text: "[MASK]" in a passage is three word pieces.
    """
    is_own = isinstance(tokenizer, Tokenizer) and tokenizer.encode_special_tokens
    if not is_own or tokenizer.truncation is not None or tokenizer.padding is not None:
        tokenizer = own_backend(tokenizer)
    n = maxlen - FRAME
    ids = [encoding.ids[:n] for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return np.fromiter((i for row in ids for i in row), np.int32, lengths.sum()), lengths


def check_texts(texts) -> list[str]:
    """The texts as a list. Raises InputError unless each is a string: a lone one would be read letter by letter."""
    if isinstance(texts, str):
        raise InputError(f"one text, {texts[:40]!r}, where a list of texts is wanted: put it into a list")
    texts = list(texts)
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"text {position} is of type {type(text).__name__}, not a string: drop or convert it")
    return texts


def tokenizer_fingerprint(tokenizer) -> str:
    """Fingerprint of what turns text into word pieces; the same before and after [Q] and [D] are added."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    return fingerprint(*(json.dumps(parts[key], sort_keys=True) for key in ("normalizer", "pre_tokenizer", "model")))


def punctuation_ids(tokenizer) -> list[int]:
    """Ids of the tokens that are one symbol of string.punctuation, alone or after a space."""
    ids = set()
    for symbol in string.punctuation:
        spellings = [tokenizer.encode(text, add_special_tokens=False) for text in (symbol, " " + symbol)]
        ids.update(spelling[0] for spelling in spellings if len(spelling) == 1)
        if symbol in tokenizer.get_vocab():
            ids.add(tokenizer.convert_tokens_to_ids(symbol))
    return sorted(ids - set(tokenizer.all_special_ids))
