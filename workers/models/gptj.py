"""GPT-J: attention and MLP side by side behind one norm; neighbouring dimensions are rotated in pairs."""

from argosy.workers.loading.names import NameTable, Slot
from argosy.workers.models.general import GeneralDecoder

GPTJ_NAMES = NameTable(
    {
        "transformer.wte": "embed",
        "transformer.h.{}.ln_1": "layers.{}.input_norm",
        "transformer.h.{}.attn.q_proj": ("layers.{}.attention.qkv_proj", Slot.Q),
        "transformer.h.{}.attn.k_proj": ("layers.{}.attention.qkv_proj", Slot.K),
        "transformer.h.{}.attn.v_proj": ("layers.{}.attention.qkv_proj", Slot.V),
        "transformer.h.{}.attn.out_proj": "layers.{}.attention.o_proj",
        "transformer.h.{}.mlp.fc_in": "layers.{}.mlp.up_proj",
        "transformer.h.{}.mlp.fc_out": "layers.{}.mlp.down_proj",
        "transformer.ln_f": "norm",
        "lm_head": "lm_head",
        "transformer.h.{}.attn.bias": None,
        "transformer.h.{}.attn.masked_bias": None,
    }
)


class GPTJForCausalLM(GeneralDecoder):
    """GPT-J-6B."""

    NAMES = GPTJ_NAMES
