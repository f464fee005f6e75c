"""Kernels compile for a card that is not here: what needs more than it has is found without one."""

from collections.abc import Callable

Compiled = Callable[[str], list[str]]


def test_products_of_a_few_tokens_fit_a_hopper_card(compiled_for_hopper: Compiled) -> None:
    """The quickest of its parts; the others are run by hand before a card is asked for."""
    lines = compiled_for_hopper("linear")
    assert len(lines) == 4
    assert all(" 0 spilled" in line for line in lines), lines


def test_what_nobody_measured_fits_a_smaller_card(compiled_for_another: Callable[..., list[str]]) -> None:
    """An L4 has 99 KB on chip for a program and adds no two bfloat16 at once: what asked for more ended its engine
    with the first step. The script without words compiles all there is, for an A100 or an RTX 5090, too."""
    asked = {
        "prompts 300/4 16/2x256 bfloat16": 1, "linear 1 14336x4096 added": 1, "linear 8 14336x4096 added": 1,
        "8 bits 4096x512 bfloat16 8": 3, "4 bits 4096x512 bfloat16 64": 1, "expert, 8 bits 4096x512 bfloat16 16": 2,
        "latent 64 float32": 2,
    }  # fmt: skip
    lines = compiled_for_another("L4", *asked)
    found = {words: sum(words in line for line in lines) for words in asked}
    assert all(found[words] >= least for words, least in asked.items()), (found, lines)
    assert all(int(line.split()[0]) <= 99 * 1024 for line in lines), lines
