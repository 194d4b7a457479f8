"""Layouts: vectors as the other libraries gave them, every way in and out of a folder, and what must be refused.

golden/ holds tiny checkpoints saved by the libraries themselves, and what they encoded golden/texts.json to, as saved
and with their options changed (golden/variants.json): all written by `python bench/parity.py --golden`.
"""

import argparse
import json
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, call_stage, succeed
from safetensors.torch import load_file, save_file

import model as model_module
from model import ColBERT, load_tokenizer, model_fingerprint
from nanocolbert.checkpoints import layouts
from nanocolbert.cli import InputError
from nanocolbert.encoder import attention
from nanocolbert.encoder.pretrained import SETTINGS_FILES
from nanocolbert.maxsim import maxsim
from nanocolbert.storage.artifact import read_meta, write_meta

GOLDEN = ROOT / "tests" / "golden"
TEXTS = json.loads((GOLDEN / "texts.json").read_text())
VARIANTS = json.loads((GOLDEN / "variants.json").read_text())
CHECKPOINTS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
CASES = [(folder.name, path.stem) for folder in sorted(GOLDEN.iterdir()) for path in sorted(folder.glob("*.npz"))]
ST, TRANSFORMER = "config_sentence_transformers.json", "sentence_bert_config.json"


@pytest.fixture(autouse=True)
def fp32(monkeypatch):
    """Compute in fp32 even where the CPU has bf16, as the libraries did."""
    monkeypatch.setattr(model_module, "fast_dtype", lambda device: torch.float32)


@pytest.fixture(scope="module")
def colbert(encoder_dir):
    torch.manual_seed(1)
    return ColBERT.from_base(encoder_dir, dim=16, query_maxlen=20, doc_maxlen=50).eval()


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


# ---------------------------------------------------------------------------------------------------- golden vectors


@pytest.mark.parametrize("checkpoint, variant", CASES)
def test_golden_vectors(checkpoint, variant, tmp_path):
    model = ColBERT.from_pretrained(variant_of(checkpoint, variant, tmp_path / checkpoint))
    assert not model.training
    assert largest_difference(vectors(model), dict(np.load(GOLDEN / checkpoint / f"{variant}.npz"))) < 1e-5


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_every_option_changes_vectors(checkpoint):
    """The golden vectors can tell the variants apart: else the test above would pass with an option ignored."""
    plain = dict(np.load(GOLDEN / checkpoint / "as-saved.npz"))
    variants = [path for path in (GOLDEN / checkpoint).glob("*.npz") if path.stem != "as-saved"]
    assert len(variants) >= 3
    for path in variants:
        other = dict(np.load(path))
        same = all(plain[key].shape == other[key].shape and np.allclose(plain[key], other[key]) for key in plain)
        assert not same, path


def test_several_dense_layers(tmp_path):
    model = ColBERT.from_pretrained(copy_of("pylate-bert", tmp_path))
    assert [layer["out_features"] for layer in model.config.dense] == [12, 8] and model.config.dim == 8
    hidden = torch.randn(3, 16)
    first, last = model.linear
    expected = torch.tanh(hidden @ first.linear.weight.T + first.linear.bias) + hidden @ first.residual.weight.T
    assert torch.allclose(model.linear(hidden), expected @ last.linear.weight.T, atol=1e-6)


