"""The layout of Hannibal046's nanoColBERT, which this project remade: read as `reference`, not written."""

from pathlib import Path

from nanocolbert.checkpoints.parts import Checkpoint, check_markers, must_be, token_id, with_linear
from nanocolbert.checkpoints.stanford import stanford_skiplist
from nanocolbert.cli import InputError
from nanocolbert.encoder.pretrained import load_tokenizer, read_settings, read_weights


def read_reference(path: Path) -> Checkpoint:
    """Lengths are options of its scripts, 32 and 180; mask_buffer, saved with the weights, is not read."""
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
