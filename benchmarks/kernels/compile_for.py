"""Compile kernels for a GPU that is not here, and say what they would take there: `python compile_for.py [part ...]`.

Every launch becomes a compilation for compute capability 9.0 (Triton brings the assembler). A kernel that does not
compile, or that asks for more shared memory than a multiprocessor has, is found without a card; registers, spills and
shared memory are printed, so that a change can be read before it is measured. Shapes are those of 8b.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # not searched under PYTHONSAFEPATH
from compile_fp8 import fp8
from compile_only import COMPILED, SHARED_BYTES, describe, prepare

from argosy.kernels import (
    fp8_reference,
    gemv,
    gemv_ahead,
    gemv_ring,
    gemv_split,
    group_push,
    group_sum,
    hopper_attention,
    hopper_gate,
    kv_cache,
    kv_scales,
    kv_unpack,
    layer_chain,
    moe_gemm,
    moe_int,
    moe_packed,
    moe_reference,
    packed_hopper,
    packed_linear,
    packed_reference,
    paged_attention,
    prefill_attention,
    rotary,
    tile_plan,
    tuning,
    warp_decode,
)
from argosy.kernels.fp8_reference import E4M3, Rounding

BF16 = torch.bfloat16
CPU = torch.device("cpu")


def attention(report: Callable[..., None]) -> None:
    """Decode and prompts, over 16 bits, over e4m3, and over 8 bits with a scale for each token and head."""
    for dtype, scaled in ((BF16, False), (E4M3, False), (E4M3, True), (torch.int8, True)):
        k_cache, v_cache = (torch.zeros(64, 16, 8, 128, dtype=dtype) for _ in range(2))
        if scaled:
            raw = torch.zeros(64, kv_scales.block_bytes(16, 8, 128), dtype=torch.uint8)
            k_cache, v_cache = (kv_scales.as_scaled_cache(raw, 16, 8, 128, dtype) for _ in range(2))
        rotations, name = torch.zeros(8192, 128), f"{str(dtype)[6:]}{' with scales' * scaled}"
        for rows in (1, 64, 256):
            table = torch.zeros(rows, 512, dtype=torch.int32)
            lengths, ids = torch.ones(rows, dtype=torch.int32), torch.zeros(rows, dtype=torch.int64)
            qkv = torch.zeros(rows, 48 * 128, dtype=BF16)
            report(
                f"decode, {rows} rows, {name}", paged_attention.decode_attention, qkv, ids, rotations, k_cache, v_cache,
                ids, table, lengths, num_heads=32, scale=0.1, max_context=8192, inputs_early=True,
            )  # fmt: skip
            report(
                f"rotate and store, {rows} rows, {name}", rotary.rope_and_store, qkv, ids, rotations, k_cache, v_cache,
                ids, num_heads=32,
            )  # fmt: skip
            heads = torch.zeros(rows, 8, 128, dtype=BF16)
            report(f"store, {rows} rows, {name}", kv_cache.store_kv, heads, heads, k_cache, v_cache, ids)
        for tokens, rows in ((8192, 16), (40, 20)):
            q = torch.zeros(tokens, 32, 128, dtype=BF16)
            starts, lengths = torch.zeros(rows + 1, dtype=torch.int32), torch.ones(rows, dtype=torch.int32)
            table = torch.zeros(rows, 512, dtype=torch.int32)
            report(
                f"prompts, {tokens} tokens of {rows}, {name}", prefill_attention.prefill_attention, q, k_cache, v_cache,
                starts, lengths, table, scale=0.1,
            )  # fmt: skip


def wide(report: Callable[..., None]) -> None:
    """Heads of 512, which models of transformers' modules have in some layers."""
    for dtype in (BF16, torch.float32):
        cache = torch.zeros(64, 16, 2, 512, dtype=dtype)
        for rows in (1, 256):
            q, lengths = torch.zeros(rows, 8, 512, dtype=dtype), torch.ones(rows, dtype=torch.int32)
            table = torch.zeros(rows, 512, dtype=torch.int32)
            report(
                f"decode, {rows} rows, heads of 512, {dtype}", paged_attention.paged_attention, q, cache, cache, table,
                lengths, scale=0.1,
            )  # fmt: skip
        for tokens in (8192, 40):
            q, starts = torch.zeros(tokens, 8, 512, dtype=dtype), torch.zeros(17, dtype=torch.int32)
            lengths, table = torch.ones(16, dtype=torch.int32), torch.zeros(16, 512, dtype=torch.int32)
            report(
                f"prompts, {tokens} tokens, heads of 512, {dtype}", prefill_attention.prefill_attention, q, cache,
                cache, starts, lengths, table, scale=0.1,
            )  # fmt: skip


