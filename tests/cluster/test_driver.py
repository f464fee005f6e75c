"""The driver's answers to edges and ranks: events in, messages out."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from argosy.cluster.prefix_news import NAME_BYTES
from argosy.cluster.protocol.errors import WeightError, WorkerFailed, WorkerLost
from argosy.cluster.protocol.messages import (
    AbortRequest,
    Drain,
    ModelRunnerOutput,
    PrefixCacheReset,
    ResetPrefixCache,
    StatsReply,
    StatsRequest,
    TokenDeltas,
)
from argosy.cluster.protocol.sampling import FinishReason

MakeWorld = Callable[..., Any]


def test_what_a_step_gave_goes_to_each_edge_in_one_message(world: MakeWorld) -> None:
    """Twenty streams of two edges are two messages a step, not twenty."""
    here = world(max_num_seqs=32, max_num_batched_tokens=256)
    for stream_id in range(20):
        here.ask([1, 2, stream_id], max_tokens=3)
    message = here.sent[0]
    here.driver.on_edge_message(7, message)
    here.driver.advance()
    here.driver.take_outbox()
    for event in here.executor.poll(1.0):
        here.driver.on_executor_event(event)
    outbox = here.driver.take_outbox()
    assert [(edge_id, len(deltas.deltas)) for edge_id, deltas in outbox] == [(0, 20), (7, 1)]


def test_an_answer_has_its_story_with_the_first_and_the_last_word(world: MakeWorld) -> None:
    """Cached tokens with the first, times with the last."""
    here = world(step_seconds=0.5, async_scheduling=False)
    here.ask(list(range(9)), max_tokens=3)
    here.run()
    again = here.ask(list(range(9)), max_tokens=3, prompt_logprobs=1)
    third = here.ask(list(range(9)), max_tokens=3, logprobs=2)
    here.run()
    here.assert_exact(again)
    deltas = here.deltas[third, 0]
    assert [delta.num_cached_tokens for delta in deltas] == [8, None, None]
    assert [len(delta.logprobs[0].top_ids) for delta in deltas] == [3, 3, 3]
    assert deltas[-1].timing == pytest.approx((0.0, 0.5, 1.5))
    first = here.deltas[again, 0][0]
    assert first.num_cached_tokens == 0, "prompt figures need the prompt computed"
    assert first.prompt_logprobs[0] is None
    assert [figure.top_ids[0] for figure in first.prompt_logprobs[1:]] == list(range(1, 9))


@pytest.mark.parametrize(
    ("fields", "code", "status"),
    [
        ({"prompt": []}, "invalid_request_error", 400),
        ({"prompt": [1] * 2048}, "context_length_exceeded", 400),
        ({"prompt": [1] * 300}, "invalid_request_error", 400),
        ({"prompt": [1], "n": 1000}, "invalid_request_error", 400),
        ({"prompt": [1], "stop_token_ids": (101,)}, "invalid_request_error", 400),
    ],
)
def test_what_can_not_be_served_is_answered_at_once(
    world: MakeWorld, fields: dict[str, Any], code: str, status: int
) -> None:
    """256 tokens of memory, a vocabulary of 101; nothing is allocated and nobody else is touched."""
    here = world()
    here.driver.info = msgspec.structs.replace(here.driver.info, vocab_size=101)
    refused = here.ask(**fields)
    (end,) = here.ends(refused)
    assert (end.finish_reason, end.error_code, end.error_status) == (FinishReason.ERROR, code, status)
    fine = here.ask([1, 2, 3])
    here.run()
    here.assert_exact(fine)


def test_an_answer_ends_where_the_memory_does(world: MakeWorld) -> None:
    """One request may fill the whole pool: 64 tokens here."""
    here = world(num_blocks=16)
    one = here.ask([1, 2, 3], max_tokens=500)
    here.run()
    assert here.last(one).finish_reason is FinishReason.LENGTH
    assert len(here.tokens(one)) == 61


def test_a_full_queue_is_told_with_when_to_come_back(world: MakeWorld) -> None:
    """One row, two waiting places: the fourth is refused and the others end well."""
    here = world(max_num_seqs=1, max_num_waiting=2)
    here.ask([1])
    here.round()
    waiting = [here.ask([1]), here.ask([1])]
    refused = here.ask([1])
    assert here.last(refused).error_code == "overloaded"
    assert here.last(refused).error_status == 503
    assert here.last(refused).retry_after_seconds > 0
    here.run()
    for stream_id in (0, *waiting):
        here.assert_exact(stream_id)


def test_a_request_ends_when_its_own_time_is_up(world: MakeWorld) -> None:
    """The loop is told how long it may sleep, and the memory is free again."""
    here = world(step_seconds=1.0, request_deadline_seconds=100.0)
    slow = here.ask([1, 2], max_tokens=50, deadline_seconds=3.5, n=2)
    capped = here.ask([1, 2], max_tokens=500, deadline_seconds=1000.0)
    assert here.driver.next_deadline_seconds() == pytest.approx(3.5)
    here.run()
    for index in range(2):
        assert here.last(slow, index).error_code == "deadline_exceeded"
        assert 1 <= len(here.tokens(slow, index)) < 5
    assert here.last(capped).error_code == "deadline_exceeded"
    assert here.clock.now() == pytest.approx(100.0, abs=2.0)
    assert here.driver.scheduler.blocks.pool.num_held == 0


def test_old_deadlines_do_not_pile_up(world: MakeWorld) -> None:
    """A thousand short requests leave nothing behind for ten minutes."""
    here = world()
    for _ in range(500):
        here.ask([1], max_tokens=1)
        here.run()
    assert len(here.driver._deadlines) < 100


def test_an_edge_that_leaves_takes_its_requests_along(world: MakeWorld) -> None:
    """Its process died: no message is left for it, no block is held for it."""
    here = world()
    here.ask([1, 2, 3], max_tokens=50, n=3)
    here.round()
    here.driver.on_edge_closed(0)
    assert here.driver.take_outbox() == []
    assert here.driver.scheduler.num_running == 0
    here.round()
    here.driver.check()


def test_one_of_n_can_be_called_off(world: MakeWorld) -> None:
    """A stop string was found in the first; the second goes on."""
    here = world()
    both = here.ask([1, 2, 3], max_tokens=30, n=2)
    for _ in range(5):
        here.round()
    here.send(AbortRequest(stream_id=both, indexes=(0,)))
    here.send(AbortRequest(stream_id=99))
    here.run()
    assert here.last(both, 0).finish_reason is FinishReason.ABORT
    here.assert_exact(both, 1)


def test_requests_wait_while_ranks_start(unstarted_world: MakeWorld) -> None:
    """Weights take a minute to load; who asked meanwhile is served then."""
    here = unstarted_world()
    early = here.ask([1, 2, 3])
    here.driver.start()
    too_long = here.ask([1] * 300)
    here.run()
    here.assert_exact(early)
    assert here.last(too_long).error_code == "invalid_request_error"


def test_a_loss_is_recomputed_and_the_stream_goes_on(world: MakeWorld) -> None:
    """A rank dies in the middle of an answer; the late answer of its epoch is dropped."""
    here = world(late_answers=True)
    streams = [here.ask([1, 2, stream], max_tokens=12, n=2) for stream in range(3)]
    for _ in range(4):
        here.round()
    here.executor.lose()
    here.run()
    for stream_id in streams:
        here.assert_exact(stream_id, 0)
        here.assert_exact(stream_id, 1)
    assert here.last(streams[0]).num_recoveries == 1
    assert here.driver.info.epoch == 1
    assert here.metrics.recoveries >= 3
    assert here.metrics.stale_outputs >= 1


def test_an_answer_of_an_old_epoch_does_not_touch_the_new_one(world: MakeWorld) -> None:
    """It comes when the new ranks are already at work."""
    here = world()
    one = here.ask([1, 2, 3], max_tokens=10)
    here.round()
    here.executor.lose()
    for _ in range(3):
        here.round()
    here.driver.on_executor_event(ModelRunnerOutput(step_id=0, epoch=0, token_ids=[55]))
    here.run()
    here.assert_exact(one)
    assert here.metrics.stale_outputs == 1


def test_a_request_that_meets_every_loss_is_lost_in_the_end(world: MakeWorld) -> None:
    """It may be what kills the ranks; its owner is told, the others live."""
    here = world(max_recoveries=2)
    cursed = here.ask([1, 2], max_tokens=60)
    for _ in range(3):
        for _ in range(4):
            here.round()
        here.executor.lose(WorkerLost(1, "node b", 0))
        here.round()
    here.run()
    end = here.last(cursed)
    assert (end.finish_reason, end.error_code) == (FinishReason.LOST, "request_lost")
    assert "2 recoveries" in end.error_message
    later = here.ask([3, 4])
    here.run()
    here.assert_exact(later)


def test_bad_weights_end_the_driver_and_all_who_wait(unstarted_world: MakeWorld) -> None:
    """The sentence of the first start reaches whoever asked too early."""
    here = unstarted_world()
    here.executor.start_failures.append(WeightError("model.safetensors", "lm_head", "is missing"))
    early = here.ask([1, 2, 3], n=2)
    here.driver.start()
    here.round()
    assert here.driver.fatal is not None
    assert here.driver.status == "failed"
    assert "lm_head" in here.last(early, 1).error_message
    late = here.ask([1])
    assert here.last(late).error_code == "weight_error"


def test_a_rebuild_that_never_succeeds_ends_all(world: MakeWorld) -> None:
    """Three groups in a row don't come up."""
    here = world()
    one = here.ask([1, 2, 3], max_tokens=50)
    here.round()
    here.executor.start_failures.extend(WorkerFailed(0, "out_of_memory", "no room") for _ in range(3))
    here.executor.lose()
    here.run()
    assert here.last(one).finish_reason is FinishReason.ERROR
    assert here.driver.fatal is not None


