"""The copying of short messages; how two cards wait for each other is seen on cards: `bench_stage_wire.py --check`."""

import pytest
import torch

from argosy.kernels import card_message


@pytest.mark.parametrize("num_words", [1, 2, 1023, 1024, 4097, 100_001])
def test_all_words_arrive_and_nothing_else_is_touched(num_words: int, device: torch.device) -> None:
    """From one word to more than all programs move at once."""
    source = torch.randint(-(2**31), 2**31 - 1, (num_words,), dtype=torch.int32, device=device)
    target = torch.zeros(num_words + 8, dtype=torch.int32, device=device)
    card_message.copy_tensor(source, target[:num_words])
    assert torch.equal(target[:num_words], source)
    assert not target[num_words:].any()
