"""Encoders and tokenizers of Hugging Face, from a folder or the hub: one way in for every layout, with all its checks.

No code that comes with a checkpoint is run, pickled weights are read by `torch.load(weights_only=True)`, and nothing is
made up: a weight that is missing, of another shape or not finite is an InputError that names it.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig

from nanocolbert.cli import InputError, first_line
from nanocolbert.encoder import attention
from nanocolbert.encoder.quiet import quietly
from nanocolbert.storage.artifact import read_json
from nanocolbert.text import MARKERS

# model_types whose token embeddings of a text are the same alone and beside longer texts, and the same once saved and
# loaded (tests/encoder/test_pretrained.py); not those that mix in the padding (convolutions, landmarks, hashes, blocks)
KNOWN = (
    *("albert", "bert", "camembert", "data2vec-text", "deberta", "deberta-v2", "distilbert", "electra", "ernie"),
    *("eurobert", "gte", "longformer", "luke", "megatron-bert", "modernbert", "mpnet", "nomic_bert", "rembert"),
    *("roberta", "roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl"),
)
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")  # no config goes without

SETTINGS_FILES = ["*.json", "*.txt", "*.model", "*.metadata"]  # of a repository on the hub
NOT_LOADED = ["onnx/*", "openvino/*", "*.h5", "*.msgpack"]
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # owner/model, or a model of old; a path has more to it
POINTER = b"version https://git-lfs.github.com/spec/"  # a file that git-lfs has not fetched begins so
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json")  # what a tokenizer is made from, or a *.model
BUFFERS = re.compile(r"(^|\.)(position_ids|inv_freq)$")  # saved by older versions, computed by all


# -------------------------------------------------------------------------------------------------- where and whether


def locate(name_or_path, revision: str | None = None, weights: bool = True) -> Path:
    """The folder (or .dnn file) of a checkpoint; one on the hub is fetched, without `weights` its settings only.

    Raises InputError where there is none.
    """
    if Path(name_or_path).exists():
        if revision is not None:
            raise InputError(f"{name_or_path}: a local checkpoint has no revisions, {revision!r} was asked for")
        return Path(name_or_path)
    if not HUB_NAME.fullmatch(str(name_or_path)) or str(name_or_path).endswith(".dnn"):
        raise InputError(f"{name_or_path}: no such {'file' if str(name_or_path).endswith('.dnn') else 'folder'}")
    from huggingface_hub import snapshot_download

    options = {"revision": revision, "ignore_patterns": NOT_LOADED}
    try:
        folder = Path(snapshot_download(str(name_or_path), allow_patterns=SETTINGS_FILES, **options))
        for patterns in (["*.safetensors", "*/*.bin"], ["*.bin"]):
            if weights and not any(folder.glob("*.safetensors")):
                snapshot_download(str(name_or_path), allow_patterns=patterns, **options)
    except (OSError, ValueError) as error:  # the hub's own errors are among them
        raise InputError(
            f"{name_or_path}: neither a folder nor a model that the hub gives out: {first_line(error)}"
        ) from None
    return folder


def check_folder(folder: Path) -> None:
    """Raise InputError where files of a checkpoint are not there but promised, or ask for code to be run."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else [folder]:
        if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(POINTER):
            raise InputError(f"{path}: what git-lfs puts in place of the file: fetch it: git lfs pull")
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and "auto_map" in read_settings(folder / name):
            raise InputError(
                f"{folder / name}: auto_map: it asks for code of its own, which is never run here: give another model"
            )


def read_settings(path: Path) -> dict:
    """A JSON object of a checkpoint. Raises InputError where it is missing, broken or something else."""
    settings = read_json(path, "the folder holds no checkpoint of a known layout, or not all of it")
    if not isinstance(settings, dict):
        raise InputError(f"{path}: holds a {type(settings).__name__}, not settings by name")
    return settings


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """Make an InputError in one line of whatever transformers raises over the files of a checkpoint."""
    try:
        with quietly():
            yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        raise InputError(f"{what} ({first_line(error)}): give another, or its files anew") from None


# ------------------------------------------------------------------------------------------------------------ tokenizer


