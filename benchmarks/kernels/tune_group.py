"""Sizes of the products of one rank of a tensor-parallel group, chosen by the time of the group's own decode steps.

    python benchmarks/kernels/tune_group.py --model 8b --cards 2 --out FILE     (1 card: norms and residuals inside)

Each product alone first (cuBLAS, and `gemv_split` in many sizes; the cards share the shapes out), then the best few,
what was tuned before, and how far ahead weights are asked for, in steps of eight layers over the cards: a kernel that
asks for its weights while the sum before it waits for the link is worth more there than alone. Prints every try and
writes the entries for `kernels/tuned/<gpu>.json`.
"""

# ruff: noqa: B023 - every closure here is called within the turn of the loop that made it
import argparse
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from bench_kernels import rand
from few_sizes import HEAD_SIZE, KERNELS, LIBRARY, MODELS, Sizes, shapes_of, short, sizes_of
from timing import copies_for, microseconds, recorded
from torch import Tensor
from trials import compile_apart, part_of

from argosy.kernels import gemv, ops, paged_attention, tuning
from argosy.placement.plan import make_plan
from argosy.placement.ports import free_port
from argosy.placement.process_groups import ParallelContext, destroy_parallel, init_parallel
from argosy.workers.layers.group_sum import open_group_sum
from argosy.workers.layers.norm import RMSNorm

LAYOUTS = (("06b", 1), ("8b", 1), ("8b", 2), ("8b", 4), ("70b", 2), ("70b", 4))
CONTEXT, LAYERS = 256, 8
ATTENTION = [
    {"block_l": block_l, "warps": warps, "stages": stages, "per_sm": 1, "min_piece": min_piece}
    for block_l, warps, stages in ((128, 4, 5), (64, 4, 5), (64, 4, 3), (128, 8, 3), (32, 4, 5), (64, 2, 3), (32, 2, 3))
    for min_piece in (128, 256, 512)
]
KEEP = 0.997  # of the time before, or a change is noise
WAYS = ("push", "push scatter", "pull", "pull scatter")


