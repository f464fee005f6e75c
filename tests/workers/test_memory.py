"""How many blocks a rank says it has room for, and that the ledger adds up."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from rig import InProcessRank, oracle_config

from argosy.cluster.protocol.config import ServingConfig
from argosy.workers import memory
from argosy.workers.memory import MemoryLedger, measure_num_blocks, warm_up_shapes

BLOCK_BYTES = 2 * 4 * 4 * 4 * 2 * 4  # k and v, layers, slots, heads, size, float32


def measure(config: ServingConfig) -> tuple[int, MemoryLedger]:
    """What a rank with this config reports."""
    ledger = MemoryLedger()
    return measure_num_blocks(InProcessRank(config, 4).runner, ledger), ledger


def test_the_override_wins_over_everything(tmp_path: Path) -> None:
    """Somebody who names the number gets the number."""
    config = oracle_config(tmp_path, num_gpu_blocks_override=77, kv_cache_memory_bytes=10**9)
    assert measure(config)[0] == 77


def test_bytes_given_for_the_cache_become_blocks(tmp_path: Path) -> None:
    """kv_cache_memory_bytes is for each rank, and is not exceeded."""
    config = oracle_config(tmp_path, num_gpu_blocks_override=None, kv_cache_memory_bytes=10 * BLOCK_BYTES + 5)
    assert measure(config)[0] == 10


def test_no_more_blocks_than_could_ever_be_used(tmp_path: Path) -> None:
    """Eight requests of 2048 tokens fill 4096 blocks of 4; a CPU with much memory takes no more."""
    config = oracle_config(tmp_path, num_gpu_blocks_override=None)
    num_blocks, ledger = measure(config)
    assert num_blocks == 8 * 2048 // 4
    assert ledger.free_bytes >= num_blocks * BLOCK_BYTES


def test_a_small_machine_gives_a_part_of_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop with 64 KiB to spare: three tenths of it for the cache, and the ledger says so."""

    class Little:
        available = 64 * 1024

    monkeypatch.setattr(memory.psutil, "virtual_memory", Little)
    num_blocks, ledger = measure(oracle_config(tmp_path, num_gpu_blocks_override=None))
    assert ledger.free_bytes == int(64 * 1024 * memory.CPU_CACHE_FRACTION)
    assert num_blocks == ledger.free_bytes // BLOCK_BYTES
    assert ledger.entries()["free"] == ledger.free_bytes
    assert set(ledger.entries()) == {"weights", "kv", "activations", "workspace", "free"}


def test_warming_up_fits_the_settings_and_leaves_no_trace(tmp_path: Path) -> None:
    """One row, one token, a tiny budget: no shape may exceed them, and block 0 is as empty as before."""
    config = oracle_config(tmp_path, max_num_seqs=2, max_num_batched_tokens=3)
    rank = InProcessRank(config, 4)
    shapes = warm_up_shapes(rank.runner)
    assert all(rows <= 2 and rows * tokens <= 3 for rows, tokens in shapes)
    rank.runner.warm_up(shapes)
    assert rank.runner.kv_cache is not None
    assert all(not cache.any() for layer in rank.runner.kv_cache.layers for cache in layer)
    assert not rank.runner.batch.active
    assert rank.runner.sampler.is_greedy
