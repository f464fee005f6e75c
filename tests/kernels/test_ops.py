"""The door: a CPU tensor needs no Triton, and every operation is in the reference under the same name."""

import inspect
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

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
        if name in ("swap_blocks", "even_pays", "part_of_sum", "rows_of_each_kind"):
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


def test_a_card_that_nobody_measured_takes_no_other_s_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its driver says of it decides; a name that is no file's has no sizes at all."""
    device = torch.device("cuda", 3)
    ada = SimpleNamespace(
        name="NVIDIA L4", multi_processor_count=58, major=8, minor=9, shared_memory_per_block_optin=101376
    )
    hopper = SimpleNamespace(name="NVIDIA H200", multi_processor_count=132, major=9, minor=0)
    blackwell = SimpleNamespace(name="NVIDIA GeForce RTX 5090", multi_processor_count=170, major=12, minor=0)
    found = {}
    for card in (ada, hopper, blackwell):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, card=card: card)
        tuning.device_facts.cache_clear()
        facts = found[card.name] = tuning.device_facts(device)
        measured = json.loads((tuning.TUNED / "nvidia_h200.json").read_text())
        for kernel, shapes in measured.items():
            assert tuning.knows(kernel, device) == (card is hopper)
            key, sizes = next(iter(shapes.items()))
            assert tuning.pick(kernel, key, device) == (sizes if card is hopper else None)
        assert (facts.num_sms, facts.knows_ptx) == (card.multi_processor_count, torch.version.hip is None)
    tuning.device_facts.cache_clear()
    assert [one.shared_bytes for one in found.values()] == [99 * 1024, 227 * 1024, 99 * 1024]
    assert [one.overlaps for one in found.values()] == [False, True, True]
    assert [one.adds_bf16 for one in found.values()] == [False, True, True]
