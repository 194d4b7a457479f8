"""How to compute on this machine: in which type, and by threads that do not wait for each other.

Nothing here is assumed of a processor: bf16 is fast on some CPUs (AVX-512 bf16, AMX, ARM's), emulated on most, where a
product takes fifty times as long as in fp32, and only a look at both tells.
"""

import ctypes
import functools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

# On CPUs PyTorch keeps the compiled products of the last 1,024 shapes: gigabytes, where every batch has its own.
os.environ.setdefault("LRU_CACHE_CAPACITY", "32")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")

M_ARENA_MAX = -8  # of glibc's malloc.h
PAYS = 0.8  # bf16 is taken where a product needs at most this share of its time in fp32
COMPUTE_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by accelerate's names


def fast_dtype(device) -> torch.dtype:
    """The type to compute in where 16 bits will do: bf16 where it pays (fp16 on older GPUs), else fp32."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if device.type == "cpu" and bf16_pays() else torch.float32


def autocast(device: torch.device, fp32: bool = False) -> torch.autocast:
    """Compute in the device's fast 16-bit type where it has one, or in fp32 all the same."""
    dtype = torch.float32 if fp32 else fast_dtype(device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def default_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_of_another_process(error: RuntimeError) -> bool:
    """Whether an error says that another process, of several that work together, has ended."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def mixed_precision(device) -> str:
    """accelerate's name for `fast_dtype(device)`."""
    return next(name for name, dtype in COMPUTE_DTYPES.items() if dtype == fast_dtype(device))


@functools.cache
def bf16_pays() -> bool:
    """Whether this CPU multiplies faster in bf16, by a probe of a few milliseconds: a small product, then a larger.

    By one thread: several wait for one another where other programs run, and once in sixty times told the opposite.
    """

    def seconds(n: int, dtype: torch.dtype) -> float:
        a, times = torch.ones(n, n, dtype=dtype), []
        for _ in range(4):  # the first one compiles it
            started = time.perf_counter()
            torch.mm(a, a)
            times.append(time.perf_counter() - started)
        return min(times)

    with torch.inference_mode(), single_threads():
        is_emulated = seconds(64, torch.bfloat16) > 5 * seconds(64, torch.float32)
        return not is_emulated and seconds(512, torch.bfloat16) < PAYS * seconds(512, torch.float32)


def compiled(**options) -> Callable:
    """Compile a loop by numba so that it releases the GIL; kept on disk, where a folder can be written to.

    numba takes half a second to import: a file of such loops is imported where they are needed.
    """
    from numba import njit

    def compile(function):
        try:
            return njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # no such folder
            return njit(nogil=True, **options)(function)

    return compile


def one_arena() -> None:
    """Let all threads take memory from one place, where the C library is glibc: what one freed, another may have.

    By itself it keeps several for each core, and training then holds twice the memory that it uses.
    """
    with suppress(OSError, AttributeError):  # there is no such function
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


@contextmanager
def single_threads() -> Iterator[ThreadPoolExecutor]:
    """A pool of as many threads as PyTorch uses, each computing by itself: threads of threads wait for others."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(1,)) as threads:
            yield threads
    finally:
        torch.set_num_threads(n)


def map_alone(function: Callable, *items: list, device="cpu") -> Iterator:
    """Results of function(*item), in order. On a CPU several threads take an item each, and compute it by themselves.

    What PyTorch keeps a thread (autocast, gradients or none) is `function`'s to set.
    """
    if torch.device(device).type != "cpu" or len(items[0]) == 1 or torch.get_num_threads() == 1:
        yield from map(function, *items)
        return
    with single_threads() as threads:
        yield from threads.map(function, *items)


class _ByThreads(torch.autograd.Function):
    """Several graphs, each made and gone back through by a thread; what they give is one tensor to all else."""

    @staticmethod
    def forward(ctx, function, items, keeps, *weights):
        seeds = torch.randint(1 << 62, (len(items),)).tolist()
        type_ = {"dtype": torch.get_autocast_dtype("cpu"), "enabled": torch.is_autocast_enabled("cpu")}

        def embed(item, seed: int) -> Tensor:
            _thread.generator = torch.Generator().manual_seed(seed)
            try:
                with torch.enable_grad(), torch.autocast("cpu", **type_):  # without a graph it might compute otherwise
                    result = function(item)
            finally:
                _thread.generator = None
            return result if keeps else result.detach()

        ctx.results, ctx.weights = list(map_alone(embed, items, seeds)), weights
        return torch.cat([result.detach() for result in ctx.results])

    @staticmethod
    def backward(ctx, grad):
        def gradients(result: Tensor, part: Tensor) -> tuple:
            return torch.autograd.grad(result, ctx.weights, part, allow_unused=True, materialize_grads=True)

        parts = grad.split([len(result) for result in ctx.results])
        total = None
        for found in map_alone(gradients, ctx.results, parts):  # added in order: any number of threads gives the same
            if total is None:
                total = found
            else:
                torch._foreach_add_(total, found)
        return None, None, None, *total


def by_threads(function: Callable, items: list, weights: Iterable[Tensor]) -> Tensor:
    """function(item) of each item, (n, D), one after the other: computed by a thread each, forward and backward.

    weights: all tensors with a gradient that `function` reads. What it draws by `dropout` follows from the default
    random generator and from the item's place, not from the thread. Without gradients it computes the very same, and
    keeps no graph.
    """
    return _ByThreads.apply(function, items, torch.is_grad_enabled(), *weights)


_thread = threading.local()  # generator: what this thread draws from


def dropout(x: Tensor, rate: float) -> Tensor:
    """Dropout that draws from this thread's own generator, where it has one."""
    kept = torch.empty_like(x).bernoulli_(1 - rate, generator=getattr(_thread, "generator", None))
    return x * kept.div_(1 - rate)


class Dropout(nn.Dropout):
    """A dropout layer that takes `dropout` on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape."""
        if not self.training or not self.p or x.device.type != "cpu":
            return super().forward(x)
        return dropout(x, self.p)


def own_dropout(model: nn.Module) -> None:
    """Make the dropout layers of a model draw by `dropout`: those of several threads are the same in every run."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = Dropout


_modes = threading.Lock()  # held while modules change between training and not
_without: WeakKeyDictionary[nn.Module, tuple[int, list]] = WeakKeyDictionary()  # blocks, and the modules they changed


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """No module of a model is in training mode until the block ends, of any thread's; then those are that were."""
    with _modes:
        blocks, changed = _without.get(model, (0, []))
        training = [module for module in model.modules() if module.training]
        _without[model] = blocks + 1, changed + training
        for module in training:
            module.training = False
    try:
        yield
    finally:
        with _modes:
            blocks, changed = _without.pop(model)
            if blocks > 1:
                _without[model] = blocks - 1, changed
            else:
                for module in changed:
                    module.training = True
