"""Sizes of published models from their configs alone, to the parameter, and what each weight format makes of them."""

import json
import struct
from pathlib import Path

import pytest

from argosy.cluster.protocol.config import ModelConfig, ServingConfig
from argosy.cluster.protocol.errors import UnsupportedModel, WeightError
from argosy.cluster.protocol.model_spec import kv_bytes_per_token
from argosy.placement.model_sources import HUB_NAMES, known_models, read_model_shape, servable_name
from argosy.placement.planner import make_serving
from argosy.placement.rank_memory import Serving, StageBytes
from argosy.placement.weight_format import FORMATS, format_from_config

# as their makers or the Hugging Face hub count them
PUBLISHED = {
    "gpt2": 124_439_808,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b-v0.3": 7_248_023_552,
    "mixtral-8x7b-v0.1": 46_702_792_704,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "bloom-560m": 559_214_592,
    "bloom-176b": 176_247_271_424,
    "deepseek-v3": 671_026_419_200,
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_parameters_are_those_that_were_published(name: str) -> None:
    """A layer forgotten or a bias too many shows here."""
    assert read_model_shape(name).num_parameters == PUBLISHED[name]


@pytest.mark.parametrize("name", known_models())
def test_the_matrices_add_up_to_what_the_facts_say(name: str) -> None:
    """The shape counts matrices, the protocol counts parameters: two ways to the same number."""
    shape = read_model_shape(name)
    assert shape.num_parameters == shape.spec.num_parameters
    assert shape.num_active_parameters <= shape.num_parameters
    assert shape.kv_bytes_per_token(2, 1, shape.num_layers) == kv_bytes_per_token(shape.spec, 2, 1, shape.num_layers)


def weights_gb(name: str, quantization: str | None = None) -> float:
    """Gigabytes of all weights, in the checkpoint's dtype."""
    shape = read_model_shape(name)
    serving = make_serving(shape, quantization=quantization)
    return StageBytes(shape, serving).stage_bytes(1, 0, shape.num_layers) / 1e9


def test_golden_sizes() -> None:
    """13B is 26 GB at 16 bit; GPT-3 is 350 GB; 405B is 810 GB, 405 in FP8; DeepSeek-R1 is 671 GB in FP8."""
    assert weights_gb("llama-2-13b") == pytest.approx(26.03, abs=0.01)
    assert weights_gb("gpt3-175b") == pytest.approx(350, rel=0.003)
    assert weights_gb("llama-3.1-405b") == pytest.approx(811.7, abs=0.1)
    assert weights_gb("llama-3.1-405b", "fp8") == pytest.approx(410.1, abs=0.1)  # embedding and head stay in 16 bit
    assert weights_gb("deepseek-r1") == pytest.approx(671, rel=0.005)
    assert weights_gb("gpt3-175b", "fp8") == pytest.approx(175, rel=0.01)


def test_latent_attention_holds_576_numbers_a_token_and_layer() -> None:
    """Whatever the layout: the latent is the same on every rank."""
    shape = read_model_shape("deepseek-r1")
    for tp_size in (1, 2, 8):
        assert shape.kv_bytes_per_token(2, tp_size, 61) == 576 * 61 * 2


def test_formats_count_their_scales() -> None:
    """A 4096 x 4096 matrix: 32 MiB plain, half or a quarter and the scales packed."""
    sizes = {name: FORMATS[name].matrix_bytes(4096, 4096, 2) for name in FORMATS}
    numbers = 4096 * 4096
    assert sizes["none"] == 2 * numbers
    assert sizes["fp8"] == numbers + 4 * 4096
    assert sizes["fp8_per_tensor"] == sizes["fp8"]  # in a rank every row keeps the tensor's scale
    assert sizes["fp8_block"] == numbers + 4 * 32 * 32
    assert sizes["awq"] == sizes["int4"] == numbers // 2 + 32 * 4096 * (2 + 2)
    assert sizes["gptq"] == sizes["awq"]
    ordered = format_from_config({"quantization_config": {"quant_method": "gptq", "bits": 4, "desc_act": True}})
    assert ordered.matrix_bytes(4096, 4096, 2) == sizes["gptq"] + 4096 * 4
    wide = format_from_config({"quantization_config": {"quant_method": "gptq", "bits": 8, "group_size": -1}})
    assert wide.matrix_bytes(4096, 4096, 2) == numbers + 4096 * 8  # one scale and zero a row
    assert sizes["int4"] == numbers // 2 + 32 * 4096 * 4  # as `workers/quantization/int_weights.py` keeps them
    assert sizes["int8"] == numbers + 32 * 4096 * 8


def test_experts_are_counted_as_ranks_keep_them() -> None:
    """Mixtral's in e4m3 by block or in 4 bits with scales; sizes that blocks or groups don't divide stay plain."""
    mixtral = read_model_shape("mixtral-8x7b-v0.1")
    sizes = {
        name: StageBytes(mixtral, make_serving(mixtral, quantization=name)).stage_bytes(1, 0, 32)
        for name in ("none", "fp8", "int8", "int4", "awq")
    }
    experts = 32 * 8 * 3 * 4096 * 14336
    assert all(experts < sizes[name] < 1.06 * experts for name in ("fp8", "int8")), sizes
    assert all(4.25 / 8 * experts < sizes[name] < 0.57 * experts for name in ("awq", "int4")), sizes
    assert sizes["none"] > 2 * experts
    asked = ServingConfig(model=ModelConfig(model="m", quantization="bitsandbytes"))  # as others call int8
    assert StageBytes(mixtral, Serving.from_config(asked, mixtral)).stage_bytes(1, 0, 32) == sizes["int8"]
    small = read_model_shape("qwen3-30b-a3b")  # experts of 768: a part of 96 on each of eight ranks
    plain, fp8 = (StageBytes(small, make_serving(small, quantization=name)) for name in ("none", "fp8"))
    assert fp8.stage_bytes(1, 0, 48) < 0.55 * plain.stage_bytes(1, 0, 48)
    assert fp8.stage_bytes(8, 0, 48) > 0.9 * plain.stage_bytes(8, 0, 48)
    int4 = StageBytes(small, make_serving(small, quantization="int4"))
    assert int4.stage_bytes(8, 0, 48) < 0.4 * plain.stage_bytes(8, 0, 48)  # in groups of 32, of which 96 has three


def test_formats_are_read_from_the_checkpoint() -> None:
    """What the config says about its own weights wins over nothing at all."""
    fp8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    assert format_from_config(fp8).block == (128, 128)
    awq = format_from_config({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 64}})
    assert (awq.bits, awq.group) == (4, 64)
    assert format_from_config({}).bits == 16
    with pytest.raises(UnsupportedModel, match="hqq"):
        format_from_config({"quantization_config": {"quant_method": "hqq"}})


