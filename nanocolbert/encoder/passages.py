"""Many passages to embeddings: batch by batch, each to its place in one buffer that is as large as the result.

Shapes: N passages, B of them and at most Ld tokens in a batch, T positions in all, T' of them kept, D dim. Where
vectors are pooled, they are all there before.
"""

import numpy as np
import torch
from torch import Tensor

from nanocolbert.compute import map_alone, without_dropout
from nanocolbert.encoder.attention import pack
from nanocolbert.encoder.batches import to_device, tokens_per_batch
from nanocolbert.encoder.pooling import pool_passages
from nanocolbert.encoder.soundness import are_sound, name_unsound
from nanocolbert.storage.ragged import length_batches, neighbours, ranges


@torch.inference_mode()
def embed_passages(model, values: np.ndarray, lengths: np.ndarray, size: int | None, fp32: bool, done, factor) -> tuple:
    """What ColBERT.embed_passages does; size: positions in a batch; factor: of pooling, None as the model has it."""
    framed = lengths + model.config.framing("passage")  # (N,) tokens, before they are cut to doc_maxlen
    size, counts = size or tokens_per_batch(model.device, int(framed.sum())), model.kept_counts(values, lengths, 1)
    pooling = model.config.pooling(factor)
    pooled = pooling.counts(counts)
    tell = done and (lambda rows: done(int(pooled[rows].sum())))
    with without_dropout(model):
        with model.autocast(fp32):
            packed = model.packs()
        batches = (neighbours if model.device.type == "cuda" and packed else length_batches)(framed, size)
        embeddings, positions, is_sound = embed_batches(model, values, lengths, counts, batches, packed, fp32, tell)
    if not is_sound:
        name_unsound(embeddings, counts, model.config.normalize)
    embeddings, padding = embeddings.numpy(), 1 - np.minimum(framed, model.config.doc_maxlen).sum() / max(1, positions)
    if pooling.factor > 1:
        embeddings, counts = pool_passages(embeddings, counts, pooling)
    return embeddings, counts, padding


def embed_batches(model, values, lengths, counts, batches: list, packed: bool, fp32: bool, tell) -> tuple:
    """Embeddings (T', D) of all passages, how many positions that took, and whether all of them are sound.

    counts (N,) embeddings of each passage; batches: rows of each, slices where `packed` is copied in order. tell(rows)
    is called when these are there.
    """
    dtype, on_gpu = torch.float32 if fp32 else torch.float16, model.device.type == "cuda"
    starts, first = np.cumsum(lengths) - lengths, np.cumsum(counts) - counts
    embeddings = torch.empty((int(counts.sum()), model.config.dim), dtype=dtype, pin_memory=on_gpu)

    @torch.inference_mode()
    def embed_batch(rows) -> tuple[int, Tensor]:  # how many positions it took; whether all is well
        texts = ids, mask = model.frame_passages(values[ranges(starts[rows], lengths[rows])], lengths[rows])
        kept = model.kept(ids, mask)  # (B, Ld)
        assert np.array_equal(kept.sum(1).numpy(), counts[rows]), "kept tokens differ from what was counted"
        if packed:
            texts, kept = pack((ids, mask, mask)), kept[mask.bool()]  # (T,)
        with model.autocast(fp32):
            output = model.embed(to_device(texts, model.device)).view(-1, model.config.dim)
        here = kept.view(-1).nonzero()[:, 0]
        output = output.index_select(0, to_device(here, model.device)).to(dtype)
        is_sound = are_sound(output, model.config.normalize)  # left on the device: the host does not wait for it
        if on_gpu and packed:  # in their order: copied while the host goes on
            embeddings[first[rows.start] :][: len(output)].copy_(output, non_blocking=True)
        else:
            embeddings[torch.from_numpy(ranges(first[rows], counts[rows]))] = output.cpu()
        return kept.numel(), is_sound

    positions, sound = 0, []
    for rows, (n, is_sound) in zip(batches, map_alone(embed_batch, batches, device=model.device), strict=True):
        positions += n
        sound.append(is_sound)
        if tell:
            tell(rows)
    if on_gpu:
        torch.cuda.current_stream().synchronize()
    return embeddings, positions, not sound or bool(torch.stack(sound).all())
