"""Decode attention over contexts of unequal length: into how many pieces are long ones best cut?

    python benchmarks/kernels/tune_contexts.py [--out FILE]

A step lasts as long as its longest row, so a few long contexts beside many short ones want to be cut, and equal ones do
not. For 8b on one, two and four cards (8, 4 and 2 key/value heads a rank), rows as chat has them at the end and in the
middle of a run, and contexts all alike or spread as there: the time with the sizes that ship, and with more programs a
multiprocessor (`per_sm`) and other shortest pieces (`min_piece`). Prints each, then how each choice does over all.
"""

import argparse
import math
import random
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from bench_kernels import rand
from timing import Report, copies_for, microseconds
from torch import Tensor

from argosy.kernels import paged_attention, tuning

SIZE, BLOCK, MAX_CONTEXT = 128, 16, 4096
KV_HEADS = (8, 4, 2)
CASES = (  # rows, mean context, spread (sigma of the logarithm; 0: alike)
    (1, 256, 0.0), (1, 1024, 0.0), (8, 256, 0.0), (8, 1100, 0.5), (24, 900, 0.5), (32, 256, 0.0), (48, 720, 0.6),
    (64, 256, 0.0), (64, 1024, 0.0), (96, 600, 0.7), (128, 256, 0.0), (184, 450, 0.8), (256, 256, 0.0), (384, 350, 0.8),
    (512, 640, 0.0), (768, 270, 0.8),
)  # fmt: skip
CHOICES = ((2, 512), (4, 512), (8, 512), (16, 512), (8, 256), (16, 256), (4, 1024), (16, 1024), (16, 384))


def lengths_of(rows: int, mean: int, sigma: float) -> list[int]:
    """The same for the same case; at most 2048, as prompts and answers of chat are."""
    rng = random.Random(rows * 1000 + mean)
    if not sigma:
        return [mean] * rows
    drawn = [rng.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma) for _ in range(rows)]
    return [max(16, min(2048, round(length))) for length in drawn]


def inputs_of(kv_heads: int, lengths: list[int]) -> list[tuple[Tensor, ...]]:
    """(projection, queries, positions, rotations, keys, values, slots, table, lengths), more than any cache holds."""
    rows, heads = len(lengths), 4 * kv_heads
    needed = [-(-length // BLOCK) for length in lengths]
    turns = torch.rand(MAX_CONTEXT, SIZE, device="cuda")
    found = []
    for _ in range(copies_for(sum(lengths) * 4 * kv_heads * SIZE, 16)):
        k_cache, v_cache = (rand(sum(needed) + 1, BLOCK, kv_heads, SIZE) for _ in range(2))
        ids = (torch.randperm(sum(needed)).int() + 1).tolist()
        table = torch.zeros((rows, MAX_CONTEXT // BLOCK), dtype=torch.int32)
        for row, count in enumerate(needed):
            table[row, :count] = torch.tensor([ids.pop() for _ in range(count)], dtype=torch.int32)
        context = torch.tensor(lengths, device="cuda", dtype=torch.int32)
        slots = torch.full((rows,), -1, device="cuda", dtype=torch.int64)
        qkv, q = rand(rows, (heads + 2 * kv_heads) * SIZE), rand(rows, heads, SIZE)
        found.append((qkv, q, context.long() - 1, turns, k_cache, v_cache, slots, table.cuda(), context))
    return found


def calls_of(inputs: list[tuple[Tensor, ...]], sizes: tuning.Sizes | None) -> list[Callable[[], object]]:
    """Attention as a recorded step does it, with these sizes (None: those that ship)."""

    def call(qkv: Tensor, q: Tensor, *rest: Tensor) -> object:
        if paged_attention.fusing_pays(q.shape[0] * rest[2].shape[2], False, q.device):
            return paged_attention.decode_attention(
                qkv, *rest, num_heads=q.shape[1], scale=0.1, max_context=MAX_CONTEXT, inputs_early=True, sizes=sizes
            )
        _, _, k_cache, v_cache, _, table, context = rest
        return paged_attention.paged_attention(
            q, k_cache, v_cache, table, context, scale=0.1, max_context=MAX_CONTEXT, sizes=sizes
        )

    return [partial(call, *one) for one in inputs]


def kind_of(groups: int, num_sms: int) -> str:
    """As the launcher chooses among tuned sizes."""
    return "few" if groups < num_sms else "many" if groups < 8 * num_sms else "crowd"


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="append the JSON lines to this file")
    parser.add_argument("--heads", type=int, nargs="+", default=KV_HEADS, help="key/value heads of a rank")
    args = parser.parse_args()
    torch.manual_seed(0)
    report, device = Report(args.out), torch.device("cuda")
    num_sms = tuning.device_facts(device).num_sms
    gains: dict[tuple[str, tuple[int, int]], list[float]] = defaultdict(list)
    for kv_heads in args.heads:
        for rows, mean, sigma in CASES:
            lengths = lengths_of(rows, mean, sigma)
            kind = kind_of(rows * kv_heads, num_sms)
            shipped = tuning.pick("paged_attention", f"h{SIZE}_{kind}", device)
            sort = f"spread, longest {max(lengths)}" if sigma else "alike"
            case = f"{kv_heads} kv rows {rows} context {mean} {sort}"
            inputs = inputs_of(kv_heads, lengths)
            before, spread = microseconds(calls_of(inputs, None), replays=3)
            moved = sum(lengths) * 2 * kv_heads * SIZE * 2
            report.add("shipped", case, before, spread, kind=kind, TBps=round(moved / before / 1e6, 2))
            if shipped is None:
                continue
            for per_sm, min_piece in CHOICES:
                sizes = {**shipped, "per_sm": per_sm, "min_piece": min_piece}
                us, spread = microseconds(calls_of(inputs, sizes), replays=3)
                gains[kind, (per_sm, min_piece)].append(us / before)
                report.add(f"{per_sm} of {min_piece}", case, us, spread, kind=kind, ratio=round(us / before, 3))
            del inputs
            torch.cuda.empty_cache()
    print("\nkind, programs a multiprocessor, shortest piece: time beside what ships (geometric mean, worst, best)")
    for (kind, choice), ratios in sorted(gains.items()):
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(f"{kind:6} {choice[0]:3} {choice[1]:5}   {mean:.3f}  {max(ratios):.3f}  {min(ratios):.3f}", flush=True)


if __name__ == "__main__":
    main()
