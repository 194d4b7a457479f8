"""What a checkpoint holds, and what all readers and writers need to be true to it.

Each key of another library's settings is used, or known to leave vectors alone, or an InputError that names it; a key
that is missing has the value that library itself would take, or is an error.
"""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedConfig

from nanocolbert.cli import InputError
from nanocolbert.config import ColBERTConfig
from nanocolbert.encoder.pretrained import load_config, special_token_ids
from nanocolbert.text import FRAME, own_backend, prepare_texts, tokenize

# Texts on which our word pieces must be those of the other library, prompts and markers included.
PROBES = ["what is late interaction?", "A", "", "(a) b-c, 2.5", "caf\u00e9 \u65e5\u672c", "two  spaces"]


class Checkpoint(NamedTuple):
    """The parts of a model, as a reader finds them."""

    settings: dict  # fields of ColBERTConfig but `encoder`; lengths that are None are the longest the encoder takes
    projection: dict[str, Tensor]  # its weights, under our names
    tokenizer: object
    encoder: PreTrainedConfig
    weights: dict[str, Tensor]  # of the encoder, and in other layouts of heads that nothing is made of
    is_own: bool = False  # our own layout: the encoder has a place for each of its weights
    meta: dict | None = None  # its meta.json, where it has one


# ---------------------------------------------------------------------------------------------------------- reading


def with_linear(path: Path, settings: dict, tokenizer, base: Path, weights: dict[str, Tensor]) -> Checkpoint:
    """A checkpoint whose projection is among the weights of the encoder, whose config is in `base`."""
    if "linear.weight" not in weights:
        raise InputError(f"{path}: no linear.weight among the weights")
    return Checkpoint(settings, {"weight": weights.pop("linear.weight")}, tokenizer, load_config(base), weights)


def check_keys(where, settings: dict, used: dict, known: list[str] = ()) -> dict:
    """The settings that `used` names, a missing one as `used` says (... where it may not be missing).

    Raises InputError on a key that is neither used nor known.
    """
    unknown = sorted(set(settings) - set(used) - set(known))
    if unknown:
        raise InputError(f"{where}: unknown key {unknown[0]!r}: it may change vectors; remove it if it does not")
    missing = sorted(key for key, value in used.items() if value is ... and key not in settings)
    if missing:
        raise InputError(f"{where}: key {missing[0]!r} is missing: add it with the value the model was trained with")
    return {**used, **settings}


def must_be(where, settings: dict, **wanted) -> None:
    """Raise InputError naming the first setting that is none of the values that can be honoured."""
    for key, values in wanted.items():
        if settings.get(key) not in values:
            allowed = " or ".join(map(repr, values))
            raise InputError(f"{where}: {key} {settings.get(key)!r} cannot be honoured here, only {allowed}")


def token_id(where, tokenizer, token: str) -> int:
    """The id of a token. Raises InputError where the tokenizer has none."""
    if token not in tokenizer.get_vocab():
        raise InputError(f"{where}: {token!r} is no token of the tokenizer: its embedding was not saved")
    return tokenizer.convert_tokens_to_ids(token)


# ------------------------------------------------------------------------------------------------- the same tokens


def agree(settings: dict, tokenizer, kind: str, other) -> bool:
    """Whether the probes become the same tokens by ColBERTConfig(**settings) as by other(kind, text)."""
    config = ColBERTConfig(**{**special_token_ids(tokenizer), **settings})
    head, sep = config.frame(kind)
    theirs = [list(other(kind, text)) for text in PROBES]
    texts, backend = prepare_texts(PROBES, kind, config.texts()), own_backend(tokenizer)
    ours = [[*head, *tokenize(backend, [text], 1000 + FRAME)[0].tolist(), sep] for text in texts]
    return ours == theirs


def check_markers(where, settings: dict, tokenizer) -> None:
    """Raise InputError where texts with a marker put in as second token, as other libraries do, differ from ours."""
    texts = ColBERTConfig(**settings).texts()

    def with_marker(kind: str, text: str) -> list[int]:
        ids, marker = tokenizer(prepare_texts([text], kind, texts)[0])["input_ids"], settings[f"{kind}_marker_id"]
        return [*ids[:1], *([] if marker is None else [marker]), *ids[1:]]

    for kind in ("query", "passage"):
        if not agree(settings, tokenizer, kind, with_marker):
            raise InputError(f"{where}: its tokenizer frames a {kind} in a way that cannot be honoured here")


# ---------------------------------------------------------------------------------------------------------- writing


def refuse(layout: str, what: str, can: bool) -> None:
    """Raise InputError unless the layout can say it."""
    if not can:
        raise InputError(f"the {layout} layout cannot hold this model: {what}")


def marker_of(model, kind: str) -> str:
    """The marker of a query or a passage as a string, empty where there is none."""
    marker = model.config.query_marker_id if kind == "query" else model.config.passage_marker_id
    return "" if marker is None else token_of(model.tokenizer, marker)


def token_of(tokenizer, i: int) -> str:
    """The string of a token, as it was added (convert_ids_to_tokens gives an added one in lower case)."""
    added = tokenizer.added_tokens_decoder.get(i)
    return tokenizer.convert_ids_to_tokens(i) if added is None else added.content


def skiplist_words(model, layout: str) -> list[str]:
    """The tokens that are dropped, as strings."""
    dropped = model.config.skiplist if model.config.mask_punctuation else []
    words = [token_of(model.tokenizer, i) for i in dropped]
    refuse(layout, "tokens of the skiplist have no name", None not in words)
    return words


def without_prompts(model) -> bool:
    """Whether the prompts change no tokens (a space before the text, where the tokenizer does not see it)."""
    config, tokenizer = model.config, model.tokenizer

    def plain(kind: str, text: str) -> list[int]:
        head, sep = config.frame(kind)
        return [*head, *tokenize(model.backend, [text], 1000 + FRAME)[0].tolist(), sep]

    settings = {**config.to_dict(), "strip_texts": False}
    return all(agree(settings, tokenizer, kind, plain) for kind in ("query", "passage"))
