"""The model: scores against plain loops, every way to ask for them, in and out of a folder, and other encoders."""

import socket
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tiny_models import (
    PUNCTUATION,
    TEXTS,
    distilbert,
    embed_alone,
    loop_score,
    modernbert,
    train_tokenizer,
    xlm_roberta,
)

import model as model_module
from model import ColBERT
from nanocolbert import maxsim
from nanocolbert.cli import InputError
from nanocolbert.encoder import batches
from nanocolbert.encoder.pretrained import load_tokenizer
from nanocolbert.text import punctuation_ids, tokenize, tokenizer_fingerprint

# ------------------------------------------------------------------------------------------------ embeddings and scores


def test_score_of_texts_equals_the_loop(colbert, fp32):
    queries = ["find the boat", "", "drum, eagle?"]
    scores = colbert.score(queries, TEXTS)
    vectors = colbert.encode_queries(queries)
    assert vectors.shape == (3, 32, 16) and vectors.dtype == torch.float32
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(3, 32), atol=1e-5)
    for query, row in zip(vectors.tolist(), scores.tolist(), strict=True):
        expected = [loop_score(query, embed_alone(colbert, text)[0].tolist()) for text in TEXTS]
        assert np.allclose(row, expected, atol=2e-2)  # passages are stored in fp16
    assert torch.equal(colbert.score(vectors, colbert.encode_passages(TEXTS)), scores)


def test_nothing_to_encode(colbert):
    assert colbert.encode_queries([]).shape == (0, 32, 16) and colbert.encode_passages([]) == []
    values, offsets = colbert.encode_passages([], ragged=True)
    assert values.shape == (0, 16) and offsets.tolist() == [0]
    assert colbert.encode_passages([], return_tokens=True) == ([], [])
    assert colbert.score(["boat"], []).shape == (1, 0) and colbert.score([], ["boat"]).shape == (0, 1)


def test_no_dropout_when_encoding(encoder_dir, fp32):
    """In training mode too, and the mode is then as it was, of each part."""
    colbert = ColBERT.from_base(encoder_dir, dim=16, dropout=0.5, attention_dropout=0.5).eval()
    pieces = tokenize(colbert.tokenizer, TEXTS, 180)

    def encode() -> list:
        results = [colbert.encode_queries(TEXTS), *colbert.encode_passages(TEXTS), colbert.score(TEXTS[:2], TEXTS)]
        results += [torch.from_numpy(colbert.embed_passages(*pieces)[0]), torch.tensor(colbert.rank("boat", TEXTS))]
        with torch.no_grad():
            results.append(colbert.embed_queries(colbert.frame_queries(*colbert.tokenize(TEXTS, "query"))))
        return results

    expected = encode()
    colbert.train()
    colbert.encoder.encoder.layer[0].eval()
    modes = [module.training for module in colbert.modules()]
    with ThreadPoolExecutor(3) as threads:  # the first to be done must not turn it on for the others
        runs = [job.result() for job in [threads.submit(encode) for _ in range(4)]]
    for run in (encode(), *runs):
        assert all(torch.allclose(found, wanted, atol=1e-3) for found, wanted in zip(run, expected, strict=True))
    assert [module.training for module in colbert.modules()] == modes and any(modes) and not all(modes)
    with torch.no_grad():  # training itself has it
        ids = colbert.frame_queries(*colbert.tokenize(["boat"], "query"))
        assert not torch.equal(colbert.embed(ids), colbert.embed(ids))


