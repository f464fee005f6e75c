"""One token over a group: a launch a layer beside attention (`kernels/layer_chain`) in many sizes, against seven.

    python benchmarks/kernels/tune_chain.py --over 2 --layouts 8b:2 8b:4 70b:4

`--layouts`: model and over how many cards its shapes are cut; steps run over `--over` cards. First what one layer says
against plain torch, and that all ranks say the same; then the time of a layer in recorded steps of eight. One JSON line
a layout.
"""

import argparse
import functools
import json
import os
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from bench_kernels import rand
from few_sizes import MODELS, Sizes, shapes_of
from torch import Tensor
from trials import compile_apart, part_of
from tune_group import CONTEXT, LAYERS, Chain, attention_of

from argosy.kernels import group_push, layer_chain, ops, tuning
from argosy.placement.plan import make_plan
from argosy.placement.ports import free_port
from argosy.placement.process_groups import destroy_parallel, init_parallel

SIZES: list[Sizes] = [
    {"slot": slot, "stages": stages, "warps": warps, "per_sm": per_sm, "spare": spare}
    for slot, stages, warps, per_sm, spare in (
        (32768, 2, 8, 1, 4), (32768, 3, 16, 1, 0), (32768, 3, 8, 1, 0), (32768, 2, 16, 1, 4), (32768, 3, 8, 1, 4),
        (16384, 5, 8, 1, 4), (16384, 4, 8, 1, 0), (16384, 3, 8, 2, 0),
    )
]  # fmt: skip
SIZES += [sizes | {"cut": 2} for sizes in SIZES[:2]]  # places 8 and 9

LEAN = tuning.pick("paged_attention", "h128_one", torch.device("cuda", 0)) if torch.cuda.is_available() else None
SMALL = [  # sizes of attention that leave room beside them
    {"block_l": block_l, "warps": warps, "stages": stages, "per_sm": 1, "min_piece": min_piece}
    for block_l, warps, stages, min_piece in (
        (32, 2, 3, 32), (32, 4, 3, 32), (32, 2, 3, 64), (64, 4, 2, 64), (32, 2, 3, 128), (32, 1, 3, 32),
    )
]  # fmt: skip
WORST = 0.01  # relative error: numbers are rounded to 16 bits on the way


class Words:
    """What the chain needs on each rank."""

    def __init__(self, parallel: object, world: int, hidden: int, inner: int, device: torch.device):
        num_bytes = layer_chain.inbox_words(world, hidden) * 4
        if world > 1:
            self.buffer = parallel.shared_buffer(num_bytes)  # type: ignore[attr-defined]  # a group has one
            self.bases = self.buffer.addresses_W
        else:
            self.buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
            self.bases = torch.tensor([self.buffer.data_ptr()], dtype=torch.int64, device=device)
        self.inner = torch.zeros(inner, dtype=torch.int32, device=device)
        self.counters = torch.zeros(1024, dtype=torch.int32, device=device)


def fits(sizes: Sizes, model: str, cards: int) -> bool:
    """Whether this layout takes these sizes."""
    shapes = shapes_of(model, cards)
    hidden, seen, inner, qkv = MODELS[model][0], shapes["o"][0], shapes["down"][0], shapes["qkv"][1]
    programs = layer_chain.programs_of(torch.empty(0, device="cuda"), sizes)
    return layer_chain.suits(seen, hidden, inner, qkv, sizes, programs)


