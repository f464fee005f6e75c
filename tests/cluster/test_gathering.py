"""Requests that are made together begin together, and nobody waits longer than that is worth."""

from collections.abc import Callable
from typing import Any

import pytest

from argosy.cluster.gathering import GATHER_SECONDS, Gathering, num_shared_tokens
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.messages import AbortRequest, Burst, GenerateRequest
from argosy.cluster.protocol.sampling import TokenParams

MakeWorld = Callable[..., Any]


def say(here: Any, begins: bool, edge_id: int = 0) -> None:
    """An edge begins or ends a burst."""
    here.driver.on_edge_message(edge_id, Burst(begins=begins))
    here.driver.advance()


def ask(here: Any, prompt: list[int], **fields: Any) -> int:
    """A request, and a round of the loop before the next one comes."""
    stream_id: int = here.ask(prompt, **fields)
    here.driver.advance()
    return stream_id


def rows_of_steps(here: Any) -> list[int]:
    """Rows of each step so far."""
    return [len(output.rows) for output in here.executor.outputs]


def test_the_first_step_holds_the_whole_burst(world: MakeWorld) -> None:
    """Six requests that the loop reads one by one are one step; without the word they are a short one and the rest."""
    plain, told = world(async_scheduling=False), world(async_scheduling=False)
    say(told, True)
    for here in (plain, told):
        for first in range(6):
            ask(here, [first, 1, 2, 3])
    assert rows_of_steps(told) == []
    say(told, False)
    for here in (plain, told):
        here.run()
        for stream_id in here.sent:
            here.assert_exact(stream_id)
    assert rows_of_steps(told)[0] == 6
    assert rows_of_steps(plain)[0] == 1
    assert len(rows_of_steps(told)) == len(rows_of_steps(plain)) - 1


def test_a_request_alone_never_waits(world: MakeWorld) -> None:
    """No word of more: its step is sent in the same round."""
    here = world()
    ask(here, [1, 2, 3])
    assert rows_of_steps(here)[:1] == [1]


def test_the_rest_of_a_burst_is_not_waited_for_longer_than_said(world: MakeWorld) -> None:
    """Its client was stopped: what is here begins, and the loop does not sleep past that."""
    here = world()
    say(here, True)
    began = here.clock.now()
    stream_id = ask(here, [1, 2, 3])
    assert rows_of_steps(here) == []
    assert here.driver.next_deadline_seconds() == pytest.approx(GATHER_SECONDS)
    here.round()
    assert rows_of_steps(here)[:1] == [1]
    assert here.clock.now() == pytest.approx(began + GATHER_SECONDS)
    here.run()
    here.assert_exact(stream_id)
    late = ask(here, [4, 5, 6])  # nothing of that burst is left over
    assert here.executor.outputs[-1].rows, "the next request waited for a burst that was over"
    here.run()
    here.assert_exact(late)


def test_overlapping_bursts_are_waited_for_no_longer_than_the_first(world: MakeWorld) -> None:
    """Edge after edge begins one: the first request's wait is that of its own burst."""
    here = world()
    say(here, True)
    ask(here, [1, 2, 3])
    began = here.clock.now()
    for edge_id in (1, 2, 3):
        here.clock.sleep(GATHER_SECONDS / 4)
        say(here, True, edge_id)
        say(here, False, edge_id - 1)
    assert rows_of_steps(here) == []
    here.round()
    assert rows_of_steps(here)[:1] == [1]
    assert here.clock.now() == pytest.approx(began + GATHER_SECONDS)


def test_nobody_waits_while_something_runs(world: MakeWorld) -> None:
    """Who decodes would stand still: the newcomers join step by step, as ever."""
    here = world(async_scheduling=False)
    ask(here, [1, 2, 3], max_tokens=20)
    say(here, True)
    ask(here, [4, 5, 6])
    here.round()
    assert rows_of_steps(here)[:2] == [1, 2]


