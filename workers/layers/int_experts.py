"""Experts whose weights are whole numbers of 4 or 8 bits in the checkpoint (GPTQ, AWQ, compressed-tensors), or rounded
to 4 bits while a plain one is read.

On a GPU they stay packed, as linear layers do (`packed_reference`), and one grouped product reads them so. They are
made plain, an expert at a time, on a CPU, in float32, where a cut leaves groups of fewer than 32 inputs, and where it
goes through inputs that have an order of their own (`desc_act`): each expert's part would be of another width.
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
        count, rows, columns = getattr(self, name).shape
        words, pairs = packed_reference.shapes(rows, columns, bits=self.scheme.bits, group=method.group)
        self._sizes[name] = (rows, columns, method.group)
        del self._parameters[name]
        setattr(self, name, None)
        setattr(self, f"{name}_words", empty_parameter(count, *words, dtype=torch.int32))
        setattr(self, f"{name}_pairs", empty_parameter(count, *pairs, dtype=method.scale_dtype))
        orders = empty_parameter(count, columns, dtype=torch.int32) if method.may_be_ordered else None
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
            if order is not None and bool((order == torch.arange(columns, device=order.device)).all()):
                order = None
                setattr(self, f"{name}_order", None)
            packed = PackedWeight(words.data, pairs.data, self.scheme.bits, group, columns, rows)
            setattr(self, name, IntExpertWeight(packed, None if order is None else order.data))


class _PackedExpert(IntWeightMethod):
    """One expert's product on its way into the parameters of all."""

    def __init__(self, experts: IntExperts, name: str, place: int):
        super().__init__(experts.scheme, experts.product_cuts(name))
        self._experts, self._name, self._place = experts, name, place
        self._dtype = experts.dtype
        self._num_out = experts.width if name == "down" else 2 * experts.inner
        self.group, self.scale_dtype = self._group, self._scale_dtype

    @property
    def suits(self) -> bool:
        """Whether all experts have one width, and groups that kernels take."""
        fits = self.scale_dtype.itemsize == 2 or self._experts.packs_on_cpu
        return fits and self.group >= SMALLEST_GROUP and not self._is_filled

    @property
    def may_be_ordered(self) -> bool:
        """Whether the checkpoint could say so; whether it does is known once it is read."""
        return self.scheme.ordered and self.scheme.group != -1

    @property
    def _device(self) -> torch.device:
        return self._parameter("words").device

    def _parameter(self, part: str) -> nn.Parameter:
        found: nn.Parameter = getattr(self._experts, f"{self._name}_{part}")
        return found

    def _store(self, packed: PackedWeight) -> None:
        self._parameter("words").data[self._place] = packed.words_MUW
        self._parameter("pairs").data[self._place] = packed.pairs_MKR2
        order_I = self._common_order()
        if self.may_be_ordered:
            own = torch.arange(packed.num_inputs, device=self._device) if order_I is None else order_I
            self._parameter("order").data[self._place] = own.int()


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
