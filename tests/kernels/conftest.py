"""Kernels run on the card where there is one, and under Triton's interpreter on CPU tensors where there is none.

The interpreter is chosen when a kernel file is imported, so its switch is set here, before any test imports one. It has
no tensor core product of bf16; kernels with one are tested in float16 and float32 there, and in bf16 on the card.
"""

import importlib.util
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # for what its files share
COMPILE_FOR = Path(__file__).resolve().parents[2] / "benchmarks" / "kernels" / "compile_for.py"
COMPILE_OTHER = COMPILE_FOR.with_name("compile_other.py")
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(tryfirst=True)  # before `-m gpu` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With a card all tests of this room run on it, and count as such."""
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        if HAS_GPU:
            item.add_marker(pytest.mark.gpu)
        elif item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(autouse=True)
def fresh_numbers(request: pytest.FixtureRequest) -> None:
    """Other inputs for every test, the same in every run."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()))


@pytest.fixture
def compiling(tmp_path: Path) -> Callable[..., list[str]]:
    """Runs a script that compiles for a card that is not here with these arguments: a line for each kernel."""
    triton = importlib.util.find_spec("triton")
    assert triton is not None
    assert triton.origin is not None
    if not (Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "ptxas").exists():
        pytest.skip("this Triton came without NVIDIA's assembler")

    def compiled(script: Path, *args: str) -> list[str]:
        environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, str(script), *args]
        ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return [line for line in ran.stdout.splitlines() if " shared  " in line]

    return compiled


@pytest.fixture
def compiled_for_hopper(compiling: Callable[..., list[str]]) -> Callable[[str], list[str]]:
    """Compiles a part of `compile_for.py`: a line for each kernel with registers, spilled and shared bytes, name."""
    return lambda part: compiling(COMPILE_FOR, part)


@pytest.fixture
def compiled_for_another(compiling: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """Compiles what runs on a card that nobody measured: shared bytes and name, if they say these words."""
    return lambda card, *words: compiling(COMPILE_OTHER, card, "--only", *words)


@pytest.fixture
def assert_near() -> Callable[[Tensor, Tensor], None]:
    """‖got - want‖ / ‖want‖ below what the dtype of `got` rounds to; nan never passes."""

    def check(got: Tensor, want: Tensor) -> None:
        assert got.shape == want.shape
        bound = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}[got.dtype]
        got, want = got.double().cpu(), want.double().cpu()
        error = float((got - want).norm() / want.norm().clamp(min=1e-30))
        assert error < bound, f"relative error {error:.2e}"

    return check
