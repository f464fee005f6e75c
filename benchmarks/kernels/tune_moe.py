"""Which tiles are fastest for the grouped product of experts on this card: `moe_gemm._tile`, `moe_packed.default_tile`.

    python benchmarks/kernels/tune_moe.py --seconds 120 --output tiles.jsonl

For each published shape and number of tokens every tile is timed on its own; a line says the best three, and the best
of each number of rows a block, in microseconds, and what part of the card's 4.8 TB/s the weights of the experts asked
come to. Packed weights are measured turned (`moe_packed`) and, of two tiles, the other way.
"""

import argparse
import contextlib
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor

from argosy.deploy import bench_table
from argosy.kernels import fp8_quantize, moe_gemm, moe_int, moe_packed, moe_reference, packed_reference
from argosy.kernels.fp8_reference import Rounding
from argosy.kernels.moe_int import FEW, MANY, WARP_GROUPS, Tile
from argosy.kernels.moe_reference import IntExpertWeight

CARD_BYTES_A_SECOND = 4.8e12
# name -> experts, outputs, inputs, chosen, format
SHAPES = {
    "mixtral gate-up": (8, 28672, 4096, 2, "plain"),
    "mixtral down": (8, 4096, 14336, 2, "plain"),
    "qwen3-30b gate-up": (128, 1536, 2048, 8, "plain"),
    "qwen3-30b down": (128, 2048, 768, 8, "plain"),
    "mixtral gate-up int4": (8, 28672, 4096, 2, "int4"),
    "mixtral down int4": (8, 4096, 14336, 2, "int4"),
    "qwen3-30b gate-up int4": (128, 1536, 2048, 8, "int4"),
    "qwen3-30b down int4": (128, 2048, 768, 8, "int4"),
    "gpt-oss-120b gate-up mxfp4": (128, 5760, 2880, 4, "mxfp4"),
    "gpt-oss-120b down mxfp4": (128, 2880, 2880, 4, "mxfp4"),
    "deepseek-r1 tp8 gate-up fp8": (256, 512, 7168, 8, "e4m3"),
    "deepseek-r1 ep8 gate-up fp8": (32, 4096, 7168, 1, "e4m3"),
    "deepseek-r1 ep8 down fp8": (32, 7168, 2048, 1, "e4m3"),
}
TILES = {
    16: [(32, 128, 4, 4), (32, 256, 4, 3), (64, 128, 4, 3), (64, 128, 4, 4), (64, 128, 4, 5), (64, 256, 4, 3),
         (128, 128, 4, 3), (128, 64, 4, 4)],
    32: [(64, 128, 4, 4), (128, 128, 4, 3), (128, 64, 4, 4), (128, 128, 8, 3)],
    64: [(64, 128, 4, 3), (128, 64, 4, 4), (128, 64, 8, 3), (128, 128, 8, 3)],
    128: [(128, 64, 8, 3), (128, 64, 8, 4), (256, 64, 8, 3), (128, 128, 8, 3)],
}  # fmt: skip
INT_TILES = {
    8: [Tile(FEW, 2, 2, 4), Tile(FEW, 4, 2, 3), Tile(FEW, 2, 4, 3), Tile(FEW, 1, 4, 4), Tile(FEW, 2, 1, 4)],
    16: [Tile(FEW, 2, 2, 4), Tile(FEW, 2, 2, 3), Tile(FEW, 4, 2, 3), Tile(FEW, 4, 1, 3), Tile(FEW, 4, 4, 3),
         Tile(FEW, 8, 2, 3), Tile(FEW, 2, 1, 4), Tile(FEW, 2, 4, 3), Tile(MANY, 8, 4, 3), Tile(MANY, 8, 8, 3)],
    32: [Tile(FEW, 2, 2, 3), Tile(FEW, 4, 2, 3), Tile(MANY, 8, 4, 3), Tile(WARP_GROUPS, 8, 8, 3),
         Tile(WARP_GROUPS, 8, 4, 3)],
    64: [Tile(WARP_GROUPS, 8, 8, 3), Tile(WARP_GROUPS, 8, 4, 3), Tile(WARP_GROUPS, 8, 4, 2),
         Tile(WARP_GROUPS, 4, 4, 3)],
    128: [Tile(WARP_GROUPS, 8, 8, 3), Tile(WARP_GROUPS, 8, 8, 2), Tile(WARP_GROUPS, 16, 8, 2)],
}  # fmt: skip
TURNED = {
    "mxfp4": [(64, 128, 4, 4), (64, 256, 4, 4), (128, 128, 8, 4), (32, 128, 4, 4), (32, 256, 4, 4), (64, 128, 4, 6)],
    "e4m3": [(64, 128, 4, 6), (128, 128, 4, 4), (128, 128, 8, 4)],
}


