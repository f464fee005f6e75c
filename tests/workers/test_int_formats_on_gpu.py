"""Checkpoints of 4 and 8 bits on a card, where they stay packed: the answers of transformers with the plain weights, as
near as float16 comes. Linear layers and experts of every format, one, several and many tokens a step."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
import family_cases
from family_harness import Expected, Harness, load_expected

from argosy.kernels.moe_reference import IntExpertWeight
from argosy.placement.plan import make_plan
from argosy.placement.process_groups import init_parallel
from argosy.workers.attention.triton_backend import TritonBackend

from . import test_int_experts, test_int_weights

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NEAR = 1e-2  # on a CPU, by the definitions in float16, the worst are 0.5 %
LINEAR = (
    "gptq 4 bits", "gptq 8 bits, one group", "gptq v2, ordered", "awq", "packed 4 bits", "packed 4 bits, ordered",
    "packed 8 bits, zeros, ordered", "int8, channel", "bitsandbytes",
)  # fmt: skip
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE.type == "cpu", reason="needs an NVIDIA GPU")]


def harness_of(folder: Path, dtype: torch.dtype = torch.float16) -> Harness:
    """Alone on the card, or on a CPU to try these tests."""
    rank = make_plan(2, 1, 1).ranks[0]
    on_a_card: dict[str, Any] = {"backend": TritonBackend(), "block_size": 16} if DEVICE.type == "cuda" else {}
    return Harness(folder, rank, init_parallel(rank, "", DEVICE, 1.0), device=DEVICE, dtype=dtype, **on_a_card)


@pytest.mark.parametrize("name", LINEAR)
def test_linear_layers(name: str, tmp_path: Path) -> None:
    """Somebody serves a packed Llama: prompts together, then single tokens."""
    plain = test_int_weights.write(tmp_path, test_int_weights.FORMATS[name])
    config = transformers.LlamaConfig(**test_int_weights.SHAPE, bos_token_id=1, eos_token_id=2)
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict({key: value.float() for key, value in plain.items()})
    expected = Expected(family_cases.PROMPTS, *family_cases.greedy_answers(model))
    assert float(harness_of(tmp_path).errors(expected).max()) < NEAR


@pytest.mark.parametrize("name", test_int_experts.PACKED)
def test_experts(name: str, tmp_path: Path) -> None:
    """Somebody serves a packed mixture; its experts are kept in the file's bits."""
    test_int_experts.write(tmp_path, test_int_experts.PACKED[name])
    harness = harness_of(tmp_path)
    if DEVICE.type == "cuda":
        assert isinstance(harness.model.layers["0"].mlp.experts.down, IntExpertWeight)
    assert float(harness.errors(load_expected(tmp_path)).max()) < NEAR
