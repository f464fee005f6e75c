"""What is allowed and changes nothing is said in a line; what works is not."""

import re

import pytest

from argosy.cluster.protocol.config import ServingConfig
from argosy.placement.model_sources import read_model_shape
from argosy.placement.odd_settings import odd_settings
from argosy.placement.rank_memory import Serving


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
def test_what_changes_nothing_is_named_with_what_would(settings: dict[str, object], line: str) -> None:
    (found,) = said(**settings)  # type: ignore[arg-type]  # a model's name among them
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
def test_what_works_is_not_talked_about(settings: dict[str, object]) -> None:
    assert said(**settings) == []  # type: ignore[arg-type]
