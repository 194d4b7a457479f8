"""Where the model and the collection are that an artifact was made from, as its meta.json says."""

from pathlib import Path

from nanocolbert.cli import InputError


def find_model(folder, meta: dict) -> Path:
    """The model folder that an artifact was made from: beside it as it was then, or where it was then.

    Raises InputError if it is in neither place.
    """
    places = [Path(folder).resolve() / (meta.get("model_path") or ""), Path(meta["model"])]
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise InputError(
        f"{folder}: its model, {meta['model']}, is not there: give its folder as model (--model of a stage)"
    )


def find_collection(folder, meta: dict) -> Path | None:
    """The file with the passages' texts that an artifact was made from, None where it is not at hand."""
    path = Path(folder).resolve() / (meta.get("collection_path") or "")
    return path if path.is_file() else None
