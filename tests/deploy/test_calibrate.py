"""A calibration follows from measured steps: known ratios are found again, and what can't be fitted is said."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from argosy.cluster.protocol.errors import ConfigError
from argosy.deploy import calibrate
from argosy.deploy.calibrate import DecodeStep
from argosy.placement.calibration import default_calibration, read_calibration


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
    unseen = DecodeStep("8b", 1, 1, 32, 0.0)
    ratio = calibrate.reckon_ms(unseen, found, "H100") / calibrate.reckon_ms(unseen, truth, "H100")
    assert ratio == pytest.approx(1.0, abs=0.03)
    before = calibrate.reckon_ms(unseen, default_calibration("H100"), "H100")
    assert before / calibrate.reckon_ms(unseen, truth, "H100") < 0.9
    assert "batch  256 measured" in calibrate.describe(rows, found)


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
