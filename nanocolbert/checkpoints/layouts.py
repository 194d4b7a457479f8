"""Which library a checkpoint is of, told by its files, and the reader and the writer for it.

reads   a folder, a name on the hub, or v1's .dnn file, in one of the layouts
          nanocolbert            this project's own: config.json of model_type colbert, model.safetensors, tokenizer
          reference              Hannibal046's nanoColBERT: a BERT config.json with similarity_metric
          stanford               config.json of architecture HF_ColBERT, artifact.metadata
          v1                     a .dnn file: weights and the arguments of their training, pickled
          pylate                 modules.json, config_sentence_transformers.json with query_prefix
          sentence-transformers  modules.json, config_sentence_transformers.json of model_type MultiVectorEncoder
writes  a folder in one of LAYOUTS that the library of that name opens; `nanocolbert` is opened here, by ColBERT
"""

import contextlib
import copy
from pathlib import Path

from nanocolbert.checkpoints import LAYOUTS
from nanocolbert.checkpoints.own import own_settings, read_own
from nanocolbert.checkpoints.parts import Checkpoint
from nanocolbert.checkpoints.pylate import read_pylate, save_pylate
from nanocolbert.checkpoints.reference import read_reference
from nanocolbert.checkpoints.sentence_transformers import read_sentence_transformers, save_sentence_transformers
from nanocolbert.checkpoints.stanford import read_stanford, read_v1, save_stanford
from nanocolbert.cli import InputError
from nanocolbert.config import ColBERTConfig
from nanocolbert.encoder.pretrained import HUB_NAME, check_folder, load_tokenizer, locate, read_settings
from nanocolbert.storage.artifact import fingerprint, write_json
from nanocolbert.storage.checksums import check_sizes, check_sums
from nanocolbert.text import FRAME

READERS = {
    "nanocolbert": read_own,
    "reference": read_reference,
    "stanford": read_stanford,
    "v1": read_v1,
    "pylate": read_pylate,
    "sentence-transformers": read_sentence_transformers,
}
WRITERS = {"stanford": save_stanford, "pylate": save_pylate, "sentence-transformers": save_sentence_transformers}


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


def read_tokenizer(name_or_path) -> tuple:
    """The tokenizer of a checkpoint or of a plain encoder, how it wants its texts, and how long: in tokens, of which
    FRAME are special ones.

    Returns (tokenizer, ColBERTConfig.texts(), {"query": tokens, "passage": tokens}).
    """
    lengths = {"query": ColBERTConfig().query_maxlen, "passage": ColBERTConfig().doc_maxlen}
    if not is_colbert(name_or_path):
        return load_tokenizer(name_or_path), ColBERTConfig().texts(), lengths  # nothing is put before them
    path, layout = layout_of(name_or_path)
    if layout == "nanocolbert":  # its weights are not looked at
        tokenizer, settings = load_tokenizer(path), own_settings(path / "config.json")
    else:
        parts = READERS[layout](path)
        tokenizer, settings = parts.tokenizer, parts.settings
    config = ColBERTConfig(**settings)
    given = {"query": config.query_maxlen, "passage": config.doc_maxlen}  # None: as long as its encoder takes
    lengths |= {kind: config.pieces(kind) + FRAME for kind, length in given.items() if length is not None}
    return tokenizer, config.texts(), lengths


def model_fingerprint(name_or_path) -> str:
    """Fingerprint of a model: its weights and settings, wherever it lies. Raises InputError where there is none."""
    try:
        path = locate(name_or_path)
    except InputError as error:
        raise InputError(f"{error}: run train.py first, or give another model") from None
    if path.is_file():  # v1's
        return fingerprint(path)
    files = [path / "config.json", *weights_in(path)]
    if (path / "artifact.metadata").is_file() or (path / "modules.json").is_file():  # of another library
        settings = (file for file in path.rglob("*") if file.suffix in (".json", ".metadata"))
        folders = {path, *(folder for folder in path.rglob("*") if folder.is_dir())}
        files = sorted([*settings, *(file for folder in folders for file in weights_in(folder))])
    elif len(files) < 2 or not files[0].is_file():
        raise InputError(f"{name_or_path}: no model here (config.json and *.safetensors): run train.py first")
    return fingerprint(*files)


def model_of(folder, meta: dict) -> str:
    """The model that embeddings or an index were made from, by their meta.json: its folder or file, or name on the hub.

    It is looked for where it then lay beside them, then where it then was. Raises InputError where it is not there.
    """
    beside = meta.get("model_path")
    places = [*([(Path(folder).resolve() / beside).resolve()] if beside else []), Path(meta["model"])]
    for place in places:
        if place.is_file() or (place / "config.json").is_file():
            return str(place)
    if not beside and HUB_NAME.fullmatch(meta["model"]):  # what lay on a disk has a path
        return meta["model"]
    raise InputError(f"{folder}: its model, {meta['model']}, is not there: give its folder as model (--model)")


def check_made_by(model, folder, meta: dict) -> None:
    """Raise InputError unless embeddings or an index, whose meta.json is `meta`, were made by this model."""
    if model_fingerprint(model) != meta["model_fingerprint"]:
        raise InputError(
            f"{folder}: made from another model ({meta['model']}) than {model}: take that, or run doc2embedding.py "
            "and build_index.py again"
        )


def weights_in(folder: Path) -> list[Path]:
    """The files of weights that are read of a folder: pickles only where there are no others."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))


def read(name_or_path, revision: str | None = None) -> Checkpoint:
    """The parts of a ColBERT checkpoint. Raises InputError where it cannot be honoured to the letter."""
    path, layout = layout_of(name_or_path, revision)
    meta = read_settings(path / "meta.json") if (path / "meta.json").is_file() else None
    if meta is not None:  # of files that came along: what is not read need not be there
        sums = {name: sums for name, sums in meta.get("files", {}).items() if not name.endswith(".md")}
        sums = {name: sums for name, sums in sums.items() if (path / name).exists()}
        check_sizes(path, sums)
        check_sums(path, {name: sums for name, sums in sums.items() if name.endswith(".json")})  # small, and decisive
    return READERS[layout](path)._replace(meta=meta)


def save(model, path, layout: str) -> None:
    """Write a ColBERT in the layout of another library. Raises InputError where that cannot say what the model does.

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
