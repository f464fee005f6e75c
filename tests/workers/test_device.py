"""Which device a rank computes on, and what is said where there is none."""

import pytest
import torch

from argosy.cluster.protocol.errors import ConfigError
from argosy.placement.plan import RankInfo
from argosy.workers.device import choose_device


def test_a_card_that_is_not_there_is_said_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks on a node whose second card is hidden, and a wish for cards where there are none."""
    rank = RankInfo(global_rank=1, tp_rank=1, pp_rank=0, tp_size=2, pp_size=1, first_layer=0, last_layer=2, gpu=1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"^rank 1 wants GPU 1, and torch sees 1 here; .* CUDA_VISIBLE_DEVICES$"):
        choose_device("auto", rank)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", rank) == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", rank) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"^device='cuda': torch sees no CUDA device here; use device='cpu'"):
        choose_device("cuda", rank)
