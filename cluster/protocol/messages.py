"""What processes say to each other: frozen values, no tensors, msgpack on the wire with a fixed schema.

    edge    -> driver   Hello, GenerateRequest, Burst, AbortRequest, StatsRequest, ResetPrefixCache, Drain
    driver  -> edge     Welcome, TokenDeltas, StatsReply, PrefixCacheReset
    rank    -> driver   Hello, WorkerProgress, WorkerReport, WorkerReady, ModelRunnerOutput, WorkerError, Pong
    driver  -> rank     StartWorker, AllocateCache, SchedulerOutput, Ping, StopWorker

Token ids only: text stays at the edge. Requests in full once (`NewRequest`), after that as differences: ranks remember
them under a small integer, the `handle`, which is also the row of the per-request tables that a rank keeps on its
device. Columns instead of objects where every request has an entry, since this is sent once a step.

Structs travel as arrays (`array_like`), so a field is added at the end, with a default. `gc=False` where no cycle is
possible: the collector need not walk thousands of these.
"""

from collections.abc import Sequence
from typing import Final, TypeAlias

import msgspec

from argosy.cluster.protocol.sampling import FinishReason, TokenParams

PROTOCOL_VERSION: Final = 1


class _Message(msgspec.Struct, frozen=True, array_like=True, kw_only=True, gc=False, tag=True):
    """A value with a tag, so that one socket can carry several kinds."""


# ---------------------------------------------------------------------------------------------- opening a connection


class Hello(_Message, frozen=True):
    """First message of whoever connects. `secret` is compared in constant time and never logged."""

    role: str  # "edge" or "rank"
    secret: str
    global_rank: int = -1
    pid: int = 0
    version: int = PROTOCOL_VERSION


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What an edge needs to know of the engine behind the driver."""

    model: str
    max_model_len: int
    vocab_size: int
    num_blocks: int
    block_size: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    dtype: str
    max_logprobs: int
    max_num_seqs: int
    epoch: int = 0
    device: str = "cpu"
    eos_token_ids: tuple[int, ...] = ()
    weight_bytes: int = 0
    layout: str = ""  # one line for people: "TP2 x PP2 on 2 nodes"
    kv_windows: tuple[int, ...] = (0,)  # see `kv_groups.KVGroups`


class Welcome(_Message, frozen=True):
    """Driver -> edge: the connection stands and the engine is ready."""

    info: EngineInfo


# ------------------------------------------------------------------------------------------------- edge and driver


class GenerateRequest(_Message, frozen=True):
    """Edge -> driver: produce tokens for one prompt, `n` times.

    `stream_id` is the edge's own number for it, unique on this connection; every answer carries it back.
    `generated_token_ids` is what an earlier attempt already produced (one list for each of the n), kept apart from the
    prompt because penalties, min_tokens and the draw's position depend on the difference.
    """

    stream_id: int
    request_id: str  # random 128 bit, in hex; for logs and metrics only
    prompt_token_ids: Sequence[int]
    params: TokenParams
    n: int = 1
    priority: int = 0  # lower is sooner
    cache_salt: str = ""
    deadline_seconds: float | None = None  # from arrival at the driver
    generated_token_ids: Sequence[Sequence[int]] = ()


class Burst(_Message, frozen=True):
    """Edge -> driver: requests that were made together follow, or all of them have been sent.

    A driver with nothing to do waits a moment for the rest of them (`cluster.gathering`).
    """

    begins: bool


class AbortRequest(_Message, frozen=True):
    """Edge -> driver: nobody wants this any more (all n of it, or just those named)."""

    stream_id: int
    indexes: tuple[int, ...] = ()  # empty: all


class StatsRequest(_Message, frozen=True):
    """Edge -> driver: send the live figures. `known_names`: and the names of cached blocks from that number on."""

    known_names: int = -1  # none


class ResetPrefixCache(_Message, frozen=True):
    """Edge -> driver: forget all cached prefixes. Answered by `PrefixCacheReset`."""


class Drain(_Message, frozen=True):
    """Edge -> driver: take no new requests; what runs may end."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log probabilities at one position, before any penalty or temperature (raw).

    `top_ids[0]` with `top_logprobs[0]` is the token at this position; `rank` is its 1-based rank in the vocabulary.
    The asked-for most likely ones follow, best first (the token itself may be among them again), then those of
    `logprob_token_ids`.
    """

    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


class TokenDelta(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Driver -> edge: what one of a request's n answers gained in a step; the last one says why it ended."""

    stream_id: int
    index: int
    token_ids: Sequence[int]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the stop token that ended it; None when it was an eos
    logprobs: Sequence[TokenLogprobs] = ()
    num_cached_tokens: int | None = None  # with the first delta: prompt tokens found in the prefix cache
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None  # with the first delta, when asked for
    error_code: str = ""  # with finish_reason error, abort or lost: the code, text and status of the error
    error_message: str = ""
    error_status: int = 0
    retry_after_seconds: float = 0.0
    timing: tuple[
        float, ...
    ] = ()  # with the last delta, seconds from arrival: first scheduled, first token, last token
    num_preemptions: int = 0
    num_recoveries: int = 0


