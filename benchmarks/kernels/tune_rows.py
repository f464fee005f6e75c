"""Up to eight tokens over a group: a launch a layer beside attention (`kernels/rows_chain`) against seven.

    python benchmarks/kernels/tune_rows.py --over 4 --layouts 8b:4 70b:4

As `tune_chain.py`: first what layers say against plain torch for several numbers of tokens, and that all ranks say the
same; then the time of a layer in recorded steps of eight, in many sizes. One JSON line a layout.
"""

import argparse
import functools
import json
import os
import socket
import subprocess
import sys
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
from tune_chain import LEAN, SMALL
from tune_chain import Steps as OneToken
from tune_group import LAYERS, Chain, attention_of

from argosy.kernels import layer_chain, ops, rows_chain, tuning
from argosy.placement.plan import make_plan
from argosy.placement.process_groups import destroy_parallel, init_parallel

SIZES: list[Sizes] = [
    {"warps": warps, "blocks": blocks, "stages": stages, "per_sm": 1, "spare": spare, "words": words}
    for warps, blocks, stages, spare, words in (
        (8, 16, 6, 0, 8), (8, 16, 6, 0, 2), (8, 8, 12, 0, 8), (8, 16, 4, 0, 8), (8, 16, 6, 4, 8), (4, 16, 6, 0, 8),
        (8, 32, 3, 0, 8), (16, 16, 6, 0, 8), (8, 16, 5, 0, 8), (8, 8, 10, 0, 8),
    )
]  # fmt: skip
CONTEXTS = (256, 384)
WORST = 0.01  # relative error: numbers are rounded to 16 bits on the way


class Words:
    """What the chain needs on each rank."""

    def __init__(self, parallel: object, world: int, hidden: int, inner: int, device: torch.device):
        num_bytes = rows_chain.inbox_words(world, hidden) * 4
        if world > 1:
            self.buffer = parallel.shared_buffer(num_bytes)  # type: ignore[attr-defined]
            self.bases = self.buffer.addresses_W
        else:
            self.buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
            self.bases = torch.tensor([self.buffer.data_ptr()], dtype=torch.int64, device=device)
        self.boxes = torch.full((2 * rows_chain.box_words(hidden, inner),), -1, dtype=torch.int32, device=device)
        self.counters = torch.zeros(1024, dtype=torch.int32, device=device)


def fits(sizes: Sizes, model: str, cards: int, over: int) -> bool:
    """Whether this layout takes these sizes."""
    shapes = shapes_of(model, cards)
    hidden, seen, inner, qkv = MODELS[model][0], shapes["o"][0], shapes["down"][0], shapes["qkv"][1]
    programs = layer_chain.programs_of(torch.empty(0, device="cuda"), sizes)
    return rows_chain.suits(seen, hidden, inner, qkv, over, sizes, programs)


def compile_part(index: int, of: int, args: argparse.Namespace) -> None:
    """Every kernel of the chain that will be timed; this process does each `of`-th."""
    device = torch.device("cuda", 0)
    torch.set_default_device(device)
    layouts = [(model, int(cards)) for model, _, cards in (one.partition(":") for one in args.layouts)]
    jobs = [
        (model, cards, sizes, last)
        for sizes in SIZES
        for model, cards in layouts
        for last in (False, True)
        if fits(sizes, model, cards, args.over)
    ]
    others = [(model, cards, sizes) for model, cards in layouts for sizes in (None, LEAN, *SMALL) if args.attention]
    for model, cards, sizes in others[of - 1 - index :: of]:
        attention_of(model, cards, 8, CONTEXTS[0])(rand(8, shapes_of(model, cards)["qkv"][1]), 0, sizes)
    # without a launch: alone they would wait for ever
    type(rows_chain._rows_kernel).__getitem__ = lambda kernel, grid: functools.partial(
        kernel.run, grid=grid, warmup=True
    )
    for model, cards, sizes, last in jobs[index::of]:
        shapes, hidden = shapes_of(model, cards), MODELS[model][0]
        seen, inner, qkv = shapes["o"][0], shapes["down"][0], shapes["qkv"][1]
        weights = [torch.empty(shapes[name][1], shapes[name][0]).bfloat16() for name in ("o", "gate_up", "down", "qkv")]
        norm = (torch.ones(hidden).bfloat16(), 1e-5)
        rows_chain.chain(
            rand(8, seen), (*weights[:3], None if last else weights[3]), (norm, norm), None, rand(8, hidden),
            None if last else rand(8, qkv), torch.zeros(args.over, dtype=torch.int64),
            torch.zeros(2 * rows_chain.box_words(hidden, inner), dtype=torch.int32),
            torch.zeros(1024, dtype=torch.int32), 0, sizes, inbox_at=0,
        )  # fmt: skip


