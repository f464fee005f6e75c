"""Qwen2-MoE (an expert that all tokens see, by a gate of its own) and Qwen3-MoE."""

from argosy.workers.loading.names import LLAMA_NAMES, Slot
from argosy.workers.models.general import GeneralDecoder

EXPERT_NAMES = LLAMA_NAMES.extended(
    {
        "model.layers.{}.mlp.gate": "layers.{}.mlp.router",
        "model.layers.{}.mlp.experts.{}.gate_proj": ("layers.{}.mlp.experts", Slot.GATE),
        "model.layers.{}.mlp.experts.{}.up_proj": ("layers.{}.mlp.experts", Slot.UP),
        "model.layers.{}.mlp.experts.{}.down_proj": ("layers.{}.mlp.experts", Slot.DOWN),
    }
)


class Qwen2MoeForCausalLM(GeneralDecoder):
    """Qwen1.5-MoE and Qwen2-57B-A14B."""

    NAMES = EXPERT_NAMES.extended(
        {
            "model.layers.{}.mlp.shared_expert.gate_proj": ("layers.{}.mlp.shared.gate_up_proj", Slot.GATE),
            "model.layers.{}.mlp.shared_expert.up_proj": ("layers.{}.mlp.shared.gate_up_proj", Slot.UP),
            "model.layers.{}.mlp.shared_expert.down_proj": "layers.{}.mlp.shared.down_proj",
            "model.layers.{}.mlp.shared_expert_gate": "layers.{}.mlp.shared_gate",
        }
    )


class Qwen3MoeForCausalLM(GeneralDecoder):
    """Qwen3-30B-A3B and Qwen3-235B-A22B."""

    NAMES = EXPERT_NAMES
