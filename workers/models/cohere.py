"""Command-R: one norm without bias before attention and MLP side by side, scaled logits; 2 rotates windowed layers."""

from argosy.workers.models.general import GeneralDecoder


class CohereForCausalLM(GeneralDecoder):
    """Command-R and R+ (norms of q and k), Aya."""


class Cohere2ForCausalLM(GeneralDecoder):
    """Command-R7B, Command-A."""
