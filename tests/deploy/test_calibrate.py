"""A calibration follows from measured steps: known ratios are found again, and what can't be fitted is said."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import pytest

from argosy.cluster.protocol.errors import ConfigError
from argosy.deploy import calibrate
from argosy.deploy.calibrate import DecodeStep
from argosy.placement.calibration import Calibration, default_calibration, read_calibration

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "engine_h200.jsonl"


def row(model: str, batch: int, figure: float, **more: Any) -> dict[str, Any]:
    """As `argosy bench` prints it."""
    return {"model": model, "layout": "TP1", "workload": f"decode{batch}", "unit": "ms/step", "figure": figure, **more}


def test_ratios_of_a_device_are_found_again(tmp_path: Path) -> None:
    """Steps of a card that reaches other shares than the one that ships; its file foretells an unseen step."""
    truth = msgspec.structs.replace(default_calibration("H200"), weight_efficiency=0.6, step_us=700.0)
    steps = [(model, batch) for model in ("06b", "8b") for batch in (1, 8, 64, 256)]
    rows = [row(m, b, calibrate.reckon_ms(DecodeStep(m, 1, 1, b, 0.0), truth, "H100")) for m, b in steps]
    path = str(tmp_path / "mine.json")
    calibrate.write(calibrate.calibrate(rows, "NVIDIA H100 80GB HBM3"), path)
    found = read_calibration(path)
    assert (found.device, found.source) == ("H100", "fitted to 8 decode steps of 06b, 8b")
    assert (found.chains, found.rings, found.start_seconds) == ((), (), 0.0), "nobody tuned or started on it"
    (judged,) = found.judged
    assert (judged.kind, judged.rows) == ("decode step", 8)
    assert judged.middle <= abs(judged.most) < 0.03
    unseen = DecodeStep("8b", 1, 1, 32, 0.0)
    ratio = calibrate.reckon_ms(unseen, found, "H100") / calibrate.reckon_ms(unseen, truth, "H100")
    assert ratio == pytest.approx(1.0, abs=0.03)
    before = calibrate.reckon_ms(unseen, default_calibration("H100"), "H100")
    assert before / calibrate.reckon_ms(unseen, truth, "H100") < 0.9
    assert "batch  256 measured" in calibrate.describe(rows, found)


def measured_steps() -> list[DecodeStep]:
    """The newest decode row of each kind on H200, of one stage."""
    newest: dict[object, DecodeStep] = {}
    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    for line in sorted(lines, key=lambda line: str(line["time"])):
        known = line.get("model") in calibrate.PUBLISHED and not line.get("note")
        if known and (step := calibrate.read_step(line)) is not None and step.pp_size == 1:
            newest[step.model, step.tp_size, step.batch, step.quantization] = step
    return list(newest.values())


def off_by(step: DecodeStep, calibration: Calibration) -> float:
    """By what part it is foretold too high."""
    return calibrate.reckon_ms(step, calibration, "H200") / step.milliseconds - 1


def test_the_shipped_calibration_foretells_every_decode_step() -> None:
    """All that were measured on one stage: much faster kernels without a new fit are seen here (`fit_calibration.py`,
    seconds without `--workloads`, then `refresh_docs.py`); docs/planning.md has in bold what is beyond a twentieth."""
    steps = measured_steps()
    assert len(steps) >= 24
    offs = {step: off_by(step, default_calibration("H200")) for step in steps}
    assert {step: off for step, off in offs.items() if abs(off) > 0.18} == {}
    assert median(map(abs, offs.values())) < 0.04


@pytest.mark.parametrize(
    ("held_out", "bound"),
    [(lambda step: step.tp_size == 2, 0.10), (lambda step: step.tp_size == 4, 0.12),
     (lambda step: step.model == "70b" and step.tp_size == 2, 0.08)],
    ids=["two cards", "four cards", "70B over two cards"],
)  # fmt: skip
def test_layouts_that_the_fit_has_not_seen_are_foretold(held_out: Callable[[DecodeStep], bool], bound: float) -> None:
    """From a start that knows no row, fitted to all others: the model has laws, not a number for each row."""
    steps = measured_steps()
    seen = [step for step in steps if not held_out(step)]
    start = msgspec.structs.replace(
        default_calibration("H200"), weight_efficiency=0.8, step_us=50.0, layer_us=20.0, row_us=2.0, apart_us=4.0,
        state_passes=8.0, group_layer_us=4.0, chain_sums=0.5, ring_sums=1.0, fp8_layer_us=8.0,
        fp8_flops_ratio=1.0, reduce_latency=1.5, reduce_rank_latency=0.2, reduce_efficiency=0.5,
        flops_efficiency=((8.0, 0.1), (64.0, 0.3), (256.0, 0.6), (512.0, 0.65), (8192.0, 0.65)),
    )  # fmt: skip
    residuals = calibrate.step_residuals(seen, "H200")
    found = calibrate.fit(residuals, start, list(calibrate.LIMITS), calibrate.FLOPS_POINTS, rounds=20)
    offs = {step: off_by(step, found) for step in steps if step not in seen}
    assert len(offs) >= 2
    assert {step: off for step, off in offs.items() if abs(off) > bound} == {}
    assert max(abs(off_by(step, start)) for step in offs) > 2 * bound, "the start would have done"


def test_only_decode_steps_count_and_no_more_rows_than_ran_at_once() -> None:
    """Throughputs are another unit; of 64 requests at most 32 ran."""
    assert calibrate.read_step({**row("8b", 1, 4.0), "unit": "output tokens/s"}) is None
    assert calibrate.read_step({**row("8b", 1, 4.0), "workload": "chat1000"}) is None
    step = calibrate.read_step(row("8b", 64, 5.0, layout="TP2xPP2", max_num_seqs=32, quantization="fp8"))
    assert step == DecodeStep("8b", 2, 2, 32, 5.0, "fp8")


def test_what_can_t_be_fitted_is_refused() -> None:
    """No decode step of a single stage, or a device without a data sheet."""
    with pytest.raises(ConfigError, match="nothing to fit"):
        calibrate.calibrate([row("8b", 1, 4.0, layout="TP1xPP2")], "NVIDIA H200")
    with pytest.raises(ConfigError, match="no data sheet of 'GeForce 256'; known: A10G"):
        calibrate.calibrate([row("8b", 1, 4.0)], "GeForce 256")


@pytest.mark.parametrize(
    ("batch", "steps"),
    [(1, [()]), (64, [(), ()]), (65, [((64, 128),)]), (128, [((64, 8128), (127, 64)), ((127, 64),)]),
     (256, [((190, 8002), (253, 381))] * 2)],
)  # fmt: skip
def test_a_batch_counts_the_steps_with_prompts_that_its_median_request_is_beside(
    batch: int, steps: list[tuple[tuple[int, int], ...]]
) -> None:
    """8192 tokens a step, 128 a prompt: rows that decode and tokens of prompts in each step after its first token."""
    found = calibrate.prompts_beside(batch, 8192)
    assert [tuple((load.num_decodes, load.prefill_tokens) for load in loads) for loads in found] == steps


def test_prompts_of_others_are_no_part_of_a_decode_step() -> None:
    """256 rows take a long step more than decode alone, as measured: 0.7 ms of each token; with room for all, none."""
    truth = default_calibration("H200")
    beside = calibrate.reckon_ms(DecodeStep("8b", 1, 1, 256, 0.0), truth, "H200")
    alone = calibrate.reckon_ms(DecodeStep("8b", 1, 1, 256, 0.0, budget=1 << 15), truth, "H200")
    assert 0.6 < beside - alone < 0.9
