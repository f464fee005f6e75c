"""Steps of one row with e4m3 weights where each product rounds its token itself: by which sizes.

    python benchmarks/kernels/tune_one.py --seconds 40

Compares the time of a step of six layers and a head, replayed in turn with the
one of larger batches (`tune_few`).
"""

import argparse
import time

import torch
from few_sizes import short
from timing import Report
from tune_few import CONTEXTS, FP8, KEEP, Chain, compare

from argosy.kernels import tuning

Sizes = dict[str, int]
RING = {"width": 256, "stages": 5, "pieces": 1, "programs": 0, "early": 1}
LATE = {"block_l": 128, "min_piece": 512, "per_sm": 1, "stages": 4, "warps": 4, "late": 1}
EARLY = LATE | {"stages": 5, "late": 0}
SMALL = {"block_l": 16, "min_piece": 16, "per_sm": 1, "stages": 3, "warps": 1, "late": 0}
FIRST: dict[str, Sizes] = {  # what was best before
    "qkv": RING | {"stages": 11}, "o": RING, "gate_up": RING | {"stages": 2}, "down": RING | {"pieces": 4},
    "attention": LATE,
}  # fmt: skip
CHANGES: dict[str, tuple[Sizes, ...]] = {
    "down": ({"pieces": 2, "stages": 10}, {"pieces": 2, "stages": 8}, {"pieces": 2, "stages": 10, "early": 2}),
    "attention": (EARLY, SMALL),
    "o": ({"stages": 11}, {"stages": 8}, {"early": 2}, {"pieces": 2}),
    "gate_up": ({"stages": 6, "programs": 132}, {"stages": 6}, {"width": 128, "stages": 4}, {"early": 2}),
    "qkv": ({"stages": 9}, {"stages": 5}, {"early": 2}),
}


def main() -> None:
    """All as first guessed, then one change after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40, help="what is not tried by then is left")
    args = parser.parse_args()
    began = time.perf_counter()
    chain = Chain(FP8, 1)
    first, first_tokens = chain.record(), chain.runs[0]()
    sizes = dict(FIRST)

    def pick(kernel: str, key: str, device: torch.device) -> tuning.Sizes | None:
        return sizes["attention"] if key == "h128_few_rings" else picked(kernel, key, device)

    picked, tuning.pick = tuning.pick, pick

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
