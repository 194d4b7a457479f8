"""Checkpoints of every ColBERT library: told apart by their files, read into ColBERTConfig, written for any of them.

reads   a folder, a name on the hub, or v1's .dnn file, in one of the layouts
          nanocolbert            config.json of model_type colbert, model.safetensors, tokenizer
          reference              nanoColBERT's own: a BERT config.json with similarity_metric
          stanford               config.json of architecture HF_ColBERT, artifact.metadata
          v1                     a .dnn file: weights and the arguments of their training, pickled
          pylate                 modules.json, config_sentence_transformers.json with query_prefix
          sentence-transformers  modules.json, config_sentence_transformers.json of model_type MultiVectorEncoder
writes  a folder in one of LAYOUTS that the library of that name opens

Each key of another library's settings is used, or known to leave vectors alone, or an InputError that names it; a key
that is missing has the value that library itself would take, or is an error. encoders.py reads weights, tokenizers and
encoders, for all of them.
"""

import contextlib
import copy
import json
import string
import tempfile
from pathlib import Path
from typing import NamedTuple

from nanocolbert.cli import InputError

LAYOUTS = ("nanocolbert", "stanford", "pylate", "sentence-transformers")


from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AddedToken, AutoConfig, PreTrainedConfig

from model import FRAME, ColBERT, ColBERTConfig, check_weights, own_backend, prepare_texts, tokenize
from nanocolbert.encoder.pretrained import (
    SIZES,
    check_folder,
    load_config,
    load_encoder,
    load_tokenizer,
    locate,
    longest_input,
    read_pickle,
    read_settings,
    read_weights,
    special_token_ids,
)
from nanocolbert.storage.artifact import read_json, write_json
from nanocolbert.storage.checksums import check_sizes, check_sums

# Texts on which our word pieces must be those of the other library, prompts and markers included.
PROBES = ["what is late interaction?", "A", "", "(a) b-c, 2.5", "caf\u00e9 \u65e5\u672c", "two  spaces"]

ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid", "LeakyReLU", "ELU", "Softplus")  # of torch.nn

# Of the training, the indexing and the search of colbert-ai; they do not change what a text is encoded to.
STANFORD_KNOWN = """
overwrite root experiment index_root name rank nranks amp gpus avoid_fork_if_possible checkpoint triples collection
queries index_name similarity bsize accumsteps lr maxsteps save_every resume warmup warmup_bert relu nway
use_ib_negatives reranker distillation_alpha ignore_scores model_name index_path index_bsize nbits kmeans_niters
num_partitions_max clustering_mode protected_tokens ncells centroid_score_threshold ndocs load_index_with_mmap
query_token doc_token meta model resume_optimizer accum run distributed local_rank input_arguments
"""
# What versions of transformers put into a config.json of their own accord.
TRANSFORMERS_KNOWN = """
add_cross_attention bos_token_id cross_attention_hidden_size decoder_start_token_id eos_token_id finetuning_task
is_decoder prefix pruned_heads task_specific_params tf_legacy_loss tie_encoder_decoder tie_word_embeddings
tokenizer_class torch_dtype torchscript use_bfloat16 use_cache
"""
ST_KNOWN = ["model_type", "__version__", "similarity_fn_name"]


# ------------------------------------------------------------------------------------------------ where and which


def detect(path: Path) -> str | None:
    """The layout of a checkpoint, or None where it is a plain encoder.

    Raises InputError for a model of sentence-transformers that has no token embeddings, and for no model at all.
    """
    if path.suffix == ".dnn":
        return "v1"
    if (path / "modules.json").is_file():
        settings = read_settings(path / "config_sentence_transformers.json")
        if settings.get("model_type") == "MultiVectorEncoder":
            return "sentence-transformers"
        return "pylate" if settings.get("model_type") == "ColBERT" or "query_prefix" in settings else None
    config = read_settings(path / "config.json")
    if config.get("model_type") == "colbert":
        return "nanocolbert"
    if "HF_ColBERT" in (config.get("architectures") or []):
        return "stanford"
    return "reference" if "similarity_metric" in config else None


def layout_of(name_or_path, revision: str | None = None, weights: bool = True) -> tuple[Path, str]:
    """Where a checkpoint lies and its layout. Raises InputError where it is no ColBERT."""
    path = locate(name_or_path, revision, weights)
    check_folder(path)
    layout = detect(path)
    if layout is None:
        raise InputError(f"{name_or_path}: an encoder, no ColBERT model: train one on it with train.py --base_model")
    return path, layout


