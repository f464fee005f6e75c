"""Norms of q and k that the attention kernels don't know: over all heads together, or a LayerNorm of each head.

T = tokens, N = heads of this rank, H = head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from argosy.placement.process_groups import ParallelContext
from argosy.workers.quantization.base import Cut, empty_parameter


class FullNorm(nn.Module):
    """RMS norm over all heads of the model together (OLMo2): the group adds up what its ranks' heads come to."""

    def __init__(self, parallel: ParallelContext, num_heads: int, head_size: int, eps: float, *, dtype: torch.dtype):
        super().__init__()
        self.parallel, self.width, self.eps = parallel, num_heads * head_size, eps
        self.own = max(1, num_heads // parallel.tp_size) * head_size
        self.first = parallel.rank.tp_rank * num_heads // parallel.tp_size * head_size
        self.copies = max(1, parallel.tp_size // num_heads)  # ranks that have the same head
        self.weight = empty_parameter(self.own, dtype=dtype)

    def cuts(self, part: str) -> dict[str, Cut]:
        """The weights of this rank's heads."""
        return {"weight": Cut((self.width,), (slice(self.first, self.first + self.own),))}

    def finish(self) -> None:
        """The weight is there."""

    def forward(self, x_TX: Tensor) -> Tensor:
        """A new tensor."""
        x = x_TX.float()
        squares_T1 = self.parallel.all_reduce(x.square().sum(-1, keepdim=True))
        normed = x * torch.rsqrt(squares_T1 / (self.width * self.copies) + self.eps)
        return normed.to(x_TX.dtype) * self.weight


class HeadLayerNorm(nn.Module):
    """LayerNorm of each head with weights of its own and no bias (Command-R)."""

    def __init__(self, parallel: ParallelContext, num_heads: int, head_size: int, eps: float, *, dtype: torch.dtype):
        super().__init__()
        self.num_heads, self.head_size, self.eps = num_heads, head_size, eps
        self.own = max(1, num_heads // parallel.tp_size)
        self.first = parallel.rank.tp_rank * num_heads // parallel.tp_size
        self.weight = empty_parameter(self.own, head_size, dtype=dtype)

    def cuts(self, part: str) -> dict[str, Cut]:
        """The weights of this rank's heads."""
        return {
            "weight": Cut((self.num_heads, self.head_size), (slice(self.first, self.first + self.own), slice(None)))
        }

    def finish(self) -> None:
        """The weight is there."""

    def forward(self, x_TX: Tensor) -> Tensor:
        """A new tensor."""
        x_TNH = x_TX.reshape(-1, self.own, self.head_size)
        normed = F.layer_norm(x_TNH.float(), (self.head_size,), None, None, self.eps) * self.weight.float()
        return normed.to(x_TX.dtype).view(x_TX.shape)
