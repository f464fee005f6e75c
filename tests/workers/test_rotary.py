"""Rotary tables equal those of transformers, for every scaling that models use."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from argosy.cluster.protocol.model_spec import read_model_spec
from argosy.workers.layers.rotary import cos_sin_table

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": LLAMA3,
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, all its knobs": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.9,
        "truncate": False,
    },
}


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("name", SCALINGS)
def test_a_scaling_equals_transformers(name: str, spelling: str, tmp_path: Path) -> None:
    """Both spellings of the config, as checkpoints of before and after transformers 5 have them."""
    from transformers import LlamaConfig  # a second of import: only where it is compared with
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {**SCALINGS[name], "rope_theta": 50000.0}
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=256,
        rope_parameters=dict(parameters),
        architectures=["LlamaForCausalLM"],
    )
    values = config.to_dict()
    if spelling == "rope_scaling":
        del values["rope_parameters"]
        values |= {"rope_theta": 50000.0, "rope_scaling": None if name == "default" else SCALINGS[name]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    spec = read_model_spec(tmp_path)
    table = cos_sin_table(spec.rope, spec.head_size, 256, torch.device("cpu"))
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(256)[None])
    half = spec.head_size // 2
    torch.testing.assert_close(table[:, :half], cos[0, :, :half], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(table[:, half:], sin[0, :, :half], atol=2e-5, rtol=1e-5)


def test_the_length_of_a_scaled_model_is_what_the_scaling_reaches(tmp_path: Path) -> None:
    """Qwen2.5's advice for long texts: yarn with factor 4 on 32768 positions."""
    config = {"architectures": ["Qwen2ForCausalLM"], "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 9}
    config |= {"num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 32768}
    config |= {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_model_spec(tmp_path).max_position == 131072


def test_an_override_in_the_old_spelling_wins_over_the_new_one_in_the_file(tmp_path: Path) -> None:
    """A folder saved by transformers 5, and advice from a model card that is older than it."""
    config = {"architectures": ["Qwen2ForCausalLM"], "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 9}
    config |= {"num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 1024}
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_model_spec(tmp_path, {"rope_theta": 5e5}).rope.theta == 5e5
    spec = read_model_spec(tmp_path, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}})
    assert (spec.rope.rope_type, spec.rope.factor, spec.rope.theta) == ("yarn", 2.0, 1e6)
    assert spec.max_position == 2048
