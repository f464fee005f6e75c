"""RMSNorm and LayerNorm, alone and together with the addition before it. T = tokens, D = width.

On a CPU torch's own `rms_norm` is six operations of which each costs a microsecond or more; there are two norms a
layer. Microseconds on one core of a Zen 4, torch's -> ours: float32 (1, 256) 9.3 -> 6.1, (512, 896) 1323 -> 112;
bfloat16 (1, 256) 12.2 -> 6.3, (32, 256) 16.4 -> 13.8; from 32 x 896 on torch's is faster in bfloat16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from argosy.kernels import fp8_ops, ops
from argosy.kernels.cpu_steps import CpuSteps
from argosy.kernels.fp8_reference import Fp8Rows, Rounding
from argosy.workers.quantization.base import Cut, empty_parameter

MAX_MIRRORED = 8192  # numbers up to which the layer norm of (x, -x) is faster in 16 bits


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight; `plus_one`: the checkpoint has what the weight is more than 1 (Gemma)."""

    def __init__(self, width: int, eps: float, *, dtype: torch.dtype, plus_one: bool = False):
        super().__init__()
        self.width, self.eps, self.plus_one = width, eps, plus_one
        self.weight = empty_parameter(width, dtype=dtype)
        self._eps: Tensor | None = None  # both on a CPU only
        self._weight_twice: Tensor | None = None
        self.native: CpuSteps | None = None  # on a CPU, once it is compiled

    def cuts(self, part: str) -> dict[str, Cut]:
        """All of it, on every rank."""
        return {"weight": Cut((self.width,), (slice(None),))}

    def finish(self) -> None:
        """The weight is there."""
        if self.plus_one:
            # 1 + w needs more digits than w: on a GPU, whose kernels read any type, it keeps them
            self.plus_one = False
            whole = self.weight.data.float() + 1.0
            on_cpu = whole.device.type == "cpu"
            self.weight = nn.Parameter(whole.to(self.weight.dtype) if on_cpu else whole, requires_grad=False)
        if self.weight.device.type == "cpu":
            self._eps = torch.tensor(self.eps, dtype=torch.float32)
            self._weight_twice = torch.cat((self.weight, self.weight))

    def rounded(self, x_TD: Tensor, rounding: Rounding | None) -> Tensor | Fp8Rows:
        """`forward`, rounded for the product that follows where it asks for it, in one launch."""
        if rounding is None:
            return self.forward(x_TD)
        return fp8_ops.norm_and_quantize(x_TD, self.weight, self.eps, rounding)

    def add_rounded(self, x_TD: Tensor, residual_TD: Tensor, rounding: Rounding | None) -> Tensor | Fp8Rows:
        """`add`, rounded for the product that follows where it asks for it, in one launch."""
        if rounding is None:
            return self.add(x_TD, residual_TD)
        return fp8_ops.norm_and_quantize(x_TD, self.weight, self.eps, rounding, residual_TD)

    def forward(self, x_TD: Tensor) -> Tensor:
        """A new tensor."""
        if self._eps is None:
            return ops.rms_norm(x_TD, self.weight, self.eps)
        if self.native is not None and self.native.takes(x_TD):
            return self.native.rms_norm(x_TD, self.weight, self.eps)
        if x_TD.dtype == torch.float32:
            length_T1 = torch.linalg.vector_norm(x_TD, 2, -1, True)
            scale_T1 = torch.addcmul(self._eps, length_T1, length_T1, value=1.0 / self.width).rsqrt_()
            return (x_TD * scale_T1).mul_(self.weight)
        if x_TD.numel() <= MAX_MIRRORED:
            # (x, -x) has mean 0 and variance mean(x^2): the one fused norm that torch has for CPUs
            mirrored = torch.cat((x_TD, -x_TD), -1)
            return F.layer_norm(mirrored, (2 * self.width,), self._weight_twice, None, self.eps)[..., : self.width]
        return F.rms_norm(x_TD, (self.width,), self.weight, self.eps)

    def add(self, x_TD: Tensor, residual_TD: Tensor) -> Tensor:
        """`residual += x` in place, then its norm."""
        if self._eps is None:
            return ops.add_rms_norm(x_TD, residual_TD, self.weight, self.eps)[0]
        if self.native is not None and self.native.takes(x_TD) and self.native.takes(residual_TD):
            return self.native.rms_norm(residual_TD, self.weight, self.eps, x_TD)
        return self.forward(residual_TD.add_(x_TD))


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias, in float32 inside whatever the inputs are."""

    def __init__(self, width: int, eps: float, *, dtype: torch.dtype, bias: bool = True):
        super().__init__()
        self.width, self.eps = width, eps
        self.weight = empty_parameter(width, dtype=dtype)
        self.bias = empty_parameter(width, dtype=dtype) if bias else None

    def cuts(self, part: str) -> dict[str, Cut]:
        """All of it, on every rank."""
        whole = Cut((self.width,), (slice(None),))
        return {"weight": whole} | ({} if self.bias is None else {"bias": whole})

    def finish(self) -> None:
        """The weight is there."""

    def forward(self, x_TD: Tensor) -> Tensor:
        """A new tensor."""
        return F.layer_norm(x_TD, (self.width,), self.weight, self.bias, self.eps)

    def add(self, x_TD: Tensor, residual_TD: Tensor) -> Tensor:
        """`residual += x` in place, then its norm."""
        return self.forward(residual_TD.add_(x_TD))


def make_norm(kind: str, width: int, eps: float, *, dtype: torch.dtype) -> RMSNorm | LayerNorm:
    """A norm by its name in `ModelSpec.norm`."""
    if kind.startswith("layer"):
        return LayerNorm(width, eps, dtype=dtype, bias=kind == "layer")
    return RMSNorm(width, eps, dtype=dtype, plus_one=kind == "rms_plus_one")
