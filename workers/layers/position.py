"""Positions that are not rotations: a learned table, and ALiBi's slopes. T = tokens, D = width, N = heads."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from argosy.workers.quantization.base import Cut, empty_parameter


class LearnedPositions(nn.Module):
    """A vector for each position, added to the token's. `offset`: the row of position 0."""

    def __init__(self, rows: int, width: int, offset: int, *, dtype: torch.dtype):
        super().__init__()
        self.rows, self.width, self.offset = rows, width, offset
        self.weight = empty_parameter(rows, width, dtype=dtype)

    def cuts(self, part: str) -> dict[str, Cut]:
        """All of it, on every rank of the first stage."""
        return {"weight": Cut((self.rows, self.width), (slice(None), slice(None)))}

    def forward(self, positions_T: Tensor) -> Tensor:
        """[T, D]."""
        return F.embedding(positions_T + self.offset, self.weight)


def alibi_slopes(num_heads: int, largest: float = 8.0) -> Tensor:
    """What each head takes off its logits for a token of distance (Press et al. 2021). [N], float32.

    A geometric series over the next lower power of two; the heads beyond it get every other slope of the next higher.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-largest * (head + 1) / power) for head in range(power)]
    slopes += [2.0 ** (-largest * (2 * head + 1) / (2 * power)) for head in range(num_heads - power)]
    return torch.tensor(slopes, dtype=torch.float32)
