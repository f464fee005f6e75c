"""Llama, and Mistral, which is the same with a sliding window. Their facts are rows of `model_spec.FAMILIES`."""

from argosy.workers.models.decoder import Decoder


class LlamaForCausalLM(Decoder):
    """Llama 2, 3, 3.1, 3.2, 3.3, and others of the shape."""


class MistralForCausalLM(Decoder):
    """Mistral 7B and Nemo: a sliding window where the config has one, an explicit head size."""


class MinistralForCausalLM(Decoder):
    """Ministral 8B: some layers with a window, some without."""
