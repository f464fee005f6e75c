"""Checkpoints as they are published: names without prefixes, buffers of old versions, configs of old spelling."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from family_cases import make_checkpoint, num_layers_of
from family_harness import CPU, Harness

from argosy.cluster.protocol.errors import WeightError
from argosy.placement.plan import make_plan
from argosy.placement.process_groups import init_parallel

Change = Callable[[dict[str, Tensor], dict[str, Any]], dict[str, Tensor]]


def without(prefix: str) -> Change:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    return change


def gpt2(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """The first checkpoints: no prefix, and the causal mask of each layer."""
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 8, 8) for layer in range(3)}
    del config["tie_word_embeddings"]
    return without("transformer.")(tensors, config) | masks


def neox(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Pythia: rotary keys at the top of the config, frequencies and masks in the file."""
    rope = config.pop("rope_parameters")
    config |= {"rotary_pct": rope["partial_rotary_factor"], "rotary_emb_base": rope["rope_theta"]}
    extra = {}
    for layer in range(3):
        start = f"gpt_neox.layers.{layer}.attention"
        extra |= {f"{start}.bias": torch.ones(1, 1, 8, 8), f"{start}.masked_bias": torch.tensor(-1e9)}
        extra[f"{start}.rotary_emb.inv_freq"] = torch.ones(3)
    return tensors | extra


def gemma3(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """A model with vision: the text part is nested, and says only what differs from the defaults."""
    text = {key: config.pop(key) for key in list(config) if key not in ("architectures", "dtype")}
    ropes = text.pop("rope_parameters")
    text |= {"rope_theta": ropes["full_attention"]["rope_theta"], "rope_scaling": None}
    text["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
    del text["tie_word_embeddings"]
    config |= {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "vision_config": {}}
    return {f"language_model.{name}": tensor for name, tensor in tensors.items()} | {
        "vision_tower.vision_model.embeddings.patch_embedding.bias": torch.zeros(4),
        "multi_modal_projector.mm_soft_emb_norm.weight": torch.zeros(4),
    }


def falcon(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """The keys of its first config, and a head beside the embedding that it is tied to."""
    for ours, theirs in (("num_attention_heads", "n_head"), ("num_hidden_layers", "n_layer"),
                         ("num_kv_heads", "n_head_kv")):  # fmt: skip
        config[theirs] = config.pop(ours)
    del config["tie_word_embeddings"]
    return tensors | {"lm_head.weight": tensors["transformer.word_embeddings.weight"].clone()}


def phi3(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """The first name of longrope, with the original length beside it."""
    rope = config.pop("rope_parameters")
    config["original_max_position_embeddings"] = rope.pop("original_max_position_embeddings")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {"type": "su", "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    return tensors


def deepseek(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """R1: yarn under its old key, and a layer after the last that predicts one token more."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    config["rope_scaling"] = rope
    for key in ("head_dim", "rope_interleave"):
        config.pop(key, None)
    return tensors | {"model.layers.3.eh_proj.weight": torch.zeros(4), "model.layers.3.mlp.gate.weight": torch.zeros(4)}


PUBLISHED: dict[str, tuple[str, Change]] = {
    "gpt2": ("gpt2", gpt2),
    "opt": ("opt", without("model.")),
    "bloom": ("bloom", without("transformer.")),
    "gpt-neox": ("gpt-neox", neox),
    "gemma3": ("gemma3", gemma3),
    "falcon 40b": ("falcon 40b", falcon),
    "phi3": ("phi3 longrope, long", phi3),
    "deepseek v3": ("deepseek v3", deepseek),
}


def rewrite(folder: Path, change: Change) -> None:
    config = json.loads((folder / "config.json").read_text())
    tensors = change(load_file(folder / "model.safetensors"), config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_published_checkpoint_answers_the_same(kind: str, tmp_path: Path) -> None:
    """What lies on the hub was written by many versions of many programs."""
    name, change = PUBLISHED[kind]
    expected = make_checkpoint(tmp_path, name)
    rewrite(tmp_path, change)
    rank = make_plan(num_layers_of(name), 1, 1).ranks[0]
    assert Harness(tmp_path, rank, init_parallel(rank, "", CPU, 1.0)).largest_difference(expected) < 2e-4


@pytest.mark.parametrize(("name", "tensor"), [
    ("gpt2", "transformer.h.1.mlp.c_fc.weight"),
    ("mixtral", "model.layers.2.block_sparse_moe.experts.3.w2.weight"),
    ("deepseek v3", "model.layers.0.self_attn.kv_b_proj.weight"),
])  # fmt: skip
@pytest.mark.parametrize("fault", ["missing", "unknown"])
def test_a_checkpoint_that_is_not_the_model_is_refused(name: str, tensor: str, fault: str, tmp_path: Path) -> None:
    """One tensor is not there, or one is that means nothing to us: named, before anything is allocated."""
    make_checkpoint(tmp_path, name)
    unknown = tensor.replace("weight", "wait")

    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
        if fault == "missing":
            return {key: value for key, value in tensors.items() if key != tensor}
        return tensors | {unknown: torch.zeros(1)}

    rewrite(tmp_path, change)
    rank = make_plan(num_layers_of(name), 1, 1).ranks[0]
    with pytest.raises(WeightError) as caught:
        Harness(tmp_path, rank, init_parallel(rank, "", CPU, 1.0))
    assert (tensor if fault == "missing" else unknown) in str(caught.value)
