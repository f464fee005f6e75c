"""Too little room for the cache is one line with the flag, and the value, that gives it enough."""

from typing import Any

import pytest

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import ConfigError, PlacementImpossible
from argosy.cluster.protocol.messages import WorkerReady, WorkerReport
from argosy.cluster.protocol.swap import NO_SWAP
from argosy.cluster.start_rules import agree_on_num_blocks, agree_on_num_host_blocks, swap_costs

GIB = 2**30


def config(**settings: Any) -> ServingConfig:
    """One request of full length is 256 blocks of 16 tokens."""
    return ServingConfig.from_mapping({"model": "m", "max_model_len": 4096, **settings})


def report(num_blocks: int, *, rank: int = 0, total_gib: int = 100, num_host_blocks: int = 0) -> WorkerReport:
    """A rank with so many blocks of 4 MiB."""
    return WorkerReport(
        global_rank=rank, epoch=0, num_blocks=num_blocks, block_bytes=4 << 20, free_bytes=num_blocks * (4 << 20),
        weight_bytes=15 * GIB, activation_bytes=GIB, device="a card", node="",
        ledger={"total": total_gib * GIB} if total_gib else {}, num_host_blocks=num_host_blocks,
    )  # fmt: skip


def test_the_least_of_all_ranks_is_everybody_s() -> None:
    """A stage with more layers has room for fewer."""
    assert agree_on_num_blocks([report(900), report(300, rank=1)], config()) == 300


@pytest.mark.parametrize(
    ("num_blocks", "total_gib", "settings", "advice"),
    [
        (100, 100, {"gpu_memory_utilization": 0.5}, "--max-model-len 1600 or less, or .*--gpu-memory-utilization 0.52"),
        (0, 100, {"gpu_memory_utilization": 0.5}, "needs 256; use --gpu-memory-utilization 0.52"),
        (0, 1, {"gpu_memory_utilization": 0.9, "tensor_parallel_size": 2}, "--tensor-parallel-size 4"),
        (1, 100, {"kv_cache_memory_bytes": 4 << 20}, f"--kv-cache-memory-bytes {256 * (4 << 20)} or more"),
        (100, 0, {}, f"--kv-cache-memory-bytes {256 * (4 << 20)} or more"),
        (20, 100, {"num_gpu_blocks_override": 20}, "--num-gpu-blocks-override 256 or more"),
    ],
)
def test_the_flag_that_fits_is_named_with_its_value(
    num_blocks: int, total_gib: int, settings: dict[str, Any], advice: str
) -> None:
    """Whatever decided how much there is, is what has to change."""
    reports = [report(900), report(num_blocks, rank=1, total_gib=total_gib)]
    with pytest.raises((ConfigError, PlacementImpossible), match=advice) as caught:
        agree_on_num_blocks(reports, config(**settings))
    assert "rank 1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_host_tier_is_as_large_as_the_poorest_rank_s() -> None:
    """ "auto" takes no more than four times the device's blocks; a number is taken at its word."""
    reports = [report(300, num_host_blocks=5000), report(300, rank=1, num_host_blocks=900)]
    assert agree_on_num_host_blocks(reports, config(), 300) == 0
    assert agree_on_num_host_blocks(reports, config(swap_space=4), 300) == 900
    assert agree_on_num_host_blocks(reports[:1], config(swap_space=4), 300) == 5000
    assert agree_on_num_host_blocks(reports[:1], config(swap_space="auto"), 300) == 1200
    with pytest.raises(ConfigError, match=r"swap_space=0.001 GiB: .* rank 0 has 4.0 MiB; use --swap-space 4MiB"):
        agree_on_num_host_blocks([report(300)], config(swap_space=0.001), 300)


def test_the_slowest_rank_says_what_a_swap_costs() -> None:
    ready = [
        WorkerReady(global_rank=rank, epoch=0, swap_seconds=seconds)
        for rank, seconds in enumerate([(0.001, 0.004, 0.01), (0.003, 0.002, 0.02)])
    ]
    costs = swap_costs([report(300), report(300, rank=1)], ready, 900)
    assert (costs.num_host_blocks, costs.block_bytes) == (900, 8 << 20)
    assert (costs.out_seconds, costs.in_seconds, costs.token_seconds) == (0.003, 0.004, 0.02)
    assert swap_costs([report(300)], ready, 0) is NO_SWAP
