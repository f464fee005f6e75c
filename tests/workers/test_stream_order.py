"""On a card nothing waits by itself: every copy of weights and hidden states must be ordered by an event."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from stream_order import Event, Stream, Watch, bytes_of, watch
from test_long_steps import random_step

from argosy.placement.plan import RankInfo, make_plan
from argosy.workers.long_steps import NUM_BUFFERS, LongSteps
from argosy.workers.weight_offload import WeightOffload

CPU = torch.device("cpu")
WIDTH, LAYERS = 4, 3


def test_the_watch_sees_a_missing_event_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge must be able to condemn, and to acquit."""
    for is_ordered in (True, False):
        with watch(monkeypatch) as seen:
            memory, side, event = torch.zeros(8), Stream("side"), Event()
            with seen.on(side):
                memory.copy_(torch.ones(8))
                event.record(side)
            if is_ordered:
                seen.main.wait_event(event)
            memory.add_(1)
        assert bool(seen.races([bytes_of(memory)])) != is_ordered


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_weights_arrive_before_their_layer_and_stay_until_it_is_done(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three passes, one after the other, over layers of which the last `count` come through the buffers."""
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(6)]
    for layer in layers:
        layer.requires_grad_(False)
    offload = WeightOffload(nn.Module(), layers[6 - count :], CPU)
    for layer in offload.layers:
        offload.pack(layer)
    offload.open()
    offload._copies = Stream("link")
    offload._arrived, offload._spent = ([Event() for _ in range(count)] for _ in range(2))
    with watch(monkeypatch) as seen:
        for _ in range(3):
            for layer in offload.in_turn(layers):
                layer(torch.ones(1, WIDTH))
    assert seen.races([bytes_of(buffer) for buffer in offload._buffers]) == []
    assert sum(touch.stream == "link" and touch.writes for touch in seen.touches) == 3 * count


class Model:
    """Layers that change what they get."""

    def in_turn(self) -> Iterator[int]:
        return iter(range(LAYERS))

    def enter(self, token_ids_T: Tensor, positions_T: Tensor) -> Tensor:
        return torch.ones(len(token_ids_T), WIDTH)

    def through(self, layer: int, x_TD: Tensor, positions_T: Tensor, ctx: Any, rows_S: Tensor | None = None) -> Tensor:
        x_TD.add_(1)
        return x_TD if rows_S is None else x_TD[rows_S]

    def leave(self, x_TD: Tensor) -> Tensor:
        return x_TD * 2


class Wires:
    """To the stages before and behind."""

    def receive(self, num_tokens: int, into_TD: Tensor) -> Tensor:
        return into_TD.fill_(1)

    def send(self, hidden_TD: Tensor, *, changes: bool) -> None:
        assert changes
        hidden_TD.clone()

    def flush(self) -> None:
        pass


def long_steps(rank: RankInfo, slice_tokens: int, max_tokens: int) -> LongSteps:
    """With streams that are watched."""
    made = LongSteps(
        Model(), rank, Wires(), slice_tokens=slice_tokens, max_tokens=max_tokens, width=WIDTH,  # type: ignore[arg-type]  # stand-ins
        dtype=torch.float32, device=CPU,
    )  # fmt: skip
    made._in, made._out = Stream("in"), Stream("out")
    made._arrived, made._computed, made._stored = ([Event() for _ in range(NUM_BUFFERS)] for _ in range(3))
    return made


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("slices", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("keeps_all", [False, True])
def test_hidden_states_come_and_go_in_order(
    stage: int, slices: int, keeps_all: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of so many slices, one behind the other, on the first, a middle and the last stage."""
    import random

    step = random_step(random.Random(slices))
    size = -(-step.num_tokens // slices)
    rank = make_plan(3 * LAYERS, 1, 3).ranks[stage]
    steps = long_steps(rank, size, step.num_tokens)
    with watch(monkeypatch) as seen:
        for _ in range(3):
            hidden = steps.run(step, SimpleNamespace(), SimpleNamespace(), keeps_all=keeps_all and stage == 2)  # type: ignore[arg-type]  # stand-ins
            if hidden is not None:
                assert torch.equal(hidden.sampled_SD, torch.full_like(hidden.sampled_SD, 2.0 * (1 + LAYERS)))
                if keeps_all:
                    assert float(hidden[slice(0, step.num_tokens)].min()) == 2.0 * (1 + LAYERS)
    _acquit(seen, [bytes_of(steps._buffers_NCD), bytes_of(steps._host_TD)])


def _acquit(seen: Watch, ranges: list[tuple[int, int]]) -> None:
    races = seen.races(ranges)
    assert not races, races[0]
