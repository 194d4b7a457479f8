"""ColBERT: late interaction over contextual token embeddings (Khattab and Zaharia, arXiv 2004.12832).

    model = ColBERT.from_pretrained("experiments/demo/model")
    queries = model.encode_queries(["what is late interaction?"])       # (B, Lq, D)
    passages = model.encode_passages(["ColBERT encodes ...", "..."])    # list of (Ld, D)
    model.score(queries, passages)                                      # (B, N)
    model.rank("what is late interaction?", passages, k=1)              # [(position, score)], the best first

Shapes: B queries, N passages, Lq and Ld tokens of one query and one passage, T tokens in all, H hidden, D dim.
Training, embedding and search all call this class. Its parts lie in nanocolbert/: text.py, config.py, framing.py make
the encoder's input, encoder/ computes, maxsim.py scores, checkpoints/ reads and writes.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, PreTrainedModel

from nanocolbert import framing
from nanocolbert.checkpoints import card, layouts
from nanocolbert.checkpoints.parts import Checkpoint
from nanocolbert.cli import InputError
from nanocolbert.compute import autocast, by_threads, default_device, without_dropout
from nanocolbert.config import ColBERTConfig, check_fits, check_ids, check_tokenizer, check_tokens
from nanocolbert.encoder.attention import Packed, compute_dtype, encode_packed, pack, packable
from nanocolbert.encoder.batches import most_tokens, to_device
from nanocolbert.encoder.passages import embed_passages
from nanocolbert.encoder.pretrained import (
    add_markers,
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
from nanocolbert.encoder.projection import load_projection, make_projection, principal_directions
from nanocolbert.encoder.quiet import quietly
from nanocolbert.encoder.soundness import are_sound, name_unsound, named
from nanocolbert.maxsim import maxsim_all
from nanocolbert.storage.checksums import share
from nanocolbert.storage.ragged import length_batches, ranges
from nanocolbert.text import FRAME, check_texts, own_backend, prepare_texts, punctuation_ids, tokenize

TEXTS_PER_CHUNK = 1024  # texts tokenised at a time: what the tokenizer gives back takes hundreds of bytes a token
PROGRESS_AFTER = 5  # seconds after which a bar appears by itself


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
        self.linear = make_projection(encoder.config.hidden_size, config.dim, config.dense)
        self.tokenizer = tokenizer
        self.meta = None  # what meta.json says of the training, where the model came with one
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # Rows of the projection begin orthonormal, which keeps most of the encoder's geometry (the encoder
        # initialises itself). Called for what a checkpoint lacks, never for what it has.
        if module is getattr(self, "linear", None) and isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight)

    @classmethod
    def from_base(
        cls,
        base_model: str,
        dropout: float | None = None,
        attention_dropout: float | None = 0.0,
        markers=True,
        **settings,
    ) -> "ColBERT":
        """A new ColBERT on a Hugging Face encoder: adds `linear`, and with `markers` [Q] and [D] (see `add_markers`).

        dropout, attention_dropout: replace the encoder's rates, unless None. settings: fields of ColBERTConfig.
        Raises InputError where the encoder or its tokenizer cannot be loaded, or not used.
        """
        folder = locate(base_model)
        tokenizer, encoder_config = load_tokenizer(folder), load_config(folder)
        set_dropout(encoder_config, dropout, attention_dropout)
        encoder = load_encoder(base_model, encoder_config, read_weights(folder))
        check_vocabulary(base_model, tokenizer, encoder)
        if markers:
            settings |= add_markers(tokenizer, encoder)
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
        check_fits(name, config, longest_input(encoder), len(encoder.get_input_embeddings().weight))
        return cls(config, tokenizer, encoder)

    @classmethod
    def from_pretrained(cls, name_or_path, revision: str | None = None, device=None, **others) -> "ColBERT":
        """Load weights, settings and tokenizer of a checkpoint of any layout, fp32, in eval mode.

        name_or_path: a folder, v1's .dnn file, or a name on the hub, of which `revision` picks a version. device: where
        to; by default the GPU if there is one.
        Raises InputError where the checkpoint cannot be honoured to the letter, and for Hugging Face's other options.
        """
        if others.pop("trust_remote_code", False):
            raise InputError(f"{name_or_path}: trust_remote_code: no code of a checkpoint is run here")
        if others:
            raise InputError(f"{name_or_path}: {min(others)} is no option here: give revision and device at most")
        parts = layouts.read(name_or_path, revision)
        return cls.from_parts(name_or_path, parts).to(device or default_device())

    @classmethod
    def from_parts(cls, name, parts: Checkpoint) -> "ColBERT":
        """The model of a checkpoint's parts, on the CPU, in eval mode; `name` is for messages. Raises InputError."""
        encoder = load_encoder(name, parts.encoder, parts.weights, exact=parts.is_own)
        lengths = {key: longest_input(encoder) for key in ("query_maxlen", "doc_maxlen") if parts.settings[key] is None}
        model = cls.on_encoder(name, encoder, parts.tokenizer, **{**parts.settings, **lengths})
        load_projection(name, model.linear, parts.projection)
        check_weights(model, name)
        model.meta = parts.meta
        return model.eval()

    def save_pretrained(self, path, *args, layout: str = "nanocolbert", **kwargs) -> None:
        """Write weights, settings and tokenizer into one folder, for the library that `layout` names.

        layout: one of checkpoints.LAYOUTS; "nanocolbert" is this project's own, not that of Hannibal046's nanoColBERT.
        Weights that are there already go, and so does a meta.json, which tells of them.
        Raises InputError where that layout cannot say what this model does, and where a weight is not finite.
        """
        check_weights(self, path)
        if Path(path).is_file():
            raise InputError(f"{path}: a file, not a folder: give another")
        (Path(path) / "meta.json").unlink(missing_ok=True)
        before = {file: file.stat().st_mtime_ns for file in Path(path).glob("model*.safetensors*")}
        with quietly():
            if layout == "nanocolbert":
                super().save_pretrained(path, *args, **kwargs)
                self.tokenizer.save_pretrained(path)
            else:
                layouts.save(self, path, layout)
        for file, time in before.items():  # one file, or several: those that were not written anew
            if file.exists() and file.stat().st_mtime_ns == time:
                file.unlink()
        share(path)

    def push_to_hub(self, repo_id: str, layout: str = "nanocolbert", **kwargs) -> str:
        """Upload the model and its card to the hub; kwargs of HfApi.create_repo. Returns the repository's address."""
        return card.push_to_hub(self, repo_id, layout, **kwargs)

    @property
    def tokenizer(self):
        """The tokenizer of transformers, whose state we leave alone, as others may set it; set it again if changed."""
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer) -> None:
        self._tokenizer, self.backend = tokenizer, None if tokenizer is None else own_backend(tokenizer)

    # ------------------------------------------------------------------------------------------- tokens to embeddings

    def frame_queries(self, values: np.ndarray, lengths: np.ndarray) -> tuple[Tensor, Tensor]:
        """[CLS] [Q] w1 ... wn [SEP], filled with [MASK] to query_maxlen: input_ids (B, Lq) and attention_mask (B, Lq).

        values (T,), lengths (B,): word-piece ids, cut to fit.
        """
        return framing.frame_queries(values, lengths, self.config)

    def frame_passages(self, values: np.ndarray, lengths: np.ndarray) -> tuple[Tensor, Tensor]:
        """[CLS] [D] w1 ... wn [SEP], padded to the longest. Arguments and result as of `frame_queries`."""
        return framing.frame_passages(values, lengths, self.config)

    def scored(self, attention_mask: Tensor) -> Tensor:
        """Which positions of framed queries (B, Lq) score: the tokens and the [MASK] fill."""
        return framing.scored_positions(attention_mask, self.config)

    def kept(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Which passage tokens are stored and scored (B, L): the real ones that are no punctuation."""
        return framing.kept_positions(input_ids, attention_mask, self.config)

    def kept_counts(self, values: np.ndarray, lengths: np.ndarray, pool_factor: int | None = None) -> np.ndarray:
        """How many embeddings each passage will have (N,) int64, from its word pieces: values (T,), lengths (N,)."""
        counts = framing.kept_counts(values, lengths, self.config, self.vocabulary)
        return self.config.pooling(pool_factor).counts(counts)

    def tokenize(self, texts: list[str], kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Word-piece ids (T,) int32 and lengths (n,) of queries or passages, as `frame_queries` or `_passages` want."""
        return tokenize(self.backend, prepare_texts(texts, kind, self.config.texts()), self.config.pieces(kind) + FRAME)

    def embed(self, texts: tuple[Tensor, Tensor] | Packed) -> Tensor:
        """Unit token embeddings, fp32 (fp64 of such weights): (B, L, D) of framed texts, or (T, D) of packed ones."""
        if isinstance(texts, Packed):
            hidden = encode_packed(self.encoder, texts)  # (T, H)
        else:
            input_ids, attention_mask = texts
            hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (B, L, H)
        embeddings = self.linear(hidden)
        embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        return F.normalize(embeddings, dim=-1) if self.config.normalize else embeddings

    def embed_queries(self, texts: tuple[Tensor, Tensor]) -> Tensor:
        """Embeddings (B, Lq, D) of framed queries, on the host; rows of zeros where nothing scores: they add 0.

        Raises EmbeddingError, as `embed_passages`, of the query.
        """
        (ids, mask), scored = texts, self.scored(texts[1])
        with without_dropout(self):
            if self.device.type == "cpu" and self.packs():
                embeddings = torch.zeros(*ids.shape, self.config.dim)  # (B, Lq, D)
                embeddings[scored] = self.embed(pack((ids, mask, scored)))  # (T, D)
            else:
                embeddings = self.embed(to_device(texts, self.device)).cpu() * scored[..., None]
        if not bool(are_sound(embeddings[scored], self.config.normalize)):
            name_unsound(embeddings[scored], scored.sum(1).numpy(), self.config.normalize)
        return embeddings

    def forward(self, batches: list, scored: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Embed a training batch: queries first, then passages, as framed batches or packed.

        scored (B, Lq): as of `scored`. slots (N, Ld): which of all the embedded positions, batch after batch, are the
        kept tokens of each passage.
        Returns query embeddings (B, Lq, D) and passage embeddings (N, Ld, D).
        """

        def embed(batch) -> Tensor:
            return self.embed(batch).view(-1, self.config.dim)

        if self.device.type == "cpu" and (torch.is_grad_enabled() or self.training):
            weights = [weight for weight in self.parameters() if weight.requires_grad]
            embeddings = by_threads(embed, batches, weights)  # (T, D)
        else:
            embeddings = torch.cat([embed(batch) for batch in batches])
        queries = embeddings[: scored.numel()].view(*scored.shape, -1) * scored[..., None]
        return queries, embeddings.index_select(0, slots.view(-1)).view(*slots.shape, -1)

    def embed_passages(self, values, lengths, tokens_per_batch=None, fp32=False, done=None, pool_factor=None):
        """Embed passages given as word pieces: in batches of similar length, on a GPU packed in the order they come.

        values (T,), lengths (N,). Returns embeddings (T', D) fp16 of the kept tokens in the order given, or of those
        pooled (pool_factor: None as the model has it), their number for each passage (N,) int64, and the share of
        positions that were padding. fp32: compute and return that. done(n) is called whenever n more embeddings are
        there. There is no dropout, whatever mode the model is in.
        Raises EmbeddingError where an embedding is not finite, or not of unit length though it should be.
        """
        return embed_passages(self, values, lengths, tokens_per_batch, fp32, done, pool_factor)

    @torch.inference_mode()
    def project_on_principal(self, values: np.ndarray, lengths: np.ndarray) -> None:
        """Set the rows of `linear` to the encoder's `principal_directions` on passages: values (T,), lengths (N,)."""
        self.linear.weight.copy_(principal_directions(self, values, lengths))

    def packs(self) -> bool:
        """Whether texts can be packed, in the type that torch.autocast is set to here."""
        return packable(self.encoder, self.device, compute_dtype(self.device))

    def autocast(self, fp32: bool = False):
        """Compute in the device's fast 16-bit type where it has one, or in fp32 all the same."""
        return autocast(self.device, fp32)

    # --------------------------------------------------------------------- whether what a stage wrote is of this model

    @property
    def vocabulary(self) -> int:
        """How many tokens have an embedding."""
        return len(self.encoder.get_input_embeddings().weight)

    def check_ids(self, path, values: np.ndarray) -> None:
        """Raise InputError, naming the file `path`, where the model has no embedding for a word piece of (T,)."""
        check_ids(path, values, self.vocabulary)

    def check_tokens(self, name, tokens_dir, tokens_meta: dict) -> None:
        """Raise InputError unless the tokens were made by this model's tokenizer and cut no shorter than it reads."""
        check_tokens(name, self.config, self.tokenizer, tokens_dir, tokens_meta)

    def check_tokenizer(self, where, meta: dict) -> None:
        """Raise InputError unless this model's tokenizer made what lies at `where` (which may not say) of this meta."""
        check_tokenizer(where, self.tokenizer, meta)

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
        size = max(1, most_tokens(self.device) // width)
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
        pool_factor: int | None = None,
    ):
        """Passage embeddings: one (Ld, D) fp16 tensor a passage, in the order given; punctuation is dropped.

        fp32: compute and return that. progress, return_tokens: as of `encode_queries`. ragged: return the one buffer
        that the tensors are parts of, values (T, D), and offsets (N + 1,): passage i is
        values[offsets[i] : offsets[i + 1]]. Memory holds the result once, and a few batches beside it. pool_factor: of
        how many embeddings one is made (default: as the model has it). Raises as `encode_queries`.
        """
        texts = check_texts(texts)
        if return_tokens and self.config.pooling(pool_factor).factor > 1:
            raise InputError("pooled embeddings are of several tokens each: return_tokens wants pool_factor=1")
        chunks = [texts[start : start + TEXTS_PER_CHUNK] for start in range(0, len(texts), TEXTS_PER_CHUNK)]
        pieces = [self.tokenize(chunk, "passage") for chunk in chunks or [[]]]
        values, lengths = (np.concatenate(part) for part in zip(*pieces, strict=True))  # (T',), (N,)
        counts = self.kept_counts(values, lengths, pool_factor)  # (N,)
        starts, first = np.cumsum(lengths) - lengths, np.cumsum(counts) - counts
        embeddings = np.empty((counts.sum(), self.config.dim), np.float32 if fp32 else np.float16)  # (T, D)
        with progress_bar(len(texts), " passages", progress) as bar:
            for rows in length_batches(lengths + 1, 4 * most_tokens(self.device)):
                with named("passage", rows):
                    pieces = values[ranges(starts[rows], lengths[rows])], lengths[rows]
                    part = self.embed_passages(*pieces, fp32=fp32, pool_factor=pool_factor)
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
        return maxsim_all(queries, passages, self.device)

    def rank(self, query: str | Tensor, passages, k: int | None = None) -> list[tuple[int, float]]:
        """The k best passages (default: all) for one query, a text or its embeddings (Lq, D): pairs of the position in
        `passages` and the score, the best first; equal scores in the order given. `passages` as for `score`.
        """
        if k is not None and k < 1:
            raise InputError(f"k is {k}: ask for at least one passage")
        scores = self.score([query] if isinstance(query, str) else query[None], passages)[0]
        best, positions = scores.sort(descending=True, stable=True)
        return list(zip(positions[:k].tolist(), best[:k].tolist(), strict=True))

    def explain(self, query: str, passage):
        """Which token of a passage each token of a query matched: an Explanation (nanocolbert/explain.py)."""
        from nanocolbert.explain import explain  # here: it draws, which nothing else does

        return explain(self, query, passage)


def progress_bar(total: int, unit: str, progress: bool | None):
    """A bar always (True), never (False), or once it has taken PROGRESS_AFTER seconds (None)."""
    delay = PROGRESS_AFTER if progress is None else 0
    return tqdm(total=total, unit=unit, unit_scale=True, delay=delay, disable=progress is False)
