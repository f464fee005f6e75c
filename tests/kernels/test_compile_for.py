"""Kernels compile for a card that is not here: what needs more than it has is found without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kernels" / "compile_for.py"
HAS_ASSEMBLER = (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas").exists()


@pytest.mark.skipif(not HAS_ASSEMBLER, reason="this Triton came without NVIDIA's assembler")
def test_products_of_a_few_tokens_fit_a_hopper_card(tmp_path: Path) -> None:
    """The quickest of its parts; the others are run by hand before a card is asked for."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    ran = subprocess.run(
        [sys.executable, SCRIPT, "linear"], capture_output=True, text=True, env=environment, timeout=300
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = [line for line in ran.stdout.splitlines() if "registers" in line]
    assert len(lines) == 4
    assert all(" 0 spilled" in line for line in lines), ran.stdout
