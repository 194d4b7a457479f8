"""Batches of a size that a device computes well, and their way to it."""

import torch
from torch import Tensor

TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 131072}  # embedded at a time; a small batch stays in the cache
OTHER_DEVICES = 32768


def most_tokens(device: torch.device) -> int:
    """How many positions are embedded at a time on a device."""
    return TOKENS_PER_BATCH.get(device.type, OTHER_DEVICES)


def tokens_per_batch(device: torch.device, total: int) -> int:
    """How many of `total` positions are embedded at a time: on a CPU a batch for each thread, even of few."""
    most = most_tokens(device)
    return most if device.type != "cpu" else min(most, max(256, -(-total // torch.get_num_threads())))


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
