"""StableLM: LayerNorm with bias, a quarter of each head rotated."""

from argosy.workers.models.general import GeneralDecoder


class StableLmForCausalLM(GeneralDecoder):
    """StableLM 2 and 3B."""
