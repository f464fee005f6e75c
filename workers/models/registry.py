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
from argosy.workers.quantization.choose import choose_methods

if TYPE_CHECKING:
    from argosy.workers.models.decoder import Decoder

# architecture -> the file that has the class of that name
ARCHITECTURES = {
    "LlamaForCausalLM": "argosy.workers.models.llama",
    "MistralForCausalLM": "argosy.workers.models.llama",
    "MinistralForCausalLM": "argosy.workers.models.llama",
    "Qwen2ForCausalLM": "argosy.workers.models.qwen",
    "Qwen3ForCausalLM": "argosy.workers.models.qwen",
    "GPT2LMHeadModel": "argosy.workers.models.gpt2",
    "OPTForCausalLM": "argosy.workers.models.opt",
    "BloomForCausalLM": "argosy.workers.models.bloom",
    "GPTNeoXForCausalLM": "argosy.workers.models.gpt_neox",
    "GPTJForCausalLM": "argosy.workers.models.gptj",
    "PhiForCausalLM": "argosy.workers.models.phi",
    "Phi3ForCausalLM": "argosy.workers.models.phi",
    "GemmaForCausalLM": "argosy.workers.models.gemma",
    "Gemma2ForCausalLM": "argosy.workers.models.gemma",
    "Gemma3ForCausalLM": "argosy.workers.models.gemma",
    "Gemma3ForConditionalGeneration": "argosy.workers.models.gemma",
    "GraniteForCausalLM": "argosy.workers.models.granite",
    "Olmo2ForCausalLM": "argosy.workers.models.olmo2",
    "Olmo3ForCausalLM": "argosy.workers.models.olmo2",
    "OlmoeForCausalLM": "argosy.workers.models.olmo2",
    "GraniteMoeForCausalLM": "argosy.workers.models.granite",
    "GraniteMoeSharedForCausalLM": "argosy.workers.models.granite",
    "Glm4MoeForCausalLM": "argosy.workers.models.glm",
    "Exaone4ForCausalLM": "argosy.workers.models.exaone",
    "SmolLM3ForCausalLM": "argosy.workers.models.others",
    "SeedOssForCausalLM": "argosy.workers.models.others",
    "Ernie4_5ForCausalLM": "argosy.workers.models.others",
    "Starcoder2ForCausalLM": "argosy.workers.models.starcoder2",
    "StableLmForCausalLM": "argosy.workers.models.stablelm",
    "CohereForCausalLM": "argosy.workers.models.cohere",
    "Cohere2ForCausalLM": "argosy.workers.models.cohere",
    "FalconForCausalLM": "argosy.workers.models.falcon",
    "MptForCausalLM": "argosy.workers.models.mpt",
    "MixtralForCausalLM": "argosy.workers.models.mixtral",
    "Qwen2MoeForCausalLM": "argosy.workers.models.qwen_moe",
    "Qwen3MoeForCausalLM": "argosy.workers.models.qwen_moe",
    "GptOssForCausalLM": "argosy.workers.models.gpt_oss",
    "DeepseekV2ForCausalLM": "argosy.workers.models.deepseek",
    "DeepseekV3ForCausalLM": "argosy.workers.models.deepseek",
    "OracleForCausalLM": "argosy.workers.models.oracle",
    "TransformersFallback": "argosy.workers.models.transformers_fallback",
}
FALLBACK = "TransformersFallback"  # for any other that transformers knows


def model_class(architecture: str) -> "type[Decoder]":
    """The class of an architecture. Raises `UnsupportedModel` with the list of what there is."""
    if architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            "config.json", "architectures", f"{architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    found: type[Decoder] = getattr(import_module(ARCHITECTURES[architecture]), architecture)
    return found


def build_model(
    spec: ModelSpec, rank: RankInfo, parallel: ParallelContext, dtype: torch.dtype, device: torch.device
) -> "Decoder":
    """The part of the model that `rank` runs, with unfilled weights on `device`; `load_weights` fills them."""
    make = model_class(FALLBACK if spec.source else spec.architecture)
    model = make(spec, rank, parallel, dtype, device)
    choose_methods(model, spec)
    return model
