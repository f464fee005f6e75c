"""Compile what runs on cards that nobody measured, by the sizes of the rules: `python compile_other.py L4`.

A rule that suits an H200 may ask for more on chip than another card has, or for an instruction that it does not know:
its engine would end with the first step. One card a run; a line for each kernel with the shared bytes of a program,
exit code 1 where something would not run. Shapes are those of 8b, with heads of every size that tests have.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent))  # not searched under PYTHONSAFEPATH
from compile_only import COMPILED, prepare

from argosy.kernels import (
    activation,
    fp8_gemm,
    fp8_gemv,
    fp8_reference,
    fp8_split,
    gemv,
    mla_attention,
    moe_int,
    packed_linear,
    packed_reference,
    paged_attention,
    prefill_attention,
    rms_norm,
    sampling,
    shared_prefix,
    tuning,
)
from argosy.kernels.fp8_reference import E4M3, Fp8Weight, Rounding
from argosy.kernels.moe_reference import IntExpertWeight
from argosy.kernels.packed_reference import PackedWeight

BF16 = torch.bfloat16
FIRST_E4M3, HOPPER = 89, 90
HEADS = ((32, 8, 128), (14, 2, 64), (7, 1, 80), (8, 8, 96), (16, 2, 256))
Launch = tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class Card(NamedTuple):
    """What rules ask of it."""

    capability: int
    num_sms: int
    shared_bytes: int


CARDS = {  # from NVIDIA's tables of compute capabilities and data sheets
    "A100": Card(80, 108, 166912),
    "A10G": Card(86, 80, 101376),
    "L4": Card(89, 58, 101376),
    "H100": Card(90, 132, 232448),
    "B200": Card(100, 148, 232448),
    "RTX5090": Card(120, 170, 101376),
}


def attention(num_heads: int, num_kv_heads: int, size: int, dtype: torch.dtype) -> Iterator[Launch]:
    """Decode steps, with rotation or behind a shared prefix; prompts, many tokens a row and few."""
    caches = [torch.zeros(64, 16, num_kv_heads, size, dtype=dtype) for _ in range(2)]
    name = f"{num_heads}/{num_kv_heads}x{size} {str(dtype)[6:]}"
    for rows in (1, 64, 256):
        lengths, ids = torch.ones(rows, dtype=torch.int32), torch.zeros(rows, dtype=torch.int64)
        table = torch.zeros(rows, 512, dtype=torch.int32)
        qkv = torch.zeros(rows, (num_heads + 2 * num_kv_heads) * size, dtype=dtype)
        run = (qkv, ids, torch.zeros(8192, size), *caches, ids, table, lengths)
        yield f"decode {rows} {name}", paged_attention.decode_attention, run, {"num_heads": num_heads, "scale": 0.1}
        q = torch.zeros(rows, num_heads, size, dtype=dtype)
        options = {"scale": 0.1, "kv_scales": (1.0, 1.0), "max_length": 4096, "soft_cap": None}
        yield f"prefix {rows} {name}", shared_prefix.attend_prefix, (q, *caches, table, lengths), options
    for tokens, rows in ((8192, 16), (40, 20), (300, 4)):
        q, starts = torch.zeros(tokens, num_heads, size, dtype=dtype), torch.zeros(rows + 1, dtype=torch.int32)
        lengths, table = torch.ones(rows, dtype=torch.int32), torch.zeros(rows, 512, dtype=torch.int32)
        run = (q, *caches, starts, lengths, table)
        yield f"prompts {tokens}/{rows} {name}", prefill_attention.prefill_attention, run, {"scale": 0.1}


def latent(dtype: torch.dtype) -> Iterator[Launch]:
    """Decode steps over the compressed latent of DeepSeek's models."""
    caches = torch.zeros(64, 16, 1, 512, dtype=dtype), torch.zeros(64, 16, 1, 64, dtype=dtype)
    for rows in (1, 64):
        q, rotated = torch.zeros(rows, 16, 512, dtype=dtype), torch.zeros(rows, 16, 64, dtype=dtype)
        run = (q, rotated, *caches, torch.zeros(rows, 64, dtype=torch.int32), torch.ones(rows, dtype=torch.int32))
        yield f"latent {rows} {str(dtype)[6:]}", mla_attention.decode, run, {"scale": 0.1}


def products(num_in: int, num_out: int) -> Iterator[Launch]:
    """Of one token and of a few, with what is fused to them."""
    weight, norm = torch.zeros(num_out, num_in, dtype=BF16), torch.zeros(num_in, dtype=BF16)
    for tokens in (1, 8, 16):
        x, residual = torch.zeros(tokens, num_in, dtype=BF16), torch.zeros(tokens, num_out, dtype=BF16)
        name = f"linear {tokens} {num_in}x{num_out}"
        yield f"{name} gated", gemv.fused_linear, (x, weight), {"norm_weight_I": norm, "gated": True}
        yield f"{name} added", gemv.fused_linear, (x, weight), {"residual_TO": residual}


