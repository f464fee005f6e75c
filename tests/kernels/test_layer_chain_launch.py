"""What the launcher of a layer's chain takes, and what it tells the kernel."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from argosy.kernels import layer_chain, tuning


def test_widths_that_do_not_fit_are_said_to() -> None:
    """A tile holds at least one weight row, two with a gate; every program needs one of `down`; rings have bounds."""
    sizes = {"slot": 16384, "stages": 6, "warps": 8, "per_sm": 1}
    assert layer_chain.suits(1024, 4096, 3584, 1536, sizes, 132)
    assert layer_chain.suits(2048, 8192, 7168, 2560, sizes, 132)
    assert not layer_chain.suits(2048, 8192, 7168, 2560, sizes | {"slot": 8192}, 132)
    assert not layer_chain.suits(1024, 4096, 28672, 1536, sizes, 132)
    assert not layer_chain.suits(1024, 4096, 3584, 1536, sizes | {"stages": 7}, 132)
    wide = sizes | {"slot": 32768, "stages": 3}
    assert layer_chain.suits(1024, 8192, 3584, 1536, wide, 132)
    assert not layer_chain.suits(1024, 16384, 3584, 1536, wide, 132), "a residual of 32 KB beside three places of 64"
    assert not layer_chain.suits(64, 256, 512, 128, sizes, 132)
    assert not layer_chain.suits(1024, 4096, 3588, 1536, sizes, 132)
    assert not layer_chain.suits(1024, 4096, 3584, 1540, sizes, 132)
    few = sizes | {"slot": 65536, "stages": 1}  # 64 tiles of 32 rows
    assert layer_chain.suits(1024, 2048, 2048, 1536, few, 64)
    assert not layer_chain.suits(1024, 2048, 2048, 1536, few, 65)


def test_words_that_two_threads_would_read_are_not_taken() -> None:
    """A card showed it: of two copies of a number, read at two moments, only one was waited for."""
    sizes = {"slot": 32768, "stages": 2, "warps": 8, "per_sm": 1}
    assert layer_chain.suits(2048, 2048, 3072, 4096, sizes, 128)
    assert not layer_chain.suits(2048, 1024, 3072, 4096, sizes, 128)
    assert not layer_chain.suits(2048, 4096, 2048, 4096, sizes | {"warps": 16}, 128)


@pytest.mark.parametrize(("ends", "biased"), [("product", True), ("product", False), ("norm", False), ("", False)])
def test_the_launcher_says_what_it_was_given(monkeypatch: pytest.MonkeyPatch, ends: str, biased: bool) -> None:
    """Each norm with its own epsilon, what comes behind, and as many programs as fit beside what others need."""
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *values, **sizes: launches.append((grid, values, sizes))

    monkeypatch.setattr(layer_chain, "_chain_kernel", Kernel())
    monkeypatch.setattr(layer_chain.tuning, "device_facts", lambda _: SimpleNamespace(num_sms=7))
    monkeypatch.setattr(layer_chain.tuning, "overlap", lambda _: {})
    hidden, seen, inner, qkv, world = 256, 128, 512, 384, 2
    sizes = {"slot": 2048, "stages": 3, "warps": 1, "per_sm": 2, "spare": 1, "cut": 2}
    weights = [torch.zeros(shape) for shape in ((hidden, seen), (2 * inner, hidden), (hidden, inner), (qkv, hidden))]
    norms = [(torch.full((hidden,), float(n)), 0.1 + n) for n in range(2)]
    bias, residual, out = torch.zeros(qkv), torch.zeros(1, hidden), torch.zeros(1, qkv)
    bases, counters, own = torch.zeros(world, dtype=torch.int64), torch.zeros(14), torch.zeros(inner)
    seen_1S = torch.zeros(1, seen)
    has_product = ends == "product"
    told = layer_chain.chain(
        seen_1S, (*weights[:3], weights[3] if has_product else None), (norms[0], norms[1] if ends else None),
        bias if biased else None, residual, out, bases, own, counters, 1, sizes, inbox_at=64,
    )  # fmt: skip
    assert told is out
    ((grid, values, named),) = launches
    assert grid == (12,)
    seen_at, o_at, up_at, down_at, qkv_at, bias_at, norm_at, next_at, *rest = values
    assert (seen_at is seen_1S, o_at is weights[0], up_at is weights[1], down_at is weights[2]) == (True,) * 4
    assert norm_at is norms[0][0]
    assert all(a is b for a, b in zip(rest[:5], (residual, out, bases, own, counters), strict=True))
    assert rest[5:8] == [16, 1, 0.1]
    if has_product:
        assert qkv_at is weights[3]
    if biased:
        assert bias_at is bias
    if ends:
        assert next_at is norms[1][0]
        assert rest[8] == 1.1
    widths = {"SEEN": seen, "HIDDEN": hidden, "INNER": inner, "QKV": qkv if has_product else 0, "WORLD": world}
    ring = {"SLOT": 2048, "STAGES": 3, "PROGRAMS": 12, "CUT": 2, "num_warps": 1, "WAIT": True}
    assert named == {**widths, **ring, "BIAS": biased, "NORM": bool(ends)}


def test_measured_sizes_suit_their_widths() -> None:
    """An entry that did not would be left aside without a word."""
    entries = tuning._tuned("nvidia_h200")["layer_chain"]
    assert entries
    for key, sizes in entries.items():
        hidden, seen, inner, _ = map(int, key.split("x"))
        assert layer_chain.suits(seen, hidden, inner, 1536, sizes, 132 * sizes["per_sm"]), key
