"""MPT: ALiBi, norms without bias, no biases at all; q, k and v stored one below the other."""

from argosy.workers.loading.names import NameTable, Slot
from argosy.workers.models.general import GeneralDecoder

MPT_NAMES = NameTable(
    {
        "transformer.wte": "embed",
        "transformer.blocks.{}.norm_1": "layers.{}.input_norm",
        "transformer.blocks.{}.attn.Wqkv": ("layers.{}.attention.qkv_proj", Slot.BLOCKS),
        "transformer.blocks.{}.attn.out_proj": "layers.{}.attention.o_proj",
        "transformer.blocks.{}.norm_2": "layers.{}.mlp_norm",
        "transformer.blocks.{}.ffn.up_proj": "layers.{}.mlp.up_proj",
        "transformer.blocks.{}.ffn.down_proj": "layers.{}.mlp.down_proj",
        "transformer.norm_f": "norm",
        "lm_head": "lm_head",
    }
)


class MptForCausalLM(GeneralDecoder):
    """MPT 7B and 30B."""

    NAMES = MPT_NAMES
