"""Products of a few tokens by a ring (`kernels/gemv_ring`) in a group's decode steps, beside what was tuned.

    python benchmarks/kernels/tune_ring.py --model 8b --cards 2 --rows 8 --out FILE

First every size against plain torch, then, in recorded steps of eight layers over the cards: all products by rings at
once in a few ways, then sizes of one product after the other, their sums left in pieces for the sum over the group or
not, and attention. Prints every try, a profile of a layer before and after, and writes the entries for
`kernels/tuned/<gpu>.json`.
"""

import argparse
import functools
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from bench_kernels import rand
from few_sizes import MODELS, Sizes, shapes_of, short
from timing import recorded
from torch import Tensor
from trials import compile_apart, part_of
from tune_group import CONTEXT, KEEP, LAYERS, PICK, Chain, attention_of

from argosy.kernels import gemv, gemv_ring, group_push, group_sum, hopper_gate, ops, tuning
from argosy.kernels.fp8_ring import RING_BYTES
from argosy.placement.plan import make_plan
from argosy.placement.ports import free_port
from argosy.placement.process_groups import destroy_parallel, init_parallel
from argosy.workers.layers.group_sum import Left

WORST = 0.01  # relative error: numbers are rounded to 16 bits
FEW_ROWS = [  # of attention, where rows times key/value heads are fewer than multiprocessors
    dict(zip(("block_l", "warps", "stages", "min_piece", "per_sm", "late"), each, strict=True))
    for each in (
        (64, 8, 6, 512, 1, 1), (128, 4, 4, 512, 1, 1), (64, 4, 4, 512, 1, 1), (64, 8, 3, 512, 1, 1),
        (128, 8, 3, 512, 1, 1), (64, 8, 4, 128, 1, 1), (64, 8, 4, 512, 1, 0), (128, 4, 3, 512, 1, 0),
    )
]  # fmt: skip
MANY_ROWS = [
    dict(zip(("block_l", "warps", "stages", "splits", "min_piece", "per_sm", "late"), each, strict=True))
    for each in (
        (64, 2, 3, 1, 512, 1, 0), (32, 1, 2, 1, 512, 1, 0), (32, 1, 3, 1, 512, 1, 0), (64, 2, 2, 1, 512, 1, 0),
        (128, 4, 2, 1, 512, 1, 0), (64, 4, 3, 1, 512, 1, 0), (32, 2, 3, 1, 512, 1, 0), (16, 1, 4, 1, 512, 1, 0),
        (64, 2, 3, 1, 512, 1, 1), (64, 4, 3, 1, 512, 1, 1), (128, 4, 3, 1, 512, 1, 1), (32, 1, 3, 1, 512, 1, 1),
        (64, 2, 3, 2, 128, 1, 0), (32, 1, 3, 2, 128, 1, 0), (64, 2, 3, 2, 128, 1, 1), (64, 4, 3, 2, 128, 1, 1),
    )
]  # fmt: skip


def attention_tries(rows: int, model: str, cards: int) -> list[Sizes]:
    """For so many rows."""
    return FEW_ROWS if rows * MODELS[model][3] // cards < 132 else MANY_ROWS


