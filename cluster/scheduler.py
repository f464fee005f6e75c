"""What the next step computes, and what became of the last one.

One number drives it: `Request.num_uncomputed_tokens`. A step gives each running request as many of these as the token
budget allows, then takes in waiting ones. Prefill, chunked prefill, decode, recompute and the forks of n > 1 are this.

    decoding    one token a step each; the loop over them only counts down to the next block boundary
    prefilling  running, with more than one token to compute
    loading     taken from the queue; its blocks are on their way in from host memory (`host_tier`)
    queue       waiting, in order of priority and arrival

Several steps may be in flight, and a request in each of them: its unknown token is fed by the ranks themselves. Ranks
carry steps out in order, so what a step frees may be given to the next one at once. With pipeline stages each step
takes a share of the work (`micro_batches`).
"""

from collections import deque
from collections.abc import Iterator

import msgspec

from argosy.cluster.block_manager import BlockManager
from argosy.cluster.clock import Clock
from argosy.cluster.host_tier import HostTier, num_on_host
from argosy.cluster.kv_groups import with_zeros
from argosy.cluster.metrics import Metrics
from argosy.cluster.micro_batches import MicroBatches
from argosy.cluster.outcome import Outcomes
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import InvalidRequest, InvariantBroken, ServingError
from argosy.cluster.protocol.kv_groups import KVGroups
from argosy.cluster.protocol.messages import ModelRunnerOutput, NewRequest, SchedulerOutput, TokenLogprobs
from argosy.cluster.protocol.sampling import FinishReason
from argosy.cluster.protocol.swap import NO_SWAP, SwapCosts
from argosy.cluster.request import WATCH_ALL, Request, RequestStatus, order_key
from argosy.cluster.running import RunningSet
from argosy.cluster.step import Draft, Step
from argosy.cluster.waiting_queue import WaitingQueue


