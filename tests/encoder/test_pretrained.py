"""Encoders: each known one embeds a text alone as beside others, in and out of a folder; what is damaged is named."""

import json
import shutil
import stat

import pytest
import torch
import transformers
from conftest import call_stage
from safetensors.torch import load_file, save_file
from tiny_models import TEXTS, train_tokenizer

from model import ColBERT
from nanocolbert.cli import InputError
from nanocolbert.encoder import attention, pretrained
from nanocolbert.encoder.pretrained import POINTER, check_weights, load_tokenizer, longest_input

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
MORE = {
    "albert": {"embedding_size": 16},
    "deberta": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    "deberta-v2": {
        **{"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"]},
        **{"share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False},
    },
    "electra": {"embedding_size": 16},
    "eurobert": {"num_key_value_heads": 2},
    "longformer": {"attention_window": 8},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 16},
    "modernbert": {"local_attention": 16},
    "rembert": {"input_embedding_size": 16},
    "roformer": {"embedding_size": 32},
}


@pytest.fixture(autouse=True)
def fp32(monkeypatch):
    monkeypatch.setattr("nanocolbert.compute.fast_dtype", lambda device: torch.float32)


def save_base(kind: str, folder, **settings) -> torch.nn.Module:
    """A tiny random encoder of a model_type, with a tokenizer; its attention is far from uniform."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer("unigram" if kind == "mpnet" else "wordpiece")  # MPNet's padding is token 1
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep")}
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, **ids}
    if kind == "distilbert":
        shape = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
    else:
        shape = {**SHAPE, **MORE.get(kind, {})}
    encoder = transformers.AutoModel.from_config(transformers.CONFIG_MAPPING[kind](**size, **shape, **settings)).eval()
    for name, weight in encoder.named_parameters():
        if "norm" not in name.lower() and weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return encoder


@pytest.mark.parametrize("kind", pretrained.KNOWN)
def test_known_encoders(kind, tmp_path):
    """Alone as in a padded batch; the encoder's own forward pass; the same once saved and loaded; at full length."""
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip("not of this version of transformers")
    encoder = save_base(kind, tmp_path / "base")
    longest = longest_input(encoder)
    colbert = ColBERT.from_base(tmp_path / "base", dim=16, query_maxlen=20, doc_maxlen=min(longest, 100)).eval()
    assert (colbert.encoder.config._attn_implementation == attention.NAME) == encoder._supports_sdpa

    plain = transformers.AutoModel.from_pretrained(tmp_path / "base").eval()  # with its own attention
    plain.resize_token_embeddings(len(colbert.tokenizer), mean_resizing=False)
    missing, unexpected = plain.load_state_dict(colbert.encoder.state_dict(), strict=False)
    assert not unexpected and all("pooler" in name for name in missing)
    assert plain.config._attn_implementation in ("sdpa", "eager")
    texts = [*TEXTS[:3], "drum " * 30]
    together, queries = colbert.encode_passages(texts, fp32=True), colbert.encode_queries(texts, fp32=True)
    assert max(map(len, together)) == min(longest, 100)
    for text, found, query in zip(texts, together, queries, strict=True):
        assert torch.allclose(colbert.encode_passages([text], fp32=True)[0], found, atol=1e-4)
        assert torch.allclose(colbert.encode_queries([text], fp32=True)[0], query, atol=1e-4)
        for kind_of_text, vectors in (("passage", found), ("query", query)):
            frame = colbert.frame_passages if kind_of_text == "passage" else colbert.frame_queries
            ids, mask = frame(*colbert.tokenize([text], kind_of_text))
            with torch.no_grad():
                hidden = plain(input_ids=ids, attention_mask=mask).last_hidden_state @ colbert.linear.weight.T
            expected = torch.nn.functional.normalize(hidden, dim=-1)[0]
            kept = colbert.kept(ids, mask)[0] if kind_of_text == "passage" else slice(None)
            assert torch.allclose(vectors, expected[kept], atol=1e-4), text

    colbert.save_pretrained(tmp_path / "model")
    loaded = ColBERT.from_pretrained(tmp_path / "model")
    for ours, theirs in zip(loaded.encode_passages(texts, fp32=True), together, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(loaded.encode_queries(texts, fp32=True), queries)


@pytest.mark.parametrize("kind", ["nystromformer", "convbert", "big_bird", "squeezebert", "llama"])
def test_other_encoders_are_refused(kind, encoder_dir, tmp_path):
    """Before weights are looked for."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(encoder_dir / name, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(
        InputError, match=rf"encoders of model_type '{kind}' are not known to .* give one of albert, bert"
    ):
        ColBERT.from_base(tmp_path)


# ------------------------------------------------------------------------------------------------------ damaged folders


@pytest.fixture
def base(encoder_dir, tmp_path):
    """A copy of the encoder."""
    return shutil.copytree(encoder_dir, tmp_path / "base")


@pytest.fixture
def saved(colbert, tmp_path):
    """A model folder of our own layout."""
    colbert.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def refused(load, folder, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(folder)
    assert len(str(caught.value).splitlines()) == 1


def change_weights(folder, **changes) -> None:
    """Replace weights (dots written __) by what a function makes of them; None removes one."""
    weights = load_file(folder / "model.safetensors")
    for name, change in changes.items():
        name = name.replace("__", ".")
        weights[name] = change(weights.pop(name, None))
        if weights[name] is None:
            del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_settings(folder, name: str = "config.json", *removed: str, **settings) -> None:
    found = json.loads((folder / name).read_text()) | settings
    (folder / name).write_text(json.dumps({key: value for key, value in found.items() if key not in removed}))


FIRST, SECOND = "encoder__layer__0__output__dense__weight", "encoder__layer__1__output__dense__weight"
DAMAGED = [
    ({FIRST: lambda weight: None}, r"1 weights of the encoder are missing, encoder\.layer\.0\.output\.dense\.weight"),
    (
        {FIRST: lambda weight: weight[:, :8].clone()},
        r"layer\.0\.output\.dense\.weight of the encoder is 32 x 8, .* 32 x 64",
    ),
    ({FIRST.replace("0", "2"): lambda _: torch.ones(2)}, r"no place for 1 of its weights, .*encoder\.layer\.2\.output"),
    ({FIRST: lambda weight: weight.fill_(torch.nan)}, r"weight .*layer\.0\.output\.dense\.weight is not finite"),
]


@pytest.mark.parametrize("changes, message", DAMAGED)
def test_damaged_weights(changes, message, base, saved):
    """The same of a base model and of our own layout."""
    change_weights(base, **changes)
    refused(ColBERT.from_base, base, message)
    change_weights(saved, **{f"encoder__{name}": change for name, change in changes.items()})
    refused(ColBERT.from_pretrained, saved, message)


def test_heads_and_poolers_of_a_base_are_passed_over(base, colbert):
    change_weights(
        base,
        pooler__dense__weight=lambda _: None,
        pooler__dense__bias=lambda _: None,
        cls__predictions__bias=lambda _: torch.zeros(3),
        embeddings__position_ids=lambda _: torch.arange(512)[None],
    )
    torch.manual_seed(1)
    found = ColBERT.from_base(base, dim=16)
    assert all(
        torch.equal(weight, colbert.encoder.state_dict()[name]) for name, weight in found.encoder.state_dict().items()
    )


OWN = [
    ({"linear__weight": lambda weight: None}, r"projection should have weights \{'weight': \(16, 32\)\}, found \{\}"),
    ({"linear__weight": lambda weight: weight[:8].clone()}, r"should have weights .*\(16, 32\).* found .*\(8, 32\)"),
    ({"linear__weight": lambda weight: weight.fill_(torch.inf)}, r"weight linear\.weight is not finite"),
    ({"linear__bias": lambda _: torch.ones(16)}, "the projection should have weights .* found .*bias"),
    ({"head__weight": lambda _: torch.ones(16)}, r"weight head\.weight is none of a ColBERT model"),
    ({"encoder__cls__bias": lambda _: torch.ones(16)}, r"no place for 1 of its weights, cls\.bias"),
]


@pytest.mark.parametrize("changes, message", OWN)
def test_damaged_weights_of_our_own_layout(changes, message, saved):
    change_weights(saved, **changes)
    refused(ColBERT.from_pretrained, saved, message)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_become_fp32(dtype, saved, colbert):
    weights = {name: weight.to(dtype) for name, weight in load_file(saved / "model.safetensors").items()}
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    change_settings(saved, dtype=str(dtype).removeprefix("torch."))
    model = ColBERT.from_pretrained(saved)
    assert {weight.dtype for weight in model.state_dict().values()} == {torch.float32}
    expected, found = colbert.encode_passages(TEXTS, fp32=True), model.encode_passages(TEXTS, fp32=True)
    assert all((a * b).sum(-1).min() > 0.99 for a, b in zip(expected, found, strict=True))


def test_weights_in_several_files(saved, colbert):
    colbert.save_pretrained(saved, max_shard_size="20KB")
    files = sorted(saved.glob("model-*.safetensors"))
    assert len(files) > 1 and not (saved / "model.safetensors").exists()
    assert torch.equal(ColBERT.from_pretrained(saved).encode_queries(TEXTS), colbert.encode_queries(TEXTS))
    colbert.save_pretrained(saved)
    assert [path.name for path in saved.glob("model*")] == ["model.safetensors"]
    colbert.save_pretrained(saved, max_shard_size="20KB")
    files[1].unlink()
    refused(ColBERT.from_pretrained, saved, rf"{files[1].name}: missing, one of several files of weights")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_files_that_git_lfs_did_not_fetch(name, base, saved):
    for folder, load in ((base, ColBERT.from_base), (saved, ColBERT.from_pretrained)):
        (folder / name).write_bytes(POINTER + b"v1\noid sha256:0\nsize 9\n")
        refused(load, folder, rf"{name}: what git-lfs puts in place of the file: fetch it: git lfs pull")


@pytest.mark.parametrize(
    "name, message",
    [
        ("model.safetensors", r"model\.safetensors: not a whole file of weights \(.*\): download or copy it again"),
        ("tokenizer.json", r"no tokenizer could be loaded \("),
        ("config.json", r"config\.json: not JSON"),
    ],
)
@pytest.mark.parametrize("share", [0, 0.5])
def test_half_a_download(name, message, share, base, saved):
    for folder, load in ((base, ColBERT.from_base), (saved, ColBERT.from_pretrained)):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: int(share * len(whole))])
        refused(load, folder, message)


def test_other_files_of_weights(base):
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    refused(ColBERT.from_base, base, r"no weights \(model\.safetensors or pytorch_model\.bin\)")
    torch.save(weights, base / "pytorch_model.bin")
    ColBERT.from_base(base)
    torch.save([1, 2], base / "pytorch_model.bin")
    refused(ColBERT.from_base, base, r"pytorch_model\.bin: holds a list, not weights by name")
    (base / "pytorch_model.bin").write_bytes(b"PK\3\4 half")
    refused(ColBERT.from_base, base, r"pytorch_model\.bin: not read: .* or it is broken")


@pytest.mark.parametrize("token", ["pad", "cls", "sep", "mask"])
def test_a_tokenizer_that_lacks_a_token(token, base, saved):
    for folder, load in ((base, ColBERT.from_base), (saved, ColBERT.from_pretrained)):
        kept = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "mask", "unk") if name != token}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **kept}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        refused(load, folder, rf"its tokenizer has no {token} token")


def test_a_tokenizer_of_another_model(base, saved, tmp_path):
    change_settings(saved, cls_token_id=3)
    refused(ColBERT.from_pretrained, saved, "cls_token_id 3, but 2 of the tokenizer: they are not of one model")
    change_settings(saved, cls_token_id=2)
    for folder, load in ((base, ColBERT.from_base), (saved, ColBERT.from_pretrained)):
        tokenizer = load_tokenizer(folder)
        tokenizer.add_tokens(["grapefruit", "houseboat", "drumming"])
        tokenizer.save_pretrained(folder)
        refused(load, folder, r"its tokenizer has \d+ tokens, its encoder \d+ embeddings: they are not of one model")
    save_base("roberta", tmp_path / "roberta")
    change_settings(tmp_path / "roberta", pad_token_id=1)
    refused(ColBERT.from_base, tmp_path / "roberta", "its tokenizer pads with token 0, its encoder with 1")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_of_a_checkpoint_is_not_run(name, base, saved, tmp_path, monkeypatch):
    """Whatever stands on stdin, where transformers asks."""
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    classes = {"config.json": {"AutoConfig": "trap.Config", "AutoModel": "trap.Model"}}
    classes["tokenizer_config.json"] = {"AutoTokenizer": [None, "trap.Tokenizer"]}
    for folder, load in ((base, ColBERT.from_base), (saved, ColBERT.from_pretrained)):
        (folder / "trap.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        change_settings(folder, name, auto_map=classes[name])
        refused(load, folder, rf"{name}: auto_map: it asks for code of its own, which is never run here")
        refused(load_tokenizer, folder, rf"{name}: auto_map")
    (tmp_path / "collection.tsv").write_text("1\tboat\n")
    arguments = ("--collection", tmp_path / "collection.tsv", "--tokenizer", base, "--output_dir", tmp_path / "tokens")
    done = call_stage("tsv2mmap.py", *arguments, "--workers", 1)
    assert done.returncode == 2 and f"{name}: auto_map" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "ran").exists()


def test_quantized_weights(base):
    change_settings(base, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(ColBERT.from_base, base, "quantization_config cannot be honoured here")


# ------------------------------------------------------------------------------------------------------- finite weights


def test_weights_that_are_not_finite(encoder_dir, tmp_path):
    colbert = ColBERT.from_base(encoder_dir, dim=16).eval()
    check_weights(colbert, "model")
    with torch.no_grad():
        colbert.encoder.encoder.layer[1].attention.self.key.weight.fill_(3e38)  # its sum is not finite
        check_weights(colbert, "model")
        colbert.encoder.encoder.layer[1].attention.self.key.weight[5, 7] = torch.nan
        colbert.linear.weight[0, 0] = -torch.inf
    message = r"weight encoder\.encoder\.layer\.1\.attention\.self\.key\.weight is not finite"
    with pytest.raises(InputError, match=f"model: {message}"):
        check_weights(colbert, "model")
    for layout in ("nanocolbert", "stanford", "pylate", "sentence-transformers"):
        with pytest.raises(InputError, match=message):
            colbert.save_pretrained(tmp_path / layout, layout=layout)
        assert not (tmp_path / layout).exists()


def test_what_is_saved_can_be_read_by_others(colbert, tmp_path):
    for layout in ("nanocolbert", "pylate"):
        colbert.save_pretrained(tmp_path / layout, layout=layout)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / layout).rglob("*.*")}
        assert all(mode & 0o444 == 0o444 for mode in modes.values()), modes
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: a file, not a folder"):
        colbert.save_pretrained(tmp_path / "file")


# ----------------------------------------------------------------------------------------------- what is not there


@pytest.mark.parametrize("name", ["/nowhere", "./nowhere", "nowhere/", "no/such/model", "~/model", "my model"])
def test_folders_that_are_not_there(name, monkeypatch):
    """What can be no name on the hub is not looked for there."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    for load in (ColBERT.from_pretrained, ColBERT.from_base, load_tokenizer):
        refused(load, name, f"^{name}: no such folder$")
    refused(ColBERT.from_pretrained, "nowhere.dnn", r"^nowhere\.dnn: no such file$")


@pytest.mark.parametrize("name", ["nowhere", "nowhere/such"])
def test_names_that_are_not_there(name):
    refused(ColBERT.from_pretrained, name, f"^{name}: neither a folder nor a model that the hub gives out: ")