def fp8_products(num_in: int, num_out: int, block: tuple[int, int] | None) -> Iterator[Launch]:
    """With e4m3 weights."""
    scale = torch.ones(num_out) if block is None else torch.ones(-(-num_out // 128), -(-num_in // 128))
    weight, name = Fp8Weight(torch.zeros(num_out, num_in, dtype=E4M3), scale, block), f"e4m3 {num_in}x{num_out} {block}"
    yield f"{name} 1", fp8_gemv.fused_linear, (torch.zeros(1, num_in, dtype=BF16), weight), {}
    for tokens in (8, 64, 256):
        rows = fp8_reference.quantize_rows(torch.zeros(tokens, num_in), Rounding(128 if block else 0))
        if tokens <= 64:
            yield f"{name} {tokens} in pieces", fp8_split.linear, (rows, weight, None, BF16), {}
        yield f"{name} {tokens} in tiles", fp8_gemm.triton_linear, (rows, weight, None, BF16), {}


def packed(num_in: int, num_out: int, bits: int, dtype: torch.dtype) -> Iterator[Launch]:
    """With weights of 4 and 8 bits, and experts of such weights."""
    words, pairs = packed_reference.shapes(num_out, num_in, bits=bits, group=128)
    words_MUW, pairs_MKR2 = torch.zeros(words, dtype=torch.int32), torch.zeros(pairs, dtype=dtype)
    weight = PackedWeight(words_MUW, pairs_MKR2, bits, 128, num_in, num_out)
    name = f"{bits} bits {num_in}x{num_out} {str(dtype)[6:]}"
    for tokens in (1, 8, 16, 32, 64, 256):
        yield f"{name} {tokens}", packed_linear.linear, (torch.zeros(tokens, num_in, dtype=dtype), weight), {}
    stacked = PackedWeight(words_MUW[None], pairs_MKR2[None], bits, 128, num_in, num_out)
    for rows in (8, 16, 128):
        for order in (None, torch.zeros(1, num_in, dtype=torch.int32)):
            places, of_block = torch.zeros(rows, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
            run = (torch.zeros(rows, num_in, dtype=dtype), IntExpertWeight(stacked, order), places, of_block, rows)
            yield f"expert, {name} {rows}, {order is not None}", moe_int.grouped_gemm, run, {"shared": 1}


def small() -> Iterator[Launch]:
    """Norms, gates and drawing."""
    x, weight = torch.zeros(7, 8192, dtype=BF16), torch.zeros(8192, dtype=BF16)
    yield "norm", rms_norm.add_rms_norm, (x, x.clone(), weight, 1e-5), {}
    yield "gate", activation.silu_and_mul, (x,), {}
    logits, columns = torch.zeros(8, 151_936), [torch.ones(8), torch.ones(8, dtype=torch.int32), *[torch.ones(8)] * 2]
    ids = torch.zeros(8, dtype=torch.int64)
    yield "draw", sampling.sample_rows, (logits, *columns, ids, ids), {}


def launches(card: Card) -> Iterator[Launch]:
    """All that a card's rules are asked for."""
    for heads in HEADS:
        for dtype in (BF16, torch.float16, torch.float32):
            yield from attention(*heads, dtype)
    for dtype in (BF16, torch.float16, torch.float32):
        yield from latent(dtype)
    for shape in ((4096, 6144), (14336, 4096), (4096, 28672), (1024, 512)):
        yield from products(*shape)
        if card.capability >= FIRST_E4M3:
            for block in (None, (128, 128)):
                yield from fp8_products(*shape, block)
    for bits in (4, 8):
        for dtype in (BF16, torch.float16):
            yield from packed(4096, 512, bits, dtype)
    yield from small()


def main() -> int:
    """Compile, print, and fail where something would not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("card", choices=CARDS)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORDS", help="launches whose names have these")
    args = parser.parse_args()
    card = CARDS[args.card]
    is_new = card.capability >= HOPPER
    facts = tuning.DeviceFacts(
        f"nvidia_{args.card.lower()}", card.num_sms, overlaps=is_new, knows_ptx=True, shared_bytes=card.shared_bytes,
        adds_bf16=is_new,
    )  # fmt: skip
    prepare(facts, card.capability)
    failures = 0
    for name, launch, run, options in launches(card):
        if not any(words in name for words in args.only):
            continue
        COMPILED.clear()
        try:
            launch(*run, **options)
        except Exception as error:  # each kernel is judged alone
            if not COMPILED:
                failures += 1
                print(f"FAILED {name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}", flush=True)
        for kernel in COMPILED:
            is_too_much = kernel.metadata.shared > card.shared_bytes
            failures += is_too_much
            print(f"{kernel.metadata.shared:>7} shared  {kernel.name}  {name}{'  TOO MUCH' * is_too_much}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
