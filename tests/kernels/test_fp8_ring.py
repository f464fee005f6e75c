"""The ring of e4m3 weights against its meaning: widths that no tile divides, tiles that programs share, pieces.

Its language has no interpreter: the products need a card. What chooses it and what adds up its pieces does not.
"""

from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from argosy.kernels import fp8_gemm, fp8_ops, fp8_quantize, fp8_reference, fp8_ring, tuning
from argosy.kernels.fp8_reference import Rounding

Near = Callable[[Tensor, Tensor], None]
SIZES = (
    {"rows": 64, "width": 256, "stages": 6, "programs": 0, "early": 2},
    {"rows": 64, "width": 128, "stages": 3, "programs": 7, "early": 1},
    {"rows": 128, "width": 128, "stages": 6, "programs": 132, "early": 0},
    {"rows": 128, "width": 256, "stages": 2, "programs": 264, "early": 2},
    {"rows": 64, "width": 128, "stages": 12, "programs": 0, "early": 2, "pieces": 4},
)
SHAPES = ((4096, 6144), (14336, 4096), (512, 200), (1040, 72), (272, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("num_inputs", "num_outputs"), SHAPES)
def test_a_product_is_what_it_means(
    num_inputs: int, num_outputs: int, sizes: Mapping[str, int], device: torch.device, assert_near: Near
) -> None:
    """Again and again with the same bits, whoever is last; the counters are zero for the next launch."""
    weight = fp8_reference.quantize_weight(torch.randn(num_outputs, num_inputs, device=device) / 64)
    bias = torch.randn(num_outputs, device=device).bfloat16()
    for num_tokens in (1, 8, 13) if sizes is not SIZES[0] else (7, 8, 32):
        x = torch.randn(num_tokens, num_inputs, device=device).bfloat16()
        x[0] *= 20
        rows = fp8_quantize.quantize(x, Rounding())
        assert fp8_ring.takes(rows, weight, torch.bfloat16)
        for kept in (None, bias) if num_tokens == 8 else (None,):
            want = fp8_reference.linear(rows, weight, kept, torch.bfloat16)
            made = [fp8_ring.linear(rows, weight, kept, torch.bfloat16, sizes) for _ in range(3)]
            assert_near(made[0], want)
            assert all(torch.equal(made[0], other) for other in made[1:])
        if sizes.get("pieces", 1) > 1 and num_inputs % (128 * 4) == 0:
            pieces = fp8_ring.linear(rows, weight, None, torch.bfloat16, sizes, pieces=True)
            assert pieces.shape == (4, num_tokens, num_outputs)
            assert_near(pieces.sum(0).bfloat16(), fp8_reference.linear(rows, weight, None, torch.bfloat16))
    assert not tuning.counters(device).any()


def test_pieces_are_added_to_the_residual_as_their_sum_would_be(device: torch.device) -> None:
    """Rounded to the residual's numbers first, so that whether a product leaves pieces changes no bit."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    pieces = torch.randint(-64, 64, (3, 5, 200), device=device).float() / 8  # sums of these are exact
    residual, norm = (torch.randn(*s, device=device).to(dtype) for s in ((5, 200), (200,)))
    others = residual.clone()
    got = fp8_quantize.quantize(pieces, Rounding(), norm_weight_I=norm, eps=1e-5, residual_TI=residual)
    want = fp8_quantize.quantize(pieces.sum(0).to(dtype), Rounding(), norm_weight_I=norm, eps=1e-5, residual_TI=others)
    assert torch.equal(residual, others)
    assert torch.equal(got.values_TI.float(), want.values_TI.float())
    assert torch.equal(got.scale_TG, want.scale_TG)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize(("num_inputs", "inner"), [(4096, 1536), (272, 128), (1040, 640)])
def test_a_gate_comes_with_its_product(
    num_inputs: int, inner: int, rows: int, device: torch.device, assert_near: Near
) -> None:
    """Gate and up of the same outputs by the same program; a tile of both kinds of rows is refused."""
    weight = fp8_reference.quantize_weight(torch.randn(2 * inner, num_inputs, device=device) / 16)
    sizes = {"kernel": fp8_gemm.RING, **SIZES[0], "rows": rows, "stages": 3, "gated": 1}
    for num_tokens, bias in ((1, None), (8, torch.randn(2 * inner, device=device).bfloat16()), (11, None)):
        x = fp8_quantize.quantize(torch.randn(num_tokens, num_inputs, device=device).bfloat16(), Rounding())
        gate, up = fp8_reference.linear(x, weight, bias, torch.float32).chunk(2, dim=1)
        got = fp8_gemm.gated_linear(x, weight, bias, torch.bfloat16, sizes)
        assert got is not None
        assert_near(got, F.silu(gate) * up)
    narrow = fp8_reference.quantize_weight(torch.randn(2 * 96, num_inputs, device=device))
    assert fp8_gemm.gated_linear(x, narrow, None, torch.bfloat16, sizes) is None
    assert fp8_gemm.gated_linear(x, weight, None, torch.bfloat16, {**sizes, "gated": 0}) is None


@pytest.mark.gpu
def test_shapes_that_the_copy_engine_cannot_fetch_go_elsewhere(device: torch.device, assert_near: Near) -> None:
    """Sizes may name the ring for a shape; blocks, and rows that 16 does not divide, are multiplied all the same."""
    sizes = {"kernel": fp8_gemm.RING, **SIZES[0]}
    for num_inputs, block in ((200, None), (512, (128, 128))):
        weight = fp8_reference.quantize_weight(torch.randn(72, num_inputs, device=device), block)
        rows = fp8_ops.quantize_rows(
            torch.randn(3, num_inputs, device=device).bfloat16(), Rounding(128 if block else 0)
        )
        assert not fp8_ring.takes(rows, weight, torch.bfloat16)
        got = fp8_gemm.linear(rows, weight, None, torch.bfloat16, sizes)
        assert_near(got, fp8_reference.linear(rows, weight, None, torch.bfloat16))
