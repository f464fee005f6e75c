"""Which steps are recorded, by rules that ranks and planner share."""

import msgspec
import pytest

from argosy.cluster.micro_batches import SMALL_PIECE, SMALL_PIECE_ROWS, STEP_UNIT
from argosy.cluster.protocol.model_spec import ModelSpec
from argosy.placement.model_sources import read_model_shape
from argosy.placement.planner import make_serving
from argosy.placement.step_memory import (
    GRAPH_BYTES_A_KERNEL,
    KERNELS_A_LAYER,
    KERNELS_A_LONG_LAYER,
    KERNELS_A_PROMPT_LAYER,
    LONG_ROWS,
    LONG_UNIT,
    PROMPT_DECODES,
    PROMPT_ROWS,
    PROMPT_SIZES,
    STAGE_PIECES,
    attention_bytes,
    decode_bytes,
    graph_bytes,
    ladder,
    prompt_graph_bytes,
    prompt_kinds,
    prompt_places,
    prompt_sizes,
)

SMALL, MIDDLE, LARGE = (read_model_shape(name).spec for name in ("qwen3-0.6b", "llama-3.1-8b", "llama-3.1-70b"))


def sizes_of(spec: ModelSpec, tp_size: int = 1, max_tokens: int = 8192, slice_tokens: int | None = None) -> list[int]:
    return prompt_sizes(spec, tp_size=tp_size, max_tokens=max_tokens, slice_tokens=slice_tokens)


def test_larger_models_record_fewer_tokens() -> None:
    """Up to where the card has as much to do as the host has to launch; a rank of several has less of each layer."""
    assert sizes_of(SMALL) == [*PROMPT_SIZES, 1024, 2048, 3072, 8192]
    assert sizes_of(MIDDLE) == [32, 64, 128, 192, 256]
    assert sizes_of(LARGE) == [32, 64]
    assert sizes_of(MIDDLE, tp_size=2) == [*PROMPT_SIZES, 1024, 2048]
    assert sizes_of(LARGE, tp_size=4)[:5] == [32, 64, 128, 192, 256]


def test_a_group_records_long_steps_that_its_hosts_would_be_late_with() -> None:
    """Over four cards a full step of 8B keeps them for 55 ms, and a host takes 65 to 95 to queue it in halves; two
    cards are busy for longer than their hosts, as one is, and as four are with 70B."""
    assert sizes_of(MIDDLE, tp_size=4) == [*PROMPT_SIZES, *range(1024, 7169, 1024), 8192]
    assert max(sizes_of(MIDDLE, tp_size=4, max_tokens=16384)) < 8192
    assert max(sizes_of(MIDDLE, tp_size=4, max_tokens=2047)) == 1024
    assert max(sizes_of(MIDDLE, tp_size=2)) < 4096
    assert max(sizes_of(LARGE, tp_size=4)) < 4096
    assert max(sizes_of(MIDDLE, tp_size=4, slice_tokens=3000)) == 2048
    assert prompt_sizes(MIDDLE, tp_size=4, max_tokens=8192, kv_dtype_bytes=1) == list(PROMPT_SIZES)


def test_no_step_is_padded_beyond_what_may_be_there() -> None:
    """One size above the longest step where that costs nobody anything, none where buffers of a group end there, or
    where longer steps go in slices."""
    assert sizes_of(SMALL, max_tokens=100) == [32, 64, 128]
    assert sizes_of(SMALL, tp_size=2, max_tokens=100) == [32, 64]
    assert sizes_of(SMALL, slice_tokens=200) == [32, 64, 128, 192]


@pytest.mark.parametrize("max_rows", [1, 8, 16, 20, 256, 1024])
def test_there_are_always_more_tokens_than_places_for_rows(max_rows: int) -> None:
    """What a model gives tells by its number of rows whether it left out who does not sample."""
    kinds = prompt_kinds([*PROMPT_SIZES, 1024, 8192], max_rows)
    assert {size for size, _ in kinds} == {*PROMPT_SIZES, 1024, 8192}
    assert all(decodes + prompt_places(size) < size and decodes <= max_rows for size, decodes in kinds)
    assert len(kinds) == len(set(kinds))
    if max_rows == 256:
        assert [kind for kind in kinds if kind[0] in (64, 128)] == [(64, 8), (128, 8), (128, 64)]
    assert [decodes for size, decodes in kinds if size >= 1024] == [min(max_rows, 512), max_rows]


