"""GPT-NeoX and Pythia: attention and MLP side by side, each with its norm; a quarter of each head is rotated."""

from argosy.workers.loading.names import NameTable, Slot
from argosy.workers.models.general import GeneralDecoder

NEOX_NAMES = NameTable(
    {
        "gpt_neox.embed_in": "embed",
        "gpt_neox.layers.{}.input_layernorm": "layers.{}.input_norm",
        "gpt_neox.layers.{}.attention.query_key_value": ("layers.{}.attention.qkv_proj", Slot.GROUPED),
        "gpt_neox.layers.{}.attention.dense": "layers.{}.attention.o_proj",
        "gpt_neox.layers.{}.post_attention_layernorm": "layers.{}.mlp_norm",
        "gpt_neox.layers.{}.mlp.dense_h_to_4h": "layers.{}.mlp.up_proj",
        "gpt_neox.layers.{}.mlp.dense_4h_to_h": "layers.{}.mlp.down_proj",
        "gpt_neox.final_layer_norm": "norm",
        "embed_out": "lm_head",
        "gpt_neox.layers.{}.attention.bias": None,
        "gpt_neox.layers.{}.attention.masked_bias": None,
        "gpt_neox.layers.{}.attention.rotary_emb.inv_freq": None,
    }
)


class GPTNeoXForCausalLM(GeneralDecoder):
    """GPT-NeoX-20B, Pythia, Dolly."""

    NAMES = NEOX_NAMES
