"""Keys and values in e4m3 over a scale each: kernels against the reference, and the reference against what is exact."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from argosy.kernels import kv_cache, ops, paged_attention, prefill_attention, reference, rotary

Near = Callable[[Tensor, Tensor], None]
E4M3 = torch.float8_e4m3fn
SCALES = (0.25, 0.5)
HEADS = [
    (6, 2, 64, torch.float32),
    (6, 2, 64, torch.bfloat16),  # multiplied in float16, which the interpreter can
    *(
        pytest.param(*heads, torch.bfloat16, marks=pytest.mark.gpu)
        for heads in ((32, 8, 128), (7, 1, 80), (12, 12, 64))
    ),
]


def paged(
    contexts: list[int], num_kv_heads: int, head_size: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Caches of e4m3 noise, a table of shuffled blocks of 16, the lengths."""
    per_row = -(-max(contexts) // 16)
    num_blocks = per_row * len(contexts) + 3
    caches = [torch.randn(num_blocks, 16, num_kv_heads, head_size, device=device).to(E4M3) for _ in range(2)]
    table = torch.randperm(num_blocks, device=device)[: per_row * len(contexts)].view(len(contexts), per_row).int()
    return *caches, table, torch.tensor(contexts, dtype=torch.int32, device=device)


def same_cache(got: Tensor, want: Tensor) -> None:
    """Equal but for neighbours where a last bit of the norm or rotation decides (an eighth, or a half: see below)."""
    a, b = got.float(), want.float()
    differs = a != b
    assert float(differs.float().mean()) < 0.02
    near = (a - b).abs() <= b.abs() * 0.126 + 0.002
    if not a.is_cuda:  # Triton's interpreter drops the carry where rounding reaches a power of two
        near |= a * 2 == b
    assert bool(near[differs].all())


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_size", "dtype"), HEADS)
def test_decode_and_prefill_read_them(
    num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype, device: torch.device, assert_near: Near
) -> None:
    contexts = [33, 0, 70, 1] if device.type == "cpu" else [333, 0, 4097, 1, 64, 1000]
    k_cache, v_cache, table, context = paged(contexts, num_kv_heads, head_size, device)
    q = torch.randn(len(contexts), num_heads, head_size, device=device).to(dtype)
    options = {"scale": 0.2, "kv_scales": SCALES}
    want = reference.paged_attention(q, k_cache, v_cache, table, context, **options)
    assert_near(paged_attention.paged_attention(q, k_cache, v_cache, table, context, **options), want)
    queries = [3, 0, 19, 1]
    contexts = [5, 0, 19, 37]
    k_cache, v_cache, table, context = paged(contexts, num_kv_heads, head_size, device)
    starts = torch.tensor([0, *queries], device=device).cumsum(0).int()
    q = torch.randn(sum(queries), num_heads, head_size, device=device).to(dtype)
    want = reference.prefill_attention(q, k_cache, v_cache, starts, context, table, **options)
    sizes = {"block_m": 16, "block_l": 16, "warps": 4, "stages": 1} if device.type == "cpu" else None
    got = prefill_attention.prefill_attention(q, k_cache, v_cache, starts, context, table, sizes=sizes, **options)
    assert_near(got, want)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_size", "dtype"), HEADS)
def test_new_tokens_are_stored_over_their_scale(
    num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype, device: torch.device, assert_near: Near
) -> None:
    """By decode attention, by the rotation, and alone; numbers beyond the largest are cut off and not made nan."""
    contexts = [35, 0, 1, 17]
    k_cache, v_cache, table, context = paged(contexts, num_kv_heads, head_size, device)
    positions = (context.long() - 1).clamp(min=0)
    slots = torch.where(context > 0, table.gather(1, positions[:, None] // 16)[:, 0] * 16 + positions % 16, -1)
    angles = torch.randn(40, head_size // 2, device=device)
    rotations = torch.cat((angles.cos(), angles.sin()), -1)
    qkv = torch.randn(len(contexts), (num_heads + 2 * num_kv_heads) * head_size, device=device).to(dtype)
    qkv[2, -5:] = 1e4  # of the row that sees nothing else
    plain = {"num_heads": num_heads, "kv_scales": SCALES}
    caches = [(k_cache.clone(), v_cache.clone()) for _ in range(4)]
    args = (slots, table, context)
    want = reference.decode_attention(qkv.clone(), positions, rotations, *caches[0], *args, scale=0.2, **plain)
    got = paged_attention.decode_attention(qkv.clone(), positions, rotations, *caches[1], *args, scale=0.2, **plain)
    if device.type == "cuda":
        assert_near(got, want)
    else:  # the interpreter's carry, see `same_cache`
        assert float((got - want).norm() / want.norm()) < 0.05
    rotary.rope_and_store(qkv.clone(), positions, rotations, *caches[2], slots, **plain)
    for k_got, v_got in caches[1:3]:
        same_cache(k_got, caches[0][0])
        same_cache(v_got, caches[0][1])
        assert not v_got.float().isnan().any()
    assert float(caches[1][1].float().max()) == 448.0
    k, v = torch.randn(2, len(contexts), num_kv_heads, head_size, device=device).to(dtype)
    want_k, want_v = k_cache.clone(), v_cache.clone()
    reference.store_kv(k, v, want_k, want_v, slots, kv_scales=SCALES)
    kv_cache.store_kv(k, v, *caches[3], slots, kv_scales=SCALES)
    same_cache(caches[3][0], want_k)
    same_cache(caches[3][1], want_v)


def test_the_error_is_within_its_bound() -> None:
    """Rounding to e4m3 moves a number by at most 1/16 of itself. So a logit moves by at most d = scale * sum |qk| / 16,
    a weight by a factor of at most exp(2 d), and what a head sees by (exp(2 d) - 1 + 1/16) of its largest value. For
    noise, which is the worst of inputs, the error is 3 % of the outcome."""
    torch.manual_seed(0)
    num_heads, length, size = 4, 200, 64
    k, v = torch.randn(2, length, 1, size)
    q = torch.randn(1, num_heads, size)
    table = torch.arange(13, dtype=torch.int32)[None]
    context = torch.tensor([length], dtype=torch.int32)
    seen = {}
    for dtype in (torch.float32, E4M3):
        caches = [torch.zeros(13, 16, 1, size).to(dtype) for _ in range(2)]
        ops.store_kv(k, v, *caches, torch.arange(length))
        seen[dtype] = ops.paged_attention(q, *caches, table, context, scale=size**-0.5)
    error_NH = (seen[E4M3] - seen[torch.float32])[0].abs()
    moved_N = (q[0][:, None].abs() * k[:, 0].abs()).sum(-1).amax(1) * size**-0.5 / 16
    bound_NH = ((2 * moved_N).exp() - 1 + 1 / 16)[:, None] * v[:, 0].abs().amax(0)
    assert bool((error_NH <= bound_NH).all())
    relative = float((seen[E4M3] - seen[torch.float32]).norm() / seen[torch.float32].norm())
    assert 0.005 < relative < 0.05
    assert math.isfinite(relative)
