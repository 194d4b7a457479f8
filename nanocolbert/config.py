"""What a model's vectors follow from beside its weights, and whether word pieces that were stored fit it."""

from typing import NamedTuple

import numpy as np
from transformers import AutoConfig, PreTrainedConfig

from nanocolbert.cli import InputError
from nanocolbert.text import FRAME, tokenizer_fingerprint


class Pooling(NamedTuple):
    """How the n vectors of a passage become fewer: the first ones, `protected`, stay, the others about 1 in `factor`.

    unit: the means of the clusters are brought to unit length, as the vectors are.
    """

    factor: int = 1
    protected: int = 1
    unit: bool = True

    def counts(self, n: np.ndarray) -> np.ndarray:
        """How many vectors n of them become, arrays of any shape: a function of n alone, at least 1 of 1 or more."""
        rest = np.maximum(n - self.protected, 0)
        return n - rest + np.minimum(rest, np.maximum(rest // self.factor, 1))


class ColBERTConfig(PreTrainedConfig):
    """What is needed to give the same vectors again: the encoder's own config and how text is framed.

    encoder: config of the Hugging Face encoder, as a dict with its `model_type`.
    dim: size of a token embedding. query_maxlen, doc_maxlen: tokens with the special ones.
    mask_punctuation: drop the embeddings of punctuation in passages; `skiplist` holds the token ids dropped.
    attend_to_mask_tokens: whether the [MASK] fill of a query is attended to (v1: no).

    What training here leaves as it is, and checkpoints of other libraries may not (nanocolbert/checkpoints/):
    expand_queries_to: queries are filled with [MASK] to so many tokens (None: to query_maxlen; 0: not at all).
    query_marker_id, passage_marker_id: the token after [CLS] (None: there is none).
    query_prompt, passage_prompt: put before each text. strip_texts: white space around it is cut off.
    dense: the layers from hidden to `dim`, each the arguments of a `Dense`; None is one linear layer without bias.
    normalize: embeddings have unit length.
    pool_factor: of how many vectors of a passage one is made (encoder/pooling.py); 1: of each its own.
    protected_tokens: so many first tokens of a passage are left out of that.
    normalize_pooled: the means of pooled vectors are brought to unit length.
    """

    model_type = "colbert"

    def __init__(
        self,
        encoder: dict | None = None,
        dim: int = 128,
        query_maxlen: int = 32,
        doc_maxlen: int = 180,
        mask_punctuation: bool = True,
        attend_to_mask_tokens: bool = False,
        query_marker_id: int | None = None,
        passage_marker_id: int | None = None,
        cls_token_id: int | None = None,
        mask_token_id: int | None = None,
        skiplist: tuple[int, ...] | list[int] = (),
        expand_queries_to: int | None = None,
        query_prompt: str = "",
        passage_prompt: str = "",
        strip_texts: bool = False,
        dense: list[dict] | None = None,
        normalize: bool = True,
        pool_factor: int = 1,
        protected_tokens: int = 1,
        normalize_pooled: bool = True,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.encoder = encoder
        self.dim = dim
        self.query_maxlen = query_maxlen
        self.doc_maxlen = doc_maxlen
        self.mask_punctuation = mask_punctuation
        self.attend_to_mask_tokens = attend_to_mask_tokens
        self.query_marker_id = query_marker_id
        self.passage_marker_id = passage_marker_id
        self.cls_token_id = cls_token_id
        self.mask_token_id = mask_token_id
        self.skiplist = list(skiplist)
        self.expand_queries_to = query_maxlen if expand_queries_to is None else expand_queries_to
        self.query_prompt = query_prompt
        self.passage_prompt = passage_prompt
        self.strip_texts = strip_texts
        self.dense = dense
        self.normalize = normalize
        self.pool_factor = pool_factor
        self.protected_tokens = protected_tokens
        self.normalize_pooled = normalize_pooled

    def frame(self, kind: str) -> tuple[list[int], int]:
        """The special tokens around the word pieces of a query or a passage: those before, and [SEP]."""
        return [self.cls_token_id, *self.markers(kind)], self.sep_token_id

    def markers(self, kind: str) -> list[int]:
        """The token after [CLS], where there is one."""
        marker = self.query_marker_id if kind == "query" else self.passage_marker_id
        return [] if marker is None else [marker]

    def pieces(self, kind: str) -> int:
        """How many word pieces of a query or a passage fit beside the special tokens."""
        maxlen = self.query_maxlen if kind == "query" else self.doc_maxlen
        return maxlen - self.framing(kind)

    def framing(self, kind: str) -> int:
        """How many special tokens are put around a query or a passage."""
        return len(self.markers(kind)) + 2

    def pooling(self, factor: int | None = None) -> Pooling:
        """How passages are pooled: as the model is made for, or by another factor, then to unit length.

        Raises InputError for a factor that is none, and where vectors of other lengths would be pooled.
        """
        unit = self.normalize and (factor is not None or self.pool_factor == 1 or self.normalize_pooled)
        factor = self.pool_factor if factor is None else factor
        if factor < 1:
            raise InputError(f"a pool factor of {factor}: give 1 (every vector stays), or more")
        if factor > 1 and not self.normalize:
            raise InputError(f"a pool factor of {factor}: vectors that are not of unit length are not pooled: give 1")
        return Pooling(factor, self.protected_tokens, unit)

    def texts(self) -> dict:
        """How a text is prepared before it is cut into word pieces: arguments of `prepare_texts`."""
        return {"query": self.query_prompt, "passage": self.passage_prompt, "strip": self.strip_texts}


AutoConfig.register("colbert", ColBERTConfig)  # so that a tokenizer loads from a ColBERT folder without a warning


def check_fits(name, config: ColBERTConfig, longest: int, known: int) -> None:
    """Raise InputError where settings ask for more than an encoder's `longest` text, or for none of its `known` tokens,
    or fill queries beyond their length.

    name: the model's, for messages.
    """
    asked = max(config.query_maxlen, config.doc_maxlen)
    if asked > longest:
        raise InputError(f"{name}: takes {longest} tokens, {asked} were asked for")
    if config.expand_queries_to > config.query_maxlen:
        raise InputError(
            f"{name}: expand_queries_to {config.expand_queries_to}: queries have {config.query_maxlen} tokens "
            "(query_maxlen): give at most as many"
        )
    last = max([*config.skiplist, *config.frame("query")[0], *config.frame("passage")[0], config.mask_token_id])
    if last >= known:
        raise InputError(f"{name}: token {last} is put into texts, or dropped, but its encoder has {known} embeddings")


# ----------------------------------------------------------------------------------------- word pieces that were stored


def check_ids(path, values: np.ndarray, known: int) -> None:
    """Raise InputError, naming the file `path`, where a word piece of (T,) is none of the `known` first ones."""
    if len(values) and values.max() >= known:
        raise InputError(
            f"{path}: word piece {values.max()}, the model knows {known}: damaged, or of another tokenizer: run "
            "tsv2mmap.py again"
        )


def check_tokens(name, config: ColBERTConfig, tokenizer, tokens_dir, tokens_meta: dict) -> None:
    """Raise InputError unless tokens were made by the tokenizer of a model and cut no shorter than it reads.

    name: the model's, for messages.
    """
    if tokenizer_fingerprint(tokenizer) != tokens_meta["tokenizer_fingerprint"]:
        raise InputError(
            f"{tokens_dir}: tokenised by {tokens_meta['tokenizer']}, another tokenizer than {name}'s: "
            f"run tsv2mmap.py with --tokenizer {name}"
        )
    as_read = config.texts()
    if as_read != tokens_meta.get("texts", ColBERTConfig().texts()):
        raise InputError(
            f"{tokens_dir}: without the prompts that {name} puts before texts, {as_read}: "
            f"run tsv2mmap.py with --tokenizer {name}"
        )
    for kind, setting in (("query", "query_maxlen"), ("passage", "doc_maxlen")):
        wanted, found = config.pieces(kind) + FRAME, tokens_meta[setting]  # tsv2mmap.py leaves room for FRAME
        if wanted > found:
            raise InputError(
                f"{tokens_dir}: cut to {setting} {found}, {name} reads {wanted}: "
                f"run tsv2mmap.py with --{setting} {wanted}"
            )


def check_tokenizer(where, tokenizer, meta: dict) -> None:
    """Raise InputError unless a tokenizer made what lies at `where`, whose meta.json may not say."""
    found = meta.get("tokenizer_fingerprint")
    if found is not None and found != tokenizer_fingerprint(tokenizer):
        raise InputError(
            f"{where}: made with another tokenizer than the model now has: restore the model's tokenizer.json, or "
            "make it again"
        )
