"""Which ways there are through layers for so few tokens that launches are what they wait for."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from argosy.workers.layers import chains


def test_nothing_is_opened_where_nothing_was_measured() -> None:
    """A CPU has neither, and nobody asks for memory there."""
    parallel: Any = SimpleNamespace(device=torch.device("cpu"), tp_size=1)
    layers: Any = [object()]
    assert chains.open_chains(parallel, layers, 4096, torch.bfloat16) == []


def test_each_is_asked_with_what_it_needs_to_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what one of them leaves, the other may take."""
    asked: list[Any] = []

    def none_of(*values: Any, **options: Any) -> None:
        asked.append((values, options))

    opened: Any = SimpleNamespace(takes=lambda count: count == 1)
    monkeypatch.setattr(chains, "open_layer_chain", none_of)
    monkeypatch.setattr(chains, "open_fp8_one_token", lambda *values, **options: none_of(*values, **options) or opened)
    parallel, layers = SimpleNamespace(tp_size=1), [object()]
    assert chains.open_chains(parallel, layers, 64, torch.float16) == [opened]  # type: ignore[arg-type]  # stand-ins
    assert asked == [((parallel, layers), {"width": 64, "dtype": torch.float16})] * 2
