"""From measured decode steps to a calibration of the device: which share of its data sheet it reached.

`argosy bench --calibration FILE` ends with it. A dozen ratios and overheads are set to the least squared log ratios of
reckoned to measured milliseconds. What the rows say nothing of stays as it was.
"""

import math
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Final

import msgspec
import numpy as np

from argosy.cluster.protocol.errors import ConfigError
from argosy.deploy import bench_models
from argosy.placement.calibration import Calibration, Judged, default_calibration
from argosy.placement.cost_model import ReplicaCost, StageCost, StepLoad
from argosy.placement.data_sheets import DATA_SHEETS, find_data_sheet
from argosy.placement.model_shape import ModelShape
from argosy.placement.model_sources import read_model_shape
from argosy.placement.rank_memory import Serving, StageBytes
from argosy.placement.weight_format import format_by_name

PUBLISHED: Final = {"06b": "qwen3-0.6b", "8b": "llama-3.1-8b", "70b": "llama-3.1-70b"}
# within what is plausible. How fast keys and values are read was measured alone (kernels_h200.jsonl: 4.2 TB/s)
LIMITS: Final = {
    "weight_efficiency": (0.3, 0.925), "step_us": (10.0, 2_000.0), "layer_us": (2.0, 400.0), "row_us": (0.0, 50.0),
    "apart_us": (0.0, 400.0), "ring_us": (0.0, 8.0), "state_passes": (0.0, 40.0),
    "group_layer_us": (0.0, 400.0), "chain_sums": (0.05, 1.0), "ring_sums": (0.05, 1.0),
    "fp8_layer_us": (0.0, 80.0), "fp8_flops_ratio": (0.3, 1.2), "reduce_latency": (0.5, 4.0),
    "reduce_rank_latency": (0.0, 1.0), "reduce_efficiency": (0.1, 0.9),
}  # fmt: skip
# what decode steps say nothing of, and throughputs and first tokens do (`fit_calibration.py --workloads`)
WORKLOAD_LIMITS: Final = {"request_us": (500.0, 20_000.0), "hidden_sums": (0.0, 0.95)}
FLOPS_POINTS: Final = (8.0, 64.0, 256.0, 512.0, 8192.0)
_PROMPT, _ANSWER = 128, 256  # tokens of each request of decode<batch>
_CONTEXT: Final = _PROMPT + _ANSWER // 2  # tokens in view of a row on average
_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
LEAST: Final = 0.01  # of what is fitted in logarithms and may be 0
NUDGE: Final = 0.01  # for slopes
PULL: Final = 0.005  # to where a value stood, so that it stays there where rows say nothing of it
Residuals = Callable[[Calibration], Sequence[float]]


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


def price_list(
    model: str, tp_size: int, pp_size: int, calibration: Calibration, device: str, *, quantization: str = "none",
    dtype: str = "bfloat16",
) -> ReplicaCost:  # fmt: skip
    """Of one replica with stages of equally many layers."""
    sizes, sheet = _sizes(model, quantization, dtype), DATA_SHEETS[device]
    cuts = [sizes.shape.num_layers * stage // pp_size for stage in range(pp_size + 1)]
    stages = [
        StageCost(sizes, sheet, calibration, tp_size=tp_size, first_layer=first, last_layer=last, group_link=sheet.link)
        for first, last in pairwise(cuts)
    ]
    return ReplicaCost(stages, [sheet.link] * (pp_size - 1))


def reckon_ms(step: DecodeStep, calibration: Calibration, device: str) -> float:
    """What the cost model says of that step."""
    cost = price_list(
        step.model, step.tp_size, step.pp_size, calibration, device, quantization=step.quantization, dtype=step.dtype
    )
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
    residuals: Residuals, start: Calibration, names: Sequence[str], points: Collection[float], *, rounds: int = 60
) -> Calibration:
    """The best values of `names`, and of the shares of arithmetic at `points` tokens.

    Least squares by steps that trust the slopes as far as they have held (Levenberg and Marquardt), in logarithms.
    """
    keys: list[str | int] = [*names, *(at for at, (tokens, _) in enumerate(start.flops_efficiency) if tokens in points)]
    low, high = (np.log([bounds[side] for bounds in map(_bounds, keys)]) for side in (0, 1))
    first = at = np.clip(np.log([max(_value(start, key), LEAST) for key in keys]), low, high)

    def off(values: np.ndarray) -> np.ndarray:
        found = residuals(_with(start, keys, np.exp(values)))
        return np.array([*found, *(PULL * (values - first))])

    now, trust = off(at), 0.01
    for _ in range(rounds):
        slopes = np.array([off(at + NUDGE * unit) - now for unit in np.eye(len(keys))]).T / NUDGE
        normal, downhill = slopes.T @ slopes, -slopes.T @ now
        free = ~(((at <= low) & (downhill < 0)) | ((at >= high) & (downhill > 0)))  # not held by a bound
        inner, gained = normal[np.ix_(free, free)], 0.0
        while trust < 1e6 and not gained:
            move = np.zeros(len(keys))
            move[free] = np.linalg.solve(inner + trust * np.diag(np.diag(inner)), downhill[free])
            there = np.clip(at + np.clip(move, -1.0, 1.0), low, high)
            then = off(there)
            if then @ then < now @ now:
                gained = 1.0 - (then @ then) / (now @ now)
                at, now, trust = there, then, trust / 4
            else:
                trust *= 4
        if gained < 1e-4:
            break
    return _with(start, keys, np.exp(at))


