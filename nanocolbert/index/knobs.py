"""What can be asked of an index: how small, and how hard to look."""

from numbers import Integral
from typing import NamedTuple

from nanocolbert.cli import InputError

BITS = (1, 2, 4, 8)  # a dimension
LONGEST = 1 << 10  # tokens of a passage, and one more


class Effort(NamedTuple):
    """How hard to look in a compressed index: lists probed for each query token, passages that go through each step."""

    nprobe: int
    n_coarse: int
    n_fine: int
    n_exact: int


class Depths(NamedTuple):
    """How hard to look by IVFPQ: lists probed and embeddings found for each query token, passages scored exactly."""

    nprobe: int
    faiss_depth: int
    rerank_depth: int


USUAL, MORE_LISTS, MORE_PASSAGES = 21_000, 1 / 3, 1 / 2  # passages that QUALITY is for; powers that it grows by, beyond
QUALITY = {  # nprobe; the others as so many and so many more for each passage that is asked for
    "fast": (8, (512, 6), (32, 3), (4, 1)),
    "default": (32, (3000, 22), (120, 6), (10, 2)),
    "best": (64, (8000, 50), (300, 10), (20, 4)),
}
DEPTHS = Depths(32, 1024, 1000)  # unless told otherwise; the last so many at least: they find the best ten


def effort_for(quality: str, k: int, n_passages: int = USUAL, **knobs: int) -> Effort:
    """The effort of a quality where k of so many passages are asked for; knobs of Effort override it.

    What lists promise, and coarse codes say, puts a good passage at some percentile: the more there are, the more must
    be looked at. Raises InputError for what is none.
    """
    check_knobs("a compressed index", Effort, quality, knobs)
    nprobe, *steps = QUALITY[quality]
    growth = max(1.0, n_passages / USUAL)
    n_coarse, n_fine, n_exact = (some + more * k for some, more in steps)
    effort = Effort(nprobe * growth**MORE_LISTS, n_coarse * growth**MORE_PASSAGES, n_fine, n_exact)
    return Effort(*map(round, effort))._replace(**knobs)


def depths_for(quality: str, k: int, **knobs: int) -> Depths:
    """The depths where k passages are asked for; knobs of Depths override them. Raises InputError for what is none."""
    check_knobs("IVFPQ", Depths, quality, knobs)
    if quality != "default":
        raise InputError("among and quality are for a compressed index: build_index.py --method codes")
    return DEPTHS._replace(rerank_depth=max(k, DEPTHS.rerank_depth))._replace(**knobs)


def check_knobs(kind: str, known: type, quality: str, knobs: dict[str, int]) -> None:
    """Raise InputError for a knob that is not of the `known` ones, too small a one, or no quality."""
    for name, value in knobs.items():
        if name not in known._fields:
            raise InputError(f"{name} says nothing to {kind}: give {', '.join(known._fields)}")
        if not isinstance(value, Integral) or value < 1:
            raise InputError(f"{name} is {value!r}: give a whole number, at least 1")
    if quality not in QUALITY:
        raise InputError(f"quality {quality!r}: give {', '.join(QUALITY)}")
