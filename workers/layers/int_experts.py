"""Experts whose weights are whole numbers of 4 or 8 bits in the checkpoint (GPTQ, AWQ, compressed-tensors), or rounded
to 4 bits while a plain one is read.

On a GPU they stay packed, as linear layers do (`packed_reference`), and one grouped product reads them so. They are
made plain, an expert at a time, on a CPU, in float32, and where a cut leaves groups of fewer than 32 inputs. Where it
goes through inputs that have an order of their own (`desc_act`), each expert's groups are filled as in a linear layer,
and all experts to the largest width that this could come to.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from argosy.cluster.protocol.int_quant_spec import IntScheme
from argosy.cluster.protocol.model_spec import MoESpec
from argosy.kernels import packed_reference
from argosy.kernels.moe_reference import IntExpertWeight
from argosy.kernels.packed_reference import PackedWeight
from argosy.placement.process_groups import ParallelContext
from argosy.workers.layers.moe import ALL, Experts
from argosy.workers.loading.names import Slot
from argosy.workers.quantization.base import Cut, empty_parameter
from argosy.workers.quantization.int_weights import FILLED, IntWeightMethod

SMALLEST_GROUP = FILLED  # that kernels take


class IntExperts(Experts):
    """This rank's part of all experts: `gate_up` and `down` are plain, or `IntExpertWeight` once they are loaded."""

    packs_on_cpu = False  # for tests: what a GPU keeps, multiplied by its definition

    def __init__(self, moe: MoESpec, parallel: ParallelContext, width: int, *, dtype: torch.dtype, scheme: IntScheme):
        super().__init__(moe, parallel, width, dtype=dtype)
        self.scheme, self.dtype = scheme, dtype
        self._loading: dict[tuple[str, int], _PackedExpert] = {}
        self._sizes: dict[str, tuple[int, int, int]] = {}  # of packed products: outputs, inputs, group
        keeps = self.packs_on_cpu or (parallel.device.type == "cuda" and dtype.itemsize == 2)
        for name in ("gate_up", "down") if keeps else ():
            self._pack(name)

    def _pack(self, name: str) -> None:
        """Words, scales with zeros, and orders in place of the plain parameter, where kernels take them."""
        method = _PackedExpert(self, name, 0)
        if not method.suits:
            return
        count, rows, _ = getattr(self, name).shape
        words, pairs = packed_reference.shapes(rows, method.width, bits=self.scheme.bits, group=method.group)
        self._sizes[name] = (rows, method.width, method.group)
        del self._parameters[name]
        setattr(self, name, None)
        setattr(self, f"{name}_words", empty_parameter(count, *words, dtype=torch.int32))
        setattr(self, f"{name}_pairs", empty_parameter(count, *pairs, dtype=method.scale_dtype))
        orders = empty_parameter(count, method.width, dtype=torch.int32) if method.may_be_ordered else None
        setattr(self, f"{name}_order", orders)

    def product_cuts(self, name: str) -> list[Cut]:
        """Those of one expert's plain weights that lie below each other in a product."""
        full, inner = self.moe.intermediate_size, self.inner
        if name == "down":
            return [Cut((self.width, full), (ALL, self.own_inner), ALL)]
        targets = (slice(0, inner), slice(inner, 2 * inner))
        return [Cut((full, self.width), (self.own_inner, ALL), target) for target in targets]

    def expert_cuts(self, slot: Slot, expert: int) -> Iterator[tuple[str, str, Cut]]:
        """The tensors of the format; with the last of them a weight is put in its place."""
        name = "down" if slot is Slot.DOWN else "gate_up"
        if name in self._sizes:
            place = expert - self.own_experts.start
            method = self._loading.setdefault((name, place), _PackedExpert(self, name, place))
            cut = method.parts[slot is Slot.UP]
            yield from ((suffix, f"{name}_words", stored) for suffix, stored in method.cuts(cut).items())
            return
        for _, parameter, cut in super().expert_cuts(slot, expert):
            part = _PlainPart(self, parameter, cut)
            yield from ((suffix, parameter, stored) for suffix, stored in part.cuts(part.parts[0]).items())

    def finish(self) -> None:
        """All experts are there."""
        self._loading.clear()
        for name, (rows, columns, group) in self._sizes.items():
            words, pairs, order = (getattr(self, f"{name}_{part}") for part in ("words", "pairs", "order"))
            num_inputs = self.width if name == "gate_up" else self.inner
            own = torch.arange(columns, device=words.device, dtype=torch.int32)
            if order is not None and columns == num_inputs and bool((order == own).all()):
                order = None
                setattr(self, f"{name}_order", None)
            packed = PackedWeight(words.data, pairs.data, self.scheme.bits, group, columns, rows)
            setattr(self, name, IntExpertWeight(packed, None if order is None else order.data, num_inputs))


