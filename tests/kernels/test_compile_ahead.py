"""Launches that are gone through before: what they need is compiled by threads, once, and nothing is launched."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from argosy.kernels.compile_ahead import NotLoaded, _Kinds, compiling_ahead, refusing_to_load

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks" / "kernels"
SCRIPT = """
import json, sys, threading
sys.path.insert(0, sys.argv[1])
import torch
from compile_only import prepare
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from argosy.kernels import compile_ahead, rms_norm
prepare()
about, launchers = [], []
driver.active.launcher_cls = lambda *which: launchers.append(threading.current_thread().name)
knobs.compilation.listener = lambda **seen: about.append((seen["src"].name, threading.current_thread().name))
weight = torch.zeros(128, dtype=torch.bfloat16)

def launch():
    for rows in (1, 2, 3, 16, 64):
        for dtype in (torch.bfloat16, torch.float32):
            rms_norm.rms_norm(torch.zeros(rows, 128, dtype=dtype), weight, 1e-5)

asked, run = [], JITFunction.run
JITFunction.run = lambda kernel, *args, **options: (asked.append(kernel), run(kernel, *args, **options))[1]
with compile_ahead.compiling_ahead(2):
    launch()
    once = len(asked)
    launch()
assert len(asked) == once, "Triton was asked for what it had been asked for"
JITFunction.run = run
ahead = list(about)
about.clear()
launch()
print(json.dumps([ahead, about, launchers]))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for the driver that is there")
def test_each_kernel_is_compiled_once_by_a_thread_and_then_known(tmp_path: Path) -> None:
    """The same launches again compile nothing, whatever the folder holds: ten launches need two kernels at least."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", SCRIPT, str(BENCHMARKS)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    ahead, later, launchers = json.loads(ran.stdout.splitlines()[-1])
    assert 2 <= len(ahead) <= 6
    assert all(thread.startswith("compile-kernels") for _, thread in ahead)
    assert sorted(launchers) == sorted(thread for _, thread in ahead)
    assert later == []


def test_new_tensors_hold_zeros_meanwhile() -> None:
    """Whatever a kernel would have written: an index into what is there."""
    with torch.inference_mode(), compiling_ahead(1):
        made = [torch.empty(3, 70), torch.empty_like(torch.ones(500)), torch.ones(2).new_empty(300, dtype=torch.int64)]
        made.append(torch.empty_strided((4, 50), (1, 4)))
        assert torch.ones(7).sum() == 7
    assert not any(each.any() for each in made)


def test_launches_differ_by_what_triton_compiles_for() -> None:
    """Types, alignment, ones and multiples of sixteen, constants by their value; not by how many rows there are."""
    params = [SimpleNamespace(name=name, is_constexpr=name == "SIZE") for name in ("x", "rows", "SIZE")]
    kernel = SimpleNamespace(params=params, arg_names=["x", "rows", "SIZE"])
    kinds, memory = _Kinds(), torch.zeros(64)

    def kind(x: Any = memory, rows: int = 6, size: int = 128, **options: Any) -> object:
        return kinds.of(kernel, (x, rows), {"SIZE": size, **options})

    assert kind() == kind(rows=7) == kind(x=memory[4:])
    others = [
        kind(), kind(rows=1), kind(rows=32), kind(rows=2**40), kind(x=memory[1:]), kind(x=memory.half()),
        kind(size=256), kind(num_warps=8), kind(num_warps=4), kind(x=None), kind(x=(memory, 3)),
    ]  # fmt: skip
    assert len(set(others)) == len(others)
    assert kinds.of(kernel, (memory, 6, 128), {}) != kinds.of(kernel, (memory, 6, 256), {})
    assert len({kinds.of(kernel, (memory, 6, size), {}) for size in ([1, 2], [1, 3], [1, 2])}) == 2


def test_a_kernel_that_is_not_loaded_is_refused_only_meanwhile() -> None:
    """Before Triton loads one it calls this hook."""
    from triton import knobs

    hook = knobs.runtime.kernel_load_start_hook
    with pytest.raises(NotLoaded), refusing_to_load():
        hook(None, None, "kernel", {}, "hash")
    hook(None, None, "kernel", {}, "hash")
