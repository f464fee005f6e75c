"""How long a start takes: Python, the groups, and running and recording the steps that are recorded.

Kernels were compiled before, and weights are at hand: what reading their files takes is the disk's.
"""

from typing import Final

from argosy.placement.calibration import Calibration
from argosy.placement.cost_model import ReplicaCost, StageCost, StepLoad
from argosy.placement.device_groups import hop_links
from argosy.placement.layout import LayoutJudge
from argosy.placement.plan_report import PlanReport
from argosy.placement.rank_memory import Serving, StageBytes
from argosy.placement.step_memory import (
    KERNELS_A_LAYER,
    KERNELS_A_LONG_LAYER,
    KERNELS_A_PROMPT_LAYER,
    LONG_UNIT,
    even_ladder,
    ladder,
    shared_ladder,
)

WARM_UP_STEPS: Final = 26  # before any is recorded: `workers/warm_up.py` for 8B on one card


def start_of(report: PlanReport) -> float:
    """Seconds until the slowest replica of a plan is ready; 0 where nobody measured starts on such a device."""
    judge = LayoutJudge(
        StageBytes(report.model, report.serving), report.options.traffic, calibration=report.options.calibration
    )
    kinds = {(one.layer_counts, *(stage.group.kind for stage in one.stages)): one for one in report.chosen.replicas}
    found = []
    for layout in kinds.values():
        groups = [stage.group for stage in layout.stages]
        cost = judge.cost(groups, layout.tp_size, layout.layer_counts, hop_links(report.topology, groups))
        calibration = judge.calibration_of(groups[0])
        is_measured = all(group.sheet.name == calibration.device for group in groups)
        found.append(start_seconds(cost, report.serving, calibration) if is_measured else 0.0)
    return max(found) if all(found) else 0.0


def start_seconds(cost: ReplicaCost, serving: Serving, calibration: Calibration) -> float:
    """From the process to the engine that is ready; 0 where nobody measured it. Stages start side by side."""
    if not calibration.start_seconds:
        return 0.0
    ranks = cost.stages[0].tp_size * len(cost.stages)
    groups = calibration.start_group_seconds if ranks > 1 else 0.0
    return calibration.start_seconds + groups + max(_stage(stage, serving, calibration) for stage in cost.stages)


def _stage(stage: StageCost, serving: Serving, calibration: Calibration) -> float:
    """Steps that are run to be measured or compiled, and recorded: the host's time for each kernel, the card's."""
    rows, tokens = serving.max_num_seqs, min(serving.max_num_batched_tokens, serving.most_tokens)
    spec, tp_size = stage.spec, stage.tp_size
    decodes, kinds = list[int](), list[tuple[int, int]]()
    if calibration.records_graphs and (most := serving.recorded_rows):
        decodes = [*ladder(most), *shared_ladder(most), *even_ladder(most, spec, tp_size)]
        kinds = serving.prompt_kinds(spec, tp_size, stage.num_layers)
    kernels = (WARM_UP_STEPS + len(decodes)) * KERNELS_A_LAYER
    long = KERNELS_A_LONG_LAYER if tp_size > 1 else KERNELS_A_PROMPT_LAYER  # a group's go in halves
    kernels += sum(KERNELS_A_PROMPT_LAYER if size < LONG_UNIT else long for size, _ in kinds)
    card = sum(stage.seconds(StepLoad(size, size, 0, 0, size)) for size in (rows, *decodes))
    prompts = [tokens, *(size for size, _ in kinds)]
    card += sum(stage.seconds(StepLoad(0, 0, size, size * size // 2, 1)) for size in prompts)
    each = calibration.start_kernel_us + (calibration.start_group_kernel_us if tp_size > 1 else 0.0)
    return kernels * stage.num_layers * each * 1e-6 + card
