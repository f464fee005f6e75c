"""Where the shape of a model comes from: a folder, a `config.json`, or the published configs that ship with us."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from argosy.cluster.protocol.errors import WeightError
from argosy.placement.model_families import CONFIG_FILE, shape_from_config
from argosy.placement.model_shape import ModelShape

MAX_CONFIG_BYTES: Final = 16 * 1024 * 1024
CONFIG_FOLDER: Final = Path(__file__).with_name("model_configs")


def known_models() -> tuple[str, ...]:
    """Names of the published configs that ship with us."""
    return tuple(sorted(path.stem for path in CONFIG_FOLDER.glob("*.json")))


def read_model_shape(name: str | Path, *, overrides: Mapping[str, Any] | None = None) -> ModelShape:
    """The shape of a model folder, a `config.json`, or a well-known model by its name (with or without its owner).

    Raises `WeightError` or `UnsupportedModel`.
    """
    path = Path(name).expanduser()
    if path.is_dir() or path.suffix == ".json":
        file = path / CONFIG_FILE if path.is_dir() else path
        shape = shape_from_config(
            {**_read_json(file), **(overrides or {})}, name=path.stem if path.is_file() else path.name
        )
        sizes = sum(size for file in path.glob("*.safetensors") for size in _tensor_bytes(file)) if path.is_dir() else 0
        return msgspec.structs.replace(shape, checkpoint_bytes=sizes or None)
    short = str(name).rsplit("/", 1)[-1].lower()
    for alias in (short, short.removesuffix("-hf"), short.removesuffix("-instruct"), short.removeprefix("meta-")):
        file = CONFIG_FOLDER / f"{alias}.json"
        if file.is_file():
            return shape_from_config({**_read_json(file), **(overrides or {})}, name=alias)
    raise WeightError(
        str(name),
        "",
        f"is no folder, no config.json, and none of the models known by name: {', '.join(known_models())}",
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise WeightError(str(path), "", f"is larger than {MAX_CONFIG_BYTES} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightError(str(path), "", f"can't be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise WeightError(str(path), "", f"is not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise WeightError(str(path), "", f"must hold a JSON object, not {type(value).__name__}")
    return value


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
