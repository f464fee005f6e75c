"""One layout of one replica: its split of the layers, its ledger, and what it is expected to do.

A layout is tensor-parallel ranks x pipeline stages on given devices. `LayoutJudge.judge` finds the best split and says
what comes of it; what does not fit says where and how many bytes are missing.
"""

import math
from collections.abc import Sequence
from typing import Final

import msgspec

from argosy.placement.calibration import Calibration, default_calibration
from argosy.placement.cost_model import ReplicaCost, StageCost, StepLoad
from argosy.placement.device_groups import DeviceGroup
from argosy.placement.partition import split_layers
from argosy.placement.rank_memory import RankMemory, StageBytes, cap_of, rank_memory
from argosy.placement.topology import Link

_NEVER: Final = float("-inf")
MOST_SHARE: Final = 0.97  # of a device that advice asks for
MIXED_ROWS: Final = 8  # of a decode step of one stage, when layers are split: a server that is not full


class Traffic(msgspec.Struct, frozen=True, kw_only=True):
    """What requests look like, for predictions: so many tokens in and out, and how many at once at most."""

    input_len: int = 512
    output_len: int = 256
    concurrency: int | None = None  # None: as many as there is room for

    @property
    def held_tokens(self) -> int:
        """Tokens that a request holds in the cache, on average over its life."""
        return self.input_len + self.output_len // 2


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """One pipeline stage of a layout."""

    group: DeviceGroup
    first_layer: int
    last_layer: int
    memory: RankMemory
    step_seconds: float  # of a decode step at the predicted concurrency


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """A judged layout. `problem` says why it can't be; then the predictions are zero."""

    tp_size: int
    pp_size: int
    stages: tuple[Stage, ...] = ()
    problem: str = ""
    missing_bytes: int = 0  # on the worst stage; 0: it fits, or bytes are not what it lacks
    num_blocks: int = 0
    capacity_tokens: int = 0  # of requests of average length
    concurrency: int = 0  # requests that run at once
    tokens_per_second: float = 0.0  # output tokens, in the long run
    ttft_seconds: float = 0.0  # of a lone request
    tpot_seconds: float = 0.0  # between tokens under load
    lone_tpot_seconds: float = 0.0  # between tokens of a lone request

    @property
    def fits(self) -> bool:
        """Whether it can be started."""
        return not self.problem

    @property
    def layer_counts(self) -> tuple[int, ...]:
        """Layers of each stage."""
        return tuple(stage.last_layer - stage.first_layer for stage in self.stages)


