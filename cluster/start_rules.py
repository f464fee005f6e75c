"""What follows from the ranks' first words: how many blocks all have, or why the engine can't start."""

import re
from collections.abc import Iterable, Sequence
from typing import Final

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import (
    ConfigError,
    PlacementImpossible,
    ServingError,
    UnsupportedModel,
    WeightError,
    WorkerFailed,
    WorkerLost,
)
from argosy.cluster.protocol.kv_groups import KVGroups
from argosy.cluster.protocol.ledger import gib
from argosy.cluster.protocol.messages import WorkerError, WorkerReady, WorkerReport
from argosy.cluster.protocol.swap import MOST_HOST_BLOCKS, NO_SWAP, SwapCosts


def agree_on_num_blocks(reports: Sequence[WorkerReport], config: ServingConfig) -> int:
    """The least of what the ranks have room for becomes everybody's.

    Raises `ConfigError` when that does not hold one request of full length, naming the length that would fit.
    """
    smallest = min(reports, key=lambda report: (report.num_blocks, report.global_rank))
    num_blocks, block_size = smallest.num_blocks, config.cache.block_size
    other = next((report for report in reports if report.kv_windows != smallest.kv_windows), None)
    if other is not None:
        raise PlacementImpossible(
            f"rank {other.global_rank} on {other.node or 'this node'} has layers with windows {other.kv_windows}, rank "
            f"{smallest.global_rank} {smallest.kv_windows}: their folders of the model differ; give all nodes the same"
        )
    groups = KVGroups(smallest.kv_windows)
    where = f"rank {smallest.global_rank} ({smallest.device} on {smallest.node or 'this node'})"
    max_model_len = config.model.max_model_len
    if num_blocks < 2 * groups.num_groups:
        needed = max(2 * groups.num_groups, groups.num_blocks(max_model_len or 1, block_size))
        raise PlacementImpossible(
            f"{where} has room for {max(num_blocks, 0)} KV blocks after {gib(smallest.weight_bytes)} of weights and "
            f"{gib(smallest.activation_bytes)} of activations, and one request of full length needs {needed}; "
            f"{_way_out(smallest, config, needed)}"
        )
    needed = groups.num_blocks(max_model_len or 1, block_size)
    if max_model_len is not None and num_blocks < needed:
        raise ConfigError(
            f"max_model_len={max_model_len} needs {needed} KV blocks and {where} has room for {num_blocks}; "
            f"start with --max-model-len {groups.num_tokens(num_blocks, block_size)} or less, or give the cache "
            f"{gib(needed * smallest.block_bytes)}: {_way_out(smallest, config, needed)}"
        )
    return num_blocks


def agree_on_num_host_blocks(reports: Sequence[WorkerReport], config: ServingConfig, num_blocks: int) -> int:
    """The least of what the ranks' host memory holds; of "auto" no more than 4 times the blocks on the device.

    Raises `ConfigError` when `swap_space` does not hold a single block.
    """
    swap_space = config.offload.swap_space
    if not swap_space:
        return 0
    smallest = min(reports, key=lambda report: (report.num_host_blocks, report.global_rank))
    if isinstance(swap_space, str):
        return min(smallest.num_host_blocks, MOST_HOST_BLOCKS * num_blocks)
    if smallest.num_host_blocks < 1:
        block_bytes = smallest.block_bytes
        raise ConfigError(
            f"swap_space={swap_space:g} GiB: a KV block of rank {smallest.global_rank} has {gib(block_bytes)}; "
            f"use --swap-space {max(1, -(-block_bytes // 2**20))}MiB or more, or auto"
        )
    return smallest.num_host_blocks


def swap_costs(reports: Sequence[WorkerReport], ready: Sequence[WorkerReady], num_host_blocks: int) -> SwapCosts:
    """What the ranks measured: all copy at the same time, so the slowest counts; bytes are those of all."""
    if not num_host_blocks:
        return NO_SWAP
    out_seconds, in_seconds, token_seconds = map(max, zip(*(one.swap_seconds for one in ready), strict=True))
    return SwapCosts(
        num_host_blocks=num_host_blocks,
        block_bytes=sum(report.block_bytes for report in reports),
        out_seconds=out_seconds,
        in_seconds=in_seconds,
        token_seconds=token_seconds,
    )


def _way_out(report: WorkerReport, config: ServingConfig, needed: int) -> str:
    """The flag that gives the cache so many blocks, with its value."""
    cache, wanted = config.cache, needed * report.block_bytes
    if cache.num_gpu_blocks_override is not None:
        return f"use --num-gpu-blocks-override {needed} or more"
    if cache.kv_cache_memory_bytes is not None or report.device == "cpu" or not (total := report.ledger.get("total")):
        return f"use --kv-cache-memory-bytes {wanted} or more"
    share = cache.gpu_memory_utilization + max(wanted - report.free_bytes, 0) / total + 0.01
    if share < 0.99:
        return f"use --gpu-memory-utilization {share:.2f}"
    tp_size = config.parallel.tensor_parallel_size
    return f"spread the model over more ranks, such as --tensor-parallel-size {2 * tp_size}"


def error_of_rank(error: WorkerError, node: str, epoch: int) -> ServingError:
    """A rank's last word as one of our errors, with the text it gave."""
    return error_from_code(error.code, error.message, global_rank=error.global_rank, node=node, epoch=epoch)


def error_from_code(code: str, message: str, *, global_rank: int = -1, node: str = "", epoch: int = 0) -> ServingError:
    """An error that crossed a process border as its code and its text."""
    if code in (WeightError.code, UnsupportedModel.code):
        kind = UnsupportedModel if code == UnsupportedModel.code else WeightError
        file, separator, problem = message.partition(": ")
        return kind(file, "", problem) if separator else kind("model", "", message)
    if code == ConfigError.code:
        return ConfigError(message)
    if code == PlacementImpossible.code:
        return PlacementImpossible(message)
    if code == WorkerLost.code and global_rank >= 0:
        return WorkerLost(global_rank, node, epoch)
    if code == WorkerFailed.code and (named := re.fullmatch(r"rank (-?\d+): (.*)", message, re.DOTALL)):
        return WorkerFailed(int(named[1]), code, named[2])
    return WorkerFailed(global_rank, code, message)


# The order in which ranks go through their phases; an unknown one counts as early.
_PHASES: Final = {
    "starting workers": 0,
    "groups": 1,
    "loading weights": 2,
    "compiling kernels": 3,
    "measuring": 4,
    "allocating": 5,
    "warming up": 6,
}


def slowest_phase(progress: Iterable[tuple[str, float]]) -> tuple[str, float] | None:
    """Of what ranks said they are doing, and how much of it is done, that which is furthest from the end."""
    return min(progress, key=lambda entry: (_PHASES.get(entry[0], 0), entry[1]), default=None)
