"""The model: scores against plain loops, the frame of queries and passages, and every way in and out of a folder."""

import socket
import string
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    DistilBertConfig,
    DistilBertModel,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaModel,
)

import model as model_module
from model import (
    FRAME,
    ColBERT,
    EmbeddingError,
    length_batches,
    load_tokenizer,
    model_fingerprint,
    own_backend,
    punctuation_ids,
    tokenize,
    tokenizer_fingerprint,
)
from nanocolbert.cli import InputError
from nanocolbert.maxsim import MAXSIM_BYTES, maxsim, maxsim_packed, maxsim_pairs

TEXTS = [
    "the old boat, and a drum!",
    "",
    "house " * 600,
    "eagle",
    "[MASK] [SEP] apple [D]",
    "?!...",
    "Grape; flute (new) -- cloud's",
    "\u00e9 \u65e5\u672c \u2014 unknown",
]


@pytest.fixture
def fp32(monkeypatch):
    """Compute in fp32 even where the CPU has bf16, so that small differences are mistakes."""
    monkeypatch.setattr(model_module, "fast_dtype", lambda device: torch.float32)


@pytest.fixture(scope="module")
def colbert(encoder_dir):
    torch.manual_seed(1)
    return ColBERT.from_base(encoder_dir, dim=16).eval()


# ------------------------------------------------------------------------------------------------------------ scores


def loop_score(query, passage) -> float:
    """MaxSim as three loops over lists; `passage` holds real tokens only."""
    total = 0.0
    for q in query:
        best = -float("inf")
        for d in passage:
            similarity = 0.0
            for a, b in zip(q, d, strict=True):
                similarity += a * b
            best = max(best, similarity)
        total += best
    return total


