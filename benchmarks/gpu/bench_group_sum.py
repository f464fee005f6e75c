"""The sum over a tensor-parallel group with addition and norm in one launch, beside NCCL and two launches more.

    python benchmarks/gpu/bench_group_sum.py --cards 2 --width 4096

Checks the result against NCCL first, over many random steps, then times both inside CUDA graphs, as a decode step runs
them; before that sums by copies and flags, queued one by one and recorded. JSON lines: microseconds each.
"""

import argparse
import functools
import json
import os
import random
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from argosy.kernels import group_push, ops
from argosy.placement.plan import make_plan
from argosy.placement.ports import free_port
from argosy.placement.process_groups import ParallelContext, destroy_parallel, init_parallel
from argosy.workers.layers.group_sum import GroupSum, open_group_copies, open_group_sum
from argosy.workers.layers.norm import RMSNorm

REPEATS = 64  # in a graph, as many as a model of 32 layers has


def by_nccl(parallel: ParallelContext, part_TD: Tensor, residual_TD: Tensor, norm: RMSNorm) -> Tensor:
    """A collective, then addition and norm."""
    dist.all_reduce(part_TD, group=parallel.tp_group)
    return ops.add_rms_norm(part_TD, residual_TD, norm.weight, norm.eps)[0]


def ways_for(sums: GroupSum, num_rows: int) -> list[str]:
    """All ways that take so many rows."""
    ways = ["pull", "pull scatter"] if sums.num_ranks > 2 else ["pull"]
    return ["push", "push scatter", *ways] if sums.pushes and num_rows <= group_push.MAX_ROWS else ways


def check(parallel: ParallelContext, sums: GroupSum, norm: RMSNorm, width: int, max_tokens: int) -> float:
    """The largest relative error of 200 random steps against NCCL; every step's rows must agree on all ranks."""
    rng, worst = random.Random(3), 0.0
    device = parallel.device
    for step in range(200):
        num = rng.choice([1, 2, 3, 7, 16, 64, 65, 100, 257, 1000, max_tokens])
        torch.manual_seed(step * 8 + parallel.rank.tp_rank)
        part_TD = torch.randn(num, width, dtype=torch.bfloat16, device=device)
        torch.manual_seed(step)
        residual_TD = torch.randn(num, width, dtype=torch.bfloat16, device=device)
        total_TD = part_TD.float()
        dist.all_reduce(total_TD, group=parallel.tp_group)
        want_TD = ops.rms_norm((residual_TD.float() + total_TD).bfloat16(), norm.weight, norm.eps).float()
        sums.part(step % 2, num).copy_(part_TD)
        way = rng.choice(ways_for(sums, num))
        got_TD = sums.add_norm(step % 2, residual_TD, norm, way=way)
        worst = max(worst, float((got_TD.float() - want_TD).norm() / want_TD.norm()))
        same = got_TD.float().clone()
        dist.all_reduce(same, op=dist.ReduceOp.MAX, group=parallel.tp_group)
        assert torch.equal(same, got_TD.float()), f"step {step}: ranks differ, {num} rows by {way}"
        logits = torch.randn(num, 1000, dtype=torch.bfloat16, device=device)
        if num <= 1000:
            ids, values = sums.choose(logits, logits.float().argmax(-1), 1000 * parallel.rank.tp_rank)
            most = logits.float().max(-1).values
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=parallel.tp_group)
            assert torch.equal(most, values), f"step {step}: not the largest"
            seen = ids.clone()
            dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=parallel.tp_group)
            assert torch.equal(seen, ids), f"step {step}: ranks chose differently"
    return worst


