"""The door: a CPU tensor needs no Triton, and every operation is in the reference under the same name."""

import inspect
import subprocess
import sys

from argosy.kernels import ops, reference, sampling_reference, step_ops, tables_reference, tuning


def test_a_cpu_host_loads_no_triton() -> None:
    program = """
import sys, torch
from argosy.kernels import ops
x = torch.randn(2, 8)
ops.rms_norm(x, x[0], 1e-6), ops.silu_and_mul(x), ops.fused_linear(x, x)
assert "triton" not in sys.modules and not any("argosy.kernels.rms_norm" in m for m in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_each_operation_has_its_meaning_in_the_reference() -> None:
    own = {ops.__name__, step_ops.__name__}
    operations = {**dict(inspect.getmembers(ops, inspect.isfunction)), **vars(step_ops)}
    operations = {name: one for name, one in operations.items() if getattr(one, "__module__", "") in own}
    assert {"rms_norm", "sample_rows", "copy_blocks", "prepare_decode"} <= set(operations)
    for name, operation in operations.items():
        # `copy_blocks` between two places; a question, no operation; `fused_linear`, maybe not added up yet
        if name in ("swap_blocks", "even_pays", "part_of_sum"):
            continue
        meaning = next(
            getattr(room, name) for room in (reference, tables_reference, sampling_reference) if hasattr(room, name)
        )
        extra = set(inspect.signature(operation).parameters) ^ set(inspect.signature(meaning).parameters)
        launch = {
            "even",
            "inputs_early",
            "lean",
            "likely_rows",
            "max_context",
            "num_context_tokens",
            "num_queries",
            "order_R",
            "out_RNH",
            "out_TNH",
            "out_TO",
            "rings",
            "scratch",
            "shared_len_R",
        }  # say how, not what
        assert extra <= launch | {"caches", "sources", "destinations"}, name


def test_tuned_files_hold_whole_numbers() -> None:
    for path in tuning.TUNED.glob("*.json"):
        for shapes in tuning._tuned(path.stem).values():
            for sizes in shapes.values():
                assert all(isinstance(x, int) for x in sizes.values())