def main() -> int:
    """Measure within the time given; the shapes that matter first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 256, 2048])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--compile", action="store_true", help="only this, by many processes: beside another job")
    parser.add_argument("--output")
    args = parser.parse_args()
    started = time.perf_counter()
    machine = torch.cuda.get_device_name(0)
    if any(SHAPES[name][-1] == "int4" for name in args.shapes):
        compile_at_once()
        print(f"# compiled in {time.perf_counter() - started:.0f} s", flush=True)
    if args.compile:
        return 0
    for name in args.shapes:
        experts, outputs, inputs, top_k, kind = SHAPES[name]
        weight, scale = random_experts(experts, outputs, inputs, kind)
        for tokens in args.tokens:
            if time.perf_counter() - started > args.seconds:
                return 0
            x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
            ids, _ = moe_reference.choose_experts(torch.randn(tokens, experts, device="cuda"), top_k)
            found = try_all(name, weight, scale, x, ids)
            asked = len(ids.unique())
            size = weight.packed.num_bytes / experts if kind == "int4" else weight[0].nbytes
            bound = asked * size / CARD_BYTES_A_SECOND
            line = {
                "kernel": "moe_gemm", "shape": name, "tokens": tokens, "machine": machine,
                "bandwidth": round(bound / found[0][0], 3),
                "best": [[round(f[0] * 1e6, 1), *f[1:]] for f in found[:3]],
                "by_rows": {
                    rows: [round(best[0] * 1e6, 1), *best[2:]]
                    for rows in (8, *TILES)
                    if (best := next((f for f in found if f[1] == rows), None)) is not None
                },
                "worst_us": round(found[-1][0] * 1e6, 1),
            }  # fmt: skip
            bench_table.tell(line, args.output)
        del weight
    return 0


def random_experts(experts: int, outputs: int, inputs: int, kind: str) -> tuple[Any, Tensor | None]:
    """(weights of all experts as that format keeps them, their scales if they lie apart)."""
    if kind == "int4":
        return random_int_experts(experts, outputs, inputs), None
    if kind == "mxfp4":
        packed = torch.randint(0, 256, (experts, outputs, inputs // 2), device="cuda", dtype=torch.uint8)
        return packed, torch.full((experts, outputs, inputs // 32), 119, device="cuda", dtype=torch.uint8)
    weight = torch.randn(experts, outputs, inputs, device="cuda", dtype=torch.bfloat16) * 0.02
    if kind == "e4m3":
        scale = torch.ones(experts, -(-outputs // 128), -(-inputs // 128), device="cuda")
        return weight.to(torch.float8_e4m3fn), scale
    return weight, None


def ways_of(kind: str, rows: int) -> list[tuple[str, Any]]:
    """(way, tile) of all that may multiply groups of so many rows."""
    if kind == "int4":
        return [("int", tile) for tile in INT_TILES[rows]] + [("slices", ())] * (rows >= 64)
    tiles = TILES.get(rows, [])
    if kind != "plain":  # in e4m3 a step of inputs is what shares a scale
        tiles = [tile for tile in tiles[2:3] if kind != "e4m3" or tile[1] == 128]
    return [("turned", tile) for tile in TURNED.get(kind, ()) if rows in TILES] + [("", tile) for tile in tiles]


def try_all(name: str, weight: Any, scale: Tensor | None, x: Tensor, ids: Tensor) -> list[tuple[Any, ...]]:
    """(seconds, rows of a group, sizes of the tile, way) of each that this card can run, the fastest first."""
    experts, _, _, top_k, kind = SHAPES[name]
    tokens, found = len(x), []
    average = tokens * top_k / experts
    for rows in (8, *TILES):
        ways = ways_of(kind, rows) if min(average / 4, 128) <= rows <= max(32, 4 * average) else []
        if not ways:
            continue
        places, of_block = moe_gemm.group_tokens(ids, experts, rows)
        for way, tile in ways:
            rows_x = x
            if way == "turned":
                rows_x = moe_packed.turn(x) if kind == "mxfp4" else fp8_quantize.quantize(x, Rounding(128))
            try:
                seconds = timed(rows_x, weight, places, of_block, tokens * top_k, top_k, scale, tile, way)
            except Exception as error:  # a tile too large for the card's shared memory
                print(f"# {name} {rows} {way} {tile}: {type(error).__name__} {str(error)[:80]}", flush=True)
                continue
            found.append((seconds, rows, *(tile or (-1,)), way))
    return sorted(found)


def compile_at_once() -> None:
    """All tiles of `INT_TILES` in as many processes, whose kernels then lie in Triton's cache."""
    jobs = [(rows, tile) for rows, tiles in INT_TILES.items() for tile in tiles]
    with ProcessPoolExecutor(12, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, jobs))


