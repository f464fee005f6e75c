"""A model folder as one node sees it: sound or not, and marks by which nodes compare. Reads headers and samples."""

import hashlib
from pathlib import Path
from typing import Any, Final, NamedTuple

from argosy.cluster.protocol.errors import WeightError
from argosy.cluster.protocol.model_spec import read_model_spec
from argosy.placement.preflight_facts import ModelFacts
from argosy.workers.loading.checkpoint import Checkpoint

_SAMPLE_BYTES: Final = 64 * 1024
_SAMPLES: Final = 3  # beginning, middle and end: a copy that broke off or mixed two revisions differs in one of them
_TEXTS: Final = ("*.json", "*.jinja", "*.model")


class Wish(NamedTuple):
    """A model's folder, of each node, and how it is served."""

    folder: str = ""  # none is looked at
    with_weights: bool = True  # False where random ones are served (load_format dummy)
    overrides: dict[str, Any] | None = None  # of keys of config.json


def examine_model(wish: Wish) -> ModelFacts:
    """What is in the folder, on this node."""
    folder = wish.folder
    path = Path(folder)
    if not path.is_dir():
        return ModelFacts(folder=folder, problem=f"has no model folder {folder}")
    try:
        read_model_spec(path, wish.overrides)
        num_bytes = Checkpoint.open(path).num_bytes if wish.with_weights else 0
    except WeightError as error:
        return ModelFacts(folder=folder, problem=f"model folder {folder}: {error}")
    except OSError as error:
        return ModelFacts(folder=folder, problem=f"model folder {folder}: {error.strerror or error}")
    marks = {file.name: _mark(file) for pattern in _TEXTS for file in path.glob(pattern)}
    if wish.with_weights:
        marks |= {file.name: _mark_of_weights(file) for file in path.glob("*.safetensors")}
    return ModelFacts(folder=folder, num_bytes=num_bytes, marks=dict(sorted(marks.items())))


def _mark(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def _mark_of_weights(file: Path) -> str:
    """Of its size and some samples: reading all of it would take as long as loading it."""
    size = file.stat().st_size
    digest = hashlib.sha256()
    with file.open("rb") as reader:
        for place in range(_SAMPLES):
            reader.seek(max(size - _SAMPLE_BYTES, 0) * place // (_SAMPLES - 1))
            digest.update(reader.read(_SAMPLE_BYTES))
    return f"{size} bytes, {digest.hexdigest()[:8]}"
