"""The small linear against the reference: with all that may be fused to it, on widths that no tile divides."""

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from argosy.kernels import gemv, gemv_split, ops, reference, tuning

Near = Callable[[Tensor, Tensor], None]
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
SIZES = [
    (32, 96),
    (96, 40),
    (1024, 24),
    *(pytest.param(*s, marks=pytest.mark.gpu) for s in ((4096, 6144), (14336, 4096))),
]
# of a kernel that some tuned sizes name: a program norms nothing and has 16 tokens as the rows of its tile
TOKENS_AS_ROWS = {
    "kernel": 1, "rows": 16, "width": 256, "stages": 5, "warps": 4, "per_sm": 0, "prefetch": 2048, "early": 0,
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fused", ["nothing", "norm", "bias", "gate", "residual", "all"])
@pytest.mark.parametrize("num_tokens", [1, 5, 16])
@pytest.mark.parametrize(("num_inputs", "num_outputs"), SIZES)
def test_fused_linear(
    num_inputs: int, num_outputs: int, num_tokens: int, fused: str, dtype: torch.dtype, device: torch.device,
    assert_near: Near,
) -> None:  # fmt: skip
    x = torch.randn(num_tokens, num_inputs, device=device).to(dtype)
    weight = (torch.randn(num_outputs, num_inputs, device=device) / num_inputs**0.5).to(dtype)
    gated = fused in ("gate", "all")
    bias = torch.randn(num_outputs, device=device).to(dtype) if fused in ("bias", "all") else None
    norm = torch.randn(num_inputs, device=device).to(dtype) if fused in ("norm", "all") else None
    residual = None
    if fused in ("residual", "all"):
        residual = torch.randn(num_tokens, num_outputs // (2 if gated else 1), device=device).to(dtype)
    assert gemv.suits(x, weight)
    exact = [None if y is None else y.double().cpu() for y in (x, weight, bias, norm, residual)]
    want = reference.fused_linear(*exact[:3], norm_weight_I=exact[3], residual_TO=exact[4], gated=gated)
    for sizes in (None, TOKENS_AS_ROWS) if num_tokens > 1 else (None,):
        out = None if residual is None else residual.clone()
        got = gemv.fused_linear(x, weight, bias, norm_weight_I=norm, residual_TO=out, gated=gated, sizes=sizes)
        assert residual is None or got is out
        assert_near(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fused", ["norm", "bias", "gate", "residual", "all"])
@pytest.mark.parametrize(("num_tokens", "rows", "width", "splits"), [(2, 64, 64, 1), (33, 32, 128, 3), (64, 64, 64, 8)])
def test_linear_in_pieces_of_the_inputs(
    num_tokens: int, rows: int, width: int, splits: int, fused: str, dtype: torch.dtype, device: torch.device,
    assert_near: Near,
) -> None:  # fmt: skip
    """Tiles that outputs do not fill, a last piece that is shorter, twice: counters must be zero again."""
    num_inputs, num_outputs = 448, 200
    x = torch.randn(num_tokens, num_inputs, device=device).to(dtype)
    weight = (torch.randn(num_outputs, num_inputs, device=device) / num_inputs**0.5).to(dtype)
    gated = fused in ("gate", "all")
    bias = torch.randn(num_outputs, device=device).to(dtype) if fused in ("bias", "all") else None
    norm = torch.randn(num_inputs, device=device).to(dtype) if fused in ("norm", "all") else None
    sizes = {"kernel": gemv.SPLIT, "rows": rows, "width": width, "splits": splits, "stages": 3, "warps": 4}
    sizes |= {"prefetch": 256, "early": 0}
    for _ in range(2):
        residual = None
        if fused in ("residual", "all"):
            residual = torch.randn(num_tokens, num_outputs // (2 if gated else 1), device=device).to(dtype)
        exact = [None if y is None else y.double().cpu() for y in (x, weight, bias, norm, residual)]
        want = reference.fused_linear(*exact[:3], norm_weight_I=exact[3], residual_TO=exact[4], gated=gated)
        got = gemv.fused_linear(
            x, weight, bias, norm_weight_I=norm, residual_TO=residual, gated=gated, sizes=sizes
        )  # fmt: skip
        assert residual is None or got is residual
        assert_near(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "rows", "splits", "first"), [(2, 64, 1, 0), (9, 32, 3, 1), (16, 64, 2, 1), (33, 64, 4, 0)]
)
def test_a_norm_between_two_products_takes_no_launch(
    num_tokens: int, rows: int, splits: int, first: int, gated: bool, dtype: torch.dtype, device: torch.device,
    assert_near: Near,
) -> None:  # fmt: skip
    """o adds to the residual, gate and up multiply its norm; widths that no tile divides, a number of tiles that is no
    power of two, tokens that fill no tile; twice, since counters must be zero again."""
    num_inputs, hidden, num_outputs = 384, 328, 200
    weight = (torch.randn(hidden, num_inputs, device=device) / num_inputs**0.5).to(dtype)
    next_weight = (torch.randn(num_outputs, hidden, device=device) / hidden**0.5).to(dtype)
    bias, next_bias = (torch.randn(n, device=device).to(dtype) for n in (hidden, num_outputs))
    norm = torch.randn(hidden, device=device).to(dtype)
    sizes = {"kernel": gemv.SPLIT, "rows": rows, "width": 64, "splits": splits, "stages": 3, "warps": 4}
    sizes |= {"prefetch": 256, "early": 0, "first": first}
    for _ in range(2):
        x = torch.randn(num_tokens, num_inputs, device=device).to(dtype)
        residual = 3 * torch.randn(num_tokens, hidden, device=device).to(dtype)
        exact = [y.double().cpu() for y in (x, weight, bias)]
        want = reference.fused_linear(*exact, residual_TO=residual.double().cpu())
        ahead = gemv_split.ahead_for(residual, norm, 1e-2, sizes)
        got = gemv.fused_linear(x, weight, bias, residual_TO=residual, ahead=ahead, sizes=sizes)
        assert got is residual
        assert_near(got, want)
        exact = [y.double().cpu() for y in (residual, next_weight, next_bias, norm)]
        want = reference.fused_linear(*exact[:3], norm_weight_I=exact[3], eps=1e-2, gated=gated)
        got = gemv.fused_linear(residual, next_weight, next_bias, normed=ahead, gated=gated, sizes=sizes)
        assert_near(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("fused", ["norm", "gate", "residual", "all"])
@pytest.mark.parametrize(
    ("num_inputs", "num_outputs", "rows", "width", "stages", "warps", "early"),
    [
        (448, 200, 2, 512, 3, 4, 1), (4096, 6144, 4, 4096, 3, 8, 2), (7168, 4096, 1, 8192, 6, 4, 0),
        (1024, 600, 16, 1024, 4, 4, 0),
    ],
)  # fmt: skip
def test_one_token_by_weights_that_were_asked_for_ahead(
    num_inputs: int, num_outputs: int, rows: int, width: int, stages: int, warps: int, early: int, fused: str,
    device: torch.device, assert_near: Near,
) -> None:  # fmt: skip
    """Rows that do not fill the ring's width, fewer tiles than places, more than one round of programs; three launches
    behind each other, each reading what the one before wrote: only weights may be asked for before it ended."""
    sizes = {"kernel": gemv.AHEAD, "rows": rows, "width": width, "stages": stages, "warps": warps, "per_sm": 1}
    sizes |= {"early": early, "prefetch": 0}
    gated = fused in ("gate", "all")
    weight = (torch.randn(num_outputs, num_inputs, device=device) / num_inputs**0.5).bfloat16()
    back = (torch.randn(num_inputs, num_outputs // (2 if gated else 1), device=device) / 32).bfloat16()
    bias = torch.randn(num_outputs, device=device).bfloat16() if fused in ("bias", "all") else None
    norm = torch.randn(num_inputs, device=device).bfloat16() if fused in ("norm", "all") else None
    x = torch.randn(1, num_inputs, device=device).bfloat16()
    for _ in range(3):
        residual = None
        if fused in ("residual", "all"):
            residual = torch.randn(1, back.shape[1], device=device).bfloat16()
        exact = [None if y is None else y.double().cpu() for y in (x, weight, bias, norm, residual)]
        want = reference.fused_linear(*exact[:3], norm_weight_I=exact[3], residual_TO=exact[4], gated=gated)
        got = gemv.fused_linear(
            x, weight, bias, norm_weight_I=norm, residual_TO=residual, gated=gated, sizes=sizes
        )  # fmt: skip
        assert residual is None or got is residual
        assert_near(got, want)
        x = torch.nn.functional.linear(got, back).clamp_(-4, 4)


@pytest.mark.parametrize("num_rows", [96, 4096, 9216, 32768])
def test_sizes_that_nobody_measured_fit_any_card(num_rows: int) -> None:
    """227 KB on chip for a program of Hopper's, 99 for one of many cards before it and after; few tiles are cut into
    pieces, and a long row of one token's weights is not asked for as far ahead."""
    for overlaps, kilobytes in ((False, 99), (True, 99), (False, 163), (True, 227)):
        facts = tuning.DeviceFacts("some_card", 132, overlaps, shared_bytes=kilobytes * 1024)
        for num_inputs in (512, 4096, 14336, gemv.MAX_DEFAULT_INPUTS):
            alone = gemv._default_sizes(1, num_inputs, num_rows, facts)
            assert max(1, alone["stages"] - 1) * alone["rows"] * alone["width"] * 2 < kilobytes * 1024
            assert alone["stages"] == 3 or kilobytes == 99, "what was measured stays"
        sizes = gemv._default_sizes(8, 8192, num_rows, facts)
        assert sizes["kernel"] == gemv.SPLIT
        on_chip = sizes["stages"] * (sizes["rows"] + gemv.MAX_TOKENS) * sizes["width"] * 2
        assert on_chip < kilobytes * 1024
        tiles = -(-num_rows // sizes["rows"])
        assert tiles * sizes["splits"] <= 132 or sizes["splits"] == 1


def test_what_was_tuned_names_kernels_that_there_are() -> None:
    """Sizes outlive the kernels they were tuned for: those of one that was taken out would end a rank's first step."""
    for path in tuning.TUNED.glob("*.json"):
        for key, sizes in json.loads(path.read_text()).get("gemv", {}).items():
            num_inputs, _, num_tokens = map(int, key.split("x"))
            assert sizes["kernel"] in (0, 1, 2, gemv.SPLIT, gemv.AHEAD, gemv.RING), f"{path.name}: {key}"
            if sizes["kernel"] == gemv.RING:
                assert num_tokens > 1, f"{path.name}: {key}"
                assert num_inputs % (sizes["width"] * sizes["pieces"]) == 0, f"{path.name}: {key}"
            if sizes["kernel"] == gemv.AHEAD:
                assert num_tokens == 1, f"{path.name}: {key}"
                assert sizes["width"] >= num_inputs, f"{path.name}: {key}"


def test_only_a_few_16_bit_tokens_suit() -> None:
    weight = torch.zeros(8, 64, dtype=torch.float16)
    assert gemv.suits(torch.zeros(16, 64, dtype=torch.float16), weight)
    assert not gemv.suits(torch.zeros(17, 64, dtype=torch.float16), weight)
    assert not gemv.suits(torch.zeros(0, 64, dtype=torch.float16), weight)
    assert not gemv.suits(torch.zeros(1, 64), weight.float())
    assert not gemv.suits(torch.zeros(1, 63, dtype=torch.float16), torch.zeros(8, 63, dtype=torch.float16))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 16, 100])
@pytest.mark.parametrize("with_residual", [False, True])
def test_the_door_gives_the_same_through_the_library(
    num_tokens: int, with_residual: bool, device: torch.device, assert_near: Near
) -> None:
    x, weight = torch.randn(num_tokens, 512, device=device).bfloat16(), torch.randn(64, 512, device=device).bfloat16()
    norm = torch.randn(512, device=device).bfloat16()
    residual = torch.randn(num_tokens, 64, device=device).bfloat16() if with_residual else None
    want = reference.fused_linear(
        x.double(), weight.double(), norm_weight_I=norm.double(),
        residual_TO=None if residual is None else residual.double(),
    )  # fmt: skip
    assert_near(ops.fused_linear(x, weight, norm_weight_I=norm, residual_TO=residual), want)
