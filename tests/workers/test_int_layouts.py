"""The corners of published layouts that small checkpoints happen not to have: what a stored word means there."""

import numpy as np
import pytest
import torch

from argosy.cluster.protocol.errors import UnsupportedModel
from argosy.cluster.protocol.int_quant_spec import IntScheme
from argosy.workers.quantization import int_layouts

from .test_int_weights import pack_words

RNG = np.random.default_rng(5)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_zero_of_zero_is_stored_by_gptq_as_the_largest_number(bits: int) -> None:
    """Zeros are stored less one, so nought comes round to the other end; it is not 16."""
    zero_GO = RNG.integers(0, 1 << bits, (2, 16))
    zero_GO[0, 3] = 0
    scheme = IntScheme(layout="gptq", bits=bits, group=32, symmetric=False, zero_offset=1)
    tensors = {
        "numbers": pack_words(RNG.integers(0, 1 << bits, (64, 16)), bits, 0),
        "scales": torch.rand(2, 16, dtype=torch.float16),
        "zeros": pack_words((zero_GO - 1) % (1 << bits), bits, 1),
    }
    _, _, zero_OG, _ = int_layouts.read(scheme, 16, 64, tensors, torch.float16)
    assert torch.equal(zero_OG, torch.from_numpy(zero_GO.T).half())


def test_packed_zeros_of_a_number_of_rows_that_fills_no_words() -> None:
    """12 outputs of 4 bits are a word and a half; what fills the second one up is nobody's zero."""
    zero_OG = RNG.integers(0, 16, (12, 3))
    numbers_OI = RNG.integers(0, 16, (12, 48))
    scheme = IntScheme(layout="packed", bits=4, group=16, symmetric=False)
    tensors = {
        "numbers": pack_words(numbers_OI, 4, 1),
        "scales": torch.rand(12, 3),
        "zeros": pack_words(zero_OG, 4, 0),
    }
    numbers, scales, zeros, order = int_layouts.read(scheme, 12, 48, tensors, torch.float32)
    assert torch.equal(numbers, torch.from_numpy(numbers_OI).int())
    assert scales.shape == zeros.shape == (12, 3)
    assert torch.equal(zeros, torch.from_numpy(zero_OG).float())
    assert order is None


@pytest.mark.parametrize(
    ("group_I", "order"),
    [
        ([-1] * 8, None),  # announced in config.json, and not made use of
        ([0, 0, 0, 0, 1, 1, 1, 1], None),
        ([0, 0, 1, 0, 1, 1, 0, 1], [0, 1, 3, 6, 2, 4, 5, 7]),
    ],
)
def test_an_order_of_inputs_is_that_of_their_groups(group_I: list[int], order: list[int] | None) -> None:
    """Inputs of one group in the order of the file; none where they lie side by side already."""
    scheme = IntScheme(layout="packed", bits=4, group=4, ordered=True)
    numbers_OI = RNG.integers(0, 16, (8, 8))
    tensors = {"numbers": pack_words(numbers_OI, 4, 1), "scales": torch.rand(8, 2), "order": torch.tensor(group_I)}
    numbers, _, _, found = int_layouts.read(scheme, 8, 8, tensors, torch.float32)
    assert (None if found is None else found.tolist()) == order
    assert torch.equal(numbers, torch.from_numpy(numbers_OI).int()[:, order or list(range(8))])


def test_an_order_that_names_groups_of_two_sizes_is_refused() -> None:
    """Such a file is broken, and its scales would belong to other inputs."""
    scheme = IntScheme(layout="packed", bits=4, group=4, ordered=True)
    tensors = {
        "numbers": pack_words(RNG.integers(0, 16, (8, 8)), 4, 1),
        "scales": torch.rand(8, 2),
        "order": torch.tensor([1, 0, 0, 0, 0, 0, 1, 1]),
    }
    with pytest.raises(UnsupportedModel, match="g_idx does not name groups of one size"):
        int_layouts.read(scheme, 8, 8, tensors, torch.float32)
