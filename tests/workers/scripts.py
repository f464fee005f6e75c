"""Scripts of `benchmarks/` as modules, for tests of what they reckon."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def load_script(path: str) -> Any:
    """A new module of that file below `benchmarks/`."""
    spec = importlib.util.spec_from_file_location(path.removesuffix(".py").replace("/", "_"), BENCHMARKS / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module
