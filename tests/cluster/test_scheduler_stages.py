"""What each step holds where several stages want work. The scheduler is driven step by step, by hand."""

import pytest
from scheduler_desk import Desk

from argosy.cluster.protocol.sampling import FinishReason
from argosy.cluster.waiting_queue import WaitingQueue


def test_with_stages_each_step_takes_a_share_and_does_not_wait_for_tokens() -> None:
    """Two stages: the requests that decode are split over two steps, and the first half is back in the third, before
    the driver knows what it got in the first. Without asynchronous scheduling it waits for that."""
    for is_async in (True, False):
        desk = Desk(pipeline_parallel_size=2, async_scheduling=is_async)
        for _ in range(3):
            desk.add(3)
        desk.answer(desk.schedule(), 11, 12, 13)
        assert [list(desk.schedule().rows) for _ in range(2)] == [[0, 1], [2]]
        third = desk.scheduler.schedule()
        assert (None if third is None else list(third.rows)) == ([0, 1] if is_async else None)


def test_one_request_alone_is_in_every_step() -> None:
    """There is nothing to fill the steps between with; once there is, it is in every other one."""
    desk = Desk(pipeline_parallel_size=2, max_num_batched_tokens=1024, num_blocks=4096)
    desk.add(3)
    assert [list(desk.schedule().rows) for _ in range(3)] == [[0]] * 3
    desk.add(2000)
    assert [list(desk.schedule().rows) for _ in range(4)] == [[1], [0, 1], [1], [0, 1]]


def test_prompts_are_spread_evenly_over_the_steps_that_stages_work_on() -> None:
    """A prompt that fits one step is cut all the same: the second stage has the first piece while the first has the
    second. Short ones are not: a piece would cost a stage as much as all of it."""
    desk = Desk(pipeline_parallel_size=2, max_num_batched_tokens=8192, num_blocks=4096)
    desk.add(4000)
    assert [desk.schedule().num_scheduled_tokens for _ in range(8)] == [512] * 7 + [416]
    desk.add(500)
    assert max(desk.schedule().num_tokens or [1]) == 500


@pytest.mark.parametrize("is_called_off", [False, True])
def test_after_a_burst_the_next_prompt_is_cut_anew(is_called_off: bool) -> None:
    """The pieces of many prompts at once are whole steps; the one that comes when all are through is cut as ever. It is
    the same when whoever sent them has gone before they were through."""
    desk = Desk(pipeline_parallel_size=2, max_num_seqs=40, max_num_batched_tokens=8192, num_blocks=50_000)
    for _ in range(40):
        desk.add(4000, max_tokens=1)
    assert desk.step().num_scheduled_tokens == 8192
    if is_called_off:
        for request in list(desk.scheduler.known_requests()):
            desk.scheduler.end(request, FinishReason.ABORT)
    while not desk.scheduler.is_idle:
        desk.step()
    assert desk.scheduler.schedule() is None
    desk.add(4000)
    desk.step()
    desk.add(4000)
    assert desk.step().num_scheduled_tokens == 512


def test_where_all_places_are_taken_a_prompt_goes_beside_the_rows_of_several_steps() -> None:
    """Forty places, forty that decode, three that wait. One of the forty ends: what could be computed now is one prompt
    of 300, and it is spread over five steps, whatever else waits for a place."""
    desk = Desk(pipeline_parallel_size=2, max_num_seqs=40, max_num_batched_tokens=8192, num_blocks=8192)
    desk.add(8, max_tokens=2)
    for _ in range(39):
        desk.add(8)
    desk.step()
    for _ in range(3):
        desk.add(300)
    while len(desk.scheduler.queue) == 3:
        output = desk.step()
    sizes = [output.num_scheduled_tokens - len(output.rows) + 1]
    while sizes[-1]:
        output = desk.step()
        sizes.append(sum(count for count in output.num_tokens if count > 1))
    assert sizes[:6] == [64, 64, 64, 64, 44, 0]


def test_pieces_beside_rows_make_steps_of_what_ranks_record() -> None:
    """3000 tokens beside 20 of 39 that decode are pieces of 188, and each step would be padded from 208 to 256."""
    desk = Desk(pipeline_parallel_size=2, max_num_seqs=40, max_num_batched_tokens=8192, num_blocks=8192)
    for _ in range(39):
        desk.add(8, max_tokens=100)
    desk.step()
    desk.add(3000)
    steps = [desk.step() for _ in range(13)]
    assert [step.num_scheduled_tokens for step in steps[:12]] == [256] * 12
    assert steps[12].num_scheduled_tokens < 256


def test_where_nobody_finds_a_place_those_of_one_step_are_halved_at_once() -> None:
    """Three wait for two places. The two that began together are in the next two steps, whatever else waits."""
    desk = Desk(pipeline_parallel_size=2, max_num_seqs=2)
    for _ in range(3):
        desk.add(3)
    assert [list(desk.schedule().rows) for _ in range(3)] == [[0, 1], [0], [1]]


@pytest.mark.parametrize("chunked", [True, False])
def test_tokens_that_wait_are_counted_once_a_step(chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes through the queue, as far as the stages could compute; whole prompts are not cut by what waits."""
    desk = Desk(pipeline_parallel_size=2, max_num_seqs=2, max_num_batched_tokens=64, enable_chunked_prefill=chunked)
    counts, count = list[int](), WaitingQueue.num_uncomputed_tokens

    def counted(queue: WaitingQueue, most: int, num_places: int) -> int:
        counts.append(count(queue, most, num_places))
        return counts[-1]

    monkeypatch.setattr(WaitingQueue, "num_uncomputed_tokens", counted)
    for _ in range(5):
        desk.add(10)
    desk.schedule()
    assert counts == [20] * chunked
    desk.schedule()
    assert counts == [20, 0] * chunked
