"""The life of one request on the driver: its tokens so far, how far they are computed, and the status table.

One answer is one `Request`: a `GenerateRequest` with n = 3 becomes three that share their prompt's blocks. The step
loop touches thousands of these a step, so what it needs is kept ready in slots: see `countdown` and `watched`.
"""

from collections.abc import Mapping
from enum import IntEnum
from typing import Any, Final

import msgspec

from argosy.cluster.protocol.errors import InvariantBroken
from argosy.cluster.protocol.messages import GenerateRequest, TokenDelta, TokenLogprobs
from argosy.cluster.protocol.sampling import TokenParams


class RequestStatus(IntEnum):
    """Where a request stands."""

    WAITING = 0  # in the queue; holds no handle, device blocks only as the fork of another, perhaps host blocks
    RUNNING = 1  # has a handle on the ranks and blocks
    FINISHED = 2  # its owner was told; holds nothing
    LOADING = 3  # its blocks are on their way in from the host; not in the queue, holds blocks and no handle


TRANSITIONS: Final[Mapping[RequestStatus, frozenset[RequestStatus]]] = {
    RequestStatus.WAITING: frozenset({RequestStatus.RUNNING, RequestStatus.LOADING, RequestStatus.FINISHED}),
    RequestStatus.RUNNING: frozenset({RequestStatus.WAITING, RequestStatus.FINISHED}),  # WAITING: had to make room
    RequestStatus.LOADING: frozenset({RequestStatus.RUNNING, RequestStatus.WAITING, RequestStatus.FINISHED}),
    RequestStatus.FINISHED: frozenset(),
}


class _Everything:
    """A set that holds every token id."""

    def __contains__(self, token_id: object) -> bool:
        return True


WATCH_ALL: Final = _Everything()
"""As `Request.watched`: look closely at whatever token comes next."""

BATCH_PRIORITY: Final = 1 << 20
"""From this priority on a request belongs to a job that nobody waits for; it goes behind all others in any policy."""

_SEED_SPAN: Final = 2**64


