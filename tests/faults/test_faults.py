"""A sample of the faults of run.py, which tries all of them with --full; the same one each time.

A case alone: python tests/faults/run.py --kinds KIND --only WORDS OF ITS NAME
"""

import sys

import pytest

from .kinds import can_mount
from .run import FAILS, KINDS, list_cases, run
from .world import World

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc about processes")


@pytest.fixture(scope="module")
def world():
    world = World()
    yield world
    world.close()


@pytest.mark.parametrize("kind", KINDS)
def test_faults(world, kind):
    if kind == "disk" and (reason := can_mount(world.top)):
        pytest.skip(reason)
    cases = [case for case in list_cases(world, full=False, seed=0) if case.kind == kind]
    assert cases
    failed = [
        f"== {verdict}: {case.name}\n{detail}" for case, verdict, detail in run(world, cases, 2) if verdict in FAILS
    ]
    assert not failed, "\n\n".join(failed)
