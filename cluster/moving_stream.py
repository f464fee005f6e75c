"""A request's answers, whichever replica works on them: after a loss it is asked for again, with the tokens so far.

What was handed out is never taken back or said twice: the next replica gets prompt and tokens apart, computes both, and
goes on with the token that would have come next (the draw depends on seed and position alone). A stream that has to
wait until some replica is there again waits; its reader sees a pause.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, Final, Protocol

import msgspec

from argosy.cluster.driver_client import TokenStream
from argosy.cluster.protocol.errors import ChannelClosed, ClusterError, DeadlineExceeded, RequestError
from argosy.cluster.protocol.messages import TokenDelta
from argosy.cluster.protocol.sampling import FinishReason, TokenParams

# what a driver says of all its requests when it can't go on: another one can
_GAVE_UP: Final = frozenset(
    ("worker_lost", "worker_failed", "startup_timeout", "placement_impossible", "preflight_failed", "cluster_error",
     "channel_closed", "serving_error", "weight_error", "unsupported_model", "config_error")
)  # fmt: skip
_LOST: Final = (FinishReason.LOST, FinishReason.ERROR)


class Asker(Protocol):
    """Who knows the replicas: `replica_client.ReplicaClient`."""

    def ask(
        self,
        prompt_token_ids: Sequence[int],
        params: TokenParams,
        *,
        generated_token_ids: Sequence[Sequence[int]] = (),
        **options: Any,
    ) -> TokenStream | None:
        """Ask the replica that is best now; None when none is there."""

    async def wait_until_open(self, seconds: float | None) -> bool:
        """Until some replica is there; False when none comes in time, or when too many wait for one."""

    def gave_up(self, source: TokenStream) -> None:
        """Hear that the replica behind `source` can't go on, though its connection still stands."""


class MovingStream:
    """Iterated like a `TokenStream`. `max_moves`: so many losses in its life a request may outlive."""

    def __init__(
        self,
        asker: Asker,
        prompt_token_ids: Sequence[int],
        params: TokenParams,
        *,
        max_moves: int,
        n: int = 1,
        deadline_seconds: float | None = None,
        **options: Any,
    ):
        self._asker, self._prompt, self._params, self._options = asker, prompt_token_ids, params, options
        self._n, self._max_moves, self._num_moves = n, max_moves, 0
        self._deadline_seconds = deadline_seconds
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._asked_after = 0.0  # seconds from then to the last asking
        self._first_after = -1.0  # and to the first token that was handed out
        self._generated: list[list[int]] = [[] for _ in range(n)]
        self._open = set(range(n))  # answers that have not ended
        self._dropped: set[int] = set()  # that their owner called off
        self._was_lost = False  # by the replica of `_source`
        self._source = self._ask()

    def __aiter__(self) -> "MovingStream":
        return self

    async def __anext__(self) -> list[TokenDelta]:
        while self._open:
            if self._source is None:
                await self._move()
            if self._source is None:
                return self._give_up()
            try:
                arrived = await anext(self._source)
            except StopAsyncIteration:
                if not self._was_lost:
                    break
                self._source = None
                continue
            if self._first_after < 0:
                self._first_after = self._loop.time() - self._began
            is_plain = not self._num_moves
            for delta in arrived:
                self._generated[delta.index] += delta.token_ids
                if delta.finish_reason is not None:
                    is_plain = False
            if not is_plain:
                arrived = [self._as_one(delta) for delta in arrived if self._is_kept(delta)]
            if arrived:
                return arrived
        raise StopAsyncIteration

    def abort(self, index: int | None = None) -> None:
        """Nobody wants this any more: all answers, or the one of `index`."""
        self._dropped |= {index} if index is not None else set(range(self._n))
        if self._source is not None:
            self._source.abort(index)

    def _is_kept(self, delta: TokenDelta) -> bool:
        """Whether its reader should see it: not that a replica was lost, as long as there may be another."""
        if delta.index not in self._open:
            return False  # it had ended before the request moved, and was asked for only because the others were
        if delta.finish_reason in _LOST and self._is_movable(delta):
            self._was_lost = True
            return False
        if delta.finish_reason is not None:
            self._open.discard(delta.index)
        return True

    def _is_movable(self, delta: TokenDelta) -> bool:
        assert self._source is not None
        if delta.index in self._dropped or self._num_moves >= self._max_moves:
            return False
        if not self._source.was_cut and delta.error_code in _GAVE_UP:
            self._asker.gave_up(self._source)
            return True
        return self._source.was_cut

    def _as_one(self, delta: TokenDelta) -> TokenDelta:
        """What a later replica says, as a part of the whole answer."""
        if not self._num_moves:
            return delta
        changes: dict[str, Any] = {}
        if delta.num_cached_tokens is not None and any(self._generated):
            changes["num_cached_tokens"] = None  # said before, of the prompt alone
        if delta.finish_reason is not None:
            changes["num_recoveries"] = delta.num_recoveries + self._num_moves
        if delta.timing:
            _, _, last = delta.timing
            first = self._first_after
            changes["timing"] = (min(first, delta.timing[0] + self._asked_after), first, last + self._asked_after)
        return msgspec.structs.replace(delta, **changes) if changes else delta

    async def _move(self) -> None:
        """Ask again, now or when a replica is there."""
        self._num_moves += self._was_lost
        self._was_lost = False
        left = self._seconds_left()
        if (left is None or left > 0) and await self._asker.wait_until_open(left):
            self._source = self._ask()

    def _ask(self) -> TokenStream | None:
        params, has_begun = self._params, any(self._generated)
        if has_begun and params.prompt_logprobs is not None:
            params = msgspec.structs.replace(params, prompt_logprobs=None)  # they came with the first token
        gone = {index for index in range(self._n) if index not in self._open or index in self._dropped}
        generated = [[] if index in gone else ids for index, ids in enumerate(self._generated)] if has_begun else ()
        left = self._seconds_left()
        source = self._asker.ask(
            self._prompt, params, n=self._n, generated_token_ids=generated,
            deadline_seconds=None if left is None else max(left, 1e-3), **self._options,
        )  # fmt: skip
        if source is not None:
            self._asked_after = self._loop.time() - self._began
            source.can_move = self._num_moves < self._max_moves
            for index in sorted(gone):
                source.abort(index)
        return source

    def _seconds_left(self) -> float | None:
        if self._deadline_seconds is None:
            return None
        return self._deadline_seconds - (self._loop.time() - self._began)

    def _give_up(self) -> list[TokenDelta]:
        """The last deltas of a request for which no replica came in time."""
        left = self._seconds_left()
        error: RequestError | ClusterError = ChannelClosed("no replica is there, and none came back in time")
        if left is not None and left <= 0:
            assert self._deadline_seconds is not None
            error = DeadlineExceeded(self._deadline_seconds)
        ended, self._open = sorted(self._open), set()
        return [
            TokenDelta(
                stream_id=-1, index=index, token_ids=(), finish_reason=FinishReason.ERROR, error_code=error.code,
                error_message=str(error), error_status=error.http_status, num_recoveries=self._num_moves,
            )
            for index in ended
        ]  # fmt: skip
