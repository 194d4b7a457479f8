"""How inputs are spoilt: functions of a folder, or makers of such."""

import json
import shutil
from pathlib import Path

import numpy as np


def write(name: str, data: bytes | str):
    return lambda folder: (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)


def first(name: str, data: bytes | str):
    """Put something before what is in a file."""
    data = data.encode() if isinstance(data, str) else data
    return lambda folder: (folder / name).write_bytes(data + (folder / name).read_bytes())


def last(name: str, data: bytes | str):
    data = data.encode() if isinstance(data, str) else data
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + data)


def recode(name: str, encoding: str):
    return lambda folder: (folder / name).write_bytes((folder / name).read_text().encode(encoding))


def without(*names: str):
    def remove(folder: Path) -> None:
        for name in names:
            for path in folder.glob(name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def edit(name: str, **changes):
    """Change keys of a JSON file (None: take them out); a checksum is taken out too, as from a file made by hand."""

    def run(folder: Path) -> None:
        value = {**json.loads((folder / name).read_text()), **changes, "checksum": None}
        value = {key: part for key, part in value.items() if part is not None}
        (folder / name).write_text(json.dumps(value))

    return run


def weights(name: str, **changes):
    """Change the first weight of a model: value=, or dtype=."""

    def run(folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        arrays = load_file(folder / name)
        key = max(arrays, key=lambda key: arrays[key].size)
        arrays[key] = np.full_like(arrays[key], changes["value"])
        save_file(arrays, folder / name, metadata={"format": "pt"})

    return run


def passages_of(*lengths: int):
    """Make the embeddings those of so many passages of these lengths, as an artifact from before there were sums."""

    def run(folder: Path) -> None:
        top, rng = folder / "embeddings", np.random.default_rng(0)
        values = rng.normal(size=(sum(lengths), 16)).astype(np.float32)
        np.save(top / "values.npy", (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16))
        np.save(top / "offsets.npy", np.append(0, np.cumsum(lengths)).astype(np.int64))
        np.save(top / "pids.npy", np.arange(len(lengths)))
        edit("embeddings/meta.json", files=None, embeddings=sum(lengths), passages=len(lengths))(folder)

    return run


def place(name: str, source: str):
    """Put a copy of an artifact at another place."""
    return lambda folder: shutil.copytree(folder / source, folder / name, dirs_exist_ok=True)


def link(name: str, target: str, kind: str = ""):
    """A symbolic link; kind: the target is made first."""

    def run(folder: Path) -> None:
        path = (folder / name).parent / target
        if kind == "folder":
            path.mkdir()
            (path / "theirs").write_text("theirs") if "victim" in target else None
        elif kind == "file":
            path.write_text("theirs")
        (folder / name).symlink_to(target)

    return run


def both(*steps):
    return lambda folder: [step(folder) for step in steps]


def checkpoints(folder: Path) -> None:
    """What a run of train.py that was killed has left."""
    shutil.copytree(folder / "model", folder / "out/model")
    for path in (folder / "out/model").iterdir():
        if path.name not in ("checkpoints", "log.jsonl"):
            path.unlink()


def swap_words(name: str):
    """Make a tokenizer another one: two words change their ids."""

    def run(folder: Path) -> None:
        path = folder / name / "tokenizer.json"
        value = json.loads(path.read_text())
        vocabulary = value["model"]["vocab"]
        vocabulary["apple"], vocabulary["boat"] = vocabulary["boat"], vocabulary["apple"]
        path.write_text(json.dumps(value))

    return run


def without_mask(folder: Path) -> None:
    path = folder / "encoder/tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mask_token": None}))
