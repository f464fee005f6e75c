"""The requests of one replica and what each of them holds, from arrival to end; who makes room, and how.

    queue       waiting, in order of priority and arrival; some hold host blocks, forks hold blocks of their parents
    loading     taken from the queue; their blocks are on their way in from host memory (`host_tier`)
    running     have a handle on the ranks, and blocks

What a step computes is `scheduler`'s to say, which is this and the steps.
"""

from collections import deque
from collections.abc import Iterator

from argosy.cluster.block_manager import BlockManager
from argosy.cluster.clock import Clock
from argosy.cluster.host_tier import HostTier
from argosy.cluster.metrics import Metrics
from argosy.cluster.outcome import Outcomes
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import InvalidRequest, ServingError
from argosy.cluster.protocol.kv_groups import KVGroups
from argosy.cluster.protocol.messages import TokenLogprobs
from argosy.cluster.protocol.sampling import FinishReason
from argosy.cluster.protocol.swap import NO_SWAP, SwapCosts
from argosy.cluster.request import WATCH_ALL, Request, RequestStatus, order_key
from argosy.cluster.running import RunningSet
from argosy.cluster.step import Draft, Step
from argosy.cluster.waiting_queue import WaitingQueue


class Residents:
    """Requests of one replica. Blocks are those of an epoch; a request outlives it."""

    def __init__(self, config: ServingConfig, clock: Clock, metrics: Metrics):
        self._max_tokens = config.scheduler.max_num_batched_tokens
        self._by_priority = config.scheduler.policy == "priority"
        self.max_steps_in_flight = config.max_steps_in_flight
        self._cache, self._clock, self._metrics = config.cache, clock, metrics
        self.queue = WaitingQueue(by_priority=self._by_priority)
        self.blocks = BlockManager(0, self._cache.block_size)
        self.host = HostTier(self.blocks, NO_SWAP, metrics)
        self.epoch = -1
        self._running = RunningSet(config.scheduler.max_num_seqs)
        self._waiting_forks: list[Request] = []  # in the queue, and holding blocks of their parents
        self._in_flight: deque[Step] = deque()
        self._next_step_id = 0
        self._applied_step_id = -1
        self._blocked: tuple[Request, int, int] | None = None  # who did not fit, and what there was then
        self.outcomes = Outcomes(clock, metrics, self.end, config.parallel.pipeline_parallel_size)

    @property
    def ended(self) -> list[Request]:
        """Requests that ended since the owner last emptied this list."""
        return self.outcomes.ended

    @property
    def num_running(self) -> int:
        """Requests that hold a handle."""
        return len(self._running)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is on the ranks, under way to them, or in flight."""
        return not (self._running or self._in_flight or self.host.loading)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self.queue)

    @property
    def num_steps_in_flight(self) -> int:
        """Steps that were scheduled and not answered."""
        return len(self._in_flight)

    @property
    def num_free_rows(self) -> int:
        """How many more requests could run."""
        return self._running.num_free

    @property
    def capacity(self) -> int:
        """Tokens that the pool can hold."""
        return self.blocks.capacity()

    def add(self, requests: list[Request]) -> None:
        """Take up the answers of one message, of one prompt: the first computes it, the others wait for its blocks."""
        if any(request.num_output_tokens for request in requests):  # begun elsewhere: they differ already
            for request in requests:
                self._enqueue(request)
        else:
            requests[0].forks = requests[1:]
            self._enqueue(requests[0])

    def _enqueue(self, request: Request) -> None:
        if self.epoch >= 0 and (error := self._fit(request)) is not None:
            for one in (*request.forks, request):
                self.end(one, FinishReason.ERROR, error=error)
        elif request.num_output_tokens >= request.end - request.num_prompt_tokens:
            self.end(request, FinishReason.LENGTH)
        else:
            self.queue.push(request)

    def _fit(self, request: Request) -> ServingError | None:
        """Bound the request by the pool, or say that it can never fit."""
        if request.num_prompt_tokens + 1 > self.capacity:
            return InvalidRequest(
                "prompt",
                f"{request.num_prompt_tokens} tokens",
                f"the KV cache of this server holds {self.capacity} tokens ({self.blocks.pool.num_blocks} blocks of "
                f"{self._cache.block_size}), answer included; shorten the prompt or give the server more KV memory",
            )
        for one in (request, *request.forks):
            one.end = min(one.end, self.capacity)
        return None

    def end(
        self,
        request: Request,
        reason: FinishReason,
        *,
        error: ServingError | None = None,
        stop_token_id: int | None = None,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> None:
        """End a request now, wherever it stands. What is in flight for it will be dropped."""
        if request.status is RequestStatus.RUNNING:
            if reason is not FinishReason.ERROR:
                self.blocks.register_full_blocks(request)
            self.blocks.free(request, trusted=reason is not FinishReason.ERROR)
            self._running.give_back(request)
            if reason is FinishReason.ERROR:
                self.host.distrust(request)
        elif request.status is RequestStatus.LOADING:
            self.host.call_off(request)
        else:
            if request.is_queued:
                self.queue.forget(request)
            if request.block_ids:
                self._waiting_forks.remove(request)
                self.blocks.free(request)
        self.host.release(request)
        forks, request.forks = [fork for fork in request.forks if not fork.is_finished], []
        if forks:  # they never saw their prompt's blocks: the first of them computes it now
            forks[0].forks = forks[1:]
            self.queue.push(forks[0])
        self.outcomes.close(request, reason, error, stop_token_id, token_ids, logprobs)

    def begin_epoch(
        self, epoch: int, num_blocks: int, groups: KVGroups | None = None, swap: SwapCosts = NO_SWAP
    ) -> None:
        """Ranks with empty blocks are ready; nothing is in flight. All that ran before must have been taken back."""
        assert not self._running
        assert not self.host.loading
        assert not self._in_flight
        self.epoch = epoch
        self.blocks = BlockManager(
            num_blocks,
            self._cache.block_size,
            enable_prefix_caching=self._cache.enable_prefix_caching,
            groups=groups,
            max_chunk=self._max_tokens,
        )
        self.host = HostTier(self.blocks, swap, self._metrics)
        self._running.take_given_back()  # those ranks are gone
        self._blocked = None
        for request in list(self.queue):
            if (error := self._fit(request)) is not None:
                for one in (*request.forks, request):
                    self.end(one, FinishReason.ERROR, error=error)
            elif len(request.token_ids) >= request.end:
                self.end(request, FinishReason.LENGTH)

    def take_back_all(self) -> list[Request]:
        """The ranks are gone, with all blocks and all steps in flight: the requests that ran, now in the queue.

        What was in host memory is gone as well: who waited for it is computed anew, and is not held to be the cause.
        """
        self._in_flight.clear()
        self._applied_step_id = self._next_step_id - 1
        for request in list(self.host.loading):
            self._call_off(request, "lost its ranks")
        for request in self.queue:
            if request.host_table is not None:
                self._metrics.tokens_recomputed += request.host_table.num_computed
                self.host.release(request)
        running = sorted(self._running.by_handle.values(), key=lambda request: order_key(request, self._by_priority))
        for request in (*running, *self._waiting_forks):
            self.blocks.free(request)
        self._waiting_forks.clear()
        for request in running:
            self._running.give_back(request)
            self._requeue(request, "lost its ranks")
            request.num_recoveries += 1
        self._running.drop_stale()
        return running

    # ------------------------------------------------------------------------------------------------ making room

    def _make_room(self, request: Request, num_tokens: int, draft: Draft) -> bool:
        """Grow the request's table, at the cost of who is last in order; False when that is itself."""
        while (added := self.blocks.grow(request, num_tokens)) is None:
            if self._drop_waiting_forks():
                continue
            candidates = [r for r in (*self._running.decoding, *self._running.prefilling) if r.handle >= 0]
            victim = max((*candidates, *self.host.loading), key=lambda r: order_key(r, self._by_priority))
            if victim.status is RequestStatus.LOADING:
                self._call_off(victim, f"made room in step {self._next_step_id}")
            else:
                self._preempt(victim)
            draft.has_preempted = True
            if victim is request:
                return False
        if added:
            draft.grown.append((request, added))
        return True

    def _preempt(self, request: Request) -> None:
        """Send a running request back to the queue: what it has computed goes to the host, or is to be recomputed.

        Its tokens in flight are kept when they come.
        """
        self._metrics.preemptions += 1
        request.num_preemptions += 1
        if self.host.num_host_blocks and self.host.swap_out(request, self._num_submitted(request)):
            self._metrics.preemptions_swapped += 1
        else:
            self._metrics.tokens_recomputed += request.num_computed_tokens
        self.blocks.free(request)
        self._running.give_back(request)
        self._requeue(request, f"preempted in step {self._next_step_id}")

    def _num_submitted(self, request: Request) -> int:
        """How many of its tokens are computed by steps that were sent; a step that is being put together isn't."""
        if not request.is_decoding:
            return request.num_computed_tokens  # of those with more than one token to compute none is counted ahead
        return len(request.token_ids) - 1 + sum(request in step.sampling for step in self._in_flight)

    def _call_off(self, request: Request, why: str) -> None:
        """Send a request whose blocks are on their way in back to the queue."""
        self.host.call_off(request)
        self._requeue(request, why)

    def _requeue(self, request: Request, why: str) -> None:
        request.move(RequestStatus.WAITING, why)
        request.watched = WATCH_ALL
        request.resume_after_step_id = self._next_step_id - 1
        self.queue.push(request)

    def _drop_waiting_forks(self) -> bool:
        """Take the blocks from forks that haven't started; they will find what is left in the prefix cache."""
        for request in self._waiting_forks:
            self.blocks.free(request)
        has_any, self._waiting_forks = bool(self._waiting_forks), []
        return has_any

    # -------------------------------------------------------------------------------------------------- figures

    def gauges(self) -> dict[str, float]:
        """The live figures, by metric name."""
        return {
            "argosy_requests_running": len(self._running),
            "argosy_requests_waiting": len(self.queue),
            "argosy_steps_in_flight": len(self._in_flight),
            "argosy_epoch": self.epoch,
            **self.blocks.gauges(self._running.by_handle.values()),
            **self.host.gauges(),
        }

    def reset_prefix_cache(self) -> None:
        """Forget all known prefixes, on the device and on the host."""
        self.blocks.reset_prefix_cache()
        self.host.reset_names()

    def known_requests(self) -> Iterator[Request]:
        """All that run, wait, or wait for the prompt of one of these."""
        for request in (*self._running.by_handle.values(), *self.host.loading, *self.queue):
            yield request
            yield from request.forks

    def check(self) -> None:
        """Blocks, handles and lists agree with each other and with the status of each request."""
        waiting = list(self.queue)
        self.queue.check()
        self.blocks.check([*self._running.by_handle.values(), *self.host.loading, *waiting])
        self.host.check([*self._running.by_handle.values(), *self.host.loading, *waiting])
        for request in self.host.loading:
            assert request.status is RequestStatus.LOADING, request
            assert request.handle < 0, request
            assert not request.is_queued, request
        self._running.check()
        for request in waiting:
            assert request.status is RequestStatus.WAITING, request
            assert request.handle < 0, request
            assert bool(request.block_ids) == (request in self._waiting_forks), request
        assert all(fork in waiting for fork in self._waiting_forks)
        assert len(self._in_flight) <= self.max_steps_in_flight
