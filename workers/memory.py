"""Where this rank's bytes go, how many KV blocks fit, and which shapes to run before the first request."""

from dataclasses import dataclass

import psutil
import torch

from argosy.cluster.protocol.config import ServingConfig
from argosy.workers.model_runner import ModelRunner

CPU_CACHE_BYTES = 4 * 2**30  # all ranks of a machine together, unless kv_cache_memory_bytes says otherwise
CPU_CACHE_FRACTION = 0.3  # and never more than this part of what is available
CPU_PROMPT_TOKENS = 32  # a CPU has no compilation to warm up, only thread pools and allocators
CPU_ROWS = 8


@dataclass(slots=True)
class MemoryLedger:
    """Bytes of this rank by purpose. On a CPU `activations` is what the tensors of a full step come to."""

    weight_bytes: int = 0
    kv_bytes: int = 0
    activation_bytes: int = 0
    workspace_bytes: int = 0  # CUDA context, NCCL, cuBLAS: what the device uses beside our tensors
    free_bytes: int = 0  # what the cache could be made of

    def entries(self) -> dict[str, int]:
        """The same, by the names that the driver reports."""
        return {
            "weights": self.weight_bytes,
            "kv": self.kv_bytes,
            "activations": self.activation_bytes,
            "workspace": self.workspace_bytes,
            "free": self.free_bytes,
        }


def measure_num_blocks(runner: ModelRunner, ledger: MemoryLedger) -> int:
    """How many KV blocks this rank has room for. Fills in the ledger."""
    if runner.device.type == "cuda":
        _measure_cuda(runner, ledger)
    else:
        _measure_cpu(runner, ledger)
    cache = runner.config.cache
    if cache.num_gpu_blocks_override is not None:
        return cache.num_gpu_blocks_override
    budget = cache.kv_cache_memory_bytes if cache.kv_cache_memory_bytes is not None else ledger.free_bytes
    return max(0, min(budget // runner.block_bytes, most_blocks(runner.config, runner.max_model_len)))


def most_blocks(config: ServingConfig, max_model_len: int) -> int:
    """More blocks than this can't be used: every request at full length at once."""
    return config.scheduler.max_num_seqs * -(-max_model_len // config.cache.block_size)


def _measure_cpu(runner: ModelRunner, ledger: MemoryLedger) -> None:
    spec, config, rank = runner.spec, runner.config, runner.rank
    available = psutil.virtual_memory().available
    num_ranks = rank.tp_size * rank.pp_size
    ledger.free_bytes = int(min(CPU_CACHE_BYTES, available * CPU_CACHE_FRACTION)) // num_ranks
    width = 4 * spec.hidden_size + (2 * spec.intermediate_size + 3 * spec.num_heads * spec.head_size) // rank.tp_size
    ledger.activation_bytes = config.scheduler.max_num_batched_tokens * width * runner.dtype.itemsize
    if rank.is_last_stage:
        ledger.activation_bytes += config.scheduler.max_num_seqs * spec.vocab_size * 4


def _measure_cuda(runner: ModelRunner, ledger: MemoryLedger) -> None:
    device = runner.device
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    runner.allocate(1)
    runner.warm_up(_largest_shapes(runner))
    runner.kv_cache = None
    ledger.activation_bytes = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    ledger.workspace_bytes = max(0, total - free - reserved)
    limit = int(total * runner.config.cache.gpu_memory_utilization)
    ledger.free_bytes = max(0, limit - reserved - ledger.workspace_bytes - ledger.activation_bytes)


def _largest_shapes(runner: ModelRunner) -> list[tuple[int, int]]:
    """The steps that need most: a full token budget of prompts, and all rows sampling."""
    scheduler = runner.config.scheduler
    tokens = min(scheduler.max_num_batched_tokens, runner.max_model_len)
    rows = max(1, min(scheduler.max_num_batched_tokens // tokens, scheduler.max_num_seqs))
    return [(rows, tokens), (scheduler.max_num_seqs, 1)]


def warm_up_shapes(runner: ModelRunner) -> list[tuple[int, int]]:
    """(rows, tokens a row) of the steps to run before the first request; the same on every rank."""
    scheduler = runner.config.scheduler
    if runner.device.type == "cuda":
        sizes = [1 << power for power in range(scheduler.max_num_seqs.bit_length())]
        return [*_largest_shapes(runner), *((size, 1) for size in sizes)]
    tokens = min(CPU_PROMPT_TOKENS, scheduler.max_num_batched_tokens, runner.max_model_len)
    return [(1, tokens), (min(CPU_ROWS, scheduler.max_num_seqs), 1), (1, 1)]
