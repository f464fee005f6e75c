"""Where the shape of a model comes from: a folder with a `config.json`, or the published configs that ship with us."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from argosy.cluster.protocol.errors import WeightError
from argosy.cluster.protocol.model_spec import CONFIG_FILE, read_model_spec
from argosy.placement.model_families import shape_from_spec
from argosy.placement.model_shape import ModelShape
from argosy.placement.weight_format import format_from_config

CONFIG_FOLDER: Final = Path(__file__).with_name("model_configs")


HUB_NAMES: Final[Mapping[str, str]] = {
    "bloom-176b": "bigscience/bloom",
    "bloom-560m": "bigscience/bloom-560m",
    "deepseek-r1": "deepseek-ai/DeepSeek-R1",
    "deepseek-v2-lite": "deepseek-ai/DeepSeek-V2-Lite",
    "deepseek-v3": "deepseek-ai/DeepSeek-V3",
    "gpt2": "gpt2",  # one of the few that the hub knows without an owner
    "gpt3-175b": "",  # never published
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-2-70b": "meta-llama/Llama-2-70b-hf",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-3.1-405b": "meta-llama/Llama-3.1-405B",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "llama-3.3-70b": "meta-llama/Llama-3.3-70B-Instruct",
    "mistral-7b-v0.3": "mistralai/Mistral-7B-v0.3",
    "mixtral-8x22b-v0.1": "mistralai/Mixtral-8x22B-v0.1",
    "mixtral-8x7b-v0.1": "mistralai/Mixtral-8x7B-v0.1",
    "opt-13b": "facebook/opt-13b",
    "opt-175b": "",  # given to few
    "qwen2.5-32b": "Qwen/Qwen2.5-32B",
    "qwen2.5-72b": "Qwen/Qwen2.5-72B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-235b-a22b": "Qwen/Qwen3-235B-A22B",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "qwen3-8b": "Qwen/Qwen3-8B",
}
"""Under which name the hub has the weights of each config that ships; empty: it has none."""


def servable_name(name: str) -> str:
    """What `argosy serve` takes for a model that was planned by `name`: a folder, a hub name, or "FOLDER"."""
    path = Path(name).expanduser()
    if path.name == CONFIG_FILE and path.is_file():
        return str(path.parent)
    if path.is_dir() or "/" in name:
        return name
    return HUB_NAMES.get(_alias(name) or "", name) or "FOLDER"


def why_not_served(name: str) -> str | None:
    """What to give instead of a name that only the planner knows; None for every other name.

    Configs ship without weights, and a short name doesn't say which of several checkpoints is meant.
    """
    alias = None if "/" in name else _alias(name)
    if alias is None or HUB_NAMES[alias] == name:
        return None
    hub_name = HUB_NAMES[alias]
    given = f"give the hub's name, such as {hub_name}, or" if hub_name else "no weights of it are on the hub: give"
    return f"is a name of 'argosy plan', which needs no weights; {given} a folder with config.json and *.safetensors"


def known_models() -> tuple[str, ...]:
    """Names of the published configs that ship with us."""
    return tuple(sorted(path.parent.name for path in CONFIG_FOLDER.glob(f"*/{CONFIG_FILE}")))


def read_model_shape(
    name: str | Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    expert_parallel: bool = False,
    all2all: str = "auto",
) -> ModelShape:
    """The shape of a model folder, a `config.json`, or a well-known model by its name (with or without its owner).

    `expert_parallel`, `all2all`: whether ranks are to have whole experts, and how tokens come to them. Raises
    `WeightError` or `UnsupportedModel`.
    """
    folder = _find(name)
    # packed weights are sized here in more formats than can be served
    spec = read_model_spec(folder, {**(overrides or {}), "quantization_config": None, "compression_config": None})
    spec = spec.with_experts(expert_parallel=expert_parallel, all2all=all2all)
    weight_format = format_from_config(_read_config(folder / CONFIG_FILE))
    shape = shape_from_spec(spec, name=str(name), weight_format=weight_format)
    sizes = sum(size for file in sorted(folder.glob("*.safetensors")) for size in _tensor_bytes(file))
    return msgspec.structs.replace(shape, checkpoint_bytes=sizes or None)


def _find(name: str | Path) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.name == CONFIG_FILE and path.is_file():
        return path.parent
    if alias := _alias(str(name)):
        return CONFIG_FOLDER / alias
    known = ", ".join(known_models())
    raise WeightError(str(name), "", f"is no folder, no {CONFIG_FILE}, and none of the models known by name: {known}")


def _alias(name: str) -> str | None:
    """The config that ships for a name with or without its owner."""
    short = name.rsplit("/", 1)[-1].lower()
    forms = (short, short.removesuffix("-hf"), short.removesuffix("-instruct"), short.removeprefix("meta-"))
    return next((form for form in forms if form in HUB_NAMES), None)


def _read_config(path: Path) -> dict[str, Any]:
    """The content, which `read_model_spec` has found to be an object."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _tensor_bytes(path: Path) -> list[int]:
    """Bytes of each tensor of a safetensors file, from its header."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError("the header does not fit into the file")
            header = json.loads(file.read(length))
        ranges = [entry["data_offsets"] for key, entry in header.items() if key != "__metadata__"]
        return [int(last) - int(first) for first, last in ranges]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightError(path.name, "", f"has a broken header: {error}") from error
