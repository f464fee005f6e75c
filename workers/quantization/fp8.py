"""FP8 weights: stored so by the checkpoint, or rounded while a plain one is read. Scales by output row or by block.

A scale for a whole tensor becomes one for each of its rows: then q, k and v can have different ones in one product, and
every cut is a cut of rows. Blocks that a cut goes through keep their scale on both sides: such a rank has scales by row
(where a part begins inside a block) or by narrower columns (where its inputs do), with the same meaning number by
number. What is rounded here takes its scales from the whole tensor, so that every layout has the same weights.

On a GPU one token is multiplied in 16 bits, but where rounding it was measured to be faster; more are rounded, too. On
a CPU the weight is made plain again: e4m3 saves the file's bytes and the rounding is that of the checkpoint, the
arithmetic is that of the model's numbers.

T = tokens, I = inputs, O = outputs, both of this rank.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from argosy.cluster.protocol.quant_spec import WeightScheme
from argosy.kernels import fp8_ops, fp8_reference
from argosy.kernels.fp8_reference import E4M3, LARGEST, Fp8Rows, Fp8Weight, Rounding
from argosy.workers.quantization.base import Cut, Fusion, LinearLayer, UnquantizedMethod, empty_parameter

ALL = slice(None)
SCALE_DTYPES = ("F32", "BF16", "F16")
MIN_COLUMNS = 32  # of a group, for the tensor cores
DUMMY_SCALE = 8 * 0.02 / LARGEST  # random e4m3 numbers of a plausible spread become weights of 0.02
DUMMY_INPUT_SCALE = 0.1


class Fp8Method:
    """One layer's FP8 weight; every layer has a method of its own."""

    rounds_on_cpu = False  # for `benchmarks/quality`: what the GPU does to activations, on a CPU

    def __init__(self, scheme: WeightScheme, parts: Sequence[Cut]):
        """`parts`: the cuts of the plain weights that lie below each other in this layer."""
        self.scheme, self.parts = scheme, list(parts)
        self._plain: UnquantizedMethod | None = None  # once the weight is plain again
        self._weight: Fp8Weight | None = None
        self._rounding: Rounding | None = None
        self._dtype = torch.bfloat16
        self._block = self._own_block()

    def _own_block(self) -> tuple[int, int] | None:
        """The blocks of the scheme, or narrower ones where this rank's part begins inside of them."""
        if self.scheme.block is None:
            return None
        rows, columns = self.scheme.block
        aligned = all(
            part.arrange is None
            and isinstance(part.target_rows, slice)
            and (part.target_rows.start or 0) % rows == 0
            and (part.source[0].start or 0) % rows == 0
            for part in self.parts
        )
        first_column = max((part.source[1].start or 0) for part in self.parts)
        return rows if aligned else 1, math.gcd(columns, first_column)

    # ----------------------------------------------------------------------------------------------------- loading

    def create(self, layer: LinearLayer, num_in: int, num_out: int, *, bias: bool, dtype: torch.dtype) -> None:
        """`weight` [O, I] of e4m3, `weight_scale` in float32, `bias` [O] in the model's numbers."""
        self._layer, self._dtype = layer, dtype
        layer.weight = empty_parameter(num_out, num_in, dtype=E4M3)
        layer.bias = empty_parameter(num_out, dtype=dtype) if bias else None
        layer.packed_weight = layer.transposed_weight = None
        shape = (num_out,) if self._block is None else (-(-num_out // self._block[0]), -(-num_in // self._block[1]))
        layer.weight_scale = empty_parameter(*shape, dtype=torch.float32)
        layer.input_scale = None
        if self.scheme.activations == "static":
            layer.input_scale = empty_parameter(len(self.parts), dtype=torch.float32)

    def cuts(self, weight: Cut) -> dict[str, Cut]:
        """The weight and, where the checkpoint is packed, its scales."""
        if self.scheme.online:
            source = weight.source if self._is_rounded_by_itself(weight) else tuple(ALL for _ in weight.source)
            return {"weight": weight._replace(source=source, arrange=None, store=partial(self._round, weight))}
        found = {"weight": weight._replace(dtypes=("F8_E4M3",))}
        rows, columns = weight.full_shape
        shape: tuple[int, ...]
        others: tuple[tuple[int, ...], ...]
        if self.scheme.block is not None:
            shape, others = (-(-rows // self.scheme.block[0]), -(-columns // self.scheme.block[1])), ()
        elif self.scheme.weight == "channel":
            shape, others = (rows, 1), ((rows,),)
        else:
            shape, others = (1,), ((),)
        found["weight_scale"] = Cut(
            shape,
            tuple(ALL for _ in shape),
            self._scale_rows(weight),
            partial(self._scales, weight),
            dtypes=SCALE_DTYPES,
            other_shapes=others,
            aliases=("weight_scale_inv",),
            dummy=DUMMY_SCALE,
        )
        if self.scheme.activations == "static":
            place = next(i for i, part in enumerate(self.parts) if part.target_rows == weight.target_rows)
            found["input_scale"] = Cut(
                (1,), (ALL,), slice(place, place + 1), _as_vector, dtypes=SCALE_DTYPES, other_shapes=((),),
                aliases=("activation_scale",), dummy=DUMMY_INPUT_SCALE,
            )  # fmt: skip
        return found

    def _is_rounded_by_itself(self, weight: Cut) -> bool:
        """Whether a piece needs nothing of its neighbours: it has all of its rows, or rows of an order of its own."""
        whole_rows = range(weight.full_shape[1])[weight.source[1]] == range(weight.full_shape[1])
        return weight.arrange is not None or (self.scheme.weight == "channel" and whole_rows)

    def _scale_rows(self, weight: Cut) -> slice | tuple[int | slice, ...]:
        """Where the scales of a part go."""
        if self._block is None or self._block[0] == 1:
            return weight.target_rows
        assert isinstance(weight.target_rows, slice)
        if weight.target_rows == ALL:
            return ALL
        start, stop = weight.target_rows.start or 0, weight.target_rows.stop
        return slice(start // self._block[0], -(-stop // self._block[0]))

    def _scales(self, weight: Cut, scale: Tensor) -> Tensor:
        """From all the scales of a part's tensor to those of this rank's piece of it, in this rank's blocks."""
        rows, columns = (range(size)[part] for size, part in zip(weight.full_shape, weight.source, strict=True))
        scale = scale.float()
        if self.scheme.block is None or self._block is None:
            by_row = scale.reshape(-1, 1).expand(weight.full_shape[0], 1)[rows.start : rows.stop]
            return (by_row if weight.arrange is None else weight.arrange(by_row)).reshape(-1)
        row_ids = torch.arange(rows.start, rows.stop, self._block[0]) // self.scheme.block[0]
        column_ids = torch.arange(columns.start, columns.stop, self._block[1]) // self.scheme.block[1]
        own = scale[row_ids.to(scale.device)][:, column_ids.to(scale.device)]
        return own if weight.arrange is None else weight.arrange(own)

    def _round(self, weight: Cut, tensor: Tensor) -> None:
        """A plain tensor comes in: keep its e4m3 numbers and their scales."""
        layer = self._layer
        assert layer.weight is not None
        assert layer.weight_scale is not None
        tensor = tensor.to(layer.weight.device)
        cut = weight
        if self._is_rounded_by_itself(weight):
            tensor = tensor if weight.arrange is None else weight.arrange(tensor)
            cut = Cut(tuple(tensor.shape), (ALL, ALL), weight.target_rows)
        rounded = fp8_reference.quantize_weight(tensor, self.scheme.block, per_tensor=self.scheme.weight == "tensor")
        layer.weight.data[cut.target_rows] = rounded.values_OI[cut.source]
        layer.weight_scale.data[self._scale_rows(cut)] = self._scales(cut, rounded.scale)

    def finish(self, layer: LinearLayer) -> None:
        """On a CPU, an older GPU, and where groups are too narrow for the tensor cores: make the weight plain."""
        assert layer.weight is not None
        assert layer.weight_scale is not None
        weight = Fp8Weight(layer.weight.data, layer.weight_scale.data, self._block)
        if self.scheme.activations != "none":
            # parts of one product see the same input; the widest of their ranges holds for all
            fixed = None if layer.input_scale is None else layer.input_scale.data.max().reshape(1)
            self._rounding = Rounding(self._block[1] if self._block else 0, fixed)
        narrow = self._block is not None and self._block[1] < MIN_COLUMNS
        if narrow or not fp8_ops.has_e4m3(weight.values_OI.device):
            layer.weight = nn.Parameter(fp8_reference.dequantize_weight(weight, self._dtype), requires_grad=False)
            layer.weight_scale = None
            self._plain = UnquantizedMethod()
            self._plain.finish(layer)
        else:
            self._weight = weight

    # ---------------------------------------------------------------------------------------------------- multiplying

    @property
    def stored(self) -> Fp8Weight | None:
        """The weight as it is multiplied; None once it is plain again."""
        return self._weight

    @property
    def rounds_by_row(self) -> bool:
        """Whether it is multiplied with inputs that are rounded with a scale for each token."""
        if self._weight is None or self._weight.block is not None or self._rounding is None:
            return False
        return self._rounding.scale is None

    def rounding(self, layer: LinearLayer, x_TX: Tensor) -> Rounding | None:
        """How `apply` would round inputs as many as the rows of `x_TX`: whoever makes them may round them at once."""
        if self._weight is None or self._rounding is None or fp8_ops.is_few(x_TX, self._weight):
            return None
        return self._rounding

    def apply(self, layer: LinearLayer, x_TI: Tensor | Fp8Rows, *, pieces: bool = False) -> Tensor:
        """x W^T + bias; inputs may come rounded. `pieces`: it may be left as those of a sum (`fp8_ops.linear`)."""
        if self._plain is not None:
            assert isinstance(x_TI, Tensor)
            if self.rounds_on_cpu and self._rounding is not None:
                x_TI = fp8_reference.dequantize_rows(fp8_reference.quantize_rows(x_TI, self._rounding), x_TI.dtype)
            return self._plain.apply(layer, x_TI)
        assert self._weight is not None
        if not isinstance(x_TI, Tensor):
            return fp8_ops.linear(x_TI, self._weight, layer.bias, self._dtype, pieces=pieces)
        if fp8_ops.keeps_16_bits(x_TI, self._weight, self._most_fused()):
            return fp8_ops.fused_linear(x_TI, self._weight, layer.bias, rounding=self._rounding)
        if self._rounding is None:
            return F.linear(x_TI, fp8_reference.dequantize_weight(self._weight, x_TI.dtype), layer.bias)
        rows = fp8_ops.quantize_rows(x_TI, self._rounding)
        return fp8_ops.linear(rows, self._weight, layer.bias, x_TI.dtype, pieces=pieces)

    def gated(self, layer: LinearLayer, x_TI: Fp8Rows) -> Tensor | None:
        """silu(gate) times up of `apply`'s [gate | up], where one launch is better for both."""
        assert self._weight is not None
        return fp8_ops.gated_linear(x_TI, self._weight, layer.bias, self._dtype)

    def fuses(self, layer: LinearLayer, x_TI: Tensor) -> bool:
        """A few tokens on a GPU, in 16 bits."""
        if self._plain is not None:
            return self._plain.fuses(layer, x_TI)
        return self._weight is not None and fp8_ops.keeps_16_bits(x_TI, self._weight, self._most_fused())

    def _most_fused(self) -> int:
        """Tokens up to which inputs stay in 16 bits: more where the checkpoint asks for inputs that are not rounded."""
        return fp8_ops.MOST_TOKENS if self._rounding is None else fp8_ops.FEW_TOKENS

    def apply_fused(self, layer: LinearLayer, x_TI: Tensor, fusion: Fusion) -> Tensor:
        """One launch, with the norm before it and the gate or the addition after it."""
        if self._plain is not None:
            return self._plain.apply_fused(layer, x_TI, fusion)
        assert self._weight is not None
        return fp8_ops.fused_linear(
            x_TI, self._weight, layer.bias, rounding=self._rounding, norm_weight_I=fusion.norm_weight_I,
            eps=fusion.eps, residual_TO=fusion.residual_TO, gated=fusion.gated, out_TO=fusion.out_TO,
        )  # fmt: skip


def _as_vector(scale: Tensor) -> Tensor:
    return scale.float().reshape(1)
