"""The shapes that are measured: two random Llamas for machines without a GPU, the default model, or any folder."""

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


def make_folder(name: str, parent: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of that model and the settings it needs. Shapes are written below `parent`, without weights."""
    if name == "default":
        return Path(settings.default_model()), {}
    if name in SHAPES:
        folder = parent / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**_LLAMA, **SHAPES[name], "torch_dtype": "float32"}))
        return folder, {"load_format": "dummy", "skip_tokenizer_init": True}
    return Path(model_folder(name)), {}


def vocab_size(folder: Path) -> int:
    """How many ids the prompts may be made of."""
    size = json.loads((folder / "config.json").read_text()).get("vocab_size")
    if not isinstance(size, int):
        raise ConfigError(f"{folder}/config.json says no vocab_size")
    return size
