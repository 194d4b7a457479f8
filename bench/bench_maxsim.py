"""MaxSim: maxsim.maxsim_packed and the gradient of maxsim.maxsim, against the plain tensors of all similarities.

    python bench/bench_maxsim.py                              # one core
    python bench/bench_maxsim.py --device cuda

Scoring: one query of 32 tokens against --n_passages packed passages, as reranking does it, beside passages padded to
180 and the reference's multiplication by the mask. Training: --batch_size queries against twice as many passages,
forward and backward, beside autograd on the (B, N, Lq, Ld) tensor and, as v1's l2 has it, on (2 B, Lq, Ld, D).
"""

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from measure import add_machine_flags, hardware, matmul_gflops, spread, timed, write_result

from nanocolbert.maxsim import maxsim, maxsim_packed

LQ, LD, D = 32, 180, 128


def unit(*shape, device) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, device=device), dim=-1)


def scoring_ways(args) -> tuple[dict, float]:
    """Functions that score the same passages, and the 10^9 operations that their real tokens need."""
    lengths = torch.randint(20, 130, (args.n_passages,))
    query = unit(1, LQ, D, device=args.device)
    packed = unit(int(lengths.sum()), D, device=args.device)
    mask = (torch.arange(LD) < lengths[:, None]).to(args.device)  # (N, Ld)
    padded = torch.zeros(args.n_passages, LD, D, device=args.device)
    padded[mask] = packed
    lengths = lengths.to(args.device)

    def plain():
        return ((padded @ query[0].T) * mask[..., None]).max(1).values.sum(-1)  # similarities (N, Ld, Lq)

    ways = {"padded, as the reference": plain, "packed": lambda: maxsim_packed(query, packed, lengths)[0]}
    return ways, 2 * LQ * D * len(packed) / 1e9


def training_ways(args) -> tuple[dict, float]:
    """Functions that compute scores and gradients, and the 10^9 operations of all-pairs scores and their gradients."""
    B, N = args.batch_size, 2 * args.batch_size
    Q, P = unit(B, LQ, D, device=args.device), unit(N, LD, D, device=args.device)
    mask = torch.arange(LD, device=args.device) < torch.randint(20, LD + 1, (N, 1), device=args.device)
    queries, passages = Q.requires_grad_(), P.requires_grad_()

    def gradients(scores):
        return torch.autograd.grad(scores.square().sum(), (queries, passages))

    def plain():
        similarity = torch.einsum("bqd,nld->bnql", queries, passages).masked_fill(~mask[:, None], -torch.inf)
        return gradients(similarity.amax(-1).sum(-1))

    def differences():  # each query against two passages only
        distances = ((queries.repeat(2, 1, 1).unsqueeze(2) - passages.unsqueeze(1)) ** 2).sum(-1)
        return gradients((-distances).max(-1).values.sum(-1))

    ways = {
        "2 passages a query, l2 on (2 B, Lq, Ld, D), as the reference": differences,
        "all pairs, autograd on (B, N, Lq, Ld)": plain,
        "all pairs, in parts": lambda: gradients(maxsim(queries, passages, mask)),
    }
    return ways, 3 * 2 * B * LQ * N * LD * D / 1e9


def main(args):
    machine = hardware()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    on_gpu, rows = args.device == "cuda", []

    def wait(function):
        result = function()
        if on_gpu:
            torch.cuda.synchronize()
        return result

    for what, (ways, gflop) in (("scoring", scoring_ways(args)), ("training", training_ways(args))):
        seconds = {way: [] for way in ways}
        for repeat, way in itertools.product(range(args.repeats + 1), ways):
            taken = timed(wait, ways[way])[1]
            seconds[way] += [taken] if repeat else []
        times = {way: spread([1000 * value for value in values]) for way, values in seconds.items()}  # ms
        for way, time in times.items():
            ratio = round(times[next(iter(ways))]["median"] / time["median"], 2)
            row = {"what": what, "way": way, "ms": time, "speed_ratio": ratio}
            if "2 passages" not in way:  # of the work that `gflop` counts
                row["gflops"] = round(gflop / time["median"] * 1000, 1)
            rows.append(row)
            print(f"{what:9} {way:62} {time['median']:9.2f} ms [{time['low']}, {time['high']}]: {row['speed_ratio']} x")
    roof = round(matmul_gflops(torch.float32, args.device), 1)
    print(f"roof {roof} GFLOP/s in fp32")
    write_result("maxsim", args, machine, roof_gflops=roof, rows=rows)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n_passages", type=int, default=1000, help="candidates of the query (default 1000)")
    parser.add_argument("--batch_size", type=int, default=32, help="queries of a training step (default 32)")
    parser.add_argument("--repeats", type=int, default=5, help="alternating runs after the warm-up")
    add_machine_flags(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