def test_without_expansion_padding_adds_nothing_to_maxsim(tmp_path):
    model = ColBERT.from_pretrained(variant_of("pylate-bert", "no-expansion", tmp_path / "model"))
    queries = model.encode_queries(["boats", "what is late interaction and why?"])
    lengths = queries.any(-1).sum(1).tolist()
    assert lengths[0] < lengths[1] <= queries.shape[1] == model.config.query_maxlen
    assert torch.allclose(queries[0, : lengths[0]], model.encode_queries(["boats"])[0, : lengths[0]], atol=1e-5)
    passages, mask = torch.randn(4, 6, 8), torch.ones(4, 6, dtype=torch.bool)
    without = maxsim(queries[:1, : lengths[0]], passages, mask)
    assert torch.allclose(maxsim(queries[:1], passages, mask), without, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- round trips


def assert_same(model: ColBERT, other: ColBERT) -> None:
    state = other.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, weights in model.state_dict().items():
        assert torch.equal(state[name], weights), name
    assert largest_difference(vectors(model), vectors(other)) == 0


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_round_trip_of_our_model(colbert, layout, tmp_path):
    colbert.save_pretrained(tmp_path / "model", layout=layout)
    assert layouts.detect(tmp_path / "model") == layout
    assert_same(colbert, ColBERT.from_pretrained(tmp_path / "model"))


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_round_trip_of_other_models(checkpoint, tmp_path):
    """Into every layout that can hold it (a Stanford model has one plain layer), and out again."""
    model = ColBERT.from_pretrained(copy_of(checkpoint, tmp_path))
    written = []
    for layout in layouts.LAYOUTS:
        try:
            model.save_pretrained(tmp_path / layout, layout=layout)
        except InputError as error:
            assert f"the {layout} layout cannot hold this model" in str(error)
            continue
        written.append(layout)
        other = ColBERT.from_pretrained(tmp_path / layout)
        other.config.strip_texts = model.config.strip_texts  # white space around a text: of the library, not the model
        assert_same(model, other)
    own = next(layout for layout in VARIANTS if checkpoint.startswith(layout))
    assert {"nanocolbert", own} <= set(written)
    if checkpoint.startswith(("stanford", "pylate")):  # prompts as text can say all that markers can
        assert "sentence-transformers" in written


@pytest.mark.parametrize("variant", ["no-expansion", "min", "attend", "not-normalized"])
def test_round_trip_of_options(variant, tmp_path):
    model = ColBERT.from_pretrained(variant_of("sentence-transformers-modernbert", variant, tmp_path / "model"))
    for layout in ("nanocolbert", "sentence-transformers"):
        model.save_pretrained(tmp_path / layout, layout=layout)
        assert_same(model, ColBERT.from_pretrained(tmp_path / layout))
    for layout in ("stanford", "pylate"):
        if variant in ("min", "not-normalized") or layout == "stanford":
            with pytest.raises(InputError, match=f"the {layout} layout cannot hold this model"):
                model.save_pretrained(tmp_path / layout, layout=layout)


# ---------------------------------------------------------------------------------------- weights in other containers


def stanford_state() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "stanford-bert" / "model.safetensors")


