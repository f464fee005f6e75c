"""StarCoder2: LayerNorm and biases, an MLP without a gate, a sliding window."""

from argosy.workers.loading.names import LLAMA_NAMES
from argosy.workers.models.general import GeneralDecoder


class Starcoder2ForCausalLM(GeneralDecoder):
    """StarCoder2."""

    NAMES = LLAMA_NAMES.extended(
        {
            "model.layers.{}.mlp.c_fc": "layers.{}.mlp.up_proj",
            "model.layers.{}.mlp.c_proj": "layers.{}.mlp.down_proj",
        }
    ).without("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj", "model.layers.{}.mlp.down_proj")
