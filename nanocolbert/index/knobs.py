"""What can be asked of a compressed index: how small, and how hard to look."""

from typing import NamedTuple

BITS = (1, 2, 4, 8)  # a dimension
LONGEST = 1 << 10  # tokens of a passage, and one more


class Effort(NamedTuple):
    """How hard to look: lists probed for each query token, and passages that go through each later step."""

    nprobe: int
    n_coarse: int
    n_fine: int
    n_exact: int


QUALITY = {  # nprobe; the others as so many and so many more for each passage that is asked for
    "fast": (8, (512, 6), (32, 3), (4, 1)),
    "default": (32, (3000, 22), (120, 6), (10, 2)),
    "best": (64, (8000, 50), (300, 10), (20, 4)),
}


def effort_for(quality: str, k: int, **knobs: int) -> Effort:
    """The effort of a quality where k passages are asked for; knobs of Effort override it."""
    nprobe, *steps = QUALITY[quality]
    return Effort(nprobe, *(some + more * k for some, more in steps))._replace(**knobs)