def load_tokenizer(name_or_path):
    """The fast tokenizer of a model. Raises InputError where there is none, or one that cannot frame a text."""
    folder = locate(name_or_path, weights=False)
    check_folder(folder)
    if not any((folder / name).is_file() for name in VOCABULARIES) and not any(folder.glob("*.model")):
        raise InputError(f"{name_or_path}: no tokenizer in it (tokenizer.json): give a model with its own")
    with loading(f"{name_or_path}: no tokenizer could be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise InputError(f"{name_or_path}: its tokenizer is not a fast one: give a model with a tokenizer.json")
    for name, token in special_token_ids(tokenizer).items():
        if token is None:
            name = name.removesuffix("_token_id")
            raise InputError(f"{name_or_path}: its tokenizer has no {name} token: give a masked encoder and its own")
    return tokenizer


def special_token_ids(tokenizer) -> dict[str, int | None]:
    """Ids of the tokens that frame and fill a text, as fields of ColBERTConfig."""
    return {
        "cls_token_id": first_of(tokenizer.cls_token_id, tokenizer.bos_token_id),
        "sep_token_id": first_of(tokenizer.sep_token_id, tokenizer.eos_token_id),
        "mask_token_id": tokenizer.mask_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def first_of(*values):
    """The first value that is not None, if any."""
    return next((value for value in values if value is not None), None)


# -------------------------------------------------------------------------------------------------------------- encoder


def load_config(where, settings: dict | None = None) -> PreTrainedConfig:
    """An encoder's config: of the folder `where`, or from its settings, which `where` is named by.

    Raises InputError where it cannot be honoured.
    """
    if settings is None:
        check_folder(where)
    with loading(f"{where}: no encoder could be loaded"):
        if settings is None:
            config = AutoConfig.from_pretrained(where, trust_remote_code=False)
        else:
            config = AutoConfig.for_model(**settings)
    if config.model_type not in KNOWN:
        raise InputError(
            f"{where}: encoders of model_type {config.model_type!r} are not known to embed a text alone as they do "
            f"beside others: give one of {', '.join(KNOWN)}"
        )
    if getattr(config, "quantization_config", None):
        raise InputError(f"{where}: quantization_config cannot be honoured here: give the weights before quantization")
    config.dtype = torch.float32
    return config


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights in a folder, safetensors before pickles. Raises InputError where they are not all there."""
    check_folder(folder)
    for name in WEIGHTS_FILES:
        index, files = folder / f"{name}.index.json", [folder / name]
        if not files[0].is_file() and index.is_file():  # in several files
            names = read_settings(index).get("weight_map")
            if not isinstance(names, dict) or not all(Path(str(file)).name == file for file in names.values()):
                raise InputError(f"{index}: no weight_map from weights to files of the folder")
            files = [folder / file for file in sorted(set(names.values()))]
        elif not files[0].is_file():
            continue
        weights = {}
        for file in files:
            weights |= read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file)
        return weights
    raise InputError(f"{folder}: no weights ({' or '.join(WEIGHTS_FILES)})")


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """A file of tensors. Raises InputError where it is missing or not whole."""
    if not file.is_file():
        raise InputError(f"{file}: missing, one of several files of weights: get the rest of the checkpoint")
    try:
        return load_file(file)
    except OSError:
        raise
    except Exception as error:
        raise InputError(
            f"{file}: not a whole file of weights ({first_line(error)}): download or copy it again"
        ) from None


def read_pickle(file: Path) -> dict:
    """A pickle of tensors and plain values. Raises InputError where it holds anything else."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"{file}: not read: more than weights is pickled in it, or it is broken: {first_line(error)}"
        ) from None
    if not isinstance(found, dict):
        raise InputError(f"{file}: holds a {type(found).__name__}, not weights by name")
    return found


def load_encoder(where, config: PreTrainedConfig, weights: dict[str, Tensor], exact: bool = False) -> nn.Module:
    """The encoder of a config with its weights, fp32, without its pooler; `where` is for messages.

    Weights of a pooler, and of heads unless `exact`, are passed over. Raises InputError naming the first weight that is
    missing, that the config has no place for, or whose shape differs from what the config says.
    """
    with loading(f"{where}: no encoder could be loaded"):
        encoder, report = MODEL_MAPPING[type(config)].from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # that is: report them
            output_loading_info=True,
        )
    if report["mismatched_keys"]:
        name, found, wanted = min(report["mismatched_keys"])
        sizes = " x ".join(map(str, found)), " x ".join(map(str, wanted))
        raise InputError(f"{where}: weight {name} of the encoder is {sizes[0]}, by its config {sizes[1]}")
    missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)
    if missing:
        raise InputError(f"{where}: {len(missing)} weights of the encoder are missing, {missing[0]} first")
    parts = {name for name, _ in encoder.named_children()}

    def has_no_place(name: str) -> bool:
        part = name.removeprefix(f"{encoder.base_model_prefix}.").split(".")[0]
        return part != "pooler" and not BUFFERS.search(name) and (exact or part in parts)

    unexpected = sorted(filter(has_no_place, report["unexpected_keys"]))
    if unexpected:
        raise InputError(
            f"{where}: its config has no place for {len(unexpected)} of its weights, {unexpected[0]} first"
        )
    drop_pooler(encoder)
    return encoder