def compile_part(index: int, of: int, args: argparse.Namespace) -> None:
    """Every kernel that will be timed, for these layouts, run once; this process does each `of`-th."""
    layouts = [(model, int(cards)) for model, _, cards in (one.partition(":") for one in args.layouts)]
    seen: set[str] = set()
    weights: dict[tuple[int, int], Tensor] = {}

    def try_once(rows: int, num_in: int, num_out: int, sizes: Sizes, gated: bool) -> None:
        # what the same kernel is compiled for: all numbers here are divisible by 16
        prefetch = min(sizes["prefetch"], 1 << (num_in // sizes.get("splits", 1) * 2).bit_length() - 1)
        facts = sizes | {"splits": sizes.get("splits", 1) > 1, "prefetch": prefetch, "per_sm": 0}
        key = json.dumps([gemv.bucket(rows), gated, num_in % sizes["width"], facts])
        if key in seen:
            return
        seen.add(key)
        if len(seen) % of != index:
            return
        if (num_in, num_out) not in weights:
            weights.clear()
            weights[num_in, num_out] = rand(num_out, num_in)
        try:
            gemv.fused_linear(rand(rows, num_in), weights[num_in, num_out], sizes=sizes, gated=gated)
        except Exception as error:  # too large a program
            print("skipped", sizes, str(error)[:80], flush=True)

    for num_in, num_out, gated in dict.fromkeys(s for layout in layouts for s in shapes_of(*layout).values()):
        for rows in args.rows:
            tuned = tuning.pick("gemv", f"{num_in}x{num_out}x{gemv.bucket(rows)}", torch.device("cuda", 0))
            for sizes in [dict(tuned) | {"library": 0}] if tuned else []:
                for one in (sizes, *ahead_of(sizes, num_in)):
                    try_once(rows, num_in, num_out, one, gated)
            for sizes in sizes_of(rows, num_in, num_out, args.kernels):
                for one in (sizes, *ahead_of(sizes, num_in)):
                    try_once(rows, num_in, num_out, one, gated)
    of_attention = itertools.product(ATTENTION, layouts if args.attention else ())
    for number, (sizes, layout) in enumerate(of_attention):
        if number % of == index:
            attend = attention_of(*layout, 1, CONTEXT)
            attend(rand(1, shapes_of(*layout)["qkv"][1]), 0, sizes)
    torch.cuda.synchronize()


def attention_of(model: str, cards: int, rows: int, context: int) -> Callable[..., Tensor]:
    """Attention of a decode step over caches of its own for each layer: (qkv, layer, sizes or as tuned)."""
    _, _, heads, kv_heads, _ = MODELS[model]
    heads, kv_heads, per_row = heads // cards, max(1, kv_heads // cards), context // 16 + 1
    caches = [[rand(rows * per_row, 16, kv_heads, HEAD_SIZE) for _ in range(2)] for _ in range(LAYERS)]
    table = torch.arange(rows * per_row, device="cuda").view(rows, per_row).int()
    lengths = torch.full((rows,), context, device="cuda", dtype=torch.int32)
    positions = lengths.long() - 1
    slots = table[:, (context - 1) // 16].long() * 16 + (context - 1) % 16
    rotations = torch.randn(8192, HEAD_SIZE, device="cuda")

    def attend(qkv: Tensor, layer: int, sizes: Sizes | None = None) -> Tensor:
        inputs = (qkv, positions, rotations, *caches[layer], slots, table, lengths)
        options = {"num_heads": heads, "scale": 0.1, "max_context": 4096, "inputs_early": True}
        if sizes is None:
            return ops.decode_attention(*inputs, **options)
        return paged_attention.decode_attention(*inputs, **options, sizes=sizes)

    return attend


def alone(
    shape: tuple[int, int, bool], rows: int, name: str, kernels: Sequence[int]
) -> tuple[float, list[tuple[float, Sizes]]]:
    """(microseconds of the library, [(microseconds, sizes)] of the best first) of one product."""
    num_in, num_out, gated = shape
    weights = [rand(num_out, num_in) / 64 for _ in range(copies_for(num_in * num_out * 2, 24))]
    x = rand(rows, num_in)

    def library(w: Tensor) -> object:
        y = F.linear(x, w)
        return ops.silu_and_mul(y) if gated else y

    launches = max(len(weights), 20)
    by_library = microseconds([lambda w=w: library(w) for w in weights], launches=launches, replays=3)[0]
    times: list[tuple[float, Sizes]] = []
    tuned = tuning.pick("gemv", f"{num_in}x{num_out}x{gemv.bucket(rows)}", x.device)
    tries = sizes_of(rows, num_in, num_out, kernels)
    known = [dict(tuned) | {"library": 0}] if tuned and tuned["kernel"] not in kernels else []
    for sizes in (*known, *tries):
        calls = [lambda w=w: gemv.fused_linear(x, w, sizes=sizes, gated=gated) for w in weights]
        try:
            times.append((microseconds(calls, launches=launches, replays=3)[0], sizes))
        except Exception as error:  # a size that does not fit is no failure of the search
            print("skipped", sizes, str(error)[:80], flush=True)
    times.sort(key=lambda found: found[0])
    floor = num_in * num_out * 2 / 4.44e6
    best = "  ".join(f"{us:.1f} {short(sizes)}" for us, sizes in times[:3])
    print(f"{name} {num_in}x{num_out} {rows} rows: floor {floor:.1f}, library {by_library:.1f}; {best}", flush=True)
    return by_library, times


class Chain:
    """Eight layers of one rank as `GroupForward` runs them, over random weights."""

    def __init__(self, parallel: ParallelContext, model: str, cards: int, most_rows: int):
        self.parallel, self.device = parallel, parallel.device
        self.model, self.cards, hidden = model, cards, MODELS[model][0]
        self.hidden, self.kv_heads = hidden, max(1, MODELS[model][3] // cards)
        self.shapes = shapes_of(model, cards)
        names = [name for name in self.shapes if name != "head"]
        self.weights = [
            [rand(self.shapes[n][1], self.shapes[n][0]) / math.sqrt(self.shapes[n][0]) for n in names]
            for _ in range(LAYERS)
        ]
        self.way = ""
        self.sums = open_group_sum(
            parallel, max_tokens=max(64, most_rows), width=hidden, max_rows=max(64, most_rows), dtype=torch.bfloat16
        )  # fmt: skip
        assert cards == 1 or self.sums is not None, "these cards can't address each other"
        self.norm = RMSNorm(hidden, 1e-5, dtype=torch.bfloat16)
        self.norm.weight = torch.nn.Parameter(torch.ones(hidden, device=self.device).bfloat16(), requires_grad=False)
        self.attention: Sizes | None = None

    def of(self, rows: int, context: int = CONTEXT) -> Callable[[], Tensor]:
        """A step of `rows` rows, ready to be captured."""
        attend = attention_of(self.model, self.cards, rows, context)
        residual, start = rand(rows, self.hidden), rand(rows, self.hidden)

        def run_alone() -> Tensor:
            norm = {"norm_weight_I": self.norm.weight, "eps": self.norm.eps}
            for layer, (qkv_w, o_w, gate_up_w, down_w) in enumerate(self.weights):
                seen = attend(ops.fused_linear(residual, qkv_w, **norm), layer, self.attention)
                ops.fused_linear(seen.view(rows, -1), o_w, residual_TO=residual)
                inner = ops.fused_linear(residual, gate_up_w, gated=True, **norm)
                ops.fused_linear(inner, down_w, residual_TO=residual)
            return residual

        if self.sums is None:
            return run_alone
        sums = self.sums

        def run() -> Tensor:
            x = start
            for layer, (qkv_w, o_w, gate_up_w, down_w) in enumerate(self.weights):
                seen = attend(ops.fused_linear(x, qkv_w), layer, self.attention)
                ops.fused_linear(seen.view(rows, -1), o_w, out_TO=sums.part(0, rows))
                x = sums.add_norm(0, residual, self.norm, way=self.way or None)
                inner = ops.fused_linear(x, gate_up_w, gated=True)
                ops.fused_linear(inner, down_w, out_TO=sums.part(1, rows))
                x = sums.add_norm(1, residual, self.norm, way=self.way or None)
            return x

        return run

    def time(self, run: Callable[[], Tensor], replays: int = 7) -> float:
        """Microseconds a layer, the slowest rank's median; the same number on all ranks."""
        with recorded(run, self.device) as (graph, stream):
            times = []
            for _ in range(replays + 1):
                stream.synchronize()
                if self.sums is not None:
                    dist.barrier(self.parallel.tp_group)
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                graph.replay()  # ranks begin together
                start.record(stream)
                for _ in range(3):
                    graph.replay()
                end.record(stream)
                stream.synchronize()
                times.append(1e3 * start.elapsed_time(end) / (3 * LAYERS))
        found = torch.tensor([statistics.median(times[1:])], device=self.device)
        if self.sums is not None:
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.parallel.tp_group)
        return float(found[0])


def ahead_of(sizes: Sizes, num_in: int) -> list[Sizes]:
    """The same, asking for more or less of the weights before the kernel before is done."""
    if sizes.get("library"):
        return []
    if sizes["kernel"] == gemv.SPLIT:
        return [sizes | {"prefetch": prefetch} for prefetch in (0, 2048)]
    if sizes["kernel"] == gemv.AHEAD:
        return [sizes | {"early": 1}]
    return [sizes | {"prefetch": 0}, sizes | {"prefetch": 1 << (2 * num_in).bit_length()}]


def tune_chain(
    chain: Chain, rows: int, table: dict[str, Sizes], ranked: dict[str, list[Sizes]], *, says: bool,
    attention: bool = True,
) -> dict[str, object]:  # fmt: skip
    """Entries of `table` replaced where that makes the chain faster. Returns what came out."""
    run = chain.of(rows)
    before = now = chain.time(run)
    ways = {}
    for way in WAYS if chain.sums is not None else ():
        if way == "pull scatter" and chain.parallel.tp_size == 2:
            continue
        if way.startswith("push") and not chain.sums.pushes:
            continue
        chain.way = way
        ways[way] = chain.time(run)
    chain.way = min(ways, key=ways.__getitem__, default="")
    if says:
        print(
            f"{rows} rows: {before:.2f} us a layer as it was; { ({w: round(t, 2) for w, t in ways.items()}) }",
            flush=True,
        )
    now = chain.time(run)
    for name in ("qkv", "o", "gate_up", "down"):
        num_in, num_out, _ = chain.shapes[name]
        key = f"{num_in}x{num_out}x{gemv.bucket(rows)}"
        for turn in range(2):
            tries = ahead_of(table.get(key, LIBRARY), num_in) if turn else ranked[f"{name} {rows}"]
            for sizes in tries:
                old = table.get(key)
                table[key] = sizes
                us = chain.time(run)
                kept = us < now * KEEP
                if says:
                    print(f"    {name} {us:.2f} {short(sizes)}{' kept' if kept else ''}", flush=True)
                if kept:
                    now = us
                elif old is None:
                    del table[key]
                else:
                    table[key] = old
    if attention and rows * chain.kv_heads < tuning.device_facts(chain.device).num_sms:
        runs = [chain.of(rows, context) for context in (192, 384)]
        found = []
        for sizes in (None, *ATTENTION):
            chain.attention = sizes
            found.append(([round(chain.time(one), 2) for one in runs], sizes))
        chain.attention = None
        if says:
            print(f"    attention of 192 and 384, as tuned {found[0][0]}", flush=True)
            for times, sizes in sorted(found, key=lambda one: sum(one[0]))[:6]:
                print(f"        {times} {sizes}", flush=True)
    return {"rows": rows, "before_us": round(before, 2), "us": round(now, 2),
            "ways": {way: round(us, 2) for way, us in ways.items()}}  # fmt: skip


def main_of_rank(tp_rank: int, args: argparse.Namespace, port: int, folder: str) -> None:
    """Tune on one card."""
    device = torch.device("cuda", tp_rank)
    torch.cuda.set_device(device)
    torch.set_default_device(device)
    torch.manual_seed(tp_rank)
    shapes = shapes_of(args.model, args.cards)
    slug = tuning.device_facts(device).slug
    began = time.perf_counter()
    own: dict[str, list[Sizes]] = {}
    jobs = [(rows, name) for rows in args.rows for name in shapes]
    jobs.sort(key=lambda job: -shapes[job[1]][0] * shapes[job[1]][1])
    for rows, name in jobs[tp_rank :: args.over]:
        by_library, times = alone(shapes[name], rows, name, args.kernels)
        own[f"{name} {rows}"] = [LIBRARY, *(sizes for _, sizes in times[: args.best])]
        if name == "head":  # nothing stands before it that would wait: what is the fastest alone
            own[f"head {rows}"] = [times[0][1]] if times and times[0][0] < by_library * KEEP else [LIBRARY]
        torch.cuda.empty_cache()
    Path(folder, f"{tp_rank}.json").write_text(json.dumps(own))
    # not before: NCCL's own thread breaks captures in the mode that `alone` uses
    parallel = init_parallel(make_plan(1, args.over, 1).ranks[tp_rank], f"127.0.0.1:{port}", device, 120.0)
    if args.over > 1:
        dist.barrier(parallel.tp_group)
    ranked: dict[str, list[Sizes]] = {}
    for rank in range(args.over):
        ranked |= json.loads(Path(folder, f"{rank}.json").read_text())
    if tp_rank == 0:
        print(f"alone: {time.perf_counter() - began:.1f} s", flush=True)
    table = {key: dict(sizes) for key, sizes in tuning._tuned(slug).get("gemv", {}).items()}
    for rows in args.rows:
        num_in, num_out, _ = shapes["head"]
        table[f"{num_in}x{num_out}x{gemv.bucket(rows)}"] = ranked[f"head {rows}"][0]
    tuning.pick = lambda kernel, key, device: table.get(key) if kernel == "gemv" else PICK(kernel, key, device)  # type: ignore[assignment]  # the sizes under trial
    chain = Chain(parallel, args.model, args.cards, max(args.rows))
    for rows in args.rows:
        chain.way = ""
        row = tune_chain(chain, rows, table, ranked, says=tp_rank == 0, attention=args.attention)
        if tp_rank == 0:
            about = {"kernel": "group_step", "model": args.model, "cards": args.cards, "over": args.over}
            print(json.dumps(about | row | {"device": torch.cuda.get_device_name(device)}), flush=True)
            keys = {f"{i}x{o}x{gemv.bucket(r)}" for r in args.rows for i, o, _ in shapes.values()}
            Path(args.out).write_text(json.dumps({"gemv": {k: table[k] for k in sorted(keys) if k in table}}, indent=1))
    if tp_rank == 0:
        print(f"all: {time.perf_counter() - began:.1f} s", flush=True)
    if args.over > 1:
        dist.barrier()
    destroy_parallel(parallel)


PICK = tuning.pick


def main() -> None:
    """Compile, then one process a card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="8b")
    parser.add_argument("--cards", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--best", type=int, default=4, help="sizes of each product that are tried in steps")
    parser.add_argument("--out", default="tuned_group.json")
    parser.add_argument("--layouts", nargs="+", default=[f"{m}:{c}" for m, c in LAYOUTS], help="what to compile for")
    parser.add_argument(
        "--kernels", type=int, nargs="+", default=[gemv.SPLIT, gemv.AHEAD], choices=KERNELS,
        help=f"whose sizes are tried beside what was tuned, as the tables number them: {KERNELS}",
    )  # fmt: skip
    parser.add_argument("--no-attention", dest="attention", action="store_false", help="leave its sizes")
    parser.add_argument("--over", type=int, help="run the steps over fewer cards than the shapes are of")
    parser.add_argument("--compile-only", action="store_true", help="fill Triton's cache and stop")
    parser.add_argument("--compiled", action="store_true", help="Triton's cache is full already")
    parser.add_argument("--compile-part", help=argparse.SUPPRESS)  # "i/n": be one of the compiling processes
    args = parser.parse_args()
    args.over = args.over or args.cards
    if args.compile_part:
        compile_part(*part_of(args.compile_part), args)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not args.compiled:
        compile_apart(24, over_cards=True)()
    if args.compile_only:
        return
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(main_of_rank, (args, free_port("127.0.0.1"), folder), nprocs=args.over)


if __name__ == "__main__":
    main()
