"""Gemma: norms of 1 + w, scaled embeddings; from 2 on four norms a layer, windows; 2 caps logits, 3 norms q and k."""

from argosy.workers.loading.names import LLAMA_NAMES
from argosy.workers.models.general import GeneralDecoder

SANDWICH_NAMES = LLAMA_NAMES.extended(
    {
        "model.layers.{}.post_attention_layernorm": "layers.{}.attention_out_norm",
        "model.layers.{}.pre_feedforward_layernorm": "layers.{}.mlp_norm",
        "model.layers.{}.post_feedforward_layernorm": "layers.{}.mlp_out_norm",
    }
)


class GemmaForCausalLM(GeneralDecoder):
    """Gemma 1."""

    NAMES = LLAMA_NAMES


class Gemma2ForCausalLM(GeneralDecoder):
    """Gemma 2."""

    NAMES = SANDWICH_NAMES


class Gemma3ForCausalLM(GeneralDecoder):
    """Gemma 3, the models for text alone."""

    NAMES = SANDWICH_NAMES


class Gemma3ForConditionalGeneration(GeneralDecoder):
    """Gemma 3 with a vision tower, of which the text part is served."""

    NAMES = SANDWICH_NAMES.extended(
        {"vision_tower.*": None, "multi_modal_projector.*": None},
        spellings=[
            (r"language_model\.(?=model\.|lm_head\.)", ""),
            (r"model\.language_model\.", "model."),
            (r"model\.(?=vision_tower\.|multi_modal_projector\.)", ""),
        ],
    )
