"""MXFP4 as checkpoints store it: e2m1 numbers, two in a byte, and a power of two for each 32 of them (OCP MX v1.0)."""

import torch
from torch import Tensor

BLOCK = 32  # numbers that share a scale
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
BIAS = 127  # of a scale's exponent


def unpack(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [.., B, 16] and [.., B] to numbers [.., B * 32]; the low half of a byte comes first. Exact in bfloat16."""
    values = torch.tensor(E2M1, dtype=dtype, device=packed.device)
    numbers = torch.stack((values[(packed & 15).long()], values[(packed >> 4).long()]), dim=-1).flatten(-2)
    exponents = (scales.int() - BIAS)[..., None]
    return torch.ldexp(numbers, exponents).flatten(-2).to(dtype)