def prompts(report: Callable[..., None]) -> None:
    """Attention of prompts by Hopper's own kernel, and the plan of its tiles."""
    starts, lengths = torch.zeros(17, dtype=torch.int32), torch.ones(16, dtype=torch.int32)
    report("plan of 32 tiles", tile_plan.plan_tiles, starts, lengths, 32, 32)
    for heads, kv_heads, size in ((32, 8, 128),):
        counts = f"{heads}/{kv_heads}x{size}"
        q = torch.zeros(64, heads + 2 * kv_heads, size, dtype=BF16)[:, :heads]
        cache = torch.zeros(64, 16, kv_heads, size, dtype=BF16)
        tiles, table = torch.zeros(9, 8, dtype=torch.int32), torch.zeros(4, 16, dtype=torch.int32)
        out = torch.zeros(64, heads, size, dtype=BF16)
        for each in PROMPT_SIZES:
            sizes = dict(zip(("block_l", "stages", "registers", "fetch_registers"), each, strict=True))
            report(
                f"prompts, {counts} {sizes}", hopper_attention.hopper_attention, q, cache, cache, table,
                tiles, out, scale=0.1, sizes=sizes,
            )  # fmt: skip
        raw = torch.zeros(64, kv_scales.block_bytes(16, kv_heads, size), dtype=torch.uint8)
        for eight_bits in (kv_scales.as_scaled_cache(raw, 16, kv_heads, size, torch.int8), cache.to(E4M3)):
            report(
                f"prompts, {counts} {eight_bits.dtype}", hopper_attention.hopper_attention, q, eight_bits, eight_bits,
                table, tiles, out, scale=0.1, sizes=hopper_attention.UNPACKED_SIZES,
            )  # fmt: skip
            lengths = torch.ones(4, dtype=torch.int32)
            room = kv_unpack.make_room(lengths, table, 16, 64)
            report(
                f"unpack, {counts} {eight_bits.dtype}", kv_unpack.unpack, eight_bits, eight_bits, table, lengths,
                lengths, room, BF16,
            )  # fmt: skip


def alone(report: Callable[..., None]) -> None:
    """Decode over caches in 8 bits where every warp works alone."""
    raw = torch.zeros(64, kv_scales.block_bytes(16, 8, 128), dtype=torch.uint8)
    table, lengths = torch.zeros(64, 512, dtype=torch.int32), torch.ones(64, dtype=torch.int32)
    q, out = torch.zeros(64, 48, 128, dtype=BF16)[:, :32], torch.zeros(64, 32, 128, dtype=BF16)
    for cache in (
        kv_scales.as_scaled_cache(raw, 16, 8, 128, torch.int8), kv_scales.as_scaled_cache(raw, 16, 8, 128, E4M3),
        torch.zeros(64, 16, 8, 128, dtype=E4M3),
    ):  # fmt: skip
        name = f"decode, warps alone, {cache.dtype}{' with scales' * kv_scales.has_scales(cache)}"
        report(name, warp_decode.warp_decode, q, cache, cache, table, lengths, out, scale=0.1, max_context=8192)


def linear(report: Callable[..., None]) -> None:
    """Products with 16-bit weights."""
    for num_in, num_out in ((4096, 6144), (14336, 4096)):
        weight = torch.zeros(num_out, num_in, dtype=BF16)
        for tokens in (1, 8):
            x = torch.zeros(tokens, num_in, dtype=BF16)
            report(f"linear {num_in}x{num_out}, {tokens} tokens", gemv.fused_linear, x, weight)


