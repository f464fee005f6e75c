"""Qwen2 (biases on q, k, v) and Qwen3 (norms on each head of q and k). Facts: rows of `model_spec.FAMILIES`."""

from argosy.workers.models.decoder import Decoder


class Qwen2ForCausalLM(Decoder):
    """Qwen2 and Qwen2.5."""


class Qwen3ForCausalLM(Decoder):
    """Qwen3, dense."""