class Scheduler:
    """Requests of one replica. `schedule` and `update` alternate as steps are sent and answered, in step order."""

    def __init__(self, config: ServingConfig, clock: Clock, metrics: Metrics):
        scheduler, parallel = config.scheduler, config.parallel
        self._max_tokens = scheduler.max_num_batched_tokens
        self._chunked = scheduler.enable_chunked_prefill
        self._watermark = scheduler.watermark
        self._by_priority = scheduler.policy == "priority"
        self._num_stages = parallel.pipeline_parallel_size
        self._shares: MicroBatches | None = None
        if self._num_stages > 1:
            self._shares = MicroBatches(self._num_stages, self._max_tokens, is_async=scheduler.async_scheduling)
        self.max_steps_in_flight = config.max_steps_in_flight
        self._cache, self._clock, self._metrics = config.cache, clock, metrics
        self.queue = WaitingQueue(by_priority=self._by_priority)
        self.blocks = BlockManager(0, self._cache.block_size)
        self.host = HostTier(self.blocks, NO_SWAP, metrics)
        self.epoch = -1
        self._running = RunningSet(scheduler.max_num_seqs)
        self._waiting_forks: list[Request] = []  # in the queue, and holding blocks of their parents
        self._in_flight: deque[Step] = deque()
        self._next_step_id = 0
        self._applied_step_id = -1
        self._blocked: tuple[Request, int, int] | None = None  # who did not fit, and what there was then
        self.outcomes = Outcomes(clock, metrics, self.end, self._num_stages)

    # ------------------------------------------------------------------------------------------------- requests

    @property
    def ended(self) -> list[Request]:
        """Requests that ended since the owner last emptied this list."""
        return self.outcomes.ended

    @property
    def num_running(self) -> int:
        """Requests that hold a handle."""
        return len(self._running)

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

    # ------------------------------------------------------------------------------------------------ scheduling

    def schedule(self) -> SchedulerOutput | None:
        """The next step, or None when there is nothing to compute now."""
        if self._running.is_stale:
            self._running.drop_stale()
        draft = Draft(self._max_tokens)
        self._advance_decodes(draft)
        if self._shares is not None and self._chunked and (self._running.prefilling or self.queue or self.host.loading):
            draft.budget = min(draft.budget, self._shares.prompt_budget(self._num_waiting_tokens(self._shares)))
        if self._running.prefilling:
            self._advance_prefills(draft)
        if self.host.loading:  # before new ones, and after: what was just asked for may be there already
            self._resume_loaded(draft)
        if self.queue:
            self._admit(draft)
        if self.host.loading:
            self._resume_loaded(draft)
        if draft.has_preempted:
            draft.drop_preempted()
        if not draft.decodes and not draft.prefills and not self.host.has_orders:
            return None
        return self._complete(draft)

    def _advance_decodes(self, draft: Draft) -> None:
        """One token for each request that decodes. This loop is the whole work of most steps."""
        decodes = self._running.decoding if self._shares is None else self._whose_turn(self._shares)
        at_boundary = []
        for request in decodes:
            if request.countdown:
                request.countdown -= 1
            else:
                at_boundary.append(request)
        draft.decodes = decodes
        for request in at_boundary:
            if request.is_decoding:
                self._cross_boundary(request, draft)
        if self._running.is_stale:
            self._running.drop_stale()
            draft.decodes = self._running.decoding if self._shares is None else [r for r in decodes if r.is_decoding]
        draft.budget -= len(draft.decodes)

    def _cross_boundary(self, request: Request, draft: Draft) -> None:
        """The step loop has counted down: a block is full, or the last token was scheduled."""
        num_computed = request.boundary + 1
        if num_computed >= request.end:
            self._running.stop_decoding(request)
            return
        self.blocks.register_full_blocks(request)
        self.blocks.trim(request)
        if self._make_room(request, num_computed, draft):
            request.set_computed(num_computed, self.blocks.num_slots(request))

    def _whose_turn(self, shares: MicroBatches) -> list[Request]:
        """With several stages each step takes its share of those that decode."""
        has_prompts = bool(self._running.prefilling or (self.queue and self._running.num_free))
        return shares.take(self._running.decoding, self._next_step_id, self._applied_step_id, has_prompts=has_prompts)

    def _num_waiting_tokens(self, shares: MicroBatches) -> int:
        """Tokens of prompts that are still to be computed, counted no further than it matters."""
        begun = sum(request.num_uncomputed_tokens for request in self._running.prefilling)
        return begun + self.queue.num_uncomputed_tokens(shares.most_tokens - begun)

    def _advance_prefills(self, draft: Draft) -> None:
        """Further chunks for those that have begun. In order, so that who is preempted was not counted in yet."""
        for request in sorted(self._running.prefilling, key=lambda r: order_key(r, self._by_priority)):
            if draft.budget <= 0:
                return
            if request.status is not RequestStatus.RUNNING:
                continue
            room = self.blocks.most_tokens(request) - request.num_computed_tokens
            num_tokens = min(request.num_uncomputed_tokens, draft.budget, room)
            if self._make_room(request, request.num_computed_tokens + num_tokens, draft):
                self._take_tokens(request, num_tokens, draft)

    def _admit(self, draft: Draft) -> None:
        """Take in waiting requests, in order, until the next one doesn't fit."""
        # who is started below has all its blocks at once, or takes the rest of the budget
        promised = sum(self.blocks.num_missing(one) for one in self._running.prefilling)
        host = self.host
        while draft.budget > 0 and self._running.num_free > len(host.loading) and not draft.has_preempted:
            request = self.queue.peek()
            if request is None or request.resume_after_step_id > self._applied_step_id:
                return  # its tokens in flight come first
            is_fork = bool(request.block_ids)
            if not self._running and not host.loading:
                self._blocked = None
            elif self._blocked == (request, self.blocks.pool.num_free, len(self._running.prefilling)):
                return
            shared = [] if is_fork else self.blocks.find_prefix(request)
            sources = host.find(request, shared) if host.num_host_blocks and not is_fork else shared
            loads = sources is not shared or host.needs_load(shared)
            num_computed = request.num_computed_tokens if is_fork else self.blocks.num_cached_tokens(sources)
            num_tokens = self._chunk(len(request.token_ids) - num_computed, draft)
            if not num_tokens and not loads:
                return
            fits = self._fits_now(request, sources, promised)
            if not fits and not self._running and not host.loading and self._drop_waiting_forks():
                continue
            if not self._running and not host.loading:  # it has the pool for itself, if only for small chunks
                num_tokens = min(num_tokens, self.blocks.most_tokens(request, sources) - num_computed)
            elif not fits:
                self._blocked = (request, self.blocks.pool.num_free, len(self._running.prefilling))
                return
            if loads:
                self.queue.pop()
                request.move(RequestStatus.LOADING, f"its blocks come in from step {self._next_step_id} on")
                host.load(request, sources, self._next_step_id)
            else:
                self._start(request, shared, num_tokens, draft)

    def _chunk(self, num_uncomputed: int, draft: Draft) -> int:
        """How many of its tokens a new request gets in this step."""
        if num_uncomputed <= draft.budget:
            return num_uncomputed
        fits_a_step = num_uncomputed <= self._max_tokens
        return 0 if fits_a_step and not self._chunked else draft.budget

    def _fits_now(self, request: Request, shared: list[int], promised: int) -> bool:
        """Whether all its known tokens have room beside the blocks that are promised to those that run."""
        spared = int(self._watermark * self.blocks.pool.num_blocks) if self._running else 0
        needed = self.blocks.num_missing(request, shared) + num_on_host(shared)
        return self.blocks.num_free_after(shared) - promised - needed >= spared

    def _start(self, request: Request, shared: list[int], num_tokens: int, draft: Draft) -> None:
        """Give a waiting request a handle, its blocks and its first tokens of the step."""
        self.queue.pop()
        request.move(RequestStatus.RUNNING, f"started in step {self._next_step_id}")
        self._running.take(request)
        is_fork = bool(request.block_ids)
        if is_fork:
            self._waiting_forks.remove(request)
            draft.copies += self.blocks.own_tail(request)
        else:
            self.blocks.begin(request, shared)
        self.outcomes.note_start(request, request.num_computed_tokens, is_fork=is_fork)
        self._enter(request, num_tokens, draft)

    def _resume_loaded(self, draft: Draft) -> None:
        """Requests whose blocks are in go on, in the order in which they were asked for.

        When nobody else runs the first one goes on at once: then it does no harm that the step waits for the copies.
        """
        for request in list(self.host.loading):
            num_tokens = self._chunk(len(request.token_ids) - request.num_computed_tokens, draft)
            num_tokens = min(num_tokens, self.blocks.num_slots(request) - request.num_computed_tokens)
            if draft.has_preempted or num_tokens <= 0 or not (self.host.is_in(request) or not self._running):
                return
            is_own = request.host_table.is_own
            self.host.settle(request)
            request.move(RequestStatus.RUNNING, f"went on in step {self._next_step_id}")
            self._running.take(request)
            self.outcomes.note_start(request, request.num_computed_tokens, is_fork=is_own)
            self._enter(request, num_tokens, draft)

    def _enter(self, request: Request, num_tokens: int, draft: Draft) -> None:
        """Tell the ranks of a request that has just got a handle, and give it its first tokens."""
        num_computed = request.num_computed_tokens
        added = self.blocks.grow(request, num_computed + num_tokens)
        assert added is not None, request
        draft.new.append(
            NewRequest(
                handle=request.handle,
                token_ids=tuple(request.token_ids),
                num_prompt_tokens=request.num_prompt_tokens,
                num_computed_tokens=num_computed,
                block_ids=with_zeros(request.block_ids),
                params=request.params,
            )
        )
        self._take_tokens(request, num_tokens, draft)

    def _take_tokens(self, request: Request, num_tokens: int, draft: Draft) -> None:
        """Put a row of a prefilling request into the step."""
        num_computed = request.num_computed_tokens + num_tokens
        request.set_computed(num_computed, self.blocks.num_slots(request))
        self.blocks.register_full_blocks(request)
        is_partial = num_computed < len(request.token_ids)
        draft.prefills.append((request, num_tokens, is_partial))
        draft.budget -= num_tokens

    def _complete(self, draft: Draft) -> SchedulerOutput:
        """The step is settled: number it, remember it, and move on who has its prompt computed."""
        step_id, self._next_step_id = self._next_step_id, self._next_step_id + 1
        is_everybody = draft.decodes is self._running.decoding
        decode_rows = self._running.decode_rows if is_everybody else [request.handle for request in draft.decodes]
        given_back = self._running.take_given_back()
        output, step = draft.complete(step_id, self.epoch, decode_rows, given_back)
        if (swaps := self.host.take_orders()) is not None:
            output = msgspec.structs.replace(output, swaps=swaps)
        self._in_flight.append(step)
        self._metrics.step_tokens.observe(output.num_scheduled_tokens)
        if self._shares is not None:
            if draft.decodes:
                step.num_groups = min(self._num_stages, step_id - draft.decodes[0].last_step_id)
            for request in step.rows:
                request.last_step_id = step_id
        if draft.copies:
            self._metrics.block_copies += len(draft.copies)
            self.blocks.end_step()
        if draft.prefills:
            self._settle_prefills([request for request, _, is_partial in draft.prefills if not is_partial])
            for request, _, _ in draft.prefills:
                self.blocks.trim(request)
        return output

    def _settle_prefills(self, computed: list[Request]) -> None:
        """These have all their tokens computed: they decode from now on, and their forks may share their blocks."""
        for request in computed:
            for fork in request.forks:
                if not fork.is_finished:
                    fork.num_cached_tokens = request.num_cached_tokens
                    self.blocks.fork(request, fork)
                    self.queue.push(fork)
                    if fork.block_ids:
                        self._waiting_forks.append(fork)
            request.forks = []
        self._running.start_decoding(computed)

    def update(self, output: ModelRunnerOutput) -> None:
        """Apply the answer of the oldest step in flight."""
        step = self._in_flight.popleft()
        if step.step_id != output.step_id:
            raise InvariantBroken(f"step {output.step_id} was answered before step {step.step_id}")
        self._applied_step_id = step.step_id
        if self.host.num_host_blocks:
            self.host.note(output.swapped_in_step_id, output.swap_seconds)
        self.outcomes.apply(step, output)

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
