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


def test_nobody_is_queued_twice() -> None:
    """That would be our own mistake."""
    queue = WaitingQueue(by_priority=False)
    one = request(1)
    queue.push(one)
    with pytest.raises(AssertionError):
        queue.push(one)
