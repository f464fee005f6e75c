"""What each step holds. The scheduler is driven step by step, by hand."""

from scheduler_desk import Desk

from argosy.cluster.protocol.messages import GenerateRequest, SchedulerOutput
from argosy.cluster.protocol.sampling import NOTHING_ALLOWED, FinishReason, TokenParams
from argosy.cluster.request import RequestStatus, make_requests


def test_a_long_prompt_is_computed_in_chunks_beside_those_that_decode() -> None:
    """The first request goes on at full speed while forty tokens come in behind it."""
    desk = Desk()
    desk.add(3)
    desk.step()
    desk.add(40)
    counts: list[tuple[list[int], list[int]]] = []
    while not counts or counts[-1][1]:
        output = desk.step()
        counts.append((list(output.num_tokens), list(output.partial)))
    assert counts == [([1, 15], [1]), ([1, 15], [1]), ([1, 10], [])]
    assert desk.step().num_tokens == ()


def test_rows_of_one_token_come_first() -> None:
    """Ranks run decodes and prefills with different kernels."""
    desk = Desk()
    desk.add(3)
    desk.step()
    desk.add(6)
    desk.add(1)
    output = desk.step()
    assert list(output.num_tokens) == [1, 1, 6]
    assert [new.handle for new in output.new_requests] == [output.rows[2], output.rows[1]]


def test_a_request_is_named_in_full_once_and_then_only_by_what_changed() -> None:
    """Five tokens in blocks of four: two blocks at first, a third with the ninth token."""
    desk = Desk()
    desk.add(5)
    first = desk.step()
    assert [(len(new.token_ids), new.num_computed_tokens, len(new.block_ids)) for new in first.new_requests] == [
        (5, 0, 2)
    ]
    later = [desk.step() for _ in range(4)]
    assert [len(output.new_blocks) for output in later] == [0, 0, 0, 1]
    assert all(not output.new_requests and not output.finished for output in later)


def test_no_step_is_wasted_on_a_request_that_steps_in_flight_will_end() -> None:
    """max_tokens is known beforehand: after the third token is scheduled, nothing is."""
    desk = Desk()
    desk.add(4, max_tokens=3)
    outputs = [desk.schedule(), desk.schedule()]
    desk.answer(outputs[0])
    outputs.append(desk.schedule())
    assert desk.scheduler.schedule() is None
    desk.answer(outputs[1])
    assert desk.scheduler.schedule() is None
    desk.answer(outputs[2])
    assert [delta.finish_reason for delta in desk.deltas] == [None, None, FinishReason.LENGTH]


def test_a_token_after_the_end_is_dropped_and_the_blocks_are_free_at_once() -> None:
    """The eos is found a step late: step 1 already computes one more."""
    desk = Desk()
    request = desk.add(4, eos_token_ids=(7,))
    first, second = desk.schedule(), desk.schedule()
    desk.answer(first, 7)
    assert request.status is RequestStatus.FINISHED
    assert desk.scheduler.blocks.pool.num_held == 0
    desk.answer(second, 8)
    assert [delta.token_ids for delta in desk.deltas] == [(7,)]
    assert desk.metrics.tokens_dropped == 1
    desk.add(4)
    assert desk.schedule().finished == [second.rows[0]]


def test_stop_tokens_and_eos_are_told_apart_and_wait_for_the_minimum() -> None:
    """min_tokens counts the answer only."""
    desk = Desk()
    desk.add(4, eos_token_ids=(7,), stop_token_ids=(8,), min_tokens=3)
    for token_id in (7, 8):
        desk.step(token_id)
    desk.step(8)
    assert (desk.deltas[-1].finish_reason, desk.deltas[-1].stop_token_id) == (FinishReason.STOP, 8)
    desk.add(4, eos_token_ids=(7,), stop_token_ids=(7,))
    desk.step(7)
    assert (desk.deltas[-1].finish_reason, desk.deltas[-1].stop_token_id) == (FinishReason.STOP, None)


def test_who_came_last_gives_way_and_is_first_in_the_queue_again() -> None:
    """Two requests fill four blocks; the older one needs a fifth."""
    desk = Desk(num_blocks=4)
    first, second, third = desk.add(7), desk.add(7), desk.add(1)
    desk.step()
    desk.step()
    output = desk.step()
    assert second.status is RequestStatus.WAITING
    assert second.num_preemptions == 1
    assert len(output.rows) == 1
    assert len(output.finished) == 1
    assert list(desk.scheduler.queue) == [second, third]
    assert first.status is RequestStatus.RUNNING


def test_under_the_priority_policy_the_least_urgent_gives_way() -> None:
    """The one who came first is a batch job."""
    desk = Desk(num_blocks=4, policy="priority")
    batch, urgent = desk.add(7, priority=5), desk.add(7, priority=0)
    for _ in range(3):
        desk.step()
    assert (batch.status, urgent.status) == (RequestStatus.WAITING, RequestStatus.RUNNING)


def test_a_preempted_request_waits_for_its_tokens_in_flight_and_keeps_them() -> None:
    """It is sent in full again, with the token that came after it was preempted."""
    desk = Desk(num_blocks=4)
    desk.add(7, max_tokens=4)
    second = desk.add(7)
    desk.step()
    desk.step()
    running = desk.schedule()
    ahead = desk.schedule()
    assert (len(running.rows), len(ahead.rows)) == (1, 1)
    assert second.status is RequestStatus.WAITING
    desk.answer(running)
    desk.answer(ahead)
    resumed = desk.schedule()
    assert [len(new.token_ids) for new in resumed.new_requests] == [9] == [len(second.token_ids)]