class TokenDeltas(_Message, frozen=True):
    """Driver -> edge: all that this edge's requests gained in one step, in one message."""

    deltas: Sequence[TokenDelta]
    step_id: int = -1


class StatsReply(_Message, frozen=True):
    """Driver -> edge: the live figures by metric name (`cluster.metrics`)."""

    values: dict[str, float]
    histograms: dict[str, tuple[list[float], list[int], float]] = {}  # bounds, counts (one more than bounds), sum
    healthy: bool = True
    status: str = "ready"
    step_id: int = 0
    seconds_since_progress: float = 0.0
    new_names: bytes = b""  # of blocks that came into the cache, 8 bytes each (`cluster.prefix_news`)
    known_names: int = -1  # the number to ask with next; -1: not asked


class PrefixCacheReset(_Message, frozen=True):
    """Driver -> edge: whether the cache was emptied (blocks in use stay)."""

    done: bool


# ------------------------------------------------------------------------------------------------ driver and ranks


class StartWorker(_Message, frozen=True):
    """Driver -> rank: build process groups for `epoch` at `rendezvous` ("host:port"), load weights, then report."""

    epoch: int
    rendezvous: str
    deadline_seconds: float


class WorkerProgress(_Message, frozen=True):
    """Rank -> driver while starting: the phase's name and how much of it is done (0 to 1)."""

    global_rank: int
    phase: str
    fraction: float


class WorkerReport(_Message, frozen=True):
    """Rank -> driver: what this rank measured. The smallest `num_blocks` of all ranks becomes everybody's."""

    global_rank: int
    epoch: int
    num_blocks: int  # how many KV blocks fit this rank's free bytes
    block_bytes: int
    free_bytes: int
    weight_bytes: int
    activation_bytes: int
    device: str
    node: str
    ledger: dict[str, int] = {}
    kv_windows: tuple[int, ...] = (0,)  # see `kv_groups.KVGroups`
    num_host_blocks: int = 0  # how many `swap_space` holds on this rank


class AllocateCache(_Message, frozen=True):
    """Driver -> rank: allocate exactly so many KV blocks and get ready (warm up, record graphs)."""

    num_blocks: int
    num_host_blocks: int = 0  # of the pool in host memory that blocks are swapped to


class WorkerReady(_Message, frozen=True):
    """Rank -> driver: the cache stands; steps may come."""

    global_rank: int
    epoch: int
    ledger: dict[str, int] = {}
    phases: dict[str, float] = {}  # seconds of each part of the start, from the start of its process
    # with a host pool, measured on this rank: seconds of one block out, of one in, and to compute one prompt token
    swap_seconds: tuple[float, float, float] = (0.0, 0.0, 0.0)


class WorkerError(_Message, frozen=True):
    """Rank -> driver: this rank can't go on. `code` is an error code of ours; `message` one line for people."""

    global_rank: int
    epoch: int
    code: str
    message: str


class Ping(_Message, frozen=True):
    """Driver -> rank: say something."""

    nonce: int


class Pong(_Message, frozen=True):
    """Rank -> driver: here; the last step that was finished."""

    global_rank: int
    nonce: int
    step_id: int


class StopWorker(_Message, frozen=True):
    """Driver -> rank: leave the groups, free the device, exit."""


