"""Texts, tokenizers and encoders for the tests of the model, and what it computes in the plainest way."""

import string

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

from nanocolbert.text import FRAME

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
PUNCTUATION = set(string.punctuation)
CORPUS = [
    "the old boat, and a drum! near (a) new house",
    "find the eagle; grape and flute.",
    "apple cloud \u00e9 \u65e5\u672c",
    string.punctuation,
]


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
