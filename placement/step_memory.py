"""Bytes that steps need beside weights and blocks, by rules that ranks and planner share.

What a rank makes itself is reckoned by one function on both sides: recorded graphs, the memory that all of
them share, and what a group's cards open for each other. What libraries take is measured (`placement/calibration.py`).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Final

from argosy.cluster.protocol.model_spec import ModelSpec, kv_heads_per_rank

GRAPH_BYTES_A_KERNEL: Final = 2048  # what the driver keeps of each kernel of a recorded graph
GRAPH_SCRATCH_BYTES: Final = 2**26  # partial sums of attention and products
GRAPHS_A_SIZE: Final = 2  # a step and its draw
KERNELS_A_LAYER: Final = 8
KERNELS_A_PROMPT_LAYER: Final = 11
KERNELS_A_LONG_LAYER: Final = 64  # in halves, with flags and copies
SHARED_UNIT: Final = 2 * 2**20  # in which the driver hands out memory that other cards can address
SUM_FLAGS: Final = 32 * 2**10  # at the start of a group's buffer
SUM_PARTS: Final = 4  # of a largest step's hidden states: three products and a result
SMALL_SUM_BYTES: Final = 4 * 2**20  # the buffer for sums of few bytes
PUSHED_ROWS: Final = 64  # that an inbox for numbers with their turn holds,
PUSH_ROW_NUMBERS: Final = 16384  # where a row has at most so many, times ranks
EVEN_PROGRAMS: Final = ((7, 8), (12, 16))  # as in `kernels/paged_attention.py`
EVEN_CARD: Final = 132
WIRE_SLOTS: Final = 2  # for hidden states, on a stage's wire

PROMPT_SIZES: Final = (32, 64, 128, 192, 256, 384, 512)  # tokens of recorded steps with prompts
PROMPT_DECODES: Final = (8, 64)  # places for decode rows in them
PROMPT_ROWS: Final = 16  # and for prompts
# Over stages a piece of a prompt is in nearly every step, beside a share of all rows that decode, and a stage's host
# has no longer than the step before: more sizes, places for many rows, and up to what such a host would be waited for
# (0.63 ms a layer of 70B).
STAGE_SIZES: Final = tuple(range(192, 705, 64))
STAGE_DECODES: Final = tuple(range(128, 513, 64))
# Tokens that such a step has, beside all its places: at least and at most. Beside as many places as a share of all rows
# has, as many as there are sizes for: a full server's pieces are what its traffic has of prompts to each token.
STAGE_PIECES: Final = (64, 192)
LONG_UNIT: Final = 1024  # longer ones have multiples of it, places for all decode rows
LONG_ROWS: Final = 64  # and for so many prompts
EAGER_SECONDS_A_LAYER: Final = 0.2e-3  # of the host, to launch a layer of a step with prompts
# the same over a group of which each rank has so many peers, in halves whose sums are copied (`GroupForward`)
HALVES_SECONDS_A_LAYER: Final = 0.7e-3
PEER_SECONDS_A_LAYER: Final = 0.45e-3
SLOW_HOST_HALVES: Final = 1.5  # times as long on a host that is busy, or old
SLOW_HOST_KERNELS: Final = 2.5  # the same where there are no halves: 25 ms for a full step of 0.6B's 28 layers
SLOW_HOST_STAGES: Final = 5.0  # the same in small steps, beside the profiler
PRODUCTS_PER_SECOND: Final = 600e12  # as prompts reach them
SUMS_PER_SECOND: Final = 0.64e12  # bytes of hidden states over a group, times ranks


def ladder(max_rows: int) -> list[int]:
    """Batch sizes to record: fine steps where a padded row costs a noticeable share, coarse ones above."""
    sizes = [1, 2, 4, *range(8, 129, 8), *range(144, 257, 16), *range(288, 1025, 32)]
    below = [size for size in sizes if size < max_rows]
    return [*below, max_rows]


def shared_ladder(max_rows: int) -> list[int]:
    """Batch sizes to record for rows that share a prefix as well: few, since most steps never need them."""
    if max_rows < 64:
        return []
    return [*(size for size in (64, 128, 192, 256, 384, 512, 768) if size < max_rows), max_rows]


def prompt_sizes(
    spec: ModelSpec,
    *,
    tp_size: int,
    max_tokens: int,
    dtype_bytes: int = 2,
    kv_dtype_bytes: int = 2,
    slice_tokens: int | None = None,
    over_stages: bool = False,
) -> list[int]:
    """Tokens of the recorded steps with prompts, for steps of at most so many, those of more than a slice cut.

    Padding may go beyond that where there is no group, whose buffers are as large as its longest step. Only where the
    card has less to do than the host has to launch: above, launches hide behind products, and padding costs what it
    adds to them. A full step is recorded as well where a slow host would be waited for. Latent attention reads lengths
    on the host, so there is none for it; so do long steps over keys of 8 bits, which they unpack where that pays.
    """
    if spec.mla is not None:
        return []
    inner = spec.intermediate_size
    if spec.moe is not None:
        inner = spec.moe.top_k * spec.moe.intermediate_size + spec.moe.shared_size
    numbers = (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_size * spec.hidden_size
    numbers += 3 * spec.hidden_size * inner
    products = 2 * numbers / PRODUCTS_PER_SECOND / tp_size  # seconds of a token
    most = EAGER_SECONDS_A_LAYER / products
    sizes, most_short = list(PROMPT_SIZES), most
    if over_stages:
        sizes, most_short = sorted({*PROMPT_SIZES, *STAGE_SIZES}), SLOW_HOST_STAGES * most
    longest = max_tokens
    if tp_size == 1:
        longest = next((size for size in sizes if size >= max_tokens), sizes[-1])
    short = [size for size in sizes if size <= min(most_short, longest, slice_tokens or longest)]
    if spec.moe is not None or kv_dtype_bytes == 1:
        return short
    slow_host = SLOW_HOST_KERNELS
    if tp_size > 1:
        slow_host = SLOW_HOST_HALVES
        sums = 2 * spec.hidden_size * dtype_bytes * tp_size / SUMS_PER_SECOND
        most = (HALVES_SECONDS_A_LAYER + PEER_SECONDS_A_LAYER * (tp_size - 1)) / (products + sums)
    full = min(max_tokens, slice_tokens or max_tokens) // LONG_UNIT * LONG_UNIT
    long = list(range(LONG_UNIT, min(full, int(most)) + 1, LONG_UNIT))
    if full not in long and LONG_UNIT <= full <= slow_host * most:
        long.append(full)
    return [*short, *long]


def prompt_places(num_tokens: int) -> int:
    """For prompts, in recorded steps of so many tokens."""
    return PROMPT_ROWS if num_tokens < LONG_UNIT else LONG_ROWS


def prompt_kinds(sizes: Sequence[int], max_rows: int, *, over_stages: bool = False) -> list[tuple[int, int]]:
    """(tokens, places for decode rows) of the recorded steps with prompts. Few places for decode rows where there are
    few: attention cuts contexts into pieces by how many rows there may be. Over stages also for many: each step has its
    share of all rows."""
    kinds, many = [], list[int]()
    if over_stages:
        share = -(-max_rows // 2)
        many = [min(each, share) for least, each in pairwise((PROMPT_DECODES[-1], *STAGE_DECODES)) if least < share]
    for size in sizes:
        if size < LONG_UNIT:
            places = {min(each, max_rows) for each in PROMPT_DECODES}
            least, most = STAGE_PIECES
            places |= {each for each in many if each + least <= size and (size <= each + most or each == many[-1])}
        else:
            places = {min(max_rows, size // 2)}
        kinds += [(size, each) for each in sorted(places) if each + prompt_places(size) < size]
    return kinds


def recorded_kinds(
    spec: ModelSpec,
    num_layers: int,
    max_rows: int,
    *,
    tp_size: int,
    max_tokens: int,
    dtype_bytes: int,
    kv_dtype_bytes: int,
    slice_tokens: int | None,
    records: Callable[[int], bool] | None = None,
) -> list[tuple[int, int]]:
    """(tokens, places for decode rows) of the steps with prompts that a rank of so many layers records.

    Beside decode steps of at most `max_rows`; none where these are not recorded (0). `records`: whether the rank's
    model can be recorded with so many tokens; a plan, which has no model, takes it that it can.
    """
    if not max_rows:
        return []
    over_stages = num_layers < spec.num_layers
    sizes = prompt_sizes(
        spec, tp_size=tp_size, max_tokens=max_tokens, slice_tokens=slice_tokens, dtype_bytes=dtype_bytes,
        kv_dtype_bytes=kv_dtype_bytes, over_stages=over_stages,
    )  # fmt: skip
    recorded = [size for size in sizes if records is None or records(size)]
    return prompt_kinds(recorded, max_rows, over_stages=over_stages)


def even_ladder(max_rows: int, spec: ModelSpec, tp_size: int) -> list[int]:
    """Sizes of the ladder that may be recorded once more, for rows with contexts of about one length.

    Of a card with `EVEN_CARD` multiprocessors, where that pays (`step_ops.even_pays`); others need no more.
    """
    heads = kv_heads_per_rank(spec, tp_size)
    bounds = [(least * EVEN_CARD, most * EVEN_CARD) for least, most in EVEN_PROGRAMS]
    return [size for size in ladder(max_rows) if any(least <= size * heads <= most for least, most in bounds)]


def graph_bytes(num_sizes: int, num_layers: int, pool_bytes: int) -> int:
    """Recorded graphs of so many batch sizes, which share one pool as large as the largest step's activations."""
    return pool_bytes + GRAPHS_A_SIZE * num_sizes * KERNELS_A_LAYER * (num_layers + 1) * GRAPH_BYTES_A_KERNEL