def test_pickled_weights(tmp_path):
    folder = copy_of("stanford-bert", tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save(stanford_state(), folder / "pytorch_model.bin")
    expected = dict(np.load(GOLDEN / "stanford-bert" / "as-saved.npz"))
    assert largest_difference(vectors(ColBERT.from_pretrained(folder)), expected) < 1e-5


def test_v1(tmp_path):
    """v1's file: the weights of colbert-ai's, the arguments of the training, the encoder's shape from its base."""
    arguments = {"dim": 8, "query_maxlen": 16, "doc_maxlen": 40, "mask_punctuation": True, "similarity": "l2"}
    arguments |= {"model": str(GOLDEN / "stanford-bert"), "lr": 3e-6, "amp": True}
    state = {f"module.{name}": weight for name, weight in stanford_state().items()}
    v1 = {"epoch": 0, "batch": 1, "model_state_dict": state, "optimizer_state_dict": {}, "arguments": arguments}
    torch.save(v1, tmp_path / "colbert.dnn")
    expected = dict(np.load(GOLDEN / "stanford-bert" / "as-saved.npz"))
    assert largest_difference(vectors(ColBERT.from_pretrained(tmp_path / "colbert.dnn")), expected) < 1e-5

    for broken, message in (
        ({"arguments": {**arguments, "stride": 2}}, "unknown key 'stride'"),
        ({"arguments": {"dim": 8}}, "arguments without 'query_maxlen'"),
        ({"ema": state}, "unknown key 'ema'"),
    ):
        torch.save({**v1, **broken}, tmp_path / "broken.dnn")
        with pytest.raises(InputError, match=message):
            ColBERT.from_pretrained(tmp_path / "broken.dnn")


def test_code_in_a_pickle_is_not_run(tmp_path):
    torch.save({"model_state_dict": {}, "arguments": {"model": Path("x")}, "optimizer": print}, tmp_path / "bad.dnn")
    with pytest.raises(InputError, match="more than weights is pickled in it"):
        ColBERT.from_pretrained(tmp_path / "bad.dnn")


def test_nanocolbert_as_the_reference_saves_it(colbert, tmp_path):
    """A BERT config with three more keys, bert.*, and a buffer that must not be believed."""
    colbert.tokenizer.save_pretrained(tmp_path)
    colbert.encoder.config.save_pretrained(tmp_path)
    change(tmp_path, "config.json", dim=16, mask_punctuation=True, similarity_metric="l2")
    weights = {f"bert.{name}": weight for name, weight in colbert.encoder.state_dict().items()}
    weights |= {"linear.weight": colbert.linear.weight.detach(), "mask_buffer": torch.tensor([0, 7, 1 << 40])}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = ColBERT.from_pretrained(tmp_path)
    assert (model.config.query_maxlen, model.config.doc_maxlen) == (32, 180)  # the defaults of its scripts
    assert model.config.skiplist == colbert.config.skiplist
    model.config.query_maxlen = model.config.expand_queries_to = 20
    model.config.doc_maxlen = 50
    assert_same(colbert, model)
    change(tmp_path, "config.json", similarity_metric="dot")
    with pytest.raises(InputError, match="similarity_metric 'dot' cannot be honoured"):
        ColBERT.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------------------ refusals

MASK = "MultiVectorMask/config.json"
STANFORD, PYLATE, NATIVE = "stanford-bert", "pylate-modernbert", "sentence-transformers-modernbert"
MISTAKES = [
    (STANFORD, "artifact.metadata", {"stride": 2}, (), "unknown key 'stride'"),
    (STANFORD, "artifact.metadata", {"interaction": "flipr"}, (), "interaction 'flipr' cannot be honoured"),
    (STANFORD, "artifact.metadata", {"query_token_id": "[unused7]"}, (), r"'\[unused7\]' is no token"),
    (STANFORD, "artifact.metadata", {"dim": 9}, (), "the projection should have weights"),
    (STANFORD, "artifact.metadata", {"doc_maxlen": 99}, (), "takes 64 tokens, 99 were asked for"),
    (PYLATE, ST, {"stride": 2}, (), "unknown key 'stride'"),
    (PYLATE, ST, {"query_prefix": "[X] "}, (), r"'\[X\] ' is no token"),
    (PYLATE, TRANSFORMER, {"do_lower_case": True}, (), "do_lower_case True cannot be honoured"),
    (PYLATE, TRANSFORMER, {"model_args": {"x": 1}}, (), "model_args .* cannot be honoured"),
    (PYLATE, TRANSFORMER, {"window": 1}, (), "unknown key 'window'"),
    (PYLATE, "Dense/config.json", {}, ("activation_function",), "key 'activation_function' is missing"),
    (PYLATE, "Dense/config.json", {}, ("in_features",), "key 'in_features' is missing"),
    (PYLATE, "Dense/config.json", {"scale": 2}, (), "unknown key 'scale'"),
    (PYLATE, "Dense/config.json", {"activation_function": "my.code.Act"}, (), "'my.code.Act' cannot be honoured"),
    (NATIVE, ST, {"stride": 2}, (), "unknown key 'stride'"),
    (NATIVE, ST, {"model_type": "SentenceTransformer"}, (), "an encoder, no ColBERT model"),
    (NATIVE, TRANSFORMER, {"query_expansion": {"strategy": "random", "length": 9}}, (), "strategy 'random' cannot"),
    (NATIVE, TRANSFORMER, {"query_expansion": {"strategy": "fixed"}}, (), "key 'length' is missing"),
    (NATIVE, TRANSFORMER, {"query_expansion": {"strategy": "fixed", "length": 9, "x": 1}}, (), "unknown key 'x'"),
    (NATIVE, TRANSFORMER, {"transformer_task": "fill-mask"}, (), "transformer_task 'fill-mask' cannot be honoured"),
    (NATIVE, MASK, {"skiplist_tasks": ["query"]}, (), "skiplist_tasks .* cannot be honoured"),
    (NATIVE, MASK, {"keep_only_token_ids": [3]}, (), "keep_only_token_ids .* cannot be honoured"),
]


@pytest.mark.parametrize("checkpoint, name, settings, removed, message", MISTAKES)
def test_settings_that_are_refused(checkpoint, name, settings, removed, message, tmp_path):
    folder = copy_of(checkpoint, tmp_path)
    change(folder, name, *removed, **settings)
    with pytest.raises(InputError, match=message) as caught:
        ColBERT.from_pretrained(folder)
    assert len(str(caught.value).splitlines()) == 1


def test_modules_that_are_refused(tmp_path):
    folder = copy_of(NATIVE, tmp_path)
    modules = json.loads((folder / "modules.json").read_text())

    def refused(changed: list[dict], message: str) -> None:
        (folder / "modules.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=message):
            ColBERT.from_pretrained(folder)

    refused([*modules, {"path": "x", "type": "my.code.Pooling"}], r"module 'my\.code\.Pooling' cannot be honoured")
    pooling = {"path": "x", "type": "sentence_transformers.multi_vector_encoder.modules.TokenPooling"}
    refused([*modules, pooling], "TokenPooling' cannot be honoured")
    refused([{**module, "path": "../" + module["path"]} for module in modules], "leads out of the folder")
    refused(modules[:1], "no Dense module")
    refused(modules[1:], "the first module must be a Transformer")
    refused([modules[0], *modules[::-1][:-1]], "a Dense after Normalize")
    refused([module for module in modules if "Mask" not in module["type"]], "query_expansion without a MultiVectorMask")


def test_folders_that_are_refused(encoder_dir, colbert, tmp_path):
    with pytest.raises(InputError, match=r"an encoder, no ColBERT model: train one on it with train\.py"):
        ColBERT.from_pretrained(encoder_dir)
    with pytest.raises(InputError, match=r"config\.json: missing"):
        ColBERT.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="a local checkpoint has no revisions"):
        ColBERT.from_pretrained(encoder_dir, revision="v2")
    with pytest.raises(InputError, match="neither a folder nor a model that the hub gives out"):
        ColBERT.from_pretrained("nobody/nothing")
    with pytest.raises(InputError, match="no code of a checkpoint is run here"):
        ColBERT.from_pretrained(GOLDEN / PYLATE, trust_remote_code=True)
    with pytest.raises(InputError, match="subfolder is no option here"):
        ColBERT.from_pretrained(GOLDEN / PYLATE, subfolder="x")
    with pytest.raises(InputError, match="layout 'colbert': not one of nanocolbert, stanford"):
        colbert.save_pretrained(tmp_path, layout="colbert")
    folder = copy_of(STANFORD, tmp_path)
    weights = stanford_state()
    del weights["bert.encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 weights of the encoder are missing, encoder\.layer\.1\.output"):
        ColBERT.from_pretrained(folder)


OWN = [
    ({"skiplists": [1]}, (), "unknown key 'skiplists'"),
    ({}, ("mask_punctuation",), "key 'mask_punctuation' is missing"),
    ({}, ("query_marker_id",), "key 'query_marker_id' is missing"),
    ({}, ("encoder",), "key 'encoder' is missing"),
    ({"dim": 99}, (), r"the projection should have weights .*\(99, 32\)"),
    ({"dim": "16"}, (), "dim '16' cannot be honoured here"),
    ({"query_maxlen": 3}, (), "query_maxlen 3 leaves no room for a word piece"),
    ({"doc_maxlen": 600}, (), "takes 512 tokens, 600 were asked for"),
    ({"skiplist": 7}, (), "skiplist '7' cannot be honoured here"),
    ({"skiplist": [7, 999]}, (), "token 999 is put into texts, or dropped, but its encoder has 131 embeddings"),
    ({"query_marker_id": 999}, (), "token 999 is put into texts, or dropped"),
    ({"normalize": "no"}, (), "normalize 'no' cannot be honoured here"),
    ({"dense": [{"in_features": 32}]}, (), "dense .* cannot be honoured here"),
    ({"encoder": {"model_type": "none"}}, (), "no encoder could be loaded"),
    ({"encoder": {"model_type": "bert"}}, (), "key 'vocab_size' of the encoder is missing"),
    ({"auto_map": {"AutoModel": "x.Y"}}, (), "auto_map: it asks for code of its own"),
]


@pytest.mark.parametrize("settings, removed, message", OWN)
def test_settings_of_our_own_that_are_refused(settings, removed, message, colbert, tmp_path):
    colbert.save_pretrained(tmp_path)
    change(tmp_path, "config.json", *removed, **settings)
    with pytest.raises(InputError, match=message) as caught:
        ColBERT.from_pretrained(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_settings_that_transformers_writes(colbert, tmp_path):
    """Of this version and of others; and those of our first version, which had fewer of its own."""
    colbert.save_pretrained(tmp_path)
    change(
        tmp_path, "config.json", torch_dtype="float32", output_attentions=False, tie_word_embeddings=True, id2label={}
    )
    assert_same(colbert, ColBERT.from_pretrained(tmp_path))
    change(tmp_path, "config.json", *layouts.OWN_LATER)
    assert_same(colbert, ColBERT.from_pretrained(tmp_path))
    assert layouts.texts_of(tmp_path) == colbert.config.texts()


def test_files_of_a_model_folder(colbert, tmp_path):
    """A file that is not what was written is named before it is read; others may have been left behind."""
    colbert.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "log.jsonl").write_text("{}")
    write_meta(tmp_path / "model", "model", "", 0.0, argparse.Namespace())
    (tmp_path / "model" / "log.jsonl").unlink()
    assert ColBERT.from_pretrained(tmp_path / "model").meta["kind"] == "model"
    whole = (tmp_path / "model" / "model.safetensors").read_bytes()
    (tmp_path / "model" / "model.safetensors").write_bytes(whole[:-4])
    with pytest.raises(InputError, match=r"model\.safetensors: \d+ bytes, should be \d+"):
        ColBERT.from_pretrained(tmp_path / "model")
    colbert.save_pretrained(tmp_path / "model")  # in its place: what the old meta.json says is no longer so
    assert ColBERT.from_pretrained(tmp_path / "model").meta is None


# ------------------------------------------------------------------------------------ the hub, the card, the pipeline

META = {"base_model": "nreimers/MiniLM", "steps": 400, "loss_of_last_100_steps": 0.25, "best_dev_mrr@10": 0.77}
META |= {"args": {"tokens_dir": "/home/me/data/tokens", "batch_size": 32, "lr": 3e-6}, "versions": {"torch": "2.13"}}


def test_names_on_the_hub(monkeypatch):
    calls = []

    def download(name, revision, allow_patterns, ignore_patterns):
        calls.append((name, revision, allow_patterns))
        return str(GOLDEN / PYLATE)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = ColBERT.from_pretrained("some/model", revision="v2")
    assert largest_difference(vectors(model), dict(np.load(GOLDEN / PYLATE / "as-saved.npz"))) < 1e-5
    assert calls == [("some/model", "v2", SETTINGS_FILES)]  # the weights were there already


def test_push_to_hub(colbert, monkeypatch):
    """What is uploaded opens again, in the layout asked for, and its card tells data, steps and metrics."""
    api, seen = mock.Mock(), {}
    api.create_repo.return_value = "https://hub/me/model"

    def upload_folder(repo_id, folder_path, commit_message):
        seen["card"] = (Path(folder_path) / "README.md").read_text()
        seen["model"] = ColBERT.from_pretrained(folder_path)
        seen["layout"] = layouts.detect(Path(folder_path))

    api.upload_folder.side_effect = upload_folder
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    monkeypatch.setattr(colbert, "meta", META)
    assert colbert.push_to_hub("me/model", layout="pylate", private=True) == "https://hub/me/model"
    api.create_repo.assert_called_once_with("me/model", exist_ok=True, private=True)
    assert seen["layout"] == "pylate"
    assert all(torch.equal(weight, colbert.state_dict()[name]) for name, weight in seen["model"].state_dict().items())
    for text in ("| steps | 400 |", "| MRR@10 on the dev candidates | 0.77 |", "| data | data/tokens |"):
        assert text in seen["card"]
    assert 'models.ColBERT("me/model")' in seen["card"] and 'base_model: "nreimers/MiniLM"' in seen["card"]
    assert "/home/me" not in seen["card"]


def test_command_line(colbert, tmp_path):
    colbert.save_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / "meta.json").write_text(json.dumps(META))
    for layout, source in (("sentence-transformers", "ours"), ("nanocolbert", "sentence-transformers")):
        arguments = ("--model", tmp_path / source, "--layout", layout, "--output_dir", tmp_path / layout)
        succeed(call_stage("convert.py", *arguments))
        assert layouts.detect(tmp_path / layout) == layout
        assert_same(colbert, ColBERT.from_pretrained(tmp_path / layout))
        meta = read_meta(tmp_path / layout, "model", "convert.py", check=True)
        assert meta["layout"] == layout and meta["steps"] == 400 and meta["args"] == META["args"]
    assert "| steps | 400 |" in (tmp_path / "sentence-transformers" / "README.md").read_text()
    for again in ("ours", "none", "text"):  # a model that came without a meta.json gets one
        (tmp_path / "ours" / "meta.json").unlink(missing_ok=True)
        (tmp_path / "text").write_text("")
        done = call_stage("convert.py", "--model", tmp_path / again, "--output_dir", tmp_path / "ours2", "--no-verify")
        assert (done.returncode == 0) == (again == "ours")
    assert read_meta(tmp_path / "ours2", "model", "convert.py", check=True)["layout"] == "nanocolbert"
    failed = call_stage("convert.py", "--model", tmp_path / "none", "--output_dir", tmp_path / "x")
    assert failed.returncode == 2 and failed.stderr.startswith("convert.py: error:") and not (tmp_path / "x").exists()