@pytest.fixture
def scoring():
    """Three queries, and four passages of 1 to 6 tokens, two of which are against every query; masks with holes."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(3, 5, 4, generator=generator)
    queries[..., 0] = queries[..., 0].abs() + 3
    passages = torch.randn(4, 6, 4, generator=generator)
    passages[1:3] = torch.tensor([-1.0, 0, 0, 0]) + 0.1 * passages[1:3]  # all similarities negative
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1], [1, 1, 0, 1, 0, 0]]).bool()
    passages[~mask] = torch.randn(int((~mask).sum()), 4, generator=generator) * 100  # what masked tokens hold is noise
    passages[1, 1] = 0
    expected = [[loop_score(q.tolist(), p[m].tolist()) for p, m in zip(passages, mask, strict=True)] for q in queries]
    assert max(row[1] for row in expected) < 0
    return queries, passages, mask, torch.tensor(expected)


def test_maxsim(scoring):
    queries, passages, mask, expected = scoring
    assert torch.allclose(maxsim(queries, passages, mask), expected, atol=1e-4)


@pytest.mark.parametrize("size", [1, 1000, 1 << 20])
def test_gradients_of_maxsim(scoring, monkeypatch, size):
    """Those of the plain tensor of all similarities, however many queries are computed at a time."""
    monkeypatch.setitem(MAXSIM_BYTES, "cpu", size)
    queries, passages, mask, expected = scoring
    weight = torch.linspace(-1, 1, expected.numel()).view_as(expected)  # (B, N)
    found, wanted = (tuple(part.clone().requires_grad_() for part in (queries, passages)) for _ in range(2))
    (maxsim(*found, mask) * weight).sum().backward()
    similarity = torch.einsum("bqd,nld->bnql", *wanted).masked_fill(~mask[None, :, None, :], -torch.inf)
    (similarity.amax(-1).sum(-1) * weight).sum().backward()
    for ours, plain in zip(found, wanted, strict=True):
        assert torch.allclose(ours.grad, plain.grad, atol=1e-4)


def test_maxsim_pairs(scoring):
    queries, passages, mask, expected = scoring
    own = torch.tensor([[0, 1], [2, 2], [3, 1]])  # (B, K)
    scores = maxsim_pairs(queries, passages[own], mask[own])
    assert torch.allclose(scores, expected.gather(1, own), atol=1e-4)


def test_maxsim_packed(scoring):
    queries, passages, mask, expected = scoring
    scores = maxsim_packed(queries, passages[mask], mask.sum(1))
    assert scores.shape == (3, 4) and scores.dtype == torch.float32 and torch.allclose(scores, expected, atol=1e-4)
    assert torch.allclose(maxsim_packed(queries[1:2], passages[2:3, 5], torch.tensor([1])), expected[1:2, 2:3])


# ----------------------------------------------------------------------------------------------------------- framing


def test_queries_are_framed(colbert):
    vocabulary = colbert.tokenizer.get_vocab()
    cls, sep, mask, marker = (vocabulary[token] for token in ("[CLS]", "[SEP]", "[MASK]", "[Q]"))
    texts = ["find the boat", "", "drum " * 29, "drum " * 30, "drum " * 600]
    ids, attention = colbert.frame_queries(*tokenize(colbert.tokenizer, texts, 32))
    assert ids.shape == attention.shape == (5, 32)
    drum, words = vocabulary["drum"], [vocabulary[word] for word in ("find", "the", "boat")]
    assert ids[0].tolist() == [cls, marker, *words, sep, *[mask] * 26]
    assert ids[1].tolist() == [cls, marker, sep, *[mask] * 29]
    assert ids[2].tolist() == ids[3].tolist() == ids[4].tolist() == [cls, marker, *[drum] * 29, sep]
    assert attention.tolist() == [[1] * n + [0] * (32 - n) for n in (6, 3, 32, 32, 32)]


def test_tokens_stored_longer_are_cut_the_same(colbert):
    """Word pieces cut to more than the model reads, as another model's tokens may be."""
    long = tokenize(colbert.tokenizer, ["drum " * 600, "boat"], 300)
    short = tokenize(colbert.tokenizer, ["drum " * 600, "boat"], 32)
    for a, b in zip(colbert.frame_queries(*long), colbert.frame_queries(*short), strict=True):
        assert torch.equal(a, b)
    short = tokenize(colbert.tokenizer, ["drum " * 600, "boat"], 180)
    for a, b in zip(colbert.frame_passages(*long), colbert.frame_passages(*short), strict=True):
        assert torch.equal(a, b)


def test_passages_are_framed(colbert):
    vocabulary = colbert.tokenizer.get_vocab()
    cls, sep, pad, marker = (vocabulary[token] for token in ("[CLS]", "[SEP]", "[PAD]", "[D]"))
    ids, attention = colbert.frame_passages(*tokenize(colbert.tokenizer, ["the boat.", "", "eagle"], 180))
    the, boat, dot, eagle = (vocabulary[word] for word in ("the", "boat", ".", "eagle"))
    assert ids.tolist() == [
        [cls, marker, the, boat, dot, sep],
        [cls, marker, sep, pad, pad, pad],
        [cls, marker, eagle, sep, pad, pad],
    ]
    assert attention.tolist() == [[1] * 6, [1] * 3 + [0] * 3, [1] * 4 + [0] * 2]
    ids, _ = colbert.frame_passages(*tokenize(colbert.tokenizer, ["eagle " * 600], 180))
    assert ids.tolist() == [[cls, marker, *[eagle] * 177, sep]]


def test_attend_to_mask_tokens(encoder_dir):
    colbert = ColBERT.from_base(encoder_dir, dim=16, attend_to_mask_tokens=True)
    ids, attention = colbert.frame_queries(*tokenize(colbert.tokenizer, ["boat"], 32))
    assert attention.sum() == 32 and (ids == colbert.tokenizer.mask_token_id).sum() == 28


