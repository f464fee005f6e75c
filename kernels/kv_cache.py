"""Write keys and values to their slots; copy blocks of many cache tensors at once, also between device and host.

Meaning: `reference.store_kv`, `reference.copy_blocks`.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import tuning

COPY_BYTES = 16384  # of a block that one program copies: 128 threads with eight 16-byte loads in flight each


@triton.jit(do_not_specialize_on_alignment=["slots_ptr"])  # as in `rotary`
def _store_kv_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, slots_ptr, stride_k, stride_v,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    slot = tl.load(slots_ptr + token).to(tl.int64)
    inside = column < tl.where(slot >= 0, WIDTH, 0)
    k = tl.load(k_ptr + token * stride_k + column, inside, other=0.0)
    v = tl.load(v_ptr + token * stride_v + column, inside, other=0.0)
    tl.store(k_cache_ptr + slot * WIDTH + column, k.to(k_cache_ptr.dtype.element_ty), inside)
    tl.store(v_cache_ptr + slot * WIDTH + column, v.to(v_cache_ptr.dtype.element_ty), inside)


def store_kv(k_TKH: Tensor, v_TKH: Tensor, k_cache_BSKH: Tensor, v_cache_BSKH: Tensor, slots_T: Tensor) -> None:
    """One program a token. Heads of a token must be contiguous; tokens may be strided (views of a fused qkv)."""
    num_tokens, num_kv_heads, head_size = k_TKH.shape
    for x_TKH, cache_BSKH in ((k_TKH, k_cache_BSKH), (v_TKH, v_cache_BSKH)):
        assert x_TKH.stride()[1:] == (head_size, 1)
        assert cache_BSKH.is_contiguous()
        assert cache_BSKH.shape[2:] == x_TKH.shape[1:]
        assert x_TKH.shape[0] == slots_T.shape[0]
    width = num_kv_heads * head_size
    block = tuning.next_power_of_two(width)
    if num_tokens:
        _store_kv_kernel[(num_tokens,)](
            k_TKH, v_TKH, k_cache_BSKH, v_cache_BSKH, slots_T, k_TKH.stride(0), v_TKH.stride(0),
            WIDTH=width, BLOCK=block, num_warps=max(1, min(8, block // 256)), **tuning.overlap(k_TKH.device),
        )  # fmt: skip


@triton.jit
def _copy_blocks_kernel(
    addresses_ptr,  # int64 [2, tensors]: where each source and each destination begins
    pairs_ptr,  # int64 [pairs, 2]
    num_tensors,
    words,  # of 4 bytes in a block
    WORDS: tl.constexpr,
):
    pair = tl.program_id(0)
    tensor = tl.program_id(1)
    word = tl.program_id(2) * WORDS + tl.arange(0, WORDS)
    source = tl.load(addresses_ptr + tensor).to(tl.pointer_type(tl.int32))
    destination = tl.load(addresses_ptr + num_tensors + tensor).to(tl.pointer_type(tl.int32))
    source += tl.load(pairs_ptr + 2 * pair) * words
    destination += tl.load(pairs_ptr + 2 * pair + 1) * words
    source = tl.multiple_of(source, 16)
    destination = tl.multiple_of(destination, 16)
    tl.store(destination + word, tl.load(source + word, word < words), word < words)


@lru_cache(maxsize=16)
def _addresses(pointers: tuple[int, ...], device: torch.device) -> Tensor:
    """Where tensors begin, on the device. The caches of a model are few and never move, so one upload serves."""
    return torch.tensor(pointers, device=device)


def copy_blocks(sources: Sequence[Tensor], destinations: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> None:
    """All pairs of all tensors in one launch on the current device and stream.

    Tensors are contiguous [blocks, ...] with blocks of one size in bytes, a multiple of 16. Those on the host must be
    pinned (not checked: asking costs more than the copy): the kernel reads and writes them over the link by their
    address, so that a swap of one block through 64 tensors is one launch and not 64 copies. A chain (a block that is
    both read and written) is done tensor by tensor.
    """
    if not pairs or not sources:
        return
    tensors = [*sources, *destinations]
    device = next((x.device for x in (sources[0], destinations[0]) if x.is_cuda), sources[0].device)
    pointers = tuple(x.data_ptr() for x in tensors)
    half = len(sources)
    ids = torch.tensor(pairs, dtype=torch.int64)
    if device.type == "cuda":
        ids = ids.pin_memory().to(device, non_blocking=True)
    if pointers[:half] == pointers[half:] and not {a for a, _ in pairs}.isdisjoint(b for _, b in pairs):
        for source, destination in zip(sources, destinations, strict=True):
            destination.index_copy_(0, ids[:, 1], source.index_select(0, ids[:, 0]))
        return
    block_bytes = sources[0].stride(0) * sources[0].element_size()
    assert block_bytes % 16 == 0
    assert all(x.is_contiguous() and x.stride(0) * x.element_size() == block_bytes for x in tensors)
    words = block_bytes // 4
    grid = (len(pairs), half, triton.cdiv(words, COPY_BYTES // 4))
    _copy_blocks_kernel[grid](
        _addresses(pointers, device), ids, half, words, WORDS=COPY_BYTES // 4, num_warps=4
    )  # fmt: skip
