"""OPT: learned positions from row 2 on, ReLU; the 350m normalises after each block and embeds in a smaller width."""

from argosy.workers.loading.names import NameTable, Slot
from argosy.workers.models.general import GeneralDecoder

OPT_NAMES = NameTable(
    {
        "model.decoder.embed_tokens": "embed",
        "model.decoder.embed_positions": "position_table",
        "model.decoder.project_in": "project_in",
        "model.decoder.layers.{}.self_attn_layer_norm": "layers.{}.input_norm",
        "model.decoder.layers.{}.self_attn.q_proj": ("layers.{}.attention.qkv_proj", Slot.Q),
        "model.decoder.layers.{}.self_attn.k_proj": ("layers.{}.attention.qkv_proj", Slot.K),
        "model.decoder.layers.{}.self_attn.v_proj": ("layers.{}.attention.qkv_proj", Slot.V),
        "model.decoder.layers.{}.self_attn.out_proj": "layers.{}.attention.o_proj",
        "model.decoder.layers.{}.final_layer_norm": "layers.{}.mlp_norm",
        "model.decoder.layers.{}.fc1": "layers.{}.mlp.up_proj",
        "model.decoder.layers.{}.fc2": "layers.{}.mlp.down_proj",
        "model.decoder.final_layer_norm": "norm",
        "model.decoder.project_out": "project_out",
        "lm_head": "lm_head",
    },
    spellings=[(r"(?=decoder\.)", "model.")],
)


class OPTForCausalLM(GeneralDecoder):
    """OPT from 125m to 66b."""

    NAMES = OPT_NAMES
