"""Layers for the stages of a pipeline, where nobody names them.

Devices of unequal room: an even split leaves all of them as many blocks as the poorest has. Split by room, the
larger one holds more of the weights and, with them, more of every block. Devices that are alike: the planner's split,
by what requests cost on each stage, since the last one has the head besides.
"""

from collections.abc import Sequence
from typing import Final

import msgspec

from argosy.cluster.protocol.config import ServingConfig
from argosy.placement.calibration import default_calibration
from argosy.placement.data_sheets import find_data_sheet
from argosy.placement.device_groups import DeviceGroup
from argosy.placement.layout import LayoutJudge, Traffic
from argosy.placement.model_shape import ModelShape
from argosy.placement.partition import split_layers
from argosy.placement.plan import make_plan
from argosy.placement.rank_memory import RankMemory, Serving, StageBytes, cap_of, rank_memory
from argosy.placement.topology import Gpu

ALIKE: Final = 0.05  # devices whose room differs by less are taken for equal: what is free changes from start to start


def is_uneven(devices: Sequence[Gpu], caps: Sequence[int] = ()) -> bool:
    """Whether stages on these devices, one each, differ in what they may use. `caps`: bytes, 0 for none."""
    room = [_usable(gpu, cap) for gpu, cap in zip(devices, caps or [0] * len(devices), strict=True)]
    return len(room) > 1 and min(room) < (1 - ALIKE) * max(room)


def split_by_room(shape: ModelShape, serving: Serving, devices: Sequence[Gpu], tp_size: int) -> tuple[int, ...]:
    """Layers of each stage that leave the most KV blocks, where stage i has its ranks on devices like `devices[i]`."""
    # what the user names for the cache is the same on every stage: the split is by what there is room for
    unasked = {"kv_cache_memory_bytes": None, "num_gpu_blocks_override": None}
    sizes = StageBytes(shape, msgspec.structs.replace(serving, **unasked))

    def blocks(stage: int, first: int, last: int) -> float:
        found = stage_memory(sizes, devices[stage], tp_size, len(devices), stage, first, last)
        return found.kv_budget_bytes / found.block_bytes if found.kv_budget_bytes >= 0 else found.kv_budget_bytes

    best = split_layers(shape.num_layers, len(devices), blocks)
    assert best is not None  # all worths are finite, and the layout was checked
    return best[1]


def stage_memory(
    sizes: StageBytes, gpu: Gpu, tp_size: int, pp_size: int, stage: int, first_layer: int, last_layer: int
) -> RankMemory:
    """The ledger of the first rank of a stage."""
    sheet = find_data_sheet(gpu.model)
    return rank_memory(
        sizes, default_calibration(gpu.model if sheet is None else sheet.name), gpu, tp_size=tp_size, pp_size=pp_size,
        first_layer=first_layer, last_layer=last_layer, cap_bytes=cap_of(sizes.serving.stage_bytes, stage),
    )  # fmt: skip


def _usable(gpu: Gpu, cap: int) -> int:
    return min(gpu.usable_bytes, cap) if cap else gpu.usable_bytes


def layers_for(config: ServingConfig, shape: ModelShape, devices: Sequence[Gpu]) -> tuple[int, ...]:
    """The split for stages on these devices; empty where it was given, or where an even one does as well."""
    parallel = config.parallel
    num_stages = parallel.pipeline_parallel_size
    if num_stages < 2 or parallel.pipeline_layers or len(devices) != num_stages or num_stages > shape.num_layers:
        return ()
    serving, tp_size = Serving.from_config(config, shape), parallel.tensor_parallel_size
    if is_uneven(devices, config.stage_memory_bytes):
        return split_by_room(shape, serving, devices, tp_size)
    layers = split_by_time(shape, serving, devices, tp_size)
    return () if layers == make_plan(shape.num_layers, 1, num_stages).layer_counts else layers


def split_by_time(shape: ModelShape, serving: Serving, devices: Sequence[Gpu], tp_size: int) -> tuple[int, ...]:
    """As `argosy plan` splits for devices that are alike; empty for CPUs and devices that nobody has figures of."""
    sheets = [find_data_sheet(gpu.model) for gpu in devices]
    poorest = min(devices, key=lambda gpu: gpu.usable_bytes)  # a little more or less room must not move layers
    groups = [
        DeviceGroup(devices=(("", 0),) * tp_size, gpu=poorest, sheet=sheet, link=sheet.link)
        for sheet in sheets
        if sheet is not None and sheet.name != "CPU"
    ]
    if len(groups) < len(devices):
        return ()
    half = max(1, serving.max_model_len // 2)
    usual = Traffic()
    traffic = Traffic(input_len=min(usual.input_len, half), output_len=min(usual.output_len, half))
    return LayoutJudge(StageBytes(shape, serving), traffic).split(groups, tp_size)