def own_attention(encoder: nn.Module) -> None:
    """Have the encoder attend by attention.py, unless it has an attention of its own."""
    if encoder._supports_sdpa:
        encoder.set_attn_implementation(attention.NAME)


def drop_pooler(encoder: nn.Module) -> None:
    """Token embeddings need no pooler; left in place, its weights would get no gradient."""
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None


def set_dropout(config, dropout: float | None, attention_dropout: float | None) -> None:
    """Set the dropout rates of an encoder's config, those of the attention weights apart; None leaves them."""
    for key, value in list(vars(config).items()):
        rate = attention_dropout if "attention" in key else dropout
        if rate is not None and "dropout" in key and isinstance(value, float | int):
            setattr(config, key, rate)


# --------------------------------------------------------------------------------------------------------------- checks


def check_weights(model: nn.Module, what) -> None:
    """Raise InputError naming the first weight of the model that is not finite; `what` is the model, for the message.

    One pass over the weights where they are, and one look at the result.
    """
    weights = {name: weight for name, weight in model.state_dict().items() if weight.is_floating_point()}
    ranges = [torch.stack(weight.aminmax()).float() for weight in weights.values() if weight.numel()]
    if torch.stack(ranges).isfinite().all():
        return
    name = next(name for name, weight in weights.items() if not weight.isfinite().all())
    raise InputError(
        f"{what}: weight {name} is not finite: the file is damaged, or its training went wrong: take another checkpoint"
    )


def check_vocabulary(where, tokenizer, encoder: nn.Module) -> None:
    """Raise InputError where the tokenizer has tokens that the encoder has no embedding for, or pads otherwise."""
    n = len(encoder.get_input_embeddings().weight)
    if len(tokenizer) > n:
        raise InputError(
            f"{where}: its tokenizer has {len(tokenizer)} tokens, its encoder {n} embeddings: they are not of one model"
        )
    padding = padding_of_positions(encoder)
    if padding not in (None, tokenizer.pad_token_id):
        raise InputError(
            f"{where}: its tokenizer pads with token {tokenizer.pad_token_id}, its encoder with {padding}: they are "
            "not of one model"
        )


def longest_input(encoder: nn.Module) -> int:
    """How many tokens an encoder takes."""
    longest = getattr(encoder.config, "max_position_embeddings", 1 << 30)
    padding = padding_of_positions(encoder)
    return longest if padding is None else longest - padding - 1  # RoBERTa counts positions from there


def padding_of_positions(encoder: nn.Module) -> int | None:
    """The padding id of an encoder whose positions follow from it, as RoBERTa's."""
    positions = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    return getattr(positions, "padding_idx", None)


def add_markers(tokenizer, encoder) -> dict[str, int]:
    """Add the tokens [Q] and [D] (paper, section 3.2), which begin as the mean embedding. Returns settings."""
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKERS.values())})
    table = encoder.get_input_embeddings().weight
    mean = table.detach()[: len(tokenizer) - len(MARKERS)].mean(0)
    encoder.resize_token_embeddings(max(len(tokenizer), len(table)), mean_resizing=False)
    ids = {kind: tokenizer.convert_tokens_to_ids(marker) for kind, marker in MARKERS.items()}
    with torch.no_grad():
        encoder.get_input_embeddings().weight[list(ids.values())] = mean
    return {f"{kind}_marker_id": token for kind, token in ids.items()}
