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
    short = str(name).rsplit("/", 1)[-1].lower()
    for alias in (short, short.removesuffix("-hf"), short.removesuffix("-instruct"), short.removeprefix("meta-")):
        if alias in known_models():
            return CONFIG_FOLDER / alias
    known = ", ".join(known_models())
    raise WeightError(str(name), "", f"is no folder, no {CONFIG_FILE}, and none of the models known by name: {known}")


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
