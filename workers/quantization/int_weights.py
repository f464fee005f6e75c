"""Weights of 4 or 8 bits with a scale a group of inputs; activations stay in 16 bits. `cluster.protocol.int_quant_spec`
says how checkpoints have them, `kernels.packed_reference` how we do.

Every tensor of a part (q, k, v; gate, up) is kept until the part is whole, then unpacked and cut; with the last part
the layer is packed our way. So no more than one layer is in memory twice. On a CPU the weight is made plain: the file's
bytes are saved and its rounding is kept, the arithmetic is that of the model's numbers. So it is on a GPU where a cut
leaves groups of fewer than 32 inputs.

Where inputs have an order of their own (`desc_act`) they are brought into it before the product. A rank that has only
some of them sorts these by their groups and fills every group up to a multiple of `FILLED` inputs with numbers that are
zero: its groups are of that size then, and the inputs are picked in that order.

T = tokens, I = inputs, O = outputs, G = groups, all of this rank where nothing else is said.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from argosy.cluster.protocol.errors import UnsupportedModel
from argosy.cluster.protocol.int_quant_spec import IntScheme
from argosy.kernels import ops, packed_reference
from argosy.kernels.fp8_reference import Fp8Rows, Rounding
from argosy.kernels.packed_reference import PackedWeight
from argosy.workers.quantization import int_layouts
from argosy.workers.quantization.base import Cut, Fusion, LinearLayer, UnquantizedMethod, empty_parameter

ALL = slice(None)
SMALLEST_GROUP = 8
RANDOM_SPREAD = 0.05  # of random weights, from the least to the largest: a standard deviation of 0.02
FILLED = 32  # the smallest group that kernels take


class IntWeightMethod:
    """One layer's weight; every layer has a method of its own."""

    def __init__(self, scheme: IntScheme, parts: Sequence[Cut]):
        """`parts`: the cuts of the plain weights that lie below each other in this layer."""
        self.scheme, self.parts = scheme, list(parts)
        self._waiting: list[dict[str, Tensor]] = [{} for _ in parts]
        self._orders: list[Tensor | None] = [None for _ in parts]
        self._own: tuple[Tensor, Tensor, Tensor] | None = None  # numbers, scales, zeros of the parts that are there
        self._missing = len(self.parts)
        self._is_random = False  # no checkpoint, but random numbers
        self._plain: UnquantizedMethod | None = None
        self._weight: PackedWeight | None = None
        self._order_J: Tensor | None = None  # which inputs, where the product takes them in another order
        is_cut = any(len(range(part.full_shape[1])[part.source[1]]) < part.full_shape[1] for part in self.parts)
        self._is_filled = scheme.ordered and is_cut
        self._group = FILLED if self._is_filled else self._own_group()

    def _checkpoint_group(self, columns: int) -> int:
        """Inputs that share a scale in the checkpoint; the last may be fewer. Rounded here, all groups are whole."""
        if self.scheme.group == -1:
            return columns
        return math.gcd(columns, self.scheme.group) if self.scheme.online else self.scheme.group

    def _own_group(self) -> int:
        """Inputs that share a scale here: those of the checkpoint, or a part of them where a cut goes through."""
        sizes = []
        for part in self.parts:
            columns = part.full_shape[1]
            inputs = range(columns)[part.source[1]]
            sizes += [math.gcd(columns, self._checkpoint_group(columns)), len(inputs), inputs.start]
        group = packed_reference.kernel_group(math.gcd(*sizes))
        if group < SMALLEST_GROUP:
            raise _unsupported(f"{self.parts[0].full_shape[1]} inputs: a rank would have groups of no multiple of 8")
        return group

    # ----------------------------------------------------------------------------------------------------- loading

    def create(self, layer: LinearLayer, num_in: int, num_out: int, *, bias: bool, dtype: torch.dtype) -> None:
        """`words` (int32) and `scale_zero` (16 bits; 32 for a float32 model) as in `packed_reference`; `bias` [O]."""
        self._layer, self._dtype, self._num_in, self._num_out = layer, dtype, num_in, num_out
        layer.weight = layer.packed_weight = layer.transposed_weight = None
        layer.weight_scale = layer.input_scale = None
        layer.bias = empty_parameter(num_out, dtype=dtype) if bias else None
        # how far groups must be filled is known when they are: there is memory for one that fills up most
        width = self._filled_width() if self._is_filled else num_in
        words, pairs = packed_reference.shapes(num_out, width, bits=self.scheme.bits, group=self._group)
        layer.words = empty_parameter(*words, dtype=torch.int32)
        layer.scale_zero = empty_parameter(*pairs, dtype=self._scale_dtype)

    def _filled_width(self) -> int:
        """Inputs of this rank when each group lacks as many as it can."""
        columns = self.parts[0].full_shape[1]
        groups = -(-columns // self._checkpoint_group(columns))
        return (self._num_in + groups * (FILLED - 1)) // FILLED * FILLED

    @property
    def _scale_dtype(self) -> torch.dtype:
        """float16 keeps the scales of GPTQ and AWQ exactly; zeros are small whole numbers in any."""
        return torch.float16 if self.scheme.layout in ("gptq", "awq") else self._dtype

    def cuts(self, weight: Cut) -> dict[str, Cut]:
        """The tensors of the format for one part, whole: they are small, and are cut once they are numbers."""
        place = self._place_of(weight)
        rows, columns = weight.full_shape
        scheme = self.scheme
        groups = -(-columns // self._checkpoint_group(columns))

        def cut(name: str, *shape: int, dtypes: tuple[str, ...], others: tuple[tuple[int, ...], ...] = ()) -> Cut:
            return Cut(
                shape, tuple(ALL for _ in shape), store=partial(self._keep, place, name), dtypes=dtypes,
                other_shapes=others,
            )  # fmt: skip

        if scheme.layout == "plain":
            return {"weight": weight._replace(source=(ALL, ALL), arrange=None, store=partial(self._round, weight))}
        return {
            suffix: cut(tensor.role, *tensor.shape, dtypes=tensor.dtypes, others=tensor.other_shapes)
            for suffix, tensor in int_layouts.tensors_of(scheme, rows, columns, groups).items()
        }

    def _place_of(self, weight: Cut) -> int:
        return next(i for i, part in enumerate(self.parts) if part.target_rows == weight.target_rows)

    def _keep(self, place: int, name: str, tensor: Tensor) -> None:
        """One tensor of a part came in. With the last one the part is put in its place."""
        waiting = self._waiting[place]
        is_drawn = tensor.is_floating_point() and name != "scales"
        self._is_random |= is_drawn
        waiting[name] = (self._drawn(name, tensor) if is_drawn else tensor).to(self._device)
        if len(waiting) < int_layouts.num_tensors(self.scheme):
            return
        if self._is_random:
            step = RANDOM_SPREAD / (1 << self.scheme.bits)
            waiting["scales"] = torch.full_like(waiting["scales"], step * int_layouts.steps_of_scale(self.scheme))
        rows, columns = self.parts[place].full_shape
        numbers_OI, scale_OG, zero_OG, order_I = int_layouts.read(
            self.scheme, rows, columns, waiting, self._scale_dtype
        )
        waiting.clear()
        self._orders[place] = order_I
        self._put(self.parts[place], numbers_OI, scale_OG, zero_OG)

    def _drawn(self, name: str, tensor: Tensor) -> Tensor:
        """What random weights have where a checkpoint has words."""
        if name == "order":  # one for all parts, as it must be
            generator = torch.Generator().manual_seed(tensor.numel())
            return torch.randperm(tensor.numel(), generator=generator).to(torch.int32) // self.scheme.group
        if self.scheme.layout in ("int8", "bitsandbytes"):
            return torch.randint(-128, 128, tensor.shape, dtype=torch.int8, device=tensor.device)
        return torch.randint(-(1 << 31), (1 << 31) - 1, tensor.shape, dtype=torch.int32, device=tensor.device)

    @property
    def _device(self) -> torch.device:
        assert self._layer.words is not None
        return self._layer.words.device

    def _put(self, part: Cut, numbers_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> None:
        """This rank's piece of a whole part; with the last of them the layer is packed."""
        whole = self._checkpoint_group(part.full_shape[1])
        if self._is_filled:
            order_I = self._orders[self.parts.index(part)]
            columns, groups, unfilled = self._filled(part, order_I, whole)
            picked_OJ = numbers_OI[:, columns]
            zero_OJ = zero_OG.to(picked_OJ.dtype)[:, groups].repeat_interleave(FILLED, 1)
            numbers_OI = torch.where(unfilled, zero_OJ, picked_OJ)
        else:
            inputs = range(part.full_shape[1])[part.source[1]]
            groups = torch.arange(inputs.start, inputs.stop, self._group, device=numbers_OI.device) // whole
            numbers_OI = numbers_OI[:, part.source[1]]
        pieces = []
        for piece in (numbers_OI.to(torch.uint8), scale_OG[:, groups], zero_OG[:, groups]):
            piece = piece[part.source[0]]
            pieces.append(piece if part.arrange is None else part.arrange(piece))
        if self._own is None:
            numbers, scales, zeros = (piece.new_empty((self._num_out, piece.shape[1])) for piece in pieces)
            self._own = numbers, scales, zeros
        for own, piece in zip(self._own, pieces, strict=True):
            own[part.target_rows] = piece
        self._missing -= 1
        if self._missing == 0:
            packed = packed_reference.pack(*self._own, bits=self.scheme.bits, group=self._group)
            self._own = None
            self._store(packed)

    def _store(self, packed: PackedWeight) -> None:
        """The whole weight of this rank."""
        assert self._layer.words is not None
        assert self._layer.scale_zero is not None
        self._layer.words.data = packed.words_MUW
        self._layer.scale_zero.data = packed.pairs_MKR2
        self._width = packed.num_inputs

    def _filled(self, part: Cut, order_I: Tensor | None, whole: int) -> tuple[Tensor, Tensor, Tensor]:
        """(columns in the order of groups, the group of each run of `FILLED` places, places that are nobody's).

        Remembers which inputs of this rank the product takes.
        """
        columns, device = part.full_shape[1], self._device
        found_I = torch.arange(columns, device=device) if order_I is None else order_I
        own = range(columns)[part.source[1]]
        taken, groups, unfilled, inputs = [], [], [], []
        for group, members in enumerate(torch.split(found_I, whole)):
            places = torch.nonzero((members >= own.start) & (members < own.stop)).flatten()
            lacking = -len(places) % FILLED
            filling = places.new_zeros(lacking)
            taken.append(torch.cat((places, filling)) + group * whole)
            groups += [group] * ((len(places) + lacking) // FILLED)
            unfilled.append(torch.arange(len(places) + lacking, device=device) >= len(places))
            inputs.append(torch.cat((members[places] - own.start, filling)))
        order_J = torch.cat(inputs)
        assert self._order_J is None or torch.equal(self._order_J, order_J)
        self._order_J = order_J
        return torch.cat(taken), torch.tensor(groups, device=device), torch.cat(unfilled)

    def _round(self, part: Cut, tensor: Tensor) -> None:
        """A plain tensor came in. Groups are those of the scheme, so that every layout has the same weights."""
        tensor = tensor.to(self._device)
        group = self._checkpoint_group(part.full_shape[1])
        self._put(
            part,
            *packed_reference.round_to_nearest(
                tensor.to(self._dtype), bits=self.scheme.bits, group=group, symmetric=self.scheme.symmetric
            ),
        )

    def finish(self, layer: LinearLayer) -> None:
        """All parts are there: make the weight plain where no kernel of ours multiplies it."""
        assert layer.words is not None
        assert layer.scale_zero is not None
        weight = PackedWeight(
            layer.words.data, layer.scale_zero.data, self.scheme.bits, self._group, self._width, self._num_out
        )
        if not self._is_filled:
            self._order_J = self._common_order()
        if weight.words_MUW.is_cuda and self._dtype.itemsize == 2:
            from argosy.kernels import packed_linear  # Triton, which a CPU host has no need of

            if packed_linear.suits(weight):
                self._weight = weight
                return
        plain_OJ = packed_reference.dequantize(weight).to(self._dtype)
        if self._order_J is not None:  # what is nobody's is zero, wherever it is added
            zeros = plain_OJ.new_zeros((self._num_out, self._num_in))
            plain_OJ = zeros.index_add_(1, self._order_J, plain_OJ)
        self._make_plain(layer, plain_OJ)

    def _common_order(self) -> Tensor | None:
        """Of the inputs of all parts."""
        first, *others = self._orders
        if not all(_same(order, first) for order in others):
            raise _unsupported("desc_act: parts of one product (q, k, v) order their inputs differently")
        return first

    def _make_plain(self, layer: LinearLayer, plain_OI: Tensor) -> None:
        layer.weight = nn.Parameter(plain_OI.contiguous(), requires_grad=False)
        layer.words = layer.scale_zero = None
        self._plain = UnquantizedMethod()
        self._plain.finish(layer)

    # ---------------------------------------------------------------------------------------------------- multiplying

    def rounding(self, layer: LinearLayer, x_TX: Tensor) -> Rounding | None:
        """Inputs stay as they are."""
        return None

    def apply(self, layer: LinearLayer, x_TI: Tensor | Fp8Rows) -> Tensor:
        """x W^T + bias."""
        assert isinstance(x_TI, Tensor)
        if self._plain is not None:
            return self._plain.apply(layer, x_TI)
        return self._multiply(layer, x_TI, Fusion())

    def fuses(self, layer: LinearLayer, x_TI: Tensor) -> bool:
        """On a GPU, where products add to the residual for nothing; the norm of 64 rows is 2 us shorter without it."""
        if self._plain is not None:
            return self._plain.fuses(layer, x_TI)
        from argosy.kernels import packed_linear  # as above

        assert self._weight is not None
        return x_TI.is_cuda and packed_linear.adds(x_TI, self._weight)

    def apply_fused(self, layer: LinearLayer, x_TI: Tensor, fusion: Fusion) -> Tensor:
        """One launch with the gate or the addition after it, and one for the norm before it, or none."""
        if self._plain is not None:
            return self._plain.apply_fused(layer, x_TI, fusion)
        return self._multiply(layer, x_TI, fusion)

    def _multiply(self, layer: LinearLayer, x_TI: Tensor, fusion: Fusion) -> Tensor:
        assert self._weight is not None
        from argosy.kernels import packed_linear  # as above

        norm_weight_I = fusion.norm_weight_I
        if self._order_J is not None:
            if norm_weight_I is not None:
                x_TI, norm_weight_I = ops.rms_norm(x_TI, norm_weight_I, fusion.eps), None
            x_TI = packed_linear.pick_inputs(x_TI, self._order_J)
        return packed_linear.linear(
            x_TI, self._weight, layer.bias, norm_weight_I=norm_weight_I, eps=fusion.eps,
            residual_TO=fusion.residual_TO, gated=fusion.gated, out_TO=fusion.out_TO,
        )  # fmt: skip


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def _unsupported(problem: str) -> UnsupportedModel:
    return UnsupportedModel("config.json", "quantization_config", problem)
