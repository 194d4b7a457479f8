"""PyLate's layout."""

import string
from pathlib import Path

from nanocolbert.checkpoints.modules import ST_KNOWN, check_transformer, read_modules, save_modules, with_dense
from nanocolbert.checkpoints.parts import (
    Checkpoint,
    check_keys,
    check_markers,
    marker_of,
    refuse,
    skiplist_words,
    token_id,
    without_prompts,
)
from nanocolbert.encoder.pretrained import load_tokenizer, read_settings
from nanocolbert.storage.artifact import write_json


def read_pylate(path: Path) -> Checkpoint:
    """PyLate: markers are put in as tokens; texts are stripped; embeddings always have unit length."""
    where = path / "config_sentence_transformers.json"
    used = {"query_prefix": "[Q] ", "document_prefix": "[D] ", "query_length": 32, "document_length": 180}
    used |= {"attend_to_expansion_tokens": False, "do_query_expansion": True, "skiplist_words": None}
    used |= {"prompts": {}, "default_prompt_name": None}
    found = check_keys(where, read_settings(where), used, ST_KNOWN)
    found = {key: used.get(key) if value is None else value for key, value in found.items()}  # null: PyLate's default
    modules = read_modules(path, ("Transformer", "Dense"), ignored=("MultiVectorMask", "Normalize"))
    check_transformer(path)
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
    check_markers(path, settings, tokenizer)
    return with_dense(path, settings, tokenizer, modules, {"bias": True, "activation_function": ...})


def save_pylate(model, tokenizer, path: Path) -> None:
    """modules.json of Transformer and Dense, and PyLate's keys in config_sentence_transformers.json."""
    config, expanded = model.config, model.config.expand_queries_to
    refuse("pylate", "embeddings without unit length", config.normalize)
    refuse("pylate", f"queries filled to {expanded} of {config.query_maxlen}", expanded in (0, config.query_maxlen))
    refuse("pylate", "pooled passages (give pool_factor to its encode)", config.pool_factor == 1)
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