@pytest.mark.parametrize(("tokens", "settings"), [(11, {}), (2, {"max_num_seqs": 3})])
def test_a_burst_that_fills_the_step_goes_before_its_end(
    world: MakeWorld, tokens: int, settings: dict[str, int]
) -> None:
    """32 tokens a step, or so many rows: more requests would not change it."""
    here = world(**settings)
    say(here, True)
    for first in range(3):
        assert rows_of_steps(here) == []
        ask(here, [first + place for place in range(tokens)])
    assert rows_of_steps(here)[0] == 3


def test_the_second_step_is_full_as_well(world: MakeWorld) -> None:
    """Three prompts fill the first; while it runs the next one waits for three more instead of going with a crumb."""
    here = world()
    say(here, True)
    for first in range(3):
        ask(here, [first + place for place in range(11)])
    assert len(rows_of_steps(here)) == 1
    for first in range(3, 6):
        assert len(rows_of_steps(here)) == 1
        ask(here, [first + place for place in range(11)])
    assert len(rows_of_steps(here)) == 2
    assert here.executor.outputs[1].num_scheduled_tokens == 32
    say(here, False)
    here.run()
    for stream_id in here.sent:
        here.assert_exact(stream_id)


@pytest.mark.parametrize("step_seconds", [0.01, 1.0])
def test_ranks_never_wait_for_the_rest_of_a_burst(world: MakeWorld, step_seconds: float) -> None:
    """The first step is answered, or the time is up: the next one goes with what is here."""
    here = world(step_seconds=step_seconds)
    say(here, True)
    for first in range(3):
        ask(here, [first + place for place in range(11)])
    assert len(rows_of_steps(here)) == 1
    before = here.clock.now()
    here.round()
    waited = here.clock.now() - before
    assert waited == pytest.approx(min(step_seconds, GATHER_SECONDS))
    assert len(rows_of_steps(here)) == 2
    here.run()
    for stream_id in here.sent:
        here.assert_exact(stream_id)


def test_what_all_prompts_begin_with_fills_a_step_once(world: MakeWorld) -> None:
    """28 tokens in common and 4 of their own: a step of 64 holds nine of them, not two."""
    here = world(max_num_batched_tokens=64, max_num_seqs=16)
    say(here, True)
    for first in range(8):
        ask(here, [7] * 28 + [first] * 4)
    assert rows_of_steps(here) == []
    ask(here, [7] * 28 + [8] * 4)
    assert rows_of_steps(here)[0] == 9


def test_an_abort_in_between_takes_only_its_own(world: MakeWorld) -> None:
    """Called off before its burst was complete."""
    here = world()
    say(here, True)
    gone, stays = ask(here, [1, 2, 3]), ask(here, [4, 5, 6])
    here.send(AbortRequest(stream_id=gone))
    here.driver.advance()
    assert rows_of_steps(here) == []
    say(here, False)
    assert rows_of_steps(here)[0] == 1
    here.run()
    here.assert_exact(stays)
    assert [end.finish_reason for end in here.ends(gone)] == ["abort"]


def test_an_edge_that_closes_is_not_waited_for(world: MakeWorld) -> None:
    """Its requests end with it; another edge's begins."""
    here = world()
    stays = ask(here, [1, 2, 3], max_tokens=1)
    here.run()
    here.driver.on_edge_message(5, Burst(begins=True))
    ask(here, [4, 5, 6])
    before = len(rows_of_steps(here))
    here.driver.on_edge_closed(5)
    here.driver.advance()
    assert len(rows_of_steps(here)) > before
    here.assert_exact(stays)


def test_ranks_that_are_not_ready_are_no_reason_to_spin(unstarted_world: MakeWorld) -> None:
    """A burst that comes while ranks start: the loop sleeps as long as ever, and begins with all of it."""
    here = unstarted_world()
    here.driver.start()
    here.driver.on_edge_message(0, Burst(begins=True))
    for first in range(3):
        here.ask([first, 1, 2])
    here.clock.sleep(10 * GATHER_SECONDS)
    assert here.driver.next_deadline_seconds() > 1.0
    here.run()
    assert rows_of_steps(here)[0] == 3


