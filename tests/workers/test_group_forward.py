"""When a step over a group is computed in halves: only where the cards have work for as long as the host takes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from argosy.workers.layers.group_sum import NUM_PARTS, GroupSum, Left
from argosy.workers.models.group_forward import LEAST_OVERLAP_TOKENS, GroupForward, least_overlapped

LLAMA_8B = 436_207_616  # bytes of a layer's weights, over all ranks
LLAMA_70B = 1_711_276_032


def test_small_steps_stay_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer of 8B keeps two H200 for 1.15 ms; four do it in half the time, and 70B has more to do a layer."""
    monkeypatch.delenv("ARGOSY_OVERLAP_TOKENS", raising=False)
    over_two = least_overlapped(LLAMA_8B // 2, 8192, 2)
    over_four = least_overlapped(LLAMA_8B // 4, 8192, 4)
    assert 2500 < over_two < 3500
    assert over_two < over_four < 8192
    assert LEAST_OVERLAP_TOKENS <= least_overlapped(LLAMA_70B // 4, 16384, 4) < over_two


def test_the_bound_can_be_set_to_measure_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the environment, which ranks inherit."""
    monkeypatch.setenv("ARGOSY_OVERLAP_TOKENS", "1500")
    assert least_overlapped(1, 1, 2) == 1500


@pytest.mark.parametrize(
    ("ranks", "width", "dtype", "ways"),
    [
        (2, 4096, torch.bfloat16, {0: "pull", 1: "push", 32: "push", 33: "pull", 4096: "pull"}),
        (4, 4096, torch.bfloat16, {1: "push", 16: "push", 17: "push scatter", 64: "push scatter", 65: "pull scatter"}),
        (4, 8192, torch.bfloat16, {1: "pull", 32: "pull", 33: "pull scatter"}),
        (2, 4096, torch.float32, {1: "pull"}),
    ],
)
def test_the_way_of_a_sum_follows_from_its_bytes(
    ranks: int, width: int, dtype: torch.dtype, ways: dict[int, str]
) -> None:
    """As measured on H200; where no row is sent with its flags, no memory is kept for that."""
    asked_bytes: list[int] = []
    parallel: Any = SimpleNamespace(
        rank=SimpleNamespace(tp_rank=0), tp_size=ranks, device=torch.device("cpu"), shared_buffer=asked_bytes.append
    )
    sums = GroupSum(parallel, max_tokens=4096, width=width, max_rows=64, dtype=dtype)
    assert {rows: sums.way_of(rows) for rows in ways} == ways
    assert sums.way_of(1, asked=True) == "pull"
    assert "scatter" not in sums.way_of(64, whole=True)
    parts = (NUM_PARTS + 1) * 4096 * width * dtype.itemsize
    assert (asked_bytes[0] - parts > 4 << 20) == sums.pushes == ("push" in ways.values())


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_one_token_alone_goes_through_a_launch_a_layer(num_tokens: int) -> None:
    """Its words have room for a single row, so two rows go by sums as ever."""
    went: list[str] = []

    def through(*_: object) -> torch.Tensor:
        went.append("chain")
        return torch.zeros(num_tokens, 8)

    def part(x_TD: torch.Tensor, *_: object, in_pieces: bool) -> Left:
        went.append(f"part of {len(x_TD)}")
        return Left()

    def add_norm(which: int, residual_TD: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return residual_TD

    stage: Any = object.__new__(GroupForward)
    attention = SimpleNamespace(qkv_proj=SimpleNamespace(product=lambda x_TD: x_TD), part=part)
    layer: Any = SimpleNamespace(
        input_norm=torch.clone, attention=attention, mlp=SimpleNamespace(part=part), mlp_norm=None
    )
    stage.sums = SimpleNamespace(part=lambda *_: None, takes_pieces=lambda _: True, add_norm=add_norm)
    chain = SimpleNamespace(through=through, takes=lambda count: count == 1)
    stage._chains, stage._embed, stage._copies = [chain], None, None
    stage._layers, stage._in_turn, stage._norms = [layer], lambda: [layer], [None, None]
    stage(None, torch.zeros(num_tokens, 8), torch.zeros(num_tokens), SimpleNamespace(asked_rows_S=None))
    assert went == (["chain"] if num_tokens == 1 else ["part of 2", "part of 2"])
