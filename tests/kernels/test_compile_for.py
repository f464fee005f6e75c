"""Kernels compile for a card that is not here: what needs more than it has is found without one."""

from collections.abc import Callable

Compiled = Callable[[str], list[str]]


def test_products_of_a_few_tokens_fit_a_hopper_card(compiled_for_hopper: Compiled) -> None:
    """The quickest of its parts; the others are run by hand before a card is asked for."""
    lines = compiled_for_hopper("linear")
    assert len(lines) == 4
    assert all(" 0 spilled" in line for line in lines), lines
