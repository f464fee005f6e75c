"""gpt-oss: sinks, alternating windows, experts with biases and a clamped gate, whose weights come in MXFP4.

The checkpoint has all experts of a layer in one tensor, gate and up rows taking turns: plain as [E, D, 2 I] (inputs
first), packed as [E, 2 I, D / 32, 16] (outputs first). On a GPU they stay packed.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from argosy.cluster.protocol.errors import UnsupportedModel
from argosy.cluster.protocol.model_spec import MoESpec
from argosy.kernels import mxfp4
from argosy.placement.process_groups import ParallelContext
from argosy.workers.layers.moe import ALL, Experts
from argosy.workers.loading.names import LLAMA_NAMES, Slot
from argosy.workers.models.general import GeneralDecoder
from argosy.workers.quantization.base import Cut, empty_parameter

LARGEST_SCALE = mxfp4.BIAS + 1  # a power that the packed product can multiply by: 2


class StackedExperts(Experts):
    """All experts of a layer in one tensor."""

    def cuts(self, part: str) -> dict[str, Cut]:
        """The biases, which are stored the same in both formats."""
        own, lo, hi = _as_slice(self.own_experts), self.own_inner.start, self.own_inner.stop
        count, both = self.moe.num_experts, 2 * self.moe.intermediate_size
        return {
            "gate_up_proj_bias": Cut((count, both), (own, slice(2 * lo, 2 * hi)), arrange=_untwine),
            "down_proj_bias": Cut((count, self.width), (own, ALL)),
        }

    def stacked_cuts(self) -> Iterator[tuple[str, str, Cut]]:
        """(last word of the name, our parameter, cut)."""
        cuts = self.cuts("")
        own, inner = _as_slice(self.own_experts), self.own_inner
        count, full = self.moe.num_experts, self.moe.intermediate_size
        rows = slice(2 * inner.start, 2 * inner.stop)
        yield "gate_up_proj", "gate_up", Cut((count, self.width, 2 * full), (own, ALL, rows), arrange=_turn_and_untwine)
        yield "down_proj", "down", Cut((count, full, self.width), (own, inner, ALL), arrange=_turn)
        yield "gate_up_proj_bias", "gate_up_bias", cuts["gate_up_proj_bias"]
        yield "down_proj_bias", "down_bias", cuts["down_proj_bias"]


class PackedExperts(StackedExperts):
    """The same in MXFP4."""

    def __init__(self, moe: MoESpec, parallel: ParallelContext, width: int, *, dtype: torch.dtype):
        super().__init__(moe, parallel, width, dtype=dtype)
        if width % mxfp4.BLOCK or moe.intermediate_size % mxfp4.BLOCK:
            raise UnsupportedModel("config.json", "intermediate_size", "MXFP4 needs multiples of 32")
        self.dtype, count, full = dtype, len(self.own_experts), moe.intermediate_size
        self.gate_up = self.down = None  # type: ignore[assignment]  # made by `finish`
        shapes = ((2 * self.inner, width), (width, full))
        for name, (rows, columns) in zip(("gate_up", "down"), shapes, strict=True):
            blocks = columns // mxfp4.BLOCK
            setattr(self, f"{name}_blocks", empty_parameter(count, rows, blocks, 16, dtype=torch.uint8))
            setattr(self, f"{name}_scales", empty_parameter(count, rows, blocks, dtype=torch.uint8))

    def stacked_cuts(self) -> Iterator[tuple[str, str, Cut]]:
        """(last word of the name, our parameter, cut). All inputs of down: a rank's may begin inside a block."""
        cuts = self.cuts("")
        own, inner = _as_slice(self.own_experts), self.own_inner
        count, full = self.moe.num_experts, self.moe.intermediate_size
        rows = slice(2 * inner.start, 2 * inner.stop)
        for suffix, last in (("blocks", (16,)), ("scales", ())):
            every = tuple(ALL for _ in last)
            make = partial(Cut, dtypes=("U8",), dummy=mxfp4.BIAS - 8 if suffix == "scales" else None)
            shape = (count, 2 * full, self.width // mxfp4.BLOCK, *last)
            cut = make(shape, (own, rows, ALL, *every), arrange=_untwine)
            yield f"gate_up_proj_{suffix}", f"gate_up_{suffix}", cut
            shape = (count, self.width, full // mxfp4.BLOCK, *last)
            yield f"down_proj_{suffix}", f"down_{suffix}", make(shape, (own, ALL, ALL, *every))
        yield "gate_up_proj_bias", "gate_up_bias", cuts["gate_up_proj_bias"]
        yield "down_proj_bias", "down_bias", cuts["down_proj_bias"]

    def finish(self) -> None:
        """On a GPU the product reads packed weights; on a CPU, or cut inside a block, they are made plain."""
        for name, columns in (("gate_up", ALL), ("down", self.own_inner)):
            blocks, scales = getattr(self, f"{name}_blocks"), getattr(self, f"{name}_scales")
            for packed in (f"{name}_blocks", f"{name}_scales"):
                delattr(self, packed)
            whole = columns == ALL or not (columns.start % mxfp4.BLOCK or columns.stop % mxfp4.BLOCK)
            if blocks.is_cuda and whole and int(scales.max()) <= LARGEST_SCALE:
                own = ALL if columns == ALL else slice(columns.start // mxfp4.BLOCK, columns.stop // mxfp4.BLOCK)
                setattr(self, name, _frozen(blocks[:, :, own].flatten(2)))
                setattr(self, f"{name}_scale", _frozen(scales[:, :, own]))
                continue
            plain: Tensor | None = None
            for expert in range(len(self.own_experts)):  # one by one: all at once would need three times the memory
                made = mxfp4.unpack(blocks[expert], scales[expert], self.dtype)[:, columns]
                if plain is None:
                    plain = torch.empty((len(self.own_experts), *made.shape), dtype=self.dtype, device=made.device)
                plain[expert] = made
            assert plain is not None
            setattr(self, name, _frozen(plain))


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.contiguous(), requires_grad=False)


def _as_slice(numbers: range) -> slice:
    return slice(numbers.start, numbers.stop)


def _turn(weight: Tensor) -> Tensor:
    return weight.transpose(1, 2)


def _untwine(both: Tensor) -> Tensor:
    """[E, gate 0, up 0, gate 1, ..] to [E, all gates, all ups]."""
    return torch.cat((both[:, 0::2], both[:, 1::2]), dim=1)


def _turn_and_untwine(weight: Tensor) -> Tensor:
    return _untwine(weight.transpose(1, 2))


class GptOssForCausalLM(GeneralDecoder):
    """gpt-oss 20b and 120b."""

    NAMES = LLAMA_NAMES.extended(
        {
            "model.layers.{}.self_attn": "layers.{}.attention.sinks",
            "model.layers.{}.mlp.router": "layers.{}.mlp.router",
            "model.layers.{}.mlp.experts": ("layers.{}.mlp.experts", Slot.STACKED),
        }
    )

    def make_experts(self, layer: int) -> type[Experts]:
        """As the checkpoint has them."""
        packed = self.spec.quantization is not None and self.spec.quantization.method == "mxfp4"
        return PackedExperts if packed else StackedExperts