def test_draining_takes_nothing_new_and_ends_what_runs(world: MakeWorld) -> None:
    """An operator stops the engine."""
    here = world()
    one = here.ask([1, 2, 3])
    here.send(Drain())
    assert here.driver.status == "draining"
    late = here.ask([1])
    assert (here.last(late).error_code, here.last(late).error_status) == ("draining", 503)
    assert not here.driver.is_drained
    here.run()
    here.assert_exact(one)
    assert here.driver.is_drained


def test_a_request_resumed_from_elsewhere_goes_on_where_it_was(world: MakeWorld) -> None:
    """Another replica was lost with its driver; the edge brings what it has seen."""
    here = world()
    whole = here.ask([1, 2, 3], max_tokens=10, n=2, seed=5)
    here.run()
    seen = [here.tokens(whole, 0)[:4], here.tokens(whole, 1)[:10]]
    rest = here.ask([1, 2, 3], max_tokens=10, n=2, seed=5, generated_token_ids=seen)
    here.run()
    assert here.tokens(rest, 0) == here.tokens(whole, 0)[4:]
    assert here.tokens(rest, 1) == []
    assert here.last(rest, 1).finish_reason is FinishReason.LENGTH


def test_figures_and_the_cache_can_be_asked_for(world: MakeWorld) -> None:
    """What /metrics and /health are made of."""
    here = world()
    here.ask(list(range(20)), max_tokens=8, n=2)
    here.run()
    here.send(StatsRequest())
    here.send(ResetPrefixCache())
    (_, stats), (_, reset) = here.driver.take_outbox()
    assert isinstance(stats, StatsReply)
    assert (stats.healthy, stats.status) == (True, "ready")
    assert stats.values["argosy_generation_tokens_total"] == stats.values["vllm:generation_tokens_total"] == 16
    assert stats.values["argosy_kv_blocks_cached"] > 0
    assert sum(stats.histograms["argosy_time_to_first_token_seconds"][1]) == 2
    assert sum(stats.histograms["argosy_inter_token_seconds"][1]) == 14
    assert reset == PrefixCacheReset(done=True)
    assert here.driver.scheduler.blocks.pool.num_cached == 0


