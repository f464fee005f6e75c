"""DeepSeek V2, V3 and R1: latent attention, many small experts beside shared ones, the first layers dense."""

from torch import nn

from argosy.cluster.protocol.model_spec import ModelSpec
from argosy.workers.layers.mla import LatentAttention
from argosy.workers.loading.names import NameTable, Slot
from argosy.workers.models.general import GeneralDecoder
from argosy.workers.models.qwen_moe import EXPERT_NAMES

SHARED_EXPERT_NAMES: dict[str, str | tuple[str, Slot] | None] = {
    "model.layers.{}.mlp.shared_experts.gate_proj": ("layers.{}.mlp.shared.gate_up_proj", Slot.GATE),
    "model.layers.{}.mlp.shared_experts.up_proj": ("layers.{}.mlp.shared.gate_up_proj", Slot.UP),
    "model.layers.{}.mlp.shared_experts.down_proj": "layers.{}.mlp.shared.down_proj",
}
DEEPSEEK_NAMES = EXPERT_NAMES.extended(
    {
        "model.layers.{}.self_attn.q_a_proj": "layers.{}.attention.q_a_proj",
        "model.layers.{}.self_attn.q_a_layernorm": "layers.{}.attention.q_a_norm",
        "model.layers.{}.self_attn.q_b_proj": "layers.{}.attention.q_b_proj",
        "model.layers.{}.self_attn.kv_a_proj_with_mqa": "layers.{}.attention.kv_a_proj",
        "model.layers.{}.self_attn.kv_a_layernorm": "layers.{}.attention.kv_a_norm",
        "model.layers.{}.self_attn.kv_b_proj": "layers.{}.attention.kv_b_proj",
        **SHARED_EXPERT_NAMES,
    }
).without("model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.k_proj", "model.layers.{}.self_attn.v_proj")


def _names(spec: ModelSpec) -> NameTable:
    """With the layers after the last, which predict further tokens and are not run, left out."""
    assert spec.mla is not None
    names = DEEPSEEK_NAMES.extended({f"model.layers.{spec.num_layers}.*": None})
    if spec.mla.q_rank:
        return names
    query = {"model.layers.{}.self_attn.q_proj": "layers.{}.attention.q_b_proj"}
    return names.without("model.layers.{}.self_attn.q_b_proj").extended(query)


class DeepseekV2ForCausalLM(GeneralDecoder):
    """DeepSeek V2, V2-Lite, V2.5."""

    @property
    def NAMES(self) -> NameTable:  # type: ignore[override]  # the small ones have one product for the query
        """As the config says."""
        return _names(self.spec)

    def make_attention(self, layer: int) -> nn.Module:
        """Over latents."""
        return LatentAttention(self.spec, self.parallel, self.method, self.rotary, layer=layer, dtype=self.dtype)


class DeepseekV3ForCausalLM(DeepseekV2ForCausalLM):
    """DeepSeek V3, R1, and others of the shape."""