def ahead(report: Callable[..., None]) -> None:
    """Products of one token whose first weights come before the wait."""
    for num_in, num_out, gated in ((4096, 28672, True), (2048, 4096, False), (7168, 4096, False)):
        sizes = {"rows": 2, "width": tuning.next_power_of_two(num_in), "stages": 3, "warps": 4, "per_sm": 4}
        x, weight = torch.zeros(1, num_in, dtype=BF16), torch.zeros(num_out, num_in, dtype=BF16)
        out = torch.zeros(1, num_out // (1 + gated), dtype=BF16)
        report(f"{num_in}x{num_out}, 1 token ahead", gemv_ahead.linear, x, weight, None, out, sizes, gated=gated)


def ring(report: Callable[..., None]) -> None:
    """Products of a few tokens whose weights come through a ring."""
    for tokens in (8, 16, 32, 64):
        x = torch.zeros(tokens, 4096, dtype=BF16)
        for rows, width, outputs, pieces, gated in (
            (64, 128, 3072, 4, False), (64, 256, 3072, 2, False), (128, 128, 4096, 2, False), (64, 128, 7168, 1, True),
        ):  # fmt: skip
            weight = torch.zeros(outputs * (1 + gated), 4096, dtype=BF16)
            sizes = {"rows": rows, "width": width, "stages": 6, "pieces": pieces, "early": 1}
            name = f"{tokens} tokens by a ring, {rows} by {width}{', gated' * gated}"
            report(name, gemv_ring.linear, x, weight, None, None, sizes, gated=gated)
        report(f"{tokens} tokens by a ring, left in pieces", gemv_ring.linear, x, weight, None, None,
               {"rows": 64, "width": 128, "stages": 6, "pieces": 2}, in_pieces=True)  # fmt: skip


def group(report: Callable[..., None]) -> None:
    """Sums over a group by words that bring their turn, and products of its ranks in pieces."""
    for world, width in ((2, 4096), (4, 4096), (4, 8192)):
        x, bases = torch.zeros(8, width, dtype=BF16), torch.zeros(world, dtype=torch.int64)
        counters = torch.zeros(group_sum.MAX_PROGRAMS, dtype=torch.int32)
        for scatter in (False, True):
            report(f"sum of {width} over {world}{', shared out' * scatter}", group_push.push_add_norm, bases, counters,
                   0, x, x, x[0], 1e-5, inbox_at=1024, scatter=scatter)  # fmt: skip
    weight = torch.zeros(14336, 4096, dtype=BF16)
    for tokens in (8, 32, 64):
        x = torch.zeros(tokens, 4096, dtype=BF16)
        for rows, width in ((64, 128), (128, 64), (128, 128)):
            sizes = {"kernel": gemv.SPLIT, "rows": rows, "width": width, "stages": 4, "warps": 4, "splits": 2,
                     "prefetch": 512, "early": 0}  # fmt: skip
            report(f"{tokens} tokens in pieces, {rows} by {width}", gemv.fused_linear, x, weight, gated=True,
                   sizes=sizes)  # fmt: skip
    sizes = {"slot": 16384, "stages": 5, "warps": 8, "per_sm": 1, "spare": 4}
    for world, hidden, seen, inner, qkv in ((2, 4096, 2048, 7168, 3072), (4, 8192, 2048, 7168, 2560)):
        o, gate_up, down, next_qkv, x, out = (
            torch.zeros(shape, dtype=BF16)
            for shape in ((hidden, seen), (2 * inner, hidden), (hidden, inner), (qkv, hidden), (1, hidden), (1, qkv))
        )
        bases, words = torch.zeros(world, dtype=torch.int64), torch.zeros(inner, dtype=torch.int32)
        for last in (False, True):
            report(
                f"chain of {hidden} over {world}{', last' * last}", layer_chain.chain, o[:1], (o, gate_up, down,
                None if last else next_qkv), ((x[0], 1e-5), (x[0], 1e-5)), None, x, x if last else out, bases, words,
                words, 0, sizes, inbox_at=1024,
            )  # fmt: skip


def between(report: Callable[..., None]) -> None:
    """Products of a few tokens with the norm between them."""
    o, gate_up, norm = (torch.zeros(s, dtype=BF16) for s in ((4096, 4096), (28672, 4096), (4096,)))
    x, residual = torch.zeros(8, 4096, dtype=BF16), torch.zeros(8, 4096, dtype=BF16)
    for rows, width, stages, splits, first in (
        (64, 256, 4, 1, 0), (64, 256, 4, 2, 1), (64, 128, 6, 1, 1), (128, 128, 4, 1, 1), (128, 128, 3, 1, 0),
    ):  # fmt: skip
        sizes = {"kernel": gemv.SPLIT, "rows": rows, "width": width, "stages": stages, "warps": 4, "splits": splits,
                 "prefetch": 512, "early": 0, "first": first}  # fmt: skip
        ahead = gemv_split.ahead_for(residual, norm, 1e-6, sizes)
        name = f"{rows} by {width}, {splits} pieces{', first before the wait' * first}"
        report(f"adds, {name}", gemv.fused_linear, x, o, residual_TO=residual, ahead=ahead, sizes=sizes)
        report(f"gate of the norm, {name}", gemv.fused_linear, residual, gate_up, gated=True, normed=ahead,
               sizes=sizes)  # fmt: skip
    for width, stages, count in ((128, 6, 1), (256, 6, 1), (128, 12, 2), (64, 12, 4)):
        sizes = {"rows": 64, "width": width, "stages": stages, "pieces": count, "early": 1}
        ahead = gemv_split.ahead_for(residual, norm, 1e-6, sizes)
        name = f"a ring of {stages} by {width}, {count} pieces"
        report(f"adds, {name}", gemv_ring.linear, x, o, None, residual, sizes, residual=True, ahead=ahead)
        report(f"gate of the norm, {name}", gemv_ring.linear, x, gate_up, None, None, sizes | {"pieces": 1}, gated=True,
               normed=ahead)  # fmt: skip


def gate(report: Callable[..., None]) -> None:
    """The gate inside a prompt's product, by Hopper's own kernel."""
    gate_up, x = torch.zeros(28672, 4096, dtype=BF16), torch.zeros(8192, 4096, dtype=BF16)
    for fetch_warps in (1, 4):
        sizes = {"fetch_warps": fetch_warps}
        report(f"gate of 8192 tokens, {fetch_warps} warps fetch", hopper_gate.gated_linear, x, gate_up, sizes=sizes)


PROMPT_SIZES = ((128, 2, 200, 104), (64, 4, 216, 72))  # as tuned


def experts(report: Callable[..., None]) -> None:
    """Grouped products of plain, e4m3 and MXFP4 weights, and the sum over a group that leaves ranks out."""
    for rows in (16, 32, 64):
        places, of_block = torch.zeros(8 * rows, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
        chosen = (places, of_block, 8)
        x, weight = torch.zeros(4, 4096, dtype=BF16), torch.zeros(2, 1024, 4096, dtype=BF16)
        report(f"experts, {rows} rows a block", moe_gemm.grouped_gemm, x, weight, *chosen, shared=1)
        rounded = fp8_reference.quantize_rows(x, Rounding(128))
        scale = torch.ones(2, 8, 32)
        options = {"shared": 1, "dtype": BF16}
        report(f"e4m3 experts, {rows} rows a block", moe_packed.grouped_gemm, rounded, weight.to(E4M3), scale, *chosen,
               **options)  # fmt: skip
        turned, packed = torch.zeros(4, 2944, dtype=BF16), torch.zeros(2, 1024, 1440, dtype=torch.uint8)
        scale = torch.zeros(2, 1024, 90, dtype=torch.uint8)
        report(
            f"MXFP4 experts, {rows} rows a block", moe_packed.grouped_gemm, turned, packed, scale, *chosen, **options
        )
    ids, chosen_weights = torch.zeros(64, 8, dtype=torch.int32), torch.zeros(64, 8)
    gate_up, down = torch.zeros(128, 512, 1024, dtype=BF16), torch.zeros(128, 1024, 256, dtype=BF16)
    for tokens in (1, 64, 1024):
        x = torch.zeros(tokens, 1024, dtype=BF16)
        choice = ids[:1].expand(tokens, 8), chosen_weights[:1].expand(tokens, 8)
        report(f"a layer of experts, {tokens} tokens", moe_gemm.experts, x, gate_up, down, *choice)
    from tune_moe import INT_TILES

    x = torch.zeros(4, 4096, dtype=BF16)
    for bits, group, ordered in ((4, 128, False), (4, 32, False), (8, 128, False), (4, 128, True)):
        words, pairs = packed_reference.shapes(1024, 4096, bits=bits, group=group)
        weight = moe_reference.IntExpertWeight(
            packed_reference.PackedWeight(
                torch.zeros(2, *words, dtype=torch.int32), torch.zeros(2, *pairs, dtype=torch.float16), bits, group,
                4096, 1024,
            ),
            torch.zeros(2, 4096, dtype=torch.int32) if ordered else None,
        )  # fmt: skip
        for rows, tiles in ({8: [None]} | INT_TILES).items():
            places, of_block = torch.zeros(8 * rows, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
            for tile in tiles if (bits, group, ordered) == (4, 128, False) else (None,):
                name = f"{bits} bits, groups of {group}{', ordered' * ordered}, {rows} rows a block, {tile}"
                report(name, moe_int.grouped_gemm, x, weight, places, of_block, 8, shared=1, tile=tile)
    report("rows in their experts' order", moe_int.pick, x, weight, places, of_block, 8, shared=2)
    x, bases = torch.zeros(64, 4096, dtype=BF16), torch.zeros(4, dtype=torch.int64)
    counters, ids = torch.zeros(group_sum.MAX_PROGRAMS, dtype=torch.int32), torch.zeros(64, 2, dtype=torch.int32)
    report("sum over ranks with experts", group_sum.sum_add_norm, bases, counters, 0, x, x[0], 1e-5, parts_bytes=0,
           shared_bytes=0, shared_TD=torch.zeros_like(x), asked=(ids, 8))  # fmt: skip


def packed(report: Callable[..., None]) -> None:
    """Products with weights of 4 bits: as measured, and what only the tuner tries."""
    many = {"kernel": packed_linear.MANY, "stages": 3, "splits": 1, "warps": 8}
    for num_in, num_out in ((4096, 6144), (14336, 4096)):
        words, pairs = packed_reference.shapes(num_out, num_in, bits=4, group=128)
        weight = packed_reference.PackedWeight(
            torch.zeros(words, dtype=torch.int32), torch.zeros(pairs, dtype=BF16), 4, 128, num_in, num_out
        )
        for tokens in (1, 16, 32, 64, 256):
            x = torch.zeros(tokens, num_in, dtype=BF16)
            report(f"4 bits {num_in}x{num_out}, {tokens} tokens", packed_linear.linear, x, weight)
            if tokens in (32, 64):
                sizes = {**many, "tiles": 8, "tokens": tokens, "sync": 0}
                report(f"4 bits {num_in}x{num_out}, {tokens} a warp", packed_linear.linear, x, weight, sizes=sizes)


def packed_many(report: Callable[..., None]) -> None:
    """Products of dozens and hundreds of tokens with weights of 4 and 8 bits, by groups of warps."""
    for bits, group, dtype, half in ((4, 128, BF16, False), (4, 64, torch.float16, True), (8, 128, BF16, True)):
        words, pairs = packed_reference.shapes(6144, 4096, bits=bits, group=group)
        scales = torch.zeros(pairs, dtype=torch.float16 if half else BF16)
        weight = packed_reference.PackedWeight(torch.zeros(words, dtype=torch.int32), scales, bits, group, 4096, 6144)
        bias = torch.zeros(6144, dtype=dtype)
        for wgs, tiles, tokens, programs in HOPPER_SIZES if (bits, group) == (4, 128) else HOPPER_SIZES[:1]:
            ring = {"wgs": wgs, "tiles": tiles, "tokens": tokens, "programs": programs}
            stages = min(8, packed_hopper.RING_BYTES // packed_hopper.place_bytes(weight, ring))
            sizes = {"kernel": packed_linear.HOPPER, **ring, "stages": stages}
            x = torch.zeros(tokens, 4096, dtype=dtype)
            report(f"{bits} bits of {group}, {sizes}", packed_linear.linear, x, weight, bias, sizes=sizes)


def packed_vector(report: Callable[..., None]) -> None:
    """Products of one token with weights of 4 and 8 bits."""
    for bits, dtype, half in ((4, BF16, False), (4, torch.float16, True), (8, BF16, True)):
        words, pairs = packed_reference.shapes(6144, 4096, bits=bits, group=128)
        scales = torch.zeros(pairs, dtype=torch.float16 if half else BF16)
        weight = packed_reference.PackedWeight(torch.zeros(words, dtype=torch.int32), scales, bits, 128, 4096, 6144)
        x, residual = torch.zeros(1, 4096, dtype=dtype), torch.zeros(1, 6144, dtype=dtype)
        sizes = {"kernel": packed_linear.VECTOR, "warps": 8, "blocks": 8 // bits}
        report(f"{bits} bits, a token", packed_linear.linear, x, weight, residual_TO=residual, sizes=sizes)
        if (bits, dtype) == (4, BF16):
            report(f"{bits} bits, a token, gated", packed_linear.linear, x, weight, gated=True, sizes=sizes)


def packed_stream(report: Callable[..., None]) -> None:
    """Products of one token with weights of 4 bits, whose warps stream words for themselves."""
    words, pairs = packed_reference.shapes(6144, 4096, bits=4, group=128)
    weight = packed_reference.PackedWeight(
        torch.zeros(words, dtype=torch.int32), torch.zeros(pairs, dtype=BF16), 4, 128, 4096, 6144
    )
    for half, is_normed in ((0, False), (0, True), (1, False), (1, True)):
        x, residual = torch.zeros(1, 4096, dtype=BF16), torch.zeros(1, 6144, dtype=BF16)
        sizes = {"kernel": packed_linear.STREAM, "warps": 16, "split": 4, "depth": 4, "half": half, "norm": 1}
        norm = torch.zeros(4096, dtype=BF16) if is_normed else None
        name = f"4 bits, a token{', normed' * is_normed}{', float16' * half}"
        report(name, packed_linear.linear, x, weight, norm_weight_I=norm, residual_TO=residual, sizes=sizes)


HOPPER_SIZES = ((2, 4, 64, 132), (2, 4, 256, 0))
PARTS = {
    "attention": attention, "wide": wide, "alone": alone, "prompts": prompts, "linear": linear, "gate": gate,
    "group": group, "ring": ring, "between": between, "ahead": ahead, "fp8": fp8, "experts": experts, "packed": packed,
    "packed_many": packed_many, "packed_vector": packed_vector, "packed_stream": packed_stream,
}  # fmt: skip


def main() -> int:
    """Compile, print, and fail where something would not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="which parts; all without")
    arguments = parser.parse_args()
    prepare()
    failures = 0

    def report(name: str, launch: Callable[..., object], *args: object, **options: object) -> None:
        nonlocal failures
        COMPILED.clear()
        try:
            launch(*args, **options)
        except Exception as error:  # each kernel is judged alone
            failures += 1
            print(f"FAILED {name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}", flush=True)
        for kernel in COMPILED:
            too_much = kernel.metadata.shared > SHARED_BYTES
            failures += too_much
            print(f"{describe(kernel)}  {name}{'  TOO MUCH' if too_much else ''}", flush=True)

    for part in arguments.parts or PARTS:
        PARTS[part](report)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
