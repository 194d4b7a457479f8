"""Teachers: each equals the plainest way to its scores, one pair at a time; rows; what is refused."""

import json
import shutil

import baselines
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from nanocolbert.cli import InputError
from nanocolbert.training import teachers
from nanocolbert.training.teachers import LateInteraction, combined, load_teacher, score_rows

QUERIES = ["the old boat", "eagle?", "find a new house near the drum and flute " * 3]
PASSAGES = ["a boat, and a house!", "eagle", "grape [SEP] flute", "", "cloud " * 40, "the drum; (old) -- apple's", "?!"]
ROWS = [(QUERIES[0], PASSAGES[:3]), (QUERIES[1], PASSAGES[1:]), (QUERIES[2], PASSAGES[::-1]), (QUERIES[0], PASSAGES)]


def save_cross_encoder(folder, encoder_dir, labels: int, kind=(BertConfig, BertForSequenceClassification), **settings):
    """A tiny random cross-encoder; weights are drawn wide, so that scores differ."""
    tokenizer = AutoTokenizer.from_pretrained(encoder_dir)
    torch.manual_seed(3)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = kind[0](vocab_size=len(tokenizer), initializer_range=0.5, num_labels=labels, **size, **settings)
    kind[1](config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory, encoder_dir):
    return save_cross_encoder(tmp_path_factory.mktemp("cross"), encoder_dir, 1)


def by_pairs(rows, score) -> list[list[float]]:
    """Scores of each row's passages, one pair at a time."""
    with torch.no_grad():
        return [[float(score(query, passage)) for passage in passages] for query, passages in rows]


def assert_near(found, wanted, tolerance=1e-5):
    assert [len(row) for row in found] == [len(row) for row in wanted]
    for row, expected in zip(found, wanted, strict=True):
        assert row.dtype == np.float32
        np.testing.assert_allclose(row, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=[1, 3])
