"""OLMo2: norms after attention and MLP, and one over all heads of q and of k together."""

from argosy.workers.loading.names import LLAMA_NAMES
from argosy.workers.models.general import GeneralDecoder


class Olmo2ForCausalLM(GeneralDecoder):
    """OLMo 2."""

    NAMES = LLAMA_NAMES.extended(
        {
            "model.layers.{}.post_attention_layernorm": "layers.{}.input_norm",
            "model.layers.{}.post_feedforward_layernorm": "layers.{}.mlp_norm",
        }
    ).without("model.layers.{}.input_layernorm")