def decode_bytes(spec: ModelSpec, num_rows: int, *, tp_size: int, is_last: bool, dtype_bytes: int) -> int:
    """What a recorded step of so many rows holds at most: all states of a layer at once, and logits without a draw."""
    numbers = _state_numbers(spec, tp_size) + (spec.vocab_size if is_last else 0)
    return num_rows * numbers * dtype_bytes + GRAPH_SCRATCH_BYTES


def prompt_graph_bytes(
    spec: ModelSpec, kinds: Sequence[tuple[int, int]], num_layers: int, *, tp_size: int, dtype_bytes: int
) -> int:
    """Recorded steps with prompts, beside decode steps that they share scratch with: states of the largest."""
    if not kinds:
        return 0
    states = max(tokens for tokens, _ in kinds) * _state_numbers(spec, tp_size) * dtype_bytes
    kernels = sum(KERNELS_A_PROMPT_LAYER if tokens < LONG_UNIT else KERNELS_A_LONG_LAYER for tokens, _ in kinds)
    return states + kernels * (num_layers + 1) * GRAPH_BYTES_A_KERNEL


def _state_numbers(spec: ModelSpec, tp_size: int) -> int:
    heads = (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_size // tp_size
    return 6 * spec.hidden_size + heads + 3 * spec.intermediate_size // tp_size


def attention_bytes(spec: ModelSpec, num_tokens: int, *, tp_size: int, dtype_bytes: int) -> int:
    """What a step of so many tokens holds while they attend: hidden states, q, k and v, rotated q, what heads saw."""
    heads = (3 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_size // tp_size
    return num_tokens * (2 * spec.hidden_size + heads) * dtype_bytes


def group_bytes(num_tokens: int, width: int, num_rows: int, *, tp_size: int, dtype_bytes: int) -> int:
    """What a rank opens for the cards of its group, and what sums by copies need: `workers/layers/group_sum.py`.

    For steps of so many tokens of `width` numbers, of which so many rows draw a token.
    """
    if tp_size == 1:
        return 0
    row = width * dtype_bytes
    parts = SUM_PARTS * -(-num_tokens * row // 256) * 256
    choices = tp_size * num_rows * 8
    pushes = tp_size * width <= PUSH_ROW_NUMBERS and dtype_bytes == 2
    pushed = 3 * (tp_size + 1) * PUSHED_ROWS * width * 4 if pushes else 0
    staged = (tp_size - 1) * -(-(num_tokens // 2 + 128) // tp_size) * row
    return _rounded(SUM_FLAGS + parts + choices + pushed) + SMALL_SUM_BYTES + staged


def wire_bytes(num_tokens: int, width: int, num_rows: int, *, pp_size: int, dtype_bytes: int) -> int:
    """What a rank opens for the stages beside it: `placement/card_wires.py`."""
    if pp_size == 1:
        return 0
    return _rounded(WIRE_SLOTS * num_tokens * width * dtype_bytes + (pp_size + 1) * num_rows * 8)


def _rounded(num_bytes: int) -> int:
    return -(-num_bytes // SHARED_UNIT) * SHARED_UNIT
