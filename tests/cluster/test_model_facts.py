"""What follows from a config alone, without torch: cache sizes, layouts, and which options of a family are refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from published_configs import PUBLISHED

from argosy.cluster.protocol.errors import ConfigError, UnsupportedModel, WeightError
from argosy.cluster.protocol.model_spec import ModelSpec, kv_bytes_per_token, override, read_model_spec

SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}
SMALL |= {"vocab_size": 101, "max_position_embeddings": 128}
MOE = SMALL | {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 40, "num_key_value_heads": 4}
R1 = {"hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128}
R1 |= {"intermediate_size": 18432, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128}
R1 |= {"qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 129280, "max_position_embeddings": 163840}
R1 |= {"rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0,
                        "mscale_all_dim": 1.0}}  # fmt: skip


def read(folder: Path, architecture: str, settings: dict[str, Any]) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(settings | {"architectures": [architecture]}))
    return read_model_spec(folder)


@pytest.mark.parametrize("tp_size", [1, 8])
def test_a_cache_of_latents_is_as_large_on_every_rank(tp_size: int, tmp_path: Path) -> None:
    """R1: 576 numbers a token and layer, which a group of eight does not divide."""
    spec = read(tmp_path, "DeepseekV3ForCausalLM", R1)
    assert kv_bytes_per_token(spec, 2, tp_size, spec.num_layers) == 61 * 576 * 2
    assert spec.attention_scale == pytest.approx(192**-0.5 * 1.3688879454113936**2)  # 0.1 ln(40) + 1, squared


def test_whole_experts_need_another_divisor_than_parts_of_them(tmp_path: Path) -> None:
    """Six experts of 40: three ranks can have only whole ones, four may have one or two of them, twelve some none."""
    spec = read(tmp_path, "MixtralForCausalLM", MOE | {"num_attention_heads": 12, "hidden_size": 96,
                                                       "num_key_value_heads": 12})  # fmt: skip
    spec.check_layout(2)
    with pytest.raises(ConfigError, match=r"moe_intermediate_size=40; possible: 1, 2, 4"):
        spec.check_layout(3)
    whole = spec.as_served(None, expert_parallel=True)
    whole.check_layout(3)
    whole.check_layout(4)
    assert whole.moe is not None
    assert [len(whole.moe.own_experts(4, rank)) for rank in range(4)] == [1, 2, 1, 2]
    with pytest.raises(ConfigError, match=r"size=12 exceeds .*num_experts=6.*; use 6 or fewer, or leave it out$"):
        whole.check_layout(12)
    with pytest.raises(ConfigError, match=r"^pipeline_parallel_size=5 exceeds the model's 4 layers; use 4 or fewer$"):
        whole.check_layout(2, 5)


def test_a_table_of_positions_ends(tmp_path: Path) -> None:
    """Rotations can be asked for any length; learned vectors that were not learned do not exist."""
    settings = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 101}
    spec = read(tmp_path, "GPT2LMHeadModel", settings)
    assert spec.as_served(20).max_position == 20
    with pytest.raises(ConfigError, match=r"max_model_len=33 exceeds the 32 positions .*; use 32 or less$"):
        spec.as_served(33)


def test_windows_without_a_list_come_by_the_family_s_period(tmp_path: Path) -> None:
    """Older configs of Gemma 3 say nothing: five layers with a window, then one that sees everything."""
    spec = read(tmp_path, "Gemma3ForCausalLM", SMALL | {"num_hidden_layers": 7, "head_dim": 16})
    assert [spec.window_of(layer) for layer in range(7)] == [4096] * 5 + [None, 4096]
    assert spec.local_rope is not None
    assert (spec.rope.theta, spec.local_rope.theta) == (1e6, 1e4)


@pytest.mark.parametrize(("architecture", "settings", "words"), [
    ("BloomForCausalLM", {"apply_residual_connection_post_layernorm": True}, ["apply_residual", "True"]),
    ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
    ("PhiForCausalLM", {"qk_layernorm": True}, ["qk_layernorm"]),
    ("MptForCausalLM", {"attn_config": {"alibi": False}}, ["attn_config.alibi", "False"]),
    ("DeepseekV2ForCausalLM", R1 | {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
                                    "topk_method": "by_lot"}, ["topk_method", "by_lot"]),
    ("Gemma2ForCausalLM", {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
])  # fmt: skip
def test_options_that_would_change_the_answers_are_refused(
    architecture: str, settings: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    """A family's config can ask for more than its published models do."""
    with pytest.raises(UnsupportedModel) as caught:
        read(tmp_path, architecture, SMALL | settings)
    for word in words:
        assert word in str(caught.value)


