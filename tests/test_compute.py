"""The compute type follows from a probe; threads that compute by themselves give what one thread gives, to the bit."""

import platform
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from torch import nn

from nanocolbert import compute

PRODUCT = torch.mm


@pytest.fixture
def threads(monkeypatch):
    """Set the number of PyTorch's threads for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("slowness, pays", [(0.3, True), (1.0, False), (8.0, False)])
def test_bf16_is_taken_where_it_pays(monkeypatch, slowness, pays):
    def product(a, b):
        time.sleep(0.004 * (slowness if a.dtype == torch.bfloat16 else 1))
        return a

    monkeypatch.setattr(compute.torch, "mm", product)
    monkeypatch.setattr(compute, "bf16_pays", compute.bf16_pays.__wrapped__)
    assert compute.bf16_pays() == pays
    assert compute.fast_dtype("cpu") == (torch.bfloat16 if pays else torch.float32)
    assert compute.mixed_precision("cpu") == ("bf16" if pays else "no")


def test_other_devices_are_not_probed(monkeypatch):
    monkeypatch.setattr(compute, "bf16_pays", lambda: True)
    assert compute.fast_dtype("mps") == torch.float32


def encoder() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 3), nn.Linear(3, 3))
    model[4].requires_grad_(False)
    compute.own_dropout(model)
    return model


def run(model: nn.Module, n_threads: int, set_threads) -> tuple:
    """Results and gradients of seven items of different lengths, drawn after the same seed."""
    set_threads(n_threads)
    items = [torch.randn(n, 4, generator=torch.Generator().manual_seed(n)) for n in (5, 1, 9, 3, 8, 2, 6)]
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    torch.manual_seed(1)
    result = compute.by_threads(model, items, weights)
    model.zero_grad()
    (result**2).sum().backward()
    assert torch.get_num_threads() == n_threads
    return items, result.detach(), [weight.grad.clone() for weight in weights]


def test_any_number_of_threads_gives_the_same_bits(threads):
    model = encoder()
    _, result, gradients = run(model, 1, threads)
    for n_threads in (2, 3, 5):
        _, found, found_gradients = run(model, n_threads, threads)
        assert torch.equal(found, result)
        assert all(torch.equal(*pair) for pair in zip(found_gradients, gradients, strict=True))
    kept = run(model.eval(), 2, threads)[1]
    assert not torch.equal(kept, result)  # there was dropout


def test_threads_equal_plain_autograd(threads):
    model = encoder().eval()
    items, result, gradients = run(model, 2, threads)
    plain = torch.cat([model(item) for item in items])
    assert torch.allclose(plain, result, atol=1e-6) and model[4].weight.grad is None
    model.zero_grad()
    (plain**2).sum().backward()
    expected = [weight.grad for weight in model.parameters() if weight.requires_grad]
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(gradients, expected, strict=True))


def test_a_weight_that_nothing_reads_gets_zeros(threads):
    model, other = encoder(), nn.Parameter(torch.ones(2))
    threads(2)
    weights = [model[0].weight, other]
    result = compute.by_threads(lambda item: item @ model[0].weight.T, [torch.ones(2, 4)] * 3, weights)
    result.sum().backward()
    assert torch.equal(other.grad, torch.zeros(2)) and model[0].weight.grad.unique().tolist() == [6.0]


def test_autocast_reaches_the_threads(threads):
    threads(2)
    weight = nn.Parameter(torch.randn(4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        result = compute.by_threads(lambda item: item @ weight, [torch.randn(3, 4)] * 4, [weight])
    assert result.dtype == torch.bfloat16


def test_dropout_keeps_the_mean():
    x = torch.ones(100_000, requires_grad=True)
    kept = compute.dropout(x, 0.25)
    assert kept.unique().tolist() == pytest.approx([0, 4 / 3]) and abs(kept.mean() - 1) < 0.02
    kept.sum().backward()
    assert torch.equal(x.grad, kept.detach())


def test_an_error_in_a_thread_is_raised_here(threads):
    threads(2)
    with pytest.raises(ZeroDivisionError):
        list(compute.map_alone(lambda n: 1 / n, [1, 0, 2]))
    assert torch.get_num_threads() == 2


ARENAS = """
import ctypes, threading
from nanocolbert.compute import one_arena
{first}
barrier = threading.Barrier(4)
def take():
    barrier.wait()
    ctypes.CDLL(None).malloc(1 << 16)
    barrier.wait()
threads = [threading.Thread(target=take) for _ in range(4)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
ctypes.CDLL(None).malloc_stats()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_threads_take_memory_from_one_place():
    for first, shared in (("", False), ("one_arena()", True)):
        done = subprocess.run(
            [sys.executable, "-c", ARENAS.format(first=first)], capture_output=True, cwd=ROOT, text=True
        )
        assert done.returncode == 0 and "Arena 0:" in done.stderr, done.stderr
        assert ("Arena 1:" not in done.stderr) == shared
