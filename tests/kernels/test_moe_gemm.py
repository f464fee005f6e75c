"""Experts on the card against plain torch: ugly sizes, experts that nobody wants, choices of other ranks."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from argosy.kernels import (
    fp8_quantize,
    moe_gemm,
    moe_int,
    moe_packed,
    moe_reference,
    moe_route,
    mxfp4,
    packed_reference,
)
from argosy.kernels.fp8_reference import Rounding
from argosy.kernels.moe_int import Tile
from argosy.kernels.moe_reference import IntExpertWeight

Near = Callable[[Tensor, Tensor], None]


def choices(num_tokens: int, top_k: int, num_experts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Different experts for each token, as a router gives them."""
    logits = torch.randn(num_tokens, num_experts, device=device)
    return moe_reference.choose_experts(logits, top_k, renormalise=True)


@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts", "rows"), [
    (1, 1, 1, 16), (3, 2, 8, 16), (37, 3, 5, 16), (300, 4, 7, 32), (130, 8, 64, 16),
])  # fmt: skip
def test_tokens_are_grouped_by_expert(
    num_tokens: int, top_k: int, num_experts: int, rows: int, device: torch.device
) -> None:
    """Every choice stands in one block of its expert, in the order of tokens; what pads a block is no choice."""
    ids, _ = choices(num_tokens, top_k, num_experts, device)
    ids[::5] = -1  # another rank's
    places, expert_of_block = moe_gemm.group_tokens(ids, num_experts, rows)
    want_places, want_experts = moe_reference.group_tokens(ids, num_experts, rows)
    assert torch.equal(expert_of_block, want_experts)
    used = (expert_of_block >= 0).repeat_interleave(rows)
    assert torch.equal(places[used], want_places[used])
    found = places[used][places[used] < ids.numel()]
    assert sorted(found.tolist()) == torch.where(ids.flatten() >= 0)[0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts", "width", "inner"), [
    (1, 2, 4, 48, 40), (5, 1, 3, 33, 17), (70, 2, 2, 64, 100), (19, 4, 16, 96, 24),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["plain", "biases and clamps", "half elsewhere"])
def test_experts(
    num_tokens: int, top_k: int, num_experts: int, width: int, inner: int, kind: str, dtype: torch.dtype,
    device: torch.device, assert_near: Near,
) -> None:  # fmt: skip
    """Mixtral's, gpt-oss's, and those of a rank that has half of them."""
    x = torch.randn(num_tokens, width, device=device).to(dtype)
    gate_up = (torch.randn(num_experts, 2 * inner, width, device=device) / width**0.5).to(dtype)
    down = (torch.randn(num_experts, width, inner, device=device) / inner**0.5).to(dtype)
    ids, weights = choices(num_tokens, top_k, num_experts, device)
    options = {}
    if kind == "half elsewhere":
        ids = torch.where(ids % 2 == 0, ids, -1)
    if kind == "biases and clamps":
        options = {
            "gate_up_bias_EI": torch.randn(num_experts, 2 * inner, device=device).to(dtype),
            "down_bias_ED": torch.randn(num_experts, width, device=device).to(dtype),
            "limit": 1.5,
            "alpha": 1.702,
        }
    exact = {key: value.double() if isinstance(value, Tensor) else value for key, value in options.items()}
    want = moe_reference.experts(x.double(), gate_up.double(), down.double(), ids, weights, **exact)
    got = moe_gemm.experts(x, gate_up, down, ids, weights, **options)
    assert_near(got, want)


def rounded(x: Tensor, gate: str | None = None) -> Tensor:
    """What is left of activations in e4m3 with a scale for 128 of them."""
    rows = fp8_quantize.quantize(x, Rounding(128), gate=gate)
    return rows.values_TI.double() * rows.scale_TG.double().repeat_interleave(128, 1)