def test_command_line_refuses(colbert, tmp_path, monkeypatch):
    """Before a model is loaded: to write where it reads, over what is not a model, and what checksums tell apart."""
    colbert.save_pretrained(tmp_path / "model")
    write_meta(tmp_path / "model", "model", "", 0.0, argparse.Namespace())
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("")
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    (tmp_path / "model" / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    monkeypatch.setattr(ColBERT, "from_pretrained", None)
    for output, message in (
        ("model", "model: holds what is read"),
        (".", "holds what is read"),
        ("notes", "holds what is no model folder"),
        ("new", "model.safetensors: damaged within bytes"),
    ):
        done = call_stage("convert.py", "--model", tmp_path / "model", "--output_dir", tmp_path / output, "--verify")
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "notes"]


def test_stages_with_a_checkpoint_of_another_library(toy_dir, encoder_dir, tmp_path):
    """No marker, but a prompt of text: the stages give what encode_passages gives, or say what to do."""
    model = variant_of(NATIVE, "prompts", tmp_path / "model")
    tokens, embeddings = tmp_path / "tokens", tmp_path / "embeddings"
    collection = ("--collection", toy_dir / "collection.tsv", "--workers", 1, "--output_dir", tokens)

    def embed():
        return call_stage(
            "doc2embedding.py", "--cpu", "--tokens_dir", tokens, "--model", model, "--output_dir", embeddings
        )

    lengths = ("--query_maxlen", 16, "--doc_maxlen", 40)
    succeed(call_stage("tsv2mmap.py", *collection, "--tokenizer", model, *lengths))
    failed = embed()  # a query without a marker has room for one word piece more
    assert failed.returncode == 2 and "run tsv2mmap.py with --query_maxlen 17" in failed.stderr
    succeed(call_stage("tsv2mmap.py", *collection, "--tokenizer", model, "--query_maxlen", 17, *lengths[2:]))
    succeed(embed())
    texts = [line.split("\t")[1] for line in (toy_dir / "collection.tsv").read_text().splitlines()]
    expected = torch.cat(ColBERT.from_pretrained(model).encode_passages(texts)).numpy()
    assert np.abs(np.load(embeddings / "values.npy") - expected).max() < 1e-3

    change(model, ST, prompts={})
    shutil.rmtree(embeddings)
    assert "without the prompts that" in embed().stderr
    assert model_fingerprint(model) != model_fingerprint(GOLDEN / NATIVE)


def test_training_goes_on_from_another_library(tmp_path, encoder_dir):
    assert layouts.is_colbert(GOLDEN / PYLATE) and layouts.is_colbert(GOLDEN / STANFORD)
    assert not layouts.is_colbert(encoder_dir) and not layouts.is_colbert(tmp_path / "none")
    assert load_tokenizer(GOLDEN / PYLATE).mask_token_id is not None