def test_longrope_needs_a_scale_for_each_pair(tmp_path: Path) -> None:
    """Lists of the wrong length come from a config of another head size."""
    scaling = {"type": "longrope", "short_factor": [1.0] * 7, "long_factor": [1.0] * 8}
    with pytest.raises(WeightError, match=r"short_factor.*list of 8 numbers"):
        read(tmp_path, "Phi3ForCausalLM", SMALL | {"rope_scaling": scaling})


def test_an_architecture_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    """Neither a family of ours nor one of the installed transformers."""
    with pytest.raises(UnsupportedModel, match=r"NobodysForCausalLM.*GPT2LMHeadModel"):
        read(tmp_path, "NobodysForCausalLM", SMALL | {"model_type": "nobodys"})


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_as_it_was_published(name: str, tmp_path: Path) -> None:
    """Keys of old versions, keys that mean nothing, nulls: the facts are the paper's, to the last parameter."""
    config, facts = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = read_model_spec(tmp_path)
    for path, wanted in facts.items():
        found: Any = spec
        for part in path.split("."):
            found = getattr(found, part)
        assert found == pytest.approx(wanted) if isinstance(wanted, float) else found == wanted, (path, found)


def test_overrides_reach_the_text_part_of_a_model_with_eyes(tmp_path: Path) -> None:
    """What stands there was passed over without a word, and an object for it took the place of all of it."""
    text = SMALL | {"head_dim": 16, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
    plain = read(tmp_path, "Gemma3ForConditionalGeneration", {"text_config": text, "vocab_size": 101})
    changed = {"rms_norm_eps": 0.5, "num_hidden_layers": 2, "vocab_size": 99, "rope_theta": 20.0}
    for overrides in (
        changed, {"text_config": changed}, {"text_config": {"rms_norm_eps": 0.5}, **changed, "rms_norm_eps": 0.1},
    ):  # fmt: skip
        spec = read_model_spec(tmp_path, overrides)
        assert (spec.norm_eps, spec.num_layers, spec.vocab_size, spec.rope.theta) == (0.5, 2, 99, 20.0)
        assert (spec.hidden_size, spec.head_size) == (plain.hidden_size, plain.head_size) == (64, 16)


def test_overrides_stay_where_they_belong() -> None:
    """Names of the whole model on top, and what it has twice in both; rotations in the spelling of the text part."""
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = {
        "model_type": "a",
        "vocab_size": 5,
        "text_config": {"vocab_size": 5, "rope_parameters": rope, "head_dim": 4},
    }
    overrides = {"model_type": "b", "vocab_size": 6, "rope_theta": 2.0, "image_size": 7}
    assert override(config, overrides) == {
        "model_type": "b", "vocab_size": 6, "image_size": 7,
        "text_config": {
            "vocab_size": 6, "rope_theta": 2.0, "rope_parameters": {**rope, "rope_theta": 2.0}, "head_dim": 4,
        },
    }  # fmt: skip
    assert override(config, {"model_type": "b"}) == config | {"model_type": "b"}
    assert override(config, {"text_config": None})["text_config"] is None
    assert config["vocab_size"] == config["text_config"]["vocab_size"] == 5  # type: ignore[index]  # what was given is left alone
