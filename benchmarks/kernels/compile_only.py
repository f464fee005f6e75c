"""Launches become compilations for a GPU that is not here: what `compile_for.py` and `compile_other.py` work by."""

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from argosy.kernels import tuning

SHARED_BYTES = 232448  # of a multiprocessor of an H100 or H200
FACTS = tuning.DeviceFacts("nvidia_h200", 132, overlaps=True, knows_ptx=True)
COMPILED: list[Any] = []  # since it was cleared last


class _NoDriver:
    """What Triton asks its driver before a launch."""

    def __init__(self, capability: int):
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def launcher_cls(self, *about: object) -> None:
        """What launches a kernel: nothing is launched."""


def _compile_only(kernel: Any, grid: object) -> Callable[..., Any]:
    def run(*args: object, **options: object) -> Any:
        compiled = kernel.run(*args, grid=grid, warmup=True, **options)
        COMPILED.append(compiled)
        return compiled

    return run


def prepare(facts: tuning.DeviceFacts = FACTS, capability: int = 90) -> None:
    """From now on launches compile. CPU tensors stand for the card's."""
    driver.set_active(_NoDriver(capability))  # type: ignore[arg-type]  # a stand-in
    jit.JITFunction.__getitem__ = _compile_only
    tuning.device_facts = lambda device: facts  # type: ignore[assignment]  # of the card that is not here
    tuning.counters = lambda device: torch.zeros(tuning.MAX_COUNTERS, dtype=torch.int32)  # type: ignore[assignment]  # of the card that is not here


def describe(kernel: Any) -> str:
    """Registers and spilled bytes of a thread, shared bytes of a program."""
    folder, told = Path(triton.__file__).parent / "backends" / "nvidia" / "bin", ""
    with tempfile.TemporaryDirectory() as scratch:
        source, output = Path(scratch, "kernel.ptx"), Path(scratch, "out")
        source.write_text(kernel.asm["ptx"])
        for name in ("ptxas", "ptxas-blackwell"):  # the second is newer, and some releases write for it
            command = [folder / name, "-v", "--gpu-name=sm_90a", source, "-o", output]
            if (folder / name).exists() and "registers" not in told:
                ran = subprocess.run(command, capture_output=True, text=True)
                told = ran.stdout + ran.stderr
    registers, spilled = re.search(r"Used (\d+) registers", told), re.search(r"(\d+) bytes spill stores", told)
    waits = " SERIALIZED" if "are serialized" in told else ""  # products that wait for each other
    return (
        f"{registers.group(1) if registers else '?':>4} registers {spilled.group(1) if spilled else '?':>5} spilled "
        f"{kernel.metadata.shared:>7} shared  {kernel.name}{waits}"
    )