@pytest.mark.parametrize("num_tokens", [1, 9])
def test_experts_of_8_bits(num_tokens: int, device: torch.device) -> None:
    """DeepSeek's weights stay as they are stored: e4m3, a scale for each 128 x 128. So are rows of several tokens."""
    num_experts, width, inner = 3, 256, 128
    weights_8, scales, plain = [], [], []
    for shape in ((num_experts, 2 * inner, width), (num_experts, width, inner)):
        stored = torch.randn(shape, device=device).to(torch.float8_e4m3fn)
        scale = torch.rand(shape[0], shape[1] // 128, shape[2] // 128, device=device) * 0.1
        whole = scale.repeat_interleave(128, 1).repeat_interleave(128, 2)
        weights_8.append(stored), scales.append(scale), plain.append(stored.double() * whole)
    x = torch.randn(num_tokens, width, device=device).half()
    ids, weights = choices(num_tokens, 2, num_experts, device)
    got = moe_gemm.experts(x, *weights_8, ids, weights, gate_up_scale=scales[0], down_scale=scales[1])
    want = torch.zeros(num_tokens, width, dtype=torch.float64, device=device)
    for token, place in itertools.product(range(num_tokens), range(2)):
        expert = int(ids[token, place])
        row = x[token : token + 1]
        both = ((rounded(row) if num_tokens > 1 else row.double()) @ plain[0][expert].T).half()
        gated = rounded(both, "silu") if num_tokens > 1 else moe_reference.swiglu(both.double())
        want[token] += weights[token, place] * (plain[1][expert] @ gated[0])
    assert float((got.double() - want).norm() / want.norm()) < 1e-2  # a number at an edge may round the other way


def test_experts_of_4_bits(device: torch.device, assert_near: Near) -> None:
    """gpt-oss's weights stay as they are stored: e2m1, a power of two for each 32, at a width that no tile divides."""
    num_experts, width, inner = 3, 96, 64
    packed, scales, plain = [], [], []
    for rows, columns in ((2 * inner, width), (width, inner)):
        blocks = torch.randint(0, 256, (num_experts, rows, columns // 32, 16), dtype=torch.uint8, device=device)
        scale = torch.randint(120, 124, (num_experts, rows, columns // 32), dtype=torch.uint8, device=device)
        packed.append(blocks.flatten(2))
        scales.append(scale)
        plain.append(mxfp4.unpack(blocks, scale, torch.float64))
    x = torch.randn(9, width, device=device).half()
    ids, weights = choices(9, 2, num_experts, device)
    options = {"limit": 7.0, "alpha": 1.702}
    got = moe_gemm.experts(x, *packed, ids, weights, gate_up_scale=scales[0], down_scale=scales[1], **options)
    assert_near(got, moe_reference.experts(x.double(), *plain, ids, weights, **options))
    # and the reference's own way with packed weights
    same = moe_reference.experts(
        x.double(), *packed, ids, weights, gate_up_scale=scales[0], down_scale=scales[1], **options
    )
    torch.testing.assert_close(same, moe_reference.experts(x.double(), *plain, ids, weights, **options))


@pytest.mark.gpu
@pytest.mark.parametrize(("num_tokens", "width", "inner"), [(1, 96, 64), (9, 96, 64), (70, 2880, 320), (300, 256, 160)])
def test_experts_of_4_bits_turned(
    num_tokens: int, width: int, inner: int, device: torch.device, assert_near: Near
) -> None:
    """In bfloat16 weights are unpacked on their way to the tensor core, widths that no span divides among them."""
    num_experts, packed, scales = 5, [], []
    for rows, columns in ((2 * inner, width), (width, inner)):
        packed.append(torch.randint(0, 256, (num_experts, rows, columns // 2), dtype=torch.uint8, device=device))
        scales.append(torch.randint(118, 123, (num_experts, rows, columns // 32), dtype=torch.uint8, device=device))
    x = torch.randn(num_tokens, width, device=device).bfloat16()
    ids, weights = choices(num_tokens, 2, num_experts, device)
    options = {"limit": 7.0, "alpha": 1.702, "gate_up_scale": scales[0], "down_scale": scales[1]}
    got = moe_gemm.experts(x, *packed, ids, weights, **options)
    assert_near(got, moe_reference.experts(x.double(), *packed, ids, weights, **options))


@pytest.mark.parametrize("width", [64, 96, 320])
def test_turned_rows_meet_their_weights(width: int, device: torch.device) -> None:
    """The order of a row's numbers is that in which a thread's 16 bytes go to the tensor core, low halves first."""
    span = moe_packed.span(width)
    packed = torch.zeros(7, span // 2, dtype=torch.uint8, device=device)
    packed[:, : width // 2] = torch.randint(0, 256, (7, width // 2), dtype=torch.uint8, device=device)
    scale = torch.full((7, span // 32), 127, dtype=torch.uint8, device=device)
    plain = mxfp4.unpack(packed.unflatten(-1, (-1, 16)), scale, torch.float32)
    x = torch.randn(3, width, device=device)
    turned = moe_packed.turn(x).view(3, -1, 2, 64)
    halves = [
        plain[:, half::2].reshape(7, -1, 4, 4, 2, 2).permute(0, 1, 3, 4, 2, 5).reshape(7, -1, 64) for half in range(2)
    ]
    got = sum(torch.einsum("osk,tsk->to", weights, turned[:, :, half]) for half, weights in enumerate(halves))
    torch.testing.assert_close(got, x @ plain[:, :width].T, rtol=1e-4, atol=1e-4)


def in_groups(
    num_experts: int, outputs: int, inputs: int, device: torch.device, *, bits: int, group: int, ordered: bool = False,
) -> IntExpertWeight:  # fmt: skip
    """Experts of whole numbers as checkpoints have them, the scale of each group of inputs another."""
    words, pairs = zip(
        *(
            packed_reference.pack(
                torch.randint(0, 1 << bits, (outputs, inputs), device=device),
                torch.rand(outputs, inputs // group, device=device).half() / (1 << bits) + 0.001,
                torch.randint(0, 1 << bits, (outputs, inputs // group), device=device).half(),
                bits=bits, group=group,
            )[:2]
            for _ in range(num_experts)
        ),
        strict=True,
    )  # fmt: skip
    order = torch.stack([torch.randperm(inputs, device=device) for _ in range(num_experts)]).int() if ordered else None
    weight = packed_reference.PackedWeight(torch.stack(words), torch.stack(pairs), bits, group, inputs, outputs)
    return IntExpertWeight(weight, order)


FEW_ROWS, MANY_ROWS = Tile(moe_int.FEW, 2, 4, 3), Tile(moe_int.MANY, 4, 4, 2)
INT_TILES = [
    (8, FEW_ROWS), (16, FEW_ROWS), (16, Tile(moe_int.FEW, 1, 2, 2, wide=2)), (16, MANY_ROWS), (32, MANY_ROWS),
    (32, Tile(moe_int.MANY, 4, 2, 2)), (64, Tile(moe_int.WARP_GROUPS, 4, 4, 2)),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "tile"), INT_TILES)
@pytest.mark.parametrize(
    ("bits", "group", "ordered"), [(4, 128, False), (4, 32, False), (4, 64, True), (8, 128, False)]
)
def test_a_product_with_experts_of_whole_numbers(
    rows: int, tile: Tile, bits: int, group: int, ordered: bool, device: torch.device, assert_near: Near
) -> None:
    """Rows that fill no tile, inputs that fill no block, an expert that nobody wants, and one of another rank."""
    inputs = {128: 384, 64: 192, 32: 160}[group]
    weight = in_groups(3, 41, inputs, device, bits=bits, group=group, ordered=ordered)
    x, bias = torch.randn(20, inputs, device=device).half(), torch.randn(3, 41, device=device).half()
    ids = torch.tensor([[0, 2]] * 17 + [[2, -1]] * 3, dtype=torch.int32, device=device)
    chosen = (*moe_gemm.group_tokens(ids, 3, rows), ids.numel())
    weights = torch.rand(ids.shape, device=device)
    got = moe_int.grouped_gemm(x, weight, *chosen, shared=2, bias_EO=bias, weights=weights, tile=tile)
    for expert in (0, 2):
        token, place = torch.where(ids == expert)
        want = (x[token].double() @ weight.of(expert).double().t() + bias[expert].double()) * weights[
            token, place, None
        ]
        assert_near(got[token * 2 + place], want.half())


@pytest.mark.parametrize(("num_tokens", "sliced"), [(1, False), (9, False), (14, False), (12, True)])
@pytest.mark.parametrize("ordered", [False, True])
def test_experts_of_whole_numbers(
    num_tokens: int,
    sliced: bool,
    ordered: bool,
    device: torch.device,
    assert_near: Near,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Experts of GPTQ and AWQ stay packed; for long prompts some of them at a time become plain."""
    monkeypatch.setattr(moe_int, "SLICES_FROM", 4 if sliced else 1000)
    monkeypatch.setattr(moe_int, "SLICE_BYTES", 2 * 64 * 128 * 2)  # two experts of gate and up
    gate_up = in_groups(3, 64, 128, device, bits=4, group=64, ordered=ordered)
    down = in_groups(3, 128, 32, device, bits=4, group=32, ordered=ordered)
    x = torch.randn(num_tokens, 128, device=device).half()
    ids, weights = choices(num_tokens, 2, 3, device)
    ids[3:5, 1] = -1  # experts of another rank
    biases = {"gate_up_bias_EI": torch.randn(3, 64, device=device).half()}
    got = moe_gemm.experts(x, gate_up, down, ids, weights, **biases)
    plain = [torch.stack([weight.of(expert) for expert in range(3)]).double() for weight in (gate_up, down)]
    exact = {key: value.double() for key, value in biases.items()}
    assert_near(got, moe_reference.experts(x.double(), *plain, ids, weights, **exact))
    mixed = moe_gemm.experts(x, gate_up, plain[1].to(x.dtype), ids, weights, **biases)  # a cut left too small groups
    assert_near(mixed, moe_reference.experts(x.double(), *plain, ids, weights, **exact))
    same = moe_reference.experts(x.double(), gate_up, down, ids, weights, **exact)
    torch.testing.assert_close(same, moe_reference.experts(x.double(), *plain, ids, weights, **exact))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 9, 60, 110, 200, 900])
@pytest.mark.parametrize(
    ("bits", "group", "ordered"), [(4, 128, False), (4, 32, False), (4, 64, True), (8, 128, False)]
)
def test_experts_of_whole_numbers_in_bfloat16(
    num_tokens: int, bits: int, group: int, ordered: bool, device: torch.device, assert_near: Near
) -> None:
    """The sizes that a server launches, of published widths, scales in float16 as their files have them."""
    gate_up = in_groups(4, 1536, 2048, device, bits=bits, group=group, ordered=ordered)
    down = in_groups(4, 2048, 768, device, bits=bits, group=group)
    x = torch.randn(num_tokens, 2048, device=device).bfloat16() / 30
    ids, weights = choices(num_tokens, 2, 4, device)
    got = moe_gemm.experts(x, gate_up, down, ids, weights)
    assert_near(got, moe_reference.experts(x.double(), gate_up, down, ids, weights).bfloat16())


@pytest.mark.parametrize("rows", [16, 32])
def test_rows_are_picked_in_the_order_of_their_experts(rows: int, device: torch.device) -> None:
    """One row for each choice; an order may name an input twice, where groups were filled up."""
    ids = torch.tensor([[0, 2]] * 17 + [[2, -1]] * 3, dtype=torch.int32, device=device)
    x = torch.randn(20, 40, device=device).half()
    weight = in_groups(3, 16, 64, device, bits=4, group=32)
    order = torch.randint(0, 40, (3, 64), dtype=torch.int32, device=device)
    chosen = (*moe_gemm.group_tokens(ids, 3, rows), ids.numel())
    got, plainly = moe_int.pick(x, weight._replace(order_EJ=order), *chosen, shared=2)
    assert plainly.order_EJ is None
    for place, expert in enumerate(ids.flatten().tolist()):
        if expert >= 0:
            assert torch.equal(got[place], x[place // 2][order[expert].long()])


ROUTERS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "mixtral": (8, 2, {"renormalise": True}),
    "qwen2": (60, 4, {}),
    "gpt-oss": (128, 4, {"scoring": "softmax_after"}),
    "deepseek v2": (160, 6, {"num_groups": 8, "top_groups": 3, "scaling_factor": 16.0}),
    "deepseek v3": (256, 8, {"scoring": "sigmoid", "num_groups": 8, "top_groups": 4, "group_score": "top2",
        "renormalise": True, "scaling_factor": 2.5}),
    "one of three": (3, 1, {"scoring": "sigmoid"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("corrected", [False, True])
def test_experts_are_chosen(kind: str, corrected: bool, device: torch.device, assert_near: Near) -> None:
    """All kinds of routers: the same experts with the same weights, whatever their order."""
    num_experts, top_k, options = ROUTERS[kind]
    num_tokens = 21 if device.type == "cuda" else 5  # a program each; the interpreter takes 0.2 s for one
    logits = torch.randn(num_tokens, num_experts + 5, device=device)[:, :num_experts]
    if corrected and options.get("scoring") != "softmax_after":
        options = options | {"correction_E": torch.rand(num_experts, device=device) * 0.1}
    ids, weights = moe_route.choose_experts(logits, top_k, **options)
    want_ids, want_weights = moe_reference.choose_experts(logits, top_k, **options)
    order, want_order = ids.argsort(-1), want_ids.argsort(-1)
    assert torch.equal(ids.gather(1, order), want_ids.gather(1, want_order))
    assert_near(weights.gather(1, order), want_weights.gather(1, want_order))


def test_a_sigmoid_router_chooses_within_groups_and_by_the_correction() -> None:
    """DeepSeek V3: the correction moves the choice, never the weight; groups are judged by their two best."""
    logits = torch.tensor([[2.0, -9.0, 1.0, 1.0, 0.5, 0.4, -3.0, -3.0]])
    options = {"scoring": "sigmoid", "num_groups": 4, "group_score": "top2"}
    ids, weights = moe_reference.choose_experts(logits, 2, top_groups=2, renormalise=True, **options)
    assert sorted(ids[0].tolist()) == [2, 3]  # 0 is the best of all, but its group is the third
    torch.testing.assert_close(weights, torch.full((1, 2), 0.5))
    correction = torch.tensor([0.0, 0.9, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    ids, weights = moe_reference.choose_experts(
        logits, 2, top_groups=1, correction_E=correction, scaling_factor=2.5, **options
    )
    assert sorted(ids[0].tolist()) == [0, 1]
    torch.testing.assert_close(weights[ids == 0], 2.5 * logits[0, :1].sigmoid())
