"""Our own layout, `nanocolbert`: all settings in config.json, weights under encoder. and linear.

It is not that of Hannibal046's nanoColBERT, which is read as `reference`. ColBERT.save_pretrained writes it.
"""

from pathlib import Path

from transformers import PreTrainedConfig

from nanocolbert.checkpoints.parts import Checkpoint, check_keys
from nanocolbert.cli import InputError
from nanocolbert.config import ColBERTConfig
from nanocolbert.encoder.pretrained import (
    SIZES,
    load_config,
    load_tokenizer,
    read_settings,
    read_weights,
    special_token_ids,
)
from nanocolbert.encoder.projection import ACTIVATIONS

# What versions of transformers put into a config.json of their own accord.
TRANSFORMERS_KNOWN = """
add_cross_attention bos_token_id cross_attention_hidden_size decoder_start_token_id eos_token_id finetuning_task
is_decoder prefix pruned_heads task_specific_params tf_legacy_loss tie_encoder_decoder tie_word_embeddings
tokenizer_class torch_dtype torchscript use_bfloat16 use_cache
"""


def is_count(value) -> bool:
    return type(value) is int and value >= 0


def is_size(value) -> bool:
    return is_count(value) and value > 0


def is_count_or_none(value) -> bool:
    return value is None or is_count(value)


def is_switch(value) -> bool:
    return type(value) is bool


def is_text(value) -> bool:
    return type(value) is str


def are_ids(value) -> bool:
    return type(value) is list and all(map(is_count, value))


def are_layers(value) -> bool:
    """Whether these are arguments of `Dense`."""
    sizes = {"in_features": is_size, "out_features": is_size, "bias": is_switch, "residual": is_switch}
    kinds = {**sizes, "activation": lambda value: value in ACTIVATIONS}

    def is_layer(layer) -> bool:
        return type(layer) is dict and layer.keys() == kinds.keys() and all(kinds[key](layer[key]) for key in kinds)

    return value is None or (type(value) is list and all(map(is_layer, value)))


# What the fields of our own config.json must be: those of the first version, and those that came later.
OWN = {
    "encoder": lambda value: type(value) is dict,
    **dict.fromkeys(("dim", "query_maxlen", "doc_maxlen"), is_size),
    **dict.fromkeys(("mask_punctuation", "attend_to_mask_tokens"), is_switch),
    **dict.fromkeys(("query_marker_id", "passage_marker_id"), is_count_or_none),
    **dict.fromkeys(("cls_token_id", "mask_token_id", "sep_token_id", "pad_token_id"), is_count),
    "skiplist": are_ids,
}
OWN_LATER = {
    "expand_queries_to": is_count,
    **dict.fromkeys(("query_prompt", "passage_prompt"), is_text),
    **dict.fromkeys(("strip_texts", "normalize"), is_switch),
    "dense": are_layers,
    "pool_factor": is_size,
    "protected_tokens": is_count,
    "normalize_pooled": is_switch,
}


def own_settings(where: Path) -> dict:
    """Fields of ColBERTConfig from our own config.json. Raises InputError on what is unknown, missing or of no sense.

    What transformers writes beside them tells nothing of the vectors.
    """
    found, kinds = read_settings(where), OWN | OWN_LATER
    by_transformers = {*PreTrainedConfig().to_dict(), *TRANSFORMERS_KNOWN.split()}
    check_keys(where, found, dict.fromkeys(OWN, ...) | dict.fromkeys(OWN_LATER), by_transformers)
    settings = {key: value for key, value in found.items() if key in kinds}
    for key, value in settings.items():
        if not kinds[key](value):
            raise InputError(f"{where}: {key} {str(value)[:100]!r} cannot be honoured here")
    config = ColBERTConfig(**settings)
    for kind, key in (("query", "query_maxlen"), ("passage", "doc_maxlen")):
        if config.pieces(kind) < 1:
            raise InputError(f"{where}: {key} {settings[key]} leaves no room for a word piece")
    if config.pool_factor > 1 and not config.normalize:
        raise InputError(f"{where}: pool_factor {config.pool_factor} without normalize cannot be honoured here")
    return settings


def read_own(path: Path) -> Checkpoint:
    """A folder that ColBERT.save_pretrained wrote."""
    where = path / "config.json"
    settings = own_settings(where)
    encoder = settings.pop("encoder")
    config = load_config(where, encoder)
    for key in (config.attribute_map.get(key, key) for key in SIZES):
        if key not in encoder:
            raise InputError(
                f"{where}: key {key!r} of the encoder is missing: add it with the value it was trained with"
            )
    tokenizer = load_tokenizer(path)
    for key, value in special_token_ids(tokenizer).items():
        if key != "mask_token_id" and value != settings[key]:
            raise InputError(f"{where}: {key} {settings[key]}, but {value} of the tokenizer: they are not of one model")
    parts = {"encoder": {}, "linear": {}}
    for name, weight in read_weights(path).items():
        part, _, rest = name.partition(".")
        if part not in parts:
            raise InputError(f"{path}: weight {name} is none of a ColBERT model: it is another's, or damaged")
        parts[part][rest] = weight
    return Checkpoint(settings, parts["linear"], tokenizer, config, parts["encoder"], is_own=True)
