"""Attention of prompts, every way there is: `python benchmarks/kernels/tune_prompts.py`.

Checks each way against float32 first (ragged rows, chunks after a prefix, single tokens), then prints microseconds and
TFLOP/s (of the causal part alone) of equal prompts, chunks and ragged steps: the kernel for any GPU, the one for
Hopper in all its sizes, and torch's own (cuDNN) over keys and values that lie beside each other, as the mark. `--cache
int8` and others: the same over a cache in 8 bits, and with its rows unpacked first (`kv_unpack`).
"""

import argparse
import functools
import itertools
import json
import math
import random
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timing import microseconds
from torch import Tensor

from argosy.kernels import hopper_attention, kv_scales, kv_unpack, prefill_attention, prompt_tiles, tuning
from argosy.kernels.attention_parts import cache_suffix

Rows = list[tuple[int, int]]  # queries and context of each row
BLOCK = 16


def make_cache(kind: str, num_blocks: int, kv_heads: int, size: int) -> Tensor:
    """Random numbers as a cache of this kind keeps them; of very different sizes where heads have scales."""
    x = torch.randn(num_blocks, BLOCK, kv_heads, size, device="cuda")
    if kind in ("", "e4m3"):
        return x.to(torch.float8_e4m3fn if kind else torch.bfloat16)
    raw = torch.zeros((num_blocks, kv_scales.block_bytes(BLOCK, kv_heads, size)), device="cuda", dtype=torch.uint8)
    dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    made = kv_scales.as_scaled_cache(raw, BLOCK, kv_heads, size, dtype)
    slots = torch.arange(num_blocks * BLOCK, device="cuda")
    kv_scales.store((x * torch.rand(num_blocks, BLOCK, kv_heads, 1, device="cuda")).flatten(0, 1), made, slots)
    return made


def read(cache: Tensor, blocks: Tensor) -> Tensor:
    """These blocks of a cache in float32."""
    return kv_scales.gather(cache, blocks) if kv_scales.has_scales(cache) else cache[blocks].float()