def test_special_tokens_in_text_are_ordinary_text(colbert):
    for text in ("[MASK] [SEP] apple [D]", "[CLS]", "a[Q]b [PAD]"):
        values, lengths = tokenize(colbert.tokenizer, [text], 180)
        assert not set(values.tolist()) & set(colbert.tokenizer.all_special_ids), text
        assert lengths[0] == len(values) >= len(text.split())
    values, _ = tokenize(colbert.tokenizer, ["[m]"], 180)
    assert colbert.tokenizer.convert_ids_to_tokens(values) == ["[", "m", "]"]


def test_tokenize_equals_one_text_at_a_time(colbert):
    values, lengths = tokenize(colbert.tokenizer, TEXTS, 20)
    rows = np.split(values, np.cumsum(lengths)[:-1])
    for text, row in zip(TEXTS, rows, strict=True):
        ids = colbert.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert row.tolist() == ids[:17], text


def test_threads_share_a_tokenizer(encoder_dir):
    """Queries cut to 32 tokens in one thread, passages to 180 in another, and a user who pads and cuts as he likes."""
    colbert = ColBERT.from_base(encoder_dir, dim=16).eval()
    passages, sizes = ["house " * 170] * 64, range(5, 25)

    def of_passages() -> list[set]:
        return [set(colbert.tokenize(passages, "passage")[1].tolist()) for _ in sizes]

    def of_queries() -> list[set]:
        return [set(colbert.tokenize(["boat " * 100], "query")[1].tolist()) for _ in sizes for _ in range(20)]

    def of_user() -> list[int]:
        options = {"padding": "max_length", "truncation": True}
        return [len(colbert.tokenizer("house " * 9, max_length=n, **options)["input_ids"]) for n in sizes]

    with ThreadPoolExecutor(3) as threads:
        jobs = [threads.submit(work) for work in (of_passages, of_queries, of_user)]
        found = [job.result() for job in jobs]
    assert found == [[{170}] * 20, [{29}] * 400, list(sizes)]


def test_a_tokenizer_keeps_its_state(encoder_dir):
    """What its tokenizer.json says of cutting and padding is neither heeded nor changed."""
    tokenizer = load_tokenizer(encoder_dir)
    expected = [part.tolist() for part in tokenize(tokenizer, TEXTS, 180)]
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(5)
    backend.enable_padding(length=9)
    state = backend.to_str()
    for given in (tokenizer, backend, own_backend(tokenizer)):
        assert [part.tolist() for part in tokenize(given, TEXTS, 180)] == expected
    assert backend.to_str() == state and not backend.encode_special_tokens


# -------------------------------------------------------------------------------------------------------- embeddings


def embed_alone(colbert, text: str) -> tuple[torch.Tensor, list[int]]:
    """Embeddings of the kept tokens of one passage, fp32, and its token ids, without any of the batching."""
    ids = colbert.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    config = colbert.config
    ids = [config.cls_token_id, config.passage_marker_id, *ids[: config.doc_maxlen - FRAME], config.sep_token_id]
    with torch.no_grad():
        hidden = colbert.encoder(torch.tensor([ids]), torch.ones(1, len(ids))).last_hidden_state[0]
        vectors = hidden @ colbert.linear.weight.T
    vectors = vectors / vectors.norm(dim=-1, keepdim=True)
    punctuation = {i for i in ids if colbert.tokenizer.convert_ids_to_tokens(i).strip("\u2581\u0120") in PUNCTUATION}
    return vectors[[i not in punctuation for i in ids]], [i for i in ids if i not in punctuation]


PUNCTUATION = set(string.punctuation)


def test_padded_batch_equals_one_passage_at_a_time(colbert):
    ids, mask = colbert.frame_passages(*tokenize(colbert.tokenizer, TEXTS, 180))
    with torch.no_grad():
        together, kept = colbert.embed((ids, mask)), colbert.kept(ids, mask)
    for i, text in enumerate(TEXTS):
        alone, tokens = embed_alone(colbert, text)
        assert ids[i][kept[i]].tolist() == tokens, text
        assert torch.allclose(together[i][kept[i]], alone, atol=1e-5), text


