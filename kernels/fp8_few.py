"""A linear layer with an e4m3 weight for up to 16 tokens that rounds its inputs on their way to the tensor cores.

`gemv_split` with numbers of half the size: weights go from memory to the tensor cores as they are, and some columns of
a token at a time are rounded by their own largest number, which is finer than one scale for the whole token and needs
no launch before. So a layer of 8 rows has no launches for rounding, and none for its norms (`norm_ahead`).
"""

import torch
from torch import Tensor

from argosy.kernels import gemv_split, rms_norm, tuning
from argosy.kernels.fp8_reference import Fp8Weight, Rounding
from argosy.kernels.norm_ahead import NormAhead

MAX_TOKENS = 16


def sizes_of(num_tokens: int, weight: Fp8Weight) -> tuning.Sizes | None:
    """The sizes measured for so many tokens here; None: another way was faster, or nobody looked."""
    if weight.block is not None or not 0 < num_tokens <= MAX_TOKENS:
        return None
    num_outputs, num_inputs = weight.values_OI.shape
    key = f"{num_inputs}x{num_outputs}x{1 if num_tokens == 1 else MAX_TOKENS}"
    return tuning.pick("fp8_few", key, weight.values_OI.device)


def suits(x_TI: Tensor, weight: Fp8Weight, rounding: Rounding | None) -> bool:
    """Whether `fused_linear` takes these, and is the way: inputs that are rounded each token by what it has."""
    if rounding is None or rounding.group or rounding.scale is not None or x_TI.dtype != torch.bfloat16:
        return False
    if x_TI.stride(1) != 1 or weight.values_OI.stride(1) != 1 or weight.values_OI.shape[1] % 16:
        return False
    return sizes_of(x_TI.shape[0], weight) is not None


def fused_linear(
    x_TI: Tensor,
    weight: Fp8Weight,
    bias_O: Tensor | None = None,
    *,
    norm_weight_I: Tensor | None = None,
    eps: float = 1e-6,
    residual_TO: Tensor | None = None,
    gated: bool = False,
    out_TO: Tensor | None = None,
    normed: NormAhead | None = None,
    ahead: NormAhead | None = None,
    sizes: tuning.Sizes | None = None,
) -> Tensor:
    """One launch, and one for the norm unless it was `normed`; arguments as in `gemv.fused_linear`."""
    weight_OI, scale_O, block = weight
    num_tokens = x_TI.shape[0]
    num_rows = weight_OI.shape[0]
    assert block is None
    assert scale_O.dtype == torch.float32
    assert scale_O.is_contiguous()
    sizes = sizes or sizes_of(num_tokens, weight)
    assert sizes is not None
    if norm_weight_I is not None and normed is None:
        x_TI = rms_norm.rms_norm(x_TI, norm_weight_I, eps)
    assert residual_TO is None or out_TO is None
    out_TO = residual_TO if out_TO is None else out_TO
    if out_TO is None:
        num_outputs = num_rows // 2 if gated else num_rows
        out_TO = torch.empty((num_tokens, num_outputs), dtype=x_TI.dtype, device=x_TI.device)
    return gemv_split.linear(
        x_TI, weight_OI, bias_O, out_TO, sizes, gated=gated, residual=residual_TO is not None, normed=normed,
        ahead=ahead, scale_O=scale_O,
    )  # fmt: skip
