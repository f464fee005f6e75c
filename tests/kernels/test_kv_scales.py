"""Caches in 8 bits, a scale for each token and head: the bound on their error, and kernels against the reference."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from argosy.kernels import kv_cache, kv_scales, ops, paged_attention, prefill_attention, reference, rotary

Near = Callable[[Tensor, Tensor], None]
INT8, E4M3 = torch.int8, torch.float8_e4m3fn
KINDS = [INT8, E4M3]
LARGEST = {INT8: 127 * kv_scales.LARGEST_SCALE, E4M3: 448 * kv_scales.LARGEST_SCALE}
HEADS = [  # query heads, key/value heads, head size, tokens in a block, dtype of queries
    (6, 2, 64, 16, torch.float32),
    (3, 1, 80, 32, torch.float32),
    (4, 4, 96, 16, torch.float16),
    (8, 2, 128, 64, torch.bfloat16),  # multiplied in float16, which the interpreter can
    (2, 1, 256, 16, torch.float32),
    *(
        pytest.param(*heads, torch.bfloat16, marks=pytest.mark.gpu)
        for heads in ((32, 8, 128, 16), (7, 1, 80, 16), (12, 12, 64, 32), (6, 3, 96, 128), (8, 2, 256, 16))
    ),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"sliding_window": 20},
    {"soft_cap": 3.0},
    {"alibi": True, "sinks": True},
]


def scaled_cache(num_blocks: int, block_size: int, heads: int, size: int, kind: torch.dtype, device: Any) -> Tensor:
    raw = torch.zeros(num_blocks, kv_scales.block_bytes(block_size, heads, size), dtype=torch.uint8, device=device)
    return kv_scales.as_scaled_cache(raw, block_size, heads, size, kind)


def copy_of(cache: Tensor) -> Tensor:
    """`clone` would leave the scales behind."""
    other = scaled_cache(*cache.shape, cache.dtype, cache.device)
    other.view(torch.uint8).copy_(cache.view(torch.uint8))
    kv_scales.scales_of(other).copy_(kv_scales.scales_of(cache))
    return other


def ugly_heads(num: int, size: int) -> Tensor:
    """Heads as no model should make them: outliers, zeros, tiny and huge ones, one number of many, equal numbers."""
    x = torch.randn(num, size) * torch.exp(torch.randn(num, 1) * 4)
    x[0] = 0.0
    x[1] = 1e-45  # the smallest float32
    x[2] = -1e-38 * torch.rand(size)
    x[3] = torch.where(torch.arange(size) == 3, 6e4, 1e-3)
    x[4] = 1.0
    x[5] = -127.5
    x[6, 1:] = 0.0
    x[7] = torch.linspace(-448.0, 448.0, size)
    x[8] = 1.17e-11 * torch.randn(size)
    x[9] = 1e8 * torch.rand(size)
    x[10] = -0.0
    x[11] = 2.0 ** torch.arange(size).remainder(60).sub(40)
    return x


@pytest.mark.parametrize("size", [1, 64, 80, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_within_its_bound(kind: torch.dtype, size: int) -> None:
    """Of every number of any input, ugly ones included: what `kv_scales` says."""
    torch.manual_seed(size)
    for x in (ugly_heads(5000, size), ugly_heads(500, size).bfloat16(), torch.randn(1000, size).half()):
        x_TH = x.float()
        kept, codes = kv_scales.quantise(x, kind)
        scale = kv_scales.decode(codes)[:, None]
        error = (kv_scales.dequantise(kept, codes) - x_TH).abs()
        largest = x_TH.abs().amax(-1, keepdim=True)
        inside = largest <= LARGEST[kind]
        assert float(inside.float().mean()) > 0.98
        least = kv_scales.SMALLEST_SCALE * (0.5 if kind == INT8 else 16)
        if kind == INT8:
            bound, by_largest = torch.full_like(scale, 0.5) * scale, largest / 203
        else:
            bound, by_largest = torch.maximum(x_TH.abs() / 16, scale / 1024), largest / 22
        slack = 1 + 1e-5  # float32
        assert bool((error <= bound * slack)[inside.expand_as(error)].all())
        assert bool((error <= (by_largest * slack).clamp(min=least))[inside.expand_as(error)].all())
    assert kv_scales.quantise(torch.zeros(3, size), kind)[0].float().eq(0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_scales_are_taken_upwards_and_no_coarser_than_a_quarter(kind: torch.dtype) -> None:
    codes = torch.arange(254, dtype=torch.uint8)
    scales = kv_scales.decode(codes)
    assert scales[0] == kv_scales.SMALLEST_SCALE
    assert scales[-1] == kv_scales.LARGEST_SCALE
    assert bool((scales[1:] / scales[:-1] <= 1.25).all())
    exact = scales * kv_scales.top_of(kind)
    assert torch.equal(kv_scales.encode(exact * (1 - 1e-6), kind), codes)
    assert torch.equal(kv_scales.encode(exact[:-1] * (1 + 1e-6), kind), codes[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_too_large_is_cut_off_and_nan_stays_nan(kind: torch.dtype) -> None:
    """An answer must not come out of a cache that holds nonsense as if it were sound: the sampler looks for nan."""
    x = torch.randn(4, 64)
    x[0, 0], x[1, 7], x[2, 9] = 3e38, math.nan, -math.inf
    codes = kv_scales.quantise(x, kind)[1]
    seen = kv_scales.dequantise(*kv_scales.quantise(x, kind))
    assert float(seen[0, 0]) == LARGEST[kind]
    assert codes.tolist()[1:3] == [kv_scales.NAN_CODE] * 2
    assert bool(seen[1:3].isnan().all())
    assert bool(seen[3].isfinite().all())
    caches = [scaled_cache(1, 16, 1, 64, kind, "cpu") for _ in range(2)]
    table, context = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    ops.store_kv(x[2:4, None], x[2:4, None].nan_to_num(0, 0, 0), *caches, torch.tensor([0, 1]))
    assert bool(ops.paged_attention(x[3:, None], *caches, table, context, scale=0.1).isnan().all())


def test_a_block_with_its_scales_is_one_run_of_bytes() -> None:
    """Whoever copies the rows of the raw tensor has copied the scales; 1.98 blocks in the room of one in 16 bits."""
    raw = torch.zeros(5, kv_scales.block_bytes(16, 8, 128), dtype=torch.uint8)
    cache = kv_scales.as_scaled_cache(raw, 16, 8, 128, INT8)
    x = torch.randn(16, 8, 128)
    ops.store_kv(x, x, cache, copy_of(cache), torch.arange(32, 48))
    ops.copy_blocks([raw], [(2, 4)])
    assert torch.equal(kv_scales.gather(cache, torch.tensor([2])), kv_scales.gather(cache, torch.tensor([4])))
    assert float((kv_scales.gather(cache, torch.tensor([4]))[0] - x).abs().max()) < 0.05
    assert not raw[[0, 1, 3]].any()
    assert 16 * 8 * 128 * 2 / raw.shape[1] > 1.98
    assert kv_scales.has_scales(cache)
    assert kv_scales.has_scales(cache[:1])
    assert not kv_scales.has_scales(torch.zeros(1, 16, 8, 128, dtype=E4M3))


def noise(contexts: list[int], heads: int, size: int, block_size: int, kind: torch.dtype, device: Any) -> list[Tensor]:
    """Two caches of tokens of very different size, a table of shuffled blocks, the lengths; unused slots hold nan."""
    per_row = -(-max(contexts) // block_size)
    num_blocks = per_row * len(contexts) + 3
    caches = [scaled_cache(num_blocks, block_size, heads, size, kind, device) for _ in range(2)]
    x = torch.randn(2, num_blocks * block_size, heads, size, device=device)
    x *= torch.exp(torch.randn(2, num_blocks * block_size, heads, 1, device=device))
    reference.store_kv(*x, *caches, torch.arange(num_blocks * block_size, device=device))
    table = torch.randperm(num_blocks, device=device)[: per_row * len(contexts)].view(len(contexts), per_row).int()
    return [*caches, table, torch.tensor(contexts, dtype=torch.int32, device=device)]


def options_of(options: dict[str, Any], num_heads: int, device: Any) -> dict[str, Any]:
    made = {name: value for name, value in options.items() if name not in ("alibi", "sinks")}
    if "alibi" in options:
        made["alibi_slopes_N"] = 2.0 ** -torch.arange(1, num_heads + 1, device=device)
    if "sinks" in options:
        made["sinks_N"] = torch.randn(num_heads, device=device)
    return {"scale": 0.15, **made}


def spoil_the_rest(cache: Tensor, table: Tensor, contexts: list[int]) -> None:
    """What a failed request left in slots that a row has not written yet."""
    codes = kv_scales.scales_of(cache)
    for row, length in enumerate(contexts):
        if length % cache.shape[1]:
            codes[int(table[row, length // cache.shape[1]]), :, length % cache.shape[1] :] = kv_scales.NAN_CODE


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "size", "block_size", "dtype"), HEADS)
def test_decode_and_prefill_read_them(
    num_heads: int, num_kv_heads: int, size: int, block_size: int, dtype: torch.dtype, kind: torch.dtype,
    options: dict[str, Any], device: torch.device, assert_near: Near,
) -> None:  # fmt: skip
    if device.type == "cpu" and options and (size, kind) not in ((64, INT8), (80, E4M3)):
        pytest.skip("enough of the interpreter")
    contexts = [33, 0, 70, 1] if device.type == "cpu" else [333, 0, 4097, 1, 64, 1000]
    caches = noise(contexts, num_kv_heads, size, block_size, kind, device)
    spoil_the_rest(caches[0], caches[2], contexts)
    spoil_the_rest(caches[1], caches[2], contexts)
    q = torch.randn(len(contexts), num_heads, size, device=device).to(dtype)
    given = options_of(options, num_heads, device)
    want = reference.paged_attention(q, *_clean(caches), **given)
    assert_near(paged_attention.paged_attention(q, *caches, **given), want)
    queries = [3, 0, 19, 1]
    contexts = [5, 0, 19, 37]
    caches = noise(contexts, num_kv_heads, size, block_size, kind, device)
    spoil_the_rest(caches[0], caches[2], contexts)
    spoil_the_rest(caches[1], caches[2], contexts)
    starts = torch.tensor([0, *queries], device=device).cumsum(0).int()
    q = torch.randn(sum(queries), num_heads, size, device=device).to(dtype)
    table, context = caches[2:]
    want = reference.prefill_attention(q, *_clean(caches)[:2], starts, context, table, **given)
    sizes = {"block_m": 16, "block_l": 16, "warps": 4, "stages": 1} if device.type == "cpu" else None
    got = prefill_attention.prefill_attention(q, *caches[:2], starts, context, table, sizes=sizes, **given)
    assert_near(got, want)


def _clean(caches: list[Tensor]) -> list[Tensor]:
    """For the reference, which multiplies what it then masks."""
    cleaned = [copy_of(cache) for cache in caches[:2]]
    for cache in cleaned:
        codes = kv_scales.scales_of(cache)
        codes.masked_fill_(codes == kv_scales.NAN_CODE, 0)
    return [*cleaned, *caches[2:]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "size", "block_size", "dtype"), HEADS)
def test_new_tokens_are_stored_with_a_scale_of_their_own(
    num_heads: int, num_kv_heads: int, size: int, block_size: int, dtype: torch.dtype, kind: torch.dtype,
    device: torch.device, assert_near: Near,
) -> None:  # fmt: skip
    """By decode attention, by the rotation, and alone."""
    contexts = [35, 0, 1, 17]
    caches = noise(contexts, num_kv_heads, size, block_size, kind, device)
    k_cache, v_cache, table, context = caches
    positions = (context.long() - 1).clamp(min=0)
    blocks = table.gather(1, positions[:, None] // block_size)[:, 0]
    slots = torch.where(context > 0, blocks * block_size + positions % block_size, -1)
    angles = torch.randn(40, size // 2, device=device)
    rotations = torch.cat((angles.cos(), angles.sin()), -1)
    qkv = torch.randn(len(contexts), (num_heads + 2 * num_kv_heads) * size, device=device)
    qkv = (qkv * torch.tensor([[1.0], [1.0], [30.0], [1e-3]], device=device)).to(dtype)
    weights = {f"{name}_norm_weight_H": torch.rand(size, device=device) + 0.5 for name in "qk"} if size == 80 else {}
    plain = {"num_heads": num_heads, **weights}
    made = [(copy_of(k_cache), copy_of(v_cache)) for _ in range(4)]
    args = (slots, table, context)
    want = reference.decode_attention(qkv.clone(), positions, rotations, *made[0], *args, scale=0.2, **plain)
    got = paged_attention.decode_attention(qkv.clone(), positions, rotations, *made[1], *args, scale=0.2, **plain)
    if device.type == "cuda" or kind == INT8:
        assert_near(got, want)
    else:  # the interpreter's carry: see `test_fp8_cache`
        assert float((got - want).norm() / want.norm()) < 0.05
    rotary.rope_and_store(qkv.clone(), positions, rotations, *made[2], slots, **plain)
    for k_got, v_got in made[1:3]:
        same(k_got, made[0][0], slots)
        same(v_got, made[0][1], slots)
    k, v = torch.randn(2, len(contexts), num_kv_heads, size, device=device).to(dtype)
    want_k, want_v = copy_of(k_cache), copy_of(v_cache)
    reference.store_kv(k, v, want_k, want_v, slots)
    kv_cache.store_kv(k, v, *made[3], slots)
    same(made[3][0], want_k, slots, exact=True)
    same(made[3][1], want_v, slots, exact=True)


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_mark_heads_with_nan_or_inf(kind: torch.dtype, device: torch.device) -> None:
    """By the code of nan, each head for itself, whichever kernel writes."""
    num_heads, num_kv_heads, size, slots = 2, 2, 64, torch.tensor([17, 3], device=device)
    table = torch.tensor([[1], [0]], dtype=torch.int32, device=device)
    context = torch.tensor([2, 4], dtype=torch.int32, device=device)
    qkv = torch.randn(2, (num_heads + 2 * num_kv_heads) * size, device=device)
    heads = qkv.view(2, -1, size)
    heads[0, 2, 5], heads[1, 3, 63], heads[1, 4, 0] = math.nan, -math.inf, math.inf  # keys, keys, values
    wanted = ([[True, False], [False, True]], [[False, False], [True, False]])
    for writer in ("alone", "rotated", "attended"):
        caches = [scaled_cache(2, 16, num_kv_heads, size, kind, device) for _ in range(2)]
        if writer == "alone":
            kv_cache.store_kv(heads[:, 2:4], heads[:, 4:], *caches, slots)
        elif writer == "rotated":
            rotary.rope_and_store(qkv.clone(), slots, None, *caches, slots, num_heads=num_heads)
        else:
            paged_attention.decode_attention(
                qkv.clone(), context.long() - 1, None, *caches, slots, table, context, num_heads=num_heads, scale=0.1
            )
        for cache, marked in zip(caches, wanted, strict=True):
            codes = kv_scales.scales_of(cache)[slots // 16, :, slots % 16]
            assert (codes == kv_scales.NAN_CODE).tolist() == marked, writer
            finite = kv_scales.gather(cache, torch.tensor([0, 1], device=device)).isfinite().all(-1)
            assert int((~finite).sum()) == sum(map(sum, marked)), writer


def same(got: Tensor, want: Tensor, slots: Tensor, *, exact: bool = False) -> None:
    """Equal but where a last bit of the norm or the rotation decides, and untouched everywhere else."""
    every = torch.arange(len(got), device=got.device)
    a, b = (kv_scales.gather(cache, every).flatten(0, 1) for cache in (got, want))
    rest = torch.ones(len(a), dtype=torch.bool, device=a.device)
    rest[slots[slots >= 0].long()] = False
    assert torch.equal(a[rest], b[rest])
    scale = b.abs().amax(-1, keepdim=True) / 127
    if exact and (got.dtype == INT8 or a.is_cuda):
        assert torch.equal(a, b)
        return
    near = (a - b).abs() <= torch.maximum(scale * 1.3, b.abs() * 0.13)
    if not a.is_cuda and got.dtype == E4M3:  # the interpreter's carry: see `test_fp8_cache`
        near |= (a * 2 - b).abs() <= b.abs() * 0.02
    assert bool(near.all())
    assert float((a != b).float().mean()) < 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "size", "block_size", "dtype"), HEADS[:2])
def test_a_shared_prefix_is_read_with_its_scales(
    num_heads: int, num_kv_heads: int, size: int, block_size: int, dtype: torch.dtype, kind: torch.dtype,
    device: torch.device, assert_near: Near,
) -> None:  # fmt: skip
    contexts = [70, 66, 80, 65]
    k_cache, v_cache, table, context = noise(contexts, num_kv_heads, size, block_size, kind, device)
    table[:, : 64 // block_size] = table[0, : 64 // block_size].clone()
    shared = torch.tensor([64, 64, 0, 64], dtype=torch.int32, device=device)
    q = torch.randn(4, num_heads, size, device=device).to(dtype)
    want = reference.paged_attention(q, k_cache, v_cache, table, context, scale=0.2)
    got = paged_attention.paged_attention(q, k_cache, v_cache, table, context, scale=0.2, shared_len_R=shared)
    assert_near(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_any_size_keep_their_digits(kind: torch.dtype, device: torch.device, assert_near: Near) -> None:
    """Weights are multiplied in float16: values of 1e-9 must not be lost there, nor those of 1e5 become inf."""
    for size_of_values in (1e-9, 1e5):
        caches = noise([50], 1, 64, 16, kind, device)
        x = torch.randn(50, 1, 64, device=device)
        where = torch.arange(50, device=device)
        slots = caches[2][0].long()[where // 16] * 16 + where % 16
        reference.store_kv(x, x * size_of_values, *caches[:2], slots)
        q = torch.randn(1, 2, 64, device=device).to(torch.bfloat16)
        want = reference.paged_attention(q, *caches, scale=0.2)
        got = paged_attention.paged_attention(q, *caches, scale=0.2)
        assert_near(got / size_of_values, want / size_of_values)
