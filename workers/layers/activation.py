"""The activations: gated ones from [..., gate | up] to act(gate) * up, plain ones number by number."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from argosy.kernels import ops


def _gated(act: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return act(gate).mul_(up)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}
GATED_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": ops.silu_and_mul,
    "gelu_tanh": ops.gelu_and_mul,
    "gelu": partial(_gated, F.gelu),
    "relu": partial(_gated, F.relu),
}
