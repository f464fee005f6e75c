"""Falcon: one or few key/value heads stored with their query heads, attention and MLP side by side, or ALiBi."""

import torch

from argosy.cluster.protocol.model_spec import ModelSpec
from argosy.placement.plan import RankInfo
from argosy.placement.process_groups import ParallelContext
from argosy.workers.loading.names import NameTable, Slot
from argosy.workers.models.general import GeneralDecoder

FALCON_NAMES = NameTable(
    {
        "transformer.word_embeddings": "embed",
        "transformer.h.{}.input_layernorm": "layers.{}.input_norm",
        "transformer.h.{}.ln_attn": "layers.{}.input_norm",
        "transformer.h.{}.self_attention.query_key_value": ("layers.{}.attention.qkv_proj", Slot.GROUPED),
        "transformer.h.{}.self_attention.dense": "layers.{}.attention.o_proj",
        "transformer.h.{}.post_attention_layernorm": "layers.{}.mlp_norm",
        "transformer.h.{}.ln_mlp": "layers.{}.mlp_norm",
        "transformer.h.{}.mlp.dense_h_to_4h": "layers.{}.mlp.up_proj",
        "transformer.h.{}.mlp.dense_4h_to_h": "layers.{}.mlp.down_proj",
        "transformer.ln_f": "norm",
        "lm_head": "lm_head",
    }
)
TWO_NORMS = ("transformer.h.{}.ln_attn", "transformer.h.{}.ln_mlp")
ONE_NORM = ("transformer.h.{}.input_layernorm", "transformer.h.{}.post_attention_layernorm")


class FalconForCausalLM(GeneralDecoder):
    """Falcon 7B, 40B, 180B, 11B, RW. A group of all query heads is the layout of one key/value head, too."""

    NAMES = FALCON_NAMES

    def __init__(
        self, spec: ModelSpec, rank: RankInfo, parallel: ParallelContext, dtype: torch.dtype, device: torch.device
    ):
        super().__init__(spec, rank, parallel, dtype, device)
        unused = ONE_NORM if spec.block == "parallel_two_norms" else TWO_NORMS
        self.NAMES = FALCON_NAMES.without(*unused)