class _PackedExpert(IntWeightMethod):
    """One expert's product on its way into the parameters of all."""

    def __init__(self, experts: IntExperts, name: str, place: int):
        super().__init__(experts.scheme, experts.product_cuts(name))
        self._experts, self._name, self._place = experts, name, place
        self._dtype = experts.dtype
        self._num_out, self._num_in = experts.width, experts.inner
        if name == "gate_up":
            self._num_out, self._num_in = 2 * experts.inner, experts.width
        self.group, self.scale_dtype = self._group, self._scale_dtype
        self.width = self._filled_width() if self._is_filled else self._num_in

    @property
    def suits(self) -> bool:
        """Whether groups are such as kernels take."""
        return self.group >= SMALLEST_GROUP and (self.scale_dtype.itemsize == 2 or self._experts.packs_on_cpu)

    @property
    def may_be_ordered(self) -> bool:
        """Whether the checkpoint could say so; whether it does is known once it is read."""
        return self._is_filled or (self.scheme.ordered and self.scheme.group != -1)

    @property
    def _device(self) -> torch.device:
        return self._parameter("words").device

    def _parameter(self, part: str) -> nn.Parameter:
        found: nn.Parameter = getattr(self._experts, f"{self._name}_{part}")
        return found

    def _store(self, packed: PackedWeight) -> None:
        for part, values in (("words", packed.words_MUW), ("pairs", packed.pairs_MKR2)):
            target = self._parameter(part).data[self._place]
            target[:, : values.shape[1]] = values
            target[:, values.shape[1] :] = 0  # what fills up: of scale 0
        if self.may_be_ordered:
            order = self._order_J if self._is_filled else self._common_order()
            own = torch.arange(packed.num_inputs, device=self._device) if order is None else order
            target = self._parameter("order").data[self._place]
            target[: len(own)], target[len(own) :] = own.int(), 0


class _PlainPart(IntWeightMethod):
    """The weight of one expert's projection, made plain."""

    def __init__(self, experts: IntExperts, parameter: str, cut: Cut):
        super().__init__(experts.scheme, [Cut(cut.full_shape, (ALL, ALL))])
        self._experts, self._parameter, self._cut = experts, parameter, cut
        self._dtype = experts.dtype

    @property
    def _device(self) -> torch.device:
        found: Tensor = getattr(self._experts, self._parameter)
        return found.device

    def _put(self, part: Cut, numbers_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> None:
        """(number - zero) * scale in the scale's own numbers, then in the model's; inputs in the checkpoint's order."""
        group = part.full_shape[1] // scale_OG.shape[1]
        plain_OI = packed_reference.scaled(numbers_OI, scale_OG, zero_OG, group).to(self._dtype)
        order_I = self._orders[0]
        if order_I is not None:
            plain_OI = torch.empty_like(plain_OI).index_copy_(1, order_I, plain_OI)
        getattr(self._experts, self._parameter).data[self._cut.target_rows] = plain_OI[self._cut.source]
