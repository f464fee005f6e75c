"""The shapes that are measured: published ones with random weights, the default model, or any folder.

`tiny` and `small` are for machines without a GPU. Of `06b`, `8b` and `70b` only config.json is written: their weights
are drawn where they are needed.
"""

import json
from pathlib import Path
from typing import Any, Final

from argosy.cluster.protocol.errors import ConfigError
from argosy.deploy import settings
from argosy.deploy.model_folder import model_folder

_LLAMA: Final[dict[str, Any]] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
}
SHAPES: Final[dict[str, dict[str, Any]]] = {
    "tiny": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "intermediate_size": 688,
        "vocab_size": 4096,
        "tie_word_embeddings": False,
    },
    "small": {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 4864,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
}
GPU_COMMON: Final[dict[str, Any]] = {
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "attention_bias": False,
}
_LLAMA_31: Final[dict[str, Any]] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
}
GPU_SHAPES: Final[dict[str, dict[str, Any]]] = {
    "06b": {  # Qwen3-0.6B
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
    },
    "8b": {  # Llama-3.1-8B
        **_LLAMA_31,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 14336,
    },
    "70b": {  # Llama-3.1-70B
        **_LLAMA_31,
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "intermediate_size": 28672,
    },
}


def make_folder(name: str, parent: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of that model and the settings it needs. Shapes are written below `parent`, without weights."""
    if name == "default":
        return Path(settings.default_model()), {}
    if name in SHAPES or name in GPU_SHAPES:
        folder = parent / name
        folder.mkdir(exist_ok=True)
        small = {**_LLAMA, "torch_dtype": "float32"}
        config = {**small, **SHAPES[name]} if name in SHAPES else {**GPU_COMMON, **GPU_SHAPES[name]}
        (folder / "config.json").write_text(json.dumps(config))
        return folder, {"load_format": "dummy", "skip_tokenizer_init": True}
    return Path(model_folder(name)), {}


def vocab_size(folder: Path) -> int:
    """How many ids the prompts may be made of."""
    size = json.loads((folder / "config.json").read_text()).get("vocab_size")
    if not isinstance(size, int):
        raise ConfigError(f"{folder}/config.json says no vocab_size")
    return size
