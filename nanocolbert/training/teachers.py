"""Teachers: models whose scores of a query's passages another model is trained towards.

    teacher = load_teacher("path/to/cross-encoder")             # or an encoder, by its own similarity: (..., "sum")
    score_rows(teacher, [("a query", ["a passage", "another"]), ...])  # one (K,) array a row

A teacher has `score(queries, passages, pairs)`: of Q different queries and P different passages it scores the pairs
(n, 2), positions in both, and gives (n, c) fp32: c is 1, or 2 where two scores are to be added (`combined`).
There are three: CrossEncoder, OwnSimilarity (any encoder, untrained) and LateInteraction (a ColBERT).

Shapes: B texts of at most L tokens in a batch, H hidden, K passages of a row.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig, AutoTokenizer

from nanocolbert.cli import InputError
from nanocolbert.compute import autocast, default_device, map_alone
from nanocolbert.encoder.attention import compute_dtype, encode_packed, pack, packable
from nanocolbert.encoder.batches import to_device, tokens_per_batch
from nanocolbert.encoder.pretrained import (
    check_folder,
    check_vocabulary,
    check_weights,
    load_config,
    load_encoder,
    load_tokenizer,
    loading,
    locate,
    longest_input,
    own_attention,
    read_settings,
    read_weights,
    special_token_ids,
)
from nanocolbert.maxsim import maxsim_packed
from nanocolbert.storage.ragged import length_batches
from nanocolbert.text import FRAME, own_backend, tokenize

SIMILARITIES = ("mean", "maxsim", "sum")
ENCODER_TOKENS, PAIR_TOKENS = 256, 512  # longer texts, and pairs of texts, are cut to this
PASSAGES = 256  # that a ColBERT embeds at a time
EVEN = 1e-4  # scores of a row that differ by less are all the same: it is how they were rounded


def nothing(_: int) -> None:
    """What is called where nobody wants to know how many pairs are done."""


# -------------------------------------------------------------------------------------------------------- rows of texts


def score_rows(teacher, rows: list[tuple[str, list[str]]], done: Callable[[int], None] = nothing) -> list[np.ndarray]:
    """Scores (K,) fp32 of each row's passages, in their order; a row is a query and its K > 0 passages, texts.

    A text that stands in several rows is embedded once, and a pair scored once. done(n) is called whenever n more
    different pairs are scored. Raises InputError where a score is not finite.
    """
    queries, passages = {}, {}  # the position of each different text
    pairs = [
        (queries.setdefault(query, len(queries)), passages.setdefault(passage, len(passages)))
        for query, texts in rows
        for passage in texts
    ]
    pairs, inverse = np.unique(np.array(pairs, np.int64).reshape(-1, 2), axis=0, return_inverse=True)
    scores = teacher.score(list(queries), list(passages), pairs, done)  # (n, c)
    if not np.isfinite(scores).all():
        raise InputError("the teacher gave a score that is not finite: its weights are damaged, or too large for bf16")
    ends = np.cumsum([len(texts) for _, texts in rows])
    return [combined(part) for part in np.split(scores[inverse.reshape(-1)], ends[:-1])]


def combined(scores: np.ndarray) -> np.ndarray:
    """One score (K,) of each passage of a row, from (K, c): several are standardised over the row and added.

    Each has then the same say, whatever its scale: a cosine is below 1, a MaxSim as large as the query is long. By mean
    and standard deviation, not by minimum and maximum: those are two passages of the row, and one outlier among the
    negatives would press all the others together.
    """
    if scores.shape[1] == 1:
        return scores[:, 0]
    return standardised(torch.from_numpy(scores.T)).sum(0).numpy()


def standardised(scores: Tensor) -> Tensor:
    """Scores (n, K), each row less its mean and over its standard deviation; 0 where all of a row are the same."""
    deviation = scores.std(1, correction=0, keepdim=True).clamp_min(EVEN)
    return (scores - scores.mean(1, keepdim=True)) / deviation


def pairs_of_passages(pairs: np.ndarray, n_passages: int) -> list[np.ndarray]:
    """Which of the pairs (n, 2) each passage is in."""
    order = np.argsort(pairs[:, 1], kind="stable")
    ends = np.searchsorted(pairs[order, 1], np.arange(n_passages), side="right")
    return np.split(order, ends)[:-1]


# ----------------------------------------------------------------------------------------------------- texts in batches


def pad(framed: dict[str, list], rows: np.ndarray, fill: dict[str, int]) -> dict[str, Tensor]:
    """Some rows of what a tokenizer gave, {name: one list a text}, as tensors (B, L)."""
    return {
        name: nn.utils.rnn.pad_sequence([torch.tensor(lists[row]) for row in rows], True, fill.get(name, 0))
        for name, lists in framed.items()
    }


def by_batches(framed: dict[str, list], device, function: Callable) -> Iterator[tuple[np.ndarray, object]]:
    """Yield (rows, function(rows)) of batches of like length, which threads share on a CPU. No gradients are kept."""
    lengths = np.array([len(ids) for ids in framed["input_ids"]], np.int64)
    batches = length_batches(lengths, tokens_per_batch(device, int(lengths.sum())))
    yield from zip(batches, map_alone(torch.inference_mode()(function), batches, device=device), strict=True)


# ------------------------------------------------------------------------------------------------------------- teachers


class CrossEncoder:
    """Reads query and passage together, as one input (Nogueira and Cho, arXiv 1901.04085), and scores by a logit.

    The logit itself, without a sigmoid: what is learnt from it are differences, which a sigmoid flattens at its ends.
    Of two labels, the second being "relevant", it is the difference of theirs.
    """

    def __init__(self, model: nn.Module, tokenizer, max_tokens: int, fp32: bool = False):
        """max_tokens: of a pair; the longer text is cut first."""
        self.model, self.tokenizer, self.max_tokens, self.fp32 = model, tokenizer, max_tokens, fp32
        self.device = next(model.parameters()).device
        self.fill = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        head = [part for part in model.modules() if getattr(part, "out_features", 0) == model.config.num_labels][-1]
        head.forward = partial(in_fp32, head)

    def score(self, queries: list[str], passages: list[str], pairs: np.ndarray, done=nothing) -> np.ndarray:
        """Scores (n, 1) of pairs (n, 2)."""
        texts = [queries[query] for query, _ in pairs], [passages[passage] for _, passage in pairs]
        cut = {"truncation": True, "max_length": self.max_tokens, "split_special_tokens": True}
        framed = dict(self.tokenizer(*texts, **cut))

        def logits(rows) -> Tensor:
            with autocast(self.device, self.fp32):
                found = self.model(**to_device(pad(framed, rows, self.fill), self.device)).logits  # (B, 1 or 2)
            return (found[:, -1] if found.shape[1] == 1 else found[:, 1] - found[:, 0]).cpu()

        scores = np.empty((len(pairs), 1), np.float32)
        for rows, found in by_batches(framed, self.device, logits):
            scores[rows, 0] = found.numpy()
            done(len(rows))
        return scores


def in_fp32(head: nn.Linear, hidden: Tensor) -> Tensor:
    """What a last layer gives, in fp32 under autocast too: bf16 would round a logit of 10 to a sixteenth."""
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.float(), head.weight, head.bias)


class OwnSimilarity:
    """An encoder's own similarity of two texts, which nobody trained it for here.

    mean: the cosine of the two mean last hidden states, special tokens included, as scripts/baselines.py has it.
    maxsim: MaxSim of all token vectors at their full width, of unit length: [CLS] and [SEP] of both texts among them,
    punctuation too, no [MASK] and no marker.  sum: both, see `combined`.
    """

    def __init__(self, encoder: nn.Module, tokenizer, similarity: str, max_tokens: int, fp32: bool = False):
        """max_tokens: of a text, with [CLS] and [SEP]."""
        assert similarity in SIMILARITIES, similarity
        self.encoder, self.similarity, self.max_tokens, self.fp32 = encoder, similarity, max_tokens, fp32
        self.tokenizer = tokenizer
        self.backend, self.special = own_backend(tokenizer), special_token_ids(tokenizer)
        self.device = next(encoder.parameters()).device
        own_attention(encoder)

    def score(self, queries: list[str], passages: list[str], pairs: np.ndarray, done=nothing) -> np.ndarray:
        """Scores (n, 1) of pairs (n, 2), or (n, 2) of `sum`. Passages' vectors are made, scored and forgotten."""
        held = self.vectors_of(*self.pieces(queries))
        within = pairs_of_passages(pairs, len(passages))

        def score_batch(rows, vectors: list[tuple]) -> Tensor:
            found = [
                torch.stack([maxsim_of(q, p) for q, p in zip(held[query], of_passage, strict=True)])
                for row, of_passage in zip(rows, vectors, strict=True)
                for query in pairs[within[row], 0]
            ]
            return torch.stack(found).cpu()

        scores = np.empty((len(pairs), 2 if self.similarity == "sum" else 1), np.float32)
        for rows, found in self.embed(*self.pieces(passages), score_batch):
            scores[np.concatenate([within[row] for row in rows])] = found.numpy()
            done(len(found))
        return scores

    def pieces(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Word pieces (T,), one text after the other, and lengths (n,)."""
        return tokenize(self.backend, texts, self.max_tokens - 2 + FRAME)

    def vectors_of(self, values: np.ndarray, lengths: np.ndarray) -> list[tuple[Tensor, ...]]:
        """The `vectors` of each text of word pieces: values (T,), lengths (n,)."""
        found = [()] * len(lengths)
        for rows, vectors in self.embed(values, lengths, lambda _, vectors: vectors):
            for row, of_text in zip(rows, vectors, strict=True):
                found[row] = of_text
        return found

    def embed(self, values: np.ndarray, lengths: np.ndarray, then: Callable) -> Iterator[tuple[np.ndarray, object]]:
        """Yield (rows, then(rows, their `vectors`)) of batches of texts: values (T,), which are cut, lengths (n,)."""
        first, last, most = self.special["cls_token_id"], self.special["sep_token_id"], self.max_tokens - 2
        ids = [[first, *part[:most].tolist(), last] for part in np.split(values, np.cumsum(lengths)[:-1])]
        framed = {"input_ids": ids, "attention_mask": [[1] * len(part) for part in ids]}

        def run(rows) -> object:
            batch = pad(framed, rows, {"input_ids": self.special["pad_token_id"]})
            return then(rows, [self.vectors(states) for states in self.states(**batch)])

        return by_batches(framed, self.device, run)

    def states(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """The last hidden states (L, H) fp32 of each of some framed texts, (B, L) each; no gradients are kept."""
        real = attention_mask.bool()
        with torch.inference_mode(), autocast(self.device, self.fp32):
            if packable(self.encoder, self.device, compute_dtype(self.device)):
                packed = pack((input_ids, attention_mask, real))
                hidden = encode_packed(self.encoder, to_device(packed, self.device)).float()  # (T, H)
            else:
                batch = to_device({"input_ids": input_ids, "attention_mask": attention_mask}, self.device)
                hidden = self.encoder(**batch).last_hidden_state.float()[real.to(self.device)]
        return hidden.split(real.sum(1).tolist())

    def vectors(self, states: Tensor) -> tuple[Tensor, ...]:
        """Unit vectors of a text, from its hidden states (L, H): their mean (1, H), they themselves (L, H), or both."""
        mean = states.mean(0, keepdim=True)
        parts = {"mean": (mean,), "maxsim": (states,), "sum": (mean, states)}[self.similarity]
        return tuple(F.normalize(part, dim=-1) for part in parts)


def maxsim_of(query: Tensor, passage: Tensor) -> Tensor:
    """MaxSim, a scalar, of a query's vectors (Lq, H) with a passage's (Ld, H); of one vector each, their product."""
    return (query @ passage.T).amax(1).sum()


class LateInteraction:
    """A ColBERT, of whichever layout: `model` has its `encode_queries` and `encode_passages`."""

    def __init__(self, model, fp32: bool = False):
        self.model, self.fp32 = model, fp32

    def score(self, queries: list[str], passages: list[str], pairs: np.ndarray, done=nothing) -> np.ndarray:
        """Scores (n, 1) of pairs (n, 2). Passages' vectors are made, scored and forgotten."""
        vectors = self.model.encode_queries(queries, fp32=self.fp32, progress=False)  # (Q, Lq, D)
        within, scores = pairs_of_passages(pairs, len(passages)), np.empty((len(pairs), 1), np.float32)
        for start in range(0, len(passages), PASSAGES):
            part = self.model.encode_passages(passages[start : start + PASSAGES], fp32=self.fp32, progress=False)
            for at, passage in zip(within[start : start + PASSAGES], part, strict=True):  # (Ld, D)
                mine = vectors[torch.from_numpy(pairs[at, 0])]
                scores[at] = maxsim_packed(mine, passage.float(), torch.tensor([len(passage)])).numpy()
                done(len(at))
        return scores


# -------------------------------------------------------------------------------------------------------- from a folder


def load_teacher(
    name_or_path, similarity: str | None = None, max_tokens: int | None = None, fp32: bool = False, device=None
):
    """The teacher in a folder, or on the hub: a cross-encoder, or an encoder with one of SIMILARITIES.

    config.json tells which: its architectures end with ForSequenceClassification, or not. A ColBERT is loaded by its
    own class, and given to LateInteraction. max_tokens: of a text or a pair; by default as many as the model takes, 256
    or 512 at most. Raises InputError where it cannot be used.
    """
    folder = locate(name_or_path)
    check_folder(folder)
    if is_cross_encoder(folder):
        if similarity is not None:
            raise InputError(f"{name_or_path}: a cross-encoder, which scores by itself: leave out --similarity")
        return load_cross_encoder(name_or_path, folder, max_tokens, fp32, device or default_device())
    if similarity is None:
        raise InputError(
            f"{name_or_path}: an encoder, neither a cross-encoder nor a ColBERT: say how it compares texts by "
            f"--similarity {', '.join(SIMILARITIES)}"
        )
    tokenizer, config = load_tokenizer(folder), load_config(folder)
    encoder = load_encoder(name_or_path, config, read_weights(folder))
    check_vocabulary(name_or_path, tokenizer, encoder)
    check_weights(encoder, name_or_path)
    length = fitting(name_or_path, encoder, max_tokens, ENCODER_TOKENS)
    return OwnSimilarity(encoder.to(device or default_device()).eval(), tokenizer, similarity, length, fp32)


def is_cross_encoder(folder) -> bool:
    """Whether the model in a folder scores pairs of texts."""
    architectures = read_settings(folder / "config.json").get("architectures") or [""]
    return str(architectures[0]).endswith("ForSequenceClassification")


def load_cross_encoder(name, folder, max_tokens: int | None, fp32: bool, device) -> CrossEncoder:
    """Raises InputError where the model has not one or two labels, no tokenizer, or not all of its weights."""
    with loading(f"{name}: no cross-encoder could be loaded"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        config.dtype = torch.float32
        model, report = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)].from_pretrained(
            None,
            config=config,
            state_dict=read_weights(folder),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # that is: report them
            output_loading_info=True,
        )
    if config.num_labels not in (1, 2):
        raise InputError(f"{name}: {config.num_labels} labels, where a score is wanted: give one with 1 label, or 2")
    wrong = sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"])
    if wrong:
        raise InputError(f"{name}: weight {wrong[0]} is missing, or of another shape than its config says")
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise InputError(f"{name}: no fast tokenizer with a padding token: give a model with its tokenizer.json")
    check_vocabulary(name, tokenizer, model.base_model)
    check_weights(model, name)
    usual = min(PAIR_TOKENS, tokenizer.model_max_length)
    length = fitting(name, model.base_model, max_tokens, usual)
    return CrossEncoder(model.to(device).eval(), tokenizer, length, fp32)


def fitting(name, encoder: nn.Module, asked: int | None, usual: int) -> int:
    """Tokens that a text is cut to: as asked, or as usual where the model takes so many. Raises InputError."""
    longest = longest_input(encoder)
    if asked is not None and asked > longest:
        raise InputError(f"{name}: takes {longest} tokens, --max_tokens {asked} were asked for")
    return min(usual, longest) if asked is None else asked
