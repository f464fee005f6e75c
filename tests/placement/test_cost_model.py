"""Seconds of steps: what must hold of any price list, and how near the shipped one is to what was measured."""

import json
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from argosy.cluster.protocol.errors import ConfigError
from argosy.placement.calibration import Calibration, default_calibration, read_calibration
from argosy.placement.cost_model import ReplicaCost, StageCost, StepLoad
from argosy.placement.data_sheets import DATA_SHEETS
from argosy.placement.model_sources import read_model_shape
from argosy.placement.planner import make_serving
from argosy.placement.rank_memory import StageBytes
from argosy.placement.topology import Link

ROOT = Path(__file__).resolve().parents[2]
H200 = DATA_SHEETS["H200"]


def replica(model: str, tp_size: int = 1, pp_size: int = 1, quantization: str | None = None) -> ReplicaCost:
    """The price list of one replica on H200."""
    shape = read_model_shape(model)
    sizes = StageBytes(shape, make_serving(shape, quantization=quantization))
    edges = [shape.num_layers * stage // pp_size for stage in range(pp_size + 1)]
    stages = [
        StageCost(sizes, H200, default_calibration("H200"), tp_size=tp_size, first_layer=first, last_layer=last,
                  group_link=H200.link)
        for first, last in pairwise(edges)
    ]  # fmt: skip
    return ReplicaCost(stages, [H200.link] * (pp_size - 1))


def decode(rows: int, context: int = 256) -> StepLoad:
    """A step of rows that look back on so many tokens each."""
    return StepLoad(rows, rows * context, 0, 0, rows)


def test_more_work_never_takes_less() -> None:
    """More rows, longer contexts, longer prompts; but that rings make two rows as fast as one, which has none."""
    cost = replica("llama-3.1-8b")
    assert cost.step_seconds(decode(2)) > 0.98 * cost.step_seconds(decode(1))
    rows = [cost.step_seconds(decode(rows)) for rows in (2, 8, 64, 256, 1024)]
    assert rows == sorted(rows)
    contexts = [cost.step_seconds(decode(64, context)) for context in (1, 100, 1000, 10_000)]
    assert contexts == sorted(contexts)
    prompts = [cost.step_seconds(StepLoad(0, 0, n, n * n // 2, 1)) for n in (1, 64, 512, 4096, 8192)]
    assert prompts == sorted(prompts)


def test_no_step_is_faster_than_its_bytes() -> None:
    """Weights are read once a step, by each rank its share, at no more than the data sheet's rate."""
    for model, tp_size in (("llama-3.1-8b", 1), ("llama-3.1-8b", 2), ("llama-3.1-70b", 4), ("qwen3-0.6b", 1)):
        shape = read_model_shape(model)
        floor = 2 * shape.num_active_parameters / tp_size / (H200.gbytes_per_second * 1e9)
        assert replica(model, tp_size).step_seconds(decode(1)) > floor


def test_sharing_layers_makes_a_lone_token_faster_and_stages_do_not() -> None:
    """Claims N17 and N18: TP adds up bandwidth; PP moves the hidden states once a stage."""
    one = replica("llama-3.1-70b").step_seconds(decode(1))
    assert replica("llama-3.1-70b", tp_size=2).step_seconds(decode(1)) < 0.65 * one
    assert one < replica("llama-3.1-70b", pp_size=2).step_seconds(decode(1)) < 1.05 * one


def test_only_the_chosen_experts_are_read() -> None:
    """One token of Mixtral reads 2 of 8 experts, many tokens read all."""
    cost = replica("mixtral-8x7b-v0.1")
    shape = read_model_shape("mixtral-8x7b-v0.1")
    everything = 2 * shape.num_parameters / (H200.gbytes_per_second * 1e9)
    assert cost.step_seconds(decode(1)) < 0.5 * everything
    assert cost.step_seconds(decode(256)) > everything


def test_packed_weights_are_read_faster() -> None:
    """FP8 halves the bytes of the layers."""
    plain, packed = (replica("llama-3.1-70b", quantization=q).step_seconds(decode(1)) for q in (None, "fp8"))
    assert 0.5 < packed / plain < 0.6


def test_a_slow_link_makes_sums_dear() -> None:
    """The same group over PCIe instead of NVLink (claim N15: prompts wait for it)."""
    shape = read_model_shape("llama-3.1-70b")
    sizes = StageBytes(shape, make_serving(shape))
    load = StepLoad(0, 0, 2048, 2048 * 1024, 1)
    seconds = [
        StageCost(sizes, H200, default_calibration("H200"), tp_size=4, first_layer=0, last_layer=80,
                  group_link=link).seconds(load)
        for link in (H200.link, Link(kind="pcie", gbytes_per_second=26, latency_us=8))
    ]  # fmt: skip
    assert seconds[1] > 1.5 * seconds[0]


def test_a_window_bounds_what_is_looked_back_on() -> None:
    """Mistral's first release looked back on 4096 tokens; a full context costs no more than that."""
    shape = read_model_shape("mistral-7b-v0.3", overrides={"sliding_window": 4096})
    sizes = StageBytes(shape, make_serving(shape))
    stage = StageCost(sizes, H200, default_calibration("H200"), tp_size=1, first_layer=0, last_layer=32,
                      group_link=H200.link)  # fmt: skip
    assert stage.seconds(decode(8, 30_000)) == pytest.approx(stage.seconds(decode(8, 4096)))


def test_a_step_waits_for_its_longest_context() -> None:
    """Few rows: one long context beside short ones costs more than as many tokens shared out; many rows hide it."""
    cost = replica("llama-3.1-8b")

    def more(rows: int) -> float:
        alike, spread = decode(rows, 600), msgspec.structs.replace(decode(rows, 600), longest_context=2000)
        return cost.step_seconds(spread) / cost.step_seconds(alike) - 1

    assert more(20) > 0.008
    assert more(1000) < 0.02
    prompts = StepLoad(20, 12_000, 4096, 4096 * 256, 24, 600)
    longer = msgspec.structs.replace(prompts, longest_context=2000)
    assert cost.step_seconds(prompts) == cost.step_seconds(longer)


def test_prompt_tokens_that_draw_nothing_leave_the_last_layer_early() -> None:
    """Behind its keys and values only rows that draw go on: a prompt in one piece costs less than 32 layers of it."""
    cost = replica("llama-3.1-8b")
    one, all_draw = StepLoad(0, 0, 4096, 4096 * 256, 1), StepLoad(0, 0, 4096, 4096 * 256, 4096)
    head = 2 * 128_256 * 4096 * 4095 / (H200.bf16_tflops * 1e12 * 0.65)
    assert cost.step_seconds(all_draw) - cost.step_seconds(one) > head


def test_layers_in_a_launch_are_those_that_kernels_were_tuned_for() -> None:
    """The calibration names them, since the planner knows no kernels; of one card it is FP8 that has few launches."""
    tuned = json.loads((ROOT / "kernels" / "tuned" / "nvidia_h200.json").read_text(encoding="utf-8"))
    chains = set(default_calibration("H200").chains)
    assert {name for name in chains if not name.endswith("x1")} == set(tuned["layer_chain"])
    for name in chains - set(tuned["layer_chain"]):
        width, seen, inner, _ = map(int, name.split("x"))
        assert {f"{seen}x{width}", f"{width}x{2 * inner}", f"{inner}x{width}"} <= set(tuned["fp8_one"])


def test_layers_with_rings_are_those_that_kernels_were_tuned_for() -> None:
    """What attention saw and the MLP's inner numbers are multiplied by rings in steps of 2 to 16 rows, over a group in
    steps of up to 64."""
    tuned = json.loads((ROOT / "kernels" / "tuned" / "nvidia_h200.json").read_text(encoding="utf-8"))["gemv"]
    ring = 5  # `kernels/gemv.py`
    by_ring = {key for key, sizes in tuned.items() if sizes["kernel"] == ring}
    calibration = default_calibration("H200")
    assert (calibration.few_rows, calibration.ring_rows) == (16, 64)
    assert len(calibration.rings) >= 3
    for width, seen, inner, ranks in (name.split("x") for name in calibration.rings):
        for rows in (16,) if ranks == "1" else (16, 64):
            assert {f"{seen}x{width}x{rows}", f"{inner}x{width}x{rows}"} <= by_ring


def test_rings_make_few_rows_cheaper_and_neither_one_nor_many() -> None:
    """8B on one card in 16 bits; FP8 has rings of its own."""
    calibration = msgspec.structs.replace(default_calibration("H200"), ring_us=2.0)
    shape = read_model_shape("llama-3.1-8b")
    for quantization in (None, "fp8"):
        sizes = StageBytes(shape, make_serving(shape, quantization=quantization))
        without, with_them = (
            [StageCost(sizes, H200, msgspec.structs.replace(calibration, rings=names), tp_size=1, first_layer=0,
                       last_layer=32, group_link=H200.link).seconds(decode(rows)) for rows in (1, 2, 16, 17)]
            for names in ((), calibration.rings)
        )  # fmt: skip
        saved = [a - b for a, b in zip(without, with_them, strict=True)]
        if quantization:
            assert saved == [0.0] * 4
        else:
            assert saved[0] == saved[3] == 0.0
            assert 64e-6 <= saved[1] < saved[2]


def test_ranks_with_rings_wait_less_for_each_other_up_to_64_rows() -> None:
    """8B over two cards: the next weights come while a sum is under way. One row has a launch of its own."""
    calibration, shape = default_calibration("H200"), read_model_shape("llama-3.1-8b")
    sizes = StageBytes(shape, make_serving(shape))
    open_sums, as_fitted = (
        [StageCost(sizes, H200, msgspec.structs.replace(calibration, ring_sums=share), tp_size=2, first_layer=0,
                   last_layer=32, group_link=H200.link).seconds(decode(rows)) for rows in (1, 2, 64, 65)]
        for share in (1.0, calibration.ring_sums)
    )  # fmt: skip
    saved = [a - b for a, b in zip(open_sums, as_fitted, strict=True)]
    assert saved[0] == saved[3] == 0.0
    assert 32 * 2e-6 < saved[1] < saved[2], "2 us a layer at least"


def test_one_token_in_a_launch_waits_less_for_its_group() -> None:
    """8B over two cards, whose layers go in a launch; those of another width, and of cards nobody tuned for, don't."""
    calibration = default_calibration("H200")

    def seconds(*names: str) -> list[float]:
        other = msgspec.structs.replace(calibration, chains=names)
        shape = read_model_shape("llama-3.1-8b")
        sizes = StageBytes(shape, make_serving(shape))
        stage = StageCost(sizes, H200, other, tp_size=2, first_layer=0, last_layer=32, group_link=H200.link)
        return [stage.seconds(decode(rows)) for rows in (1, 2)]

    fast, slow = seconds(*calibration.chains), seconds()
    assert slow[0] - fast[0] > 32 * 3e-6, "3 us a layer at least"
    assert slow[1] == fast[1]
    shape = read_model_shape("llama-3.1-8b")
    sizes = StageBytes(shape, make_serving(shape))
    h100 = [StageCost(sizes, DATA_SHEETS["H100"], msgspec.structs.replace(calibration, chains=names), tp_size=2,
                      first_layer=0, last_layer=32, group_link=H200.link).seconds(decode(1))
            for names in ((), calibration.chains)]  # fmt: skip
    assert h100[0] == h100[1]


def test_few_rows_of_fp8_are_rounded_on_the_way() -> None:
    """Up to sixteen rows the rings round what they multiply; then rounding has launches of its own."""
    cost = replica("llama-3.1-8b", quantization="fp8")
    few, more, many = (cost.step_seconds(decode(rows)) for rows in (15, 16, 17))
    assert many - more > 5 * (more - few)


def test_sums_of_long_steps_hide_behind_products_and_not_more_than_these_take() -> None:
    """Longer prompts never take less; over a slow link products end long before the sums."""
    shape = read_model_shape("llama-3.1-8b")
    sizes = StageBytes(shape, make_serving(shape))
    slow = Link(kind="pcie", gbytes_per_second=1, latency_us=8)
    open_link = msgspec.structs.replace(default_calibration("H200"), hidden_sums=0.0)
    for link, least, most in ((H200.link, 0.8, 0.99), (slow, 0.9, 0.999)):
        hidden, seen = (
            [StageCost(sizes, H200, calibration, tp_size=2, first_layer=0, last_layer=32, group_link=link)
             .seconds(StepLoad(0, 0, tokens, tokens * 256, tokens // 512)) for tokens in (2048, 2049, 4096, 8192)]
            for calibration in (default_calibration("H200"), open_link)
        )  # fmt: skip
        assert hidden == sorted(hidden)
        assert hidden[0] == seen[0]
        assert least < hidden[-1] / seen[-1] < most


def test_a_calibration_file_is_checked(tmp_path: Path) -> None:
    """Unknown keys and missing files are named."""
    path = tmp_path / "c.json"
    path.write_text('{"device": "x", "source": "y", "wieght_efficiency": 1}', encoding="utf-8")
    with pytest.raises(ConfigError, match="wieght_efficiency"):
        read_calibration(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_calibration(tmp_path / "none.json")


def test_prompts_over_8_bits_need_room_to_be_unpacked_in() -> None:
    """Where a step is so small that attention takes the most; a large one needs more for its products anyway."""
    shape, calibration = read_model_shape("llama-3.1-8b"), default_calibration("H200")

    def needed(tokens: int, kv_dtype_bytes: int) -> int:
        serving = msgspec.structs.replace(make_serving(shape), max_num_batched_tokens=tokens, max_num_seqs=4,
                                          kv_dtype_bytes=kv_dtype_bytes, graph_rows=0)  # fmt: skip
        return StageBytes(shape, serving).activation_bytes(calibration, 1, 0, shape.num_layers)

    assert needed(8192, 1) == needed(8192, 2)
    assert needed(64, 2) < calibration.unpacked_bytes < needed(64, 1) < 1.1 * calibration.unpacked_bytes


def test_efficiency_is_linear_between_measured_points() -> None:
    """And flat beyond them."""
    calibration = Calibration(device="d", source="s", flops_efficiency=((10.0, 0.2), (20.0, 0.4)))
    assert [calibration.flops_share(n) for n in (1, 10, 15, 20, 99)] == pytest.approx([0.2, 0.2, 0.3, 0.4, 0.4])


def test_a_small_step_with_prompts_does_not_wait_for_launches() -> None:
    """It is recorded: up to a number of tokens and rows, and only where graphs are. Above the host is the floor."""
    small, many_rows = StepLoad(7, 1792, 64, 4096, 8), StepLoad(100, 25600, 64, 4096, 101)
    (stage,) = replica("llama-3.1-8b").stages
    eager = StageCost.__new__(StageCost)
    eager.__dict__.update(stage.__dict__ | {"_recorded": [], "_eager_seconds": 8e-3})
    stage._eager_seconds = 8e-3
    assert stage.seconds(small) < 6.5e-3
    assert eager.seconds(small) == 8e-3
    assert stage.seconds(many_rows) == eager.seconds(many_rows) == 8e-3
    beyond = StepLoad(0, 0, 300, 45000, 1)
    assert stage.seconds(beyond) == eager.seconds(beyond)
    stage._recorded = [(1324, 8)]
    assert stage.seconds(beyond) == eager.seconds(beyond), "no rank pads by a thousand tokens"
    stage._recorded = [(256, 8)]
    padded, full = StepLoad(0, 0, 200, 20000, 1), StepLoad(0, 0, 256, 20000, 1)
    assert stage.seconds(padded) == pytest.approx(stage.seconds(full), rel=0.01), "padding is multiplied as well"
