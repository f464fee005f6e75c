"""The pretended ranks notice what real ranks would get wrong."""

from collections.abc import Callable
from typing import Any

import pytest

from argosy.cluster.clock import MonotonicClock
from argosy.cluster.driver import Driver
from argosy.cluster.metrics import Metrics
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import InvariantBroken
from argosy.cluster.protocol.messages import GenerateRequest, NewRequest, SchedulerOutput
from argosy.cluster.protocol.sampling import TokenParams
from argosy.cluster.simulation import PagedTokens, SimulatedExecutor, Simulation, hash_token


def ranks() -> PagedTokens:
    return PagedTokens(8, 4, 4, hash_token(1000))


def new(handle: int, token_ids: list[int], block_ids: list[int], computed: int = 0) -> NewRequest:
    return NewRequest(
        handle=handle,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        num_computed_tokens=computed,
        block_ids=block_ids,
        params=TokenParams(max_tokens=9),
    )


def step(step_id: int, rows: list[int], num_tokens: list[int], **fields: Any) -> SchedulerOutput:
    return SchedulerOutput(step_id=step_id, epoch=0, rows=rows, num_tokens=num_tokens, **fields)


def test_a_stale_or_foreign_block_changes_the_token() -> None:
    """A table that names another block than was written reads other tokens."""
    one, other = ranks(), ranks()
    first = step(0, [0], [4], new_requests=[new(0, [1, 2, 3, 4], [2])])
    assert one.run(first) == other.run(first)
    again = {"new_requests": [new(1, [1, 2, 3, 4, 5], [2, 3], computed=4)]}
    wrong = {"new_requests": [new(1, [1, 2, 3, 4, 5], [1, 3], computed=4)]}
    assert one.run(step(1, [1], [1], **again)).token_ids != other.run(step(1, [1], [1], **wrong)).token_ids


def test_a_copy_takes_the_block_as_it_was_before_the_step() -> None:
    """Copy-on-write: the fork goes on from the shared tokens."""
    one, plain = ranks(), ranks()
    one.run(step(0, [0], [3], new_requests=[new(0, [1, 2, 3], [2])]))
    forked = one.run(step(1, [1], [1], new_requests=[new(1, [1, 2, 3], [5], computed=2)], block_copies=[(2, 5)]))
    assert forked.token_ids == plain.run(step(0, [0], [3], new_requests=[new(0, [1, 2, 3], [2])])).token_ids


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        (step(0, [0], [1]), "out of order"),
        (step(1, [0], [2]), "nobody knows"),
        (step(1, [0, 0], [1, 1]), "don't match"),
        (step(1, [], [], finished=[3]), "handle 3 is unknown"),
        (step(1, [], [], new_requests=[new(0, [1], [4])]), "handle 0 is in use"),
        (step(1, [], [], new_requests=[new(9, [1], [4])]), "out of range"),
        (step(1, [0, 1], [1, 1], new_requests=[new(1, [1, 2, 3, 4], [2], computed=3)]), "two rows write"),
        (step(1, [1], [5], new_requests=[new(1, [1, 2, 3, 4, 5], [4])]), "no block"),
        (step(1, [0], [1], partial=[0]), "partial"),
    ],
)
def test_a_step_that_ranks_could_not_carry_out_is_refused(second: SchedulerOutput, problem: str) -> None:
    """Each of these would be silent damage on a device."""
    one = ranks()
    one.run(step(0, [0], [3], new_requests=[new(0, [1, 2, 3], [2])]))
    with pytest.raises(InvariantBroken, match=problem):
        one.run(second)


def test_virtual_time_passes_as_steps_take_it(world: Callable[..., Any]) -> None:
    """Ten tokens of ten milliseconds each."""
    here = world(step_seconds=0.01, async_scheduling=False)
    began = here.clock.now()
    here.ask([1, 2, 3], max_tokens=10)
    here.run()
    assert here.clock.now() - began == pytest.approx(0.1)


def test_it_runs_in_real_time_behind_doors() -> None:
    """For tests of the doors: the machine's clock, a short delay a step."""
    config, clock = ServingConfig.from_mapping({"model": "m"}), MonotonicClock()
    executor = SimulatedExecutor(config, clock, step_seconds=0.001)
    here = Simulation(Driver(config, executor, clock, Metrics()), executor)
    here.driver.start()
    here.send(GenerateRequest(stream_id=0, request_id="0", prompt_token_ids=[1], params=TokenParams(max_tokens=5)))
    here.run(max_rounds=1000)
    assert len(here.tokens(0)) == 5
