"""Who is next: priority, then arrival. Who was preempted arrived earlier, and so is in front again."""

import heapq
from collections.abc import Iterator

from argosy.cluster.request import Request, RequestStatus, order_key


class WaitingQueue:
    """Waiting requests in the order in which they may start. Who ended meanwhile is passed over."""

    def __init__(self, *, by_priority: bool):
        self._by_priority = by_priority
        self._heap: list[tuple[int, int, int, Request]] = []
        self._num_waiting = 0

    def push(self, request: Request) -> None:
        """Queue a request that is WAITING and isn't queued yet."""
        assert not request.is_queued, request
        assert request.status is RequestStatus.WAITING, request
        request.is_queued = True
        heapq.heappush(self._heap, (*order_key(request, self._by_priority), request))
        self._num_waiting += 1

    def peek(self) -> Request | None:
        """The next request, which stays; None when nobody waits."""
        while self._heap and not self._heap[0][3].is_queued:
            heapq.heappop(self._heap)
        return self._heap[0][3] if self._heap else None

    def pop(self) -> Request:
        """Take the request that `peek` showed."""
        request = heapq.heappop(self._heap)[3]
        assert request.is_queued, request
        request.is_queued = False
        self._num_waiting -= 1
        return request

    def forget(self, request: Request) -> None:
        """A queued request has ended. It won't come back to this queue."""
        assert request.is_queued, request
        request.is_queued = False
        self._num_waiting -= 1
        if len(self._heap) > 2 * self._num_waiting + 64:  # the ended ones must not pile up under a stuck head
            self._heap = [entry for entry in self._heap if entry[3].is_queued]
            heapq.heapify(self._heap)

    def num_uncomputed_tokens(self, most: int, num_places: int) -> int:
        """Tokens that so many of those who wait have to compute, as far as is known; stops counting at `most`.

        Which ones is not looked up in order: the next one, and others near the head.
        """
        total = 0
        for *_, request in self._heap:
            if total >= most or num_places <= 0:
                break
            if request.is_queued:
                total += request.num_uncomputed_tokens
                num_places -= 1
        return total

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Request]:
        """All that wait, next first."""
        return (entry[3] for entry in sorted(self._heap) if entry[3].is_queued)

    def check(self) -> None:
        """Nobody is queued twice, and the count is right."""
        waiting = [id(request) for request in self]
        assert len(waiting) == len(set(waiting)) == self._num_waiting, (len(waiting), self._num_waiting)