class Case:
    """Queries, caches and tables of some rows. Blocks lie in any order."""

    def __init__(self, rows: Rows, heads: int, kv_heads: int, size: int, cache: str = "", window: int | None = None):
        self.window = window
        self.rows, self.heads, self.kv_heads, self.size = rows, heads, kv_heads, size
        per_row = [-(-context // BLOCK) for _, context in rows]
        tokens = sum(queries for queries, _ in rows)
        # as in a step: a view of the product of q, k and v
        qkv = torch.randn(tokens, heads + 2 * kv_heads, size, device="cuda", dtype=torch.bfloat16)
        self.q = qkv[:, :heads]
        self.k, self.v = (make_cache(cache, sum(per_row) + 1, kv_heads, size) for _ in range(2))
        order = torch.randperm(sum(per_row), device="cuda").int() + 1
        self.table = torch.zeros(len(rows), max(per_row), device="cuda", dtype=torch.int32)
        at = 0
        for row, count in enumerate(per_row):
            self.table[row, :count] = order[at : at + count]
            at += count
        self.lengths = torch.tensor([context for _, context in rows], device="cuda", dtype=torch.int32)
        starts = list(itertools.accumulate((queries for queries, _ in rows), initial=0))
        self.starts = torch.tensor(starts, device="cuda", dtype=torch.int32)
        self.scratch: dict[object, object] = {}  # what was worked out once for all layers
        self.out = torch.empty(tokens, heads, size, device="cuda", dtype=torch.bfloat16)
        self.flops = sum(2 * n * (2 * context - n + 1) for n, context in rows) * heads * size

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """Of either kernel."""
        return self.q, self.k, self.v, self.starts, self.lengths, self.table

    def exact(self) -> Tensor:
        """The same in float32, a row at a time."""
        made = torch.empty(self.out.shape, device="cuda")
        at, group = 0, self.heads // self.kv_heads
        for row, (queries, context) in enumerate(self.rows):
            blocks = self.table[row, : -(-context // BLOCK)].long()
            k, v = (read(x, blocks).flatten(0, 1)[:context].repeat_interleave(group, 1) for x in (self.k, self.v))
            q = self.q[at : at + queries].float()
            logits = torch.einsum("qnh,knh->nqk", q, k) * self.size**-0.5
            position = torch.arange(context - queries, context, device="cuda")
            key = torch.arange(context, device="cuda")[None, :]
            hidden = key > position[:, None]
            if self.window is not None:
                hidden |= key <= position[:, None] - self.window
            weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
            made[at : at + queries] = torch.einsum("nqk,knh->qnh", weights, v)
            at += queries
        return made


def ways(case: Case, sizes: list[dict[str, int]]) -> dict[str, Callable[[], Tensor]]:
    """Every way to attend, by its name."""
    scale = case.size**-0.5
    block_q = hopper_attention.block_q_of(case.q, case.k)
    tiles = prompt_tiles.plan_tiles(case.starts, case.lengths, len(case.q), block_q)
    found: dict[str, Callable[[], Tensor]] = {
        "any GPU": lambda: prefill_attention.prefill_attention(
            *case.arguments, scale=scale, out_TNH=case.out, sizes=general_sizes(case), sliding_window=case.window
        )
    }
    for each in sizes if case.window is None else ():
        found[json.dumps(each)] = lambda each=each: hopper_attention.hopper_attention(
            *case.arguments[:3], case.table, tiles, case.out, scale=scale, sizes=each
        )
    if case.k.element_size() == 1:
        found["unpacked first"] = lambda: kv_unpack.attend(
            functools.partial(prefill_attention.prefill_attention, scale=scale), *case.arguments, out_TNH=case.out,
            num_context_tokens=sum(context for _, context in case.rows), scratch=case.scratch,
            sliding_window=case.window,
        )  # fmt: skip
    return found


def unpack_microseconds(case: Case) -> float:
    """Of unpacking alone."""
    num_tokens = sum(context for _, context in case.rows)
    room = kv_unpack.make_room(case.lengths, case.table, BLOCK, num_tokens)
    lowest, dtype = torch.zeros_like(case.lengths), torch.bfloat16
    run = functools.partial(kv_unpack.unpack, case.k, case.v, case.table, case.lengths, lowest, room, dtype)
    return microseconds([run])[0]


def kind_of(case: Case) -> str:
    """As `prefill_attention` sorts rows."""
    mean = len(case.q) // len(case.rows)
    prefixed = case.table.shape[1] * BLOCK >= 4 * mean
    many = "prefixed" if prefixed else "many"
    return "long" if mean >= 1024 else many if mean * case.heads // case.kv_heads >= 128 else "few"


def general_sizes(case: Case) -> tuning.Sizes:
    """What the kernel for any GPU was tuned to for such rows."""
    key = f"h{case.size}_{kind_of(case)}{cache_suffix(case.k)}"
    found = tuning.pick("prefill_attention", key, case.q.device)
    mean, group = len(case.q) // len(case.rows), case.heads // case.kv_heads
    return found or prefill_attention._default_sizes(case.size, mean, group, case.q.dtype)


def all_sizes(cache: str) -> list[dict[str, int]]:
    """Those that compile without many spilled registers (`compile_for.py`)."""
    names = ("block_l", "stages", "registers", "fetch_registers")
    tried = ((128, 2, 216, 72), (128, 2, 200, 104), (64, 4, 216, 72), (64, 4, 208, 88))
    if cache:
        tried = ((64, 4, 176, 80), (64, 4, 184, 72), (64, 4, 168, 88))
    return [dict(zip(names, each, strict=True)) for each in tried]


def check(
    sizes: list[dict[str, int]], heads: int, kv_heads: int, size: int, cache: str, window: int | None
) -> list[dict[str, int]]:
    """Sizes whose results are right on ugly rows, and the same when run again."""
    drawn = random.Random(7)
    rows = [(1, 1), (1, 700), (17, 17), (128, 128), (129, 129), (64, 2112), (300, 301), (512, 512), (33, 4000)]
    rows += [(n, n + drawn.randrange(300)) for n in (drawn.randrange(1, 400) for _ in range(90))]
    right = []
    case = Case(rows, heads, kv_heads, size, cache, window)
    want = case.exact()
    for name, run in ways(case, sizes).items():
        case.out.fill_(float("nan"))
        try:
            worst = (run().float() - want).abs().max().item()
            first = case.out.clone()
            for _ in range(3):
                run()
            torch.cuda.synchronize()
            again = torch.equal(first, case.out)
        except Exception as error:  # one way that fails says nothing about the others
            print(f"FAILED {heads}/{kv_heads}x{size} {name}: {' '.join(str(error).split())[:160]}", flush=True)
            continue
        good = worst < (0.03 if cache else 0.02) and again  # weights in bfloat16, and what was unpacked
        print(
            f"{'right' if good else 'WRONG'} {heads}/{kv_heads}x{size} {cache} {worst:.4f} same={again} {name}",
            flush=True,
        )
        if not good:
            off = (case.out.float() - want).abs().amax((1, 2)).split([queries for queries, _ in rows])
            print([(*rows[row], round(part.max().item(), 3)) for row, part in enumerate(off)][:16], flush=True)
        if good and name.startswith("{"):
            right.append(json.loads(name))
    return right


def mark(case: Case) -> float | None:
    """cuDNN over equal prompts that lie beside each other, microseconds."""
    queries, context = case.rows[0]
    if any(row != (queries, queries) for row in case.rows):
        return None
    shape = (len(case.rows), queries, -1, case.size)
    q = case.q.contiguous().view(shape).transpose(1, 2)
    k, v = (
        torch.randn(len(case.rows), context, case.kv_heads, case.size, device="cuda", dtype=torch.bfloat16).transpose(
            1, 2
        )
        for _ in range(2)
    )
    with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.CUDNN_ATTENTION]):
        return microseconds([lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)])[0]


def main() -> int:
    """Check, then time; the best of each head size last, as it belongs in `kernels/tuned`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="*", default=["32/8x128", "16/8x128", "14/2x64"], help="32/8x128: 8 of 128")
    parser.add_argument("--cache", nargs="*", default=[""], help="int8, e4m3, e4m3_scaled; 16 bits without")
    parser.add_argument("--shapes", nargs="*", help="names of some, as '16x512'; all without")
    parser.add_argument("--window", type=int, help="attend to so many tokens back; TFLOP/s are those without")
    parser.add_argument("--quick", action="store_true", help="the first size alone")
    arguments = parser.parse_args()
    drawn = random.Random(3)
    ragged = [drawn.randrange(20, 1500) for _ in range(12)]
    shapes: dict[str, Rows] = {
        "16x512": [(512, 512)] * 16,
        "8x1024": [(1024, 1024)] * 8,
        "4x2048": [(2048, 2048)] * 4,
        "1x8192": [(8192, 8192)],
        "2112 in pieces": [(1800, 2112), (2112, 2112), (2112, 2112), (2112, 2112), (56, 56)],
        "ragged": [(n, n) for n in ragged],
        "64x128": [(128, 128)] * 64,
        "4x512 of 4096": [(512, 4096)] * 4,
        "128x64 of 2112": [(64, 2112)] * 128,
    }
    shapes = {name: rows for name, rows in shapes.items() if not arguments.shapes or name in arguments.shapes}
    table: dict[str, dict[str, int]] = {}
    for heads, cache in itertools.product(arguments.heads, arguments.cache):
        counts, size = heads.split("x")
        num_heads, num_kv_heads = (int(n) for n in counts.split("/"))
        sizes = all_sizes(cache)
        right = check(
            sizes[:1] if arguments.quick else sizes, num_heads, num_kv_heads, int(size), cache, arguments.window
        )
        scores: dict[str, dict[str, list[float]]] = {}
        for name, rows in shapes.items():
            case = Case(rows, num_heads, num_kv_heads, int(size), cache, arguments.window)
            times = {way: microseconds([run])[0] for way, run in ways(case, right).items()}
            try:
                best = mark(case) if arguments.window is None else None
            except RuntimeError as error:
                best = print("cuDNN:", str(error)[:80])
            told = [f"{way} {us:.1f} us {case.flops / us / 1e6:.0f}" for way, us in times.items()]
            if cache:
                told.append(f"unpacking alone {unpack_microseconds(case):.1f} us")
            if best:
                told.append(f"cuDNN {best:.1f} us {case.flops / best / 1e6:.0f}")
            print(f"{heads} {cache} {name} {kind_of(case)} (TFLOP/s last)", *told, sep="\n    ", flush=True)
            for way, us in times.items():
                scores.setdefault(kind_of(case), {}).setdefault(way, []).append(us / times["any GPU"])
        for kind, by_way in scores.items():
            ranked = sorted(by_way, key=lambda way: math.prod(by_way[way]))
            told = [f"{math.prod(by_way[way]) ** (1 / len(by_way[way])):.3f} {way}" for way in ranked]
            print(f"{heads} {cache} {kind}: of the time of the kernel for any GPU", *told, sep="\n    ", flush=True)
            of_hopper = [way for way in ranked if way != "unpacked first"]
            if of_hopper[0].startswith("{"):
                table[f"h{size}_{kind}{cache and '_'}{cache}"] = json.loads(of_hopper[0])
    print(json.dumps({"hopper_attention": table}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
