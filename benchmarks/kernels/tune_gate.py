"""The gate inside a product of many tokens beside cuBLAS and a launch for the gate: `tune_gate.py`.

For gate_up of some models and each number of tokens: microseconds of product and gate as they were run before, and of
`hopper_gate` by its sizes, in a short burst and while the card is kept busy, when its power decides. JSON lines.
"""

import argparse
import json
import sys
import time
from functools import partial

import torch
from bench_library import L2_BYTES, card, kept_busy

from argosy.kernels import hopper_gate, ops

SHAPES = {
    "8b": (4096, 28672), "8b TP2": (4096, 14336), "06b": (1024, 6144), "8b TP4": (4096, 7168), "70b TP4": (8192, 14336),
}  # fmt: skip
SIZES = {
    f"{grouped}{'' if warps == 1 else ', 4 warps'}": {"grouped": grouped, "fetch_warps": warps}
    for grouped, warps in ((32, 1), (16, 1), (64, 1), (8, 1), (32, 4))
}


def measure(num_in: int, num_out: int, tokens: int, seconds: float) -> dict[str, object]:
    """Both ways, and how far apart their results are."""
    copies = max(2, min(8, 4 * L2_BYTES // (2 * num_in * num_out)))
    x = torch.randn(tokens, num_in, device="cuda").bfloat16()
    weights = [(torch.randn(num_out, num_in, device="cuda") * num_in**-0.5).bfloat16() for _ in range(copies)]
    flops = 2.0 * tokens * num_in * num_out
    want = ops.silu_and_mul(torch.mm(x, weights[0].t())).float()
    error = float((hopper_gate.gated_linear(x, weights[0]).float() - want).norm() / want.norm())
    row: dict[str, object] = {"tokens": tokens, "apart": round(error, 5)}
    before = [partial(lambda w: ops.silu_and_mul(torch.mm(x, w.t())), w) for w in weights]
    row["before"] = [round(us, 1) for us in kept_busy(before, seconds, flops)]
    for name, sizes in SIZES.items():
        calls = [partial(hopper_gate.gated_linear, x, w, sizes=sizes) for w in weights]
        row[name] = [round(us, 1) for us in kept_busy(calls, seconds, flops)]
    row["before again"] = [round(us, 1) for us in kept_busy(before, seconds, flops)]
    return {**row, "card": card()}


def main() -> int:
    """A line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 1024, 2048, 512])
    parser.add_argument("--seconds", type=float, default=0.2, help="each is kept busy for")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds of the whole")
    args = parser.parse_args()
    began = time.monotonic()
    torch.manual_seed(1)
    for name in args.shapes:
        for tokens in args.tokens:
            if time.monotonic() - began < args.limit:
                print(json.dumps({"shape": name, **measure(*SHAPES[name], tokens, args.seconds)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
