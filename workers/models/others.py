"""Families of Llama's shape whose differences are facts of their specs."""

from argosy.workers.models.general import GeneralDecoder


class SmolLM3ForCausalLM(GeneralDecoder):
    """SmolLM3: every fourth layer is not rotated."""


class SeedOssForCausalLM(GeneralDecoder):
    """Seed-OSS: biases of q, k and v."""


class Ernie4_5ForCausalLM(GeneralDecoder):
    """ERNIE 4.5, dense: rotations of neighbours."""
