"""The gated activations: from [..., gate | up] to act(gate) * up."""

from collections.abc import Callable

from torch import Tensor

from argosy.kernels import ops

GATED_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": ops.silu_and_mul, "gelu_tanh": ops.gelu_and_mul}
