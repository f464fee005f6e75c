"""BLOOM: ALiBi, a norm on the embeddings, q, k and v of each head side by side in the checkpoint."""

from argosy.workers.loading.names import NameTable, Slot
from argosy.workers.models.general import GeneralDecoder

BLOOM_NAMES = NameTable(
    {
        "transformer.word_embeddings": "embed",
        "transformer.word_embeddings_layernorm": "embed_norm",
        "transformer.h.{}.input_layernorm": "layers.{}.input_norm",
        "transformer.h.{}.self_attention.query_key_value": ("layers.{}.attention.qkv_proj", Slot.GROUPED),
        "transformer.h.{}.self_attention.dense": "layers.{}.attention.o_proj",
        "transformer.h.{}.post_attention_layernorm": "layers.{}.mlp_norm",
        "transformer.h.{}.mlp.dense_h_to_4h": "layers.{}.mlp.up_proj",
        "transformer.h.{}.mlp.dense_4h_to_h": "layers.{}.mlp.down_proj",
        "transformer.ln_f": "norm",
        "lm_head": "lm_head",
    },
    spellings=[(r"(?=(word_embeddings|word_embeddings_layernorm|h|ln_f)\.)", "transformer.")],
)


class BloomForCausalLM(GeneralDecoder):
    """BLOOM and BLOOMZ, 560m to 176b."""

    NAMES = BLOOM_NAMES