def is_colbert(name_or_path) -> bool:
    """Whether there is a ColBERT checkpoint here (or on the hub): not a plain encoder, not nothing."""
    with contextlib.suppress(InputError):
        return detect(locate(name_or_path, weights=False)) is not None
    return False


def texts_of(name_or_path) -> dict:
    """ColBERTConfig.texts() of a checkpoint; of a plain encoder, where nothing is put before texts."""
    if not is_colbert(name_or_path):
        return ColBERTConfig().texts()
    path, layout = layout_of(name_or_path)
    if layout == "nanocolbert":
        return ColBERTConfig(**own_settings(path / "config.json")).texts()
    return ColBERTConfig(**READERS[layout](path).settings).texts()


# ---------------------------------------------------------------------------------------------------------- reading


class Checkpoint(NamedTuple):
    """What a reader finds."""

    settings: dict  # fields of ColBERTConfig
    projection: dict[str, Tensor]  # its weights, under our names
    tokenizer: object
    encoder: PreTrainedConfig
    weights: dict[str, Tensor]  # of the encoder, and in other layouts of heads that nothing is made of


def load(cls, name_or_path, revision: str | None = None) -> ColBERT:
    """What ColBERT.from_pretrained does, on the CPU."""
    path, layout = layout_of(name_or_path, revision)
    meta = read_settings(path / "meta.json") if (path / "meta.json").is_file() else None
    if meta is not None:  # of files that came along: what is not read need not be there
        sums = {name: sums for name, sums in meta.get("files", {}).items() if not name.endswith(".md")}
        sums = {name: sums for name, sums in sums.items() if (path / name).exists()}
        check_sizes(path, sums)
        check_sums(path, {name: sums for name, sums in sums.items() if name.endswith(".json")})  # small, and decisive
    found = READERS[layout](path)
    settings = found.settings
    encoder = load_encoder(name_or_path, found.encoder, found.weights, exact=layout == "nanocolbert")
    settings |= {name: longest_input(encoder) for name in ("query_maxlen", "doc_maxlen") if settings[name] is None}
    model = cls.on_encoder(name_or_path, encoder, found.tokenizer, **settings)
    load_projection(path, model.linear, found.projection)
    check_weights(model, name_or_path)
    model.meta = meta
    return model.eval()