class LayoutJudge:
    """Judges layouts of one model under one set of settings; remembers what it has worked out."""

    def __init__(
        self,
        sizes: StageBytes,
        traffic: Traffic,
        *,
        calibration: Calibration | None = None,
    ):
        self.sizes, self.traffic = sizes, traffic
        self._calibration = calibration
        self._layer_seconds: dict[tuple[object, ...], tuple[list[float], float]] = {}

    def calibration_of(self, group: DeviceGroup) -> Calibration:
        """The one that was given, or the device's own."""
        return self._calibration or default_calibration(group.sheet.name)

    def judge(self, replica: Sequence[DeviceGroup], tp_size: int, hops: Sequence[Link]) -> Layout:
        """The best split of the layers over these devices, and what comes of it."""
        pp_size, shape = len(replica), self.sizes.shape
        problem = shape.why_not_tp(tp_size)
        if problem is None and pp_size > shape.num_layers:
            problem = f"{pp_size} stages are more than the {shape.num_layers} layers"
        if problem is None and (caps := len(self.sizes.serving.stage_bytes)) and caps != pp_size:
            problem = f"stage_memory_gb names {caps} stages"
        if problem is not None:
            return Layout(tp_size=tp_size, pp_size=pp_size, problem=problem)
        return self.judge_split(replica, tp_size, hops, self.split(replica, tp_size))

    def judge_split(
        self, replica: Sequence[DeviceGroup], tp_size: int, hops: Sequence[Link], counts: Sequence[int]
    ) -> Layout:
        """The same for a split that is given."""
        memories = self._memories(replica, tp_size, counts)
        if min(memory.num_blocks for memory in memories) < self._needed_blocks(1):
            return self._does_not_fit(replica, tp_size, counts)
        return self._predict(replica, tp_size, counts, hops)

    # --------------------------------------------------------------------------------------------------- the split

    def split(self, replica: Sequence[DeviceGroup], tp_size: int) -> tuple[int, ...]:
        """Layers of each stage: room for the traffic first, then the least time on the slowest stage."""
        num_layers = self.sizes.shape.num_layers
        kinds = [(group.kind, self._cap(stage)) for stage, group in enumerate(replica)]
        rooms = {
            kind: self._room(group, tp_size, len(replica), kind[1]) for kind, group in zip(kinds, replica, strict=True)
        }
        room = [rooms[kind] for kind in kinds]
        known: dict[object, dict[tuple[int, int], float]] = {kind: {} for kind in rooms}
        known_to = [known[kind] for kind in kinds]  # alike stages are asked the same, and twice

        before = [self.sizes.layer_bytes(tp_size, 0, layer) for layer in range(num_layers + 1)]

        def blocks(stage: int, first: int, last: int) -> float:
            value = known_to[stage].get((first, last))
            if value is None:
                value = known_to[stage][first, last] = blocks_of(stage, first, last)
            return value

        def blocks_of(stage: int, first: int, last: int) -> float:
            base, first_bytes, last_bytes = room[stage]
            budget = base - before[last] + before[first]
            if first == 0:
                budget -= first_bytes
            if last == num_layers:
                budget -= last_bytes
            # what is missing counts in bytes: a share of it a layer would shrink with more layers
            return budget / self.sizes.block_bytes(tp_size, first, last) if budget >= 0 else budget

        best = split_layers(num_layers, len(replica), blocks)
        assert best is not None  # worths are finite
        most, roomy = best
        needed = min(most, float(self._needed_blocks(self._wanted_concurrency())))
        if most < self._needed_blocks(1) or len(replica) == 1:
            return roomy
        seconds = [self._seconds_of_layers(group, tp_size, len(replica)) for group in replica]

        def speed(stage: int, first: int, last: int) -> float:
            if blocks(stage, first, last) < needed:
                return _NEVER
            spent, head = seconds[stage]
            return spent[first] - spent[last] - head * (last == num_layers)

        fastest = split_layers(num_layers, len(replica), speed)
        assert fastest is not None  # `roomy` is one
        return fastest[1]

    def _room(
        self, group: DeviceGroup, tp_size: int, pp_size: int, cap_bytes: int | None
    ) -> tuple[float, float, float]:
        """(bytes for layers and blocks, what the embedding takes of it, what the head takes of it)."""
        shape, serving = self.sizes.shape, self.sizes.serving
        # bytes or blocks that the user names for the cache are the same on every stage: splits are by what is there
        unasked = {"kv_cache_memory_bytes": None, "num_gpu_blocks_override": None, "offload_bytes": 0}
        sizes = StageBytes(shape, msgspec.structs.replace(serving, **unasked))
        calibration = self.calibration_of(group)

        def left(first: int, last: int) -> float:
            ledger = rank_memory(
                sizes, calibration, group.gpu, tp_size=tp_size, pp_size=pp_size, first_layer=first, last_layer=last,
                cap_bytes=cap_bytes,
            )  # fmt: skip
            return ledger.kv_budget_bytes + sizes.layer_bytes(tp_size, first, last) + (serving.offload_bytes or 0)

        if shape.num_layers < 3:
            whole = left(0, shape.num_layers)
            return whole, 0.0, 0.0
        inner = left(1, 2)
        return inner, inner - left(0, 1), inner - left(shape.num_layers - 1, shape.num_layers)

    def _seconds_of_layers(self, group: DeviceGroup, tp_size: int, pp_size: int) -> tuple[list[float], float]:
        """Seconds that a request of the traffic costs in the layers before each one on these devices, and in the head.

        Its part of a full step of prompts and of its decode steps: in the long run a stage has to do all of both, so
        the split that evens these sums leaves the stages the least idle.
        """
        key = (*group.kind, tp_size, pp_size)
        if key not in self._layer_seconds:
            shape = self.sizes.shape
            loads = self._loads_of_a_request(pp_size)

            def cost(first: int, last: int) -> float:
                stage = self._stage_cost(group, tp_size, first, last)
                return sum(share * stage.seconds(load) for load, share in loads)

            of_kind: dict[int, float] = {}
            overhead = self.calibration_of(group).stage_us * 1e-6 * sum(share for _, share in loads)
            for index, kind in enumerate(shape.layer_kinds):
                if kind not in of_kind and index + 1 < shape.num_layers:
                    of_kind[kind] = cost(index, index + 1) - overhead
            fallback = next(iter(of_kind.values()), 0.0)
            before = [0.0]
            for kind in shape.layer_kinds:
                before.append(before[-1] + of_kind.get(kind, fallback))
            last = cost(shape.num_layers - 1, shape.num_layers) - overhead  # with the head, the draw and the answer
            head = max(0.0, last - of_kind.get(shape.layer_kinds[-1], fallback))
            self._layer_seconds[key] = before, head
        return self._layer_seconds[key]

    def _loads_of_a_request(self, pp_size: int) -> list[tuple[StepLoad, float]]:
        """Steps, each with how many of them a request accounts for."""
        traffic, serving = self.traffic, self.sizes.serving
        rows = max(1, min(MIXED_ROWS, self._wanted_concurrency() // pp_size))
        decode = StepLoad(rows, rows * traffic.held_tokens, 0, 0, rows)
        tokens = serving.max_num_batched_tokens
        prompts = tokens / traffic.input_len  # that share a step, or the part of one
        prefill = StepLoad(0, 0, tokens, tokens * min(traffic.input_len, tokens) // 2, max(1, int(prompts)))
        return [(decode, traffic.output_len / rows), (prefill, 1 / prompts)]

    def _stage_cost(
        self, group: DeviceGroup, tp_size: int, first: int, last: int, *, offloaded_bytes: int = 0
    ) -> StageCost:
        return StageCost(
            self.sizes, group.sheet, self.calibration_of(group), tp_size=tp_size, first_layer=first, last_layer=last,
            group_link=group.link, offloaded_bytes=offloaded_bytes,
        )  # fmt: skip

    def _memories(self, replica: Sequence[DeviceGroup], tp_size: int, counts: Sequence[int]) -> list[RankMemory]:
        found, first = [], 0
        for stage, (group, count) in enumerate(zip(replica, counts, strict=True)):
            found.append(
                rank_memory(
                    self.sizes, self.calibration_of(group), group.gpu, tp_size=tp_size, pp_size=len(replica),
                    first_layer=first, last_layer=first + count, cap_bytes=self._cap(stage),
                )
            )  # fmt: skip
            first += count
        return found

    def _cap(self, stage: int) -> int | None:
        return cap_of(self.sizes.serving.stage_bytes, stage)

    def _needed_blocks(self, num_requests: int) -> int:
        """Blocks of so many requests: a lone one at its full length, several at their average."""
        serving, traffic = self.sizes.serving, self.traffic
        if num_requests == 1:
            return serving.blocks_of(traffic.input_len + traffic.output_len)
        return num_requests * serving.blocks_of(traffic.held_tokens)

    def _wanted_concurrency(self) -> int:
        most = self.sizes.serving.max_num_seqs
        return most if self.traffic.concurrency is None else min(most, self.traffic.concurrency)

    def _does_not_fit(self, replica: Sequence[DeviceGroup], tp_size: int, counts: Sequence[int]) -> Layout:
        memories = self._memories(replica, tp_size, counts)
        needed = self._needed_blocks(1)
        missing = [needed * memory.block_bytes - memory.kv_budget_bytes for memory in memories]
        worst = max(range(len(missing)), key=lambda stage: missing[stage])
        memory, group = memories[worst], replica[worst]
        where = f"{group.node_ids[0]}" + (f" (stage {worst} of {len(replica)})" if len(replica) > 1 else "")
        problem = (
            f"{where}: each {group.sheet.name} lacks {_gb(missing[worst])}: weights {_gb(memory.weight_bytes)} + "
            f"activations and workspace {_gb(memory.other_bytes)} + one request's KV "
            f"{_gb(needed * memory.block_bytes)}, of {_gb(memory.limit_bytes)} usable"
            f"{self._share_that_fits(group, worst, missing[worst])}"
        )
        return Layout(tp_size=tp_size, pp_size=len(replica), problem=problem, missing_bytes=max(1, missing[worst]))

    def _share_that_fits(self, group: DeviceGroup, stage: int, missing: int) -> str:
        """The flag and its value, where a larger share of the device is all that a stage lacks."""
        serving = self.sizes.serving
        bounded = serving.kv_cache_memory_bytes or serving.num_gpu_blocks_override or self._cap(stage)
        share = math.ceil(100 * (serving.gpu_memory_utilization + missing / group.gpu.memory_bytes)) / 100
        if bounded or group.sheet.name == "CPU" or share > MOST_SHARE:
            return ""
        return f" (--gpu-memory-utilization {share:.2f} would do)"

    # ------------------------------------------------------------------------------------------------- predictions

    def cost(
        self, replica: Sequence[DeviceGroup], tp_size: int, counts: Sequence[int], hops: Sequence[Link]
    ) -> ReplicaCost:
        """The price list of a replica."""
        stages, first = [], 0
        for group, count, memory in zip(replica, counts, self._memories(replica, tp_size, counts), strict=True):
            offloaded = memory.offloaded_bytes
            stages.append(self._stage_cost(group, tp_size, first, first + count, offloaded_bytes=offloaded))
            first += count
        return ReplicaCost(stages, list(hops))

    def _predict(
        self, replica: Sequence[DeviceGroup], tp_size: int, counts: Sequence[int], hops: Sequence[Link]
    ) -> Layout:
        serving, traffic, pp_size = self.sizes.serving, self.traffic, len(replica)
        memories = self._memories(replica, tp_size, counts)
        num_blocks = min(memory.num_blocks for memory in memories)
        cost = self.cost(replica, tp_size, counts, hops)
        held_blocks = serving.blocks_of(traffic.held_tokens)
        capacity = num_blocks * serving.block_size
        if serving.groups.has_windows:  # of requests of this length: a longer one holds fewer blocks for a token
            capacity = num_blocks * traffic.held_tokens // held_blocks
        concurrency = max(1, min(self._wanted_concurrency(), num_blocks // held_blocks))
        rows = -(-concurrency // pp_size)
        decode = StepLoad(rows, rows * traffic.held_tokens, 0, 0, rows)
        of_stages = cost.stage_seconds(decode)
        cycle = max(pp_size * max(of_stages), sum(of_stages)) if concurrency >= pp_size else sum(of_stages)
        in_len, budget = traffic.input_len, serving.max_num_batched_tokens
        whole = StepLoad(0, 0, in_len, in_len * (in_len + 1) // 2, 1)
        per_step = max(1, budget // in_len)  # prompts that share a step
        chunk = StepLoad(0, 0, in_len * per_step, per_step * in_len * (in_len + 1) // 2, per_step)
        # a prompt of several steps: each of them reads the weights that live in the host's memory again
        num_steps = -(-in_len // budget)
        part = StepLoad(0, 0, -(-in_len // num_steps), whole.prefill_pairs // num_steps, 1)
        prompt_seconds = max(cost.stage_seconds(chunk)) / per_step
        if num_steps > 1:
            prompt_seconds = num_steps * max(cost.stage_seconds(part))
        period = traffic.output_len * cycle + concurrency * prompt_seconds
        lone = StepLoad(1, traffic.held_tokens, 0, 0, 1)
        request_seconds = self.calibration_of(replica[0]).request_us * 1e-6
        stages, first = [], 0
        for group, count, memory, seconds in zip(replica, counts, memories, of_stages, strict=True):
            stages.append(
                Stage(group=group, first_layer=first, last_layer=first + count, memory=memory, step_seconds=seconds)
            )
            first += count
        return Layout(
            tp_size=tp_size,
            pp_size=pp_size,
            stages=tuple(stages),
            num_blocks=num_blocks,
            capacity_tokens=capacity,
            concurrency=concurrency,
            tokens_per_second=concurrency * traffic.output_len / period,
            ttft_seconds=request_seconds + num_steps * cost.step_seconds(part),
            tpot_seconds=period / traffic.output_len,
            lone_tpot_seconds=cost.step_seconds(lone),
        )


def _gb(num_bytes: float) -> str:
    """Bytes for people, in units of 10^9."""
    return f"{num_bytes / 1e9:.2f} GB" if abs(num_bytes) >= 1e7 else f"{num_bytes / 1e6:.3f} MB"
