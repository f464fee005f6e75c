"""FP8 kernels against their meaning: every form of scale, every fusion, on widths that no tile divides.

Under the interpreter the tensor core products are of float16; on the card of bf16, and cuBLAS is compared too.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from argosy.kernels import fp8_gemm, fp8_gemv, fp8_ops, fp8_quantize, fp8_reference, fp8_split, tuning
from argosy.kernels.fp8_reference import Fp8Rows, Rounding

Near = Callable[[Tensor, Tensor], None]
GPU = pytest.mark.gpu
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=GPU)]
BLOCKS = [None, (128, 128), (1, 128), (128, 64), (1, 32)]


def close(got: Fp8Rows, want: Fp8Rows) -> None:
    """Equal scales; equal values but for a few that a last bit of the norm or the scale rounds to the neighbour."""
    torch.testing.assert_close(got.scale_TG, want.scale_TG, rtol=2e-3, atol=1e-9)
    a, b = (x.values_TI.float() for x in (got, want))
    assert a.shape == b.shape
    differs = a != b
    assert not a.isnan().any()
    assert float(differs.float().mean()) < 0.05
    # neighbours: an eighth of the value, or the spacing of the smallest
    near = (a - b).abs() <= b.abs() * 0.126 + 0.002
    if not a.is_cuda:  # Triton's interpreter drops the carry where rounding reaches a power of two
        near |= a * 2 == b
    assert bool(near[differs].all())


def rounding_of(form: str, device: torch.device) -> Rounding:
    return {
        "token": Rounding(),
        "group": Rounding(group=128),
        "group 32": Rounding(group=32),
        "fixed": Rounding(scale=torch.tensor([0.004], device=device)),
    }[form]


@pytest.mark.parametrize("form", ["token", "group", "group 32", "fixed"])
@pytest.mark.parametrize("before", ["nothing", "norm", "add and norm", "silu", "gelu"])
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 64), (3, 200), pytest.param(257, 14336, marks=GPU)])
def test_activations_are_rounded_with_what_makes_them(
    num_tokens: int, width: int, before: str, form: str, device: torch.device
) -> None:
    """A fixed scale is too small for some of them: those become the largest number, not infinity."""
    rounding, dtype = rounding_of(form, device), torch.bfloat16 if device.type == "cuda" else torch.float16
    x = torch.randn(num_tokens, width * 2 if before in ("silu", "gelu") else width, device=device).to(dtype)
    x[0, :8] = 0
    weight = torch.randn(width, device=device).to(dtype)
    residual = torch.randn(num_tokens, width, device=device).to(dtype) if before == "add and norm" else None
    want_residual = None if residual is None else residual.clone()
    if before in ("silu", "gelu"):
        got = fp8_quantize.quantize(x, rounding, gate=before)
        want = fp8_reference.gate_and_quantize(x, rounding, gelu=before == "gelu")
    elif before == "nothing":
        got, want = fp8_quantize.quantize(x, rounding), fp8_reference.quantize_rows(x, rounding)
    else:
        got = fp8_quantize.quantize(x, rounding, norm_weight_I=weight, eps=1e-5, residual_TI=residual)
        want = fp8_reference.norm_and_quantize(x, weight, 1e-5, rounding, want_residual)
    close(got, want)
    assert residual is None or torch.equal(residual, want_residual)


def test_a_row_of_zeros_stays_zero(device: torch.device) -> None:
    rows = fp8_quantize.quantize(torch.zeros(2, 64, device=device).bfloat16(), Rounding())
    assert not fp8_reference.dequantize_rows(rows).any()
    assert bool((rows.scale_TG > 0).all())


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "num_inputs", "num_outputs"),
    [(1, 128, 40), (18, 208, 130), *(pytest.param(*s, marks=GPU) for s in ((17, 4096, 6144), (300, 1000, 520),
                                                                           (2048, 14336, 4096)))],
)  # fmt: skip
def test_many_tokens(
    num_tokens: int, num_inputs: int, num_outputs: int, bias: bool, block: tuple[int, int] | None,
    device: torch.device, assert_near: Near,
) -> None:  # fmt: skip
    """Both sides rounded: what they mean is multiplied exactly."""
    rows = fp8_reference.quantize_rows(
        torch.randn(num_tokens, num_inputs, device=device), Rounding(block[1] if block else 0)
    )
    weight = fp8_reference.quantize_weight(torch.randn(num_outputs, num_inputs, device=device), block)
    bias_O = torch.randn(num_outputs, device=device).bfloat16() if bias else None
    want = fp8_reference.linear(rows, weight, bias_O, torch.float32)
    sizes = {"tokens": 16, "rows": 64, "band": 2, "stages": 1, "warps": 4} if device.type == "cpu" else None
    assert_near(fp8_gemm.triton_linear(rows, weight, bias_O, torch.bfloat16, sizes), want)
    split = {"tokens": 16, "rows": 64, "width": 64, "stages": 1, "warps": 4, "splits": 3, "prefetch": 0}
    assert_near(fp8_split.linear(rows, weight, bias_O, torch.bfloat16, split), want)
    assert_near(fp8_split.linear(rows, weight, bias_O, torch.bfloat16), want)
    assert not tuning.counters(device).any(), "counters must be zero again for the next launch"
    if device.type == "cuda" and fp8_gemm.library_takes(rows, weight, torch.bfloat16):
        assert_near(fp8_gemm.library_linear(rows, weight, bias_O, torch.bfloat16), want)
        if block is None:
            assert_near(fp8_gemm.rescaled_linear(rows, weight, bias_O, torch.bfloat16), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fused", ["nothing", "norm", "bias", "gate", "residual", "all"])
@pytest.mark.parametrize("num_tokens", [1, 5, 16])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    ("num_inputs", "num_outputs"),
    [(208, 40), (1024, 24), *(pytest.param(*s, marks=GPU) for s in ((4096, 6144), (14336, 4096)))],
)
def test_a_few_tokens(
    num_inputs: int, num_outputs: int, block: tuple[int, int] | None, num_tokens: int, fused: str,
    dtype: torch.dtype, device: torch.device, assert_near: Near,
) -> None:  # fmt: skip
    """16-bit activations, the weight as it is meant, with all that may be fused to it."""
    x = torch.randn(num_tokens, num_inputs, device=device).to(dtype)
    weight = fp8_reference.quantize_weight(torch.randn(num_outputs, num_inputs, device=device) / 20, block)
    gated = fused in ("gate", "all")
    bias = torch.randn(num_outputs, device=device).to(dtype) if fused in ("bias", "all") else None
    norm = torch.randn(num_inputs, device=device).to(dtype) if fused in ("norm", "all") else None
    residual = None
    if fused in ("residual", "all"):
        residual = torch.randn(num_tokens, num_outputs // (2 if gated else 1), device=device).to(dtype)
    assert fp8_gemv.suits(x, weight)
    exact = [None if y is None else y.float() for y in (bias, norm, residual)]
    want = fp8_reference.fused_linear(
        x.float(), weight, exact[0], norm_weight_I=exact[1], residual_TO=exact[2], gated=gated
    )
    for sizes in (None, {"kernel": 1, "rows": 64, "width": block[1] if block else 128, "stages": 2, "warps": 4,
                         "prefetch": 0, "early": 0, "swap": 1}):  # fmt: skip
        added = None if residual is None else residual.clone()
        got = fp8_gemv.fused_linear(x, weight, bias, norm_weight_I=norm, residual_TO=added, gated=gated, sizes=sizes)
        assert added is None or got is added
        assert_near(got, want)


@pytest.mark.parametrize("block", [(128, 64), (1, 32)])
def test_sizes_that_were_measured_for_other_blocks_are_left_alone(
    block: tuple[int, int], device: torch.device, assert_near: Near, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of 128 inputs do not fit blocks of 64: found on a card, whose table has shapes of models."""
    measured = {"kernel": 1, "rows": 16, "width": 128, "stages": 2, "warps": 4, "prefetch": 0, "early": 0}
    monkeypatch.setattr(fp8_gemv.tuning, "pick", lambda *_: measured)
    x = torch.randn(5, 256, device=device).to(DTYPES[0])
    weight = fp8_reference.quantize_weight(torch.randn(40, 256, device=device) / 20, block)
    assert_near(fp8_gemv.fused_linear(x, weight), fp8_reference.fused_linear(x.float(), weight))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 16, 17, 100])
@pytest.mark.parametrize("block", [None, (128, 128)])
@pytest.mark.parametrize("num_inputs", [512, 640])  # four and five groups: cuBLAS wants multiples of four
def test_the_door_gives_what_is_meant(
    num_tokens: int, num_inputs: int, block: tuple[int, int] | None, device: torch.device, assert_near: Near
) -> None:
    """Whatever way the measured sizes choose; rounding of activations is part of the meaning from 2 tokens on."""
    x = torch.randn(num_tokens, num_inputs, device=device).bfloat16()
    weight = fp8_reference.quantize_weight(torch.randn(256, num_inputs, device=device), block)
    rows = fp8_reference.quantize_rows(x, Rounding(block[1] if block else 0))
    assert_near(
        fp8_ops.linear(rows, weight, None, torch.bfloat16), fp8_reference.linear(rows, weight, None, torch.float32)
    )
    if num_tokens == 1:
        assert fp8_ops.keeps_16_bits(x, weight)
        assert_near(fp8_ops.fused_linear(x, weight), fp8_reference.fused_linear(x.float(), weight))
