"""How a linear layer stores and multiplies its weight. A weight format is a class; layers never name one.

T = tokens, I = inputs, O = outputs, both of this rank.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from argosy.cluster.protocol.errors import UnsupportedModel
from argosy.kernels import norm_ahead, ops, step_ops
from argosy.kernels.cpu_steps import CpuSteps
from argosy.kernels.fp8_reference import Fp8Rows, Rounding
from argosy.kernels.norm_ahead import NormAhead

MAX_TRANSPOSED_TOKENS = (16, 4)  # as long as the second copy beats the plain weight; the packed one
MAX_TRANSPOSED_NUMBERS = 1 << 21  # larger weights are worth 8 MiB of memory more than some microseconds


class Cut(NamedTuple):
    """How a tensor of a checkpoint comes into a parameter of this rank: which part of it, and to which rows."""

    full_shape: tuple[int, ...]
    source: tuple[slice, ...]  # this rank's part, one slice an axis
    target_rows: slice | tuple[int | slice, ...] = slice(None)  # where it goes in the parameter, from its first axis on
    arrange: Callable[[Tensor], Tensor] | None = None  # from the part as it is read to what goes there
    # of packed weights alone
    store: Callable[[Tensor], None] | None = None  # puts what is read where it belongs, where that is several places
    dtypes: tuple[str, ...] = ()  # names in the files; empty: plain numbers
    other_shapes: tuple[tuple[int, ...], ...] = ()  # that mean the same
    aliases: tuple[str, ...] = ()  # other last words of the name in some checkpoints
    dummy: float | None = None  # what random weights have here

    @property
    def packs(self) -> bool:
        """Whether the parameter holds other numbers than the model computes with."""
        return self.store is not None or bool(self.dtypes)


def empty_parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """A parameter without memory: it gets some when the checkpoint was found to be sound."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


class LinearLayer(nn.Module):
    """What a method works on. Plain weights are in `weight`, or in `packed_weight` once repacked."""

    weight: Tensor | None
    bias: Tensor | None
    packed_weight: Tensor | None
    transposed_weight: Tensor | None  # a second copy, for a few tokens
    packed_outputs: int  # of a weight packed by `native`
    native: CpuSteps | None = None  # compiled products, on a CPU that has a compiler; they have packed the weight
    weight_scale: Tensor | None  # of packed formats
    input_scale: Tensor | None
    words: Tensor | None  # of weights of 4 or 8 bits, with `scale_zero`
    scale_zero: Tensor | None


class Fusion(NamedTuple):
    """What a product for a few tokens does besides: `ops.fused_linear`."""

    norm_weight_I: Tensor | None = None
    eps: float = 1e-6
    residual_TO: Tensor | None = None
    gated: bool = False
    out_TO: Tensor | None = None  # where to, if there is no residual
    normed: NormAhead | None = None  # what the product before left, in the place of the inputs and their norm
    ahead: NormAhead | None = None  # what to leave for the product behind
    in_pieces: bool = False  # `out_TO` may be left alone, and float32 [P, T, O] be given, which adds up to it


class LinearMethod(Protocol):
    """One weight format."""

    def create(self, layer: LinearLayer, num_in: int, num_out: int, *, bias: bool, dtype: torch.dtype) -> None:
        """Give `layer` the parameters of the format."""

    def cuts(self, weight: Cut) -> dict[str, Cut]:
        """From the cut of the plain weight to that of each stored tensor, by its name in the checkpoint."""

    def finish(self, layer: LinearLayer) -> None:
        """All parts are loaded: bring them into the form that multiplies fastest."""

    def rounding(self, layer: LinearLayer, x_TX: Tensor) -> Rounding | None:
        """How `apply` rounds as many inputs as `x_TX` has rows: whoever makes them may do it. None: it doesn't."""

    def apply(self, layer: LinearLayer, x_TI: Tensor | Fp8Rows) -> Tensor:
        """x W^T + bias; inputs come rounded only where `rounding` asked for it."""

    def fuses(self, layer: LinearLayer, x_TI: Tensor) -> bool:
        """Whether `apply_fused` is the faster way for these inputs."""

    def apply_fused(self, layer: LinearLayer, x_TI: Tensor, fusion: Fusion) -> Tensor:
        """x W^T + bias together with what stands before and after it; only where `fuses`."""


