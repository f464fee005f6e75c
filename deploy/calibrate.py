"""From measured decode steps to a calibration of the device: which share of its data sheet it reached.

`argosy bench --calibration FILE` ends with it. A dozen ratios and overheads are moved by turns, in ever smaller steps,
to the least mean squared log ratio of reckoned to measured milliseconds. What the rows say nothing of stays as it was.
"""

import math
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import msgspec

from argosy.cluster.protocol.errors import ConfigError
from argosy.deploy import bench_models
from argosy.placement.calibration import Calibration, default_calibration
from argosy.placement.cost_model import ReplicaCost, StageCost, StepLoad
from argosy.placement.data_sheets import DATA_SHEETS, find_data_sheet
from argosy.placement.model_shape import ModelShape
from argosy.placement.model_sources import read_model_shape
from argosy.placement.rank_memory import Serving, StageBytes
from argosy.placement.weight_format import format_by_name

PUBLISHED: Final = {"06b": "qwen3-0.6b", "8b": "llama-3.1-8b", "70b": "llama-3.1-70b"}
# within what is plausible. How fast keys and values are read was measured alone (kernels_h200.jsonl: 4.2 TB/s)
LIMITS: Final = {
    "weight_efficiency": (0.3, 0.925), "step_us": (20.0, 2_000.0), "layer_us": (2.0, 400.0), "row_us": (0.0, 50.0),
    "group_layer_us": (0.0, 400.0), "fp8_layer_us": (0.0, 80.0), "fp8_flops_ratio": (0.3, 1.2),
    "reduce_efficiency": (0.1, 0.9), "reduce_latency": (1.5, 4.0), "reduce_rank_latency": (0.0, 1.0),
    "request_us": (500.0, 20_000.0),
}  # fmt: skip
STEP_LIMITS: Final = {  # what decode steps of equal contexts say nothing of
    "context_ns": (0.0, 40.0), "join_us": (0.0, 10.0), "eager_layer_us": (20.0, 800.0), "kv_efficiency": (0.6, 0.95),
}  # fmt: skip
FLOPS_POINTS: Final = (64.0, 256.0, 512.0, 8192.0)
_PROMPT, _ANSWER = 128, 256  # tokens of each request of decode<batch>
_CONTEXT: Final = _PROMPT + _ANSWER // 2  # tokens in view of a row on average
_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
Loss = Callable[[Calibration], float]


class DecodeStep(msgspec.Struct, frozen=True):
    """One measured decode step of `batch` rows: what the median request of decode<batch> takes for a token after its
    first, steps with others' prompts among them.
    """

    model: str
    tp_size: int
    pp_size: int
    batch: int
    milliseconds: float
    quantization: str = "none"
    dtype: str = "bfloat16"
    budget: int = 8192  # tokens a step


def read_step(raw: Mapping[str, Any]) -> DecodeStep | None:
    """Of a row of `argosy bench`; None when it is none of a decode step."""
    name = str(raw.get("workload", ""))
    if raw.get("unit") != "ms/step" or not name.removeprefix("decode").isdigit():
        return None
    tp, _, pp = str(raw.get("layout", "TP1")).partition("x")
    batch = min(int(name.removeprefix("decode")), int(raw.get("max_num_seqs") or 1024))  # more would wait their turn
    return DecodeStep(
        str(raw["model"]), int(tp.removeprefix("TP")), int(pp.removeprefix("PP") or 1),
        batch, float(raw["figure"]), str(raw.get("quantization") or "none"),
        str(raw.get("dtype") or "bfloat16"), int(raw.get("max_num_batched_tokens") or 8192),
    )  # fmt: skip


