"""Steps of one row with e4m3 weights where each product rounds its token itself: right, and by which sizes.

    python benchmarks/kernels/tune_one.py --seconds 40

Compares products with plain torch first, then the time of a step of six layers and a head, replayed in turn with the
one of larger batches (`tune_few`).
"""

import argparse
import time

import torch
from bench_fp8 import BF16, random_weight
from bench_kernels import rand
from few_sizes import short
from timing import Report
from tune_few import CONTEXTS, FP8, KEEP, Chain, compare

from argosy.kernels import fp8_one, fp8_reference
from argosy.kernels.fp8_reference import Rounding

Sizes = dict[str, int]
RING = {"width": 256, "stages": 5, "pieces": 1, "programs": 0, "early": 2}
FIRST: dict[str, Sizes] = {
    "qkv": RING, "o": RING | {"pieces": 2, "stages": 6}, "gate_up": RING | {"width": 128}, "down": RING | {"pieces": 4},
}  # fmt: skip
CHANGES: dict[str, tuple[Sizes, ...]] = {
    "gate_up": ({"programs": 132}, {"early": 1}, {"stages": 12, "programs": 132}, {"width": 256, "stages": 2}),
    "down": ({"pieces": 7, "stages": 6}, {"early": 1}, {"pieces": 4, "stages": 11}),
    "qkv": ({"early": 1}, {"width": 128, "stages": 10}, {"stages": 11}),
    "o": ({"pieces": 4, "stages": 6}, {"early": 1}, {"pieces": 1, "stages": 5}),
}


def check() -> None:
    """Against plain torch: the norm of a residual and pieces, gates, pieces left, a bias."""
    worst = 0.0
    for num_in, num_out, gated, pieces, adds in (
        (4096, 6144, False, 1, 0), (4096, 6144, False, 1, 4), (4096, 28672, True, 1, 2), (4096, 4096, False, 2, 0),
        (14336, 4096, False, 4, 0), (512, 200, False, 2, 0), (768, 384, True, 1, 3),
    ):  # fmt: skip
        weight, x, norm = random_weight(num_out, num_in), rand(1, num_in), rand(num_in)
        parts = rand(adds, 1, num_in).float() if adds else None
        kept = torch.zeros_like(x) if adds else None
        bias = rand(num_out) if pieces == 1 else None
        width = 256 if num_in > 1000 else 128
        sizes = FIRST["gate_up" if gated else "qkv"] | {"pieces": pieces, "width": width}
        got = fp8_one.linear(
            x, weight, bias, sizes, norm=(norm, 1e-6) if adds or pieces == 1 else None, parts_P1I=parts, kept_1I=kept,
            gated=gated,
        )  # fmt: skip
        want = x.clone()
        if parts is not None:
            want += parts.sum(0).to(BF16)
            assert torch.equal(want, kept)
        if adds or pieces == 1:
            rows = fp8_reference.norm_and_quantize(want, norm, 1e-6, Rounding())
        else:
            rows = fp8_reference.quantize_rows(want, Rounding())
        y = fp8_reference.linear(rows, weight, bias, torch.float32)
        y = torch.nn.functional.silu(y[:, : num_out // 2]) * y[:, num_out // 2 :] if gated else y
        made = got.sum(0) if pieces > 1 else got.float()
        error = float((made - y).norm() / y.norm())
        worst = max(worst, error)
        print(f"    {num_in}x{num_out} gated {gated} pieces {pieces} adds {adds}: off by {error:.1e}", flush=True)
    assert worst < 1.2e-2, worst


def main() -> None:
    """Right first, then fast."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40, help="what is not tried by then is left")
    args = parser.parse_args()
    began = time.perf_counter()
    check()
    chain = Chain(FP8, 1)
    first, first_tokens = chain.record(), chain.runs[0]()
    sizes = dict(FIRST)

    def record() -> list[torch.cuda.CUDAGraph]:
        chain.step.ones = sizes
        return chain.record([chain.step.of(1, context) for context in CONTEXTS])

    best = record()
    print(f"token alike: {bool((chain.step.of(1, CONTEXTS[0])() == first_tokens).all())}", flush=True)
    before, now = compare([first, best])
    print(f"one row as larger batches {before} us, each product by itself {now} us", flush=True)
    for name, changes in CHANGES.items():
        for change in changes:
            if time.perf_counter() - began > args.seconds:
                break
            kept, sizes[name] = sizes[name], sizes[name] | change
            try:
                made = record()
            except Exception as error:  # too large a program
                print(f"    {name} {change} {str(error)[:80]}", flush=True)
                sizes[name] = kept
                continue
            old, new = compare([best, made])
            better = sum(new) < sum(old) * KEEP
            print(f"    {name} {old} -> {new} {short(sizes[name])}{' *' * better}", flush=True)
            if better:
                best = made
            else:
                sizes[name] = kept
    print(sizes, compare([first, best]), f"{time.perf_counter() - began:.1f} s", flush=True)
    Report(None).profile("the step that came out", chain.step.of(1, CONTEXTS[1]))


if __name__ == "__main__":
    main()
