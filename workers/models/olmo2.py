"""OLMo 2 and 3: norms after attention and MLP, and one over all heads of q and of k together; OLMoE: the latter."""

from argosy.workers.loading.names import LLAMA_NAMES
from argosy.workers.models.general import GeneralDecoder
from argosy.workers.models.qwen_moe import EXPERT_NAMES

NORM_AFTER_NAMES = LLAMA_NAMES.extended(
    {
        "model.layers.{}.post_attention_layernorm": "layers.{}.input_norm",
        "model.layers.{}.post_feedforward_layernorm": "layers.{}.mlp_norm",
    }
).without("model.layers.{}.input_layernorm")


class Olmo2ForCausalLM(GeneralDecoder):
    """OLMo 2."""

    NAMES = NORM_AFTER_NAMES


class Olmo3ForCausalLM(GeneralDecoder):
    """OLMo 3: windows of three layers in four."""

    NAMES = NORM_AFTER_NAMES


class OlmoeForCausalLM(GeneralDecoder):
    """OLMoE 1B-7B."""

    NAMES = EXPERT_NAMES
