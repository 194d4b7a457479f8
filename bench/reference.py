"""How nanoColBERT does each stage, as plain functions, to be measured beside ours on the same input.

Written from what https://github.com/Hannibal046/nanoColBERT does (commit 57d0134; tokenising: 2b3ff8a), not copied:
the choices that cost time, memory or results are kept, and named in the docstrings. It runs on the weights, the
libraries and the machine that ours runs on; where the reference had slower ones, that is to its advantage here.
"""

import contextlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

from nanocolbert.text import MARKERS


def load_tokenizer(name_or_path):
    """A fast tokenizer that knows [Q] and [D] in the text it is given."""
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKERS.values())})
    return tokenizer


def tokenize_padded(tokenizer, texts: list[str], marker: str, maxlen: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask (B, maxlen): every text is filled up to the longest there may be."""
    texts = [f"{marker} {text}" for text in texts]
    out = tokenizer(texts, padding="max_length", truncation=True, max_length=maxlen, return_tensors="pt")
    return out["input_ids"], out["attention_mask"]


# --------------------------------------------------------------------------------------------------------- tokenising


def tokenize_triples(path, n_triples: int, folder, tokenizer, query_maxlen=32, doc_maxlen=180, batch=10_000) -> int:
    """Tokenise the three texts of every triple into three padded int16 memmaps; returns their bytes.

    A text is tokenised and stored as often as it occurs, at full length.
    """
    widths = {"queries": query_maxlen, "positives": doc_maxlen, "negatives": doc_maxlen}
    stores = {
        name: np.memmap(Path(folder) / f"{name}.mmap", np.int16, "w+", shape=(n_triples, width))
        for name, width in widths.items()
    }

    def convert(rows: list[list[str]], start: int) -> None:
        columns = zip(*rows, strict=True)
        for (name, width), texts in zip(widths.items(), columns, strict=True):
            marker = MARKERS["query" if name == "queries" else "passage"]
            ids, _ = tokenize_padded(tokenizer, texts, marker, width)
            if name == "queries":
                ids[ids == tokenizer.pad_token_id] = tokenizer.mask_token_id
            stores[name][start : start + len(rows)] = ids.numpy().astype(np.int16)

    rows, done = [], 0
    with open(path) as file:
        for line in file:
            rows.append(line.strip().split("\t"))
            if len(rows) == batch:
                convert(rows, done)
                rows, done = [], done + batch
    if rows:
        convert(rows, done)
    for store in stores.values():
        store.flush()
    return sum(store.nbytes for store in stores.values())


# ---------------------------------------------------------------------------------------------------------- embedding


@torch.no_grad()
def embed_passages(model, ids: Tensor, mask: Tensor, batch: int = 1024) -> tuple[Tensor, list[int]]:
    """Embed padded passages (N, maxlen) in the order of the collection; returns (T', D) fp16 and their lengths.

    fp32 throughout; fixed batches, every position computed, padding too; a list with one tensor a passage.
    """
    skiplist = torch.tensor([model.config.pad_token_id, *model.config.skiplist], device=model.device)
    passages = []
    for start in range(0, len(ids), batch):
        batch_ids = ids[start : start + batch].to(model.device)
        hidden = model.encoder(batch_ids, mask[start : start + batch].to(model.device)).last_hidden_state
        kept = ~(batch_ids.unsqueeze(-1) == skiplist).any(-1)  # (B, maxlen)
        embeddings = F.normalize(model.linear(hidden) * kept.unsqueeze(-1).float(), dim=2)  # (B, maxlen, D)
        embeddings, kept = embeddings.cpu().half(), kept.cpu()
        passages.extend(embeddings[row][kept[row]] for row in range(len(embeddings)))
    return torch.cat(passages), [len(passage) for passage in passages]


# ----------------------------------------------------------------------------------------------------------- training


def train_step(model, optimizer, queries: tuple[Tensor, Tensor], passages: tuple[Tensor, Tensor], dtype) -> Tensor:
    """One step on triples: queries (B, 32) and passages (2 B, maxlen), all positives before all negatives.

    Every position computed, padding too; -|q - d|^2 on a tensor (2 B, Lq, Ld, D); punctuation and padding are zero
    vectors, which take part in the maximum; the loss is waited for in every step. fp32, or fp16 autocast on a GPU.
    """
    with torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32):
        Q = F.normalize(model.linear(model.encoder(*queries).last_hidden_state), dim=2).repeat(2, 1, 1)  # (2 B, Lq, D)
        hidden = model.linear(model.encoder(*passages).last_hidden_state)  # (2 B, Ld, D)
        skiplist = torch.tensor([model.config.pad_token_id, *model.config.skiplist], device=model.device)
        kept = ~(passages[0].unsqueeze(-1) == skiplist).any(-1)  # (2 B, Ld)
        P = F.normalize(hidden * kept.unsqueeze(2).float(), dim=2)
        distances = ((Q.unsqueeze(2) - P.unsqueeze(1)) ** 2).sum(-1)  # (2 B, Lq, Ld)
        scores = (-distances).max(-1).values.sum(-1).view(2, -1).T  # (B, 2)
        loss = F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long, device=model.device))
    loss.item()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


# ---------------------------------------------------------------------------------------------------------- retrieval


class Retriever:
    """Everything in memory: all embeddings as one tensor, and Python lists from embeddings to passages and back."""

    def __init__(self, index, embeddings: np.ndarray, lengths: np.ndarray, doc_maxlen: int = 180):
        self.index, self.doc_maxlen, self.lengths = index, doc_maxlen, lengths.tolist()
        # The gather below reads doc_maxlen rows from a passage's first, past the end for the last passages: the
        # reference's own code stops there. Rows of zeros after the end let it run.
        rest = np.zeros((doc_maxlen, embeddings.shape[1]), embeddings.dtype)
        self.embeddings = torch.from_numpy(np.concatenate([embeddings, rest]))
        self.passage_of = [0] * len(embeddings)  # one Python int an embedding
        self.first_of = [0] * len(self.lengths)
        start = 0
        for passage, length in enumerate(self.lengths):
            for position in range(start, start + length):
                self.passage_of[position] = passage
            self.first_of[passage] = start
            start += length

    @torch.no_grad()
    def search(self, query: Tensor, k: int, nprobe: int, faiss_depth: int) -> tuple[list[int], list[float]]:
        """Rows and scores of the best k passages for one query (Lq, D).

        FAISS's -1 is read as the last embedding; candidates are gathered at doc_maxlen rows each, whatever their
        length; a masked position counts as similarity 0 in the maximum.
        """
        self.index.nprobe = nprobe
        _, neighbours = self.index.search(query.numpy(), faiss_depth)  # (Lq, faiss_depth)
        passages = list({self.passage_of[position] for row in neighbours for position in row})
        lengths = torch.tensor([self.lengths[passage] for passage in passages])
        mask = torch.arange(self.doc_maxlen).unsqueeze(0) < lengths.unsqueeze(-1)  # (N, doc_maxlen)
        first = torch.tensor([self.first_of[passage] for passage in passages])
        rows = (first.unsqueeze(-1) + torch.arange(self.doc_maxlen)).view(-1)
        gathered = self.embeddings[rows].view(len(passages), self.doc_maxlen, -1).to(query.dtype)
        similarity = (gathered @ query.T.unsqueeze(0)) * mask.unsqueeze(-1)  # (N, doc_maxlen, Lq)
        ordered = similarity.max(1).values.sum(-1).sort(descending=True)
        return torch.tensor(passages)[ordered.indices][:k].tolist(), ordered.values[:k].tolist()


@contextlib.contextmanager
def fp32(model):
    """Let a model compute in fp32 while the block runs, as the reference does."""
    model.autocast = contextlib.nullcontext
    try:
        yield
    finally:
        del model.autocast