def test_doors_hear_what_came_into_the_cache(world: MakeWorld) -> None:
    """Prompts and answers by their names, from the first question on; others are told nothing."""
    here = world()
    told = []
    for number, prompt in ((0, []), (0, list(range(40))), (0, []), (-1, [])):
        if prompt:
            here.ask(prompt, max_tokens=8)
            here.run()
        here.driver.take_outbox()
        here.send(StatsRequest(known_names=number))
        ((_, stats),) = here.driver.take_outbox()
        assert isinstance(stats, StatsReply)
        told.append((len(stats.new_names) // NAME_BYTES, stats.known_names))
    num_full = 47 // here.driver.config.cache.block_size  # the last token that was drawn is not computed
    assert told == [(0, 0), (num_full, num_full), (num_full, num_full), (0, -1)]


def test_a_draining_driver_is_not_healthy(world: MakeWorld) -> None:
    """A load balancer should send nobody new, while those who are here get their answers."""
    here = world()
    one = here.ask([1, 2, 3], max_tokens=4)
    here.round()
    here.driver.drain()
    stats = here.driver.stats()
    assert (stats.healthy, stats.status) == (False, "draining")
    here.run()
    assert here.last(one).finish_reason is FinishReason.LENGTH


def test_ranks_that_are_silent_make_the_driver_unhealthy(world: MakeWorld) -> None:
    """A step takes longer than its deadline."""
    here = world(step_seconds=500.0, step_deadline_seconds=60.0)
    here.ask([1])
    here.driver.advance()
    here.clock.advance(61.0)
    assert not here.driver.stats().healthy


def test_a_stream_id_in_use_is_refused_and_the_first_goes_on(world: MakeWorld) -> None:
    """An edge made a mistake; one stream stays one stream."""
    here = world()
    one = here.ask([1, 2, 3])
    here.round()
    before = len(here.deltas.get((one, 0), []))
    here.send(here.sent[one])
    outbox = here.driver.take_outbox()
    assert isinstance(outbox[0][1], TokenDeltas)
    assert outbox[0][1].deltas[0].error_code == "invalid_request_error"
    here.run()
    assert len(here.deltas[one, 0]) > before
    here.assert_exact(one)
