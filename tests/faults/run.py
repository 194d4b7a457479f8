"""Put faults into every stage, and count how they end.

    python tests/faults/run.py                                 # CI's share
    python tests/faults/run.py --full --output docs/faults.md  # all
    python tests/faults/run.py --full --kinds kill disk        # some kinds

What a case may end as is said in kinds.py; `same` and `clear` pass, all others are printed with their command, exit
code and stderr. A case of bad input is a row of inputs.py; another kind of fault is a function in kinds.py that lists
Cases, each a function of the World (a toy pipeline and copies of it) that gives a verdict.
"""

import argparse
import collections
import datetime
import platform
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faults import inputs, inputs_of_training
from faults.kinds import UNSEEN, Case, at_once, can_mount, damages, disks, strikes
from faults.world import World

FAILS = ("unclear", "silent")
VERDICTS = ("same", "clear", "unclear", "silent")
SHARE = {"kill": 20, "signal": 20, "two at once": 8, "disk": 16, "damage": 28, "input": 44}  # cases that CI tries
KINDS = tuple(SHARE)


def list_cases(world: World, full: bool, seed: int) -> list[Case]:
    rng = random.Random(seed)
    cases = [*strikes(full, rng), *at_once(full, rng)]
    cases += [] if can_mount(world.top) else disks(full, rng)
    cases += [*damages(full, rng, world), *inputs.cases_of([*inputs.rows(), *inputs_of_training.rows()])]
    cases = list({(case.kind, case.name): case for case in cases}.values())
    if full:
        return cases
    share = []
    for kind, n in SHARE.items():
        of_kind = [case for case in cases if case.kind == kind]
        share += rng.sample(of_kind, min(n, len(of_kind)))
    return share


def run(world: World, cases: list[Case], at_once: int) -> Iterator[tuple[Case, str, str]]:
    """Run cases, so many at a time; yields (case, verdict, detail) in their order."""
    with ThreadPoolExecutor(at_once) as threads:
        for case, (verdict, detail) in zip(cases, threads.map(lambda case: case(world), cases), strict=True):
            yield case, verdict, detail


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def table(outcomes: list[tuple[Case, str, str]]) -> str:
    counts = collections.defaultdict(collections.Counter)
    for case, verdict, _ in outcomes:
        counts[case.kind][verdict] += 1
    lines = ["| kind | tried | " + " | ".join(VERDICTS) + " |", "|---|---|" + "---|" * len(VERDICTS)]
    for kind in (kind for kind in KINDS if kind in counts):
        numbers = [counts[kind][verdict] for verdict in VERDICTS]
        lines.append(f"| {kind} | {sum(numbers)} | " + " | ".join(map(str, numbers)) + " |")
    unseen = counts["damage"][UNSEEN]
    if unseen:
        lines.append(f"\n{unseen} changed bodies of arrays, not counted above, gave another result without --verify; ")
        lines.append("each of them is among those that were tried with it.")
    return "\n".join(lines)


def main(args) -> int:
    started = time.time()
    world = World()
    outcomes, passed = [], True
    try:
        if reason := can_mount(world.top):
            print(f"disk: left out: {reason}")
        cases = [case for seed in range(args.seeds) for case in list_cases(world, args.full, args.seed + seed)]
        cases = list({(case.kind, case.name): case for case in cases}.values())
        cases = [case for case in cases if case.kind in args.kinds and any(words in case.name for words in args.only)]
        for case, verdict, detail in run(world, cases, args.at_once):
            outcomes.append((case, verdict, detail))
            if verdict in FAILS:
                passed = False
                print(f"\n== {verdict}: {case.kind}: {case.name}\n{detail}", flush=True)
    finally:
        world.close()
    text = table(outcomes)
    print(f"\n{text}\n\n{time.time() - started:.0f} s")
    if args.output:
        command = " ".join(["python tests/faults/run.py", *sys.argv[1:]])
        today = datetime.date.today()
        args.output.parent.mkdir(exist_ok=True)
        about = f"`{command}` on {today}, {processor()}, {(time.time() - started) / 60:.0f} minutes; what the columns "
        args.output.write_text(f"# Faults\n\n{about}say: tests/faults/kinds.py.\n\n{text}\n")
    return 0 if passed else 1


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every case, not only CI's share")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="only these (default: all)")
    parser.add_argument("--only", nargs="+", default=[""], help="only cases with one of these in their names")
    parser.add_argument("--seed", type=int, default=0, help="of moments and places (default 0)")
    parser.add_argument("--seeds", type=int, default=1, help="how many, one after the other (default 1)")
    parser.add_argument("--at_once", type=int, default=2, help="cases at a time (default 2)")
    parser.add_argument("--output", type=Path, help="write the table to this file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(parse_args()))