@pytest.mark.parametrize("pp_size", [1, 2])
def test_stages_share_out_a_burst_that_they_know_whole(world: MakeWorld, pp_size: int) -> None:
    """Pieces are cut by all that waits, so several stages wait for more of it."""
    here = world(pipeline_parallel_size=pp_size, max_num_seqs=32, max_num_batched_tokens=32)
    say(here, True)
    for first in range(3):
        ask(here, [first + place for place in range(16)])
    assert bool(rows_of_steps(here)) == (pp_size == 1)


@pytest.mark.parametrize(
    ("first", "second", "count"),
    [([1, 2, 3, 4], [1, 2, 3, 4], 4), ([1, 2, 3, 4], [1, 2, 9, 4], 2), ([1], [1], 0), ([], [1, 2], 0),
     ([1] * 99, [1] * 98 + [2], 98), ([1] * 40 + [2] * 60, [1] * 41 + [3] * 60, 40), ([2, 1], [1, 2], 0)],
)  # fmt: skip
def test_shared_tokens_are_whole_blocks_at_the_front(first: list[int], second: list[int], count: int) -> None:
    """Blocks of two."""
    assert num_shared_tokens(first, second, 2) == num_shared_tokens(second, first, 2) == count


def gathering(most_tokens: int = 32, **given: object) -> Gathering:
    """One that an idle driver has just begun to wait with."""
    made = Gathering(ServingConfig.from_mapping({"model": "m", "block_size": 4, **given}), most_tokens)
    made.note(0, Burst(begins=True), 0.0)
    assert made.holds(0.0, True, 0)
    return made


def request(prompt: list[int], **fields: Any) -> GenerateRequest:
    """As an edge sends it."""
    return GenerateRequest(
        stream_id=1, request_id="r", prompt_token_ids=prompt, params=TokenParams(max_tokens=4), **fields
    )


def test_a_prefix_of_another_tenant_is_no_prefix() -> None:
    """Equal prompts under two salts are computed twice, so they fill the step."""
    for salts, is_held in ((("a", "a"), True), (("a", "b"), False)):
        waiting = gathering()
        for salt in salts:
            waiting.add(request([7] * 16, cache_salt=salt))
        assert waiting.holds(0.0, True, 0) == is_held, salts
    alone = gathering(enable_prefix_caching=False)
    for _ in range(2):
        alone.add(request([7] * 16))
    assert not alone.holds(0.0, True, 0)


def test_a_burst_that_begins_beside_steps_under_way_is_not_waited_for() -> None:
    """Also where the driver prepares a step while one runs: rows that decode would stand still."""
    waiting = Gathering(ServingConfig.from_mapping({"model": "m"}), 32)
    waiting.note(0, Burst(begins=True), 0.0)
    waiting.add(request([1, 2, 3]))
    assert not waiting.holds(0.0, False, 1)
    assert not waiting.is_open
    assert waiting.seconds_left(0.0) == 0.0


def test_with_stages_only_the_first_step_waits() -> None:
    """The first stage has the next piece to do at once; without stages the step behind waits to be full, too."""
    for stages, waits_again in ((1, True), (2, False)):
        waiting = gathering(pipeline_parallel_size=stages)
        waiting.add(request(list(range(32))))
        assert not waiting.holds(0.0, True, 0)
        waiting.begin_step()
        assert waiting.holds(0.0, False, 1) == waits_again, stages


def test_every_answer_of_a_request_has_a_row() -> None:
    """One request for three answers fills a step of three rows; the rows of a step that began fill no other."""
    waiting = gathering(max_num_seqs=3)
    waiting.add(request([1, 2], n=3))
    assert not waiting.holds(0.0, True, 0)
    waiting.begin_step()
    assert waiting.holds(0.0, False, 1)