def compile_part(index: int, of: int, args: argparse.Namespace) -> None:
    """Every kernel that will be timed, run once without waiting for anybody; this process does each `of`-th."""
    device = torch.device("cuda", 0)
    torch.set_default_device(device)
    jobs = [
        (model, int(cards), sizes, last)
        for model, _, cards in (one.partition(":") for one in args.layouts)
        for sizes in SIZES
        for last in (False, True)
        if fits(sizes, model, int(cards))
    ]
    # what it is compared with
    others: list[Callable[[], object]] = []
    for model, _, cards in (one.partition(":") for one in args.layouts):
        shapes, hidden = shapes_of(model, int(cards)), MODELS[model][0]
        for name in ("qkv", "o", "gate_up", "down"):
            num_in, num_out, gated = shapes[name]
            others.append(
                lambda i=num_in, o=num_out, g=gated: ops.fused_linear(rand(1, i), torch.empty(o, i).bfloat16(), gated=g)
            )
        for sizes in (None, LEAN, *(SMALL if args.attention else ())):
            others.append(
                lambda m=model, c=int(cards), q=shapes["qkv"][1], s=sizes: attention_of(m, c, 1, CONTEXT)(
                    rand(1, q), 0, s
                )
            )
        if args.over > 1:
            others.append(
                lambda d=hidden: group_push.push_add_norm(
                    torch.full((args.over,), torch.zeros(1 << 22).data_ptr()), torch.zeros(64, dtype=torch.int32), 0,
                    rand(1, d), rand(1, d), rand(d), 1e-5, inbox_at=1024, wait=True,
                )
            )  # fmt: skip
    # without a launch: alone they would wait for ever
    for kind in {type(layer_chain._chain_kernel), type(group_push._push_kernel)}:
        kind.__getitem__ = lambda kernel, grid: functools.partial(kernel.run, grid=grid, warmup=True)
    for model, cards, sizes, last in jobs[index::of]:
        shapes, hidden = shapes_of(model, cards), MODELS[model][0]
        seen, inner, qkv = shapes["o"][0], shapes["down"][0], shapes["qkv"][1]
        weights = [torch.empty(shapes[name][1], shapes[name][0]).bfloat16() for name in ("o", "gate_up", "down", "qkv")]
        norm = (torch.ones(hidden).bfloat16(), 1e-5)
        layer_chain.chain(
            rand(1, seen), (*weights[:3], None if last else weights[3]), (norm, norm), None, rand(1, hidden),
            rand(1, hidden if last else qkv), torch.zeros(args.over, dtype=torch.int64),
            torch.zeros(inner, dtype=torch.int32), torch.zeros(1024, dtype=torch.int32), 0, sizes, inbox_at=0,
        )  # fmt: skip
    for other in others[of - 1 - index :: of]:
        other()


class Steps(Chain):
    """Eight layers of one rank, with a launch a layer beside attention."""

    sizes: Sizes = SIZES[0]

    words: Words | None = None

    def words_for(self) -> Words:
        """Words and turns, alike for any number of programs."""
        if self.words is None:
            self.words = Words(self.parallel, self.parallel.tp_size, self.hidden, self.shapes["down"][0], self.device)
        self.words.counters.fill_(int(self.words.counters.max()))
        return self.words

    def in_chains(self, context: int = CONTEXT) -> Callable[[], Tensor]:
        """A step of one token, ready to be captured."""
        qkv, words = self.shapes["qkv"][1], self.words_for()
        attend = attention_of(self.model, self.cards, 1, context)
        residual, start = rand(1, self.hidden), rand(1, self.hidden)
        norm = (self.norm.weight, self.norm.eps)
        outs = [torch.empty(1, qkv).bfloat16() for _ in range(LAYERS)]
        x = torch.empty(1, self.hidden).bfloat16()

        def run() -> Tensor:
            product = ops.fused_linear(start, self.weights[0][0])
            for layer, (_, o_w, gate_up_w, down_w) in enumerate(self.weights):
                seen = attend(product, layer, self.attention).view(1, -1)
                last = layer + 1 == LAYERS
                product = layer_chain.chain(
                    seen, (o_w, gate_up_w, down_w, None if last else self.weights[layer + 1][0]), (norm, norm), None,
                    residual, x if last else outs[layer], words.bases, words.inner, words.counters,
                    self.parallel.rank.tp_rank, self.sizes, inbox_at=0,
                )  # fmt: skip
            return product

        return run

    def check(self) -> tuple[float, float, bool]:
        """(largest relative error of what comes out and of the residual against torch in float32, over all layers one
        behind the other; whether the residual is the same on all ranks)."""
        world = self.parallel.tp_size
        words, norm = self.words_for(), (self.norm.weight, self.norm.eps)
        worst, worst_residual, same = 0.0, 0.0, True

        def over_group(part: Tensor) -> Tensor:
            total = part.bfloat16().float()
            if world > 1:
                dist.all_reduce(total)
            return total

        for turn in range(3):
            seens = [rand(1, self.weights[0][1].shape[1]) for _ in range(LAYERS)]
            residual = rand(1, self.hidden)
            if world > 1:
                dist.broadcast(residual, 0)
            after, outs = residual.clone(), []
            for layer, (_, o_w, gate_up_w, down_w) in enumerate(self.weights):
                qkv_w = self.weights[layer + 1][0] if layer + 1 < LAYERS else None
                outs.append(torch.empty(1, self.hidden if qkv_w is None else qkv_w.shape[0]).bfloat16())
                layer_chain.chain(
                    seens[layer], (o_w, gate_up_w, down_w, qkv_w), (norm, norm), None, residual, outs[-1], words.bases,
                    words.inner, words.counters, self.parallel.rank.tp_rank, self.sizes, inbox_at=0,
                )  # fmt: skip
            for layer, (_, o_w, gate_up_w, down_w) in enumerate(self.weights):
                after = (after.float() + over_group(seens[layer].float() @ o_w.float().T)).bfloat16()
                gate, up = (self.norm(after).float() @ gate_up_w.float().T).chunk(2, 1)
                inner = (F.silu(gate) * up).bfloat16().float()
                after = (after.float() + over_group(inner @ down_w.float().T)).bfloat16()
                told = self.norm(after).float()
                if layer + 1 < LAYERS:
                    told = told @ self.weights[layer + 1][0].float().T
                worst = max(worst, float((outs[layer].float() - told).norm() / told.norm()))
            worst_residual = max(
                worst_residual, float((residual.float() - after.float()).norm() / after.float().norm())
            )
            if world > 1 and turn == 0:
                most, least = residual.float().clone(), residual.float().clone()
                dist.all_reduce(most, op=dist.ReduceOp.MAX)
                dist.all_reduce(least, op=dist.ReduceOp.MIN)
                same = bool((most == least).all())
        return worst, worst_residual, same