def threads(request):
    """Batches of a few texts, of one thread, or shared by several."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teachers, "tokens_per_batch", lambda device, total: 40)
        yield
    torch.set_num_threads(before)


def test_cross_encoder_equals_one_pair_at_a_time(cross_encoder, threads):
    tokenizer = AutoTokenizer.from_pretrained(cross_encoder)
    model = AutoModelForSequenceClassification.from_pretrained(cross_encoder).eval()

    def score(query, passage):
        cut = {"truncation": True, "max_length": 24, "return_tensors": "pt", "split_special_tokens": True}
        pair = tokenizer([query], [passage], **cut)  # as lists: a lone "" would be no second text
        assert pair["input_ids"].shape[1] <= 24
        return model(**pair).logits[0, 0]

    found = score_rows(load_teacher(cross_encoder, max_tokens=24, fp32=True), ROWS)
    assert_near(found, by_pairs(ROWS, score))
    assert np.ptp(found[3]) > 0.1  # they tell passages apart
    assert found[0].tolist() == found[3][:3].tolist()  # the same pairs, scored once


def test_two_labels_are_a_difference(tmp_path, encoder_dir):
    roberta = RobertaConfig, RobertaForSequenceClassification
    settings = {"pad_token_id": 0, "max_position_embeddings": 130}
    folder = save_cross_encoder(tmp_path / "two", encoder_dir, 2, roberta, **settings)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()

    def score(query, passage):
        pair = tokenizer([query], [passage], return_tensors="pt", split_special_tokens=True)
        irrelevant, relevant = model(**pair).logits[0]
        return relevant - irrelevant

    assert_near(score_rows(load_teacher(folder, fp32=True), ROWS), by_pairs(ROWS, score))


def test_the_last_layer_is_in_fp32(cross_encoder, monkeypatch):
    """In bf16 logits of near 30 would be multiples of an eighth."""
    monkeypatch.setattr("nanocolbert.compute.fast_dtype", lambda device: torch.bfloat16)
    teacher, exact = load_teacher(cross_encoder), load_teacher(cross_encoder, fp32=True)
    for one in (teacher, exact):
        one.model.classifier.bias.data += 30
    found, wanted = (np.concatenate(score_rows(one, ROWS)) for one in (teacher, exact))
    assert 0 < np.abs(found - wanted).max() < 0.5
    assert not np.array_equal(found, torch.from_numpy(found).bfloat16().float().numpy())


def framed(encoder_dir, texts: list[str], max_tokens: int) -> list[torch.Tensor]:
    """Last hidden states (L, H) of each text, one at a time."""
    tokenizer, model = AutoTokenizer.from_pretrained(encoder_dir), baselines_model(encoder_dir)
    cut = {"truncation": True, "max_length": max_tokens, "return_tensors": "pt", "split_special_tokens": True}
    with torch.no_grad():
        return [model(**tokenizer(text, **cut)).last_hidden_state[0] for text in texts]


def baselines_model(folder):
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder).eval()


def slow_maxsim(query, passage) -> float:
    """Three loops, of unit vectors."""
    total = 0.0
    for q in query.tolist():
        best = -float("inf")
        for d in passage.tolist():
            dot, norms = sum(a * b for a, b in zip(q, d, strict=True)), sum(a * a for a in q) * sum(b * b for b in d)
            best = max(best, dot / norms**0.5)
        total += best
    return total


def test_own_similarity_equals_the_plain_way(encoder_dir, threads):
    states = dict(zip(QUERIES + PASSAGES, framed(encoder_dir, QUERIES + PASSAGES, 12), strict=True))

    def mean(query, passage):
        return torch.cosine_similarity(states[query].mean(0), states[passage].mean(0), dim=0)

    wanted = {
        "mean": by_pairs(ROWS, mean),
        "maxsim": by_pairs(ROWS, lambda query, passage: slow_maxsim(states[query], states[passage])),
    }
    for similarity, expected in wanted.items():
        teacher = load_teacher(encoder_dir, similarity, max_tokens=12, fp32=True)
        assert_near(score_rows(teacher, ROWS), expected)
    both = score_rows(load_teacher(encoder_dir, "sum", max_tokens=12, fp32=True), ROWS)
    parts = [[(np.array(row) - np.mean(row)) / np.std(row) for row in rows] for rows in wanted.values()]
    assert_near(both, [one + other for one, other in zip(*parts, strict=True)], 1e-3)


def test_packed_or_padded_is_the_same(encoder_dir, monkeypatch):
    teacher = load_teacher(encoder_dir, "maxsim", fp32=True)
    packed = score_rows(teacher, ROWS)
    monkeypatch.setattr(teachers, "packable", lambda *_: False)
    assert_near(score_rows(teacher, ROWS), packed)


def test_mean_is_the_baseline(encoder_dir):
    """The same vectors as scripts/baselines.py has, to what bf16 rounds where it is used."""
    encode = baselines.load_encoder(str(encoder_dir), 256, 3)
    vectors = {text: vector for texts in (QUERIES, PASSAGES) for text, vector in zip(texts, encode(texts), strict=True)}
    rows = [(query, [text for text in texts if "[SEP]" not in text]) for query, texts in ROWS]
    wanted = by_pairs(rows, lambda query, passage: vectors[query] @ vectors[passage])
    assert_near(score_rows(load_teacher(encoder_dir, "mean"), rows), wanted, 0.02)


def test_late_interaction_is_the_model(colbert, monkeypatch):
    monkeypatch.setattr(teachers, "PASSAGES", 2)
    found = score_rows(LateInteraction(colbert, fp32=True), ROWS)

    def score(query, passage):
        return colbert.score(colbert.encode_queries([query], True), colbert.encode_passages([passage], True))[0, 0]

    assert_near(found, by_pairs(ROWS, score))


def test_all_pairs_are_told(encoder_dir, colbert, cross_encoder):
    different = len({(query, passage) for query, passages in ROWS for passage in passages})
    for teacher in (load_teacher(encoder_dir, "sum"), load_teacher(cross_encoder), LateInteraction(colbert)):
        told = []
        score_rows(teacher, ROWS, told.append)
        assert sum(told) == different


def test_combined():
    assert combined(np.array([[3.0], [1.0]])).tolist() == [3, 1]
    scores = np.array([[0.9, 10.0], [0.7, 30.0], [0.5, 20.0]])
    scaled = scores * [1, 1000] + [5, -7]  # the scale of each says nothing
    assert combined(scores) == pytest.approx(combined(scaled)) and combined(scores).argmax() == 1
    assert np.abs(combined(np.array([[0.5, 9.0], [0.5 + 1e-7, 9.0]]))).max() < 1e-3  # rounding stays small
    assert combined(np.array([[0.5, 9.0]])).tolist() == [0]


def change(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


@pytest.mark.parametrize(
    "similarity, max_tokens, labels, damage, message",
    [
        ("mean", None, 1, None, "a cross-encoder, which scores by itself"),
        (None, 999, 1, None, "takes 512 tokens, --max_tokens 999 were asked for"),
        (None, None, 3, None, "3 labels, where a score is wanted"),
        (None, None, 1, {"hidden_size": 32}, "weight bert.embeddings.LayerNorm.bias is missing, or of another shape"),
        (None, None, 1, {"auto_map": {"AutoModel": "m.M"}}, "auto_map: it asks for code of its own"),
        (None, None, 1, {"architectures": ["BertModel"]}, "an encoder, neither a cross-encoder nor a ColBERT"),
        (None, None, 1, {"num_hidden_layers": 3}, "is missing, or of another shape"),
    ],
)
def test_what_is_refused(tmp_path, encoder_dir, similarity, max_tokens, labels, damage, message):
    folder = save_cross_encoder(tmp_path / "cross", encoder_dir, labels)
    if damage:
        change(folder, **damage)
    with pytest.raises(InputError, match=message) as error:
        load_teacher(folder, similarity, max_tokens)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_weights_that_are_damaged(tmp_path, encoder_dir):
    folder = shutil.copytree(encoder_dir, tmp_path / "encoder")
    model = baselines_model(folder)
    model.encoder.layer[1].output.dense.bias.data[3] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(InputError, match=r"weight encoder.layer.1.output.dense.bias is not finite"):
        load_teacher(folder, "mean")
    teacher = load_teacher(encoder_dir, "mean")
    teacher.encoder.embeddings.word_embeddings.weight.data.fill_(float("inf"))
    with pytest.raises(InputError, match="a score that is not finite"):
        score_rows(teacher, ROWS)
