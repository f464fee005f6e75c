"""A model folder as one node sees it: sound or not, and marks by which nodes compare. Reads headers and samples."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from argosy.cluster.protocol.errors import WeightError
from argosy.cluster.protocol.model_spec import read_model_spec
from argosy.placement.preflight_facts import ModelFacts
from argosy.workers.loading.checkpoint import Checkpoint

_SAMPLE_BYTES: Final = 64 * 1024
_SAMPLES: Final = 3  # beginning, middle and end: a copy that broke off or mixed two revisions differs in one of them
_TEXTS: Final = ("*.json", "*.jinja", "*.model")


def examine_model(folder: str, *, with_weights: bool = True, overrides: Mapping[str, Any] | None = None) -> ModelFacts:
    """What is in the folder. `with_weights` is False where random ones are served (load_format dummy)."""
    path = Path(folder)
    if not path.is_dir():
        return ModelFacts(folder=folder, problem=f"has no model folder {folder}")
    try:
        read_model_spec(path, dict(overrides) if overrides else None)
        num_bytes = Checkpoint.open(path).num_bytes if with_weights else 0
    except WeightError as error:
        return ModelFacts(folder=folder, problem=f"model folder {folder}: {error}")
    except OSError as error:
        return ModelFacts(folder=folder, problem=f"model folder {folder}: {error.strerror or error}")
    marks = {file.name: _mark(file) for pattern in _TEXTS for file in path.glob(pattern)}
    if with_weights:
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
