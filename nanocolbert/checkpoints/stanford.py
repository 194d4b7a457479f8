"""colbert-ai's layout, `stanford`, and that of its first version, `v1`: one file of weights and arguments."""

import string
from pathlib import Path

from safetensors.torch import save_file
from transformers import AutoConfig

from nanocolbert.checkpoints.parts import (
    Checkpoint,
    check_keys,
    check_markers,
    marker_of,
    must_be,
    refuse,
    token_id,
    with_linear,
    without_prompts,
)
from nanocolbert.cli import InputError
from nanocolbert.encoder.pretrained import load_tokenizer, locate, read_pickle, read_settings, read_weights
from nanocolbert.storage.artifact import write_json

# Of the training, the indexing and the search of colbert-ai; they do not change what a text is encoded to.
STANFORD_KNOWN = """
overwrite root experiment index_root name rank nranks amp gpus avoid_fork_if_possible checkpoint triples collection
queries index_name similarity bsize accumsteps lr maxsteps save_every resume warmup warmup_bert relu nway
use_ib_negatives reranker distillation_alpha ignore_scores model_name index_path index_bsize nbits kmeans_niters
num_partitions_max clustering_mode protected_tokens ncells centroid_score_threshold ndocs load_index_with_mmap
query_token doc_token meta model resume_optimizer accum run distributed local_rank input_arguments
"""


def read_stanford(path: Path) -> Checkpoint:
    """colbert-ai: everything in one folder, the encoder's weights with a prefix (bert., roberta., model.)."""
    where = path / "artifact.metadata"
    metadata = read_settings(where)
    tokenizer = load_tokenizer(path)
    settings = stanford_settings(where, metadata, tokenizer)
    return with_linear(path, settings, tokenizer, path, read_weights(path))


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
    """What colbert-ai drops, and the reference: the first word piece of each symbol of string.punctuation."""
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


def save_stanford(model, tokenizer, path: Path) -> None:
    """config.json, artifact.metadata and model.safetensors with the encoder under its prefix."""
    config = model.config
    refuse("stanford", "more than one linear layer without bias", config.dense is None)
    refuse("stanford", "embeddings without unit length", config.normalize)
    refuse("stanford", "pooled passages", config.pool_factor == 1)
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
