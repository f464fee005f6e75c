"""How full the waves of decode attention are: `python benchmarks/kernels/tune_waves.py [--seconds 60]`.

For 8b (32 heads over 8, of 128) and rows whose contexts are equal or drawn: microseconds of a launch by tile and by how
often a context is cut, beside what reading the keys and values takes at 4.44 TB/s. A JSON line for each number of rows
and context, with the best few; `now` is what would be taken without asking.

With `--even` the question is which rows are even enough for one warp a tile: a case such as 256x256~25 has contexts
that differ by a quarter to either side. Whole decode attention, rotation and store with it, long rows first, as a
recorded step runs it: `now` and, by tile, in one launch. `--heads 16 --norm` are Qwen3 0.6B's.
"""

import argparse
import json
import sys
import time

import torch
from timing import microseconds

from argosy.kernels import ops, paged_attention, tuning

HEADS, KV_HEADS, SIZE, BLOCK = 32, 8, 128, 16
READ = 4.44e6  # bytes a microsecond
TILES = {  # block_l, warps, stages
    "32x1x2": (32, 1, 2), "32x1x3": (32, 1, 3), "64x2x2": (64, 2, 2), "64x2x3": (64, 2, 3), "64x1x2": (64, 1, 2),
    "128x4x2": (128, 4, 2), "128x4x3": (128, 4, 3), "64x4x3": (64, 4, 3), "64x2x4": (64, 2, 4),
    "16x1x4": (16, 1, 4),
}  # fmt: skip
CUTS = ((1, 0), (2, 1024))  # pieces at most, tokens of one at least
CASES = [
    (256, 256), (144, 256), (200, 256), (256, 384), (64, 256), (96, 256), (240, 0), (144, 2112), (208, 2112),
    (512, 640), (512, 0), (1000, 0), (320, 300), (64, 1024), (128, 512), (100, 0),
]  # fmt: skip  # a context of 0: drawn, log-normal


def contexts_of(rows: int, context: int) -> list[int]:
    """All equal, or as of a chat: log-normal around 500."""
    if context:
        return [context] * rows
    torch.manual_seed(7)
    drawn = torch.exp(torch.randn(rows) * 0.8 + 6.2).clamp(64, 3000)
    return [int(value) for value in drawn]


