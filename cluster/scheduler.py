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

import msgspec

from argosy.cluster.clock import Clock
from argosy.cluster.host_tier import num_on_host
from argosy.cluster.kv_groups import with_zeros
from argosy.cluster.metrics import Metrics
from argosy.cluster.micro_batches import MicroBatches
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import InvariantBroken
from argosy.cluster.protocol.messages import ModelRunnerOutput, NewRequest, SchedulerOutput
from argosy.cluster.request import Request, RequestStatus, order_key
from argosy.cluster.residents import Residents
from argosy.cluster.step import Draft


class Scheduler(Residents):
    """`schedule` and `update` alternate as steps are sent and answered, in step order."""

    def __init__(self, config: ServingConfig, clock: Clock, metrics: Metrics):
        super().__init__(config, clock, metrics)
        scheduler = config.scheduler
        self._chunked, self._watermark = scheduler.enable_chunked_prefill, scheduler.watermark
        self._num_stages = config.parallel.pipeline_parallel_size
        self._shares: MicroBatches | None = None
        if self._num_stages > 1:
            self._shares = MicroBatches(self._num_stages, self._max_tokens, is_async=scheduler.async_scheduling)

    @property
    def most_waiting_tokens(self) -> int:
        """Waiting tokens of prompts beyond so many make no difference to the next step."""
        return self._max_tokens if self._shares is None else self._shares.most_tokens

    def schedule(self) -> SchedulerOutput | None:
        """The next step, or None when there is nothing to compute now."""
        if self._running.is_stale:
            self._running.drop_stale()
        draft = Draft(self._max_tokens)
        self._advance_decodes(draft)
        if self._shares is not None and self._chunked:
            waiting, decoding = self._num_waiting_tokens(self._shares), len(self._running.decoding)
            budget = self._shares.prompt_budget(waiting, decoding, len(draft.decodes))
            draft.budget = min(draft.budget, budget)
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
        """Tokens of prompts that have a place or find one, counted no further than it matters."""
        begun = sum(request.num_uncomputed_tokens for request in self._running.prefilling)
        return begun + self.queue.num_uncomputed_tokens(shares.most_tokens - begun, self._running.num_free)

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
                if host.is_link_taken:
                    return  # a step's copies come in all together: the next step orders more
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
