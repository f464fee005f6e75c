"""Bytes of one rank: weights to the byte, KV blocks as a rank counts them, and what a step needs besides.

The rules are those of `workers/memory.py`: tests hold this file to what real ranks allocate. Sizes are of the first
rank of a tensor-parallel group, which has the most (it adds the biases of row-parallel layers).
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Final

import msgspec

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.kv_groups import ONE_TABLE, KVGroups, kv_groups
from argosy.cluster.protocol.model_spec import DTYPE_BYTES, KV_SCALE_BYTES, ModelSpec
from argosy.cluster.protocol.quant_spec import OTHER_NAMES
from argosy.placement.calibration import Calibration
from argosy.placement.matrix_bytes import matrix_bytes
from argosy.placement.model_shape import ModelShape
from argosy.placement.step_memory import (
    attention_bytes,
    decode_bytes,
    even_ladder,
    graph_bytes,
    group_bytes,
    ladder,
    prompt_graph_bytes,
    recorded_kinds,
    wire_bytes,
)
from argosy.placement.swap_space import staging_bytes, swap_setting
from argosy.placement.topology import Gpu
from argosy.placement.weight_format import FORMATS, WeightFormat
from argosy.placement.weight_offload import buffer_bytes, count_for, count_to_gain, offloaded_bytes

CPU_CACHE_BYTES: Final = 4 * 2**30  # as in workers/memory.py, and held to it by a test
CPU_CACHE_FRACTION: Final = 0.3
MIN_BLOCKS: Final = 1
MIN_SLACK: Final = 2**28  # as in workers/memory.py
SLICE_BUFFERS: Final = 3  # of hidden states of long steps
# What a GPU's allocator may take beyond the tensors. It comes out of the share that `gpu_memory_utilization` leaves;
# who names the cache's bytes has no such share.
ROUNDED_WEIGHTS: Final = 0.03
ROUNDED_TENSOR: Final = 2 * 2**20
OPEN_SEGMENTS: Final = 44 * 2**20  # begun for tensors of less than 10 MiB, and not full


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """The settings that decide how many bytes a model takes."""

    dtype_bytes: int
    kv_dtype_bytes: int
    kv_scale_bytes: int = 0  # for each token and key/value head of a cache
    weight_format: WeightFormat
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int = 4096
    gpu_memory_utilization: float = 0.92
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None
    slice_tokens: int | None = None  # of longer steps, that are computed at once; None: all are
    offload_bytes: int | None = 0  # of a rank's weights, in whole layers; None: as few as are needed to fit
    swap_bytes: int | None = 0  # of the host's memory for blocks of a rank; None: what suits
    groups: KVGroups = ONE_TABLE  # of layers that share a block table
    graph_rows: int | None = None  # of the largest recorded decode step; None: `max_num_seqs`, 0: none are
    stage_bytes: tuple[int, ...] = ()  # that each rank of a stage may use, 0: what there is; empty: no bounds

    @classmethod
    def from_config(
        cls, config: ServingConfig, shape: ModelShape, weight_format: WeightFormat | None = None
    ) -> "Serving":
        """What `config` says, with "auto" worked out for the model.

        `weight_format` None is the checkpoint's own, or what the setting `quantization` makes of plain weights.
        """
        if weight_format is None and shape.weight_format.bits == 16:
            wanted = config.model.quantization or "none"
            weight_format = FORMATS.get(OTHER_NAMES.get(wanted, wanted))
        max_model_len = config.model.max_model_len or shape.spec.max_position
        dtype = shape.spec.dtype if config.model.dtype == "auto" else config.model.dtype
        kv_dtype = dtype if config.cache.kv_cache_dtype == "auto" else config.cache.kv_cache_dtype
        return cls(
            dtype_bytes=DTYPE_BYTES[dtype],
            kv_dtype_bytes=DTYPE_BYTES[kv_dtype],
            kv_scale_bytes=KV_SCALE_BYTES.get(kv_dtype, 0),
            weight_format=weight_format or shape.weight_format,
            block_size=config.cache.block_size,
            max_num_seqs=config.scheduler.max_num_seqs,
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
            max_model_len=max_model_len,
            groups=kv_groups(shape.spec, max_model_len),
            stage_bytes=config.stage_memory_bytes,
            graph_rows=graph_setting(config),
            gpu_memory_utilization=config.cache.gpu_memory_utilization,
            kv_cache_memory_bytes=config.cache.kv_cache_memory_bytes,
            num_gpu_blocks_override=config.cache.num_gpu_blocks_override,
            slice_tokens=slice_setting(config),
            offload_bytes=offload_setting(config),
            swap_bytes=swap_setting(config),
        )

    @property
    def most_blocks(self) -> int:
        """More can't be used: every request at full length at once."""
        return self.groups.most_blocks(
            self.max_num_seqs, self.max_model_len, self.block_size, self.max_num_batched_tokens
        )

    @property
    def most_tokens(self) -> int:
        """That go through the model at once."""
        return max(self.slice_tokens or self.max_num_batched_tokens, self.max_num_seqs)

    @property
    def recorded_rows(self) -> int:
        """Rows of the largest recorded decode step; 0: none is."""
        return self.max_num_seqs if self.graph_rows is None else self.graph_rows

    def prompt_kinds(self, spec: ModelSpec, tp_size: int, num_layers: int) -> list[tuple[int, int]]:
        """`step_memory.recorded_kinds` of a rank of so many layers, where steps are recorded at all."""
        return recorded_kinds(
            spec, num_layers, self.recorded_rows, tp_size=tp_size, max_tokens=self.max_num_batched_tokens,
            slice_tokens=self.slice_tokens, dtype_bytes=self.dtype_bytes, kv_dtype_bytes=self.kv_dtype_bytes,
        )  # fmt: skip

    def blocks_of(self, num_tokens: int) -> int:
        """The most blocks that a request of so many tokens holds while it decodes."""
        return self.groups.num_blocks(num_tokens, self.block_size)