class Steps(Chain):
    """Eight layers of one rank, with a launch a layer beside attention."""

    sizes: Sizes = SIZES[0]
    words: Words | None = None

    def words_for(self) -> Words:
        """Words and turns, alike for any number of programs."""
        if self.words is None:
            self.words = Words(self.parallel, self.parallel.tp_size, self.hidden, self.shapes["down"][0], self.device)
        self.words.counters.fill_(int(self.words.counters.max()))
        self.words.boxes.fill_(-1)  # other sizes have other places
        torch.cuda.synchronize()  # steps have a stream of their own
        return self.words

    def in_chains(self, rows: int, context: int) -> Callable[[], Tensor]:
        """A step of so many tokens, ready to be captured."""
        qkv, words = self.shapes["qkv"][1], self.words_for()
        attend = attention_of(self.model, self.cards, rows, context)
        residual, start = rand(rows, self.hidden), rand(rows, self.hidden)
        norm = (self.norm.weight, self.norm.eps)
        outs = [torch.empty(rows, qkv).bfloat16() for _ in range(LAYERS)]

        def run() -> Tensor:
            product = ops.fused_linear(start, self.weights[0][0])
            for layer, (_, o_w, gate_up_w, down_w) in enumerate(self.weights):
                seen = attend(product, layer, self.attention).view(rows, -1)
                last = layer + 1 == LAYERS
                rows_chain.chain(
                    seen, (o_w, gate_up_w, down_w, None if last else self.weights[layer + 1][0]), (norm, norm), None,
                    residual, None if last else outs[layer], words.bases, words.boxes, words.counters,
                    self.parallel.rank.tp_rank, self.sizes, inbox_at=0,
                )  # fmt: skip
                product = outs[layer]
            return ops.rms_norm(residual, *norm)

        return run

    def check(self, rows: int) -> tuple[float, float, bool]:
        """(largest relative error of what comes out and of the residual against torch in float32, over all layers one
        behind the other; whether the residual is the same on all ranks)."""
        world = self.parallel.tp_size
        words = self.words_for()
        weight = (1 + rand(self.hidden) / 8).bfloat16()
        if world > 1:
            dist.broadcast(weight, 0)
        norm = (weight, self.norm.eps)
        worst, worst_residual, same = 0.0, 0.0, True

        def over_group(part: Tensor) -> Tensor:
            total = part.bfloat16().float()
            if world > 1:
                dist.all_reduce(total)
            return total

        for turn in range(3):
            seens = [rand(rows, self.weights[0][1].shape[1]) for _ in range(LAYERS)]
            residual = rand(rows, self.hidden)
            if world > 1:
                dist.broadcast(residual, 0)
            after, outs = residual.clone(), []
            for layer, (_, o_w, gate_up_w, down_w) in enumerate(self.weights):
                qkv_w = self.weights[layer + 1][0] if layer + 1 < LAYERS else None
                outs.append(None if qkv_w is None else torch.empty(rows, qkv_w.shape[0]).bfloat16())
                rows_chain.chain(
                    seens[layer], (o_w, gate_up_w, down_w, qkv_w), (norm, norm), None, residual, outs[-1], words.bases,
                    words.boxes, words.counters, self.parallel.rank.tp_rank, self.sizes, inbox_at=0,
                )  # fmt: skip
            for layer, (_, o_w, gate_up_w, down_w) in enumerate(self.weights):
                after = (after.float() + over_group(seens[layer].float() @ o_w.float().T)).bfloat16()
                gate, up = (ops.rms_norm(after, *norm).float() @ gate_up_w.float().T).chunk(2, 1)
                inner = (F.silu(gate) * up).bfloat16().float()
                after = (after.float() + over_group(inner @ down_w.float().T)).bfloat16()
                out = outs[layer]
                if out is not None:
                    told = ops.rms_norm(after, *norm).float() @ self.weights[layer + 1][0].float().T
                    worst = max(worst, float(((out.float() - told).norm(dim=1) / told.norm(dim=1)).max()))
            far = (residual.float() - after.float()).norm(dim=1) / after.float().norm(dim=1)
            worst_residual = max(worst_residual, float(far.max()))
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

    def say(text: str) -> None:
        if tp_rank == 0:
            print(f"{time.perf_counter() - began:5.1f} s  {text}", flush=True)

    for layout in args.layouts:
        model, _, cards = layout.partition(":")
        steps = Steps(parallel, model, int(cards), 8)
        found: dict[str, object] = {}
        for sizes in SIZES:
            if not fits(sizes, model, int(cards), args.over):
                continue
            steps.sizes = sizes
            name = "/".join(f"{key[:2]}{value}" for key, value in sizes.items())
            checked = [1, 2, 5, 8] if not found else [8]
            errors = [steps.check(rows) for rows in checked]
            say(f"{layout} {name}: errors of {checked} tokens {[[f'{e:.2g}', f'{r:.2g}', s] for e, r, s in errors]}")
            if any(not (e <= WORST and r <= WORST and s) for e, r, s in errors):
                found[name] = "wrong"
                continue
            if args.check:
                found[name] = errors
                break
            for rows in args.rows:
                times: list[float] = []
                for steps.attention in (None, LEAN):
                    times += [round(steps.time(steps.in_chains(rows, context), 5), 2) for context in CONTEXTS]
                for steps.attention in SMALL if args.attention else ():
                    small = [round(steps.time(steps.in_chains(rows, context), 5), 2) for context in CONTEXTS]
                    say(f"        {small} {rows} tokens with {steps.attention}")
                steps.attention = None
                found[f"{name}, {rows}"] = times
                say(f"    {times} {rows} tokens, {name}")
            if not any("seven" in key for key in found):
                for rows in args.rows:
                    found[f"seven launches, {rows}"] = [
                        round(steps.time(steps.of(rows, context), 5), 2) for context in CONTEXTS
                    ]
                    say(f"{layout} over {args.over}: {found[f'seven launches, {rows}']} us a layer, {rows} in seven")
                own = tuning.pick("layer_chain", key_of(model, int(cards)), device)
                if own is not None:
                    one = OneToken(parallel, model, int(cards), 1)
                    one.weights, one.sizes = steps.weights, own
                    one.attention = LEAN if own.get("lean") else None
                    found["chain of one"] = [round(one.time(one.in_chains(context), 5), 2) for context in CONTEXTS]
                    say(f"    {found['chain of one']} one token in its chain")
        if tp_rank == 0:
            row = {"kernel": "rows_chain", "layout": layout, "over": args.over, "contexts": CONTEXTS}
            row |= {"attention": ["as tuned", "lean"], "us": found, "device": torch.cuda.get_device_name(device)}
            print(json.dumps(row), flush=True)
        del steps
        torch.cuda.empty_cache()
    if args.over > 1:
        dist.barrier()
    destroy_parallel(parallel)