def test_a_token_of_experts_is_as_much_work_as_those_that_it_goes_through() -> None:
    """Top 4 of many, and one that all go through: as many short steps as a dense model of that width, whatever the
    width, and no long ones, whose products take as many tokens as each expert gets."""
    moe = read_model_shape("qwen3-30b-a3b").spec.moe
    assert moe is not None
    longest = set()
    for width in (1024, 4096, 8192, 14336, 28672):
        experts = msgspec.structs.replace(moe, top_k=4, intermediate_size=width // 8, shared_size=width // 2)
        sizes = sizes_of(msgspec.structs.replace(LARGE, intermediate_size=10**6, moe=experts))
        assert sizes == sizes_of(msgspec.structs.replace(LARGE, intermediate_size=width))
        longest.add(sizes[-1])
    assert len(longest) > 3
    one = msgspec.structs.replace(moe, top_k=1, intermediate_size=SMALL.intermediate_size)
    assert max(sizes_of(msgspec.structs.replace(SMALL, moe=one))) < LONG_UNIT < max(sizes_of(SMALL))


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("spec", [SMALL, MIDDLE], ids=["0.6b", "8b"])
def test_each_size_is_recorded_once(spec: ModelSpec, tp_size: int) -> None:
    """Also where the longest step is a size of the ladder anyway."""
    for most in (1, 32, 100, 512, 600, 1024, 2048, 3000, 4096, 8192, 20_000):
        sizes = sizes_of(spec, tp_size, most)
        assert sizes == sorted(set(sizes))
        assert tp_size == 1 or sizes[-1:] <= [most], "the group's buffers end there"
    for rows in (1, 2, 3, 8, 100, 128, 256, 300, 1024, 2000):
        sizes = ladder(rows)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == rows


def test_steps_from_a_thousand_tokens_on_are_long_ones() -> None:
    """They have room for more prompts, and many more kernels."""
    assert (prompt_places(LONG_UNIT - 1), prompt_places(LONG_UNIT)) == (PROMPT_ROWS, LONG_ROWS)
    kernels = {}
    for tokens in (512, 1024):
        all_bytes = prompt_graph_bytes(MIDDLE, [(tokens, 8)], 32, tp_size=1, dtype_bytes=2)
        twice = prompt_graph_bytes(MIDDLE, [(tokens, 8), (tokens, 64)], 32, tp_size=1, dtype_bytes=2)
        kernels[tokens] = (twice - all_bytes) / GRAPH_BYTES_A_KERNEL / 33
    assert kernels == {512: KERNELS_A_PROMPT_LAYER, 1024: KERNELS_A_LONG_LAYER}


def test_latent_attention_records_none_and_needs_no_memory_for_it() -> None:
    """It asks the device for lengths."""
    spec = read_model_shape("deepseek-v3").spec
    assert sizes_of(spec) == []
    assert prompt_graph_bytes(spec, [], 61, tp_size=8, dtype_bytes=2) == 0
    kinds = prompt_kinds(sizes_of(MIDDLE), 256)
    assert 2**25 < prompt_graph_bytes(MIDDLE, kinds, 32, tp_size=1, dtype_bytes=2) < 2**27


def test_a_size_is_two_graphs_over_one_pool() -> None:
    """A step and its draw are recorded apart; all of them compute in the same memory."""
    a_graph = KERNELS_A_LAYER * (32 + 1) * GRAPH_BYTES_A_KERNEL
    assert graph_bytes(5, 32, 10**6) == 10**6 + 5 * 2 * a_graph
    assert graph_bytes(0, 32, 10**6) == 10**6


@pytest.mark.parametrize("tp_size", [1, 2])
def test_what_a_step_holds_while_it_attends_is_the_tensors_that_are_there(tp_size: int) -> None:
    """Two hidden states (one to be added later), q, k and v in one product, q rotated, what heads saw."""
    torch = pytest.importorskip("torch")
    tokens, heads, kv_heads = 100, MIDDLE.num_heads // tp_size, MIDDLE.num_kv_heads // tp_size
    hidden = [torch.empty(tokens, MIDDLE.hidden_size, dtype=torch.bfloat16, device="meta") for _ in range(2)]
    of_heads = [
        torch.empty(tokens, count, MIDDLE.head_size, dtype=torch.bfloat16, device="meta")
        for count in (heads + 2 * kv_heads, heads, heads)
    ]
    held = sum(tensor.nbytes for tensor in (*hidden, *of_heads))
    assert attention_bytes(MIDDLE, tokens, tp_size=tp_size, dtype_bytes=2) == held


def test_only_the_last_stage_makes_logits() -> None:
    """A number for each token of the vocabulary and row, with one rank as with several: they are gathered."""
    for tp_size in (1, 4):
        of = {last: decode_bytes(MIDDLE, 64, tp_size=tp_size, is_last=last, dtype_bytes=2) for last in (False, True)}
        assert of[True] - of[False] == 64 * MIDDLE.vocab_size * 2


@pytest.mark.parametrize("max_rows", [64, 200, 257, 1000])
def test_over_stages_a_piece_beside_any_share_of_all_rows_is_recorded(max_rows: int) -> None:
    """The scheduler can't ask the ranks' rooms, so its numbers suit theirs: at most 63 tokens of padding, and as many
    places for rows that aren't there."""
    sizes = prompt_sizes(SMALL, tp_size=1, max_tokens=8192, over_stages=True)
    kinds = sorted(prompt_kinds(sizes, max_rows, over_stages=True))
    for rows in range(SMALL_PIECE_ROWS, -(-max_rows // 2) + 1):
        size, places = next(kind for kind in kinds if kind[0] >= rows + SMALL_PIECE and kind[1] >= rows)
        assert size - rows - SMALL_PIECE < 64
        assert places - rows < 64
    assert max(places for size, places in kinds if size < 1024) <= max(PROMPT_DECODES[-1], -(-max_rows // 2))
    assert all(places + prompt_places(size) < size for size, places in kinds)
    short = [(size, places) for size, places in kinds if PROMPT_DECODES[-1] < places and size < LONG_UNIT]
    pieces = [size - places for size, places in short if places < max(short, key=lambda kind: kind[1])[1]]
    assert STAGE_PIECES[0] <= min(pieces, default=64) <= max(pieces, default=64) <= STAGE_PIECES[1]


@pytest.mark.parametrize("max_rows", [64, 129, 200, 256, 257, 512, 1000])
def test_over_stages_every_short_step_of_a_full_server_is_recorded(max_rows: int) -> None:
    """Chats have a prompt's token to each that they answer, and half as many again for a while: 120 rows of 256 places
    with 212 to 262 tokens of prompts were not, and the stages waited for their hosts a quarter of the time."""
    sizes = prompt_sizes(MIDDLE, tp_size=1, max_tokens=8192, over_stages=True)
    kinds = prompt_kinds(sizes, max_rows, over_stages=True)
    share = -(-max_rows // 2)
    for rows in (share * 7 // 8, share):
        for tokens in range(rows + SMALL_PIECE, sizes[-1] + 1):
            padded = min(size for size, places in kinds if size >= tokens and places >= rows)
            assert padded - tokens < STEP_UNIT, (rows, tokens)
    few = [kind for kind in prompt_kinds(sizes, 128, over_stages=True) if kind[1] <= PROMPT_DECODES[-1]]
    assert len(kinds) - len(few) <= 9 + 3 * (share // 64), "each is 40 ms of a start"


def test_plans_know_which_steps_ranks_record() -> None:
    """A rank that has not all layers is one of several stages; as many rows as there may be, or as are recorded."""
    shape = read_model_shape("qwen3-0.6b")
    for graph_rows, rows in ((None, 200), (48, 48)):
        serving = msgspec.structs.replace(make_serving(shape), max_num_seqs=200, graph_rows=graph_rows)
        for num_layers, over_stages in ((28, False), (14, True)):
            sizes = prompt_sizes(
                SMALL, tp_size=1, max_tokens=serving.max_num_batched_tokens, over_stages=over_stages,
                dtype_bytes=serving.dtype_bytes, kv_dtype_bytes=serving.kv_dtype_bytes,
            )  # fmt: skip
            assert serving.prompt_kinds(SMALL, 1, num_layers) == prompt_kinds(sizes, rows, over_stages=over_stages)
    assert msgspec.structs.replace(serving, graph_rows=0).prompt_kinds(SMALL, 1, 28) == []


def test_one_stage_records_no_steps_for_pieces() -> None:
    """Its steps hold whole prompts, and hide what the host has to launch."""
    assert prompt_kinds(sizes_of(MIDDLE), 1024) == [(32, 8), (64, 8), (128, 8), (128, 64), (192, 8), (192, 64),
                                                    (256, 8), (256, 64)]  # fmt: skip


@pytest.mark.parametrize(("spec", "tp_size", "longest"), [(MIDDLE, 1, 704), (LARGE, 1, 320), (LARGE, 2, 640)])
def test_over_stages_a_slow_host_must_keep_up(spec: ModelSpec, tp_size: int, longest: int) -> None:
    """Up to where a layer's products take the card a millisecond; a rank of several has a part of each."""
    sizes = prompt_sizes(spec, tp_size=tp_size, max_tokens=8192, over_stages=True)
    assert max(size for size in sizes if size < 1024) == longest
    assert [size for size in sizes if size >= 1024] == [size for size in sizes_of(spec, tp_size) if size >= 1024]
