"""Both attention kernels against the reference: every option, ugly heads, padding rows, splits, strided queries."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from argosy.kernels import ops, paged_attention, prefill_attention, reference, shared_prefix, tuning

Near = Callable[[Tensor, Tensor], None]
ON_CPU = not torch.cuda.is_available()
OPTIONS = ["none", "window", "soft_cap", "alibi", "sinks"]
HEADS = [
    (6, 2, 64, torch.float32),
    (7, 1, 80, torch.float32),
    *(
        pytest.param(*heads, torch.bfloat16, marks=pytest.mark.gpu)
        for heads in ((32, 8, 128), (7, 1, 80), (8, 8, 96), (16, 2, 256), (40, 1, 64), (12, 12, 64), (8, 2, 512))
    ),
    *(
        pytest.param(*heads, torch.float32, marks=pytest.mark.skipif(not ON_CPU, reason="on a card in 16 bits"))
        for heads in ((3, 3, 96), (5, 1, 128), (2, 1, 256))
    ),
]


def chosen(option: str, num_heads: int, device: torch.device) -> dict[str, object]:
    return {
        "none": {},
        "window": {"sliding_window": 21},
        "soft_cap": {"soft_cap": 1.5},
        "alibi": {"alibi_slopes_N": torch.rand(num_heads, device=device)},
        "sinks": {"sinks_N": torch.randn(num_heads, device=device)},
    }[option]


def paged(
    contexts: list[int], block_size: int, num_kv_heads: int, head_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two caches full of noise, a table of shuffled blocks without sharing, and the lengths."""
    per_row = max(1, -(-max(contexts) // block_size))
    num_blocks = per_row * len(contexts) + 3
    caches = [torch.randn(num_blocks, block_size, num_kv_heads, head_size, device=device).to(dtype) for _ in range(2)]
    table = torch.randperm(num_blocks, device=device)[: per_row * len(contexts)].view(len(contexts), per_row).int()
    return *caches, table, torch.tensor(contexts, dtype=torch.int32, device=device)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_size", "dtype"), HEADS)
def test_decode(
    num_heads: int, num_kv_heads: int, head_size: int, option: str, dtype: torch.dtype, device: torch.device,
    assert_near: Near,
) -> None:  # fmt: skip
    contexts = [33, 0, 70, 1] if device.type == "cpu" else [333, 0, 4097, 1, 64, 65, 1000]
    k_cache, v_cache, table, context = paged(contexts, 16, num_kv_heads, head_size, dtype, device)
    fused = torch.randn(len(contexts), (num_heads + 2) * head_size, device=device).to(dtype)
    q = fused[:, : num_heads * head_size].view(len(contexts), num_heads, head_size)
    options = chosen(option, num_heads, device)
    want = reference.paged_attention(q, k_cache, v_cache, table, context, scale=0.2, **options)
    got = paged_attention.paged_attention(q, k_cache, v_cache, table, context, scale=0.2, **options)
    assert_near(got, want)
    assert not got[1].any()
    assert not tuning.counters(device).any(), "counters must be zero again for the next launch"


@pytest.mark.parametrize(
    ("rotation", "option"),
    [("none", "none"), ("partial", "norms"), ("interleaved", "norms"), *(("half", x) for x in (*OPTIONS, "norms"))],
)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_size", "dtype"), [HEADS[0], HEADS[-3], *HEADS[2:4]])
@pytest.mark.parametrize("late", [False, True])
def test_decode_with_rotation_and_store_inside(
    late: bool, num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype, option: str, rotation: str,
    device: torch.device, assert_near: Near,
) -> None:  # fmt: skip
    """A long row, padding, a row with only its new token, one that opens a block; with the cache's first tiles asked
    for before what the queries come from is done, too."""
    contexts = [35, 0, 1, 17] if device.type == "cpu" else [2035, 0, 1, 17, 300]
    k_cache, v_cache, table, context = paged(contexts, 16, num_kv_heads, head_size, dtype, device)
    positions = (context.long() - 1).clamp(min=0)
    slots = torch.where(context > 0, table.gather(1, positions[:, None] // 16)[:, 0] * 16 + positions % 16, -1)
    rotary_size = {"none": 0, "half": head_size, "partial": head_size // 2, "interleaved": head_size}[rotation]
    angles = torch.randn(max(contexts), rotary_size // 2, device=device)
    rotations = torch.cat((angles.cos(), angles.sin()), -1) if rotary_size else None
    qkv = torch.randn(len(contexts), (num_heads + 2 * num_kv_heads) * head_size, device=device).to(dtype)
    options = {"num_heads": num_heads, "scale": 0.2, "interleaved": rotation == "interleaved"}
    if option == "norms":
        weights = torch.randn(2, head_size, device=device).to(dtype)
        options |= {"q_norm_weight_H": weights[0], "k_norm_weight_H": weights[1]}
    else:
        options |= chosen(option, num_heads, device)
    want_caches = k_cache.clone(), v_cache.clone()
    want = reference.decode_attention(
        qkv.clone(), positions, rotations, *want_caches, slots, table, context, **options
    )  # fmt: skip
    sizes = {"block_l": 64, "min_piece": 128, "per_sm": 4, "stages": 4, "warps": 4, "late": 1} if late else None
    got = paged_attention.decode_attention(
        qkv, positions, rotations, k_cache, v_cache, slots, table, context, inputs_early=late or option == "none",
        sizes=sizes, **options,
    )  # fmt: skip
    assert_near(got, want)
    assert_near(k_cache, want_caches[0])
    assert torch.equal(v_cache, want_caches[1])
    assert not tuning.counters(device).any()


@pytest.mark.parametrize("stored_inside", [False, True])
def test_whichever_row_comes_first_the_result_is_the_same(stored_inside: bool, device: torch.device) -> None:
    """Bit for bit, with padding and with contexts that are cut into pieces."""
    contexts = [35, 0, 1, 50, 17] if device.type == "cpu" else [35, 0, 1, 2050, *range(17, 1700, 9), 4000]
    k_cache, v_cache, table, context = paged(contexts, 16, 2, 64, torch.float16, device)
    qkv = torch.randn(len(contexts), (8 + 2 * 2) * 64, device=device).half()
    positions = (context.long() - 1).clamp(min=0)
    slots = torch.where(context > 0, table.gather(1, positions[:, None] // 16)[:, 0] * 16 + positions % 16, -1)
    found = []
    for order_R in (None, torch.argsort(-context).int(), torch.randperm(len(contexts), device=device).int()):
        if stored_inside:
            caches = k_cache.clone(), v_cache.clone()
            out = paged_attention.decode_attention(
                qkv, positions, None, *caches, slots, table, context, num_heads=8, scale=0.1, order_R=order_R
            )  # fmt: skip
            found.append((out, *caches))
        else:
            q = qkv[:, : 8 * 64].view(-1, 8, 64)
            found.append((
                paged_attention.paged_attention(q, k_cache, v_cache, table, context, scale=0.1, order_R=order_R),
            ))  # fmt: skip
    for other in found[1:]:
        for first, second in zip(found[0], other, strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("max_context", [32, 60, None])
def test_the_host_bound_sizes_the_launch_and_not_the_result(
    max_context: int | None, device: torch.device, assert_near: Near
) -> None:
    """A graph is captured with a bound; lengths below it are on the device alone. Blocks of 48 tokens."""
    k_cache, v_cache, table, context = paged([32, 5], 48, 2, 64, torch.float32, device)
    q = torch.randn(2, 4, 64, device=device)
    want = reference.paged_attention(q, k_cache, v_cache, table, context, scale=0.2)
    got = paged_attention.paged_attention(q, k_cache, v_cache, table, context, scale=0.2, max_context=max_context)
    assert_near(got, want)


@pytest.mark.parametrize("likely_rows", [1, 2, 8])
def test_places_that_are_mostly_empty_change_no_row(likely_rows: int, device: torch.device, assert_near: Near) -> None:
    """Pieces for as few rows as there are; all may be there all the same, and are right."""
    for contexts in ([100, 0, 0, 61, 0, 0, 0, 0], [70, 1, 90, 16, 17, 33, 48, 100]):
        k_cache, v_cache, table, context = paged(contexts, 16, 2, 64, torch.float32, device)
        q = torch.randn(8, 6, 64, device=device)
        want = reference.paged_attention(q, k_cache, v_cache, table, context, scale=0.2)
        for _ in range(2):  # counters are zero again
            got = paged_attention.paged_attention(
                q, k_cache, v_cache, table, context, scale=0.2, likely_rows=likely_rows
            )
            assert_near(got, want)


def test_splits_follow_the_card_and_never_outnumber_the_tiles() -> None:
    assert paged_attention.choose_splits(8, 100_000, 64, 132, 4) == 64
    assert paged_attention.choose_splits(8, 200, 64, 132, 4) == 4
    assert paged_attention.choose_splits(512, 100_000, 64, 132, 4) == 1
    assert paged_attention.choose_splits(4096, 1, 64, 132, 4) == 1


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_size", "dtype"), HEADS)
def test_prefill(
    num_heads: int, num_kv_heads: int, head_size: int, option: str, dtype: torch.dtype, device: torch.device,
    assert_near: Near,
) -> None:  # fmt: skip
    """New prompts, chunks after a prefix, single tokens and an empty row in one step. Blocks below and above a tile."""
    block_size = 16 if num_kv_heads > 1 else 64
    queries, contexts = [3, 0, 19, 1, 9], [5, 0, 19, 37, 30]
    if device.type == "cuda":
        queries, contexts = [*queries, 500, 129, 1], [*contexts, 500, 1500, 2000]
    k_cache, v_cache, table, context = paged(contexts, block_size, num_kv_heads, head_size, dtype, device)
    query_start = torch.tensor([0, *queries], device=device).cumsum(0).int()
    fused = torch.randn(sum(queries), (num_heads + 2) * head_size, device=device).to(dtype)
    q = fused[:, : num_heads * head_size].view(-1, num_heads, head_size)
    sizes = {"block_m": 16, "block_l": 16, "warps": 4, "stages": 1} if device.type == "cpu" else None
    options = chosen(option, num_heads, device)
    exact = [x.float() for x in (q, k_cache, v_cache)]  # in 16 bits torch rounds the logits, too
    want = reference.prefill_attention(*exact, query_start, context, table, scale=0.2, **options)
    got = prefill_attention.prefill_attention(
        q, k_cache, v_cache, query_start, context, table, scale=0.2, sizes=sizes, **options
    )
    assert_near(got, want)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_size", "dtype"), HEADS)
def test_prompts_between_tokens_that_are_none_of_theirs(
    num_heads: int, num_kv_heads: int, head_size: int, option: str, dtype: torch.dtype, device: torch.device,
    assert_near: Near,
) -> None:  # fmt: skip
    """Behind decode rows, and before places for rows and tokens that are not there: none of these is written."""
    queries, contexts, before = [19, 1, 9, 0, 0, 0], [19, 37, 30, 0, 0, 0], 21
    if device.type == "cuda":
        queries, contexts = [64, 129, 1, *queries], [4000, 1500, 2000, *contexts]
    k_cache, v_cache, table, context = paged(contexts, 16, num_kv_heads, head_size, dtype, device)
    query_start = torch.tensor([before, *queries], device=device).cumsum(0).int()
    last = int(query_start[-1])
    q = torch.randn(last + 40, num_heads, head_size, device=device).to(dtype)
    options = chosen(option, num_heads, device)
    exact = [x.float() for x in (q, k_cache, v_cache)]  # in 16 bits torch rounds the logits, too
    want = reference.prefill_attention(*exact, query_start, context, table, scale=0.2, **options)
    out = torch.full_like(q, 7.0)
    got = prefill_attention.prefill_attention(
        q, k_cache, v_cache, query_start, context, table, scale=0.2, out_TNH=out, num_queries=last + 40, **options
    )
    assert_near(got[before:last], want[before:last])
    assert bool((got[:before] == 7.0).all())
    assert bool((got[last:] == 7.0).all())


@pytest.mark.parametrize("option", ["none", "soft_cap", "sinks"])
@pytest.mark.parametrize("shared", [0, 16, 48])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_size", "dtype"), [*HEADS[:4], HEADS[5]])
def test_decode_of_rows_that_share_a_prefix(
    num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype, shared: int, option: str,
    device: torch.device, assert_near: Near, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A row without it, one with a token of its own, a long one, padding last; the lengths stand on the device."""
    contexts = [shared + 3, shared + 1, shared + 37, shared + 5, 0]
    if device.type == "cpu":
        monkeypatch.setattr(shared_prefix, "MIN_PIECE", 16)  # several pieces of so short a prefix
    else:
        shared *= 40
        contexts = [shared + 3, shared + 1, shared + 300, *range(shared + 2, shared + 200), 0]
    k_cache, v_cache, table, context = paged(contexts, 16, num_kv_heads, head_size, dtype, device)
    table[1:, : shared // 16] = table[1:2, : shared // 16].clone()
    q = torch.randn(len(contexts), num_heads, head_size, device=device).to(dtype)
    options = chosen(option, num_heads, device)
    want = reference.paged_attention(q, k_cache, v_cache, table, context, scale=0.2, **options)
    length = torch.tensor([0, *[shared] * (len(contexts) - 2), 0], dtype=torch.int32, device=device)
    got = paged_attention.paged_attention(
        q, k_cache, v_cache, table, context, scale=0.2, shared_len_R=length, **options
    )  # fmt: skip
    assert_near(got, want)
    assert not got[-1].any()


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.gpu) for seed in range(4, 40))])
def test_both_on_shapes_that_nobody_chose(seed: int, device: torch.device, assert_near: Near) -> None:
    """Any heads, head size, block size and lengths, and any of the options together."""
    rng = random.Random(seed)
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    num_kv_heads, group = rng.choice([1, 2, 3, 8]), rng.choice([1, 2, 3, 4, 7, 16])
    num_heads, head_size = num_kv_heads * group, rng.choice([64, 80, 96, 128, 256])
    block_size, most = rng.choice([16, 32, 48, 128]), 3000 if on_gpu else 60
    names = rng.sample(OPTIONS[1:], rng.randrange(4))
    options = {key: value for name in names for key, value in chosen(name, num_heads, device).items()}
    contexts = [rng.randrange(1, most) for _ in range(rng.randrange(1, 40 if on_gpu else 4))]
    queries = [rng.randrange(min(300 if on_gpu else 9, context) + 1) for context in contexts]
    k_cache, v_cache, table, context = paged(contexts, block_size, num_kv_heads, head_size, dtype, device)
    q = torch.randn(len(contexts), num_heads, head_size, device=device).to(dtype)
    want = reference.paged_attention(q, k_cache, v_cache, table, context, scale=0.1, **options)
    assert_near(paged_attention.paged_attention(q, k_cache, v_cache, table, context, scale=0.1, **options), want)
    starts = torch.tensor([0, *queries], device=device).cumsum(0).int()
    q = torch.randn(sum(queries) + 1, num_heads, head_size, device=device).to(dtype)[: sum(queries)]
    sizes = None if on_gpu else {"block_m": 16, "block_l": 16, "warps": 4, "stages": 1, "one_loop": seed % 2}
    want = reference.prefill_attention(q, k_cache, v_cache, starts, context, table, scale=0.1, **options)
    got = prefill_attention.prefill_attention(
        q, k_cache, v_cache, starts, context, table, scale=0.1, sizes=sizes, **options
    )  # fmt: skip
    assert_near(got, want)


@pytest.mark.parametrize("block_size", [4, 8, 16, 64])
def test_a_window_reads_no_block_before_it(block_size: int, device: torch.device, assert_near: Near) -> None:
    """These were given back, and whoever has them now may have written nan; tiles are wider than blocks."""
    num_heads, num_kv_heads, head_size, dtype = HEADS[0]
    num_queries, window, contexts = 9, 21, [150, 40, 9]
    k_cache, v_cache, table, context = paged(contexts, block_size, num_kv_heads, head_size, dtype, device)
    q = torch.randn(num_queries * len(contexts), num_heads, head_size, device=device).to(dtype)
    starts = torch.arange(0, num_queries * len(contexts) + 1, num_queries, dtype=torch.int32, device=device)
    options = {"scale": 0.2, "sliding_window": window}
    want = reference.prefill_attention(q, k_cache, v_cache, starts, context, table, **options)
    want_one = reference.paged_attention(q[: len(contexts)], k_cache, v_cache, table, context, **options)
    stale, ones = table.clone(), table.clone()
    spare = next(block for block in range(len(k_cache)) if block not in table)
    k_cache[spare], v_cache[spare] = float("nan"), float("nan")
    for row, length in enumerate(contexts):
        stale[row, : max(0, length - num_queries - window + 1) // block_size] = spare
        ones[row, : max(0, length - window) // block_size] = spare
    assert (stale == spare).any()
    assert_near(prefill_attention.prefill_attention(q, k_cache, v_cache, starts, context, stale, **options), want)
    got = paged_attention.paged_attention(q[: len(contexts)], k_cache, v_cache, ones, context, **options)
    assert_near(got, want_one)


@pytest.mark.gpu
@pytest.mark.parametrize("option", ["none", "norms"])
def test_what_is_said_of_even_rows_changes_no_result(option: str, device: torch.device, assert_near: Near) -> None:
    """240 rows over 8 heads, though their contexts are anything but even."""
    contexts = [0, 1, *(17 + 7 * row for row in range(238))]
    k_cache, v_cache, table, context = paged(contexts, 16, 8, 128, torch.bfloat16, device)
    qkv = torch.randn(len(contexts), (32 + 2 * 8) * 128, device=device).bfloat16()
    positions = (context.long() - 1).clamp(min=0)
    slots = torch.where(context > 0, table.gather(1, positions[:, None] // 16)[:, 0] * 16 + positions % 16, -1)
    angles = torch.randn(max(contexts), 64, device=device)
    rotations = torch.cat((angles.cos(), angles.sin()), -1)
    weights = torch.randn(2, 128, device=device).bfloat16()
    norms = {"q_norm_weight_H": weights[0], "k_norm_weight_H": weights[1]} if option == "norms" else {}
    args = (positions, rotations, k_cache, v_cache, slots, table, context)
    want = reference.decode_attention(qkv.clone(), *args, num_heads=32, scale=0.1, **norms)
    for even in (True, False):
        got = ops.decode_attention(
            qkv.clone(), *args, num_heads=32, scale=0.1, even=even, inputs_early=True,
            order_R=torch.argsort(-context).int(), **norms,
        )  # fmt: skip
        assert_near(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("contexts", [[257], [3000, 0, 31, 1]])
def test_what_is_said_of_packed_weights_changes_no_result(
    contexts: list[int], device: torch.device, assert_near: Near
) -> None:
    k_cache, v_cache, table, context = paged(contexts, 16, 8, 128, torch.bfloat16, device)
    qkv = torch.randn(len(contexts), (32 + 2 * 8) * 128, device=device).bfloat16()
    positions = (context.long() - 1).clamp(min=0)
    slots = torch.where(context > 0, table.gather(1, positions[:, None] // 16)[:, 0] * 16 + positions % 16, -1)
    angles = torch.randn(max(contexts), 64, device=device)
    args = (positions, torch.cat((angles.cos(), angles.sin()), -1), k_cache, v_cache, slots, table, context)
    want = reference.decode_attention(qkv.clone(), *args, num_heads=32, scale=0.1)
    for lean in (True, False):
        got = ops.decode_attention(qkv.clone(), *args, num_heads=32, scale=0.1, lean=lean, inputs_early=True)
        assert_near(got, want)


def test_few_rows_beside_packed_weights_take_little_of_a_multiprocessor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows of 8 key/value heads on an H200, in 16 bits: 20 KB a program, where others take 140."""
    h200 = tuning.DeviceFacts("nvidia_h200", 132, True)
    monkeypatch.setattr(paged_attention.tuning, "device_facts", lambda _: h200)
    cache = torch.zeros((1, 16, 8, 128), dtype=torch.bfloat16)
    sizes = paged_attention.lean_sizes(4, cache)
    assert sizes is not None
    assert sizes["block_l"] * 128 * 2 * sizes["stages"] <= 32 * 1024
    assert paged_attention.lean_sizes(5, cache) != sizes
    assert paged_attention.lean_sizes(17, cache) is None
    assert paged_attention.lean_sizes(1, cache.to(torch.int8)) is None


@pytest.mark.parametrize(
    ("num_rows", "kinds"),
    [(3, ("few",)), (4, ("some", "few")), (16, ("some", "few")), (17, ("pair", "many")), (33, ("pair", "many")),
     (34, ("many",)), (131, ("many",)), (132, ("crowd",)),
     (181, ("crowd",)), (182, ("throng", "crowd")),
     (296, ("throng", "crowd")), (297, ("flood", "crowd")), (1024, ("flood", "crowd"))],
)  # fmt: skip
def test_tiles_go_by_how_many_waves_the_rows_are(num_rows: int, kinds: tuple[str, ...]) -> None:
    """Rows of 8 key/value heads on the 132 multiprocessors of an H200: each kind as `benchmarks/notes.md` has it."""
    assert paged_attention._kinds(8 * num_rows, 132) == kinds


def test_every_kind_of_rows_has_tiles_on_the_card_that_was_measured() -> None:
    """A kind that the file of the H200 does not know would go by those for fewer rows without a word."""
    known = json.loads((Path(tuning.__file__).parent / "tuned" / "nvidia_h200.json").read_text())["paged_attention"]
    kinds = ("few", "pair_g4", "many", "crowd", "throng", "flood", "even", "even_half")
    assert {f"h128_{kind}" for kind in kinds} <= known.keys()