def check_copies(parallel: ParallelContext, sums: GroupSum, norm: RMSNorm, width: int) -> dict[str, object]:
    """Sums by copies in halves, queued one by one and by a graph, against NCCL: errors, microseconds of host and card.

    Random parts come anew before each of twenty rounds; a round sums both halves eight times, the parts in turn.
    """
    num, device = sums.max_tokens - 100, parallel.device
    copies = open_group_copies(parallel, sums, max_rows=sums.max_tokens // 2 + 128)
    assert copies is not None, "this driver has no flags in streams"
    found: dict[str, object] = {"check": "copies", "cards": sums.num_ranks, "tokens": num, "recorded": copies.in_graphs}
    halves = (slice(0, sums.max_tokens // 2), slice(sums.max_tokens // 2, num))
    stream = torch.cuda.Stream(device)
    residual_TD = torch.zeros(num, width, dtype=torch.bfloat16, device=device)
    rows_T = torch.arange(num, device=device)

    def round_of_sums() -> None:
        for turn in range(16):
            copies.sum_rows(stream, turn // 2 % 2, residual_TD, halves[turn % 2], norm)

    with torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph() if copies.in_graphs else None
        round_of_sums()
        if graph is not None:
            torch.cuda.synchronize(device)
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                round_of_sums()
        for way, run in (("queued", round_of_sums), ("by_graph", graph.replay if graph is not None else None)):
            if run is None:
                continue
            worst, spent, host = 0.0, 0.0, 0.0
            for step in range(20):
                torch.manual_seed(step * 8 + parallel.rank.tp_rank)
                parts = [torch.randn(num, width, dtype=torch.bfloat16, device=device) for _ in range(2)]
                for which, part_TD in enumerate(parts):
                    sums.part(which, num).copy_(part_TD)
                residual_TD.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize(device)
                dist.barrier(parallel.tp_group)
                began = time.perf_counter()
                start.record(stream)
                run()
                end.record(stream)
                host += time.perf_counter() - began
                torch.cuda.synchronize(device)
                spent += start.elapsed_time(end)
                total_TD = 4 * (parts[0].float() + parts[1].float())
                dist.all_reduce(total_TD, group=parallel.tp_group)
                owned_T = copies.owns(rows_T, halves)
                off = (residual_TD.float() - total_TD)[owned_T].norm() / total_TD[owned_T].norm()
                want_TD = ops.rms_norm(total_TD, norm.weight, norm.eps).float()
                off_normed = (sums.shared(num).float() - want_TD).norm() / want_TD.norm()
                worst = max(worst, float(off), float(off_normed))
            found[way] = {"error": worst, "us": round(1e3 * spent / 320, 1), "host_us": round(1e6 * host / 320, 1)}
    return found


def timed(parallel: ParallelContext, run: object) -> float:
    """Microseconds each of REPEATS calls in a graph."""
    device = parallel.device
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        run()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(REPEATS):
                run()
        times = []
        for _ in range(5):
            torch.cuda.synchronize(device)
            dist.barrier(parallel.tp_group)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(stream)
            for _ in range(4):
                graph.replay()
            end.record(stream)
            torch.cuda.synchronize(device)
            times.append(1e3 * start.elapsed_time(end) / (4 * REPEATS))
        graph.reset()
    return sorted(times)[2]


def main_of_rank(tp_rank: int, args: argparse.Namespace, port: int) -> None:
    """Check and time on one card."""
    if args.isolated:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7").split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[tp_rank]
    device = torch.device("cuda", 0 if args.isolated else tp_rank)
    torch.cuda.set_device(device)
    rank = make_plan(1, args.cards, 1).ranks[tp_rank]
    parallel = init_parallel(rank, f"127.0.0.1:{port}", device, 60.0)
    began = time.perf_counter()
    sums = open_group_sum(
        parallel, max_tokens=args.max_tokens, width=args.width, max_rows=1024, dtype=torch.bfloat16
    )  # fmt: skip
    assert sums is not None, "these cards can't address each other"
    norm = RMSNorm(args.width, 1e-5, dtype=torch.bfloat16)
    torch.manual_seed(1)
    norm.weight = torch.nn.Parameter(torch.rand(args.width, device=device).bfloat16(), requires_grad=False)
    if tp_rank == 0:
        print(f"shared memory open after {time.perf_counter() - began:.2f} s", flush=True)
    worst = check(parallel, sums, norm, args.width, args.max_tokens)
    if tp_rank == 0:
        print(json.dumps({"check": "group_sum", "cards": args.cards, "largest_relative_error": worst}), flush=True)
    copied = check_copies(parallel, sums, norm, args.width)
    if tp_rank == 0:
        print(json.dumps(copied), flush=True)
    for num in args.tokens:
        part_TD = torch.zeros(num, args.width, dtype=torch.bfloat16, device=device)
        residual_TD = torch.zeros_like(part_TD)
        turn = [0]

        def ours(residual_TD: Tensor = residual_TD, turn: list[int] = turn, way: str | None = None) -> None:
            turn[0] ^= 1
            sums.add_norm(turn[0], residual_TD, norm, way=way)

        def nccl(part_TD: Tensor = part_TD, residual_TD: Tensor = residual_TD) -> None:
            by_nccl(parallel, part_TD, residual_TD, norm)

        by_way = {way: round(timed(parallel, functools.partial(ours, way=way)), 2) for way in ways_for(sums, num)}
        row = {
            "kernel": "group_sum", "cards": args.cards, "tokens": num, "width": args.width,
            "us": by_way[sums.way_of(num)], "by_way": by_way, "nccl_add_norm_us": round(timed(parallel, nccl), 2),
            "device": torch.cuda.get_device_name(device),
        }  # fmt: skip
        if tp_rank == 0:
            print(json.dumps(row), flush=True)
    dist.barrier()
    destroy_parallel(parallel)


def main() -> None:
    """One process a card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", type=int, default=2)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 256, 1024, 8192])
    parser.add_argument("--isolated", action="store_true", help="each rank sees its own card alone, as under Ray")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.spawn(main_of_rank, (args, free_port("127.0.0.1")), nprocs=args.cards)


if __name__ == "__main__":
    main()
