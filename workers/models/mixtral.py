"""Mixtral: Mistral with eight experts, of which two serve a token."""

from argosy.workers.loading.names import LLAMA_NAMES, Slot
from argosy.workers.models.general import GeneralDecoder


class MixtralForCausalLM(GeneralDecoder):
    """Mixtral 8x7B and 8x22B."""

    NAMES = LLAMA_NAMES.extended(
        {
            "model.layers.{}.block_sparse_moe.gate": "layers.{}.mlp.router",
            "model.layers.{}.block_sparse_moe.experts.{}.w1": ("layers.{}.mlp.experts", Slot.GATE),
            "model.layers.{}.block_sparse_moe.experts.{}.w3": ("layers.{}.mlp.experts", Slot.UP),
            "model.layers.{}.block_sparse_moe.experts.{}.w2": ("layers.{}.mlp.experts", Slot.DOWN),
        }
    )
