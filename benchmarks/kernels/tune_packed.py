"""Measure weights of 4 bits: sizes of the kernels on this card, and their time beside cuBLAS on plain weights.

    python benchmarks/kernels/tune_packed.py --out kernels/tuned/nvidia_h200.json --report FILE

Every size is checked against the plain weight before it is timed, with enough weights that none is found in a cache.
Prints a JSON line a shape and number of tokens (time, TB/s, ratio to cuBLAS on bf16) and the sums of a layer; keeps
what else the tuned file holds. `--bits 8` for weights of 8 bits, `--group` for other groups.
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import copies_for, microseconds
from trials import compile_apart, part_of, read_table, write_table

from argosy.kernels import packed_hopper, packed_linear, packed_reference, tuning
from argosy.kernels.packed_linear import FEW, HOPPER, MANY, SLICES, VECTOR

SHAPES = {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)}
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
SAME = {2: 8, 4: 8}  # the same kernel, the same time
AGAIN = {8: 1}  # sizes are the best of fewer tokens
FEW_WAYS = [  # tiles, split, wide, ahead, stages
    (1, 4, 1, 1, 3), (1, 4, 2, 1, 3), (1, 8, 2, 1, 3), (1, 8, 4, 1, 3), (2, 4, 1, 0, 4), (2, 4, 2, 0, 3),
    (2, 4, 2, 1, 3), (2, 8, 1, 1, 3), (2, 8, 1, 0, 4), (2, 8, 2, 0, 3), (2, 8, 2, 1, 3),
    (1, 8, 4, 1, 1), (1, 8, 2, 1, 1), (1, 4, 4, 1, 1), (1, 4, 2, 1, 1), (2, 4, 2, 1, 1), (2, 8, 2, 1, 1),
]  # fmt: skip
VECTOR_WAYS = [(8, 2), (8, 1), (16, 1), (4, 2), (4, 1)]  # warps, blocks of each
MANY_WAYS = {  # tiles, warps, sync, tokens at once
    16: [(8, 8, 0, 16)],
    32: [(8, 8, 0, 32), (4, 4, 0, 32)],
    64: [(8, 8, 0, 64)],
}
HOPPER_WAYS = {  # groups of warps, tiles of each, tokens at once
    1: [(4, 4, 16), (2, 4, 16)],
    16: [(4, 4, 16), (2, 4, 16)],
    32: [(4, 4, 32), (2, 4, 32), (2, 8, 32)],
    64: [(4, 4, 64), (2, 4, 64), (2, 8, 64)],
    128: [(2, 4, 128), (2, 8, 128), (2, 4, 64), (4, 4, 64)],
    256: [(2, 4, 256), (2, 8, 128), (2, 4, 128), (2, 4, 64), (4, 4, 64)],
    512: [(2, 4, 256), (2, 8, 128), (2, 4, 128)],
    1024: [(2, 4, 256), (2, 8, 128), (2, 4, 128)],
}
# that share all work evenly (0: one for each tile): all of the card, or as many as cut tiles into equal parts
PROGRAMS = (0, 132, 128, 96)
PROCESSES = 15
UNFUSED_US = 2.0  # that a gate or an addition takes in a launch of its own
LARGEST_ERROR = 4e-3  # of bf16 against float64


def _all_sizes(tokens: int, name: str, bits: int) -> Iterator[dict[str, int]]:
    """What is tried. A product that is gated needs two tiles of rows."""
    if tokens <= 16:
        for (tiles, split, wide, ahead, stages), (early, prefetch) in itertools.product(FEW_WAYS, ((0, 0), (1, 32))):
            spills = bits == 8 and tiles * wide > 2
            if not (tiles == 1 and name == "gate_up") and not (tokens == 16 and early) and not spills:
                yield {"kernel": FEW, "tiles": tiles, "split": split, "wide": wide, "ahead": ahead, "stages": stages,
                       "early": early, "prefetch": prefetch}  # fmt: skip
    if tokens == 1:
        for warps, blocks in VECTOR_WAYS:
            yield {"kernel": VECTOR, "warps": warps, "blocks": blocks}
    for (tiles, warps, sync, at_once), splits in itertools.product(MANY_WAYS.get(tokens, ()), (1, 2, 4)):
        yield {"kernel": MANY, "tiles": tiles, "tokens": at_once, "splits": splits, "stages": 3, "warps": warps,
               "sync": sync}  # fmt: skip
    for (wgs, tiles, at_once), programs in itertools.product(HOPPER_WAYS.get(tokens, ()), PROGRAMS):
        ring = {"kernel": HOPPER, "wgs": wgs, "tiles": tiles, "tokens": at_once, "programs": programs}
        fitting = packed_hopper.RING_BYTES // (bits // 4 * wgs * tiles * 576 + at_once * 128)
        yield ring | {"stages": min(8, fitting)}
        if wgs == 2 and tiles == 4 and at_once <= 64 and bits == 4:
            yield ring | {"stages": min(8, fitting // 2), "sharing": 2, "programs": 2 * programs}
    if tokens > 64:
        yield {"kernel": SLICES, "slice_mb": 24}
        yield {"kernel": SLICES, "slice_mb": 256}


def sizes_for(tokens: int, name: str, args: argparse.Namespace) -> list[dict[str, int]]:
    """Those of the kernels that were asked for."""
    return [sizes for sizes in _all_sizes(tokens, name, args.bits) if not args.only or sizes["kernel"] in args.only]


def weights_of(
    num_in: int, num_out: int, count: int, *, bits: int, group: int
) -> list[packed_reference.PackedWeight]:  # fmt: skip
    """Random ones, enough of them that none is found in a cache."""
    made = []
    for _ in range(count):
        numbers = torch.randint(0, 1 << bits, (num_out, num_in), device="cuda", dtype=torch.uint8)
        scale = torch.rand(num_out, num_in // group, device="cuda").bfloat16() / 64 + 0.002
        zero = torch.randint(0, 1 << bits, scale.shape, device="cuda").bfloat16()
        made.append(packed_reference.pack(numbers, scale, zero, bits=bits, group=group))
    return made


def compile_all(
    weight: packed_reference.PackedWeight, name: str, part: tuple[int, int], args: argparse.Namespace
) -> None:  # fmt: skip
    """Every n-th size, into the cache that the measuring process reads."""
    ways = ((t, s) for t in args.tokens if t not in AGAIN for s in sizes_for(t, name, args))
    for turn, (tokens, sizes) in enumerate(ways):
        if turn % part[1] == part[0]:
            try:
                packed_linear.linear(
                    torch.zeros(tokens, weight.num_inputs, device="cuda").bfloat16(), weight, sizes=sizes
                )
            except Exception as error:  # a size that does not fit
                print("skipped", sizes, str(error)[:60], file=sys.stderr)


def measured(
    weights: list[packed_reference.PackedWeight],
    plain_OI: torch.Tensor,
    tokens: int,
    name: str,
    candidates: Iterable[dict[str, int]],
) -> list[tuple[float, dict[str, int], float]]:
    """(microseconds, sizes, error) of all sizes that are right, the fastest first."""
    x = torch.randn(tokens, plain_OI.shape[1], device="cuda").bfloat16()
    want = x.double() @ plain_OI.double().t()
    found = []
    for sizes in candidates:
        try:
            errors = [  # more than once: what is wrong may be so only now and then
                float((packed_linear.linear(x, weights[0], sizes=sizes).double() - want).norm() / want.norm())
                for _ in range(3)
            ]
        except Exception as error:  # sizes that the card refuses are named and left out
            print("skipped", sizes, str(error)[:60], file=sys.stderr)
            continue
        if not max(errors) < LARGEST_ERROR:
            print("WRONG", name, tokens, sizes, errors, flush=True)
            continue
        calls = [lambda w=w, s=sizes: packed_linear.linear(x, w, sizes=s) for w in weights]  # type: ignore[misc]  # bound now
        is_fused = sizes["kernel"] in (FEW, VECTOR) or name == "qkv"
        unfused = UNFUSED_US if tokens <= packed_linear.MOST_FUSED and not is_fused else 0.0
        found.append((unfused + microseconds(calls, launches=max(len(weights), 24), replays=3)[0], sizes, max(errors)))
    found.sort(key=lambda row: row[0])
    for us, sizes, _ in found[1:4]:
        print(f"    {name} {tokens}: next {us:.2f} us {sizes}", file=sys.stderr)
    return found


def main() -> None:
    """Compile in many processes, then time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--report", default=os.devnull)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--tokens", type=int, nargs="+", choices=TOKENS, default=list(TOKENS))
    kernels = (FEW, MANY, SLICES, HOPPER, VECTOR)
    parser.add_argument("--only", type=int, nargs="+", choices=kernels, help="kernels; all without")
    parser.add_argument("--compile-part", help=argparse.SUPPRESS)  # "i/n": compile every n-th size only
    args = parser.parse_args()
    form = {"bits": args.bits, "group": args.group}
    if args.compile_part:
        compile_all(weights_of(*SHAPES["qkv"], 1, **form)[0], "qkv", part_of(args.compile_part), args)
        return
    compile_apart(PROCESSES, quiet=True)()
    tuned: dict[str, dict[str, int]] = {}
    layers: dict[int, list[float]] = {tokens: [0.0, 0.0] for tokens in args.tokens}
    with Path(args.report).open("a", encoding="utf-8") as report:
        for name, (num_in, num_out) in SHAPES.items():
            weights = weights_of(num_in, num_out, copies_for(num_in * num_out * args.bits // 8, 16), **form)
            plain_OI = packed_reference.dequantize(weights[0])
            plain = [plain_OI] + [plain_OI.clone() for _ in range(copies_for(plain_OI.nbytes, 16) - 1)]
            tops: dict[int, list[dict[str, int]]] = {}
            for tokens in args.tokens:
                again = [sizes for sizes in tops.get(AGAIN.get(tokens, 0), ()) if sizes["kernel"] != VECTOR]
                candidates = again or sizes_for(tokens, name, args)
                found = measured(weights, plain_OI, tokens, name, candidates)
                tops[tokens] = [sizes for _, sizes, _ in found[:3]]
                us, sizes, error = found[0]
                x = torch.randn(tokens, num_in, device="cuda").bfloat16()
                by_library = microseconds([lambda w=w: F.linear(x, w) for w in plain], launches=24, replays=3)[0]  # type: ignore[misc]  # noqa: B023  # called at once
                for same in (tokens, *(other for other, like in SAME.items() if like == tokens)):
                    tuned[packed_linear.key_of(weights[0], same)] = sizes
                layers[tokens][0] += us
                layers[tokens][1] += by_library
                row = {
                    "kernel": "packed_linear", **form, "shape": name, "inputs": num_in, "outputs": num_out,
                    "tokens": tokens, "us": round(us, 2), "TBps": round(weights[0].num_bytes / us / 1e6, 2),
                    "cublas_bf16_us": round(by_library, 2), "times_faster": round(by_library / us, 2),
                    "error": round(error, 5), "sizes": sizes, "device": torch.cuda.get_device_name(),
                }  # fmt: skip
                print(json.dumps(row), flush=True)
                report.write(json.dumps(row) + "\n")
            del weights, plain
            torch.cuda.empty_cache()
    for tokens, (us, by_library) in layers.items():
        print(f"a layer, {tokens} tokens: {us:.1f} us, cuBLAS on bf16 {by_library:.1f}: {by_library / us:.2f} times")
    table = read_table(args.out)
    table.pop("packed_vector", None)
    table.setdefault("packed", {}).update(tuned)
    write_table(args.out, table)
    print(f"written for {tuning.device_facts(torch.device('cuda', 0)).slug}")


if __name__ == "__main__":
    main()
