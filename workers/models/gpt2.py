"""GPT-2: learned positions, LayerNorm, weights stored as [inputs, outputs] by its Conv1D."""

from argosy.workers.loading.names import NameTable, Slot
from argosy.workers.models.general import GeneralDecoder

GPT2_NAMES = NameTable(
    {
        "transformer.wte": "embed",
        "transformer.wpe": "position_table",
        "transformer.h.{}.ln_1": "layers.{}.input_norm",
        "transformer.h.{}.attn.c_attn": ("layers.{}.attention.qkv_proj", Slot.BLOCKS),
        "transformer.h.{}.attn.c_proj": "layers.{}.attention.o_proj",
        "transformer.h.{}.ln_2": "layers.{}.mlp_norm",
        "transformer.h.{}.mlp.c_fc": "layers.{}.mlp.up_proj",
        "transformer.h.{}.mlp.c_proj": "layers.{}.mlp.down_proj",
        "transformer.ln_f": "norm",
        "lm_head": "lm_head",
        "transformer.h.{}.attn.bias": None,  # the causal mask
        "transformer.h.{}.attn.masked_bias": None,
    },
    spellings=[(r"(?=(wte|wpe|h|ln_f)\.)", "transformer.")],  # the first checkpoints have no prefix
)


class GPT2LMHeadModel(GeneralDecoder):
    """GPT-2 in all sizes, and what was trained with its code."""

    NAMES = GPT2_NAMES
    TRANSPOSED = True
