"""ColBERT: late interaction over contextual token embeddings (Khattab and Zaharia, arXiv 2004.12832).

    model = ColBERT.from_pretrained("experiments/demo/model")
    queries = model.encode_queries(["what is late interaction?"])       # (B, Lq, D)
    passages = model.encode_passages(["ColBERT encodes ...", "..."])    # list of (Ld, D)
    model.score(queries, passages)                                      # (B, N)
    model.rank("what is late interaction?", passages, k=1)              # [(position, score)], the best first

Shapes: B queries, N passages, Lq and Ld tokens of one query and one passage, T tokens in all, H hidden, D dim.
Everything that frames, encodes or scores text is here, once: training, embedding and search call it.
"""

import json
import string
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from nanocolbert.cli import InputError
from nanocolbert.compute import by_threads, default_device, fast_dtype, map_alone
from nanocolbert.encoder.attention import Packed, compute_dtype, encode_packed, pack, packable
from nanocolbert.encoder.pretrained import (
    check_vocabulary,
    check_weights,
    drop_pooler,
    load_config,
    load_encoder,
    load_tokenizer,
    locate,
    longest_input,
    own_attention,
    read_weights,
    set_dropout,
    special_token_ids,
)
from nanocolbert.maxsim import maxsim_packed
from nanocolbert.storage.artifact import fingerprint
from nanocolbert.storage.checksums import share
from nanocolbert.storage.ragged import length_batches, neighbours, ranges
from nanocolbert.text import FRAME, MARKERS, own_backend, prepare_texts, tokenize

TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 131072}  # embedded at a time; a small batch stays in the cache
TEXTS_PER_CHUNK = 1024  # texts tokenised at a time: what the tokenizer gives back takes hundreds of bytes a token
SCORE_QUERIES, SCORE_TOKENS = 16, {"cpu": 4096, "cuda": 1 << 20}  # scored at a time, as retrieve.py does
PROGRESS_AFTER = 5  # seconds after which a bar appears by itself
MODES = threading.Lock()  # held while a model's modules change between training and not
NEAR_UNIT = 0.01  # an embedding's length may differ so much from 1: of zeros, as a damaged projection gives, it is 0


class EmbeddingError(InputError):
    """An embedding that is not to be used; `passage` counts the texts of the call from 0."""

    def __init__(self, message: str, passage: int):
        super().__init__(message)
        self.passage = passage