def ring_sizes(name: str, rows: int, num_in: int, num_rows: int, cards: int) -> Iterator[Sizes]:
    """Of one product: one program a multiprocessor whose ring fills it, or two."""
    gated = name == "gate_up"
    outputs, tokens = num_rows // (1 + gated), max(8, tuning.next_power_of_two(rows))
    adds = cards > 1 and name in ("o", "down")
    for (height, width), pieces in itertools.product(((64, 128), (64, 256), (128, 128)), (1, 2, 4, 8)):
        programs, blocks = outputs // height * pieces, num_in // width // pieces
        place = ((1 + gated) * height + tokens) * width * 2
        if (
            num_in % (width * pieces)
            or (gated and (pieces > 1 or height > 64))
            or not 90 <= programs <= 600
            or blocks < 2
        ):
            continue
        seen = set()
        for per_sm in (1, 2):
            stages = min((RING_BYTES // per_sm - 4 * height * tokens - 1024 * (per_sm - 1)) // place, blocks)
            if stages < 2 or stages in seen or (per_sm == 1 and programs > 140 and stages < blocks):
                continue
            seen.add(stages)
            for early in (0, 2) if adds else (0, 1, 2):
                sizes = {"kernel": gemv.RING, "rows": height, "width": width, "stages": stages, "pieces": pieces,
                         "early": early, "library": 0}  # fmt: skip
                yield sizes
                if adds and pieces > 1:
                    yield sizes | {"left": 1}


def multiply(x: Tensor, weight: Tensor, sizes: Sizes, *, gated: bool) -> Tensor:
    """By a ring, added up."""
    made = gemv_ring.linear(x, weight, None, None, sizes, gated=gated, in_pieces=bool(sizes.get("left")))
    return made.sum(0).to(x.dtype) if made.dim() == 3 else made


def compile_part(index: int, of: int, args: argparse.Namespace) -> None:
    """Every kernel that will be timed, run once and compared with torch; this process does each `of`-th."""
    number, worst = 0, 0.0
    for name, (num_in, num_rows, gated) in shapes_of(args.model, args.cards).items():
        if name == "head":
            continue
        weight = None
        for sizes in ring_sizes(name, args.rows, num_in, num_rows, args.cards):
            number += 1
            if number % of != index:
                continue
            weight = rand(num_rows, num_in) / num_in**0.5 if weight is None else weight
            for rows in (args.rows, args.rows - 3):
                x = rand(rows, num_in)
                wanted = x.float() @ weight.float().T
                if gated:
                    gate, up = wanted.chunk(2, 1)
                    wanted = F.silu(gate) * up
                try:
                    made = multiply(x, weight, sizes, gated=gated)
                except Exception as error:  # too large a program
                    print("skipped", name, sizes, str(error)[:80], flush=True)
                    break
                worst = max(worst, float((made.float() - wanted).norm() / wanted.norm()))
                if not worst < WORST:
                    print(f"WRONG {name} {rows} rows {short(sizes)}: {worst:.4f}", flush=True)
                    worst = 0.0
    tries = [(r, s) for r in (args.rows, *args.profiled) for s in attention_tries(r, args.model, args.cards)]
    for rows, sizes in tries[index::of]:
        attend = attention_of(args.model, args.cards, rows, CONTEXT)
        attend(rand(rows, shapes_of(args.model, args.cards)["qkv"][1]), 0, sizes)
    torch.cuda.synchronize()
    compile_others(index, of, args)
    if index == 0:
        print(f"largest relative error {worst:.5f}", flush=True)


def compile_others(index: int, of: int, args: argparse.Namespace) -> None:
    """What the ring is compared with, and the sums, which alone would wait for ever: without a launch."""
    hidden, shapes = MODELS[args.model][0], shapes_of(args.model, args.cards)
    calls: list[Callable[[], object]] = []
    bases, counters = torch.zeros(args.over, dtype=torch.int64), torch.zeros(1024, dtype=torch.int32)
    for rows in (args.rows, *args.profiled):
        for name in ("qkv", "o", "gate_up", "down"):
            num_in, num_rows, gated = shapes[name]
            calls.append(
                lambda r=rows, i=num_in, o=num_rows, g=gated: ops.fused_linear(
                    rand(r, i), torch.empty(o, i).bfloat16(), gated=g
                )
            )
        calls.append(
            lambda r=rows: attention_of(args.model, args.cards, r, CONTEXT)(rand(r, shapes["qkv"][1]), 0, None)
        )
        x = rand(rows, hidden)
        if rows <= group_push.MAX_ROWS:
            parts = [x, *(torch.zeros(pieces, rows, hidden) for pieces in (2, 4, 8))]
            calls += [
                lambda p=part, x=x: group_push.push_add_norm(bases, counters, 0, p, x, x[0], 1e-5, inbox_at=1024)
                for part in parts
            ]
        calls.append(lambda x=x: group_sum.sum_add_norm(bases, counters, 0, x, x[0], 1e-5, parts_bytes=1024))
    kinds = {type(group_push._push_kernel), type(group_sum._sum_kernel)}
    before = [(kind, kind.__getitem__) for kind in kinds]
    for kind in kinds:
        kind.__getitem__ = lambda kernel, grid: functools.partial(kernel.run, grid=grid, warmup=True)
    for call in calls[of - 1 - index :: of]:
        call()
    for kind, launch in before:
        kind.__getitem__ = launch


class Steps(Chain):
    """Layers as `GroupForward` runs them, whose sums may take what o and down left in pieces."""

    def of(self, rows: int, context: int = CONTEXT) -> Callable[[], Tensor]:
        """A step of `rows` rows, ready to be captured."""
        if self.sums is None:
            return super().of(rows, context)
        sums = self.sums
        attend = attention_of(self.model, self.cards, rows, context)
        residual, start = rand(rows, self.hidden), rand(rows, self.hidden)

        def add(which: int, x: Tensor, weight: Tensor) -> Tensor:
            sizes = tuning.pick("gemv", f"{weight.shape[1]}x{weight.shape[0]}x{gemv.bucket(rows)}", x.device)
            pieces = None
            if sizes is not None and sizes.get("left"):
                pieces = gemv_ring.linear(x, weight, None, None, sizes, in_pieces=True)
            else:
                ops.fused_linear(x, weight, out_TO=sums.part(which, rows))
            return sums.add_norm(which, residual, self.norm, way=self.way or None, left=Left(pieces))

        def run() -> Tensor:
            x = start
            for layer, (qkv_w, o_w, gate_up_w, down_w) in enumerate(self.weights):
                seen = attend(ops.fused_linear(x, qkv_w), layer, self.attention)
                x = add(0, seen.view(rows, -1), o_w)
                x = add(1, ops.fused_linear(x, gate_up_w, gated=True), down_w)
            return x

        return run

    def breakdown(self, run: Callable[[], Tensor], title: str, *, says: bool) -> None:
        """Microseconds of each launch of a layer: from begin to begin, and from end to end."""
        with recorded(run, self.device) as (graph, stream):
            graph.replay()
            stream.synchronize()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
                for _ in range(4):
                    graph.replay()
                stream.synchronize()
        events = sorted(
            (e.time_range.start, e.time_range.end, e.name)
            for e in profiler.events()
            if e.device_type == torch.autograd.DeviceType.CUDA and "Mem" not in e.name
        )
        if says and len(events) % (4 * LAYERS) == 0:
            each = len(events) // (4 * LAYERS)
            events = events[2 * LAYERS * each :]  # the first two replays fill the queue
            print(f"  {title}, a layer: begin to begin, end to end", flush=True)
            for place in range(each):
                turns = range(each + place, len(events) - each, each)
                begun = sum(events[i + 1][0] - events[i][0] for i in turns) / len(turns)
                ended = sum(events[i][1] - events[i - 1][1] for i in turns) / len(turns)
                print(f"    {begun:6.2f} {ended:6.2f}  {events[each + place][2][:60]}", flush=True)
        elif says:
            print(f"  {title}: {len(events)} launches are no whole layers", flush=True)


def tune(chain: Steps, args: argparse.Namespace, table: dict[str, Sizes], *, says: bool) -> None:
    """Entries of `table` replaced where that makes the steps faster."""
    rows, began = args.rows, time.perf_counter()
    run = chain.of(rows)
    shapes = {name: shape for name, shape in chain.shapes.items() if name != "head"}
    keys = {name: f"{i}x{o}x{gemv.bucket(rows)}" for name, (i, o, _) in shapes.items()}
    pushes = chain.sums is not None and chain.sums.way_of(rows) == "push"
    tries = {
        name: [s for s in ring_sizes(name, rows, i, o, chain.cards) if pushes or not s.get("left")]
        for name, (i, o, _) in shapes.items()
    }
    before = now = chain.time(run)
    if says:
        counts = {name: len(offered) for name, offered in tries.items()}
        print(f"{rows} rows over {args.over}: {before:.2f} us a layer as it was; {counts}", flush=True)
    chain.breakdown(run, "as it was", says=says)

    def offer(changed: dict[str, Sizes], what: str) -> bool:
        nonlocal now
        old = {key: table.get(key) for key in changed}
        table.update(changed)
        try:
            us = chain.time(run)
        except Exception as error:  # too large a program
            us = float("inf")
            print(f"    {what} {str(error)[:80]}", flush=True)
        kept = us < now * KEEP
        if says:
            print(f"    {what} {us:.2f}{' kept' if kept else ''}", flush=True)
        if kept:
            now = us
            return True
        for key, sizes in old.items():
            if sizes is None:
                table.pop(key, None)
            else:
                table[key] = sizes
        return False

    def some(name: str, early: int, left: int, pieces: int, stages_more: bool) -> Sizes | None:
        fitting = [
            s for s in tries[name]
            if s["early"] == early and s.get("left", 0) == left and s["pieces"] == pieces and s["rows"] == 64
        ]  # fmt: skip
        fitting.sort(key=lambda s: s["stages"] * s["width"], reverse=stages_more)
        return fitting[0] if fitting else None

    # all at once: what a ring gains depends on what its neighbours leave of the card
    for early, left, wide, more in itertools.product((0, 1, 2), (0, 1) if pushes else (0,), (2, 4), (True, False)):
        changed = {}
        for name in shapes:
            adds = chain.sums is not None and name in ("o", "down")
            found = some(
                name, 2 if adds and early == 1 else early, left if adds else 0, 1 if name == "gate_up" else wide, more
            )
            if found is not None:
                changed[keys[name]] = found
        offer(changed, f"all: early {early} left {left} pieces {wide} {'one' if more else 'two'} a multiprocessor")
    for turn in range(args.turns):
        for name in ("qkv", "o", "gate_up", "down"):
            for sizes in tries[name]:
                # the clocks of ranks differ, and all must do the same
                late = torch.tensor([time.perf_counter() - began > args.seconds], device=chain.device).float()
                if chain.sums is not None:
                    dist.all_reduce(late, group=chain.parallel.tp_group)
                if float(late):
                    break
                if sizes != table.get(keys[name]):
                    offer({keys[name]: sizes}, f"{turn} {name} {short(sizes)}")
    attend_otherwise(chain, rows, says=says)
    chain.breakdown(run, "as it is", says=says)
    if says:
        about = {"kernel": "gemv_ring", "model": args.model, "cards": args.cards, "over": args.over, "rows": rows}
        print(json.dumps(about | {"before_us": round(before, 2), "us": round(now, 2)}), flush=True)
        Path(args.out).write_text(json.dumps({"gemv": {k: table[k] for k in keys.values() if k in table}}, indent=1))


def attend_otherwise(chain: Steps, rows: int, *, says: bool) -> None:
    """Steps with attention in other sizes."""
    runs = [chain.of(rows, context) for context in (192, 320)]
    for attention in (None, *attention_tries(rows, chain.model, chain.cards)):
        chain.attention = attention
        us = [round(chain.time(run), 2) for run in runs]
        if says:
            print(f"    {rows} rows, attention of 192 and 320 {us} {attention or 'as tuned'}", flush=True)
    chain.attention = None


def gate_inside(chain: Steps, rows: int, *, says: bool) -> None:
    """Steps whose gate comes with its product (`kernels/hopper_gate`), and without."""
    suits, run = hopper_gate.suits, chain.of(rows)
    us = []
    for is_inside in (False, True, False, True):
        hopper_gate.suits = (lambda *_: True) if is_inside else (lambda *_: False)
        us.append(round(chain.time(run), 2))
    if says:
        print(f"    {rows} rows, gate apart, inside, apart, inside {us}", flush=True)
    chain.breakdown(run, f"{rows} rows, gate inside", says=says)
    hopper_gate.suits = suits


def main_of_rank(tp_rank: int, args: argparse.Namespace, port: int) -> None:
    """Tune on one card."""
    device = torch.device("cuda", tp_rank)
    torch.cuda.set_device(device)
    torch.set_default_device(device)
    torch.manual_seed(tp_rank)
    slug = tuning.device_facts(device).slug
    parallel = init_parallel(make_plan(1, args.over, 1).ranks[tp_rank], f"127.0.0.1:{port}", device, 60.0)
    table = {key: dict(sizes) for key, sizes in tuning._tuned(slug).get("gemv", {}).items()}
    tuning.pick = lambda kernel, key, device: table.get(key) if kernel == "gemv" else PICK(kernel, key, device)  # type: ignore[assignment]  # the sizes under trial
    chain = Steps(parallel, args.model, args.cards, max(args.rows, *args.profiled, 64))
    for rows in args.profiled:
        run = chain.of(rows)
        us = chain.time(run)
        if tp_rank == 0:
            print(f"{rows} rows: {us:.2f} us a layer", flush=True)
        chain.breakdown(run, f"{rows} rows", says=tp_rank == 0)
    tune(chain, args, table, says=tp_rank == 0)
    for rows in args.profiled:
        attend_otherwise(chain, rows, says=tp_rank == 0)
        gate_inside(chain, rows, says=tp_rank == 0)
    if args.over > 1:
        dist.barrier()
    destroy_parallel(parallel)


def main() -> None:
    """Compile and compare, then one process a card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="8b")
    parser.add_argument("--cards", type=int, default=2)
    parser.add_argument("--over", type=int, help="run the steps over fewer cards than the shapes are of")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--profiled", type=int, nargs="*", default=[], help="rows whose layer is only profiled")
    parser.add_argument("--seconds", type=float, default=20, help="what is not tried by then is left")
    parser.add_argument("--turns", type=int, default=2, help="how often each product is asked")
    parser.add_argument("--out", default="tuned_ring.json")
    parser.add_argument("--compile-part", help=argparse.SUPPRESS)  # "i/n": be one of the compiling processes
    args = parser.parse_args()
    args.over = args.over or args.cards
    if args.compile_part:
        torch.set_default_device("cuda")
        compile_part(*part_of(args.compile_part), args)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    compile_apart(28, over_cards=True)()
    mp.spawn(main_of_rank, (args, free_port("127.0.0.1")), nprocs=args.over)


if __name__ == "__main__":
    main()
