"""Blocks between a device and its host: what orders reach of the link's speed, and what they hold up.

    python benchmarks/swap/bench_copies.py                         one GPU, blocks of an 8B model
    python benchmarks/swap/bench_copies.py --device cpu --layers 4 --blocks 64

`plain` is one long copy of pinned memory, the measure. An order's share is its bytes a second over that, from the
moment it is given until its last block is there, gathering and scattering included. `held_up` is what a stream of
products takes longer while the order is carried out. `direct` has no buffer: a kernel reads and writes the host's
memory by itself. `by layer` is a copy for each block of each layer.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from argosy.cluster.protocol.messages import BlockSwaps
from argosy.deploy import bench
from argosy.kernels import ops
from argosy.workers.host_memory import pinned_bytes
from argosy.workers.host_pool import HostPool, make_host_pool


def timed(device: torch.device, run: Callable[[], object], repeats: int) -> float:
    """The least seconds of some calls, to their very end."""
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        run()
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best


def synchronize(device: torch.device) -> None:
    """Wait for all streams."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def plain_rates(device: torch.device, num_bytes: int) -> tuple[float, float]:
    """Bytes a second of long copies, out and in."""
    host, there = pinned_bytes(num_bytes, device), torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    out = timed(device, lambda: host.copy_(there, non_blocking=True), 5)
    into = timed(device, lambda: there.copy_(host, non_blocking=True), 5)
    return num_bytes / out, num_bytes / into


def orders(pool: HostPool, count: int, scattered: bool) -> tuple[BlockSwaps, BlockSwaps]:
    """So many blocks out and in, to host blocks that follow each other or don't."""
    rng = random.Random(count)
    devices = rng.sample(range(pool.tensors[0].shape[0]), count)
    hosts = rng.sample(range(len(pool.rows_NB)), count) if scattered else list(range(count))
    pairs = list(zip(devices, hosts, strict=True))
    return BlockSwaps(out=pairs), BlockSwaps(into=[(host_id, block_id) for block_id, host_id in pairs])


def given(pool: HostPool, swaps: BlockSwaps) -> Callable[[], None]:
    """Give an order and wait for its end."""

    def run() -> None:
        pool.begin(1, swaps)
        pool.finish()

    return run


def held_up(pool: HostPool, swaps: BlockSwaps, seconds: float) -> float:
    """Seconds that a stream of products of about `seconds` takes longer when an order is given at its start."""
    x = torch.zeros(64, 4096, device=pool.device).bfloat16()
    weights = torch.zeros(16, 4096, 4096, device=pool.device).bfloat16()  # more than a cache holds, as a model's

    def products(count: int) -> None:
        for place in range(count):
            x.matmul(weights[place % 16])

    one = timed(pool.device, lambda: products(200), 3) / 200
    count = max(1, int(seconds / one))
    event: Any = torch.cuda.Event

    def stream_seconds(order: BlockSwaps | None) -> float:
        found: list[float] = []
        for _ in range(5):
            pool.finish()
            synchronize(pool.device)
            first, last = event(enable_timing=True), event(enable_timing=True)
            products(20)
            first.record()
            if order is not None:
                pool.begin(1, order)
            products(count)
            last.record()
            synchronize(pool.device)
            found.append(first.elapsed_time(last) / 1e3)
        return sorted(found)[2]

    return stream_seconds(swaps) - stream_seconds(None)


def of_orders(
    pool: HostPool, device: torch.device, count: int, out_rate: float, in_rate: float
) -> Iterator[dict[str, Any]]:
    """A row for each order of so many blocks: out and in, side by side and scattered; beside the plain rates."""
    for scattered in (False, True):
        out, into = orders(pool, count, scattered)
        for way, swaps, rate in (("out", out, out_rate), ("in", into, in_rate)):
            num_bytes = count * pool.block_bytes
            took = timed(device, given(pool, swaps), 5)
            row = {"figure": "order", "way": way, "blocks": count, "scattered": scattered,
                   "gbytes_per_second": round(num_bytes / took / 1e9, 2),
                   "share_of_plain": round(num_bytes / took / rate, 3)}  # fmt: skip
            began = time.perf_counter()
            pool.begin(1, swaps)
            row["host_us"] = round(1e6 * (time.perf_counter() - began), 1)
            pool.finish()
            if device.type == "cuda":
                row["held_up_us"] = round(1e6 * held_up(pool, swaps, 2 * took), 1)
            yield row


def other_ways(pool: HostPool, device: torch.device, tensors: list[Tensor]) -> Iterator[dict[str, Any]]:
    """A row each: both ways at once, and copies without our buffers."""
    both = BlockSwaps(out=[(one, one) for one in range(256)], into=[(one + 300, one + 300) for one in range(256)])
    took = timed(device, given(pool, both), 5)
    yield {"figure": "both ways at once", "gbytes_per_second": round(512 * pool.block_bytes / took / 1e9, 2)}
    host = [pinned_bytes(64 * x[0].nbytes, device).view(x.dtype).view(64, *x.shape[1:]) for x in tensors]
    pairs = [(one, one) for one in range(64)]
    for name, run in {
        "direct out": lambda: ops.swap_blocks(tensors, host, pairs),
        "direct in": lambda: ops.swap_blocks(host, tensors, pairs),
        "by layer in": lambda: [
            there[one].copy_(here[one], non_blocking=True)
            for there, here in zip(tensors, host, strict=True)
            for one in range(64)
        ],
    }.items():
        took = timed(device, run, 3)
        yield {"figure": name, "blocks": 64, "gbytes_per_second": round(64 * pool.block_bytes / took / 1e9, 2)}


def main() -> int:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--heads", type=int, default=8, help="for keys and values, of this rank")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=1024)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--output", help="append the JSON lines to this file")
    args = parser.parse_args()
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device(args.device)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    shape = (args.blocks, args.block_size, args.heads, 128)
    tensors = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2 * args.layers)]
    began = time.perf_counter()
    pool = make_host_pool(tensors, 2 * args.blocks)
    pinned = time.perf_counter() - began
    out_rate, in_rate = plain_rates(device, 256 * 2**20)
    about = {key: value for key, value in bench.describe_machine().items() if key != "cores"}
    seconds = pool.measure()
    rows: list[dict[str, Any]] = [{
        "figure": "plain", "out_gbytes_per_second": round(out_rate / 1e9, 2),
        "in_gbytes_per_second": round(in_rate / 1e9, 2), "block_bytes": pool.block_bytes,
        "pin_seconds_per_gib": round(pinned / (pool.rows_NB.nbytes / 2**30), 3),
        "measured_at_start": [round(pool.block_bytes / one / 1e9, 2) for one in seconds],
    }]  # fmt: skip
    print(json.dumps(rows[0]), flush=True)
    for count in args.counts:
        for row in of_orders(pool, device, min(count, args.blocks), out_rate, in_rate):
            rows.append(row)
            print(json.dumps(row), flush=True)
    if device.type == "cuda":
        rows += other_ways(pool, device, tensors)
        print("\n".join(json.dumps(row) for row in rows[-4:]), flush=True)
    if args.output:
        with open(args.output, "a", encoding="utf-8") as file:
            file.writelines(json.dumps({"benchmark": "swap copies", **row, **about}) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
