"""Word pieces to the encoder's input: special tokens around them, and which positions are scored or stored.

Word pieces of several texts come as values (T,), one text after the other, and lengths (B,); longer ones are cut.
"""

import numpy as np
import torch
from torch import Tensor

from nanocolbert.config import ColBERTConfig
from nanocolbert.storage.ragged import ranges


def frame(values, lengths, config: ColBERTConfig, kind: str, width: int) -> tuple[Tensor, Tensor]:
    """Frame word pieces: [CLS] marker w1 ... wn [SEP] and padding, (B, width), and the mask of what is not padding."""
    head, sep = config.frame(kind)
    used = np.minimum(lengths, width - len(head) - 1)
    ids = np.full((len(lengths), width), config.pad_token_id, np.int64)
    ids[:, : len(head)] = head
    columns = np.arange(width) - len(head)  # 0: the first word piece
    ids[(columns >= 0) & (columns < used[:, None])] = values[ranges(np.cumsum(lengths) - lengths, used)]
    ids[np.arange(len(used)), used + len(head)] = sep
    return torch.from_numpy(ids), torch.from_numpy((columns <= used[:, None]).astype(np.int64))


def frame_queries(values: np.ndarray, lengths: np.ndarray, config: ColBERTConfig) -> tuple[Tensor, Tensor]:
    """[CLS] [Q] w1 ... wn [SEP], filled with [MASK] to query_maxlen (paper, section 3.2).

    Returns input_ids (B, Lq) and attention_mask (B, Lq). Where queries are filled to less (`expand_queries_to`), longer
    ones make the rest of the batch padded.
    """
    fill, longest = config.expand_queries_to, config.framing("query") + int(lengths.max(initial=0))
    ids, mask = frame(values, lengths, config, "query", max(fill, min(longest, config.query_maxlen)))
    ids[:, :fill][mask[:, :fill] == 0] = config.mask_token_id
    if config.attend_to_mask_tokens:
        mask[:, :fill] = 1
    return ids, mask


def frame_passages(values: np.ndarray, lengths: np.ndarray, config: ColBERTConfig) -> tuple[Tensor, Tensor]:
    """[CLS] [D] w1 ... wn [SEP], padded to the longest. Arguments and result as of `frame_queries`."""
    width = min(config.doc_maxlen, config.framing("passage") + int(lengths.max()))
    return frame(values, lengths, config, "passage", width)


def scored_positions(attention_mask: Tensor, config: ColBERTConfig) -> Tensor:
    """Which positions of framed queries (B, Lq) score: the tokens and the [MASK] fill.

    The others only pad a query to the longest of its batch, where queries are not filled to query_maxlen.
    """
    scored = attention_mask.bool()
    scored[:, : config.expand_queries_to] = True
    return scored


def kept_positions(input_ids: Tensor, attention_mask: Tensor, config: ColBERTConfig) -> Tensor:
    """Which passage tokens are stored and scored (B, L): the real ones that are no punctuation."""
    if not config.mask_punctuation:
        return attention_mask.bool()
    skiplist = torch.tensor(config.skiplist, device=input_ids.device)
    return attention_mask.bool() & ~torch.isin(input_ids, skiplist)


def kept_counts(values: np.ndarray, lengths: np.ndarray, config: ColBERTConfig, vocabulary: int) -> np.ndarray:
    """How many embeddings each passage will have (B,) int64; vocabulary: how many token ids there are."""
    keep = np.ones(vocabulary, np.int64)
    if config.mask_punctuation:
        keep[config.skiplist] = 0
    before = np.concatenate([[0], np.cumsum(keep[values])])  # (T + 1,) kept tokens before each token
    starts = np.cumsum(lengths) - lengths
    head, sep = config.frame("passage")
    framing = int(keep[[*head, sep]].sum())
    return before[starts + np.minimum(lengths, config.pieces("passage"))] - before[starts] + framing
