"""Granite: Llama's shape with four multipliers, which are facts of its spec; experts stored in two tensors a layer."""

from collections.abc import Callable

from argosy.cluster.protocol.errors import UnsupportedModel
from argosy.cluster.protocol.model_spec import CONFIG_FILE
from argosy.cluster.protocol.quant_spec import WeightScheme
from argosy.workers.layers.moe import ALL, Experts
from argosy.workers.loading.names import LLAMA_NAMES, Slot
from argosy.workers.models.general import GeneralDecoder
from argosy.workers.quantization.base import Cut

_EXPERTS = "model.layers.{}.block_sparse_moe"


class GraniteForCausalLM(GeneralDecoder):
    """Granite 3 and later, dense."""


class InOutExperts(Experts):
    """All experts of a layer in a tensor of gates and ups and one of downs: [E, 2 I, D] and [E, D, I]."""

    def stored_cuts(self, slot: Slot) -> list[tuple[str, str, Cut]]:
        """(last word of the name, our parameter, cut)."""
        own, inner = slice(self.own_experts.start, self.own_experts.stop), self.own_inner
        count, full = self.moe.num_experts, self.moe.intermediate_size
        if slot is Slot.STACKED_DOWN:
            return [("weight", "down", Cut((count, self.width, full), (own, ALL, inner)))]
        shape = (count, 2 * full, self.width)
        return [
            ("weight", "gate_up", Cut(shape, (own, slice(at + inner.start, at + inner.stop), ALL), (ALL, target)))
            for at, target in ((0, slice(0, self.inner)), (full, slice(self.inner, 2 * self.inner)))
        ]


class GraniteMoeForCausalLM(GeneralDecoder):
    """Granite 3 with experts (1b-a400m, 3b-a800m)."""

    NAMES = LLAMA_NAMES.extended(
        {
            f"{_EXPERTS}.router.layer": "layers.{}.mlp.router",
            f"{_EXPERTS}.input_linear": ("layers.{}.mlp.experts", Slot.STACKED_UP),
            f"{_EXPERTS}.output_linear": ("layers.{}.mlp.experts", Slot.STACKED_DOWN),
        }
    )

    def make_experts(self, layer: int) -> Callable[..., Experts]:
        """As the checkpoint has them."""
        quantization = self.spec.quantization
        scheme = None if quantization is None else quantization.scheme_of(f"{_EXPERTS}.input_linear".format(layer))
        if scheme is not None and not (isinstance(scheme, WeightScheme) and scheme.online):
            raise UnsupportedModel(
                CONFIG_FILE, "quantization_config", "Granite's experts are supported as plain weights"
            )
        return InOutExperts


class GraniteMoeSharedForCausalLM(GraniteMoeForCausalLM):
    """The same with an expert that every token sees."""

    NAMES = GraniteMoeForCausalLM.NAMES.extended(
        {
            "model.layers.{}.shared_mlp.input_linear": ("layers.{}.mlp.shared.gate_up_proj", Slot.BLOCKS),
            "model.layers.{}.shared_mlp.output_linear": "layers.{}.mlp.shared.down_proj",
        }
    )
