"""RMSNorm, alone and together with the addition before it. T = tokens, D = width."""

import torch
from torch import Tensor, nn

from argosy.kernels import ops
from argosy.workers.quantization.base import Cut, empty_parameter


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, width: int, eps: float, *, dtype: torch.dtype):
        super().__init__()
        self.eps = eps
        self.weight = empty_parameter(width, dtype=dtype)

    def cuts(self, part: str) -> dict[str, Cut]:
        """All of it, on every rank."""
        return {"weight": Cut(tuple(self.weight.shape), (slice(None),))}

    def forward(self, x_TD: Tensor) -> Tensor:
        """A new tensor."""
        return ops.rms_norm(x_TD, self.weight, self.eps)

    def add(self, x_TD: Tensor, residual_TD: Tensor) -> Tensor:
        """`residual += x` in place, then its norm."""
        return ops.add_rms_norm(x_TD, residual_TD, self.weight, self.eps)[0]
