"""The kernels without attention against their references: on ugly shapes, strided views and padding."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from argosy.kernels import activation, block_transfer, kv_cache, reference, rms_norm, rotary, tables_reference

Near = Callable[[Tensor, Tensor], None]
SHAPES = [(1, 64), (7, 96), (33, 1000), (3, 5, 130), pytest.param((257, 8192), marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norms(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, assert_near: Near) -> None:
    x, residual = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(shape[-1], device=device).to(dtype)
    assert_near(rms_norm.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    want_normed, want_residual = reference.add_rms_norm(x, residual.clone(), weight, 1e-5)
    normed, kept = rms_norm.add_rms_norm(x, residual, weight, 1e-5)
    assert kept is residual
    assert_near(normed, want_normed)
    assert_near(kept, want_residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gates(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, assert_near: Near) -> None:
    x = torch.randn(shape, device=device).to(dtype)
    assert_near(activation.silu_and_mul(x), reference.silu_and_mul(x))
    assert_near(activation.gelu_and_mul(x), reference.gelu_and_mul(x))


def test_a_norm_reads_rows_of_a_wider_tensor(device: torch.device, assert_near: Near) -> None:
    wide, weight = torch.randn(5, 100, device=device), torch.randn(60, device=device)
    assert_near(rms_norm.rms_norm(wide[:, 20:80], weight, 1e-6), reference.rms_norm(wide[:, 20:80], weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", ["none", "q", "both"])
@pytest.mark.parametrize("rotation", ["none", "half", "partial", "interleaved"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_size"), [(7, 1, 64), (4, 4, 80)])
def test_rope_and_store(
    num_heads: int, num_kv_heads: int, head_size: int, rotation: str, norms: str, dtype: torch.dtype,
    device: torch.device, assert_near: Near,
) -> None:  # fmt: skip
    """Six tokens, one of them padding, out of order in the cache; slots not named keep what they held."""
    tokens, width = 6, (num_heads + 2 * num_kv_heads) * head_size
    positions = torch.randint(30, (tokens,), device=device)
    slots = torch.tensor([35, 2, -1, 17, 16, 0], device=device)
    rotary_size = {"none": 0, "half": head_size, "partial": head_size // 2 - 6, "interleaved": head_size}[rotation]
    table = torch.randn(30, rotary_size, device=device) if rotary_size else None
    q_weight = None if norms == "none" else torch.randn(head_size, device=device).to(dtype)
    k_weight = torch.randn(head_size, device=device).to(dtype) if norms == "both" else None
    qkv = torch.randn(tokens, width, device=device).to(dtype)
    caches = [torch.randn(3, 16, num_kv_heads, head_size, device=device).to(dtype) for _ in range(2)]
    options = {
        "num_heads": num_heads, "interleaved": rotation == "interleaved",
        "q_norm_weight_H": q_weight, "k_norm_weight_H": k_weight,
    }  # fmt: skip
    want_caches = [cache.clone() for cache in caches]
    want = reference.rope_and_store(qkv.clone(), positions, table, *want_caches, slots, **options)
    got = rotary.rope_and_store(qkv, positions, table, *caches, slots, **options)
    assert got.data_ptr() == qkv.data_ptr()
    for x, y in zip((got, *caches), (want, *want_caches), strict=True):
        assert_near(x, y)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_alone(interleaved: bool, device: torch.device, assert_near: Near) -> None:
    qkv, table = torch.randn(5, 8, 48, device=device), torch.randn(30, 32, device=device)
    positions = torch.randint(30, (5,), device=device, dtype=torch.int32)
    q, k = qkv[:, :5], qkv[:, 5:7]
    wants = reference.apply_rotary(q.clone(), k.clone(), positions, table, interleaved=interleaved)
    for got, want in zip(rotary.apply_rotary(q, k, positions, table, interleaved=interleaved), wants, strict=True):
        assert_near(got, want)


def test_store_kv(device: torch.device) -> None:
    qkv = torch.randn(5, 9, 40, device=device)
    caches, wants = torch.randn(2, 4, 16, 3, 40, device=device), []
    slots = torch.tensor([63, -1, 0, 20, -1], device=device, dtype=torch.int32)
    wants = caches.clone()
    reference.store_kv(qkv[:, 3:6], qkv[:, 6:], *wants, slots)
    kv_cache.store_kv(qkv[:, 3:6], qkv[:, 6:], *caches, slots)
    assert torch.equal(caches, wants)


@pytest.mark.parametrize("pairs", [[(0, 5)], [(1, 2), (7, 3), (1, 4)], [(0, 1), (1, 2)]])
def test_copy_blocks(pairs: list[tuple[int, int]], device: torch.device) -> None:
    """Blocks of 20 480 bytes, more than one program copies; also a chain, which goes another way."""
    caches = [torch.randn(8, 16, 4, 80, device=device) for _ in range(4)]
    wants = [cache.clone() for cache in caches]
    tables_reference.copy_blocks(wants, wants, pairs)
    kv_cache.copy_blocks(caches, caches, pairs)
    assert all(torch.equal(got, want) for got, want in zip(caches, wants, strict=True))


def test_blocks_go_from_their_caches_to_others(device: torch.device) -> None:
    """As between a device and its host: what is read stays as it is, and only named blocks change."""
    sources, destinations = ([torch.randn(5, 16, 2, 24, device=device) for _ in range(3)] for _ in range(2))
    before, old = ([cache.clone() for cache in caches] for caches in (sources, destinations))
    kv_cache.copy_blocks(sources, destinations, [(4, 0), (0, 3)])
    for source, destination, was, old_one in zip(sources, destinations, before, old, strict=True):
        assert torch.equal(source, was)
        assert torch.equal(destination[[0, 3]], was[[4, 0]])
        assert torch.equal(destination[[1, 2, 4]], old_one[[1, 2, 4]])


def test_blocks_of_many_sizes_are_laid_side_by_side_and_put_back(device: torch.device) -> None:
    """Caches of a model whose keys, values and scales differ in type and size; one of them larger than a program."""
    caches = [
        torch.randn(7, 16, 4, 80, device=device),
        torch.randint(0, 255, (7, 48), device=device, dtype=torch.uint8),
        torch.randn(7, 16, 2, 24, device=device).bfloat16(),
    ]
    row_bytes = sum(cache[0].nbytes for cache in caches)
    staged, want = (torch.zeros(5, row_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    block_transfer.gather_blocks(caches, [6, 0, 3], staged)
    tables_reference.gather_blocks(caches, [6, 0, 3], want)
    assert torch.equal(staged, want)
    assert staged[3:].count_nonzero() == 0
    before = [cache.clone() for cache in caches]
    block_transfer.scatter_blocks(staged, caches, [2, 5, 1])
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache[[2, 5, 1]], old[[6, 0, 3]])
        assert torch.equal(cache[[0, 3, 4, 6]], old[[0, 3, 4, 6]])


def test_the_definition_lays_blocks_side_by_side_and_puts_them_back(device: torch.device) -> None:
    """Block 3 of all caches, one after the other, then block 1; sizes of which no kernel takes one."""
    caches = [torch.arange(first, first + 40, device=device).reshape(4, 10).half() for first in (0, 100, 200)]
    staged = torch.zeros(2, 60, dtype=torch.uint8, device=device)
    tables_reference.gather_blocks(caches, [3, 1], staged)
    rows = [[*range(first, first + 10)] for first in (30, 130, 230, 10, 110, 210)]
    assert staged.view(torch.float16).tolist() == [[*rows[0], *rows[1], *rows[2]], [*rows[3], *rows[4], *rows[5]]]
    tables_reference.scatter_blocks(staged, caches, [0, 2])
    assert [cache[0].tolist() for cache in caches] == rows[:3]
    assert [cache[2].tolist() for cache in caches] == rows[3:]
    assert [cache[3].tolist() for cache in caches] == rows[:3]


@pytest.mark.gpu
def test_blocks_go_to_pinned_host_memory_and_back(device: torch.device) -> None:
    caches = [torch.randn(8, 16, 2, 64, device=device).bfloat16() for _ in range(6)]
    host = [torch.zeros(5, 16, 2, 64).bfloat16().pin_memory() for _ in caches]
    before = [cache.clone() for cache in caches]
    kv_cache.copy_blocks(caches, host, [(1, 4), (6, 0)])
    torch.cuda.synchronize()
    assert all(torch.equal(h[4], b[1].cpu()) for h, b in zip(host, before, strict=True))
    kv_cache.copy_blocks(host, caches, [(4, 2), (0, 3)])
    for cache, b in zip(caches, before, strict=True):
        assert torch.equal(cache[2], b[1])
        assert torch.equal(cache[3], b[6])
