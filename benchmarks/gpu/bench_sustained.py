"""How fast products of a prompt step stay when the card is kept busy: `python benchmarks/gpu/bench_sustained.py`.

A short burst runs at the card's full clock; a prompt-bound server runs at the clock that its power limit allows. For
each product of the 8B shape, tokens a step and library: TFLOP/s of a burst and of the last half of a second of it, with
the clock and the power drawn meanwhile. JSON lines.
"""

import argparse
import json
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

PRODUCTS = {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)}
BURST_SECONDS = 0.02


def rate(x_TI: torch.Tensor, weight_OI: torch.Tensor, seconds: float) -> tuple[float, str]:
    """TFLOP/s over so many seconds, and what the card said in the middle of them."""
    flops = 2.0 * x_TI.shape[0] * weight_OI.numel()
    num = max(2, round(seconds * 700e12 / flops))
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(num):
        F.linear(x_TI, weight_OI)
    end.record()
    said = ""
    if seconds > 0.2:
        time.sleep(seconds / 2)
        asked = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw,clocks_event_reasons.active", "--format=csv,noheader"]
        said = subprocess.run(asked, capture_output=True, text=True).stdout.splitlines()[0]
    torch.cuda.synchronize()
    return num * flops / start.elapsed_time(end) / 1e9, said


def main() -> int:
    """Print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[8192, 16384])
    parser.add_argument("--libraries", nargs="*", default=["cublas", "cublaslt"])
    parser.add_argument("--seconds", type=float, default=1.0, help="of each, the first half not counted")
    args = parser.parse_args()
    for library in args.libraries:
        torch.backends.cuda.preferred_blas_library(library)
        for tokens in args.tokens:
            for name, (num_in, num_out) in PRODUCTS.items():
                x_TI = torch.randn(tokens, num_in, device="cuda", dtype=torch.bfloat16)
                weight_OI = torch.randn(num_out, num_in, device="cuda", dtype=torch.bfloat16) * num_in**-0.5
                rate(x_TI, weight_OI, BURST_SECONDS)
                time.sleep(0.3)  # the clock recovers
                burst, _ = rate(x_TI, weight_OI, BURST_SECONDS)
                rate(x_TI, weight_OI, args.seconds / 2)
                kept, said = rate(x_TI, weight_OI, args.seconds / 2)
                row = {
                    "product": name,
                    "tokens": tokens,
                    "library": library,
                    "burst": round(burst),
                    "kept": round(kept),
                }
                print(json.dumps({**row, "unit": "TFLOP/s", "card": said}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
