"""Prompts over keys and values that were unpacked first: the same numbers, whatever the rows, windows and heads."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from argosy.kernels import kv_scales, kv_unpack, prefill_attention, reference, tuning
from argosy.placement.calibration import default_calibration

Near = Callable[[Tensor, Tensor], None]
QUERIES, CONTEXTS = [3, 9, 1, 20], [5, 9, 50, 60]
OPTIONS: list[dict[str, Any]] = [{}, {"sliding_window": 21}, {"soft_cap": 3.0, "alibi": True}, {"sinks": True}]


def make_caches(kind: torch.dtype, block_size: int, heads: int, size: int, device: torch.device) -> list[Tensor]:
    """Two caches of heads of very different sizes, and a table of shuffled blocks; unused slots hold nan."""
    per_row = -(-max(CONTEXTS) // block_size)
    num_blocks = per_row * len(CONTEXTS)
    table = torch.randperm(num_blocks, device=device).view(len(CONTEXTS), per_row).int()
    caches = []
    for _ in range(2):
        raw = torch.zeros(num_blocks, kv_scales.block_bytes(block_size, heads, size), dtype=torch.uint8, device=device)
        cache = kv_scales.as_scaled_cache(raw, block_size, heads, size, kind)
        x = torch.randn(num_blocks * block_size, heads, size, device=device)
        x *= torch.exp(2 * torch.randn(len(x), heads, 1, device=device))
        kv_scales.store(x, cache, torch.arange(len(x), device=device))
        for row, length in enumerate(CONTEXTS):
            if length % block_size:
                codes = kv_scales.scales_of(cache)[int(table[row, length // block_size])]
                codes[:, length % block_size :] = kv_scales.NAN_CODE
        caches.append(cache)
    return [*caches, table]


def without_nan(cache: Tensor) -> Tensor:
    """In float32, for a reference that multiplies what it then masks."""
    return kv_scales.gather(cache, torch.arange(len(cache), device=cache.device)).nan_to_num_()


@pytest.mark.parametrize("block_size", [16, 12])
@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_unpacked_numbers_are_those_of_the_cache(kind: torch.dtype, block_size: int, device: torch.device) -> None:
    """Bit for bit what is kept times its scale, rounded once; a row's blocks beside each other."""
    k_cache, v_cache, table = make_caches(kind, block_size, 3, 80, device)
    lengths = torch.tensor(CONTEXTS, dtype=torch.int32, device=device)
    room = kv_unpack.make_room(lengths, table, block_size, sum(CONTEXTS))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    lowest = torch.tensor([0, 0, 35, 0], dtype=torch.int32, device=device)
    caches = kv_unpack.unpack(k_cache, v_cache, table, lengths, lowest, room, dtype)
    assert all(made.shape == (room.num_blocks, block_size, 3, 80) for made in caches)
    for made, cache in zip(caches, (k_cache, v_cache), strict=True):
        for row, length in enumerate(CONTEXTS):
            blocks = -(-length // block_size)
            want = kv_scales.gather(cache, table[row, :blocks].long()).to(dtype).flatten(0, 1)
            got = made[room.table_RB[row, :blocks].long()].flatten(0, 1)
            assert torch.equal(got[int(lowest[row]) : length], want[int(lowest[row]) : length])
    used = [set(room.table_RB[row, : -(-n // block_size)].tolist()) for row, n in enumerate(CONTEXTS)]
    assert len(set.union(*used)) == sum(map(len, used))
    assert max(set.union(*used)) < room.num_blocks


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_attention_over_them_is_that_of_the_cache(
    options: dict[str, Any], device: torch.device, assert_near: Near
) -> None:
    """What a window has left behind may hold anything; a second layer finds what the first worked out."""
    heads, kv_heads, size, block_size = 4, 2, 64, 16
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    k_cache, v_cache, table = make_caches(torch.int8, block_size, kv_heads, size, device)
    lengths = torch.tensor(CONTEXTS, dtype=torch.int32, device=device)
    starts = torch.tensor([0, *QUERIES], device=device).cumsum(0).int()
    q = torch.randn(sum(QUERIES), heads, size, device=device).to(dtype)
    given: dict[str, Any] = {name: options[name] for name in ("sliding_window", "soft_cap") if name in options}
    if "alibi" in options:
        given["alibi_slopes_N"] = 2.0 ** -torch.arange(1, heads + 1, device=device)
    if "sinks" in options:
        given["sinks_N"] = torch.randn(heads, device=device)
    clean = (without_nan(k_cache), without_nan(v_cache))
    want = reference.prefill_attention(q.float(), *clean, starts, lengths, table, scale=0.15, **given).to(dtype)
    if "sliding_window" in options:
        gone = table[3, : (60 - 20 - 20) // block_size].long()
        kv_scales.scales_of(k_cache)[gone] = kv_scales.scales_of(v_cache)[gone] = kv_scales.NAN_CODE
    sizes = {"block_m": 16, "block_l": 16, "warps": 4, "stages": 1} if device.type == "cpu" else None
    attention = partial(prefill_attention.prefill_attention, scale=0.15, sizes=sizes)
    scratch: dict[Any, Any] = {}
    for _ in range(2 if options == {} else 1):
        got = kv_unpack.attend(
            attention, q, k_cache, v_cache, starts, lengths, table, num_context_tokens=sum(CONTEXTS), scratch=scratch,
            **given,
        )  # fmt: skip
        assert_near(got, want)


def test_nothing_is_written_before_a_window_and_behind_a_context(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that a window has left may be another request's: no byte of them is read into the step."""
    block_size, mark = 16, -77.0
    k_cache, v_cache, table = make_caches(torch.int8, block_size, 2, 64, device)
    lengths = torch.tensor(CONTEXTS, dtype=torch.int32, device=device)
    lowest = torch.tensor([0, 4, 37, 59], dtype=torch.int32, device=device)
    room = kv_unpack.make_room(lengths, table, block_size, sum(CONTEXTS))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **kind: empty(*shape, **kind).fill_(mark))
    for made in kv_unpack.unpack(k_cache, v_cache, table, lengths, lowest, room, torch.float16):
        for row, (low, length) in enumerate(zip(lowest.tolist(), CONTEXTS, strict=True)):
            blocks = -(-length // block_size)
            tokens = made[room.table_RB[row, :blocks].long()].flatten(0, 1)
            is_marked = (tokens == mark).flatten(1).all(1).tolist()
            assert is_marked == [not low <= place < length for place in range(blocks * block_size)]


def test_layers_with_and_without_a_window_share_a_step(device: torch.device, assert_near: Near) -> None:
    """What the first layer worked out for its window is not another window's."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    k_cache, v_cache, table = make_caches(torch.int8, 16, 2, 64, device)
    lengths = torch.tensor(CONTEXTS, dtype=torch.int32, device=device)
    starts = torch.tensor([0, *QUERIES], device=device).cumsum(0).int()
    q = torch.randn(sum(QUERIES), 4, 64, device=device).to(dtype)
    clean = (without_nan(k_cache), without_nan(v_cache))
    sizes = {"block_m": 16, "block_l": 16, "warps": 4, "stages": 1} if device.type == "cpu" else None
    attention = partial(prefill_attention.prefill_attention, scale=0.15, sizes=sizes)
    scratch: dict[Any, Any] = {}
    for window in (7, None):
        want = reference.prefill_attention(
            q.float(), *clean, starts, lengths, table, scale=0.15, sliding_window=window
        ).to(dtype)
        got = kv_unpack.attend(
            attention, q, k_cache, v_cache, starts, lengths, table, num_context_tokens=sum(CONTEXTS),
            scratch=scratch, sliding_window=window,
        )  # fmt: skip
        assert_near(got, want)


def test_blocks_of_a_cache_beyond_two_gib_are_found(device: torch.device) -> None:
    """Numbers of such places take more than 32 bits. Nearly all of its pages are never touched."""
    block_size, heads, size = 16, 2, 64
    each = kv_scales.block_bytes(block_size, heads, size)
    num_blocks = (1 << 31) // each + 40
    table = torch.tensor([[num_blocks - 3, num_blocks - 20]], dtype=torch.int32, device=device)
    raw = torch.zeros(num_blocks, each, dtype=torch.uint8, device=device)
    cache = kv_scales.as_scaled_cache(raw, block_size, heads, size, torch.int8)
    slots = (table[0].long()[:, None] * block_size + torch.arange(block_size, device=device)).flatten()
    kv_scales.store(torch.randn(len(slots), heads, size, device=device), cache, slots)
    lengths = torch.tensor([2 * block_size], dtype=torch.int32, device=device)
    room = kv_unpack.make_room(lengths, table, block_size, 2 * block_size)
    k, v = kv_unpack.unpack(cache, cache, table, lengths, torch.zeros_like(lengths), room, torch.float16)
    want = kv_scales.gather(cache, table[0].long()).half()
    assert want.any()
    assert torch.equal(k[:2], want)
    assert torch.equal(v[:2], want)


def test_prompts_take_that_way(device: torch.device, assert_near: Near, monkeypatch: pytest.MonkeyPatch) -> None:
    """The door of prompts, told that it pays: the rows are unpacked, and attended to once, in 16 bits or 32."""
    monkeypatch.setattr(kv_unpack, "pays", lambda q, cache, rows, tokens, **_: cache.element_size() == 1 and tokens > 0)
    seen: list[tuple[Tensor, Tensor]] = []
    unpack = kv_unpack.unpack

    def watched(*args: Any) -> tuple[Tensor, Tensor]:
        seen.append(unpack(*args))
        return seen[-1]

    monkeypatch.setattr(kv_unpack, "unpack", watched)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    k_cache, v_cache, table = make_caches(torch.int8, 16, 2, 64, device)
    lengths = torch.tensor(CONTEXTS, dtype=torch.int32, device=device)
    starts = torch.tensor([0, *QUERIES], device=device).cumsum(0).int()
    q = torch.randn(sum(QUERIES), 4, 64, device=device).to(dtype)
    clean = (without_nan(k_cache), without_nan(v_cache))
    want = reference.prefill_attention(q.float(), *clean, starts, lengths, table, scale=0.1).to(dtype)
    out = torch.full_like(q, float("nan"))
    arguments = (q, k_cache, v_cache, starts, lengths, table)
    prefill_attention.prefill_attention(*arguments, scale=0.1, out_TNH=out, num_context_tokens=sum(CONTEXTS))
    assert [x.dtype for pair in seen for x in pair] == [dtype] * 2
    assert_near(out, want)


def test_it_is_done_where_keys_are_read_often_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what was measured: a key of a whole prompt of n is read by n / 2 queries, one of a long prefix by all."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "pick", lambda kernel, key, device: {"queries": 384} if key == "hopper_int8" else None)
    raw = torch.zeros(4, kv_scales.block_bytes(16, 8, 128), dtype=torch.uint8)
    int8, e4m3 = (kv_scales.as_scaled_cache(raw, 16, 8, 128, kind) for kind in (torch.int8, torch.float8_e4m3fn))

    def pays(tokens: int, rows: int, context: int, cache: Tensor = int8, window: int | None = None) -> bool:
        q = torch.zeros(1, 1, 1, dtype=torch.bfloat16).expand(tokens, 32, 128)
        return kv_unpack.pays(q, cache, rows, context, window=window, special=True)

    assert not pays(8192, 16, 8192)  # prompts of 512
    assert pays(8192, 8, 8192)
    assert pays(2048, 4, 16384)  # chunks of 512 behind long prefixes
    assert not pays(512, 4, 16384)
    assert not pays(2048, 4, 16384, window=128)
    assert not pays(8192, 8, 8192, e4m3)  # was not measured
    assert not pays(8192, 8, 0)  # a recorded step
    assert not pays(8192, 8, 8192, torch.zeros(4, 16, 8, 128, dtype=torch.bfloat16))
    assert pays(8192, 1, 65_000)
    assert not pays(8192, 1, 70_000)  # no room
    assert not pays(8192, 1, 65_530)  # nor for the rest of its last block
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not pays(8192, 8, 8192)


def test_ranks_and_planner_reckon_with_what_is_taken() -> None:
    assert default_calibration("H200").unpacked_bytes == kv_unpack.UNPACKED_BYTES
