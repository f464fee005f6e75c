"""Weights of 4 and 8 bits: what packing keeps, and products by kernels against plain torch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from argosy.kernels import packed_linear, packed_reference, reference

Near = Callable[[Tensor, Tensor], None]
SHAPES = [(4, 128, 256, 24), (4, 32, 96, 5), (4, 64, 320, 17), (8, 128, 384, 9), (8, 16, 48, 33)]


def make(bits: int, group: int, num_in: int, num_out: int, device: torch.device) -> packed_reference.PackedWeight:
    numbers = torch.randint(0, 1 << bits, (num_out, num_in), device=device)
    scale = torch.rand(num_out, num_in // group, device=device).half() / 8 + 0.01
    zero = torch.randint(0, 1 << bits, scale.shape, device=device).half()
    return packed_reference.pack(numbers, scale, zero, bits=bits, group=group)


@pytest.mark.parametrize(("bits", "group", "num_in", "num_out"), SHAPES)
def test_numbers_come_back_as_they_were_packed(bits: int, group: int, num_in: int, num_out: int) -> None:
    numbers = torch.randint(0, 1 << bits, (num_out, num_in))
    scale = torch.ones(num_out, num_in // group)
    weight = packed_reference.pack(numbers, scale, torch.zeros_like(scale), bits=bits, group=group)
    assert torch.equal(packed_reference.unpack(weight), numbers.int())
    assert torch.equal(packed_reference.dequantize(weight), numbers.float())


@pytest.mark.parametrize(("bits", "symmetric", "bound"), [(4, True, 0.5), (4, False, 0.51), (8, True, 0.5)])
def test_rounding_is_within_half_a_step(bits: int, symmetric: bool, bound: float) -> None:
    plain = torch.randn(7, 256)
    weight = packed_reference.quantize(plain, bits=bits, group=64, symmetric=symmetric)
    step = weight.scale_zero_OG2[..., 0].repeat_interleave(64, 1)
    off = (packed_reference.dequantize(weight) - plain).abs() / step
    assert float(off.max()) <= bound + 1e-3


@pytest.mark.parametrize(("bits", "group", "num_in", "num_out"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 19])
def test_a_product_is_that_of_the_plain_weight(
    bits: int, group: int, num_in: int, num_out: int, tokens: int, device: torch.device, assert_near: Near
) -> None:
    weight = make(bits, group, num_in, num_out, device)
    x, bias = torch.randn(tokens, num_in, device=device).half(), torch.randn(num_out, device=device).half()
    want = (x.double() @ packed_reference.dequantize(weight).double().t() + bias.double()).half()
    assert_near(packed_linear.linear(x, weight, bias), want)


def test_one_token_is_fused_with_norm_gate_and_residual(device: torch.device, assert_near: Near) -> None:
    weight = make(4, 64, 192, 26, device)
    x, norm = torch.randn(1, 192, device=device).half(), torch.rand(192, device=device).half()
    plain = packed_reference.dequantize(weight).half()
    want = reference.fused_linear(x, plain, norm_weight_I=norm, eps=1e-5, gated=True)
    assert_near(packed_linear.linear(x, weight, norm_weight_I=norm, eps=1e-5, gated=True), want)

    residual = torch.randn(1, 26, device=device).half()
    want = reference.fused_linear(x, plain, residual_TO=residual.clone())
    got = packed_linear.linear(x, weight, residual_TO=residual)
    assert got is residual
    assert_near(got, want)


def test_many_tokens_go_by_slices_of_plain_weight(
    device: torch.device, assert_near: Near, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_linear, "SLICE_BYTES", 7 * 128 * 2)
    weight = make(4, 32, 128, 23, device)
    x, bias = torch.randn(6, 128, device=device).half(), torch.randn(23, device=device).half()
    assert_near(packed_linear.linear(x, weight, bias), packed_reference.linear(x, weight, bias))


def test_long_groups_are_cut(device: torch.device) -> None:
    plain = torch.randn(5, 384, device=device)
    weight = packed_reference.quantize(plain, bits=4, group=-1)
    assert weight.group == 128
    assert torch.equal(weight.scale_zero_OG2[:, 0], weight.scale_zero_OG2[:, 2])
