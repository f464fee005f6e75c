"""Blocks that leave a rank's device memory and come back, and how much host memory a setting means."""

from collections.abc import Sequence

import pytest
import torch

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import ConfigError, PlacementImpossible
from argosy.cluster.protocol.messages import BlockSwaps
from argosy.workers import host_pool
from argosy.workers.host_pool import HostPool, choose_num_host_blocks, make_host_pool

HAS_GPU = torch.cuda.is_available()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not HAS_GPU, reason="needs a GPU"))]


def make_pool(device: str, num_host_blocks: int = 9, num_blocks: int = 8) -> tuple[list[torch.Tensor], HostPool]:
    """Two layers that share their memory, one of another type, one without values; every block with its own numbers."""
    torch.manual_seed(1)
    keys, small = torch.randn(num_blocks, 4, 2, 8), torch.randint(0, 99, (num_blocks, 32), dtype=torch.uint8)
    tensors = [keys.to(device), small.to(device)]
    return tensors, make_host_pool([tensors[0], tensors[0], tensors[1], torch.empty(num_blocks, 0, device=device)],
                                   num_host_blocks)  # fmt: skip


def blocks(tensors: Sequence[torch.Tensor], block_id: int) -> list[torch.Tensor]:
    """What a block holds."""
    return [tensor[block_id].clone().cpu() for tensor in tensors]


@pytest.mark.parametrize("device", DEVICES)
def test_what_was_swapped_out_comes_back_elsewhere(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request leaves, others write to its blocks, and it comes back to other blocks, in several copies."""
    monkeypatch.setattr(host_pool, "OUT_BUFFER_BYTES", 600)
    monkeypatch.setattr(host_pool, "IN_BUFFER_BYTES", 600)
    tensors, pool = make_pool(device)
    assert pool.block_bytes == 4 * 2 * 8 * 4 + 32
    before = [blocks(tensors, block_id) for block_id in (1, 6, 3)]
    pool.begin(4, BlockSwaps(out=[(1, 8), (6, 0), (3, 5)]))
    for tensor in tensors:
        tensor.zero_()  # by the step itself
    pool.begin(5, BlockSwaps(into=[(8, 2), (0, 7), (5, 0)]))
    pool.begin(7, BlockSwaps(await_step_id=5))
    for block_id, want in zip((2, 7, 0), before, strict=True):
        assert all(torch.equal(got, old) for got, old in zip(blocks(tensors, block_id), want, strict=True))
    assert all(tensor[[1, 3, 4, 5, 6]].count_nonzero() == 0 for tensor in tensors)
    pool.finish()
    done, (out_seconds, in_seconds) = pool.report()
    assert done == 5
    assert out_seconds > 0.0
    assert in_seconds > 0.0
    assert pool.report() == (5, (0.0, 0.0))


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_that_orders_blocks_in_may_wait_for_them_itself(device: str) -> None:
    """Nobody else runs: out and in again in one step, of the very same blocks."""
    tensors, pool = make_pool(device)
    before = blocks(tensors, 4)
    pool.begin(9, BlockSwaps(out=[(4, 1)], into=[(1, 2)], await_step_id=9))
    assert all(torch.equal(got, old) for got, old in zip(blocks(tensors, 2), before, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_measuring_leaves_blocks_as_they_are(device: str) -> None:
    tensors, pool = make_pool(device)
    before = [tensor.clone() for tensor in tensors]
    assert min(pool.measure()) > 0.0
    assert all(torch.equal(got, old) for got, old in zip(tensors, before, strict=True))
    assert pool.report() == (-1, (0.0, 0.0))


def config(swap_space: object) -> ServingConfig:
    return ServingConfig.from_mapping({"model": "m", "swap_space": swap_space})


def test_swap_space_is_gib_of_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number, an amount with its unit, or auto: half of what is free, shared by the ranks of the host."""
    monkeypatch.setattr(host_pool, "free_host_bytes", lambda: 40 * 2**30)
    monkeypatch.setattr("argosy.workers.host_memory.free_host_bytes", lambda: 40 * 2**30)
    block = 2 * 2**20
    for given, gib in ((16, 16), ("16", 16), ("16GiB", 16), ("16384 MiB", 16), ("1.5", 1.5), ("2G", 2)):
        assert choose_num_host_blocks(config(given), block, 1) == gib * 512, given
    assert choose_num_host_blocks(config("16GB"), block, 1) == 16 * 10**9 // block
    assert choose_num_host_blocks(config("auto"), block, 4) == 5 * 512
    with pytest.raises(PlacementImpossible, match=r"swap_space=16 needs 16.0 GiB .* for each of 4 ranks; 40.0 GiB"):
        choose_num_host_blocks(config(16), block, 4)
    for wrong in ("16 bananas", "-3", "", "lots"):
        with pytest.raises(ConfigError, match="swap_space="):
            config(wrong)
    with pytest.raises(ConfigError, match="swap_space=-1"):
        config(-1)