# ------------------------------------------------------------------------------------------------------------ in blocks


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that every loop over them runs several times."""
    monkeypatch.setattr(batches, "TOKENS_PER_BATCH", {"cpu": 64})
    monkeypatch.setattr(model_module, "TEXTS_PER_CHUNK", 3)
    monkeypatch.setattr(maxsim, "SCORE_TOKENS", {"cpu": 50})
    monkeypatch.setattr(maxsim, "SCORE_QUERIES", 2)


def test_encode_passages_keeps_the_order(colbert, small_blocks):
    texts = [text for i in range(4) for text in (*TEXTS, "boat " * i, "near the house " * i)]
    embeddings = colbert.encode_passages(texts, fp32=True)
    assert len(embeddings) == len(texts)
    for text, vectors in zip(texts, embeddings, strict=True):
        assert vectors.dtype == torch.float32
        assert torch.allclose(vectors, embed_alone(colbert, text)[0], atol=1e-5), text
    values, offsets = colbert.encode_passages(texts, fp32=True, ragged=True)
    assert offsets.dtype == torch.int64 and offsets.tolist()[0] == 0 and offsets.tolist()[-1] == len(values)
    for i, vectors in enumerate(embeddings):
        assert torch.equal(values[offsets[i] : offsets[i + 1]], vectors)
    assert all(vectors.dtype == torch.float16 for vectors in colbert.encode_passages(texts[:3]))
    assert len({vectors.untyped_storage().data_ptr() for vectors in embeddings}) == 1  # one buffer, no copies


def test_encode_queries_keeps_the_order(colbert, small_blocks):
    texts = [*TEXTS, "boat", "the drum?"]
    together = colbert.encode_queries(texts, fp32=True)
    assert together.shape == (10, 32, 16) and together.dtype == torch.float32
    for text, vectors in zip(texts, together, strict=True):
        assert torch.allclose(vectors, colbert.encode_queries([text], fp32=True)[0], atol=1e-5), text


def test_fp32_is_full_fp32(colbert, monkeypatch):
    monkeypatch.setattr("nanocolbert.compute.fast_dtype", lambda device: torch.bfloat16)
    for encode in (colbert.encode_queries, colbert.encode_passages):
        fast, full = encode(["find the boat"])[0].float(), encode(["find the boat"], fp32=True)[0]
        assert 1e-4 < (fast - full).abs().max() < 0.1
    with torch.no_grad():
        exact = colbert.embed(colbert.frame_queries(*tokenize(colbert.tokenizer, ["find the boat"], 32)))
    assert torch.equal(colbert.encode_queries(["find the boat"], fp32=True), exact)


@pytest.mark.parametrize("fill", (32, 0))
def test_queries_in_the_fast_type_are_close(colbert, fill, monkeypatch):
    monkeypatch.setattr("nanocolbert.compute.fast_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(colbert.config, "expand_queries_to", fill)
    fast, full = colbert.encode_queries(TEXTS), colbert.encode_queries(TEXTS, fp32=True)
    assert torch.equal(fast.any(-1), full.any(-1)) and full.any(-1).all() == (fill == 32)
    assert (fast * full).sum(-1)[full.any(-1)].min() > 0.99


def test_tokens_go_with_the_embeddings(colbert, small_blocks):
    embeddings, tokens = colbert.encode_passages(TEXTS, return_tokens=True)
    assert [len(row) for row in tokens] == [len(vectors) for vectors in embeddings]
    assert tokens[0] == ["[CLS]", "[D]", "the", "old", "boat", "and", "a", "drum", "[SEP]"]
    assert tokens[1] == ["[CLS]", "[D]", "[SEP]"] and len(tokens[2]) == 180
    (_, offsets), again = colbert.encode_passages(TEXTS, return_tokens=True, ragged=True)
    assert again == tokens and offsets.diff().tolist() == [len(row) for row in tokens]
    queries, tokens = colbert.encode_queries(["find the boat!", ""], return_tokens=True)
    assert len(queries) == 2 and tokens[0][:7] == ["[CLS]", "[Q]", "find", "the", "boat", "!", "[SEP]"]
    assert tokens[0][7:] == ["[MASK]"] * 25 and tokens[1] == ["[CLS]", "[Q]", "[SEP]", *["[MASK]"] * 29]


def test_encoding_holds_the_result_once(encoder_dir):
    colbert = ColBERT.from_base(encoder_dir, dim=128).eval()
    texts = [f"boat {'drum ' * (i % 150)}" for i in range(1500)]
    colbert.encode_passages(texts[:2])
    tracemalloc.start()  # numpy's arrays are counted
    values, _ = colbert.encode_passages(texts, ragged=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    result = values.numel() * values.element_size()
    assert result > 25e6 and peak < 1.5 * result


def test_score_in_blocks(colbert, small_blocks, fp32):
    queries, passages = colbert.encode_queries(TEXTS[:5]), colbert.encode_passages(TEXTS * 3)
    scores = colbert.score(queries, passages)
    assert scores.shape == (5, 24) and scores.dtype == torch.float32
    for query, row in zip(queries, scores, strict=True):
        for passage, score in zip(passages, row.tolist(), strict=True):
            assert score == pytest.approx(float((query @ passage.float().T).amax(1).sum()), abs=1e-4)
    assert torch.equal(colbert.score(queries, colbert.encode_passages(TEXTS * 3, ragged=True)), scores)
    assert torch.allclose(colbert.score(TEXTS[:5], TEXTS * 3), scores, atol=1e-4)


def test_rank(colbert):
    passages = ["the eagle", "the old boat", "boat", "the old boat", "a drum"]
    scores = colbert.score(["find the boat"], passages)[0].tolist()
    ranked = colbert.rank("find the boat", passages)
    assert [position for position, _ in ranked] == sorted(range(5), key=lambda i: (-scores[i], i))
    assert [score for _, score in ranked] == sorted(scores, reverse=True) and scores[1] == scores[3]
    assert colbert.rank("find the boat", passages, k=2) == ranked[:2]
    assert colbert.rank("find the boat", passages, k=99) == ranked
    query = colbert.encode_queries(["find the boat"])[0]
    assert colbert.rank(query, colbert.encode_passages(passages, ragged=True), k=3) == ranked[:3]
    assert colbert.rank("find the boat", []) == []
    assert [position for position, _ in colbert.rank("", ["boat"])] == [0]


def test_explain(colbert):
    found = colbert.explain("find the boat", "the old boat, and a drum!")
    assert found.score == pytest.approx(float(colbert.score(["find the boat"], ["the old boat, and a drum!"])), abs=0.1)


def test_a_passage_without_embeddings(colbert):
    full, empty = colbert.encode_passages(["boat"])[0], torch.zeros(0, 16)
    ragged = torch.cat([full, full]), torch.tensor([0, len(full), len(full), 2 * len(full)])
    for passages in ([full, empty, full], ragged):
        for ask in (
            lambda passages: colbert.score(["boat"], passages),
            lambda passages: colbert.rank("boat", passages),
        ):
            with pytest.raises(InputError, match=r"passage 1 has no embeddings \(0, D\): leave it out"):
                ask(passages)


def test_options_that_are_refused(colbert, encoder_dir, tmp_path):
    colbert.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="device_map is no option here: give revision and device at most"):
        ColBERT.from_pretrained(tmp_path, device_map="auto")
    with pytest.raises(InputError, match="trust_remote_code: no code of a checkpoint is run here"):
        ColBERT.from_pretrained(tmp_path, trust_remote_code=True)
    ColBERT.from_pretrained(tmp_path, trust_remote_code=False)
    with pytest.raises(InputError, match="dims is no setting of a ColBERT model"):
        ColBERT.from_base(encoder_dir, dims=16)


def test_what_is_no_list_of_texts(colbert):
    for encode in (colbert.encode_queries, colbert.encode_passages):
        with pytest.raises(InputError, match=r"one text, 'boat', where a list of texts is wanted"):
            encode("boat")
        with pytest.raises(InputError, match=r"text 1 is of type float, not a string"):
            encode(["boat", float("nan")])
        assert len(encode(text for text in ("boat", "drum"))) == 2
    with pytest.raises(InputError, match="one text"):
        colbert.score("boat", ["boat"])
    with pytest.raises(InputError, match="k is 0"):
        colbert.rank("boat", ["boat"], k=0)


def test_a_bar_when_asked_for_or_when_it_takes_long(colbert, capsys, monkeypatch):
    for encode, unit in ((colbert.encode_queries, "queries"), (colbert.encode_passages, "passages")):
        encode(["boat"])
        encode(["boat"], progress=False)
        assert unit not in capsys.readouterr().err
        encode(["boat"], progress=True)
        assert unit in capsys.readouterr().err
    monkeypatch.setattr(model_module, "PROGRESS_AFTER", 1e-9)
    colbert.encode_passages(["boat"])
    assert "1.00/1.00" in capsys.readouterr().err


def test_a_model_loads_onto_the_best_device(colbert, tmp_path, monkeypatch):
    colbert.save_pretrained(tmp_path)
    monkeypatch.setattr(model_module, "default_device", lambda: torch.device("meta"))
    assert ColBERT.from_pretrained(tmp_path).device.type == "meta"
    assert ColBERT.from_pretrained(tmp_path, device="cpu").device.type == "cpu"


# ----------------------------------------------------------------------------------------------------- in and out again


def test_save_and_load(colbert, tmp_path):
    colbert.save_pretrained(tmp_path / "model")
    for _ in range(2):  # uninitialised memory may be right by chance
        loaded = ColBERT.from_pretrained(tmp_path / "model")
        assert not loaded.training and not loaded.encoder.training
        assert loaded.config.skiplist == punctuation_ids(load_tokenizer(tmp_path / "model")) != []
        assert loaded.config.encoder["hidden_size"] == 32 and loaded.config.dim == 16
        state, expected = loaded.state_dict(), colbert.state_dict()
        assert state.keys() == expected.keys()
        for name, weights in expected.items():
            assert torch.equal(state[name], weights), name
        buffers = dict(loaded.named_buffers())
        for name, buffer in colbert.named_buffers():
            assert torch.equal(buffers[name], buffer), name
        assert torch.equal(loaded.encode_queries(TEXTS), colbert.encode_queries(TEXTS))
        for a, b in zip(loaded.encode_passages(TEXTS), colbert.encode_passages(TEXTS), strict=True):
            assert torch.equal(a, b)
    assert tokenizer_fingerprint(loaded.tokenizer) == tokenizer_fingerprint(colbert.tokenizer)


def test_constructing_touches_no_network_and_no_hub(colbert, monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("network")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("transformers.AutoModel.from_pretrained", refuse)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    fresh = ColBERT(model_module.ColBERTConfig(**colbert.config.to_dict()))
    assert {name: weights.shape for name, weights in fresh.state_dict().items()} == {
        name: weights.shape for name, weights in colbert.state_dict().items()
    }
    weight = fresh.linear.weight.detach()
    assert torch.allclose(weight @ weight.T, torch.eye(16), atol=1e-5)


def test_mistakes(colbert, encoder_dir, tmp_path):
    with pytest.raises(InputError, match="none: no such folder"):
        ColBERT.from_base(str(tmp_path / "none"))
    for name in ("doc_maxlen", "query_maxlen"):
        ColBERT.from_base(encoder_dir, **{name: 512})
        with pytest.raises(InputError, match="takes 512 tokens, 600 were asked for"):
            ColBERT.from_base(encoder_dir, **{name: 600})


def test_dropout_is_set_everywhere(encoder_dir):
    colbert = ColBERT.from_base(encoder_dir, dropout=0.25, attention_dropout=0.5)
    modules = {name: module.p for name, module in colbert.named_modules() if isinstance(module, torch.nn.Dropout)}
    of_attention = {rate for name, rate in modules.items() if name.endswith("attention.self.dropout")}
    others = {rate for name, rate in modules.items() if not name.endswith("attention.self.dropout")}
    assert of_attention == {0.5} and others == {0.25}
    settings = ColBERT.from_base(encoder_dir).config.encoder
    assert settings["hidden_dropout_prob"] == 0.1 and settings["attention_probs_dropout_prob"] == 0.0


# ------------------------------------------------------------------------------------------------------- other encoders


@pytest.mark.parametrize("build, kind", [(modernbert, "bpe"), (xlm_roberta, "unigram"), (distilbert, "wordpiece")])
def test_other_encoders(build, kind, tmp_path, fp32):
    torch.manual_seed(0)
    tokenizer = train_tokenizer(kind)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("cls", "sep", "pad")}
    encoder = build(len(tokenizer), ids)
    encoder.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    colbert = ColBERT.from_base(tmp_path / "base", dim=16).eval()

    # The weights are the encoder's, the markers begin as the mean of its embeddings.
    table = encoder.get_input_embeddings().weight
    new = colbert.encoder.get_input_embeddings().weight
    markers = colbert.tokenizer.convert_tokens_to_ids(["[Q]", "[D]"])
    assert markers == [colbert.config.query_marker_id, colbert.config.passage_marker_id] and len(set(markers)) == 2
    assert torch.equal(new[: len(tokenizer)], table) and torch.allclose(new[markers], table.mean(0).expand(2, -1))

    # Every symbol is dropped that the tokenizer has a token for.
    dropped = {
        token.strip("\u2581\u0120") for token in colbert.tokenizer.convert_ids_to_tokens(colbert.config.skiplist)
    }
    assert PUNCTUATION - {"##"} >= dropped >= set(",.!;()")

    pieces = tokenize(colbert.tokenizer, TEXTS, 180)
    assert not set(pieces[0].tolist()) & (set(colbert.tokenizer.all_special_ids) - {colbert.tokenizer.unk_token_id})
    embeddings, counts, _ = colbert.embed_passages(*pieces)
    assert counts.tolist() == colbert.kept_counts(*pieces).tolist() and counts.min() >= 3 and counts.max() == 180
    for text, vectors in zip(TEXTS, np.split(embeddings, np.cumsum(counts)[:-1]), strict=True):
        alone, _ = embed_alone(colbert, text)
        assert vectors.shape == alone.shape and np.allclose(vectors, alone, atol=2e-3), text

    colbert.save_pretrained(tmp_path / "model")
    loaded = ColBERT.from_pretrained(tmp_path / "model")
    assert not loaded.training
    assert torch.equal(loaded.encode_queries(TEXTS), colbert.encode_queries(TEXTS))
    assert np.array_equal(loaded.embed_passages(*tokenize(loaded.tokenizer, TEXTS, 180))[0], embeddings)


def test_positions_that_begin_after_the_padding(tmp_path):
    """RoBERTa's 200 positions hold 198 tokens."""
    tokenizer = train_tokenizer("unigram")
    xlm_roberta(len(tokenizer), {"cls_token_id": 0, "sep_token_id": 2}).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="takes 198 tokens, 199 were asked for"):
        ColBERT.from_base(tmp_path, doc_maxlen=199)
    colbert = ColBERT.from_base(tmp_path, doc_maxlen=198).eval()
    assert len(colbert.encode_passages(["eagle " * 300])[0]) == 198