def cpu_activation_bytes(spec: ModelSpec, num_tokens: int, tp_size: int, dtype_bytes: int) -> int:
    """What the tensors of a step of so many tokens come to on a CPU, logits aside."""
    width = 4 * spec.hidden_size + (2 * spec.intermediate_size + 3 * spec.num_heads * spec.head_size) // tp_size
    return num_tokens * width * dtype_bytes


def offload_setting(config: ServingConfig) -> int | None:
    """The bytes that `cpu_offload_gb` asks for; None for "auto"."""
    asked = config.offload.cpu_offload_gb
    return None if isinstance(asked, str) else int(asked * 2**30)


def graph_setting(config: ServingConfig) -> int:
    """Rows of the largest decode step that is recorded on a GPU; 0: none is."""
    parallel = config.parallel
    return 0 if parallel.enforce_eager else min(config.scheduler.max_num_seqs, parallel.max_cuda_graph_batch)


def slice_setting(config: ServingConfig) -> int | None:
    """Tokens of a slice where there may be longer steps whose hidden states go to the host; else None."""
    size = config.offload.activation_slice_tokens
    is_asked = config.offload.activation_offload_gb != 0 and config.scheduler.max_num_batched_tokens > size
    return size if is_asked else None


def cap_of(caps: Sequence[int], stage: int) -> int | None:
    """What a rank of the stage may use; None: what there is."""
    return caps[stage] or None if caps else None


class RankMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Where the bytes of one rank go."""

    weight_bytes: int  # on the device
    offloaded_bytes: int  # of the weights, in the host's memory
    buffer_bytes: int  # on the device, for those that come from there
    activation_bytes: int
    workspace_bytes: int  # context, communication, libraries
    limit_bytes: int  # what may be used in all, beside what others have taken
    kv_budget_bytes: int  # what is left for blocks; negative: so much is missing
    block_bytes: int
    num_blocks: int

    @property
    def kv_bytes(self) -> int:
        """Bytes of the blocks that are allocated."""
        return self.num_blocks * self.block_bytes

    @property
    def other_bytes(self) -> int:
        """What is neither weights nor blocks."""
        return self.activation_bytes + self.workspace_bytes + self.buffer_bytes

    @property
    def missing_bytes(self) -> int:
        """What is missing for a single block; 0 when it fits."""
        return max(0, self.block_bytes * MIN_BLOCKS - self.kv_budget_bytes)


class StageBytes:
    """Weights of stages, each layer counted once and remembered: a planner asks thousands of times."""

    def __init__(self, shape: ModelShape, serving: Serving, *, on_cpu: bool = False):
        self.shape, self.serving, self._on_cpu = shape, serving, on_cpu
        self._twin: StageBytes | None = None
        self._prefix: dict[int, list[int]] = {}  # tp -> bytes of the layers before each
        self._block_bytes: dict[tuple[int, int], int] = {}  # (tp, layers with a place in a block) -> bytes of one
        windowed = (shape.spec.window_of(layer) is not None for layer in range(shape.num_layers))
        self._windowed_before = [0, *accumulate(windowed)]

    def on(self, gpu: Gpu) -> "StageBytes":
        """The same on this device: a CPU makes what is packed plain."""
        if gpu.model != "CPU" or self._on_cpu:
            return self
        if self._twin is None:
            self._twin = StageBytes(self.shape, self.serving, on_cpu=True)
        return self._twin

    def layer_bytes(self, tp_size: int, first_layer: int, last_layer: int) -> int:
        """Weights of the layers [first_layer, last_layer) on the first rank of a group."""
        prefix = self._prefix.get(tp_size)
        if prefix is None:
            of_kind = [
                sum(
                    matrix_bytes(
                        self.shape,
                        matrix,
                        self.serving.weight_format,
                        self.serving.dtype_bytes,
                        tp_size,
                        on_cpu=self._on_cpu,
                    )
                    for matrix in kind.matrices
                )
                + kind.norm_size * self.serving.dtype_bytes
                for kind in self.shape.kinds
            ]
            prefix = [0]
            for kind_index in self.shape.layer_kinds:
                prefix.append(prefix[-1] + of_kind[kind_index])
            self._prefix[tp_size] = prefix
        return prefix[last_layer] - prefix[first_layer]

    def end_bytes(self, tp_size: int, *, is_first: bool, is_last: bool) -> int:
        """Embedding and head of the stage that has them; a tied head is the embedding where both are."""
        shape, spec, size = self.shape, self.shape.spec, self.serving.dtype_bytes
        rows = -(-spec.vocab_size // tp_size)
        projection = spec.embedding_size * spec.hidden_size
        numbers = 0
        if is_first:
            numbers += rows * shape.table_width + spec.position_rows * spec.hidden_size + shape.first_norm_size
            numbers += projection
        if is_last:
            numbers += shape.final_norm_size + rows * spec.head_bias + projection
            numbers += 0 if spec.tied and is_first else rows * shape.table_width
        return numbers * size

    def stage_bytes(self, tp_size: int, first_layer: int, last_layer: int) -> int:
        """All weights of the stage that has the layers [first_layer, last_layer)."""
        is_first, is_last = first_layer == 0, last_layer == self.shape.num_layers
        ends = self.end_bytes(tp_size, is_first=is_first, is_last=is_last)
        return self.layer_bytes(tp_size, first_layer, last_layer) + ends

    def block_bytes(self, tp_size: int, first_layer: int, last_layer: int) -> int:
        """Bytes of one KV block on one rank of the stage."""
        num_places = last_layer - first_layer
        if self.serving.groups.num_groups > 1:
            num_windowed = self._windowed_before[last_layer] - self._windowed_before[first_layer]
            num_places = self.serving.groups.num_places(num_places - num_windowed, num_windowed)
        size = self._block_bytes.get((tp_size, num_places))
        if size is None:
            size = self._block_bytes[tp_size, num_places] = (
                self.kv_bytes_per_token(tp_size, num_places) * self.serving.block_size
            )
        return size

    def kv_bytes_per_token(self, tp_size: int, num_layers: int) -> int:
        """Bytes of one token on one rank that has `num_layers` layers, scales included."""
        serving = self.serving
        return self.shape.kv_bytes_per_token(
            serving.kv_dtype_bytes, tp_size, num_layers, scale_bytes=serving.kv_scale_bytes
        )

    def activation_bytes(self, calibration: Calibration, tp_size: int, first_layer: int, last_layer: int) -> int:
        """What steps hold beside weights and blocks: the larger of a step full of prompts and one of all rows that
        sample, and the recorded graphs beside it.
        """
        shape, spec, serving = self.shape, self.shape.spec, self.serving
        tokens = min(serving.max_num_batched_tokens, serving.max_model_len * serving.max_num_seqs)
        buffers = 0
        if serving.slice_tokens is not None:
            tokens = min(tokens, max(serving.slice_tokens, serving.max_num_seqs))
            buffers = SLICE_BUFFERS * serving.slice_tokens * spec.hidden_size * serving.dtype_bytes
        copies = calibration.fp8_inner_copies if serving.weight_format.computes_in_fp8 else calibration.inner_copies
        heads = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_size
        inner = (copies * shape.inner_size + heads) / tp_size
        each = (calibration.hidden_copies * spec.hidden_size + inner) * serving.dtype_bytes
        prompts = tokens * each
        if serving.kv_dtype_bytes == 1 and serving.dtype_bytes == 2:
            attending = attention_bytes(spec, tokens, tp_size=tp_size, dtype_bytes=2)
            prompts = max(prompts, attending + calibration.unpacked_bytes)
        is_last = last_layer == shape.num_layers
        logit = calibration.logit_bytes if tp_size == 1 else calibration.gathered_logit_bytes
        rows = serving.max_num_seqs * spec.vocab_size * logit if is_last else 0.0
        graphs, graph_rows = 0, serving.recorded_rows
        if calibration.records_graphs and graph_rows:
            pool = decode_bytes(
                spec, graph_rows, tp_size=tp_size, is_last=is_last, dtype_bytes=serving.dtype_bytes
            )  # fmt: skip
            pool = min(pool, int(max(rows, serving.max_num_seqs * each)))  # as ranks take the less of both
            num_sizes = len(ladder(graph_rows)) + len(even_ladder(graph_rows, spec, tp_size))
            graphs = graph_bytes(num_sizes, last_layer - first_layer, pool)
            kinds = serving.prompt_kinds(spec, tp_size, last_layer - first_layer)
            graphs += prompt_graph_bytes(
                spec, kinds, last_layer - first_layer, tp_size=tp_size, dtype_bytes=serving.dtype_bytes
            )  # fmt: skip
            graphs += serving.groups.more_table_bytes(serving.max_num_seqs, serving.max_model_len, serving.block_size)
        return int(max(prompts, rows) + buffers + graphs)

    def communication_bytes(self, calibration: Calibration, tp_size: int, pp_size: int) -> int:
        """What a rank of several takes of its card for the others: communicators, and memory that they can address."""
        serving, width = self.serving, self.shape.spec.hidden_size
        if tp_size * pp_size == 1:
            return 0
        tokens, rows, size = serving.most_tokens, serving.max_num_seqs, serving.dtype_bytes
        found = calibration.group_bytes
        if tp_size > 1 and pp_size > 1:  # a communicator of all ranks, and one of a stage's
            found += calibration.second_group_bytes
        found += group_bytes(tokens, width, rows, tp_size=tp_size, dtype_bytes=size)
        return found + wire_bytes(tokens, width, rows, pp_size=pp_size, dtype_bytes=size)


def rank_memory(
    sizes: StageBytes,
    calibration: Calibration,
    gpu: Gpu,
    *,
    tp_size: int,
    pp_size: int,
    first_layer: int,
    last_layer: int,
    cap_bytes: int | None = None,
) -> RankMemory:
    """The ledger of a rank on `gpu`, of which it may use `cap_bytes` in all (None: what there is)."""
    sizes, serving = sizes.on(gpu), sizes.serving
    weights = sizes.stage_bytes(tp_size, first_layer, last_layer)
    block = sizes.block_bytes(tp_size, first_layer, last_layer)
    activations = sizes.activation_bytes(calibration, tp_size, first_layer, last_layer)
    taken = gpu.memory_bytes - gpu.usable_bytes
    offloaded = buffers = 0
    if gpu.model == "CPU":
        workspace, limit, taken = 0, gpu.usable_bytes, 0
        share = int(min(CPU_CACHE_BYTES, limit * CPU_CACHE_FRACTION)) // (tp_size * pp_size)
        if cap_bytes is None:
            budget = min(share, limit - weights - activations)
        else:
            limit = min(limit, cap_bytes)
            spec = sizes.shape.spec
            activations = cpu_activation_bytes(spec, serving.most_tokens, tp_size, serving.dtype_bytes)
            if last_layer == sizes.shape.num_layers:
                activations += serving.max_num_seqs * spec.vocab_size * 4
            budget = max(0, limit - weights - activations)
    else:
        workspace = calibration.workspace_bytes + sizes.communication_bytes(calibration, tp_size, pp_size)
        workspace += staging_bytes(block) if serving.swap_bytes != 0 else 0
        limit = min(int(gpu.memory_bytes * serving.gpu_memory_utilization), gpu.memory_bytes - MIN_SLACK)
        limit = limit if cap_bytes is None else min(limit, cap_bytes)
        budget = limit - taken - workspace - weights - activations
        if serving.offload_bytes != 0:
            layers = [sizes.layer_bytes(tp_size, layer, layer + 1) for layer in range(first_layer, last_layer)]
            count = num_offloaded(serving, layers, block, budget)
            offloaded, buffers = offloaded_bytes(layers, count), buffer_bytes(layers, count)
            weights, budget = weights - offloaded, budget + offloaded - buffers
    asked = serving.kv_cache_memory_bytes
    if serving.num_gpu_blocks_override is not None:
        asked = serving.num_gpu_blocks_override * block
    if asked is not None:  # taken at its word, as ranks do; what can't be allocated does not fit
        room = gpu.usable_bytes - workspace - weights - buffers - activations
        if gpu.model != "CPU":
            room -= int(ROUNDED_WEIGHTS * weights) + 2 * (last_layer - first_layer) * ROUNDED_TENSOR + OPEN_SEGMENTS
        budget = asked if asked <= room else room - asked
    blocks = max(0, min(budget // block, serving.most_blocks))
    if serving.num_gpu_blocks_override is not None and budget >= 0:
        blocks = serving.num_gpu_blocks_override
    return RankMemory(
        weight_bytes=weights,
        offloaded_bytes=offloaded,
        buffer_bytes=buffers,
        activation_bytes=activations,
        workspace_bytes=workspace,
        limit_bytes=max(0, limit - taken),
        kv_budget_bytes=budget,
        block_bytes=block,
        num_blocks=blocks,
    )


def num_offloaded(serving: Serving, layer_bytes: list[int], block_bytes: int, budget: int) -> int:
    """How many of these layers have their weights in the host's memory. `budget`: bytes for blocks if none had."""
    if serving.offload_bytes is not None:
        return count_for(layer_bytes, serving.offload_bytes)
    wanted = max(MIN_BLOCKS, serving.blocks_of(serving.max_model_len)) * block_bytes
    if serving.num_gpu_blocks_override is not None:
        wanted = serving.num_gpu_blocks_override * block_bytes
    elif serving.kv_cache_memory_bytes is not None:
        wanted = serving.kv_cache_memory_bytes
    return count_to_gain(layer_bytes, wanted - budget)
