"""A norm between two products for a few tokens that takes no launch of its own.

What adds to the residual also leaves it times the norm's weight, and the squares that each of its tiles adds up; the
product behind it multiplies its sums by the length that these give. The door for both (`gemv_split` on a GPU):

    ahead = between(residual, o_weight, gate_up_weight, norm_weight, eps)     # None: a norm of its own
    fused_linear(seen, o_weight, residual_TO=residual, ahead=ahead)           # residual += seen o^T
    inner = fused_linear(residual, gate_up_weight, normed=ahead, gated=True)  # gate and up of norm(residual)
"""

from typing import NamedTuple

from torch import Tensor

from argosy.kernels import reference


class NormAhead(NamedTuple):
    """The norm of a residual [T, D], but for the length of its rows."""

    values_TD: Tensor  # the residual times the norm's weight
    squares_PT: Tensor  # float32: what each tile of the product that adds left of each token; T is padded
    weight_D: Tensor  # of the norm
    eps: float


def between(
    residual_TD: Tensor, weight_DI: Tensor, next_weight_OD: Tensor, norm_weight_D: Tensor, eps: float
) -> NormAhead | None:
    """Room for the norm between a product that adds to the residual and the next one, for both to be told of; None
    where either is not multiplied by a kernel that knows of it."""
    if not residual_TD.is_cuda:
        return None
    from argosy.kernels import gemv

    return gemv.norm_ahead(residual_TD, weight_DI, next_weight_OD, norm_weight_D, eps)


def fused_linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    *,
    residual_TO: Tensor | None = None,
    gated: bool = False,
    normed: NormAhead | None = None,
    ahead: NormAhead | None = None,
) -> Tensor:
    """`ops.fused_linear` of `normed`, which the product before left, in the place of x; leaves `ahead` besides."""
    if x_TI.is_cuda:
        from argosy.kernels import gemv

        return gemv.fused_linear(
            x_TI, weight_OI, bias_O, residual_TO=residual_TO, gated=gated, normed=normed, ahead=ahead
        )  # fmt: skip
    if normed is not None:
        square_T1 = normed.squares_PT.sum(0)[: x_TI.shape[0], None] / x_TI.shape[1]
        x_TI = (normed.values_TD.float() * (square_T1 + normed.eps).rsqrt()).to(x_TI.dtype)
    y_TO = reference.fused_linear(x_TI, weight_OI, bias_O, residual_TO=residual_TO, gated=gated)
    if ahead is not None:
        ahead.values_TD.copy_(y_TO.float() * ahead.weight_D.float())
        ahead.squares_PT.zero_()[0, : len(y_TO)] = y_TO.float().square().sum(1)
    return y_TO