def test_a_folder_is_sized_by_its_headers_too(tmp_path: Path) -> None:
    """`argosy plan ./folder` says what its files hold, without reading weights."""
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128,
              "num_attention_heads": 4, "intermediate_size": 96, "max_position_embeddings": 256}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_model_shape(tmp_path).checkpoint_bytes is None
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))
    assert read_model_shape(tmp_path).checkpoint_bytes == 12
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 10**9) + header)
    with pytest.raises(WeightError, match="broken header"):
        read_model_shape(tmp_path)


def test_an_unknown_name_lists_the_known_ones() -> None:
    """A typo costs one line."""
    with pytest.raises(WeightError, match=r"llama-3\.1-405b"):
        read_model_shape("llama-9")
    assert read_model_shape("meta-llama/Llama-3.1-8B-Instruct").num_layers == 32


def test_every_config_that_ships_says_where_its_weights_are(tmp_path: Path) -> None:
    """What a plan prints as the command to serve by hand has to be servable."""
    assert sorted(HUB_NAMES) == list(known_models())
    assert servable_name("Meta-Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"
    assert servable_name("meta-llama/Llama-3.1-8B-Instruct") == "meta-llama/Llama-3.1-8B-Instruct"
    assert servable_name("opt-175b") == "FOLDER"
    assert servable_name(str(tmp_path)) == str(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert servable_name(str(tmp_path / "config.json")) == str(tmp_path)