def test_n_answers_compute_their_prompt_once() -> None:
    """The second takes over the prompt's blocks, computes the last token and copies the block it will write to."""
    desk = Desk()
    parent = desk.add(6, n=2)
    first = desk.schedule()
    assert len(first.new_requests) == 1
    second = desk.schedule()
    (child,) = second.new_requests
    assert (child.num_computed_tokens, child.params.seed) == (5, 1)
    assert child.block_ids[0] == parent.block_ids[0]
    assert second.block_copies == [(parent.block_ids[1], child.block_ids[1])]
    assert second.num_scheduled_tokens == 2


def test_forks_go_on_when_the_first_answer_is_called_off_before_its_prompt_was_computed() -> None:
    """One of them computes the prompt in its place."""
    desk = Desk()
    parent = desk.add(40, n=3)
    desk.step()
    desk.scheduler.end(parent, FinishReason.ABORT)
    sampled = 0
    while sampled < 2:
        output = desk.step()
        sampled = len(output.rows) - len(output.partial)
    assert desk.scheduler.num_running == 2


def test_a_prompt_that_another_one_has_computed_is_not_computed_again() -> None:
    """Same tokens, a block later: only what is new is scheduled."""
    desk = Desk()
    first = desk.add(9)
    desk.step()
    again = GenerateRequest(
        stream_id=99,
        request_id="again",
        prompt_token_ids=[*first.token_ids[:9], 1, 2],
        params=TokenParams(max_tokens=2),
    )
    desk.scheduler.add(make_requests(again, arrival=99, now=0.0, max_len=100, deltas=desk.deltas))
    output = desk.step()
    assert output.new_requests[0].num_computed_tokens == 8
    assert list(output.num_tokens) == [1, 3]
    assert desk.deltas[-1].num_cached_tokens == 8


def test_a_row_that_failed_costs_only_its_own_request() -> None:
    """A rank saw numbers that are none in one row."""
    desk = Desk()
    desk.add(3)
    second = desk.add(3)
    output = desk.schedule()
    desk.answer(output, -1, 5, failed=[(0, "logits are not finite")])
    assert [(d.finish_reason, d.error_code, d.error_message) for d in desk.deltas] == [
        (FinishReason.ERROR, "row_failed", "logits are not finite"),
        (None, "", ""),
    ]
    assert second.status is RequestStatus.RUNNING


def test_wishes_that_leave_no_token_are_the_caller_s_mistake() -> None:
    """400 for what the request asked, 500 for what the model gave."""
    for why, status in ((NOTHING_ALLOWED, 400), ("logits are not finite", 500)):
        desk = Desk()
        desk.add(3)
        desk.answer(desk.schedule(), -1, failed=[(0, why)])
        (delta,) = desk.deltas
        assert (delta.error_code, delta.error_message, delta.error_status) == ("row_failed", why, status)


def test_without_chunked_prefill_a_prompt_waits_until_it_fits_a_step() -> None:
    """Unless it never would."""
    desk = Desk(enable_chunked_prefill=False)
    desk.add(10)
    desk.add(10)
    desk.add(20)
    assert [list(desk.step().num_tokens) for _ in range(2)] == [[10], [1, 10, 5]]
    assert list(desk.step().num_tokens) == [1, 1, 14]


def test_the_watermark_keeps_blocks_for_those_that_run() -> None:
    """A newcomer that would take the last blocks waits, instead of being preempted at once."""
    desk = Desk(num_blocks=10, watermark=0.2)
    desk.add(8)
    desk.step()
    desk.add(26)
    assert len(desk.step().rows) == 1
    assert desk.scheduler.num_waiting == 1


def test_blocks_that_a_half_computed_prompt_still_needs_are_not_given_to_others() -> None:
    """Ten blocks for the first, four of them taken so far; the second would fit only until the first goes on."""
    desk = Desk(num_blocks=12, pipeline_parallel_size=2)
    desk.add(40)
    desk.add(16)
    assert [list(desk.schedule().num_tokens) for _ in range(3)] == [[16], [16], [8]]


def test_the_same_arrivals_give_the_same_steps() -> None:
    """Ranks and replays rely on it."""

    def run() -> list[SchedulerOutput]:
        desk = Desk(num_blocks=8)
        for num_prompt in (5, 9, 3, 12):
            desk.add(num_prompt, n=2, max_tokens=6)
        outputs = []
        while (output := desk.scheduler.schedule()) is not None:
            outputs.append(output)
            desk.answer(output)
        return outputs

    assert run() == run()


def test_figures_follow_the_blocks() -> None:
    """Five tokens in two blocks of four: three of eight slots are empty."""
    desk = Desk(num_blocks=16)
    desk.add(5)
    desk.schedule()
    gauges = desk.scheduler.gauges()
    assert gauges["argosy_kv_waste_ratio"] == 3 / 8
    assert gauges["argosy_kv_usage_ratio"] == 2 / 16
    assert (gauges["argosy_requests_running"], gauges["argosy_requests_waiting"]) == (1, 0)
