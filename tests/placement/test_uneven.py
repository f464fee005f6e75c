"""Stages with unequal room keep what they have: layers are split to suit, and nobody is cut to the poorest."""

import json
from pathlib import Path

import pytest

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import ConfigError
from argosy.placement.model_shape import ModelShape
from argosy.placement.model_sources import read_model_shape
from argosy.placement.plan import make_plan
from argosy.placement.rank_memory import Serving, StageBytes
from argosy.placement.topology import Gpu
from argosy.placement.uneven import is_uneven, layers_for, split_by_room, stage_memory

GIB = 2**30
LLAMA = {"architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "torch_dtype": "bfloat16",
         "max_position_embeddings": 8192}  # fmt: skip


def shape_of(folder: Path) -> ModelShape:
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return read_model_shape(folder)


def cards(*free_gib: float) -> list[Gpu]:
    return [
        Gpu(index=place, model="H200", memory_bytes=141 * GIB, free_bytes=int(free * GIB))
        for place, free in enumerate(free_gib)
    ]


def blocks(shape: ModelShape, config: ServingConfig, devices: list[Gpu], layers: tuple[int, ...]) -> int:
    """Of the poorest stage: what all get."""
    sizes, first, found = StageBytes(shape, Serving.from_config(config, shape)), 0, []
    for stage, count in enumerate(layers):
        found.append(stage_memory(sizes, devices[stage], 1, len(layers), stage, first, first + count))
        first += count
    return min(memory.num_blocks for memory in found)


@pytest.mark.parametrize(("free", "caps"), [((141.0, 70.5), ()), ((141.0, 141.0), (0, 70.5)), ((60, 141, 141), ())])
def test_a_card_of_half_the_memory_gets_fewer_layers(
    tmp_path: Path, free: tuple[float, ...], caps: tuple[float, ...]
) -> None:
    """Of what is free already, and of what the settings allow; 8B over two or three H200."""
    shape, devices = shape_of(tmp_path), cards(*free)
    given = {"max_num_seqs": 4096, "max_num_batched_tokens": 8192, "stage_memory_gb": caps}
    config = ServingConfig.from_mapping({"model": "m", "pipeline_parallel_size": len(free), **given})
    layers = layers_for(config, shape, devices)
    even = make_plan(32, 1, len(free)).layer_counts
    assert sum(layers) == 32
    assert blocks(shape, config, devices, layers) >= 1.3 * blocks(shape, config, devices, even)
    poorest = min(range(len(free)), key=lambda stage: (caps or free)[stage] or 999)
    assert layers[poorest] == min(layers)
    best = max(blocks(shape, config, devices, split) for split in _splits(32, len(free)))
    assert blocks(shape, config, devices, layers) == best


def test_alike_devices_are_split_by_time_and_given_layers_left_alone(tmp_path: Path) -> None:
    """The last stage has the head. What is free differs by a little from start to start; that must not move layers."""
    shape = shape_of(tmp_path)
    config = ServingConfig.from_mapping({"model": "m", "pipeline_parallel_size": 2})
    assert layers_for(config, shape, cards(141, 138)) == layers_for(config, shape, cards(140, 141)) == (17, 15)
    assert layers_for(config, shape, []) == ()
    cpus = [Gpu(index=place, model="CPU", memory_bytes=24 * GIB) for place in range(2)]
    assert layers_for(config, shape, cpus) == ()  # what a CPU has to do nobody has measured
    given = ServingConfig.from_mapping({"model": "m", "pipeline_parallel_size": 2, "pipeline_layers": (16, 16)})
    assert layers_for(given, shape, cards(141, 70)) == ()
    assert is_uneven(cards(141, 70))
    assert not is_uneven(cards(141))
    assert split_by_room(shape, Serving.from_config(config, shape), cards(100, 100), 1) in (
        (16, 16),
        (17, 15),
        (15, 17),
    )


@pytest.mark.parametrize("value", [(1.0,), (1.0, 2.0, 3.0), (-1.0, 2.0), (float("nan"), 1.0)])
def test_bounds_must_be_one_for_each_stage(value: tuple[float, ...]) -> None:
    """The error names the setting, the value and what would do."""
    with pytest.raises(ConfigError, match=r"stage_memory_gb=\[.*must be 2 numbers"):
        ServingConfig.from_mapping({"model": "m", "pipeline_parallel_size": 2, "stage_memory_gb": value})


def _splits(num_layers: int, num_stages: int) -> list[tuple[int, ...]]:
    if num_stages == 1:
        return [(num_layers,)]
    return [
        (count, *rest)
        for count in range(1, num_layers - num_stages + 2)
        for rest in _splits(num_layers - count, num_stages - 1)
    ]
