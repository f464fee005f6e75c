"""A norm whose length comes with the product before it, in plain torch, beside two products and a norm between."""

import pytest
import torch

from argosy.kernels import norm_ahead, reference
from argosy.kernels.norm_ahead import NormAhead


@pytest.mark.parametrize("gated", [False, True])
def test_the_length_of_a_row_is_made_of_all_its_tiles_and_epsilon(gated: bool) -> None:
    """Rows so short that epsilon counts; what stood in the room before does not."""
    torch.manual_seed(0)
    x, residual = torch.randn(5, 24), 0.1 * torch.randn(5, 48)
    weight, next_weight = 0.01 * torch.randn(48, 24), torch.randn(20, 48)
    norm, eps = torch.randn(48), 0.05
    after = reference.fused_linear(x, weight, residual_TO=residual.clone())
    want = reference.fused_linear(after, next_weight, norm_weight_I=norm, eps=eps, gated=gated)
    ahead = NormAhead(torch.full((5, 48), float("nan")), torch.full((3, 64), float("nan")), norm, eps)
    got = norm_ahead.fused_linear(x, weight, residual_TO=residual, ahead=ahead)
    torch.testing.assert_close(got, after)
    torch.testing.assert_close(norm_ahead.fused_linear(residual, next_weight, normed=ahead, gated=gated), want)
