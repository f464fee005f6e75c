"""Attention over each kind of cache on this card: `python benchmarks/kernels/tune_kv.py [--write FILE]`.

For 8b (32 heads over 8, of 128): the time of decode steps and of prompts with the best sizes for each kind of cache,
beside what reading it alone takes. Sizes are compiled first in many processes, as in `tune_kernels.py`. `--write` keeps
the best sizes of caches in 8 bits in a file of `kernels/tuned`. `--alone`: decode of the kernel whose warps work alone,
checked against float32 first, beside what was tuned before.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator

import torch
from timing import copies_for, microseconds
from torch import Tensor
from trials import compile_apart, part_of, read_table, write_table

from argosy.deploy import bench_table
from argosy.kernels import kv_scales, paged_attention, prefill_attention, reference

HEADS, KV_HEADS, SIZE, BLOCK = 32, 8, 128, 16
DECODE = {"few": ((1, 1024), (8, 2048)), "many": ((64, 384), (64, 1024), (64, 4096)),
          "crowd": ((256, 256), (256, 640), (256, 1024))}  # fmt: skip
PROMPTS = {"many": ((16, 512),), "long": ((2, 4096),)}
KINDS = {
    "": (torch.bfloat16, False), "_e4m3": (torch.float8_e4m3fn, False),
    "_e4m3_scaled": (torch.float8_e4m3fn, True), "_int8": (torch.int8, True),
}  # fmt: skip
PEAK = 4.8e6  # bytes a microsecond of an H200
Sizes = dict[str, int]


def decode_sizes(kind: str, dtype: torch.dtype) -> Iterator[Sizes]:
    """Some that may do; keys and values of a tile are held `stages` - 1 times."""
    few, eight_bits = kind == "few", dtype.itemsize == 1
    for block_l, warps in itertools.product((32, 64, 128), (1, 2, 4)):
        if not 16 <= block_l // warps <= 64 or (few and warps == 1):
            continue
        for stages in (3, 5) if few else (2, 3, 4):
            sizes = {"block_l": block_l, "warps": warps, "stages": stages, "per_sm": 1}
            sizes |= {"min_piece": 512} if few else {}
            yield {**sizes, "staged": int(eight_bits)}
            if eight_bits and stages == 2:
                yield {**sizes, "staged": 0}
            if eight_bits and not few and stages < 4:
                yield {**sizes, "staged": 1, "maxnreg": 128}


def prompt_sizes() -> Iterator[Sizes]:
    """Tiles of 64 and 128 lines."""
    for block_m, block_l, warps, stages, one_loop in (
        (64, 32, 4, 3, 1), (64, 64, 4, 3, 1), (64, 64, 4, 2, 0), (128, 32, 4, 4, 0), (128, 32, 8, 3, 0),
        (128, 64, 8, 3, 0), (128, 64, 8, 2, 0), (128, 128, 8, 2, 0),
    ):  # fmt: skip
        yield {"block_m": block_m, "block_l": block_l, "warps": warps, "stages": stages, "one_loop": one_loop}


class Clock:
    """Times calls; or, in one of the processes that compile, runs every n-th of them once."""

    def __init__(self, part: str | None):
        self.index, self.of = part_of(part or "0/0")
        self.turn = -1

    def time(self, calls: list[Callable[[], object]]) -> float:
        self.turn += 1
        if not self.of:
            return microseconds(calls, launches=max(len(calls), 20), replays=3)[0]
        if self.turn % self.of == self.index:
            calls[0]()
        return 1.0


def alone_sizes() -> Iterator[Sizes]:
    """Of `warp_decode`: registers for 12, 13 or 16 warps a multiprocessor; how many pieces."""
    for maxnreg, per_sm, min_piece in (
        (168, 12, 256), (168, 24, 256), (168, 48, 256), (144, 26, 256), (128, 16, 256), (128, 32, 256),
    ):  # fmt: skip
        yield {"maxnreg": maxnreg, "per_sm": per_sm, "min_piece": min_piece}


def check_alone(dtype: torch.dtype, scaled: bool) -> None:
    """Ugly lengths, a row of padding, scales that are nan behind the ends; against float32."""
    from argosy.kernels import warp_decode

    for heads, block, splits in ((HEADS, 16, 24), (HEADS, 16, 1), (40, 32, 6)):
        context = [0, 1, 15, 16, 17, 300, 1000, 1024, 2047, 4000, *range(33, 63)]
        per_row = -(-4096 // block)
        caches = []
        for _ in range(2):
            x = torch.randn(len(context) * per_row, block, KV_HEADS, SIZE, device="cuda")
            if scaled:
                raw = torch.zeros(
                    len(x), kv_scales.block_bytes(block, KV_HEADS, SIZE), dtype=torch.uint8, device="cuda"
                )
                cache = kv_scales.as_scaled_cache(raw, block, KV_HEADS, SIZE, dtype)
                x *= torch.rand(len(x), block, KV_HEADS, 1, device="cuda") ** 4
                kv_scales.store(x.flatten(0, 1), cache, torch.arange(len(x) * block, device="cuda"))
            else:
                cache = x.to(dtype)
            caches.append(cache)
        table = torch.randperm(len(context) * per_row, device="cuda").int().view(len(context), per_row)
        every = torch.arange(len(table) * per_row, device="cuda")
        exact = [kv_scales.gather(x, every) if scaled else x.float() for x in caches]
        for row, length in enumerate(context):
            if scaled and length % block:
                for cache in caches:
                    kv_scales.scales_of(cache)[table[row, length // block], :, length % block :] = kv_scales.NAN_CODE
        lengths = torch.tensor(context, device="cuda", dtype=torch.int32)
        q = torch.randn(len(context), heads + 2 * KV_HEADS, SIZE, device="cuda", dtype=torch.bfloat16)[:, :heads]
        want = reference.paged_attention(q.float(), *exact, table, lengths, scale=SIZE**-0.5)
        worst = []
        for _ in range(2):
            out = torch.full((len(context), heads, SIZE), float("nan"), device="cuda", dtype=torch.bfloat16)
            warp_decode.warp_decode(
                q, *caches, table, lengths, out, scale=SIZE**-0.5, max_context=4096,
                sizes={"maxnreg": 168, "per_sm": splits, "min_piece": 256},
            )  # fmt: skip
            off = (out.float() - want).abs().amax((1, 2))
            worst.append(round(off.max().item(), 4))
        good = max(worst) < 0.03
        print("right" if good else f"WRONG {off.tolist()}", dtype, scaled, heads, block, splits, worst, flush=True)


def alone(suffix: str) -> dict[str, Sizes]:
    """Times of all sizes for all shapes of decode beside those tuned; the best of each kind where they are better."""
    from argosy.kernels import warp_decode

    dtype, scaled = KINDS[suffix]
    check_alone(dtype, scaled)
    found = {}
    for kind, shapes in DECODE.items():
        scores: dict[str, list[float]] = {}
        for rows, context in shapes:
            sets = decode_inputs(rows, context, dtype, scaled)
            ways: dict[str, list[Callable[[], object]]] = {
                "tuned": [
                    lambda each=each: paged_attention.paged_attention(*each, scale=0.1, max_context=8192)
                    for each in sets
                ]
            }
            for sizes in alone_sizes():
                ways[json.dumps(sizes)] = [
                    lambda each=each, sizes=sizes: warp_decode.warp_decode(
                        *each, torch.empty_like(each[0]), scale=0.1, max_context=8192, sizes=sizes
                    )
                    for each in sets
                ]
            for way, run in ways.items():
                scores.setdefault(way, []).append(microseconds(run, launches=max(len(run), 20), replays=3)[0])
        read = [round(r * n * KV_HEADS * 2 * (SIZE * dtype.itemsize + scaled) / PEAK, 1) for r, n in shapes]
        print(f"decode {kind}{suffix} {shapes}, read alone {read} us", flush=True)
        ranked = sorted(scores, key=lambda way: math.prod(scores[way]))
        print(*(f"    {[round(us, 1) for us in scores[way]]} {way}" for way in ranked), sep="\n", flush=True)
        if ranked[0] != "tuned":
            found[f"h{SIZE}_{kind}{suffix}"] = json.loads(ranked[0])
    return found


def make_cache(num_blocks: int, dtype: torch.dtype, scaled: bool) -> Tensor:
    """Random numbers, and random scales around 1 where there are any."""
    if not scaled:
        return torch.randn(num_blocks, BLOCK, KV_HEADS, SIZE, device="cuda").to(dtype)
    shape = (num_blocks, kv_scales.block_bytes(BLOCK, KV_HEADS, SIZE))
    raw = torch.randint(0, 100, shape, device="cuda", dtype=torch.uint8)
    cache = kv_scales.as_scaled_cache(raw, BLOCK, KV_HEADS, SIZE, dtype)
    kv_scales.scales_of(cache).random_(168, 174)
    return cache


def decode_inputs(rows: int, context: int, dtype: torch.dtype, scaled: bool) -> list[tuple[Tensor, ...]]:
    """Queries, caches, table and lengths: as many sets as no cache of the card holds."""
    per_row = context // BLOCK
    lengths = torch.full((rows,), context, device="cuda", dtype=torch.int32)
    q = torch.randn(rows, HEADS, SIZE, device="cuda").bfloat16()
    sets = []
    for _ in range(copies_for(rows * context * KV_HEADS * 2 * SIZE * dtype.itemsize, 4)):
        caches = [make_cache(rows * per_row, dtype, scaled) for _ in range(2)]
        table = torch.randperm(rows * per_row, device="cuda").view(rows, per_row).int()
        sets.append((q, *caches, table, lengths))
    return sets


def decode_calls(rows: int, context: int, dtype: torch.dtype, scaled: bool) -> tuple[Callable[..., object], ...]:
    """A call with sizes for each set of inputs."""
    return tuple(
        lambda sizes, each=each: paged_attention.paged_attention(*each, scale=0.1, max_context=8192, sizes=sizes)
        for each in decode_inputs(rows, context, dtype, scaled)
    )


def prompt_calls(rows: int, length: int, dtype: torch.dtype, scaled: bool) -> tuple[Callable[..., object], ...]:
    """Whole prompts."""
    per_row = length // BLOCK
    caches = [make_cache(rows * per_row, dtype, scaled) for _ in range(2)]
    table = torch.randperm(rows * per_row, device="cuda").view(rows, per_row).int()
    lengths = torch.full((rows,), length, device="cuda", dtype=torch.int32)
    starts = torch.arange(rows + 1, device="cuda", dtype=torch.int32) * length
    q = torch.randn(rows * length, HEADS, SIZE, device="cuda").bfloat16()
    return (
        lambda sizes: prefill_attention.prefill_attention(
            q, *caches, starts, lengths, table, scale=0.1, sizes=sizes
        ),
    )  # fmt: skip


def tune(clock: Clock, suffix: str, what: str, kind: str, shapes: tuple[tuple[int, int], ...], output: str) -> Sizes:
    """Print a line for each shape; return the sizes with the best mean over them."""
    dtype, scaled = KINDS[suffix]
    scores: dict[str, list[float]] = {}
    for rows, context in shapes:
        make, tried = (decode_calls, decode_sizes(kind, dtype)) if what == "decode" else (prompt_calls, prompt_sizes())
        calls = make(rows, context, dtype, scaled)
        for sizes in tried:
            try:
                us = clock.time([lambda call=call, s=sizes: call(s) for call in calls])
            except Exception as error:  # does not fit
                print("skipped", sizes, str(error)[:80])
                us = math.inf
            scores.setdefault(json.dumps(sizes), []).append(us)
        if clock.of:
            break  # the others run what this one compiled
        chosen = min(scores, key=lambda sizes: scores[sizes][-1])
        row = {
            "device": torch.cuda.get_device_name(), "what": what, "cache": suffix or "bfloat16", "rows": rows,
            "context": context, "us": round(scores[chosen][-1], 1), "sizes": json.loads(chosen),
        }  # fmt: skip
        if what == "decode":
            row["read_us"] = round(rows * context * KV_HEADS * 2 * (SIZE * dtype.itemsize + scaled) / PEAK, 1)
            unstaged = [values[-1] for sizes, values in scores.items() if not json.loads(sizes)["staged"]]
            row["unstaged_us"] = round(min(unstaged, default=math.inf), 1)
        bench_table.tell(row, output)
    ranked = sorted(scores, key=lambda sizes: math.prod(scores[sizes]))
    print(
        what, kind, suffix, *(f"{[round(x, 1) for x in scores[r]]} {r}" for r in ranked[:3]), sep="\n    ", flush=True
    )
    best: Sizes = json.loads(ranked[0])
    return best


def main() -> int:
    """All kinds of caches, all shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", help="file of tuned sizes to add to")
    parser.add_argument("--output", default="", help="append the JSON lines to this file")
    parser.add_argument("--compile-part", help=argparse.SUPPRESS)
    parser.add_argument("--alone", nargs="*", choices=[kind for kind in KINDS if kind], help="kinds of caches")
    arguments = parser.parse_args()
    if arguments.alone is not None:
        found: dict[str, Sizes] = {}
        for suffix in arguments.alone or ("_int8", "_e4m3_scaled", "_e4m3"):
            found |= alone(suffix)
        print(json.dumps({"warp_decode": found}), flush=True)
        return 0
    clock = Clock(arguments.compile_part)
    if not clock.of:
        compile_apart(14, quiet=True)()
    best: dict[str, dict[str, Sizes]] = {"paged_attention": {}, "prefill_attention": {}}
    for suffix in reversed(KINDS):
        for kernel, what, cases in (("paged_attention", "decode", DECODE), ("prefill_attention", "prompts", PROMPTS)):
            for kind, shapes in cases.items():
                if clock.of and kind in ("crowd", "long"):
                    continue  # the same kernels as those of the kind before
                best[kernel][f"h{SIZE}_{kind}{suffix}"] = tune(clock, suffix, what, kind, shapes, arguments.output)
    if arguments.write and not clock.of:
        table = read_table(arguments.write)
        for kernel, found in best.items():
            eight_bits = {
                key: sizes for key, sizes in found.items() if not key.endswith(("few", "many", "crowd", "long"))
            }
            table.setdefault(kernel, {}).update(eight_bits)
        write_table(arguments.write, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
