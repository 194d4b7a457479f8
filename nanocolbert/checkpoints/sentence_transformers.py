"""The layout of sentence-transformers' MultiVectorEncoder (version 6 on)."""

from pathlib import Path

from transformers import AddedToken

from nanocolbert.checkpoints.modules import ST_KNOWN, check_transformer, read_modules, save_modules, with_dense
from nanocolbert.checkpoints.parts import (
    Checkpoint,
    agree,
    check_keys,
    marker_of,
    must_be,
    skiplist_words,
    token_id,
    token_of,
)
from nanocolbert.cli import InputError
from nanocolbert.encoder.pretrained import load_config, load_tokenizer, read_settings
from nanocolbert.storage.artifact import write_json

POOLING = "HierarchicalTokenPooling"


def read_sentence_transformers(path: Path) -> Checkpoint:
    """sentence-transformers 6: prompts as text; expansion with the Transformer, skiplist with the MultiVectorMask."""
    where = path / "config_sentence_transformers.json"
    found = check_keys(where, read_settings(where), {"prompts": {}}, [*ST_KNOWN, "default_prompt_name"])
    modules = read_modules(path, ("Transformer", "Dense", "MultiVectorMask", "Normalize", POOLING))
    names = [name for name, _ in modules]
    if "Normalize" in names and "Dense" in names[names.index("Normalize") :]:
        raise InputError(f"{path / 'modules.json'}: a Dense after Normalize cannot be honoured here")
    transformer = check_transformer(path)
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
    settings |= pooling_settings(path, modules)
    for kind, name in (("query", "query"), ("passage", "document")):
        settings |= split_prompt(where, settings, tokenizer, kind, found["prompts"].get(name) or "")
    return with_dense(path, settings, tokenizer, modules, {"bias": True, "activation_function": "torch.nn.Tanh"})


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


def pooling_settings(path: Path, modules) -> dict:
    """How passages are pooled, by a HierarchicalTokenPooling after Normalize.

    Means are of unit length by its own setting, as from version 6.2 on, or by another Normalize.
    """
    names = [name for name, _ in modules]
    if POOLING not in names:
        return {}
    at = names.index(POOLING)
    folder = modules[at][1]
    used = {"pool_factor": 1, "num_protected_tokens": 1, "tasks": ["document"], "normalize_embeddings": False}
    found = check_keys(folder / "config.json", read_settings(folder / "config.json"), used)
    must_be(folder / "config.json", found, tasks=[["document"], "document", None], normalize_embeddings=[False, True])
    for key, least in (("pool_factor", 1), ("num_protected_tokens", 0)):
        if type(found[key]) is not int or found[key] < least:
            raise InputError(f"{folder / 'config.json'}: {key} {found[key]!r}: not a whole number from {least} on")
    if "Normalize" not in names[:at] or set(names[at + 1 :]) - {"Normalize"}:
        where = path / "modules.json"
        raise InputError(f"{where}: {POOLING} can be honoured after a Normalize only, and before nothing but another")
    if found["pool_factor"] == 1:
        return {}
    return {
        "pool_factor": found["pool_factor"],
        "protected_tokens": found["num_protected_tokens"],
        "normalize_pooled": found["normalize_embeddings"] or "Normalize" in names[at + 1 :],
    }


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


def save_sentence_transformers(model, tokenizer, path: Path) -> None:
    """modules.json of Transformer, Dense, MultiVectorMask and Normalize, and of pooling where passages are pooled.

    Markers become part of the prompts.
    """
    config, base = model.config, "sentence_transformers"
    markers = {marker_of(model, kind) for kind in ("query", "passage")} - {""}
    special = [AddedToken(marker, special=True, normalized=False) for marker in sorted(markers)]
    tokenizer.add_tokens(special, special_tokens=True)  # so that they are found in a text
    mask = {"skiplist_words": skiplist_words(model, "sentence-transformers"), "skiplist_tasks": ["document"]}
    own = f"{base}.multi_vector_encoder.modules"
    more = [(f"{own}.multi_vector_mask.MultiVectorMask", mask)]
    names = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    normalize = f"{base}.base.modules.normalize.Normalize", names
    more += [normalize] if config.normalize else []
    if config.pool_factor > 1:
        pooling = {"pool_factor": config.pool_factor, "num_protected_tokens": config.protected_tokens}
        more.append((f"{own}.token_pooling.{POOLING}", {**pooling, "tasks": ["document"]}))
        more += [normalize] if config.normalize_pooled else []
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


def prompt_of(model, tokenizer, kind: str) -> str:
    """The text before a query or a passage that sentence-transformers makes our tokens of. Raises InputError."""
    config, marker = model.config, marker_of(model, kind)
    prompt = config.query_prompt if kind == "query" else config.passage_prompt
    settings = {**config.to_dict(), "strip_texts": False}
    for text in dict.fromkeys((f"{marker}{prompt}", f"{marker} {prompt}", marker)):
        if agree(settings, tokenizer, kind, lambda _, probe, text=text: tokenizer(text + probe)["input_ids"]):
            return text
    raise InputError(f"the sentence-transformers layout cannot hold this model: marker {marker!r} before a {kind}")