class Request:
    """One answer in the making. Owned by the scheduler; block tables are the block manager's to change.

    `num_computed_tokens` counts the positions whose computation was submitted; the ranks carry steps out in order, so
    for whoever comes later they are computed. It isn't stored: the step loop counts `countdown` down to 0 at
    `boundary`, where something has to happen (a new block, or the last token was scheduled).

    `watched` holds the token ids at which the step loop must look closely: eos, stop tokens, -1 (the row failed);
    `WATCH_ALL` when every token needs it (logprobs, the first token, the last, the request is over).
    """

    __slots__ = (
        "arrival",
        "arrival_seconds",
        "block_hashes",
        "block_ids",
        "boundary",
        "cache_salt",
        "countdown",
        "deadline_seconds",
        "deltas",
        "end",
        "first_scheduled_seconds",
        "first_token_seconds",
        "forks",
        "handle",
        "host_table",
        "index",
        "is_decoding",
        "is_first_delta",
        "is_queued",
        "last_step_id",
        "num_cached_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_recoveries",
        "num_registered_blocks",
        "owner",
        "params",
        "priority",
        "prompt_logprobs",
        "quiet_watch",
        "request_id",
        "resume_after_step_id",
        "status",
        "story",
        "stream_id",
        "token_ids",
        "watched",
    )

    def __init__(
        self,
        message: GenerateRequest,
        index: int,
        *,
        arrival: int,
        arrival_seconds: float,
        end: int,
        deltas: list[TokenDelta],
        owner: Any = None,
    ):
        generated = message.generated_token_ids[index] if index < len(message.generated_token_ids) else ()
        self.request_id, self.stream_id, self.index = message.request_id, message.stream_id, index
        self.params = _params_of_sample(message.params, index)
        self.priority, self.cache_salt = message.priority, message.cache_salt
        self.arrival, self.arrival_seconds = arrival, arrival_seconds
        self.deadline_seconds = arrival_seconds
        self.deltas, self.owner = deltas, owner
        self.num_prompt_tokens = len(message.prompt_token_ids)
        self.token_ids: list[int] = [*message.prompt_token_ids, *generated]
        self.end = end  # prompt and answer hold at most so many tokens
        self.status = RequestStatus.WAITING
        self.story: list[str] = []
        self.handle = -1
        self.block_ids: list[int] = []
        self.block_hashes: list[tuple[bytes, bytes]] = []  # of each full block: digest, packed token ids
        self.num_registered_blocks = 0
        self.host_table: Any = None  # a `HostTable`, of what it has in host memory
        self.boundary = self.countdown = 0
        self.last_step_id = self.resume_after_step_id = -1
        self.is_queued = self.is_decoding = False
        self.forks: list[Request] = []  # those that wait for this one's prompt
        self.num_cached_tokens = -1
        self.num_preemptions = self.num_recoveries = 0
        self.is_first_delta = True
        self.first_scheduled_seconds = self.first_token_seconds = -1.0
        wants_prompt = self.params.prompt_logprobs is not None and index == 0
        self.prompt_logprobs: list[TokenLogprobs | None] | None = (
            [None] * self.num_prompt_tokens if wants_prompt else None
        )
        self.quiet_watch = frozenset((*self.params.eos_token_ids, *self.params.stop_token_ids, -1))
        self.watched: frozenset[int] | _Everything = WATCH_ALL

    @property
    def num_computed_tokens(self) -> int:
        """Positions whose computation was submitted."""
        return self.boundary - self.countdown

    @property
    def num_uncomputed_tokens(self) -> int:
        """Prefill, chunked prefill, decode and recompute are all this number.

        A request that has computed all tokens the driver knows is owed one by a step in flight (a placeholder).
        """
        return max(len(self.token_ids) - self.num_computed_tokens, 1)

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens that the driver knows."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_finished(self) -> bool:
        """Whether its owner was told the end."""
        return self.status is RequestStatus.FINISHED

    @property
    def is_fully_scheduled(self) -> bool:
        """Whether steps in flight will bring its last token: nothing is left to schedule."""
        return self.num_computed_tokens >= self.end - 1

    def set_computed(self, num_computed_tokens: int, num_slots: int) -> None:
        """Say how far it is computed, and work out when the step loop has to look again. Its table has `num_slots`.

        That is where the table ends, one token before the last step (so that its token is watched), and after it.
        """
        near_end = self.end - 2
        if num_computed_tokens >= near_end:
            near_end = self.end - 1
            self.watched = WATCH_ALL
        self.boundary = min(num_slots, near_end)
        self.countdown = self.boundary - num_computed_tokens

    def rest(self) -> None:
        """Let the step loop pass plain tokens through, if nothing more is asked of each of them."""
        wants_each = self.params.logprobs is not None or self.params.logprob_token_ids
        below_minimum = self.num_output_tokens < self.params.min_tokens
        last_is_next = self.num_computed_tokens >= self.end - 2
        if not (wants_each or below_minimum or self.is_first_delta or last_is_next):
            self.watched = self.quiet_watch

    def move(self, to: RequestStatus, why: str) -> None:
        """Change the status, or say how it came to an illegal change."""
        if to not in TRANSITIONS[self.status]:
            raise InvariantBroken(f"{self.status.name} -> {to.name} ({why})", self.request_id, self.story)
        self.story.append(why)
        self.status = to

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id[:8]}.{self.index} {self.status.name} handle={self.handle} "
            f"tokens={self.num_prompt_tokens}+{self.num_output_tokens} computed={self.num_computed_tokens})"
        )


def make_requests(
    message: GenerateRequest, *, arrival: int, now: float, max_len: int, deltas: list[TokenDelta], owner: Any = None
) -> list[Request]:
    """The n answers that a message asks for, in order of their index. `max_len` bounds prompt and answer together."""
    end = min(len(message.prompt_token_ids) + message.params.max_tokens, max_len)
    return [
        Request(message, index, arrival=arrival, arrival_seconds=now, end=end, deltas=deltas, owner=owner)
        for index in range(message.n)
    ]


def order_key(request: Request, by_priority: bool) -> tuple[int, int, int]:
    """Who goes first: the smaller. First come, first served means among people: items of jobs come behind them all."""
    priority = request.priority if by_priority else int(request.priority >= BATCH_PRIORITY)
    return priority, request.arrival, request.index


def _params_of_sample(params: TokenParams, index: int) -> TokenParams:
    if index == 0:
        return params
    seed = (params.seed + index + _SEED_SPAN // 2) % _SEED_SPAN - _SEED_SPAN // 2  # stays a signed 64-bit number
    return msgspec.structs.replace(params, seed=seed, prompt_logprobs=None)