class ColBERTConfig(PreTrainedConfig):
    """What is needed to give the same vectors again: the encoder's own config and how text is framed.

    encoder: config of the Hugging Face encoder, as a dict with its `model_type`.
    dim: size of a token embedding. query_maxlen, doc_maxlen: tokens with the special ones.
    mask_punctuation: drop the embeddings of punctuation in passages; `skiplist` holds the token ids dropped.
    attend_to_mask_tokens: whether the [MASK] fill of a query is attended to (v1: no).

    What training here leaves as it is, and checkpoints of other libraries may not (nanocolbert/checkpoints/):
    expand_queries_to: queries are filled with [MASK] to so many tokens (None: to query_maxlen; 0: not at all).
    query_marker_id, passage_marker_id: the token after [CLS] (None: there is none).
    query_prompt, passage_prompt: put before each text. strip_texts: white space around it is cut off.
    dense: the layers from hidden to `dim`, one dict each (see `Dense`); None is one linear layer without bias.
    normalize: embeddings have unit length.
    """

    model_type = "colbert"

    def __init__(
        self,
        encoder: dict | None = None,
        dim: int = 128,
        query_maxlen: int = 32,
        doc_maxlen: int = 180,
        mask_punctuation: bool = True,
        attend_to_mask_tokens: bool = False,
        query_marker_id: int | None = None,
        passage_marker_id: int | None = None,
        cls_token_id: int | None = None,
        mask_token_id: int | None = None,
        skiplist: tuple[int, ...] | list[int] = (),
        expand_queries_to: int | None = None,
        query_prompt: str = "",
        passage_prompt: str = "",
        strip_texts: bool = False,
        dense: list[dict] | None = None,
        normalize: bool = True,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.encoder = encoder
        self.dim = dim
        self.query_maxlen = query_maxlen
        self.doc_maxlen = doc_maxlen
        self.mask_punctuation = mask_punctuation
        self.attend_to_mask_tokens = attend_to_mask_tokens
        self.query_marker_id = query_marker_id
        self.passage_marker_id = passage_marker_id
        self.cls_token_id = cls_token_id
        self.mask_token_id = mask_token_id
        self.skiplist = list(skiplist)
        self.expand_queries_to = query_maxlen if expand_queries_to is None else expand_queries_to
        self.query_prompt = query_prompt
        self.passage_prompt = passage_prompt
        self.strip_texts = strip_texts
        self.dense = dense
        self.normalize = normalize

    def frame(self, kind: str) -> tuple[list[int], int]:
        """The special tokens around the word pieces of a query or a passage: those before, and [SEP]."""
        marker = self.query_marker_id if kind == "query" else self.passage_marker_id
        return [self.cls_token_id, *([] if marker is None else [marker])], self.sep_token_id

    def pieces(self, kind: str) -> int:
        """How many word pieces of a query or a passage fit beside the special tokens."""
        maxlen = self.query_maxlen if kind == "query" else self.doc_maxlen
        return maxlen - len(self.frame(kind)[0]) - 1

    def texts(self) -> dict:
        """How a text is prepared before it is cut into word pieces: arguments of `prepare_texts`."""
        return {"query": self.query_prompt, "passage": self.passage_prompt, "strip": self.strip_texts}


AutoConfig.register("colbert", ColBERTConfig)  # so that a tokenizer loads from a ColBERT folder without a warning


# ---------------------------------------------------------------------------------------------------- text to tokens


def tokenizer_fingerprint(tokenizer) -> str:
    """Fingerprint of what turns text into word pieces; the same before and after [Q] and [D] are added."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    return fingerprint(*(json.dumps(parts[key], sort_keys=True) for key in ("normalizer", "pre_tokenizer", "model")))


def punctuation_ids(tokenizer) -> list[int]:
    """Ids of the tokens that are one symbol of string.punctuation, alone or after a space."""
    ids = set()
    for symbol in string.punctuation:
        spellings = [tokenizer.encode(text, add_special_tokens=False) for text in (symbol, " " + symbol)]
        ids.update(spelling[0] for spelling in spellings if len(spelling) == 1)
        if symbol in tokenizer.get_vocab():
            ids.add(tokenizer.convert_tokens_to_ids(symbol))
    return sorted(ids - set(tokenizer.all_special_ids))


# ------------------------------------------------------------------------------------------------------------- model


class Dense(nn.Module):
    """A layer between the encoder and the embeddings that is more than a matrix: activation(Wx + b), plus a residual.

    activation: name of a class of torch.nn. residual: add the input, through a matrix where its size differs.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, activation: str, residual: bool):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.activation = getattr(nn, activation)()
        self.add_input = residual
        if residual and in_features != out_features:
            self.residual = nn.Linear(in_features, out_features, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (..., in_features); returns (..., out_features)."""
        out = self.activation(self.linear(hidden))
        if not self.add_input:
            return out
        return out + (self.residual(hidden) if hasattr(self, "residual") else hidden)


class ColBERT(PreTrainedModel):
    """An encoder, a linear layer to `dim` without bias, and L2 normalisation; the tokenizer comes along."""

    config_class = ColBERTConfig
    base_model_prefix = "colbert"
    _supports_sdpa = True

    def __init__(self, config: ColBERTConfig, tokenizer=None, encoder: nn.Module | None = None):
        """A model with a new projection, around an encoder, or a new one of `config.encoder`."""
        super().__init__(config)
        if encoder is None:
            encoder = AutoModel.from_config(AutoConfig.for_model(**config.encoder))
            drop_pooler(encoder)
        for module in encoder.modules():
            module._is_hf_initialized = True  # else post_init would draw its weights again
        own_attention(encoder)
        self.encoder = encoder
        if config.dense is None:
            self.linear = nn.Linear(encoder.config.hidden_size, config.dim, bias=False)
        else:
            self.linear = nn.Sequential(*(Dense(**layer) for layer in config.dense))
        self.tokenizer = tokenizer
        self.meta = None  # what meta.json says of the training, where the model came with one
        self._encoding, self._in_training = 0, []  # see `without_dropout`
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # Rows of the projection begin orthonormal, which keeps most of the encoder's geometry (the encoder
        # initialises itself). Called for what a checkpoint lacks, never for what it has.
        if module is getattr(self, "linear", None) and isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight)

    @classmethod
    def from_base(
        cls, base_model: str, dropout: float | None = None, attention_dropout: float | None = 0.0, **settings
    ) -> "ColBERT":
        """A new ColBERT on a Hugging Face encoder: adds [Q] and [D] (they begin as the mean embedding) and `linear`.

        dropout, attention_dropout: replace the encoder's rates, unless None. settings: fields of ColBERTConfig.
        Raises InputError where the encoder or its tokenizer cannot be loaded, or not used.
        """
        folder = locate(base_model)
        tokenizer, encoder_config = load_tokenizer(folder), load_config(folder)
        set_dropout(encoder_config, dropout, attention_dropout)
        encoder = load_encoder(base_model, encoder_config, read_weights(folder))
        check_vocabulary(base_model, tokenizer, encoder)
        tokenizer.add_special_tokens({"additional_special_tokens": list(MARKERS.values())})
        table = encoder.get_input_embeddings().weight
        mean = table.detach()[: len(tokenizer) - len(MARKERS)].mean(0)
        encoder.resize_token_embeddings(max(len(tokenizer), len(table)), mean_resizing=False)
        marker_ids = {kind: tokenizer.convert_tokens_to_ids(marker) for kind, marker in MARKERS.items()}
        with torch.no_grad():
            encoder.get_input_embeddings().weight[list(marker_ids.values())] = mean
        settings |= {"query_marker_id": marker_ids["query"], "passage_marker_id": marker_ids["passage"]}
        check_weights(encoder, base_model)
        return cls.on_encoder(base_model, encoder, tokenizer, skiplist=punctuation_ids(tokenizer), **settings)

    @classmethod
    def on_encoder(cls, name, encoder: nn.Module, tokenizer, **settings) -> "ColBERT":
        """A ColBERT around an encoder in memory, its projection new; `name` is for messages.

        settings: fields of ColBERTConfig. Raises InputError where they ask for more tokens than the encoder takes, or
        for tokens that it has not, and where encoder and tokenizer are not of one model.
        """
        check_vocabulary(name, tokenizer, encoder)
        unknown = settings.keys() - {*ColBERTConfig().to_dict(), *special_token_ids(tokenizer)}
        if unknown:
            raise InputError(f"{name}: {min(unknown)} is no setting of a ColBERT model")
        config = ColBERTConfig(encoder=encoder.config.to_dict(), **{**special_token_ids(tokenizer), **settings})
        longest, asked = longest_input(encoder), max(config.query_maxlen, config.doc_maxlen)
        if asked > longest:
            raise InputError(f"{name}: takes {longest} tokens, {asked} were asked for")
        ids = [*config.skiplist, *config.frame("query")[0], *config.frame("passage")[0], config.mask_token_id]
        n = len(encoder.get_input_embeddings().weight)
        if max(ids) >= n:
            raise InputError(
                f"{name}: token {max(ids)} is put into texts, or dropped, but its encoder has {n} embeddings"
            )
        return cls(config, tokenizer, encoder)

    @classmethod
    def from_pretrained(cls, name_or_path, revision: str | None = None, device=None, **others) -> "ColBERT":
        """Load weights, settings and tokenizer of a checkpoint of any layout , fp32, in eval mode.

        name_or_path: a folder, v1's .dnn file, or a name on the hub, of which `revision` picks a version. device: where
        to; by default the GPU if there is one.
        Raises InputError where the checkpoint cannot be honoured to the letter, and for Hugging Face's other options.
        """
        from nanocolbert.checkpoints import layouts  # here, because it reads this module

        if others.pop("trust_remote_code", False):
            raise InputError(f"{name_or_path}: trust_remote_code: no code of a checkpoint is run here")
        if others:
            raise InputError(f"{name_or_path}: {min(others)} is no option here: give revision and device at most")
        return layouts.load(cls, name_or_path, revision).to(device or default_device())

    def save_pretrained(self, path, *args, layout: str = "nanocolbert", **kwargs) -> None:
        """Write weights, settings and tokenizer into one folder, for the library that `layout` names.

        layout: one of layouts.LAYOUTS. Weights that are there go, and a meta.json, which tells of them.
        Raises InputError where that layout cannot say what this model does, and where a weight is not finite.
        """
        check_weights(self, path)
        if Path(path).is_file():
            raise InputError(f"{path}: a file, not a folder: give another")
        (Path(path) / "meta.json").unlink(missing_ok=True)
        before = {file: file.stat().st_mtime_ns for file in Path(path).glob("model*.safetensors*")}
        if layout == "nanocolbert":
            super().save_pretrained(path, *args, **kwargs)
            self.tokenizer.save_pretrained(path)
        else:
            from nanocolbert.checkpoints import layouts

            layouts.save(self, path, layout)
        for file, time in before.items():  # one file, or several: those that were not written anew
            if file.exists() and file.stat().st_mtime_ns == time:
                file.unlink()
        share(path)

    def push_to_hub(self, repo_id: str, layout: str = "nanocolbert", **kwargs) -> str:
        """Upload the model and its card to the hub; kwargs of HfApi.create_repo. Returns the repository's address."""
        from nanocolbert.checkpoints import layouts

        return layouts.push(self, repo_id, layout, **kwargs)

    @property
    def tokenizer(self):
        """The tokenizer of transformers, whose state we leave alone, as others may set it; set it again if changed."""
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer) -> None:
        self._tokenizer, self.backend = tokenizer, None if tokenizer is None else own_backend(tokenizer)

    @contextmanager
    def without_dropout(self):
        """No module is in training mode until the block ends, of any thread's; then those are that were."""
        with MODES:
            self._encoding += 1
            training = [module for module in self.modules() if module.training]
            self._in_training += training
            for module in training:
                module.training = False
        try:
            yield
        finally:
            with MODES:
                self._encoding -= 1
                if not self._encoding:
                    for module in self._in_training:
                        module.training = True
                    self._in_training = []

    # ------------------------------------------------------------------------------------------- tokens to embeddings

    def frame_queries(self, values: np.ndarray, lengths: np.ndarray) -> tuple[Tensor, Tensor]:
        """[CLS] [Q] w1 ... wn [SEP], filled with [MASK] to query_maxlen (paper, section 3.2).

        values (T,), lengths (B,): word-piece ids, cut to fit. Returns input_ids (B, Lq) and attention_mask (B, Lq).
        Where queries are filled to less (`expand_queries_to`), longer ones make the rest of the batch padded.
        """
        config, fill = self.config, self.config.expand_queries_to
        longest = len(config.frame("query")[0]) + int(lengths.max(initial=0)) + 1
        ids, mask = frame(values, lengths, config, "query", max(fill, min(longest, config.query_maxlen)))
        ids[:, :fill][mask[:, :fill] == 0] = config.mask_token_id
        if config.attend_to_mask_tokens:
            mask[:, :fill] = 1
        return ids, mask

    def frame_passages(self, values: np.ndarray, lengths: np.ndarray) -> tuple[Tensor, Tensor]:
        """[CLS] [D] w1 ... wn [SEP], padded to the longest. Arguments and result as of `frame_queries`."""
        config = self.config
        width = min(config.doc_maxlen, len(config.frame("passage")[0]) + int(lengths.max()) + 1)
        return frame(values, lengths, config, "passage", width)

    def tokenize(self, texts: list[str], kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Word-piece ids (T,) int32 and lengths (n,) of queries or passages, as `frame_queries` or `_passages` want."""
        return tokenize(self.backend, prepare_texts(texts, kind, self.config.texts()), self.config.pieces(kind) + FRAME)

    def embed(self, texts: tuple[Tensor, Tensor] | Packed) -> Tensor:
        """Unit token embeddings, fp32: (B, L, D) of framed texts, or (T, D) of packed ones."""
        if isinstance(texts, Packed):
            hidden = encode_packed(self.encoder, texts)  # (T, H)
        else:
            input_ids, attention_mask = texts
            hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (B, L, H)
        embeddings = self.linear(hidden).float()
        return F.normalize(embeddings, dim=-1) if self.config.normalize else embeddings

    def scored(self, attention_mask: Tensor) -> Tensor:
        """Which positions of framed queries (B, Lq) score: the tokens and the [MASK] fill.

        The others only pad a query to the longest of its batch, where queries are not filled to query_maxlen.
        """
        scored = attention_mask.bool()
        scored[:, : self.config.expand_queries_to] = True
        return scored

    def embed_queries(self, texts: tuple[Tensor, Tensor]) -> Tensor:
        """Embeddings (B, Lq, D) of framed queries, on the host; rows of zeros where nothing scores: they add 0.

        Raises EmbeddingError, as `embed_passages`, of the query.
        """
        (ids, mask), scored = texts, self.scored(texts[1])
        with self.without_dropout():
            if self.device.type == "cpu" and self.packs():
                embeddings = torch.zeros(*ids.shape, self.config.dim)  # (B, Lq, D)
                embeddings[scored] = self.embed(pack((ids, mask, scored)))  # (T, D)
            else:
                embeddings = self.embed(to_device(texts, self.device)).cpu() * scored[..., None]
        if not bool(self.are_sound(embeddings[scored])):
            self.name_unsound(embeddings[scored], scored.sum(1).numpy())
        return embeddings

    def are_sound(self, embeddings: Tensor) -> Tensor:
        """Whether embeddings (T, D) are all finite, and of unit length where they should be: a scalar on their device.

        What cannot be in fp16, if it is that, is infinite.
        """
        if self.config.normalize:
            lengths = torch.linalg.vector_norm(embeddings, dim=-1, dtype=torch.float32)  # (T,)
            return ((lengths - 1).abs() < NEAR_UNIT).all()
        return embeddings.isfinite().all()

    def name_unsound(self, embeddings: Tensor, counts: np.ndarray) -> None:
        """Raise EmbeddingError for the first text whose embeddings are not `are_sound`: (T, D) in all, counts (N,)."""
        for passage, part in enumerate(embeddings.split(counts.tolist())):
            if not self.are_sound(part):
                what = "not finite" if not part.isfinite().all() else "not of unit length"
                raise EmbeddingError(
                    f"an embedding is {what}: the model's weights are damaged, or too large for {part.dtype}", passage
                )

    def kept(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Which passage tokens are stored and scored (B, L): the real ones that are no punctuation."""
        if not self.config.mask_punctuation:
            return attention_mask.bool()
        skiplist = torch.tensor(self.config.skiplist, device=input_ids.device)
        return attention_mask.bool() & ~torch.isin(input_ids, skiplist)

    @torch.inference_mode()
    def project_on_principal(self, values: np.ndarray, lengths: np.ndarray) -> None:
        """Set the rows of `linear` to the principal directions of the encoder's token embeddings on some passages.

        values (T,), lengths (N,): word pieces. Of all projections to `dim`, this one keeps most of the encoder's
        similarities, which a short training cannot make up for.
        """
        starts = np.cumsum(lengths) - lengths

        @torch.inference_mode()
        def moments(rows) -> Tensor:  # (H, H)
            framed = self.frame_passages(values[ranges(starts[rows], lengths[rows])], lengths[rows])
            ids, mask = (part.to(self.device) for part in framed)
            kept = self.kept(ids, mask)  # (B, L)
            with self.autocast():
                if self.device.type == "cpu" and self.packs():
                    hidden = encode_packed(self.encoder, pack((ids, mask, mask)))[kept[mask.bool()]]  # (T', H)
                else:
                    hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state[kept]
            hidden = F.normalize(hidden.float(), dim=-1)
            return hidden.T @ hidden

        batches = length_batches(lengths + FRAME, self.tokens_per_batch(int((lengths + FRAME).sum())))
        with self.without_dropout():
            moments = sum(map_alone(moments, batches, device=self.device))
        self.linear.weight.copy_(torch.linalg.eigh(moments).eigenvectors[:, -self.config.dim :].T)

    def kept_counts(self, values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """How many embeddings each passage will have (N,) int64, from its word pieces: values (T,), lengths (N,)."""
        keep = np.ones(len(self.encoder.get_input_embeddings().weight), np.int64)
        if self.config.mask_punctuation:
            keep[self.config.skiplist] = 0
        before = np.concatenate([[0], np.cumsum(keep[values])])  # (T + 1,) kept tokens before each token
        starts = np.cumsum(lengths) - lengths
        head, sep = self.config.frame("passage")
        framing = int(keep[[*head, sep]].sum())
        return before[starts + np.minimum(lengths, self.config.pieces("passage"))] - before[starts] + framing

    def check_ids(self, path, values: np.ndarray) -> None:
        """Raise InputError, naming the file `path`, where the model has no embedding for a word piece of (T,)."""
        known = len(self.encoder.get_input_embeddings().weight)
        if len(values) and values.max() >= known:
            raise InputError(
                f"{path}: word piece {values.max()}, the model knows {known}: damaged, or of another tokenizer: run "
                "tsv2mmap.py again"
            )

    def check_tokens(self, name, tokens_dir, tokens_meta: dict) -> None:
        """Raise InputError unless the tokens were made by this model's tokenizer and cut no shorter than it reads."""
        if tokenizer_fingerprint(self.tokenizer) != tokens_meta["tokenizer_fingerprint"]:
            raise InputError(
                f"{tokens_dir}: tokenised by {tokens_meta['tokenizer']}, another tokenizer than {name}'s: "
                f"run tsv2mmap.py with --tokenizer {name}"
            )
        as_read = self.config.texts()
        if as_read != tokens_meta.get("texts", ColBERTConfig().texts()):
            raise InputError(
                f"{tokens_dir}: without the prompts that {name} puts before texts, {as_read}: "
                f"run tsv2mmap.py with --tokenizer {name}"
            )
        for kind, setting in (("query", "query_maxlen"), ("passage", "doc_maxlen")):
            wanted, found = self.config.pieces(kind) + FRAME, tokens_meta[setting]  # tsv2mmap.py leaves room for FRAME
            if wanted > found:
                raise InputError(
                    f"{tokens_dir}: cut to {setting} {found}, {name} reads {wanted}: "
                    f"run tsv2mmap.py with --{setting} {wanted}"
                )

    def check_tokenizer(self, where, meta: dict) -> None:
        """Raise InputError unless this model's tokenizer made what lies at `where` (which may not say) of this meta."""
        found = meta.get("tokenizer_fingerprint")
        if found is not None and found != tokenizer_fingerprint(self.tokenizer):
            raise InputError(
                f"{where}: made with another tokenizer than the model now has: restore the model's tokenizer.json, or "
                "make it again"
            )

    def forward(self, batches: list, scored: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Embed a training batch: queries first, then passages, as framed batches or packed.

        scored (B, Lq): as of `scored`. slots (N, Ld): which of all the embedded positions, batch after batch, are the
        kept tokens of each passage.
        Returns query embeddings (B, Lq, D) and passage embeddings (N, Ld, D).
        """

        def embed(batch) -> Tensor:
            return self.embed(batch).view(-1, self.config.dim)

        if self.device.type == "cpu" and torch.is_grad_enabled():
            weights = [weight for weight in self.parameters() if weight.requires_grad]
            embeddings = by_threads(embed, batches, weights)  # (T, D)
        else:
            embeddings = torch.cat([embed(batch) for batch in batches])
        queries = embeddings[: scored.numel()].view(*scored.shape, -1) * scored[..., None]
        return queries, embeddings.index_select(0, slots.view(-1)).view(*slots.shape, -1)

    @torch.inference_mode()
    def embed_passages(self, values, lengths, tokens_per_batch: int | None = None, fp32: bool = False, done=None):
        """Embed passages given as word pieces: in batches of similar length, on a GPU packed in the order they come.

        values (T,), lengths (N,). Returns embeddings (T', D) fp16 of the kept tokens in the order given, their
        number for each passage (N,) int64, and the share of positions that were padding. fp32: compute and return that.
        done(n) is called whenever n more embeddings are there. There is no dropout, whatever mode the model is in.
        Raises EmbeddingError where an embedding is not finite, or not of unit length though it should be.
        """
        with self.without_dropout():
            return self._embed_passages(values, lengths, tokens_per_batch, fp32, done)

    def _embed_passages(self, values, lengths, tokens_per_batch: int | None, fp32: bool, done):
        dtype = torch.float32 if fp32 else torch.float16
        with self.autocast(fp32):
            packed = self.packs()
        framing = self.config.doc_maxlen - self.config.pieces("passage")  # special tokens of a passage
        budget = tokens_per_batch or self.tokens_per_batch(int((lengths + framing).sum()))
        starts, counts = np.cumsum(lengths) - lengths, self.kept_counts(values, lengths)
        first, on_gpu = np.cumsum(counts) - counts, self.device.type == "cuda"
        embeddings = torch.empty((int(counts.sum()), self.config.dim), dtype=dtype, pin_memory=on_gpu)

        @torch.inference_mode()
        def embed_batch(rows) -> tuple[int, Tensor]:  # how many positions it took; whether all is well
            texts = ids, mask = self.frame_passages(values[ranges(starts[rows], lengths[rows])], lengths[rows])
            kept = self.kept(ids, mask)  # (B, Ld)
            assert np.array_equal(kept.sum(1).numpy(), counts[rows]), "kept tokens differ from what was counted"
            if packed:
                texts, kept = pack((ids, mask, mask)), kept[mask.bool()]  # (T,)
            with self.autocast(fp32):
                output = self.embed(to_device(texts, self.device)).view(-1, self.config.dim)
            here = kept.view(-1).nonzero()[:, 0]
            output = output.index_select(0, to_device(here, self.device)).to(dtype)
            is_sound = self.are_sound(output)  # left on the device: the host does not wait for it
            if on_gpu and packed:  # in their order: copied while the host goes on
                embeddings[first[rows.start] :][: len(output)].copy_(output, non_blocking=True)
            else:
                embeddings[torch.from_numpy(ranges(first[rows], counts[rows]))] = output.cpu()
            return kept.numel(), is_sound

        batches = (neighbours if on_gpu and packed else length_batches)(lengths + framing, budget)
        positions, sound = 0, []
        for rows, (n, is_sound) in zip(batches, map_alone(embed_batch, batches, device=self.device), strict=True):
            positions += n
            sound.append(is_sound)
            if done:
                done(int(counts[rows].sum()))
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        if sound and not torch.stack(sound).all():
            self.name_unsound(embeddings, counts)
        real = np.minimum(lengths + framing, self.config.doc_maxlen).sum()
        return embeddings.numpy(), counts, 1 - real / max(1, positions)

    def tokens_per_batch(self, total: int) -> int:
        """How many of `total` positions are embedded at a time: on a CPU a batch for each thread, even of few."""
        most = TOKENS_PER_BATCH.get(self.device.type, 32768)
        return most if self.device.type != "cpu" else min(most, max(256, -(-total // torch.get_num_threads())))

    def packs(self) -> bool:
        """Whether texts can be packed, in the type that torch.autocast is set to here."""
        return packable(self.encoder, self.device, compute_dtype(self.device))

    def autocast(self, fp32: bool = False):
        """Compute in the device's fast 16-bit type where it has one, or in fp32 all the same."""
        dtype = torch.float32 if fp32 else fast_dtype(self.device)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)

    # ------------------------------------------------------------------------------------------------ for a notebook
    # Embeddings and scores come back on the CPU, wherever they were computed.

    def encode_queries(
        self, texts: list[str], fp32: bool = False, progress: bool | None = None, return_tokens: bool = False
    ):
        """Query embeddings (B, Lq, D), fp32; rows of zeros after a query that is not filled to Lq.

        fp32: also compute in it, not in the device's fast type. progress: show a bar; by default once it has taken
        5 seconds. return_tokens: return (embeddings, the token strings of each query).
        Raises InputError where `texts` is not a list of texts, EmbeddingError where an embedding is not to be used.
        """
        texts = check_texts(texts)
        width = max(self.config.query_maxlen, self.config.expand_queries_to)
        embeddings, tokens = torch.zeros(len(texts), width, self.config.dim), []
        size = max(1, TOKENS_PER_BATCH.get(self.device.type, 32768) // width)
        with progress_bar(len(texts), " queries", progress) as bar:
            for start in range(0, len(texts), size):
                ids, mask = self.frame_queries(*self.tokenize(texts[start : start + size], "query"))
                with torch.inference_mode(), self.autocast(fp32), named("query", range(start, start + size)):
                    part = self.embed_queries((ids, mask))  # (B, <= Lq, D)
                embeddings[start : start + size, : part.shape[1]] = part
                if return_tokens:
                    scored = part.any(-1)  # not where a query is padded
                    tokens += [
                        self.tokenizer.convert_ids_to_tokens(row[at].tolist())
                        for row, at in zip(ids, scored, strict=True)
                    ]
                bar.update(len(ids))
        return (embeddings, tokens) if return_tokens else embeddings

    def encode_passages(
        self,
        texts: list[str],
        fp32: bool = False,
        progress: bool | None = None,
        return_tokens: bool = False,
        ragged: bool = False,
    ):
        """Passage embeddings: one (Ld, D) fp16 tensor a passage, in the order given; punctuation is dropped.

        fp32: compute and return that. progress, return_tokens: as of `encode_queries`. ragged: return the one buffer
        that the tensors are parts of, values (T, D), and offsets (N + 1,): passage i is
        values[offsets[i] : offsets[i + 1]]. Memory holds the result once, and a few batches beside it.
        Raises as `encode_queries`.
        """
        texts = check_texts(texts)
        chunks = [texts[start : start + TEXTS_PER_CHUNK] for start in range(0, len(texts), TEXTS_PER_CHUNK)]
        pieces = [self.tokenize(chunk, "passage") for chunk in chunks or [[]]]
        values, lengths = (np.concatenate(part) for part in zip(*pieces, strict=True))  # (T',), (N,)
        counts = self.kept_counts(values, lengths)  # (N,)
        starts, first = np.cumsum(lengths) - lengths, np.cumsum(counts) - counts
        embeddings = np.empty((counts.sum(), self.config.dim), np.float32 if fp32 else np.float16)  # (T, D)
        with progress_bar(len(texts), " passages", progress) as bar:
            for rows in length_batches(lengths + 1, 4 * TOKENS_PER_BATCH.get(self.device.type, 32768)):
                with named("passage", rows):
                    part = self.embed_passages(values[ranges(starts[rows], lengths[rows])], lengths[rows], fp32=fp32)
                assert np.array_equal(part[1], counts[rows]), "kept tokens differ from what was counted"
                embeddings[ranges(first[rows], counts[rows])] = part[0]
                bar.update(len(rows))
        embeddings = torch.from_numpy(embeddings)
        if ragged:
            embeddings = embeddings, torch.from_numpy(np.append(first, counts.sum()))
        else:
            embeddings = list(embeddings.split(counts.tolist()))
        return (embeddings, self.passage_tokens(values, lengths)) if return_tokens else embeddings

    def passage_tokens(self, values: np.ndarray, lengths: np.ndarray) -> list[list[str]]:
        """The token strings of each passage that have an embedding, from word pieces: values (T,), lengths (N,)."""
        tokens = []
        for pieces in np.split(values, np.cumsum(lengths)[:-1]) if len(lengths) else []:
            ids, mask = self.frame_passages(pieces, np.array([len(pieces)]))  # (1, Ld)
            tokens.append(self.tokenizer.convert_ids_to_tokens(ids[self.kept(ids, mask)].tolist()))
        return tokens

    def score(self, queries, passages) -> Tensor:
        """MaxSim (B, N), fp32, of queries (texts or embeddings) with passages (texts, embeddings or a ragged pair).

        Raises InputError where a passage has no embeddings, and as `encode_queries`.
        """
        if not isinstance(queries, Tensor):
            queries = self.encode_queries(queries)
        if isinstance(passages, tuple) and len(passages) == 2 and getattr(passages[1], "ndim", 0) == 1:
            passages = passages[0].split(passages[1].diff().tolist())
        elif not len(passages) or isinstance(passages[0], str):
            passages = self.encode_passages(passages)
        lengths = np.array([len(passage) for passage in passages], np.int64)  # (N,)
        if not lengths.all():
            raise InputError(f"passage {lengths.argmin()} has no embeddings (0, D): leave it out")
        scores = torch.empty(len(queries), len(passages))  # (B, N)
        for rows in neighbours(lengths, SCORE_TOKENS.get(self.device.type, 4096)):
            block = torch.cat(list(passages[rows])).to(self.device, torch.float32)  # (T, D)
            block_lengths = torch.from_numpy(lengths[rows]).to(self.device)
            for start in range(0, len(queries), SCORE_QUERIES):
                part = queries[start : start + SCORE_QUERIES].to(self.device, torch.float32)
                scores[start : start + SCORE_QUERIES, rows] = maxsim_packed(part, block, block_lengths).cpu()
        return scores

    def rank(self, query: str | Tensor, passages, k: int | None = None) -> list[tuple[int, float]]:
        """The k best passages (default: all) for one query, a text or its embeddings (Lq, D): pairs of the position in
        `passages` and the score, the best first; equal scores in the order given. `passages` as for `score`.
        """
        if k is not None and k < 1:
            raise InputError(f"k is {k}: ask for at least one passage")
        scores = self.score([query] if isinstance(query, str) else query[None], passages)[0]
        best, positions = scores.sort(descending=True, stable=True)
        return list(zip(positions[:k].tolist(), best[:k].tolist(), strict=True))


@contextmanager
def named(what: str, rows):
    """Say which text of all an EmbeddingError is about: the call was of `rows`."""
    try:
        yield
    except EmbeddingError as error:
        row = int(rows[error.passage])
        raise EmbeddingError(f"{what} {row}: {error}", row) from None


def check_texts(texts) -> list[str]:
    """The texts as a list. Raises InputError unless each is a string: a lone one would be read letter by letter."""
    if isinstance(texts, str):
        raise InputError(f"one text, {texts[:40]!r}, where a list of texts is wanted: put it into a list")
    texts = list(texts)
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"text {position} is of type {type(text).__name__}, not a string: drop or convert it")
    return texts


def progress_bar(total: int, unit: str, progress: bool | None):
    """A bar always (True), never (False), or once it has taken PROGRESS_AFTER seconds (None)."""
    delay = PROGRESS_AFTER if progress is None else 0
    return tqdm(total=total, unit=unit, unit_scale=True, delay=delay, disable=progress is False)


def frame(values, lengths, config: ColBERTConfig, kind: str, width: int) -> tuple[Tensor, Tensor]:
    """Frame word pieces: [CLS] marker w1 ... wn [SEP] and padding, (B, width), and the mask of what is not padding."""
    head, sep = config.frame(kind)
    used = np.minimum(lengths, width - len(head) - 1)
    ids = np.full((len(lengths), width), config.pad_token_id, np.int64)
    ids[:, : len(head)] = head
    columns = np.arange(width) - len(head)  # 0: the first word piece
    ids[(columns >= 0) & (columns < used[:, None])] = values[ranges(np.cumsum(lengths) - lengths, used)]
    ids[np.arange(len(used)), used + len(head)] = sep
    return torch.from_numpy(ids), torch.from_numpy((columns <= used[:, None]).astype(np.int64))


def to_device(batch, device):
    """Move the tensors of a nest of dicts, lists and tuples; to a GPU without waiting for it."""
    if isinstance(batch, Tensor):
        on_way = batch.pin_memory() if device.type == "cuda" else batch
        return on_way.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        parts = [to_device(value, device) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def model_fingerprint(path) -> str:
    """Fingerprint of a model folder: its weights and settings."""
    folder = Path(path)
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    if (folder / "artifact.metadata").is_file() or (folder / "modules.json").is_file():  # of another library
        files = sorted(
            file for file in folder.rglob("*") if file.suffix in (".json", ".metadata", ".safetensors", ".bin")
        )
    elif len(files) < 2 or not files[0].is_file():
        raise InputError(
            f"{path}: no model here (config.json and *.safetensors): run train.py first; one on the hub or a .dnn file "
            "is written into a folder by scripts/convert.py"
        )
    return fingerprint(*files)
