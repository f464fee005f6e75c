"""What is allowed and changes nothing is said in a line; what works is not."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from argosy.cluster.protocol.config import ServingConfig
from argosy.placement.model_sources import read_model_shape
from argosy.placement.odd_settings import odd_settings
from argosy.placement.rank_memory import Serving

STRANGER = {
    "architectures": ["ArceeForCausalLM"], "model_type": "arcee", "hidden_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 1024, "vocab_size": 1000,
    "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
}  # fmt: skip


def said(model: str = "llama-3.1-8b", **settings: object) -> list[str]:
    """The lines for a known model and these settings."""
    shape = read_model_shape(model, expert_parallel=bool(settings.get("enable_expert_parallel")))
    config = ServingConfig.from_mapping({"model": model, "max_model_len": 4096, **settings})
    return list(odd_settings(config, shape, Serving.from_config(config, shape)))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"enable_expert_parallel": True, "tensor_parallel_size": 2}, "LlamaForCausalLM has no experts"),
        ({"model": "mixtral-8x7b-v0.1", "enable_expert_parallel": True}, "dealt to tensor-parallel groups of 2"),
        ({"model": "mixtral-8x7b-v0.1", "all2all_backend": "sum"}, "all2all_backend=sum changes nothing: without"),
        ({"activation_slice_tokens": 1024}, "activation_slice_tokens=1024 changes nothing.*set activation_offload_gb"),
        (
            {"activation_offload_gb": "auto", "max_num_batched_tokens": 2048},
            "activation_offload_gb=auto changes nothing: a step has up to 2048 tokens.*raise max_num_batched_tokens",
        ),
        ({"cpu_offload_gb": 40}, "cpu_offload_gb=40 is more than there is: a rank's layers have 13.0 GiB; all of them"),
        ({"cpu_offload_gb": 8, "pipeline_parallel_size": 2}, "a rank's layers have 6.5 GiB"),
        ({"cpu_offload_gb": 8, "tensor_parallel_size": 2}, "a rank's layers have 6.5 GiB"),
        ({"cpu_offload_gb": 8, "quantization": "int4"}, "cpu_offload_gb=8 is more than there is"),
    ],
)  # fmt: skip
def test_what_changes_nothing_is_named_with_what_would(settings: dict[str, Any], line: str) -> None:
    (found,) = said(**settings)
    assert re.search(line, found), found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "model": "mixtral-8x7b-v0.1",
            "enable_expert_parallel": True,
            "tensor_parallel_size": 2,
            "all2all_backend": "sum",
        },
        {"activation_offload_gb": "auto", "max_num_batched_tokens": 65536, "activation_slice_tokens": 1024},
        {"cpu_offload_gb": 12, "swap_space": "auto"},
        {"cpu_offload_gb": "auto"},
    ],
)
def test_what_works_is_not_talked_about(settings: dict[str, Any]) -> None:
    assert said(**settings) == []


@pytest.mark.skipif(find_spec("transformers") is None, reason="without transformers no such model is known")
def test_what_is_foretold_of_models_of_transformers_is_said_to_be_too_good(tmp_path: Path) -> None:
    """Somebody plans a model that we have no layers for; its group gathers."""
    (tmp_path / "config.json").write_text(json.dumps(STRANGER))
    (alone,), (grouped,) = said(str(tmp_path)), said(str(tmp_path), tensor_parallel_size=2)
    assert re.search("ArceeForCausalLM runs through transformers' own modules: its steps are not recorded", alone)
    assert grouped.startswith(alone)
    assert "gathers what every linear layer makes" in grouped
