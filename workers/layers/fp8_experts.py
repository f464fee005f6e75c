"""Experts whose weights are e4m3: a scale for each 128 x 128 of them stays as it is stored, others are made plain.

The grouped product of a GPU reads e4m3 with block scales directly, which halves what a decode step reads. Weights that
the checkpoint has plain are rounded to that form after they were read, where their sizes allow it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from argosy.cluster.protocol.errors import ConfigError
from argosy.cluster.protocol.model_spec import MoESpec
from argosy.cluster.protocol.quant_spec import WeightScheme
from argosy.kernels import fp8_reference
from argosy.placement.process_groups import ParallelContext
from argosy.workers.layers.moe import ALL, Experts
from argosy.workers.loading.names import Slot
from argosy.workers.quantization.base import Cut, empty_parameter

BLOCK = 128
E4M3 = torch.float8_e4m3fn
SCALE_DTYPES = ("F32", "BF16", "F16")
DUMMY_SCALE = 8 * 0.02 / 448.0  # random e4m3 numbers become weights of a plausible size


class Fp8Experts(Experts):
    """This rank's part of all experts, e4m3 in the checkpoint."""

    def __init__(
        self, moe: MoESpec, parallel: ParallelContext, width: int, *, dtype: torch.dtype, scheme: WeightScheme
    ):
        super().__init__(moe, parallel, width, dtype=dtype)
        self.scheme, self.dtype = scheme, dtype
        self.by_block = scheme.block == (BLOCK, BLOCK)
        if self.by_block and (self.inner % BLOCK or width % BLOCK):
            raise ConfigError(
                f"tensor_parallel_size={parallel.tp_size} cuts experts of {moe.intermediate_size} inside a block of "
                f"{BLOCK} weights that share a scale; give each rank whole experts: enable_expert_parallel"
            )
        count = len(self.own_experts)
        self.gate_up = empty_parameter(count, 2 * self.inner, width, dtype=E4M3)
        self.down = empty_parameter(count, width, self.inner, dtype=E4M3)
        shapes = ((2 * self.inner, width), (width, self.inner))
        self.gate_up_scale, self.down_scale = (
            empty_parameter(count, rows // BLOCK, columns // BLOCK, dtype=torch.float32)
            if self.by_block
            else empty_parameter(count, rows, dtype=torch.float32)
            for rows, columns in shapes
        )

    def expert_cuts(self, slot: Slot, expert: int) -> Iterator[tuple[str, str, Cut]]:
        """The weight and its scales."""
        for suffix, parameter, cut in super().expert_cuts(slot, expert):
            yield suffix, parameter, cut._replace(dtypes=("F8_E4M3",))
            yield "weight_scale", f"{parameter}_scale", self._scale_cut(cut)

    def _scale_cut(self, weight: Cut) -> Cut:
        (rows, columns), (own_rows, own_columns) = weight.full_shape, weight.source
        assert isinstance(weight.target_rows, tuple)
        target = weight.target_rows
        if self.by_block:
            shape: tuple[int, ...] = (-(-rows // BLOCK), -(-columns // BLOCK))
            source: tuple[slice, ...] = (_blocks(own_rows), _blocks(own_columns))
            target = (target[0], *(_blocks(part) for part in target[1:] if isinstance(part, slice)))
            others: tuple[tuple[int, ...], ...] = ()
        elif self.scheme.weight == "channel":
            shape, source, others = (rows, 1), (own_rows, ALL), ((rows,),)
        else:
            shape, source, others = (1,), (ALL,), ((),)
        return Cut(
            shape, source, target, None if self.by_block else _flat, dtypes=SCALE_DTYPES, other_shapes=others,
            aliases=("weight_scale_inv",), dummy=DUMMY_SCALE,
        )  # fmt: skip

    def finish(self) -> None:
        """Multiply scales in that the product would not read."""
        if self.by_block:
            return
        for name in ("gate_up", "down"):
            weight, scale = getattr(self, name), getattr(self, f"{name}_scale")
            plain = torch.empty(weight.shape, dtype=self.dtype, device=weight.device)
            for expert in range(len(weight)):
                plain[expert] = (weight[expert].float() * scale[expert][:, None]).to(self.dtype)
            setattr(self, name, nn.Parameter(plain, requires_grad=False))
            setattr(self, f"{name}_scale", None)


class RoundedExperts(Experts):
    """Plain in the checkpoint, rounded to e4m3 with block scales when they were read."""

    def finish(self) -> None:
        """Round, an expert at a time; sizes that blocks don't divide stay as they are."""
        if self.inner % BLOCK or self.width % BLOCK:
            return
        for name in ("gate_up", "down"):
            weight = getattr(self, name)
            rounded = torch.empty(weight.shape, dtype=E4M3, device=weight.device)
            scales: list[Tensor] = []
            for expert in range(len(weight)):
                made = fp8_reference.quantize_weight(weight[expert], (BLOCK, BLOCK))
                rounded[expert] = made.values_OI
                scales.append(made.scale)
            setattr(self, name, nn.Parameter(rounded, requires_grad=False))
            setattr(self, f"{name}_scale", nn.Parameter(torch.stack(scales).float(), requires_grad=False))


def _blocks(part: slice) -> slice:
    """The same part, counted in blocks."""
    return slice(
        None if part.start is None else part.start // BLOCK, None if part.stop is None else -(-part.stop // BLOCK)
    )


def _flat(scale: Tensor) -> Tensor:
    return scale.reshape(-1)