def main_of_rank(tp_rank: int, args: argparse.Namespace, port: int) -> None:
    """Check and time on one card."""
    ends = threading.Timer(args.limit, os._exit, (1,))  # a rank whose peer is gone waits in a kernel
    ends.daemon = True
    ends.start()
    device = torch.device("cuda", tp_rank)
    torch.cuda.set_device(device)
    torch.set_default_device(device)
    torch.manual_seed(tp_rank)
    if args.sizes:  # a spawned process reads this file anew
        SIZES[:] = [SIZES[number] for number in args.sizes]
    parallel = init_parallel(make_plan(1, args.over, 1).ranks[tp_rank], f"127.0.0.1:{port}", device, 120.0)
    began = time.perf_counter()
    for layout in args.layouts:
        model, _, cards = layout.partition(":")
        steps = Steps(parallel, model, int(cards), 1)
        found: dict[str, object] = {}
        for sizes in SIZES:
            if not fits(sizes, model, int(cards)):
                continue
            steps.sizes = sizes
            name = "/".join(f"{key[:2]}{value}" for key, value in sizes.items())
            if not found and not args.check:
                before = [round(steps.time(steps.of(1, context)), 2) for context in (256, 384)]
                found["seven launches"] = before
                if tp_rank == 0:
                    print(f"{layout} over {args.over}: {before} us a layer in seven launches", flush=True)
            try:
                error, of_residual, same = steps.check()
                if error > WORST or of_residual > WORST or not same:
                    raise SystemExit(
                        f"{layout} {name}: error {error:.2g}, {of_residual:.2g}, same on all ranks: {same}"
                    )
                times: list[float] = []
                if args.check:
                    found[name] = [error, of_residual]
                    break
                for steps.attention in (None, LEAN):
                    times += [round(steps.time(steps.in_chains(context), 5), 2) for context in (256, 384)]
                for steps.attention in SMALL if args.attention else ():
                    small = [round(steps.time(steps.in_chains(context), 5), 2) for context in (256, 384)]
                    if tp_rank == 0:
                        print(f"        {small} us a layer with {steps.attention}", flush=True)
                steps.attention = None
            except Exception as problem:  # a size that does not fit is no failure of the search
                print(f"    {name} {str(problem)[:150]}", flush=True)
                continue
            found[name] = times
            if tp_rank == 0:
                print(f"    {times} {name}: error {error:.2g}, {of_residual:.2g}, {same}", flush=True)
        if tp_rank == 0:
            row = {
                "kernel": "layer_chain",
                "layout": layout,
                "over": args.over,
                "contexts": [256, 384],
                "attention": ["as tuned", "lean"],
            }
            print(
                json.dumps(
                    row | {"errors" if args.check else "us": found, "device": torch.cuda.get_device_name(device)}
                ),
                flush=True,
            )
        del steps
        torch.cuda.empty_cache()
    if tp_rank == 0:
        print(f"all: {time.perf_counter() - began:.1f} s", flush=True)
    if args.over > 1:
        dist.barrier()
    destroy_parallel(parallel)


def main() -> None:
    """Compile, then one process a card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=["8b:2", "8b:4", "70b:4"])
    parser.add_argument("--over", type=int, default=2)
    parser.add_argument("--sizes", type=int, nargs="+", help="only these, by number")
    parser.add_argument("--attention", action="store_true", help="other sizes of attention as well")
    parser.add_argument("--check", action="store_true", help="only whether the first size that fits is right")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds after which ranks end")
    parser.add_argument("--compiled", action="store_true", help="Triton's cache is full already")
    parser.add_argument("--compile-part", help=argparse.SUPPRESS)  # "i/n": be one of the compiling processes
    args = parser.parse_args()
    if args.sizes:
        SIZES[:] = [SIZES[number] for number in args.sizes]
    if args.compile_part:
        compile_part(*part_of(args.compile_part), args)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not args.compiled:
        compile_apart(24, over_cards=True)()
    mp.spawn(main_of_rank, (args, free_port("127.0.0.1")), nprocs=args.over)


if __name__ == "__main__":
    main()
