"""Where a CPU rank takes compiled code for products and for what stands between them."""

import torch
from torch import nn

from argosy.kernels.cpu_steps import open_cpu_steps
from argosy.workers.attention.base import AttentionBackend
from argosy.workers.attention.native_backend import NativeBackend
from argosy.workers.attention.torch_backend import TorchBackend
from argosy.workers.layers.norm import RMSNorm
from argosy.workers.models.decoder import GatedMLP
from argosy.workers.quantization.base import LinearLayer


def cpu_backend(model: nn.Module, dtype: torch.dtype, enforce_eager: bool) -> AttentionBackend:
    """Attention for this model, whose products, norms and gates learn of the same code. `enforce_eager`: torch alone.

    Before weights are loaded: products pack them.
    """
    steps = None if enforce_eager else open_cpu_steps(dtype)
    if steps is None:
        return TorchBackend()
    for module in model.modules():
        if isinstance(module, LinearLayer | RMSNorm | GatedMLP):
            module.native = steps
    return NativeBackend(steps)
