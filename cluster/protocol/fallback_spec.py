"""The facts of a model that is none of ours: what the planner and the cache need, from keys that most configs share.

Its layers are transformers' business (`workers.models.transformers_fallback`), so nothing is read of its rotations,
norms or activations, and `num_parameters` is an estimate.
"""

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from argosy.cluster.protocol.config_json import CONFIG_FILE, Reader
from argosy.cluster.protocol.errors import UnsupportedModel
from argosy.cluster.protocol.model_facts import ModelSpec

ENDINGS: Final = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # the last: with eyes, of which we use none
SPELLINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "hidden_size": ("n_embd", "d_model", "dim"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads", "attention_heads"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_key_value_heads": ("num_kv_heads", "n_kv_heads"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "max_sequence_length", "seq_length"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size", "d_ff"),
}
# of values, and of layers that see everything or a window
HEAD_SIZES: Final = ("v_head_dim", "global_head_dim", "swa_head_dim", "swa_v_head_dim", "kv_channels")
KV_HEADS: Final = ("num_global_key_value_heads", "swa_num_key_value_heads")


def falls_back(architecture: str) -> bool:
    """Whether the installed transformers has such a model; for the answer its list is read, nothing imported."""
    if not architecture.endswith(ENDINGS) or not architecture.isidentifier():
        return False
    found = importlib.util.find_spec("transformers")
    if found is None or found.origin is None:
        return False
    mapping = Path(found.origin).parent / "models" / "auto" / "modeling_auto.py"
    return mapping.is_file() and f'"{architecture}"' in mapping.read_text(encoding="utf-8")


def read_fallback_spec(folder: Path, config: Mapping[str, Any], architecture: str) -> ModelSpec:
    """The spec of a model that transformers is to run. Raises `WeightError` naming the key that is missing.

    And `UnsupportedModel` where no attention is spoken of at all: state space models and the like.
    """
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, dict) else config
    names = {
        key: next(other for other in others if other in config)
        for key, others in SPELLINGS.items()
        if key not in config and any(other in config for other in others)
    }
    read = Reader(CONFIG_FILE, config, names=names)
    if read.get("num_attention_heads") is None:
        raise UnsupportedModel(
            CONFIG_FILE, "architectures", f"{architecture} names no attention heads, and only attention is served"
        )
    heads, width = read.integer("num_attention_heads", 1), read.integer("hidden_size", 1)
    # one cache for layers of several shapes: the widest. Latent attention is computed over whole heads here.
    is_latent = config.get("kv_lora_rank") is not None
    size = read.integer("head_dim", 1, 4096, default=max(1, width // heads))
    if is_latent:
        size = read.integer("qk_nope_head_dim", 0, 4096) + read.integer("qk_rope_head_dim", 0, 4096)
    num_kv_heads = heads if is_latent else read.integer("num_key_value_heads", 1, default=heads)
    readers = [read, *_layer_readers(config)]
    sizes = [one.integer(key, 1, 4096) for one in readers for key in HEAD_SIZES if one.get(key) is not None]
    counts = [one.integer(key, 1, 4096) for one in readers for key in KV_HEADS if one.get(key) is not None]
    return ModelSpec(
        architecture=architecture,
        num_layers=read.integer("num_hidden_layers", 1, 4096),
        hidden_size=width,
        num_heads=heads,
        num_kv_heads=num_kv_heads if is_latent else math.lcm(num_kv_heads, *counts),
        head_size=max(size, *sizes) if sizes else size,
        intermediate_size=read.integer("intermediate_size", 1, default=4 * width),
        vocab_size=read.integer("vocab_size", 1),
        max_position=read.integer("max_position_embeddings", 1, default=2048),
        tied=read.boolean("tie_word_embeddings"),
        source=str(folder.resolve()),
    )


def _layer_readers(config: Mapping[str, Any]) -> list[Reader]:
    """What is said of single layers."""
    given = config.get("per_layer_config")
    found = list(given.values()) if isinstance(given, dict) else []
    keys = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    return [
        Reader(CONFIG_FILE, {keys[key]: value for key, value in one.items() if key in keys})
        for one in found
        if isinstance(one, dict)
    ]