def load_projection(path, linear: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put weights into the projection, as fp32. Raises InputError where names or shapes differ."""
    wanted = {name: tuple(weight.shape) for name, weight in linear.state_dict().items()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    if wanted != found:
        raise InputError(f"{path}: the projection should have weights {wanted}, found {found}")
    linear.load_state_dict(weights)


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
    """Whether these are arguments of model.Dense."""
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
    return settings


def read_own(path: Path) -> Checkpoint:
    """Our own layout: all settings in config.json, weights under encoder. and linear."""
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
    return Checkpoint(settings, parts["linear"], tokenizer, config, parts["encoder"])


def read_stanford(path: Path) -> Checkpoint:
    """colbert-ai: everything in one folder, the encoder's weights with a prefix (bert., roberta., model.)."""
    where = path / "artifact.metadata"
    metadata = read_settings(where)
    tokenizer = load_tokenizer(path)
    settings = stanford_settings(where, metadata, tokenizer)
    return with_linear(path, settings, tokenizer, path, read_weights(path))


def with_linear(path: Path, settings: dict, tokenizer, base: Path, weights: dict[str, Tensor]) -> Checkpoint:
    """A checkpoint whose projection is among the weights of the encoder, whose config is in `base`."""
    if "linear.weight" not in weights:
        raise InputError(f"{path}: no linear.weight among the weights")
    return Checkpoint(settings, {"weight": weights.pop("linear.weight")}, tokenizer, load_config(base), weights)


def stanford_settings(where, metadata: dict, tokenizer) -> dict:
    """Fields of ColBERTConfig from artifact.metadata, defaults as colbert-ai's."""
    used = {"query_token_id": "[unused0]", "doc_token_id": "[unused1]", "query_maxlen": 32, "doc_maxlen": 220}
    used |= {"dim": 128, "attend_to_mask_tokens": False, "mask_punctuation": True}
    metadata = check_keys(where, metadata, {**used, "interaction": "colbert", "pool_factor": 1}, STANFORD_KNOWN.split())
    must_be(where, metadata, interaction=["colbert"], pool_factor=[1])
    settings = {
        **{key: metadata[key] for key in ("query_maxlen", "doc_maxlen", "dim")},
        "attend_to_mask_tokens": bool(metadata["attend_to_mask_tokens"]),
        "mask_punctuation": bool(metadata["mask_punctuation"]),
        "query_marker_id": token_id(where, tokenizer, metadata["query_token_id"]),
        "passage_marker_id": token_id(where, tokenizer, metadata["doc_token_id"]),
        "skiplist": stanford_skiplist(tokenizer) if metadata["mask_punctuation"] else [],
    }
    check_markers(where, settings, tokenizer)
    return settings


def stanford_skiplist(tokenizer) -> list[int]:
    """What colbert-ai and nanoColBERT drop: the first word piece of each symbol of string.punctuation."""
    return sorted({tokenizer.encode(symbol, add_special_tokens=False)[0] for symbol in string.punctuation})


def read_v1(path: Path) -> Checkpoint:
    """ColBERT v1: weights and arguments in one pickle; the encoder's shape and tokenizer are its base model's."""
    pickled = read_pickle(path)
    pickled = check_keys(
        path, pickled, {"model_state_dict": ..., "arguments": ...}, ["epoch", "batch", "optimizer_state_dict"]
    )
    arguments = pickled["arguments"] or {}
    absent = [key for key in ("dim", "query_maxlen", "doc_maxlen", "mask_punctuation") if key not in arguments]
    if absent:
        raise InputError(f"{path}: arguments without {absent[0]!r}: v1 takes it from the command line")
    base = arguments.get("model", "bert-base-uncased")  # as colbert-ai's loader
    tokenizer = load_tokenizer(base)
    settings = stanford_settings(f"{path}: arguments", arguments, tokenizer)
    weights = {name.removeprefix("module."): weight for name, weight in pickled["model_state_dict"].items()}
    return with_linear(path, settings, tokenizer, locate(base, weights=False), weights)


def read_reference(path: Path) -> Checkpoint:
    """nanoColBERT: lengths are options of its scripts, 32 and 180; mask_buffer, saved with the weights, is not read."""
    config = read_settings(path / "config.json")
    absent = [key for key in ("dim", "mask_punctuation") if key not in config]
    if absent:
        raise InputError(f"{path / 'config.json'}: key {absent[0]!r} is missing")
    must_be(path / "config.json", config, similarity_metric=["l2", "cosine"])  # the same ranking
    tokenizer = load_tokenizer(path)
    settings = {
        "dim": config["dim"],
        "query_maxlen": 32,
        "doc_maxlen": 180,
        "mask_punctuation": config["mask_punctuation"],
        "query_marker_id": token_id(path, tokenizer, "[Q]"),
        "passage_marker_id": token_id(path, tokenizer, "[D]"),
        "skiplist": stanford_skiplist(tokenizer) if config["mask_punctuation"] else [],
    }
    check_markers(path, settings, tokenizer)
    weights = read_weights(path)
    weights.pop("mask_buffer", None)
    return with_linear(path, settings, tokenizer, path, weights)


def read_pylate(path: Path) -> Checkpoint:
    """PyLate: markers are put in as tokens; texts are stripped; embeddings always have unit length."""
    where = path / "config_sentence_transformers.json"
    used = {"query_prefix": "[Q] ", "document_prefix": "[D] ", "query_length": 32, "document_length": 180}
    used |= {"attend_to_expansion_tokens": False, "do_query_expansion": True, "skiplist_words": None}
    used |= {"prompts": {}, "default_prompt_name": None}
    found = check_keys(where, read_settings(where), used, ST_KNOWN)
    found = {key: used.get(key) if value is None else value for key, value in found.items()}  # null: PyLate's default
    modules = read_modules(path, ("Transformer", "Dense"), ignored=("MultiVectorMask", "Normalize"))
    check_transformer(path, modules)
    tokenizer = load_tokenizer(path)
    prompt = ""
    if found["default_prompt_name"] is not None:
        prompt = found["prompts"].get(found["default_prompt_name"]) or ""
    skiplist = string.punctuation if found["skiplist_words"] is None else found["skiplist_words"]
    ids = {tokenizer.convert_tokens_to_ids(word) for word in skiplist}  # an unknown word drops [UNK], as it does there
    settings = {
        "query_maxlen": found["query_length"],
        "doc_maxlen": found["document_length"],
        "expand_queries_to": found["query_length"] if found["do_query_expansion"] else 0,
        "attend_to_mask_tokens": bool(found["do_query_expansion"] and found["attend_to_expansion_tokens"]),
        "mask_punctuation": bool(ids),
        "skiplist": sorted(ids - {None}),
        "query_prompt": prompt,
        "passage_prompt": prompt,
        "strip_texts": True,
    }
    for kind, key in (("query", "query_prefix"), ("passage", "document_prefix")):
        settings[f"{kind}_marker_id"] = token_id(where, tokenizer, found[key]) if found[key] else None

    settings |= dense_settings(path, modules, {"bias": True, "activation_function": ...})
    check_markers(path, settings, tokenizer)
    projection = projection_weights(path, modules, settings["dense"])
    return Checkpoint(settings, projection, tokenizer, load_config(path), read_weights(path))


def read_sentence_transformers(path: Path) -> Checkpoint:
    """sentence-transformers 6: prompts as text; expansion with the Transformer, skiplist with the MultiVectorMask."""
    where = path / "config_sentence_transformers.json"
    found = check_keys(where, read_settings(where), {"prompts": {}}, [*ST_KNOWN, "default_prompt_name"])
    modules = read_modules(path, ("Transformer", "Dense", "MultiVectorMask", "Normalize"))
    names = [name for name, _ in modules]
    if "Normalize" in names and "Dense" in names[names.index("Normalize") :]:
        raise InputError(f"{path / 'modules.json'}: a Dense after Normalize cannot be honoured here")
    transformer = check_transformer(path, modules)
    tokenizer = load_tokenizer(path)
    expansion = transformer["query_expansion"]
    settings = {"query_maxlen": transformer["query_length"], "doc_maxlen": transformer["document_length"]}
    settings["expand_queries_to"] = 0
    if expansion is not None:
        used = {"strategy": ..., "length": ..., "attend": False, "token": None}
        expansion = check_keys(path / "sentence_bert_config.json: query_expansion", expansion, used)
        must_be(path / "sentence_bert_config.json: query_expansion", expansion, strategy=["fixed", "min"])
        if "MultiVectorMask" not in names:
            raise InputError(f"{path / 'modules.json'}: query_expansion without a MultiVectorMask cannot be honoured")
        settings["expand_queries_to"] = expansion["length"]
        settings["attend_to_mask_tokens"] = expansion["attend"]
        if expansion["strategy"] == "fixed":
            settings["query_maxlen"] = expansion["length"]
        if expansion["token"] is not None:
            settings["mask_token_id"] = token_id(where, tokenizer, expansion["token"])
    if settings["query_maxlen"] is not None:
        settings["query_maxlen"] = max(settings["query_maxlen"], settings["expand_queries_to"])
    longest = transformer["max_seq_length"]  # what holds where a length is not given
    if longest is None:
        longest = tokenizer.model_max_length
    if longest < 1 << 20:
        longest = min(longest, getattr(load_config(path), "max_position_embeddings", 1 << 30))
        settings |= {key: longest for key in ("query_maxlen", "doc_maxlen") if settings[key] is None}
    settings |= mask_settings(path, modules, tokenizer)
    settings["normalize"] = "Normalize" in names
    for kind, name in (("query", "query"), ("passage", "document")):
        settings |= split_prompt(where, settings, tokenizer, kind, found["prompts"].get(name) or "")
    settings |= dense_settings(path, modules, {"bias": True, "activation_function": "torch.nn.Tanh"})
    projection = projection_weights(path, modules, settings["dense"])
    return Checkpoint(settings, projection, tokenizer, load_config(path), read_weights(path))


READERS = {
    "nanocolbert": read_own,
    "reference": read_reference,
    "stanford": read_stanford,
    "v1": read_v1,
    "pylate": read_pylate,
    "sentence-transformers": read_sentence_transformers,
}


def read_modules(path: Path, allowed: tuple[str, ...], ignored: tuple[str, ...] = ()) -> list[tuple[str, Path]]:
    """The modules of modules.json: class and folder of each. Raises InputError on one that cannot be honoured."""
    modules, where = [], path / "modules.json"
    entries = read_json(where)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{where}: no list of modules")
    for entry in entries:
        if type(entry.get("type")) is not str or type(entry.get("path")) is not str:
            raise InputError(f"{where}: a module without its type and path")
        name = entry["type"].rsplit(".", 1)[-1]
        own = entry["type"].startswith(("sentence_transformers.", "pylate."))
        if not own or name not in (*allowed, *ignored):
            raise InputError(f"{where}: module {entry['type']!r} cannot be honoured here, only {', '.join(allowed)}")
        if Path(entry["path"]).is_absolute() or ".." in Path(entry["path"]).parts:
            raise InputError(f"{where}: path {entry['path']!r} leads out of the folder")
        if name in allowed:
            modules.append((name, path / entry["path"]))
    if [name for name, _ in modules][:1] != ["Transformer"] or modules[0][1] != path:
        raise InputError(f"{where}: the first module must be a Transformer in the folder itself")
    if not any(name == "Dense" for name, _ in modules):
        raise InputError(f"{where}: no Dense module: embeddings would not be projected")
    return modules


def check_transformer(path: Path, modules) -> dict:
    """sentence_bert_config.json. Raises InputError on what would change texts or the encoder."""
    where = path / "sentence_bert_config.json"
    used = {"max_seq_length": None, "query_length": None, "document_length": None, "query_expansion": None}
    fixed = {"do_lower_case": False, "transformer_task": "feature-extraction", "module_output_name": "token_embeddings"}
    fixed |= {"tokenizer_name_or_path": None, "modality_config": None, "processing_kwargs": None}
    empty = {key: None for key in ("model_args", "model_kwargs", "tokenizer_args", "processor_kwargs")}
    empty |= {key: None for key in ("config_args", "config_kwargs")}
    found = check_keys(where, read_settings(where), {**used, **fixed, **empty}, ["unpad_inputs"])
    forward = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
    choices = {key: [None, {}] for key in ("processing_kwargs", *empty)} | {"modality_config": [None, forward]}
    must_be(where, found, **{key: [value] for key, value in fixed.items() if key not in choices}, **choices)
    return found


def dense_settings(path: Path, modules, defaults: dict) -> dict:
    """`dim` and `dense` of ColBERTConfig from the Dense modules; `defaults` of keys that may be missing."""
    layers = []
    for folder in (folder for name, folder in modules if name == "Dense"):
        where = folder / "config.json"
        used = {"in_features": ..., "out_features": ..., "use_residual": False, **defaults}
        used |= {"module_input_name": "token_embeddings", "module_output_name": None}
        found = check_keys(where, read_settings(where), used)
        must_be(where, found, module_input_name=["token_embeddings"], module_output_name=[None, "token_embeddings"])
        activation = found["activation_function"].rsplit(".", 1)[-1]
        if not found["activation_function"].startswith("torch.nn.") or activation not in ACTIVATIONS:
            raise InputError(f"{where}: activation_function {found['activation_function']!r} cannot be honoured here")
        sizes = {"in_features": found["in_features"], "out_features": found["out_features"], "bias": found["bias"]}
        layers.append({**sizes, "activation": activation, "residual": found["use_residual"]})
    plain = [not layer["bias"] and layer["activation"] == "Identity" and not layer["residual"] for layer in layers]
    return {"dim": layers[-1]["out_features"], "dense": None if plain == [True] else layers}


def projection_weights(path: Path, modules, dense: list[dict] | None) -> dict[str, Tensor]:
    """Weights of the Dense modules under our names."""
    weights = {}
    for i, folder in enumerate(folder for name, folder in modules if name == "Dense"):
        for name, weight in read_weights(folder).items():
            weights[name.removeprefix("linear.") if dense is None else f"{i}.{name}"] = weight
    return weights


def mask_settings(path: Path, modules, tokenizer) -> dict:
    """`mask_punctuation` and `skiplist` from a MultiVectorMask, which drops passage tokens only."""
    folder = next((folder for name, folder in modules if name == "MultiVectorMask"), None)
    if folder is None:
        return {"mask_punctuation": False, "skiplist": []}
    used = {"skiplist_words": [], "skiplist_tasks": ["document"], "keep_only_token_ids": None}
    found = check_keys(folder / "config.json", read_settings(folder / "config.json"), used)
    must_be(folder / "config.json", found, skiplist_tasks=[["document"]], keep_only_token_ids=[None])
    ids = {tokenizer.convert_tokens_to_ids(word): word for word in found["skiplist_words"] or []}
    if ids.get(tokenizer.unk_token_id) != tokenizer.unk_token:  # unknown words are passed over there
        ids.pop(tokenizer.unk_token_id, None)
    return {"mask_punctuation": bool(ids), "skiplist": sorted(ids)}


def split_prompt(where, settings: dict, tokenizer, kind: str, prompt: str) -> dict:
    """Marker and prompt of ColBERTConfig that together are a prompt of text, which may begin with a special token."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    marker = max((token for token in special if prompt.startswith(token)), key=len, default="")
    rest = prompt.removeprefix(marker)
    for candidate in dict.fromkeys((rest.strip(), rest, rest.lstrip())):
        split = {f"{kind}_prompt": candidate}
        split[f"{kind}_marker_id"] = tokenizer.convert_tokens_to_ids(marker) if marker else None
        if agree({**settings, **split}, tokenizer, kind, lambda _, text: tokenizer(prompt + text)["input_ids"]):
            return split
    raise InputError(f"{where}: prompt {prompt!r} cannot be honoured here: its tokens depend on the text after it")


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


def save(model: ColBERT, path, layout: str) -> None:
    """Write a model in the layout of another library. Raises InputError where that cannot say what the model does.

    White space around a text is not looked at: PyLate cuts it off, the others do not.
    """
    if layout not in WRITERS:
        raise InputError(f"layout {layout!r}: not one of {', '.join(LAYOUTS)}")
    Path(path).mkdir(parents=True, exist_ok=True)
    tokenizer = copy.deepcopy(model.tokenizer)
    WRITERS[layout](model, tokenizer, Path(path))
    tokenizer.save_pretrained(path)
    name_as_before(Path(path) / "tokenizer_config.json")


def name_as_before(path: Path) -> None:
    """Rewrite a tokenizer_config.json of transformers 5 with the names that transformers 4 knows, and 5 reads too."""
    settings = read_settings(path)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    write_json(path, settings)


def refuse(layout: str, what: str, can: bool) -> None:
    """Raise InputError unless the layout can say it."""
    if not can:
        raise InputError(f"the {layout} layout cannot hold this model: {what}")


def marker_of(model: ColBERT, kind: str) -> str:
    """The marker of a query or a passage as a string, empty where there is none."""
    marker = model.config.query_marker_id if kind == "query" else model.config.passage_marker_id
    return "" if marker is None else token_of(model.tokenizer, marker)


def token_of(tokenizer, i: int) -> str:
    """The string of a token, as it was added (convert_ids_to_tokens gives an added one in lower case)."""
    added = tokenizer.added_tokens_decoder.get(i)
    return tokenizer.convert_ids_to_tokens(i) if added is None else added.content


def skiplist_words(model: ColBERT, layout: str) -> list[str]:
    """The tokens that are dropped, as strings."""
    dropped = model.config.skiplist if model.config.mask_punctuation else []
    words = [token_of(model.tokenizer, i) for i in dropped]
    refuse(layout, "tokens of the skiplist have no name", None not in words)
    return words


def without_prompts(model: ColBERT) -> bool:
    """Whether the prompts change no tokens (a space before the text, where the tokenizer does not see it)."""
    config, tokenizer = model.config, model.tokenizer

    def plain(kind: str, text: str) -> list[int]:
        head, sep = config.frame(kind)
        return [*head, *tokenize(model.backend, [text], 1000 + FRAME)[0].tolist(), sep]

    settings = {**config.to_dict(), "strip_texts": False}
    return all(agree(settings, tokenizer, kind, plain) for kind in ("query", "passage"))


def save_stanford(model: ColBERT, tokenizer, path: Path) -> None:
    """config.json, artifact.metadata and model.safetensors with the encoder under its prefix."""
    config = model.config
    refuse("stanford", "more than one linear layer without bias", config.dense is None)
    refuse("stanford", "embeddings without unit length", config.normalize)
    refuse("stanford", "queries that are not filled to query_maxlen", config.expand_queries_to == config.query_maxlen)
    refuse("stanford", "another fill than [MASK]", config.mask_token_id == tokenizer.mask_token_id)
    refuse("stanford", "prompts before texts", without_prompts(model))
    refuse("stanford", "no markers", bool(marker_of(model, "query") and marker_of(model, "passage")))
    refuse("stanford", "punctuation is kept (colbert-ai fails on it)", config.mask_punctuation)
    refuse(
        "stanford",
        "its skiplist is not the first word piece of each symbol of string.punctuation",
        set(config.skiplist) == set(stanford_skiplist(tokenizer)),
    )
    encoder_config = AutoConfig.for_model(**model.encoder.config.to_dict())
    encoder_config.architectures = ["HF_ColBERT"]
    encoder_config.save_pretrained(path)
    prefix = model.encoder.base_model_prefix
    weights = {f"{prefix}.{name}": weight for name, weight in model.encoder.state_dict().items()}
    weights["linear.weight"] = model.linear.weight.detach()
    contiguous = {name: weight.cpu().contiguous() for name, weight in weights.items()}
    save_file(contiguous, path / "model.safetensors", metadata={"format": "pt"})
    metadata = {
        "query_token_id": marker_of(model, "query"),
        "doc_token_id": marker_of(model, "passage"),
        "query_token": "[Q]",
        "doc_token": "[D]",
        "query_maxlen": config.query_maxlen,
        "doc_maxlen": config.doc_maxlen,
        "dim": config.dim,
        "attend_to_mask_tokens": config.attend_to_mask_tokens,
        "mask_punctuation": config.mask_punctuation,
        "interaction": "colbert",
        "similarity": "cosine",
    }
    write_json(path / "artifact.metadata", metadata)


def save_pylate(model: ColBERT, tokenizer, path: Path) -> None:
    """modules.json of Transformer and Dense, and PyLate's keys in config_sentence_transformers.json."""
    config, expanded = model.config, model.config.expand_queries_to
    refuse("pylate", "embeddings without unit length", config.normalize)
    refuse("pylate", f"queries filled to {expanded} of {config.query_maxlen}", expanded in (0, config.query_maxlen))
    refuse("pylate", "another fill than [MASK]", config.mask_token_id == tokenizer.mask_token_id)
    refuse("pylate", "prompts before texts", without_prompts(model))
    save_modules(model, path, "sentence_transformers.models.Transformer", "pylate.models.Dense.Dense", [])
    write_json(path / "sentence_bert_config.json", {"max_seq_length": config.doc_maxlen - 1, "do_lower_case": False})
    settings = {
        "model_type": "ColBERT",
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": "MaxSim",
        "query_prefix": marker_of(model, "query"),
        "document_prefix": marker_of(model, "passage"),
        "query_length": config.query_maxlen,
        "document_length": config.doc_maxlen,
        "attend_to_expansion_tokens": config.attend_to_mask_tokens,
        "skiplist_words": skiplist_words(model, "pylate"),
        "do_query_expansion": bool(expanded),
    }
    write_json(path / "config_sentence_transformers.json", settings)


def save_sentence_transformers(model: ColBERT, tokenizer, path: Path) -> None:
    """modules.json of Transformer, Dense, MultiVectorMask and Normalize; markers become part of the prompts."""
    config, base = model.config, "sentence_transformers"
    markers = {marker_of(model, kind) for kind in ("query", "passage")} - {""}
    special = [AddedToken(marker, special=True, normalized=False) for marker in sorted(markers)]
    tokenizer.add_tokens(special, special_tokens=True)  # so that they are found in a text
    mask = {"skiplist_words": skiplist_words(model, "sentence-transformers"), "skiplist_tasks": ["document"]}
    more = [(f"{base}.multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask", mask)]
    if config.normalize:
        names = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
        more.append((f"{base}.base.modules.normalize.Normalize", names))
    transformer, dense = f"{base}.base.modules.transformer.Transformer", f"{base}.base.modules.dense.Dense"
    save_modules(model, path, transformer, dense, more)
    expansion, expanded = None, config.expand_queries_to
    if expanded:
        fill = None if config.mask_token_id == tokenizer.mask_token_id else config.mask_token_id
        expansion = {
            "strategy": "fixed" if expanded == config.query_maxlen else "min",
            "attend": config.attend_to_mask_tokens,
            "token": None if fill is None else token_of(tokenizer, fill),
            "length": expanded,
        }
    settings = {
        "transformer_task": "feature-extraction",
        "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        "module_output_name": "token_embeddings",
        "query_length": config.query_maxlen,
        "document_length": config.doc_maxlen,
        "query_expansion": expansion,
    }
    write_json(path / "sentence_bert_config.json", settings)
    prompts = {"query": prompt_of(model, tokenizer, "query"), "document": prompt_of(model, tokenizer, "passage")}
    settings = {"model_type": "MultiVectorEncoder", "prompts": prompts, "default_prompt_name": None}
    write_json(path / "config_sentence_transformers.json", {**settings, "similarity_fn_name": "maxsim"})


def prompt_of(model: ColBERT, tokenizer, kind: str) -> str:
    """The text before a query or a passage that sentence-transformers makes our tokens of. Raises InputError."""
    config, marker = model.config, marker_of(model, kind)
    prompt = config.query_prompt if kind == "query" else config.passage_prompt
    settings = {**config.to_dict(), "strip_texts": False}
    for text in dict.fromkeys((f"{marker}{prompt}", f"{marker} {prompt}", marker)):
        if agree(settings, tokenizer, kind, lambda _, probe, text=text: tokenizer(text + probe)["input_ids"]):
            return text
    raise InputError(f"the sentence-transformers layout cannot hold this model: marker {marker!r} before a {kind}")


def save_modules(model: ColBERT, path: Path, transformer: str, dense: str, more: list[tuple[str, dict]]) -> None:
    """The encoder in the folder itself, a folder for each Dense layer and for each of `more`, and modules.json."""
    model.encoder.save_pretrained(path)
    hidden = model.encoder.config.hidden_size
    plain = {"in_features": hidden, "out_features": model.config.dim, "bias": False, "activation": "Identity"}
    folders = [("", transformer)]
    for i, layer in enumerate(model.config.dense or [{**plain, "residual": False}]):
        folder, name = path / f"{i + 1}_Dense", type(getattr(nn, layer["activation"])())
        folder.mkdir(exist_ok=True)
        settings = {key: layer[key] for key in ("in_features", "out_features", "bias")}
        settings |= {"activation_function": f"{name.__module__}.{name.__qualname__}", "use_residual": layer["residual"]}
        if "pylate" not in dense:
            settings |= {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
        write_json(folder / "config.json", settings)
        part = model.linear[i].state_dict() if model.config.dense else {"linear.weight": model.linear.weight.detach()}
        save_file({name: weight.cpu().contiguous() for name, weight in part.items()}, folder / "model.safetensors")
        folders.append((folder.name, dense))
    for name, settings in more:
        folder = path / f"{len(folders)}_{name.rsplit('.', 1)[-1]}"
        folder.mkdir(exist_ok=True)
        write_json(folder / "config.json", settings)
        folders.append((folder.name, name))
    entries = [{"idx": i, "name": str(i), "path": folder, "type": name} for i, (folder, name) in enumerate(folders)]
    write_json(path / "modules.json", entries)


WRITERS = {"stanford": save_stanford, "pylate": save_pylate, "sentence-transformers": save_sentence_transformers}


# --------------------------------------------------------------------------------------------------- card and the hub

CARD = """---
{front}
---
# {title}

A ColBERT model: a text is a set of token embeddings of {dim} dimensions, a query and a passage meet in
score(q, d) = sum over query tokens of the best passage token. Queries of {query_maxlen} tokens, passages of up to
{doc_maxlen}. Trained with nanoColBERT.

## Use
```python
{usage}
```

## Training
| | |
|---|---|
{rows}
"""
USAGE = {
    "nanocolbert": "from model import ColBERT\n\n"
    'model = ColBERT.from_pretrained("{name}")\nmodel.score(queries, passages)',
    "stanford": 'from colbert.modeling.checkpoint import Checkpoint\n\nmodel = Checkpoint("{name}", colbert_config)',
    "pylate": 'from pylate import models\n\nmodel = models.ColBERT("{name}")\nmodel.encode(queries, is_query=True)',
    "sentence-transformers": "from sentence_transformers import MultiVectorEncoder\n\n"
    'model = MultiVectorEncoder("{name}")\nmodel.encode_query(queries)',
}
LIBRARIES = {"stanford": "RAGatouille", "pylate": "PyLate", "sentence-transformers": "sentence-transformers"}


def write_card(path, layout: str, model: ColBERT, name: str = "model") -> None:
    """README.md of a model folder: how to open it, and what meta.json says of its data, steps and metrics."""
    meta = model.meta or {}
    arguments = meta.get("args", {})
    base = meta.get("base_model")
    base = base if base and not Path(base).exists() and not Path(base).is_absolute() else None
    front = {"pipeline_tag": "sentence-similarity", "tags": ["ColBERT", "late-interaction"], "base_model": base}
    front["library_name"] = LIBRARIES.get(layout)
    facts = {
        "base model": base,
        "data": "/".join(Path(arguments["tokens_dir"]).parts[-2:]) if "tokens_dir" in arguments else None,
        "fingerprint of the data": meta.get("tokens_fingerprint"),
        "steps": meta.get("steps"),
        "triples a step": arguments.get("batch_size"),
        "learning rate": arguments.get("lr"),
        "loss of the last 100 steps": meta.get("loss_of_last_100_steps"),
        "MRR@10 on the dev candidates": meta.get("best_dev_mrr@10"),
        "seconds": meta.get("train_seconds"),
        "versions": ", ".join(f"{key} {value}" for key, value in meta.get("versions", {}).items()) or None,
    }
    rows = [f"| {key} | {value} |" for key, value in facts.items() if value is not None]
    card = CARD.format(
        front="\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items() if value is not None),
        title=name,
        dim=model.config.dim,
        query_maxlen=model.config.query_maxlen,
        doc_maxlen=model.config.doc_maxlen,
        usage=USAGE[layout].format(name=name),
        rows="\n".join(rows) or "| | nothing is known of it |",
    )
    (Path(path) / "README.md").write_text(card)


def push(model: ColBERT, repo_id: str, layout: str, **kwargs) -> str:
    """What ColBERT.push_to_hub does."""
    from huggingface_hub import HfApi

    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, layout=layout)
        write_card(folder, layout, model, repo_id)
        address = api.create_repo(repo_id, exist_ok=True, **kwargs)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload ColBERT model")
    return str(address)
