"""Weights of 4 or 8 bits with a scale a group of inputs; activations stay in 16 bits. `cluster.protocol.int_quant_spec`
says how checkpoints have them, `kernels.packed_reference` how we do.

Every tensor of a part (q, k, v; gate, up) is kept until the part is whole, then unpacked, cut, and packed our way: no
more than one part is in memory twice. On a CPU the weight is made plain: the file's bytes are saved and its rounding is
kept, the arithmetic is that of the model's numbers. So it is where inputs have an order of their own and are cut over a
tensor-parallel group: a rank's inputs are then no whole groups.

T = tokens, I = inputs, O = outputs, G = groups, all of this rank where nothing else is said.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from argosy.cluster.protocol.errors import UnsupportedModel
from argosy.cluster.protocol.int_quant_spec import IntScheme
from argosy.kernels import packed_reference
from argosy.kernels.fp8_reference import Fp8Rows, Rounding
from argosy.kernels.packed_reference import PackedWeight
from argosy.workers.quantization.base import Cut, Fusion, LinearLayer, UnquantizedMethod, empty_parameter

ALL = slice(None)
SCALE_DTYPES = ("F16", "BF16", "F32")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which output the positions of a word hold, from the lowest bits on
LARGEST_GROUP = 128


class IntWeightMethod:
    """One layer's weight; every layer has a method of its own."""

    def __init__(self, scheme: IntScheme, parts: Sequence[Cut]):
        """`parts`: the cuts of the plain weights that lie below each other in this layer."""
        self.scheme, self.parts = scheme, list(parts)
        self._waiting: list[dict[str, Tensor]] = [{} for _ in parts]
        self._orders: list[Tensor | None] = [None for _ in parts]
        self._plain: UnquantizedMethod | None = None
        self._weight: PackedWeight | None = None
        self._order_I: Tensor | None = None
        self._group = self._own_group()
        is_cut = any(len(range(part.full_shape[1])[part.source[1]]) < part.full_shape[1] for part in self.parts)
        self._stays_plain = scheme.ordered and is_cut

    def _own_group(self) -> int:
        """Inputs that share a scale here: those of the checkpoint, or a part of them where a cut goes through."""
        sizes = []
        for part in self.parts:
            columns = part.full_shape[1]
            inputs = range(columns)[part.source[1]]
            whole = columns if self.scheme.group == -1 else self.scheme.group
            if columns % whole and not self.scheme.online:
                raise _unsupported(f"{columns} inputs are not a multiple of the group size {whole}")
            sizes += [math.gcd(columns, whole), len(inputs), inputs.start]
        shared = math.gcd(*sizes)
        group = next((size for size in range(LARGEST_GROUP, 7, -8) if shared % size == 0), None)
        if group is None:
            raise _unsupported(f"{self.parts[0].full_shape[1]} inputs: a rank would have groups of no multiple of 8")
        return group

    # ----------------------------------------------------------------------------------------------------- loading

    def create(self, layer: LinearLayer, num_in: int, num_out: int, *, bias: bool, dtype: torch.dtype) -> None:
        """`words` [O, I / n] int32, `scale_zero` [O, G, 2] in 16 bits (32 for a float32 model), `bias` [O]."""
        self._layer, self._dtype = layer, dtype
        layer.weight = layer.packed_weight = layer.transposed_weight = None
        layer.weight_scale = layer.input_scale = None
        layer.bias = empty_parameter(num_out, dtype=dtype) if bias else None
        layer.words = layer.scale_zero = None
        if self._stays_plain:
            layer.weight = empty_parameter(num_out, num_in, dtype=dtype)
            return
        layer.words = empty_parameter(num_out, num_in * self.scheme.bits // 32, dtype=torch.int32)
        layer.scale_zero = empty_parameter(num_out, num_in // self._group, 2, dtype=self._scale_dtype)

    @property
    def _scale_dtype(self) -> torch.dtype:
        """float16 keeps the scales of GPTQ and AWQ exactly; zeros are small whole numbers in any."""
        return torch.float16 if self.scheme.layout in ("gptq", "awq") else self._dtype

    def cuts(self, weight: Cut) -> dict[str, Cut]:
        """The tensors of the format for one part, whole: they are small, and are cut once they are numbers."""
        place = self._place_of(weight)
        rows, columns = weight.full_shape
        scheme = self.scheme
        per = 32 // scheme.bits
        groups = 1 if scheme.group == -1 else -(-columns // scheme.group)

        def cut(name: str, *shape: int, dtypes: tuple[str, ...], others: tuple[tuple[int, ...], ...] = ()) -> Cut:
            return Cut(
                shape, tuple(ALL for _ in shape), store=partial(self._keep, place, name), dtypes=dtypes,
                other_shapes=others,
            )  # fmt: skip

        if scheme.layout == "plain":
            return {"weight": weight._replace(source=(ALL, ALL), arrange=None, store=partial(self._round, weight))}
        if scheme.layout == "int8":
            return {
                "weight": cut("numbers", rows, columns, dtypes=("I8",)),
                "weight_scale": cut("scales", rows, groups, dtypes=SCALE_DTYPES, others=((rows,), (1,), (1, 1), ())),
            }
        if scheme.layout == "packed":
            found = {
                "weight_packed": cut("numbers", rows, -(-columns // per), dtypes=("I32",)),
                "weight_scale": cut("scales", rows, groups, dtypes=SCALE_DTYPES, others=((1,), (1, 1), ())),
            }
            if not scheme.symmetric:
                found["weight_zero_point"] = cut("zeros", -(-rows // per), groups, dtypes=("I32",))
            return found
        if scheme.layout == "awq":
            found = {"qweight": cut("numbers", columns, rows // per, dtypes=("I32",))}
        else:
            found = {"qweight": cut("numbers", columns // per, rows, dtypes=("I32",))}
            if scheme.ordered:
                found["g_idx"] = cut("order", columns, dtypes=("I32",))
        found["qzeros"] = cut("zeros", groups, rows // per, dtypes=("I32",))
        found["scales"] = cut("scales", groups, rows, dtypes=SCALE_DTYPES)
        return found

    def _place_of(self, weight: Cut) -> int:
        return next(i for i, part in enumerate(self.parts) if part.target_rows == weight.target_rows)

    def _names(self) -> set[str]:
        names = {"numbers", "scales"}
        if self.scheme.layout in ("gptq", "awq") or (self.scheme.layout == "packed" and not self.scheme.symmetric):
            names.add("zeros")
        if self.scheme.ordered:
            names.add("order")
        return names

    def _keep(self, place: int, name: str, tensor: Tensor) -> None:
        """One tensor of a part came in. With the last one the part is put in its place."""
        waiting = self._waiting[place]
        waiting[name] = tensor.to(self._device)
        if waiting.keys() != self._names():
            return
        numbers_OI, scale_OG, zero_OG, order_I = self._read(self.parts[place], waiting)
        waiting.clear()
        part = self.parts[place]
        if not self._stays_plain:
            self._orders[place] = order_I
            self._put(part, numbers_OI, scale_OG, zero_OG)
            return
        group = numbers_OI.shape[1] // scale_OG.shape[1]
        plain_OI = packed_reference.scaled(numbers_OI, scale_OG, zero_OG, group)
        if order_I is not None:
            plain_OI = plain_OI[:, torch.argsort(order_I)]
        assert self._layer.weight is not None
        piece = plain_OI[part.source]
        self._layer.weight.data[part.target_rows] = (piece if part.arrange is None else part.arrange(piece)).to(
            self._dtype
        )

    @property
    def _device(self) -> torch.device:
        held = self._layer.weight if self._stays_plain else self._layer.words
        assert held is not None
        return held.device

    def _read(self, part: Cut, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """From the tensors of the format to numbers [O, I], scales and zeros [O, G] of the whole part; inputs in the
        order of their groups, which is the last value where it is not that of the checkpoint."""
        scheme = self.scheme
        rows, columns = part.full_shape
        middle = float(1 << (scheme.bits - 1))
        numbers, scales = tensors["numbers"], tensors["scales"].to(self._scale_dtype)
        order_I = None
        if scheme.layout == "int8":
            groups = 1 if scheme.group == -1 else columns // scheme.group
            scale_OG = scales.reshape(-1, scales.shape[-1] if scales.ndim == 2 else 1).expand(rows, groups)
            return numbers.to(torch.int32) + int(middle), scale_OG, torch.full_like(scale_OG, middle), None
        if scheme.layout == "packed":
            numbers_OI = _unpack_last(numbers.to(torch.int32), scheme.bits)[:, :columns]
            scale_OG = scales.reshape(-1, scales.shape[-1] if scales.ndim == 2 else 1)
            scale_OG = scale_OG.expand(rows, scale_OG.shape[1])
            if scheme.symmetric:
                return numbers_OI, scale_OG, torch.full_like(scale_OG, middle), None
            zeros = _unpack_last(tensors["zeros"].to(torch.int32).t(), scheme.bits).t()[:rows]
            return numbers_OI, scale_OG, zeros.to(scale_OG.dtype), None
        zeros_GO = _unpack_last(tensors["zeros"].to(torch.int32), scheme.bits)
        if scheme.layout == "awq":
            numbers_IO = _unpack_last(numbers.to(torch.int32), scheme.bits)
            numbers_OI, zeros_GO = _from_awq_order(numbers_IO).t(), _from_awq_order(zeros_GO)
        else:
            numbers_OI = _unpack_last(numbers.to(torch.int32).t(), scheme.bits)
            zeros_GO = (zeros_GO + scheme.zero_offset) & ((1 << scheme.bits) - 1)
            if scheme.ordered:
                group_I = tensors["order"].long()
                found_I = torch.argsort(group_I, stable=True)
                if not torch.equal(group_I, group_I[found_I]):
                    self._check_order(group_I[found_I], columns)
                    order_I, numbers_OI = found_I, numbers_OI[:, found_I]
        return numbers_OI, scales.t(), zeros_GO.t().to(scales.dtype), order_I

    def _check_order(self, sorted_I: Tensor, columns: int) -> None:
        expected = torch.arange(columns, device=sorted_I.device) // self.scheme.group
        if self.scheme.group == -1 or not torch.equal(sorted_I, expected):
            raise _unsupported("g_idx does not name groups of one size")

    def _put(self, part: Cut, numbers_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> None:
        """This rank's piece of a whole part, packed our way."""
        inputs = range(part.full_shape[1])[part.source[1]]
        whole = part.full_shape[1] // scale_OG.shape[1]
        own_groups = torch.arange(inputs.start, inputs.stop, self._group, device=numbers_OI.device) // whole

        def own(x_OX: Tensor, columns: slice | Tensor) -> Tensor:
            piece = x_OX[part.source[0]][:, columns]
            return piece if part.arrange is None else part.arrange(piece)

        packed = packed_reference.pack(
            own(numbers_OI, part.source[1]).contiguous(), own(scale_OG, own_groups), own(zero_OG, own_groups),
            bits=self.scheme.bits, group=self._group,
        )  # fmt: skip
        words, scale_zero = self._layer.words, self._layer.scale_zero
        assert words is not None
        assert scale_zero is not None
        words.data[part.target_rows] = packed.words_OW
        scale_zero.data[part.target_rows] = packed.scale_zero_OG2

    def _round(self, part: Cut, tensor: Tensor) -> None:
        """A plain tensor came in. Groups are those of the scheme, so that every layout has the same weights."""
        tensor = tensor.to(self._device)
        columns = part.full_shape[1]
        group = math.gcd(columns, self.scheme.group)
        weight = packed_reference.quantize(
            tensor.to(self._dtype), bits=self.scheme.bits, group=group, symmetric=self.scheme.symmetric
        )
        scale_zero = weight.scale_zero_OG2
        self._put(part, packed_reference.unpack(weight), scale_zero[..., 0], scale_zero[..., 1])

    def finish(self, layer: LinearLayer) -> None:
        """All parts are there: make the weight plain where no kernel of ours multiplies it."""
        if self._stays_plain:
            self._plain = UnquantizedMethod()
            self._plain.finish(layer)
            return
        assert layer.words is not None
        assert layer.scale_zero is not None
        weight = PackedWeight(layer.words.data, layer.scale_zero.data, self.scheme.bits, self._group)
        order_I = self._orders[0]
        for order in self._orders:
            if order is not order_I and (order is None or order_I is None or not torch.equal(order, order_I)):
                raise _unsupported("desc_act: parts of one product (q, k, v) order their inputs differently")
        if weight.words_OW.is_cuda and self._dtype.itemsize == 2:
            self._weight, self._order_I = weight, order_I
            return
        plain = packed_reference.dequantize(weight)
        self._make_plain(layer, (plain if order_I is None else plain[:, torch.argsort(order_I)]).to(self._dtype))

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
        assert self._weight is not None
        if self._order_I is not None:
            x_TI = x_TI[:, self._order_I]
        from argosy.kernels import packed_linear  # Triton, which a CPU host has no need of

        return packed_linear.linear(x_TI, self._weight, layer.bias)

    def fuses(self, layer: LinearLayer, x_TI: Tensor) -> bool:
        """One token on a GPU: reading the weight is all the time there is."""
        if self._plain is not None:
            return self._plain.fuses(layer, x_TI)
        return self._order_I is None and x_TI.shape[0] == 1 and x_TI.is_cuda

    def apply_fused(self, layer: LinearLayer, x_TI: Tensor, fusion: Fusion) -> Tensor:
        """One launch, with the norm before it and the gate or the addition after it."""
        if self._plain is not None:
            return self._plain.apply_fused(layer, x_TI, fusion)
        assert self._weight is not None
        from argosy.kernels import packed_linear  # as above

        made_TO = packed_linear.linear(
            x_TI, self._weight, layer.bias, norm_weight_I=fusion.norm_weight_I, eps=fusion.eps,
            residual_TO=fusion.residual_TO, gated=fusion.gated,
        )  # fmt: skip
        return made_TO if fusion.out_TO is None else fusion.out_TO.copy_(made_TO)


def _unsupported(problem: str) -> UnsupportedModel:
    return UnsupportedModel("config.json", "quantization_config", problem)


def _unpack_last(words: Tensor, bits: int) -> Tensor:
    """Numbers of int32 words along the last axis, lowest bits first."""
    per = 32 // bits
    shifts = torch.arange(per, dtype=torch.int32, device=words.device) * bits
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


def _from_awq_order(numbers: Tensor) -> Tensor:
    """Outputs along the last axis from the order of AWQ's words to their own."""
    eights = numbers.reshape(*numbers.shape[:-1], -1, 8)
    back = torch.empty_like(eights)
    back[..., list(AWQ_ORDER)] = eights
    return back.flatten(-2)