def test_punctuation_is_dropped_and_the_frame_stays(colbert):
    ids, mask = colbert.frame_passages(*tokenize(colbert.tokenizer, ["boat, (drum)!", "?!..."], 180))
    kept = colbert.kept(ids, mask)
    tokens = [colbert.tokenizer.convert_ids_to_tokens(row[keep]) for row, keep in zip(ids, kept, strict=True)]
    assert tokens == [["[CLS]", "[D]", "boat", "drum", "[SEP]"], ["[CLS]", "[D]", "[SEP]"]]
    assert sorted(colbert.tokenizer.convert_ids_to_tokens(colbert.config.skiplist)) == sorted(string.punctuation)


def test_punctuation_can_be_kept(encoder_dir):
    colbert = ColBERT.from_base(encoder_dir, dim=16, mask_punctuation=False).eval()
    assert [len(vectors) for vectors in colbert.encode_passages(["boat, (drum)!", ""])] == [9, 3]
    assert colbert.kept_counts(*tokenize(colbert.tokenizer, ["boat, (drum)!", ""], 180)).tolist() == [9, 3]


@pytest.mark.parametrize("tokens_per_batch", [1, 200, 4096])
def test_embed_passages_equals_one_at_a_time(colbert, fp32, tokens_per_batch):
    pieces = tokenize(colbert.tokenizer, TEXTS, 180)
    embeddings, counts, padding = colbert.embed_passages(*pieces, tokens_per_batch)
    assert embeddings.dtype == np.float16 and 0 <= padding < 1
    assert (padding == 0) or tokens_per_batch > 1
    assert counts.tolist() == colbert.kept_counts(*pieces).tolist()
    for text, vectors in zip(TEXTS, np.split(embeddings, np.cumsum(counts)[:-1]), strict=True):
        assert np.allclose(vectors, embed_alone(colbert, text)[0], atol=1e-3), text


def test_embeddings_in_the_fast_type_are_close(colbert):
    for text, vectors in zip(TEXTS, colbert.encode_passages(TEXTS), strict=True):
        assert (vectors.float() * embed_alone(colbert, text)[0]).sum(-1).min() > 0.99, text


def test_kept_counts_of_tokens_cut_longer(colbert):
    pieces = tokenize(colbert.tokenizer, ["a . " * 300, "boat", "b " * 400], 1000)
    assert colbert.kept_counts(*pieces).tolist() == colbert.embed_passages(*pieces)[1].tolist() == [92, 4, 180]


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


def test_embeddings_that_are_not_to_be_used(encoder_dir):
    """The text is named: by its place in the call, and in the message for a notebook."""
    colbert = ColBERT.from_base(encoder_dir, dim=16).eval()
    texts = ["the boat", *["house " * n for n in range(1, 40)], "old eagle", "a drum"]  # 40 has the eagle
    eagle = colbert.tokenizer.convert_tokens_to_ids("eagle")
    table = colbert.encoder.get_input_embeddings().weight
    kept = table[eagle].clone()

    def refused(message: str, passage: int = 40) -> None:
        for embed in (colbert.encode_passages, colbert.encode_queries):
            for fp32 in (False, True):
                with pytest.raises(EmbeddingError, match=rf"{passage}: an embedding is {message}") as caught:
                    embed(texts, fp32=fp32)
                assert caught.value.passage == passage
        for size in (None, 50):
            with pytest.raises(EmbeddingError, match=message) as caught:
                colbert.embed_passages(*tokenize(colbert.tokenizer, texts, 180), size)
            assert caught.value.passage == passage

    with torch.no_grad():
        for value in (torch.nan, torch.inf):
            table[eagle] = value
            refused("not finite")
        table[eagle] = kept
        assert len(colbert.encode_passages(texts)) == 42
        colbert.linear.weight.zero_()
        texts = texts[:1]
        refused("not of unit length", 0)
        colbert.config.normalize = False  # zeros are then as good as others
        assert not colbert.encode_passages(texts)[0].any()
        colbert.linear.weight.normal_(std=1e5)  # what is over 65504 is not finite in fp16
        with pytest.raises(EmbeddingError, match="passage 0: an embedding is not finite"):
            colbert.encode_passages(texts)
        assert colbert.encode_passages(texts, fp32=True)[0].abs().max() > 65504


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