def step_residuals(steps: Sequence[DecodeStep], device: str) -> Residuals:
    """Log ratios of reckoned to measured; layouts with stages are left to be foretold."""
    fitted = [step for step in steps if step.pp_size == 1]
    return lambda calibration: [
        math.log(reckon_ms(step, calibration, device) / step.milliseconds) for step in fitted
    ]  # fmt: skip


def for_device(calibration: Calibration, device: str) -> Calibration:
    """To begin a fit with: of another device's, without what was measured or tuned on that one alone."""
    if calibration.device == device:
        return calibration
    return msgspec.structs.replace(calibration, device=device, judged=(), chains=(), rings=(), start_seconds=0.0)


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
    start = for_device(default_calibration(sheet.name), sheet.name)
    start = msgspec.structs.replace(
        start,
        flops_efficiency=tuple((point, start.flops_share(point)) for point in FLOPS_POINTS),
        source=f"fitted to {len(steps)} decode steps of {', '.join(sorted({step.model for step in steps}))}",
    )
    best = fit(step_residuals(steps, sheet.name), start, list(LIMITS), FLOPS_POINTS)
    offs = {
        f"{step.model} TP{step.tp_size} decode{step.batch}": reckon_ms(step, best, sheet.name) / step.milliseconds - 1
        for step in steps
    }
    worst = max(offs, key=lambda name: abs(offs[name]))
    middle = median(map(abs, offs.values()))
    judged = Judged("decode step", len(steps), round(middle, 3), round(offs[worst], 3), worst)
    return msgspec.structs.replace(best, judged=(judged,))


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


def _bounds(key: str | int) -> tuple[float, float]:
    """Of a setting, or of the share of arithmetic at one of the table's points."""
    low, high = (0.01, 0.95) if isinstance(key, int) else {**LIMITS, **WORKLOAD_LIMITS}[key]
    return max(low, LEAST), high


def _value(at: Calibration, key: str | int) -> float:
    return at.flops_efficiency[key][1] if isinstance(key, int) else float(getattr(at, key))


def _with(start: Calibration, keys: Sequence[str | int], values: np.ndarray) -> Calibration:
    table, changed = list(start.flops_efficiency), dict[str, Any]()
    for key, value in zip(keys, values.tolist(), strict=True):
        if isinstance(key, int):
            table[key] = (table[key][0], value)
        else:
            changed[key] = value
    return msgspec.structs.replace(start, flops_efficiency=tuple(table), **changed)


@lru_cache(maxsize=64)
def _sizes(model: str, quantization: str, dtype: str) -> StageBytes:
    """A model's weights as a row of `argosy bench` says that they are stored."""
    size = _BYTES.get(dtype, 2)
    serving = Serving(
        dtype_bytes=size, kv_dtype_bytes=size, weight_format=format_by_name(quantization), max_num_seqs=512
    )
    return StageBytes(_shape(model), serving)


@lru_cache(maxsize=16)
def _shape(model: str) -> ModelShape:
    """Of a name that `argosy bench` takes."""
    if model in PUBLISHED:
        return read_model_shape(PUBLISHED[model])
    with tempfile.TemporaryDirectory(prefix="argosy-shape-") as parent:
        return read_model_shape(bench_models.make_folder(model, Path(parent))[0])
