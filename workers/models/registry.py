"""Architecture name -> module and class. Imports no model until asked for it.

A new family is one file here, one row below, and its reader's row in `cluster.protocol.model_spec.FAMILIES`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

import torch

from argosy.cluster.protocol.errors import UnsupportedModel
from argosy.cluster.protocol.model_spec import ModelSpec
from argosy.placement.plan import RankInfo
from argosy.placement.process_groups import ParallelContext

if TYPE_CHECKING:
    from argosy.workers.models.decoder import Decoder

ARCHITECTURES = {
    "LlamaForCausalLM": ("argosy.workers.models.llama", "LlamaForCausalLM"),
    "MistralForCausalLM": ("argosy.workers.models.llama", "MistralForCausalLM"),
    "Qwen2ForCausalLM": ("argosy.workers.models.qwen", "Qwen2ForCausalLM"),
    "Qwen3ForCausalLM": ("argosy.workers.models.qwen", "Qwen3ForCausalLM"),
    "OracleForCausalLM": ("argosy.workers.models.oracle", "OracleForCausalLM"),
}


def model_class(architecture: str) -> "type[Decoder]":
    """The class of an architecture. Raises `UnsupportedModel` with the list of what there is."""
    if architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            "config.json", "architectures", f"{architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    module, name = ARCHITECTURES[architecture]
    found: type[Decoder] = getattr(import_module(module), name)
    return found


def build_model(
    spec: ModelSpec, rank: RankInfo, parallel: ParallelContext, dtype: torch.dtype, device: torch.device
) -> "Decoder":
    """The part of the model that `rank` runs, with unfilled weights on `device`; `load_weights` fills them."""
    return model_class(spec.architecture)(spec, rank, parallel, dtype, device)
