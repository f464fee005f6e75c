"""The gate inside a product of many tokens: equal to the reference on ugly shapes, chosen only where measured."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from argosy.kernels import ops, reference, tuning

Near = Callable[[Tensor, Tensor], None]
Compiled = Callable[[str], list[str]]
IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
hopper_only = pytest.mark.skipif(not IS_HOPPER, reason="needs capability 9.0")


@pytest.mark.gpu
@hopper_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fetch_warps", [1, 4])
@pytest.mark.parametrize(
    ("num_tokens", "num_inputs", "num_outputs", "grouped"),
    [(1, 64, 128, 8), (130, 128, 256, 8), (1000, 256, 1024, 2), (2049, 1024, 3072, 8), (600, 4096, 14336, 32)],
)
def test_it_is_the_reference(
    num_tokens: int, num_inputs: int, num_outputs: int, grouped: int, fetch_warps: int, dtype: torch.dtype,
    assert_near: Near,
) -> None:  # fmt: skip
    """Inputs are a view with rows further apart; what lies beside the outputs is left alone."""
    from argosy.kernels.hopper_gate import gated_linear, takes

    x = torch.randn(num_tokens, num_inputs + 64, device="cuda").to(dtype)[:, :num_inputs]
    weight = (torch.randn(2 * num_outputs, num_inputs, device="cuda") / num_inputs**0.5).to(dtype)
    assert takes(x, weight)
    want = reference.fused_linear(x.double(), weight.double(), gated=True)
    room = torch.full((num_tokens + 3, num_outputs + 8), 7.0, device="cuda", dtype=dtype)
    sizes = {"fetch_warps": fetch_warps, "grouped": grouped}
    gated_linear(x, weight, out_TX=room[:num_tokens, :num_outputs], sizes=sizes)
    assert_near(room[:num_tokens, :num_outputs], want)
    assert bool((room[num_tokens:] == 7.0).all())
    assert bool((room[:, num_outputs:] == 7.0).all())


@pytest.mark.gpu
@hopper_only
@pytest.mark.parametrize("num_tokens", [200, 1024, 1500])
def test_the_door_takes_it_where_it_was_measured(num_tokens: int, assert_near: Near) -> None:
    """With the norm before it, and into what the caller has."""
    x, weight = torch.randn(num_tokens, 4096, device="cuda").bfloat16(), torch.randn(28672, 4096, device="cuda")
    weight, norm = (weight / 64).bfloat16(), torch.randn(4096, device="cuda").bfloat16()
    out = torch.full((num_tokens, 14336), float("nan"), device="cuda", dtype=torch.bfloat16)
    assert ops.fused_linear(x, weight, norm_weight_I=norm, gated=True, out_TO=out) is out
    assert_near(out, reference.fused_linear(x.double(), weight.double(), norm_weight_I=norm.double(), gated=True))


def test_a_window_of_tokens_may_be_taken_below_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank of two cards: 256 tokens are two full tiles, 512 no faster than the library's."""
    hopper_gate = pytest.importorskip("argosy.kernels.hopper_gate")
    sizes = {"least": 2048, "window_least": 225, "window_most": 256}
    monkeypatch.setattr(hopper_gate.tuning, "pick", lambda *_: sizes)
    monkeypatch.setattr(hopper_gate, "takes", lambda *_: True)
    weight = torch.empty(2, 64)
    taken = [n for n in (200, 225, 256, 257, 512, 2048) if hopper_gate.suits(torch.empty(n, 64), weight)]
    assert taken == [225, 256, 2048]
    del sizes["window_least"], sizes["window_most"]
    assert not hopper_gate.suits(torch.empty(256, 64), weight)


def test_nothing_was_measured_for_an_unknown_device() -> None:
    assert not tuning.knows("hopper_gate", torch.device("cpu"))


def test_it_compiles_for_a_hopper_card_and_fits(compiled_for_hopper: Compiled) -> None:
    """No registers spilled, and the ring fits on chip."""
    lines = compiled_for_hopper("gate")
    assert len(lines) == 2
    assert all(" 0 spilled" in line for line in lines), lines