# ------------------------------------------------------------------------------------------------------ for a notebook


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that every loop over them runs several times."""
    monkeypatch.setattr(model_module, "TOKENS_PER_BATCH", {"cpu": 64})
    monkeypatch.setattr(model_module, "TEXTS_PER_CHUNK", 3)
    monkeypatch.setattr(model_module, "SCORE_TOKENS", {"cpu": 50})
    monkeypatch.setattr(model_module, "SCORE_QUERIES", 2)


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
    monkeypatch.setattr(model_module, "fast_dtype", lambda device: torch.bfloat16)
    for encode in (colbert.encode_queries, colbert.encode_passages):
        fast, full = encode(["find the boat"])[0].float(), encode(["find the boat"], fp32=True)[0]
        assert 1e-4 < (fast - full).abs().max() < 0.1
    with torch.no_grad():
        exact = colbert.embed(colbert.frame_queries(*tokenize(colbert.tokenizer, ["find the boat"], 32)))
    assert torch.equal(colbert.encode_queries(["find the boat"], fp32=True), exact)


@pytest.mark.parametrize("fill", (32, 0))
def test_queries_in_the_fast_type_are_close(colbert, fill, monkeypatch):
    monkeypatch.setattr(model_module, "fast_dtype", lambda device: torch.bfloat16)
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


# ------------------------------------------------------------------------------------------------- batches and weights


def test_length_batches():
    lengths = np.array([5, 180, 7, 7, 3, 60, 5])
    batches = length_batches(lengths, 20)
    assert sorted(np.concatenate(batches).tolist()) == list(range(7))
    assert [lengths[batch].tolist() for batch in batches] == [[180], [60], [7, 7], [5, 5, 3]]


def test_other_devices_have_a_batch_size(colbert, monkeypatch):
    monkeypatch.setattr(ColBERT, "device", torch.device("mps"))
    assert colbert.tokens_per_batch(10) > 0 and not colbert.packs()
    assert colbert.autocast()._enabled is False


def test_project_on_principal(encoder_dir, fp32):
    colbert = ColBERT.from_base(encoder_dir, dim=8).eval()
    texts = ["the old boat, and a drum", "eagle", "grape flute cloud", "apple apple house"]
    pieces = tokenize(colbert.tokenizer, texts, 180)
    colbert.project_on_principal(*pieces)
    weight = colbert.linear.weight.detach()
    assert torch.allclose(weight @ weight.T, torch.eye(8), atol=1e-5)
    ids, mask = colbert.frame_passages(*pieces)
    with torch.no_grad():
        hidden = colbert.encoder(ids, mask).last_hidden_state[colbert.kept(ids, mask)]
    hidden = torch.nn.functional.normalize(hidden, dim=-1)
    singular = torch.linalg.svdvals(hidden)
    assert torch.allclose((hidden @ weight.T).square().sum(), singular[:8].square().sum(), rtol=1e-4)


# ------------------------------------------------------------------------------------------------- in and out again


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
    assert model_fingerprint(tmp_path / "model") == model_fingerprint(tmp_path / "model")


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


def test_fingerprints(colbert, encoder_dir, tmp_path):
    assert tokenizer_fingerprint(load_tokenizer(encoder_dir)) == tokenizer_fingerprint(colbert.tokenizer)
    with pytest.raises(InputError, match=r"no model here .*run train\.py first"):
        model_fingerprint(tmp_path)
    colbert.save_pretrained(tmp_path)
    before = model_fingerprint(tmp_path)
    other = ColBERT.from_pretrained(tmp_path)
    with torch.no_grad():
        other.linear.weight[0, 0] += 1
    other.save_pretrained(tmp_path)
    assert model_fingerprint(tmp_path) != before


def test_mistakes(colbert, encoder_dir, tmp_path):
    with pytest.raises(InputError, match="none: no such folder"):
        ColBERT.from_base(str(tmp_path / "none"))
    for name in ("doc_maxlen", "query_maxlen"):
        ColBERT.from_base(encoder_dir, **{name: 512})
        with pytest.raises(InputError, match="takes 512 tokens, 600 were asked for"):
            ColBERT.from_base(encoder_dir, **{name: 600})
    meta = {"tokenizer": "x", "tokenizer_fingerprint": "other", "query_maxlen": 32, "doc_maxlen": 180}
    with pytest.raises(InputError, match="another tokenizer"):
        colbert.check_tokens("m", "t", meta)
    meta["tokenizer_fingerprint"] = tokenizer_fingerprint(colbert.tokenizer)
    colbert.check_tokens("m", "t", meta | {"doc_maxlen": 300})
    with pytest.raises(InputError, match=r"cut to doc_maxlen 100, m reads 180: run tsv2mmap\.py with --doc_maxlen 180"):
        colbert.check_tokens("m", "t", meta | {"doc_maxlen": 100})


def test_dropout_is_set_everywhere(encoder_dir):
    colbert = ColBERT.from_base(encoder_dir, dropout=0.25, attention_dropout=0.5)
    modules = {name: module.p for name, module in colbert.named_modules() if isinstance(module, torch.nn.Dropout)}
    of_attention = {rate for name, rate in modules.items() if name.endswith("attention.self.dropout")}
    others = {rate for name, rate in modules.items() if not name.endswith("attention.self.dropout")}
    assert of_attention == {0.5} and others == {0.25}
    settings = ColBERT.from_base(encoder_dir).config.encoder
    assert settings["hidden_dropout_prob"] == 0.1 and settings["attention_probs_dropout_prob"] == 0.0


# ------------------------------------------------------------------------------------------------------ other encoders

CORPUS = [
    "the old boat, and a drum! near (a) new house",
    "find the eagle; grape and flute.",
    "apple cloud \u00e9 \u65e5\u672c",
    string.punctuation,
]


def train_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of the kind that the encoder comes with, trained on a few lines."""
    special = {"bpe": ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"], "unigram": ["<s>", "<pad>", "</s>", "<unk>"]}
    if kind == "bpe":  # byte-level, as ModernBERT
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=special[kind], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        named = dict(
            zip(("pad_token", "cls_token", "sep_token", "mask_token", "unk_token"), special[kind], strict=True)
        )
    elif kind == "unigram":  # sentencepiece, as XLM-R: <mask> stands last
        backend = Tokenizer(models.Unigram())
        backend.normalizer = normalizers.NFKC()
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=[*special[kind], "<mask>"], unk_token="<unk>", show_progress=False
        )
        named = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
        named |= {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
    else:
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special["bpe"])
        named = dict(
            zip(("pad_token", "cls_token", "sep_token", "mask_token", "unk_token"), special["bpe"], strict=True)
        )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def modernbert(size, ids):
    return ModernBertModel(
        ModernBertConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            local_attention=16,
            max_position_embeddings=256,
            vocab_size=size,
            **ids,
        )
    )


def xlm_roberta(size, ids):
    ids = ids | {"bos_token_id": ids.pop("cls_token_id"), "eos_token_id": ids.pop("sep_token_id")}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 200, "type_vocab_size": 1}
    return XLMRobertaModel(
        XLMRobertaConfig(vocab_size=size, hidden_size=32, intermediate_size=48, **layers, pad_token_id=1)
    )


def distilbert(size, ids):
    return DistilBertModel(DistilBertConfig(vocab_size=size, dim=32, hidden_dim=48, n_layers=2, n_heads=2))


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
