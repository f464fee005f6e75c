"""Products of shapes for which no sizes were measured: what the rule of several tokens takes, beside cuBLAS and others.

    python benchmarks/kernels/bench_untuned.py --tokens 8 32 64

A family that nobody tuned for runs by `gemv._default_sizes`. Microseconds of each way, weights from memory, and the
share of the card's 4.8 TB/s that the best of them comes to; first whether they agree.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timing import copies_for, microseconds

from argosy.deploy import bench_table
from argosy.kernels import gemv, tuning

CARD_BYTES_A_SECOND = 4.8e12
# inputs x outputs of projections of Falcon 40B, Gemma 3 27B, Command-R, BLOOM 7B, Phi-4
SHAPES = [
    (8192, 9216), (8192, 32768), (32768, 8192), (5376, 8192), (4096, 5376), (5376, 43008), (21504, 5376), (8192, 24576),
    (22528, 8192), (4096, 12288), (4096, 16384), (16384, 4096), (5120, 7680), (17920, 5120),
]  # fmt: skip


def pieces(num_inputs: int, num_outputs: int, rows: int, stages: int, width: int = 128, most: int = 4) -> tuning.Sizes:
    """Of `gemv_split`: inputs in so many pieces that the card is full."""
    tiles, splits = -(-num_outputs // rows), 1
    while tiles * splits * 2 <= torch.cuda.get_device_properties(0).multi_processor_count and splits < most:
        splits *= 2
    return {"kernel": gemv.SPLIT, "rows": rows, "width": width, "stages": stages, "warps": 4, "splits": splits,
            "prefetch": 512}  # fmt: skip


def main() -> None:
    """Measure within the time given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--output")
    args = parser.parse_args()
    started, machine = time.perf_counter(), torch.cuda.get_device_name(0)
    facts = tuning.device_facts(torch.device("cuda", 0))
    for tokens in args.tokens:
        for inputs, outputs in SHAPES:
            if time.perf_counter() - started > args.seconds:
                return
            weights = [
                torch.empty(outputs, inputs, device="cuda", dtype=torch.bfloat16).normal_(0, 0.02)
                for _ in range(copies_for(2 * inputs * outputs, 8))
            ]
            x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
            want = F.linear(x, weights[0]).float()
            ways: dict[str, tuning.Sizes | None] = {"library": None}
            if tokens <= gemv.MAX_TOKENS:
                ways["rule"] = gemv._default_sizes(tokens, inputs, outputs, facts)
            ways["64 rows, 4 stages"] = pieces(inputs, outputs, 64, 4)
            ways["64 rows, 6 stages"] = pieces(inputs, outputs, 64, 6)
            ways["128 rows, 4 stages"] = pieces(inputs, outputs, 128, 4)
            found: dict[str, float] = {}
            for way, sizes in ways.items():
                if sizes is not None:
                    error = (gemv.fused_linear(x, weights[0], sizes=sizes).float() - want).norm() / want.norm()
                    assert float(error) < 1e-2, (way, inputs, outputs, float(error))
                product = F.linear if sizes is None else partial(gemv.fused_linear, sizes=sizes)
                calls: list[Callable[[], object]] = [partial(product, x, weight) for weight in weights]
                found[way] = round(microseconds(calls)[0], 1)
            bound, best = 2 * inputs * outputs / CARD_BYTES_A_SECOND * 1e6, min(found.values())
            line = {
                "bench": "untuned", "inputs": inputs, "outputs": outputs, "tokens": tokens, "machine": machine, **found,
                "best": next(way for way in found if found[way] == best), "of_the_rate": round(bound / best, 3),
            }  # fmt: skip
            bench_table.tell(line, args.output)


if __name__ == "__main__":
    main()
