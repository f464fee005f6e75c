"""The facts of a model that is none of ours: what the planner and the cache need, from keys that most configs share.

Its layers are transformers' business (`workers.models.transformers_fallback`), so nothing is read of its rotations,
norms or activations, and `num_parameters` is an estimate.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from argosy.cluster.protocol.config_json import CONFIG_FILE, Reader
from argosy.cluster.protocol.model_facts import ModelSpec

ENDINGS: Final = ("ForCausalLM", "LMHeadModel")
SPELLINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "hidden_size": ("n_embd", "d_model", "dim"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_key_value_heads": ("num_kv_heads", "n_kv_heads"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "max_sequence_length", "seq_length"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size", "d_ff"),
}


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
    """The spec of a model that transformers is to run. Raises `WeightError` naming the key that is missing."""
    names = {
        key: next(other for other in others if other in config)
        for key, others in SPELLINGS.items()
        if key not in config and any(other in config for other in others)
    }
    read = Reader(CONFIG_FILE, config, names=names)
    heads, width = read.integer("num_attention_heads", 1), read.integer("hidden_size", 1)
    return ModelSpec(
        architecture=architecture,
        num_layers=read.integer("num_hidden_layers", 1, 4096),
        hidden_size=width,
        num_heads=heads,
        num_kv_heads=read.integer("num_key_value_heads", 1, default=heads),
        head_size=read.integer("head_dim", 1, 4096, default=max(1, width // heads)),
        intermediate_size=read.integer("intermediate_size", 1, default=4 * width),
        vocab_size=read.integer("vocab_size", 1),
        max_position=read.integer("max_position_embeddings", 1, default=2048),
        tied=read.boolean("tie_word_embeddings"),
        source=str(folder.resolve()),
    )
