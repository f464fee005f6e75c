"""EXAONE 4: norms after attention and MLP, norms of q and k, rotation in windowed layers only."""

from argosy.workers.models.general import GeneralDecoder
from argosy.workers.models.olmo2 import NORM_AFTER_NAMES


class Exaone4ForCausalLM(GeneralDecoder):
    """EXAONE 4."""

    NAMES = NORM_AFTER_NAMES
