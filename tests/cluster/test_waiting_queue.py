"""Who is next."""

import pytest

from argosy.cluster.protocol.messages import GenerateRequest
from argosy.cluster.protocol.sampling import TokenParams
from argosy.cluster.request import BATCH_PRIORITY, Request, RequestStatus
from argosy.cluster.waiting_queue import WaitingQueue


def request(arrival: int, priority: int = 0) -> Request:
    message = GenerateRequest(
        stream_id=arrival,
        request_id=f"{arrival}",
        prompt_token_ids=[1],
        params=TokenParams(max_tokens=4),
        priority=priority,
    )
    return Request(message, 0, arrival=arrival, arrival_seconds=0.0, end=5, deltas=[])


def drain(queue: WaitingQueue) -> list[int]:
    order = []
    while queue.peek() is not None:
        order.append(queue.pop().arrival)
    return order


def test_first_come_first_served_knows_no_priority() -> None:
    """Under fcfs the number that a client sends changes nothing."""
    queue = WaitingQueue(by_priority=False)
    for arrival, priority in ((1, 5), (2, 0), (3, -1)):
        queue.push(request(arrival, priority))
    queue.check()
    assert drain(queue) == [1, 2, 3]


def test_items_of_jobs_come_behind_people_also_where_the_first_is_served_first() -> None:
    """A job of ten thousand items was there before somebody asks a question."""
    queue = WaitingQueue(by_priority=False)
    for arrival, priority in ((1, BATCH_PRIORITY), (2, BATCH_PRIORITY + 7), (3, 0)):
        queue.push(request(arrival, priority))
    assert drain(queue) == [3, 1, 2]


def test_lower_priority_numbers_go_first_and_arrival_breaks_ties() -> None:
    """Three tenants, one in a hurry."""
    queue = WaitingQueue(by_priority=True)
    for arrival, priority in ((1, 5), (2, 0), (3, 0), (4, -1)):
        queue.push(request(arrival, priority))
    assert drain(queue) == [4, 2, 3, 1]


def test_who_was_preempted_is_in_front_again() -> None:
    """It arrived before all that still wait, and that is remembered."""
    queue = WaitingQueue(by_priority=False)
    first = request(1)
    queue.push(first)
    queue.push(request(2))
    assert queue.pop() is first
    queue.push(first)
    assert drain(queue) == [1, 2]


def test_who_ended_is_passed_over_and_does_not_pile_up() -> None:
    """A thousand clients give up while the head of the queue is stuck."""
    queue = WaitingQueue(by_priority=False)
    queue.push(request(0))
    for arrival in range(1, 1001):
        one = request(arrival)
        queue.push(one)
        queue.forget(one)
        one.move(RequestStatus.FINISHED, "gave up")
    queue.check()
    assert len(queue) == 1
    assert len(queue._heap) < 200
    assert drain(queue) == [0]


def test_those_who_stay_are_in_order_when_the_others_are_cleared_away() -> None:
    """Four of five give up, in no order; whoever is left had come before whoever is behind."""
    queue = WaitingQueue(by_priority=True)
    waiting = {arrival: request(arrival, priority=arrival * 7 % 11) for arrival in range(500)}
    for one in waiting.values():
        queue.push(one)
    left = [arrival for arrival in waiting if arrival % 5 == 0]
    for arrival in sorted(waiting.keys() - left, key=lambda arrival: arrival * 37 % 499):
        queue.forget(waiting[arrival])
    assert len(queue._heap) < 300
    queue.check()
    assert drain(queue) == sorted(left, key=lambda arrival: (arrival * 7 % 11, arrival))


def test_tokens_of_those_who_wait_are_counted_as_far_as_asked() -> None:
    """So many places, so many tokens, whichever is less; who has given up is not waited for."""
    queue = WaitingQueue(by_priority=False)
    waiting = [request(arrival) for arrival in range(6)]
    assert queue.num_uncomputed_tokens(100, 100) == 0
    for one in waiting:
        queue.push(one)
    assert [queue.num_uncomputed_tokens(most, 100) for most in (0, 4, 100)] == [0, 4, 6]
    assert [queue.num_uncomputed_tokens(100, places) for places in (0, 2, 6)] == [0, 2, 6]
    for one in waiting[:3]:
        queue.forget(one)
    assert queue.num_uncomputed_tokens(100, 100) == 3
    assert queue.num_uncomputed_tokens(100, 2) == 2


def test_nobody_is_queued_twice() -> None:
    """That would be our own mistake."""
    queue = WaitingQueue(by_priority=False)
    one = request(1)
    queue.push(one)
    with pytest.raises(AssertionError):
        queue.push(one)
