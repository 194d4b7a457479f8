"""What PyLate's layout and sentence-transformers' have in common: modules.json, and a folder for each module."""

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from nanocolbert.checkpoints.parts import Checkpoint, check_keys, must_be
from nanocolbert.cli import InputError
from nanocolbert.encoder.pretrained import load_config, read_settings, read_weights
from nanocolbert.encoder.projection import ACTIVATIONS
from nanocolbert.storage.artifact import read_json, write_json

ST_KNOWN = ["model_type", "__version__", "similarity_fn_name"]


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


def check_transformer(path: Path) -> dict:
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


def with_dense(path: Path, settings: dict, tokenizer, modules, defaults: dict) -> Checkpoint:
    """A checkpoint whose projection is the Dense modules; `defaults` of keys that their settings may lack."""
    settings = settings | dense_settings(modules, defaults)
    projection = projection_weights(modules, settings["dense"])
    return Checkpoint(settings, projection, tokenizer, load_config(path), read_weights(path))


def dense_settings(modules, defaults: dict) -> dict:
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


def projection_weights(modules, dense: list[dict] | None) -> dict[str, Tensor]:
    """Weights of the Dense modules under our names."""
    weights = {}
    for i, folder in enumerate(folder for name, folder in modules if name == "Dense"):
        for name, weight in read_weights(folder).items():
            weights[name.removeprefix("linear.") if dense is None else f"{i}.{name}"] = weight
    return weights


def save_modules(model, path: Path, transformer: str, dense: str, more: list[tuple[str, dict]]) -> None:
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