def together(caches: list[torch.Tensor], table: torch.Tensor, length: torch.Tensor) -> dict[str, list[float]]:
    """By tile: microseconds with rotation and store inside, and with a launch of their own."""
    rows, device = len(length), length.device
    qkv = torch.randn(rows, (HEADS + 2 * KV_HEADS) * SIZE, device=device, dtype=torch.bfloat16)
    positions, rotations = length.long() - 1, torch.randn(4096, SIZE, device=device)
    slots = table.gather(1, positions[:, None] // BLOCK)[:, 0].long() * BLOCK + positions % BLOCK
    found = {}
    for name, (block_l, warps, stages) in TILES.items():
        sizes = {"block_l": block_l, "warps": warps, "stages": stages, "per_sm": 1, "splits": 1}

        def inside(sizes: tuning.Sizes = sizes) -> torch.Tensor:
            return paged_attention.decode_attention(
                qkv, positions, rotations, *caches, slots, table, length, num_heads=HEADS, scale=SIZE**-0.5,
                max_context=4096, inputs_early=True, sizes=sizes,
            )  # fmt: skip

        def apart(sizes: tuning.Sizes = sizes) -> torch.Tensor:
            q = ops.rope_and_store(qkv, positions, rotations, *caches, slots, num_heads=HEADS)
            return paged_attention.paged_attention(
                q, *caches, table, length, scale=SIZE**-0.5, max_context=4096, sizes=sizes
            )  # fmt: skip

        found[name] = [round(microseconds([way], launches=12, replays=3)[0], 1) for way in (inside, apart)]
    return found


def spread_contexts(rows: int, context: int, percent: int) -> list[int]:
    """From so much below to so much above, every length as often, long ones first."""
    reach = context * percent / 100
    return [round(context + reach - 2 * reach * row / max(1, rows - 1)) for row in range(rows)]


def measure_even(caches: list[torch.Tensor], lengths: list[int], heads: int, norm: bool) -> dict[str, object]:
    """Microseconds of decode attention from the projection on: what is taken now, and each tile in one launch."""
    device, rows, num_blocks = caches[0].device, len(lengths), caches[0].shape[0]
    table = torch.randint(0, num_blocks, (rows, 4096 // BLOCK), device=device, dtype=torch.int32)
    length = torch.tensor(lengths, device=device, dtype=torch.int32)
    order = torch.arange(rows, device=device, dtype=torch.int32)
    qkv = torch.randn(rows, (heads + 2 * KV_HEADS) * SIZE, device=device, dtype=torch.bfloat16)
    positions, rotations = length.long() - 1, torch.randn(4096, SIZE, device=device)
    slots = table.gather(1, positions[:, None] // BLOCK)[:, 0].long() * BLOCK + positions % BLOCK
    weight = torch.ones(SIZE, device=device, dtype=torch.bfloat16) if norm else None

    def time_of(sizes: tuning.Sizes | None) -> float:
        def call() -> torch.Tensor:
            function, more = (ops.decode_attention, {}) if sizes is None else (
                paged_attention.decode_attention, {"sizes": sizes}
            )  # fmt: skip
            return function(
                qkv, positions, rotations, *caches, slots, table, length, num_heads=heads, scale=SIZE**-0.5,
                max_context=4096, inputs_early=True, order_R=order, q_norm_weight_H=weight, k_norm_weight_H=weight,
                **more,
            )  # fmt: skip

        return round(microseconds([call], launches=16, replays=5)[0], 1)

    row: dict[str, object] = {"floor": round(sum(lengths) * 4 * KV_HEADS * SIZE / READ, 1), "now": time_of(None)}
    row["inside"] = {
        name: time_of({"block_l": block_l, "warps": warps, "stages": stages, "per_sm": 1, "splits": 1})
        for name, (block_l, warps, stages) in TILES.items()
    }
    return row


def measure(caches: list[torch.Tensor], lengths: list[int]) -> dict[str, object]:
    """Every tile and cut over these contexts."""
    device, rows, num_blocks = caches[0].device, len(lengths), caches[0].shape[0]
    table = torch.randint(0, num_blocks, (rows, 4096 // BLOCK), device=device, dtype=torch.int32)
    length = torch.tensor(lengths, device=device, dtype=torch.int32)
    queries = torch.randn(rows, HEADS, SIZE, device=device, dtype=torch.bfloat16)

    def time_of(sizes: tuning.Sizes | None) -> float:
        def call() -> torch.Tensor:
            return paged_attention.paged_attention(
                queries, *caches, table, length, scale=SIZE**-0.5, max_context=4096, sizes=sizes
            )

        return round(microseconds([call], launches=12, replays=3)[0], 1)

    found: list[tuple[float, str]] = []
    for name, (block_l, warps, stages) in TILES.items():
        for splits, piece in CUTS:
            if splits == 1 or max(lengths) > piece:
                sizes = {"block_l": block_l, "warps": warps, "stages": stages, "per_sm": 1, "splits": splits}
                found.append(
                    (time_of(sizes | ({"min_piece": piece} if piece else {})), f"{name} / {splits} of {piece}")
                )
    found.sort()
    row: dict[str, object] = {"floor": round(sum(lengths) * 4 * KV_HEADS * SIZE / READ, 1), "now": time_of(None)}
    row["best"] = [f"{us} {what}" for us, what in found[:6]]
    row["whole"] = {what.split()[0]: us for us, what in found if "/ 1 of" in what}
    row["with rotation"] = together(caches, table, length)
    return row


def main() -> int:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", nargs="+", choices=TILES, default=list(TILES), help="keys by warps by stages")
    parser.add_argument(
        "--cases", nargs="+", default=[], help="rows x context, such as 256x256; a context of 0 is drawn; 256x256~25"
    )
    parser.add_argument("--even", action="store_true", help="whole decode attention of rows that differ by so much")
    parser.add_argument("--heads", type=int, default=HEADS, help="of queries, with --even")
    parser.add_argument("--norm", action="store_true", help="heads are normed before they turn, with --even")
    parser.add_argument("--seconds", type=float, default=60.0, help="cases after this are left out")
    args = parser.parse_args()
    for name in set(TILES) - set(args.tiles):
        del TILES[name]
    cases = [tuple(map(int, f"{case}~0".replace("~", "x").split("x")[:3])) for case in args.cases]
    cases = cases or [(rows, context, 0) for rows, context in CASES]
    began = time.monotonic()
    shape = (1_200_000 // BLOCK, BLOCK, KV_HEADS, SIZE)
    caches = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    for rows, context, percent in cases:
        if time.monotonic() - began > args.seconds:
            print(f"left out for time: {rows} x {context}")
            continue
        if args.even:
            lengths = spread_contexts(rows, context, percent) if context else contexts_of(rows, context)
            found = measure_even(caches, sorted(lengths, reverse=True), args.heads, args.norm)
            what = {"heads": args.heads, "normed": args.norm, "rows": rows, "context": context or "drawn"}
            print(json.dumps({**what, "percent": percent, **found}), flush=True)
            continue
        lengths = contexts_of(rows, context)
        row = {"rows": rows, "context": context or "drawn", **measure(caches, lengths)}
        print(json.dumps(row), flush=True)
        if not context:
            print(
                json.dumps({**row, "order": "long first", **measure(caches, sorted(lengths, reverse=True))}), flush=True
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