def key_of(model: str, cards: int) -> str:
    """Of these widths in the tables."""
    shapes = shapes_of(model, cards)
    return f"{MODELS[model][0]}x{shapes['o'][0]}x{shapes['down'][0]}x{cards}"


def main() -> None:
    """Compile, then one process a card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=["8b:4", "70b:4"])
    parser.add_argument("--over", type=int, default=4)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--sizes", type=int, nargs="+", help="only these, by number")
    parser.add_argument("--attention", action="store_true", help="other sizes of attention as well")
    parser.add_argument("--check", action="store_true", help="only whether the first size that fits is right")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds after which ranks end")
    parser.add_argument("--compile-part", help=argparse.SUPPRESS)  # "i/n": be one of the compiling processes
    args = parser.parse_args()
    if args.sizes:
        SIZES[:] = [SIZES[number] for number in args.sizes]
    if args.compile_part:
        index, of = map(int, args.compile_part.split("/"))
        compile_part(index, of, args)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    began = time.perf_counter()
    workers = min(2 * len(args.layouts) * len(SIZES), 24, os.cpu_count() or 1)
    cards = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    others = [
        subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--compile-part", f"{i}/{workers}"],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": cards[i % len(cards)]},
        )
        for i in range(workers)
    ]
    for other in others:
        other.wait()
    print(f"compiled in {time.perf_counter() - began:.1f} s", flush=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(main_of_rank, (args, port), nprocs=args.over)


if __name__ == "__main__":
    main()