class UnquantizedMethod:
    """The weight as it is; on a CPU repacked for oneDNN where that was measured to be faster."""

    def create(self, layer: LinearLayer, num_in: int, num_out: int, *, bias: bool, dtype: torch.dtype) -> None:
        """`weight` [O, I] and, if asked for, `bias` [O]."""
        layer.weight = empty_parameter(num_out, num_in, dtype=dtype)
        layer.bias = empty_parameter(num_out, dtype=dtype) if bias else None
        layer.packed_weight = layer.transposed_weight = None

    def cuts(self, weight: Cut) -> dict[str, Cut]:
        """Only the weight itself."""
        return {"weight": weight}

    def finish(self, layer: LinearLayer) -> None:
        """Repack on a CPU; the plain weight is let go."""
        weight = layer.weight
        assert weight is not None
        if layer.native is not None and layer.native.packs(weight):
            layer.packed_weight, layer.packed_outputs = layer.native.pack(weight.data), weight.shape[0]
            layer.weight = None
            return
        layer.native = None
        if _is_worth_transposing(weight):
            layer.transposed_weight = weight.data.t().contiguous()
        if _is_better_packed(weight):
            layer.packed_weight = torch.ops.mkldnn._reorder_linear_weight(weight.data, 1)
            layer.weight = None

    def rounding(self, layer: LinearLayer, x_TX: Tensor) -> Rounding | None:
        """Inputs stay as they are."""
        return None

    def apply(self, layer: LinearLayer, x_TI: Tensor | Fp8Rows) -> Tensor:
        """One matrix product."""
        assert isinstance(x_TI, Tensor)
        packed = layer.packed_weight
        if layer.native is not None:
            assert packed is not None
            return layer.native.linear(x_TI, packed, layer.packed_outputs, layer.bias)
        if layer.transposed_weight is not None and x_TI.shape[0] <= MAX_TRANSPOSED_TOKENS[packed is not None]:
            if layer.bias is None:
                return torch.mm(x_TI, layer.transposed_weight)
            return torch.addmm(layer.bias, x_TI, layer.transposed_weight)
        if packed is not None:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, packed, layer.bias, "none", _NO_SCALARS, "")
            return product
        assert layer.weight is not None
        return F.linear(x_TI, layer.weight, layer.bias)

    def fuses(self, layer: LinearLayer, x_TI: Tensor) -> bool:
        """On a GPU, in 16 bits: one launch for a few tokens; for many, cuBLAS adds to the residual for nothing.

        (The norm of 8192 tokens of 4096 then takes 33 us, where it took 67 with the addition.)
        """
        return x_TI.is_cuda and x_TI.element_size() == 2

    def apply_fused(self, layer: LinearLayer, x_TI: Tensor, fusion: Fusion) -> Tensor:
        """One launch, with the norm before it and the gate or the addition after it."""
        assert layer.weight is not None
        if fusion.normed is not None or fusion.ahead is not None:
            return norm_ahead.fused_linear(
                x_TI, layer.weight, layer.bias, residual_TO=fusion.residual_TO, gated=fusion.gated,
                normed=fusion.normed, ahead=fusion.ahead,
            )  # fmt: skip
        if fusion.in_pieces and fusion.out_TO is not None:
            return step_ops.part_of_sum(x_TI, layer.weight, layer.bias, fusion.out_TO)
        return ops.fused_linear(
            x_TI,
            layer.weight,
            layer.bias,
            norm_weight_I=fusion.norm_weight_I,
            eps=fusion.eps,
            residual_TO=fusion.residual_TO,
            gated=fusion.gated,
            out_TO=fusion.out_TO,
        )


_NO_SCALARS: list[float] = []


def count_products(model: nn.Module) -> tuple[int, int]:
    """(linear layers, numbers in their weights) of a model that is loaded."""
    layers = [layer for layer in model.modules() if isinstance(layer, LinearLayer)]
    weights = [layer.weight if layer.packed_weight is None else layer.packed_weight for layer in layers]
    return len(layers), sum(weight.numel() for weight in weights if weight is not None)


def _is_better_packed(weight: Tensor) -> bool:
    """Whether oneDNN's blocked layout beats rows on this CPU tensor.

    One core of a Zen 4, microseconds plain -> packed: bf16 (9728, 896) 1 row 1743 -> 916, 32 rows 4051 -> 2879;
    (768, 256) 1 row 30 -> 19. float32 (9728, 896) 1 row 2410 -> 1836, 8 rows 5009 -> 3588, but (768, 256) 17 -> 26.
    """
    if weight.device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32 and weight.numel() >= 1 << 19


def _is_worth_transposing(weight: Tensor) -> bool:
    """Whether a small CPU tensor is read faster with its longer side contiguous, for a few tokens.

    One core of a Zen 4, float32, weights from beyond its own cache, microseconds by rows -> transposed: (1024, 256)
    1 row 125 -> 32, 8 rows 162 -> 132, 32 rows 333 -> 396; (1376, 256) 152 -> 34, 303 -> 171, 467 -> 623; (4096, 256)
    packed -> transposed, 1 row 108 -> 89. Where there are fewer outputs than inputs, rows are better: (256, 688)
    19 -> 77. 16 bits are packed, which is better still.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return False
    num_out, num_in = weight.shape
    return num_out > num_in and weight.numel() <= MAX_TRANSPOSED_NUMBERS


LINEAR_METHODS: dict[str | None, type[LinearMethod]] = {None: UnquantizedMethod}


def linear_method_for(quantization: str | None) -> LinearMethod:
    """The method of a format's name; None is the plain weight."""
    if quantization not in LINEAR_METHODS:
        known = ", ".join(str(name) for name in LINEAR_METHODS)
        raise UnsupportedModel("config.json", "quantization_config", f"{quantization!r}: supported: {known}")
    return LINEAR_METHODS[quantization]()