def _compile(job: tuple[int, Tile]) -> None:
    rows, tile = job
    x, ids = torch.zeros(16, 512, device="cuda", dtype=torch.bfloat16), torch.zeros(16, 2, device="cuda").int()
    chosen = (*moe_gemm.group_tokens(ids, 2, rows), 32)
    with contextlib.suppress(Exception):  # it will be said where it is measured
        moe_int.grouped_gemm(x, random_int_experts(2, 512, 512), *chosen, shared=2, tile=tile)


def random_int_experts(
    experts: int, outputs: int, inputs: int, *, bits: int = 4, group: int = 128, ordered: bool = False
) -> IntExpertWeight:
    """Any words and zeros, one scale; perhaps each expert's inputs in another order."""
    words, pairs = packed_reference.shapes(outputs, inputs, bits=bits, group=group)
    packed = packed_reference.PackedWeight(
        torch.randint(-(1 << 31), (1 << 31) - 1, (experts, *words), dtype=torch.int32, device="cuda"),
        torch.randint(0, 16, (experts, *pairs), device="cuda").half(), bits, group, inputs, outputs,
    )  # fmt: skip
    for plane in range(bits // 4):  # blocks of columns have their planes one after the other
        block = packed.pairs_MKR2.view(experts, pairs[0], -1, bits // 4, max(group, 64) // group, 16, 2)
        block[:, :, :, plane, :, :, 0] = 0.05 / (1 << bits) * 16**plane
    if not ordered:
        return IntExpertWeight(packed)
    order = torch.stack([torch.randperm(inputs, device="cuda") for _ in range(experts)]).int()
    return IntExpertWeight(packed, order)


def timed(x, weight, places, of_block, choices, shared, scale, tile, way) -> float:  # type: ignore[no-untyped-def]  # tensors and sizes
    """Seconds of one product, the median of five times ten in a recorded graph."""

    def run() -> None:
        if way == "int":
            moe_int.grouped_gemm(x, weight, places, of_block, choices, shared=shared, tile=tile)
        elif way == "slices":
            moe_gemm._by_slices(x, weight, places, of_block, choices, shared=shared)
        elif way:
            moe_packed.grouped_gemm(
                x, weight, scale, places, of_block, choices, shared=shared, dtype=torch.bfloat16, tile=tile
            )
        else:
            moe_gemm.grouped_gemm(x, weight, places, of_block, choices, shared=shared, scale_EOI=scale, tile=tile)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()  # one product of a few rows takes less time than its launch
    with torch.cuda.graph(graph):
        for _ in range(10):
            run()
    times = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e4)
    return sorted(times)[2]


if __name__ == "__main__":
    sys.exit(main())
