"""Experts whose weights are whole numbers of 4 or 8 bits in the checkpoint (GPTQ, AWQ, compressed-tensors).

They are made plain when they are read, an expert at a time, and multiplied in the model's numbers: the file's bytes are
saved and its rounding is kept, memory is that of plain weights. The products of linear layers beside them stay packed.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from argosy.cluster.protocol.int_quant_spec import IntScheme
from argosy.cluster.protocol.model_spec import MoESpec
from argosy.kernels import packed_reference
from argosy.placement.process_groups import ParallelContext
from argosy.workers.layers.moe import ALL, Experts
from argosy.workers.loading.names import Slot
from argosy.workers.quantization.base import Cut
from argosy.workers.quantization.int_weights import IntWeightMethod


class IntExperts(Experts):
    """This rank's part of all experts."""

    def __init__(self, moe: MoESpec, parallel: ParallelContext, width: int, *, dtype: torch.dtype, scheme: IntScheme):
        super().__init__(moe, parallel, width, dtype=dtype)
        self.scheme, self.dtype = scheme, dtype

    def expert_cuts(self, slot: Slot, expert: int) -> Iterator[tuple[str, str, Cut]]:
        """The tensors of the format; with the last of them a weight is put in its place."""
        for _, parameter, cut in super().expert_cuts(slot, expert):
            part = _Part(self, parameter, cut)
            for suffix, stored in part.cuts(part.parts[0]).items():
                yield suffix, parameter, stored


class _Part(IntWeightMethod):
    """The weight of one expert's product."""

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
