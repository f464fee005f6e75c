"""Phi-1, 1.5 and 2 (attention and MLP side by side), and Phi-3 and 4 (Llama's shape, projections stored together)."""

from argosy.workers.loading.names import LLAMA_NAMES, NameTable, Slot
from argosy.workers.models.general import GeneralDecoder

PHI_NAMES = NameTable(
    {
        "model.embed_tokens": "embed",
        "model.layers.{}.input_layernorm": "layers.{}.input_norm",
        "model.layers.{}.self_attn.q_proj": ("layers.{}.attention.qkv_proj", Slot.Q),
        "model.layers.{}.self_attn.k_proj": ("layers.{}.attention.qkv_proj", Slot.K),
        "model.layers.{}.self_attn.v_proj": ("layers.{}.attention.qkv_proj", Slot.V),
        "model.layers.{}.self_attn.dense": "layers.{}.attention.o_proj",
        "model.layers.{}.mlp.fc1": "layers.{}.mlp.up_proj",
        "model.layers.{}.mlp.fc2": "layers.{}.mlp.down_proj",
        "model.final_layernorm": "norm",
        "lm_head": "lm_head",
    }
)
PHI3_NAMES = LLAMA_NAMES.extended(
    {
        "model.layers.{}.self_attn.qkv_proj": ("layers.{}.attention.qkv_proj", Slot.BLOCKS),
        "model.layers.{}.mlp.gate_up_proj": ("layers.{}.mlp.gate_up_proj", Slot.BLOCKS),
    }
).without(
    "model.layers.{}.self_attn.q_proj",
    "model.layers.{}.self_attn.k_proj",
    "model.layers.{}.self_attn.v_proj",
    "model.layers.{}.mlp.gate_proj",
    "model.layers.{}.mlp.up_proj",
)


class PhiForCausalLM(GeneralDecoder):
    """Phi-1, Phi-1.5, Phi-2."""

    NAMES = PHI_NAMES


class Phi3ForCausalLM(GeneralDecoder):
    """Phi-3, Phi-3.5, Phi-4, Phi-4-mini (partial rotation, longrope)."""

    NAMES = PHI3_NAMES
