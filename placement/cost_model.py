"""Seconds of a step: a roofline for each stage, times what was measured of it, plus what no roofline tells.

stage      read weights (of experts, those that are chosen) | multiply     overlapping, then
           read keys and values | go through the longest context, a piece     overlapping, then
           attend prompts, sum over the group or exchange its tokens, overheads
step       its stages one after the other, and a hop between them
"""

from typing import Final

import msgspec

from argosy.cluster.protocol.model_spec import ModelSpec
from argosy.placement.calibration import Calibration
from argosy.placement.data_sheets import DataSheet
from argosy.placement.expert_traffic import exchange_numbers, least_tokens
from argosy.placement.rank_memory import StageBytes
from argosy.placement.step_memory import LONG_UNIT
from argosy.placement.topology import Link

_US: Final = 1e-6
HALVED_TOKENS: Final = 2048  # longer steps of a group are worth being halved (`workers/models/group_forward`)
EXCHANGE_CALLS: Final = 5  # collectives of a layer that exchanges its tokens: two for attention, sizes, there and back


class StepLoad(msgspec.Struct, frozen=True, gc=False):
    """What one step computes, in numbers: all that its seconds depend on."""

    num_decodes: int = 0  # rows of one token
    context_tokens: int = 0  # tokens that those rows look back on, all together
    prefill_tokens: int = 0
    prefill_pairs: int = 0  # (token, token before it) of the prompts: what attention multiplies
    num_sampled: int = 0  # rows that get a token
    longest_context: int = 0  # of a decode; 0: all are alike

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the layers."""
        return self.num_decodes + self.prefill_tokens


def chain_name(spec: ModelSpec, tp_size: int) -> str:
    """What tells apart layers that have a launch of their own for one token: `Calibration.chains`."""
    seen, inner = spec.num_heads * spec.head_size // tp_size, spec.intermediate_size // tp_size
    return f"{spec.hidden_size}x{seen}x{inner}x{tp_size}"


class StageCost:
    """One stage on one kind of device, worked out once so that a step costs a handful of multiplications."""

    def __init__(
        self,
        sizes: StageBytes,
        sheet: DataSheet,
        calibration: Calibration,
        *,
        tp_size: int,
        first_layer: int,
        last_layer: int,
        group_link: Link,
        offloaded_bytes: int = 0,
    ):
        shape, spec, serving = sizes.shape, sizes.shape.spec, sizes.serving
        self.calibration, self.spec = calibration, spec
        self.num_layers, self.tp_size = last_layer - first_layer, tp_size
        self.is_last, self.is_first = last_layer == shape.num_layers, first_layer == 0
        bandwidth = sheet.gbytes_per_second * 1e9
        is_fp8 = serving.weight_format.computes_in_fp8
        peak = (sheet.fp8_tflops * calibration.fp8_flops_ratio if is_fp8 else sheet.bf16_tflops) * 1e12
        if serving.dtype_bytes == 4 and sheet.name != "CPU":
            peak /= 8  # float32 runs beside the matrix units
        self._peak = peak
        experts, expert_share = 0.0, 1.0
        flops = skipped = 0.0
        for index in range(first_layer, last_layer):
            for matrix in shape.layer(index).matrices:
                used = matrix.num_weights * matrix.active / matrix.count
                flops += 2 * used / (tp_size if matrix.cut != "none" else 1)
                if index == shape.num_layers - 1 and not matrix.name.startswith(("q", "kv")):
                    skipped += 2 * used / (tp_size if matrix.cut != "none" else 1)
                if matrix.is_experts:
                    experts += matrix.num_weights
                    expert_share = matrix.active / matrix.count
        layer_bytes = sizes.layer_bytes(tp_size, first_layer, last_layer)
        all_weights = sum(shape.layer(index).num_weights for index in range(first_layer, last_layer))
        self._expert_bytes = layer_bytes * experts / max(all_weights, 1)
        self._dense_bytes = layer_bytes - self._expert_bytes
        self._expert_share = expert_share
        self._read_rate = bandwidth * calibration.weight_efficiency
        self._flops_per_token = flops
        self._skipped_flops = skipped  # of tokens that draw nothing, behind the last layer's keys and values
        self._kv_seconds = sizes.kv_bytes_per_token(tp_size, last_layer - first_layer) / (
            bandwidth * calibration.kv_efficiency
        )
        self._join_seconds = self.num_layers * calibration.join_us * _US
        self._context_seconds = self.num_layers * calibration.context_ns * 1e-9
        self._kv_heads = max(1, spec.num_kv_heads // tp_size)
        layers = range(first_layer, last_layer)
        self._window = spec.sliding_window or 0
        self._windowed_share = sum(spec.window_of(layer) is not None for layer in layers) / max(1, self.num_layers)
        heads = spec.num_heads / tp_size
        work = 2 * shape.latent_head_work if shape.latent_head_work else 4 * spec.head_size
        per_pair = heads * work * self.num_layers
        attention_peak = sheet.bf16_tflops * 1e12
        self._pair_seconds = per_pair / (attention_peak * calibration.attention_efficiency)
        head_weights = -(-spec.vocab_size // tp_size) * shape.table_width
        self._head_bytes = head_weights * serving.dtype_bytes if self.is_last else 0
        self._head_flops = 2 * head_weights if self.is_last else 0
        self._head_peak = sheet.bf16_tflops * 1e12
        self._sample_seconds = spec.vocab_size * 8 / bandwidth if self.is_last else 0.0  # float32, written and read
        self._hidden_bytes = spec.hidden_size * serving.dtype_bytes
        self._halved_bytes = HALVED_TOKENS * self._hidden_bytes
        self._group_link = group_link
        self._least_exchanged = None
        if spec.moe is not None:
            self._least_exchanged = least_tokens(spec.moe, tp_size, "cpu" if sheet.name == "CPU" else "cuda")
            self._exchanged = exchange_numbers(spec.moe, tp_size)
        self.overhead_seconds = (calibration.step_us if self.is_last else calibration.stage_us) * _US
        self._fixed_seconds = self.num_layers * calibration.layer_us * _US + self.overhead_seconds
        has_chain = sheet.name == calibration.device and chain_name(spec, tp_size) in calibration.chains
        self._rounding_seconds = self.num_layers * calibration.fp8_layer_us * _US * is_fp8
        self._rounds_from = calibration.few_rows + 1 if has_chain else 0
        is_plain = serving.weight_format.bits == 16
        self._has_rings = (
            is_plain and sheet.name == calibration.device and chain_name(spec, tp_size) in calibration.rings
        )
        self._ring_seconds = self.num_layers * calibration.ring_us * _US
        # one token: a group's ranks tell each other their parts within a launch, in 16 bits
        self._lone_share = calibration.chain_sums if has_chain and is_plain else 1.0
        self._row_seconds = calibration.row_us * _US * self.num_layers / shape.num_layers
        self._states_seconds = self.num_layers * calibration.state_passes * self._hidden_bytes / bandwidth
        kinds = serving.prompt_kinds(spec, tp_size, self.num_layers) if calibration.records_graphs else []
        self._recorded = sorted(kinds)
        self._eager_seconds = self.num_layers * calibration.eager_layer_us * _US + self.overhead_seconds
        host_rate = sheet.pcie_gbytes_per_second * 1e9 * calibration.host_link_efficiency
        self._offload_seconds = offloaded_bytes / host_rate

    def seconds(self, load: StepLoad) -> float:
        """Seconds that this stage takes for a step."""
        tokens, calibration = load.num_tokens, self.calibration
        if not tokens:
            return 0.0
        recorded = self._recorded_tokens(load)
        tokens = recorded or tokens
        touched = 1.0 - (1.0 - self._expert_share) ** tokens if self._expert_bytes else 0.0
        read = (self._dense_bytes + self._expert_bytes * touched) / self._read_rate
        silent = load.prefill_tokens - max(0, load.num_sampled - load.num_decodes)  # prompt tokens that draw nothing
        flops = self._flops_per_token * tokens - self._skipped_flops * silent
        multiply = flops / (self._peak * calibration.flops_share(tokens))
        by_rings = self._has_rings and 1 < tokens <= calibration.few_rows
        if by_rings:  # weights are asked for ahead of products, and of what these wait for
            multiply = 0.0
        layers = total = self._overlapped(read, multiply)
        if self.is_last and load.num_sampled:
            head_multiply = self._head_flops * load.num_sampled
            total += self._overlapped(
                self._head_bytes / self._read_rate,
                head_multiply / (self._head_peak * calibration.flops_share(load.num_sampled)),
            )
            total += load.num_sampled * self._sample_seconds
        if load.num_decodes:
            longest = max(load.longest_context, load.context_tokens // load.num_decodes)
            # in a step with prompts there is work enough beside the longest
            chain = 0.0 if load.prefill_tokens else self._chain_seconds(longest, load.num_decodes)
            reading = self._seen(load.context_tokens, load.num_decodes) * self._kv_seconds
            total += reading + chain
        if load.prefill_pairs:
            total += load.prefill_pairs * self._pair_seconds
        if self.tp_size > 1:
            total += self.is_first * self.reduce_seconds(tokens * self._hidden_bytes)
            a_layer = self.group_seconds(tokens) + calibration.group_layer_us * _US
            waits = self._lone_share if tokens == 1 else 1.0
            if self._has_rings and 1 < tokens <= calibration.ring_rows:
                waits = calibration.ring_sums
            total += self.num_layers * a_layer * waits
            total -= min(self.num_layers * self._hidden_seconds(tokens), layers)
        total += self._fixed_seconds + (load.num_decodes + load.num_sampled) * self._row_seconds
        total += tokens * self._states_seconds
        if tokens > calibration.few_rows:
            total += self.num_layers * calibration.apart_us * _US
        total -= by_rings * self._ring_seconds
        if tokens >= self._rounds_from:
            total += self._rounding_seconds
        if load.prefill_tokens and not recorded:
            total = max(total, self._eager_seconds)
        if not self._offload_seconds:
            return total
        # the last layer's weights come last: it, the head and the launch are behind all copies
        behind = total - layers + layers / self.num_layers
        return max(total, self._offload_seconds + behind)

    def _recorded_tokens(self, load: StepLoad) -> int:
        """Tokens that a recorded step with these prompts computes, padding included; 0: it is not recorded."""
        if not load.prefill_tokens:
            return 0
        fitting = (size for size, rows in self._recorded if size >= load.num_tokens and rows >= load.num_decodes)
        size = next(fitting, 0)
        return size if size - load.num_tokens < LONG_UNIT else 0

    def _chain_seconds(self, longest: int, num_rows: int) -> float:
        """The longest context, in windowed layers what they see of it."""
        whole = self._pieces_seconds(longest, num_rows)
        if not self._windowed_share or longest <= self._window:
            return whole
        return whole + self._windowed_share * (self._pieces_seconds(self._window, num_rows) - whole)

    def _pieces_seconds(self, longest: int, num_rows: int) -> float:
        """One token after the other, or in pieces side by side where rows leave room for that."""
        calibration, groups = self.calibration, num_rows * self._kv_heads
        programs = calibration.attention_programs
        room = programs // groups if groups < programs else programs * calibration.many_pieces // groups
        pieces = max(1, min(room, -(-longest // calibration.piece_tokens)))
        return longest / pieces * self._context_seconds + (pieces > 1) * self._join_seconds

    def reduce_seconds(self, num_bytes: float) -> float:
        """One sum over the group."""
        link, calibration, ranks = self._group_link, self.calibration, self.tp_size
        latency = link.latency_seconds * (calibration.reduce_latency + calibration.reduce_rank_latency * (ranks - 2))
        moved = 2 * (ranks - 1) / ranks * num_bytes
        return latency + moved / (link.bytes_per_second * calibration.reduce_efficiency)

    def group_seconds(self, num_tokens: int) -> float:
        """What a layer's ranks tell each other: two sums, or from some tokens on those of experts exchanged."""
        num_bytes = num_tokens * self._hidden_bytes
        if self._least_exchanged is None or num_tokens < self._least_exchanged:
            return 2 * self.reduce_seconds(num_bytes)
        link, calibration = self._group_link, self.calibration
        moved = self._exchanged * num_bytes / (link.bytes_per_second * calibration.reduce_efficiency)
        return EXCHANGE_CALLS * self.reduce_seconds(0) + moved

    def _hidden_seconds(self, num_tokens: int) -> float:
        """Of a layer's sums in a long step, what is copied while the other half of its tokens is multiplied."""
        if num_tokens <= HALVED_TOKENS or self._least_exchanged is not None:
            return 0.0
        beyond = 2 * (self.reduce_seconds(num_tokens * self._hidden_bytes) - self.reduce_seconds(self._halved_bytes))
        return self.calibration.hidden_sums * beyond

    def hop_seconds(self, num_tokens: int, link: Link) -> float:
        """Hidden states of a step to the next stage; each rank sends its copy at the same time."""
        return (
            link.latency_seconds
            + self.calibration.hop_us * _US
            + (
                num_tokens
                * self._hidden_bytes
                * (self.tp_size if link.kind == "network" else 1)
                / link.bytes_per_second
            )
        )

    def _overlapped(self, first: float, second: float) -> float:
        power = self.calibration.overlap
        low, high = (first, second) if first < second else (second, first)
        if high <= 0.0:
            return 0.0
        return float(high * (1.0 + (low / high) ** power) ** (1.0 / power))

    def _seen(self, context_tokens: int, num_rows: int) -> float:
        if not self._windowed_share:
            return context_tokens
        inside = min(context_tokens, self._window * num_rows)
        return context_tokens * (1 - self._windowed_share) + inside * self._windowed_share


class ReplicaCost:
    """All stages of a replica, and the hops between them."""

    def __init__(self, stages: list[StageCost], hops: list[Link]):
        assert len(hops) == len(stages) - 1
        self.stages, self.hops = stages, hops

    def stage_seconds(self, load: StepLoad) -> list[float]:
        """Seconds of a step on each stage, the hop to the next one included."""
        found = [stage.seconds(load) for stage in self.stages]
        for place, link in enumerate(self.hops):
            found[place] += self.stages[place].hop_seconds(load.num_tokens, link)
        return found

    def step_seconds(self, load: StepLoad) -> float:
        """Seconds of a step from its start to its tokens, with nothing else under way."""
        return sum(self.stage_seconds(load))