def reckon_ms(step: DecodeStep, calibration: Calibration, device: str) -> float:
    """What the cost model says of that step."""
    shape, size = _shape(step.model), _BYTES.get(step.dtype, 2)
    serving = Serving(
        dtype_bytes=size, kv_dtype_bytes=size, weight_format=format_by_name(step.quantization), max_num_seqs=512
    )
    sizes, sheet = StageBytes(shape, serving), DATA_SHEETS[device]
    cuts = [shape.num_layers * stage // step.pp_size for stage in range(step.pp_size + 1)]
    stages = [
        StageCost(sizes, sheet, calibration, tp_size=step.tp_size, first_layer=first, last_layer=last,
                  group_link=sheet.link)
        for first, last in pairwise(cuts)
    ]  # fmt: skip
    cost = ReplicaCost(stages, [sheet.link] * (step.pp_size - 1))
    rows = -(-step.batch // step.pp_size)
    alone = cost.step_seconds(StepLoad(num_decodes=rows, context_tokens=rows * _CONTEXT, num_sampled=rows))
    if step.pp_size > 1:
        return 1e3 * alone
    found = []
    for loads in prompts_beside(step.batch, step.budget):
        found.append(sum(map(cost.step_seconds, loads)) + (_ANSWER - 1 - len(loads)) * alone)
    return 1e3 * sum(found) / len(found) / (_ANSWER - 1)


@lru_cache(maxsize=64)
def prompts_beside(batch: int, budget: int) -> tuple[tuple[StepLoad, ...], ...]:
    """The steps with others' prompts that follow the first token of a request, for the one or two in the middle of a
    batch that arrives together."""
    loads, firsts, done, left = list[StepLoad](), list[int](), 0, _PROMPT * batch
    while left and done < budget:
        tokens = min(left, budget - done)
        left -= tokens
        ended = batch - -(-left // _PROMPT) - done
        loads.append(
            StepLoad(num_decodes=done, context_tokens=done * _PROMPT, prefill_tokens=tokens,
                     prefill_pairs=tokens * _PROMPT // 2, num_sampled=done + ended)
        )  # fmt: skip
        firsts += [len(loads)] * ended
        done += ended
    return tuple(tuple(loads[firsts[place] :]) for place in sorted({(batch - 1) // 2, batch // 2}))


def fit(
    loss: Loss, start: Calibration, names: Collection[str], points: Collection[float], least_step: float
) -> Calibration:
    """The best values of `names`, and of the shares of arithmetic at `points` tokens, by turns."""
    best, least, step = start, loss(start), 0.3
    while step > least_step:
        improved = False
        for candidate in _neighbours(best, step, names, points):
            if (value := loss(candidate)) < least - 1e-9:
                best, least, improved = candidate, value, True
        if not improved:
            step /= 2
    return best


def steps_loss(steps: Sequence[DecodeStep], device: str) -> Loss:
    """Mean squared log ratio; layouts with stages are left to be foretold."""
    fitted = [step for step in steps if step.pp_size == 1]

    def loss(calibration: Calibration) -> float:
        terms = [math.log(reckon_ms(step, calibration, device) / step.milliseconds) ** 2 for step in fitted]
        return sum(terms) / len(terms)

    return loss


def calibrate(rows: Sequence[Mapping[str, Any]], device_name: str) -> Calibration:
    """The calibration of the device by its driver's name ("" is a CPU). Raises `ConfigError` without what it needs."""
    sheet = find_data_sheet(device_name) if device_name else DATA_SHEETS["CPU"]
    if sheet is None:
        raise ConfigError(f"--calibration: no data sheet of {device_name!r}; known: {', '.join(DATA_SHEETS)}")
    steps = [step for row in rows if (step := read_step(row)) is not None and step.pp_size == 1]
    if not steps:
        raise ConfigError(
            "--calibration: nothing to fit; measure decode steps of one stage (--workload decode1 decode8 decode64)"
        )
    start = default_calibration(sheet.name)
    start = msgspec.structs.replace(
        start,
        device=sheet.name,
        flops_efficiency=tuple((point, start.flops_share(point)) for point in FLOPS_POINTS),
        source=f"fitted to {len(steps)} decode steps of {', '.join(sorted({step.model for step in steps}))}",
    )
    names = [name for name in LIMITS if name != "request_us"]
    return fit(steps_loss(steps, sheet.name), start, names, FLOPS_POINTS, 0.003)


def describe(rows: Sequence[Mapping[str, Any]], calibration: Calibration) -> str:
    """Each measured step beside what the fitted model says."""
    lines = []
    for step in (step for row in rows if (step := read_step(row)) is not None):
        found = reckon_ms(step, calibration, calibration.device)
        kind = f"{step.model:8} {step.quantization:5} TP{step.tp_size}xPP{step.pp_size} batch {step.batch:4}"
        off = found / step.milliseconds - 1
        lines.append(f"{kind} measured {step.milliseconds:8.3f} ms, model {found:8.3f} {off:+7.1%}")
    return "\n".join(lines)


def write(calibration: Calibration, path: str) -> None:
    """As `argosy plan --calibration` reads it."""
    text = msgspec.json.format(msgspec.json.encode(calibration), indent=1).decode()
    Path(path).write_text(text + "\n", encoding="utf-8")


def _neighbours(at: Calibration, step: float, names: Collection[str], points: Collection[float]) -> list[Calibration]:
    found = []
    for sign in (1 + step, 1 / (1 + step)):
        for name in names:
            low, high = {**LIMITS, **STEP_LIMITS}[name]
            value = max(low, min(high, max(getattr(at, name), 0.01) * sign))
            found.append(msgspec.structs.replace(at, **{name: value}))
        for place, (tokens, share) in enumerate(at.flops_efficiency):
            if tokens in points:
                table = list(at.flops_efficiency)
                table[place] = (tokens, max(0.05, min(0.95, share * sign)))
                found.append(msgspec.structs.replace(at, flops_efficiency=tuple(table)))
    return found


@lru_cache(maxsize=16)
def _shape(model: str) -> ModelShape:
    """Of a name that `argosy bench` takes."""
    if model in PUBLISHED:
        return read_model_shape(PUBLISHED[model])
    with tempfile.TemporaryDirectory(prefix="argosy-shape-") as parent:
        return read_model_shape(bench_models.make_folder(model, Path(parent))[0])
