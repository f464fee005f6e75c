"""Granite: Llama's shape with four multipliers, which are facts of its spec."""

from argosy.workers.models.general import GeneralDecoder


class GraniteForCausalLM(GeneralDecoder):
    """Granite 3 and later, dense."""
