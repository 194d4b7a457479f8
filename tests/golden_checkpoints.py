"""The checkpoints of golden/, their options changed, and the comparison of what is encoded with them.

golden/ holds tiny checkpoints saved by the libraries themselves, and what they encoded golden/texts.json to, as saved
and with their options changed (golden/variants.json): all written by `python bench/parity.py --golden`.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from model import ColBERT
from nanocolbert.cli import InputError
from nanocolbert.encoder import attention

GOLDEN = ROOT / "tests" / "golden"
TEXTS = json.loads((GOLDEN / "texts.json").read_text())
VARIANTS = json.loads((GOLDEN / "variants.json").read_text())
CHECKPOINTS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
ST, TRANSFORMER = "config_sentence_transformers.json", "sentence_bert_config.json"
STANFORD, PYLATE, NATIVE = "stanford-bert", "pylate-modernbert", "sentence-transformers-modernbert"


def change(folder: Path, name: str, *removed: str, **settings) -> None:
    """Change a settings file: set keys, remove others; `name` may lack the number of a module's folder."""
    path = next(folder.glob(f"*_{name}")) if "/" in name else folder / name
    found = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({key: value for key, value in found.items() if key not in removed}))


def variant_of(checkpoint: str, variant: str, folder: Path) -> Path:
    """A copy of a golden checkpoint with the options of a variant."""
    shutil.copytree(GOLDEN / checkpoint, folder, ignore=shutil.ignore_patterns("*.npz"))
    layout = next(layout for layout in VARIANTS if checkpoint.startswith(layout))
    for name, settings in VARIANTS[layout].get(variant, {}).items():
        if settings == "without Normalize":
            modules = json.loads((folder / name).read_text())
            modules = [module for module in modules if not module["type"].endswith("Normalize")]
            (folder / name).write_text(json.dumps(modules))
        else:
            change(folder, name, **settings)
    return folder


def copy_of(checkpoint: str, tmp_path: Path) -> Path:
    return variant_of(checkpoint, "as-saved", tmp_path / checkpoint)


def vectors(model: ColBERT) -> dict[str, np.ndarray]:
    """Embeddings of the golden texts, fp32, as the libraries give them: without padding."""
    arrays = {}
    assert model.encoder.config._attn_implementation == attention.NAME  # whatever it was loaded with
    with torch.inference_mode():
        queries = model.encode_queries(TEXTS["queries"])
        queries = [query[query.any(-1)] for query in queries]
        ids, mask = model.frame_passages(*model.tokenize(TEXTS["passages"], "passage"))
        passages = [row[keep] for row, keep in zip(model.embed((ids, mask)), model.kept(ids, mask), strict=True)]
    for kind, parts in (("queries", queries), ("passages", passages)):
        arrays[kind], arrays[f"{kind}_counts"] = torch.cat(parts).numpy(), np.array([len(part) for part in parts])
    return arrays


def largest_difference(ours: dict, theirs: dict) -> float:
    for kind in ("queries", "passages"):
        assert ours[f"{kind}_counts"].tolist() == theirs[f"{kind}_counts"].tolist(), kind
    return max(float(np.abs(ours[kind] - theirs[kind]).max()) for kind in ("queries", "passages"))


def assert_same(model: ColBERT, other: ColBERT) -> None:
    state = other.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, weights in model.state_dict().items():
        assert torch.equal(state[name], weights), name
    assert largest_difference(vectors(model), vectors(other)) == 0


def stanford_state() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "stanford-bert" / "model.safetensors")


def v1_file() -> dict:
    """What v1's file of a golden checkpoint holds: torch.save it."""
    arguments = {"dim": 8, "query_maxlen": 16, "doc_maxlen": 40, "mask_punctuation": True, "similarity": "l2"}
    arguments |= {"model": str(GOLDEN / STANFORD), "lr": 3e-6, "amp": True}
    state = {f"module.{name}": weight for name, weight in stanford_state().items()}
    return {"epoch": 0, "batch": 1, "model_state_dict": state, "optimizer_state_dict": {}, "arguments": arguments}


def assert_refused(folder: Path, name: str, settings: dict, removed: tuple[str, ...], message: str) -> None:
    """A checkpoint whose settings are changed so is refused, in one line."""
    change(folder, name, *removed, **settings)
    with pytest.raises(InputError, match=message) as caught:
        ColBERT.from_pretrained(folder)
    assert len(str(caught.value).splitlines()) == 1