class NewRequest(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A request that ranks don't know (new, or back after preemption or recovery), in full.

    `handle` is a row below `max_num_seqs`, free again once it was named in `finished`. `token_ids` is the prompt and
    all that was generated so far; [0, num_computed_tokens) of it is already in the blocks. With several groups of
    layers (`kv_groups`) ids of blocks come place by place, one for each group.
    """

    handle: int
    token_ids: Sequence[int]
    num_prompt_tokens: int
    num_computed_tokens: int
    block_ids: Sequence[int]
    params: TokenParams


class BlockSwaps(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Whole blocks between the device and the host; see `SchedulerOutput`.

    `out` (device block, host block) is read before anything of the step is written; the device block may be written by
    the same step. `into` (host block, device block) begins once the step before and `out` are done, and may take as
    long as it likes: nobody uses those device blocks until a step names this one in its `await_step_id`. That step's
    rows run, and whatever it copies is copied, when all that steps up to `await_step_id` ordered in has come in.
    """

    out: Sequence[tuple[int, int]] = ()
    into: Sequence[tuple[int, int]] = ()
    await_step_id: int = -1


class SchedulerOutput(_Message, frozen=True):
    """Driver -> every rank of the replica: what step `step_id` computes. Each rank takes its part of the same value.

    A rank does, in this order: forget `finished`; take up `new_requests`; append `new_blocks`; begin `swaps`; carry
    out `block_copies`; run the rows; advance each row's computed count by its `num_tokens`. A step may have no rows.

    `rows` are handles in batch order: rows of one token first (decodes), then the longer ones. Row i computes
    `num_tokens[i]` tokens from its computed count on (an empty `num_tokens` means one for each row). A row samples
    one token after its last position unless its place i is in `partial` (more of its prompt is to come).

    A token that was sampled is not sent back to the ranks, and a step may need it before the driver knows it
    ("placeholder"): they keep it themselves, and the last pipeline stage hands it to the first. What is handed over
    when follows from the stream of these messages and from `max_steps_in_flight`, which bounds how many are unanswered.
    """

    step_id: int
    epoch: int
    rows: Sequence[int]
    num_tokens: Sequence[int] = ()
    partial: Sequence[int] = ()
    new_requests: Sequence[NewRequest] = ()
    new_blocks: Sequence[tuple[int, Sequence[int]]] = ()  # (handle, block ids to append)
    block_copies: Sequence[tuple[int, int]] = ()  # (source, destination), whole blocks, before the forward pass
    finished: Sequence[int] = ()
    swaps: BlockSwaps | None = None

    @property
    def num_scheduled_tokens(self) -> int:
        """Tokens that the step computes, over all rows."""
        return sum(self.num_tokens) if self.num_tokens else len(self.rows)


class ModelRunnerOutput(_Message, frozen=True):
    """Sampling rank -> driver: the outcome of a step.

    `token_ids` has one id for each row that sampled, in row order; -1 where that row failed (`failed` says why: place
    in the step's rows and a sentence). `logprobs` pairs the place in `token_ids` with the figures;
    `prompt_logprobs` is (handle, first prompt position, figures of the following positions).
    """

    step_id: int
    epoch: int
    token_ids: Sequence[int]
    logprobs: Sequence[tuple[int, TokenLogprobs]] = ()
    prompt_logprobs: Sequence[tuple[int, int, Sequence[TokenLogprobs]]] = ()
    failed: Sequence[tuple[int, str]] = ()
    step_seconds: float = 0.0
    swapped_in_step_id: int = -1  # all blocks that steps up to this one ordered in are in, on this rank
    swap_seconds: tuple[float, float] = (0.0, 0.0)  # of copies out and in that ended since the last answer


FromEdge: TypeAlias = Hello | GenerateRequest | Burst | AbortRequest | StatsRequest | ResetPrefixCache | Drain
ToEdge: TypeAlias = Welcome | TokenDeltas | StatsReply | PrefixCacheReset
FromRank: TypeAlias = Hello | WorkerProgress | WorkerReport | WorkerReady | ModelRunnerOutput | WorkerError | Pong
ToRank: TypeAlias = StartWorker | AllocateCache | SchedulerOutput | Ping | StopWorker
