"""Write keys and values to their slots; copy blocks of many cache tensors at once, also between device and host.

Meaning: `reference.store_kv`, `tables_reference.copy_blocks`.
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import tuning
from argosy.kernels.attention_parts import check_caches, is_scaled, scaled
from argosy.kernels.kv_scale_parts import code_of, code_place, codes_at, inverse_of, magnitude, number_place, rounded
from argosy.kernels.kv_scales import has_scales

UPLOADS, MAX_PAIRS = 8, 1024  # lists of pairs that may be on their way at once, and how long they may be
COPY_BYTES = 16384  # of a block that one program copies: 128 threads with eight 16-byte loads in flight each


@triton.jit(do_not_specialize_on_alignment=["slots_ptr"])  # as in `rotary`
def _store_kv_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, slots_ptr, stride_k, stride_v, k_inverse, v_inverse,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr,
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
    if SCALED:
        k = scaled(k, k_inverse)
        v = scaled(v, v_inverse)
    tl.store(k_cache_ptr + slot * WIDTH + column, k.to(k_cache_ptr.dtype.element_ty), inside)
    tl.store(v_cache_ptr + slot * WIDTH + column, v.to(v_cache_ptr.dtype.element_ty), inside)


def store_kv(
    k_TKH: Tensor,
    v_TKH: Tensor,
    k_cache_BSKH: Tensor,
    v_cache_BSKH: Tensor,
    slots_T: Tensor,
    *,
    kv_scales: tuple[float, float] = (1.0, 1.0),
) -> None:
    """One program a token. Heads of a token must be contiguous; tokens may be strided (views of a fused qkv)."""
    num_tokens, num_kv_heads, head_size = k_TKH.shape
    for x_TKH, cache_BSKH in ((k_TKH, k_cache_BSKH), (v_TKH, v_cache_BSKH)):
        assert x_TKH.stride()[1:] == (head_size, 1)
        assert cache_BSKH.shape[2:] == x_TKH.shape[1:]
        assert x_TKH.shape[0] == slots_T.shape[0]
    kv_scales = check_caches(k_cache_BSKH, v_cache_BSKH, kv_scales)
    if num_tokens and has_scales(k_cache_BSKH):
        heads, width = (tuning.next_power_of_two(size) for size in (num_kv_heads, head_size))
        _store_scaled_kernel[(num_tokens,)](
            k_TKH, v_TKH, k_cache_BSKH, v_cache_BSKH, slots_T, k_TKH.stride(0), v_TKH.stride(0), K=num_kv_heads,
            H=head_size, S=k_cache_BSKH.shape[1], HEADS=heads, WIDTH=width,
            num_warps=max(1, min(8, heads * width // 256)), **tuning.overlap(k_TKH.device),
        )  # fmt: skip
        return
    width = num_kv_heads * head_size
    block = tuning.next_power_of_two(width)
    if num_tokens:
        _store_kv_kernel[(num_tokens,)](
            k_TKH, v_TKH, k_cache_BSKH, v_cache_BSKH, slots_T, k_TKH.stride(0), v_TKH.stride(0),
            1.0 / kv_scales[0], 1.0 / kv_scales[1], SCALED=is_scaled(k_cache_BSKH, kv_scales),
            WIDTH=width, BLOCK=block, num_warps=max(1, min(8, block // 256)), **tuning.overlap(k_TKH.device),
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["slots_ptr"])
def _store_scaled_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, slots_ptr, stride_k, stride_v,
    K: tl.constexpr, H: tl.constexpr, S: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)
    dim = tl.arange(0, WIDTH)
    inside = (head < K)[:, None] & (dim < H)[None, :]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot >= 0:
        place = number_place(slot // S, slot % S, K, H, S) + head[:, None] * H + dim[None, :]
        codes = code_place(slot // S, slot % S, head, K, H, S)
        k = tl.load(k_ptr + token * stride_k + head[:, None] * H + dim[None, :], inside, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + token * stride_v + head[:, None] * H + dim[None, :], inside, other=0.0).to(tl.float32)
        k_code = code_of(tl.max(magnitude(k), 1), k_cache_ptr)
        v_code = code_of(tl.max(magnitude(v), 1), v_cache_ptr)
        tl.store(k_cache_ptr + place, rounded(k, inverse_of(k_code)[:, None], k_cache_ptr), inside)
        tl.store(v_cache_ptr + place, rounded(v, inverse_of(v_code)[:, None], v_cache_ptr), inside)
        tl.store(codes_at(k_cache_ptr) + codes, k_code.to(tl.uint8), head < K)
        tl.store(codes_at(v_cache_ptr) + codes, v_code.to(tl.uint8), head < K)


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


class _PairUploads:
    """Places, pinned and on the device, through which lists of pairs go there without a new allocation each time."""

    def __init__(self, device: torch.device):
        self.device = device
        with torch.inference_mode(False):  # made on whichever call comes first, written by all
            self._pinned = torch.zeros((UPLOADS, MAX_PAIRS, 2), dtype=torch.int64, pin_memory=True)
            self._there = torch.zeros((UPLOADS, MAX_PAIRS, 2), dtype=torch.int64, device=device)
        self._host = self._pinned.numpy()
        event: Any = torch.cuda.Event  # torch gives it no types
        self._used = [event() for _ in range(UPLOADS)]
        self._turn = 0

    def send(self, pairs: Sequence[tuple[int, int]]) -> Tensor:
        """The pairs on the device, until `UPLOADS` calls later."""
        turn = self._turn = (self._turn + 1) % UPLOADS
        self._used[turn].synchronize()  # not recorded yet, or long ago: returns at once
        count = len(pairs)
        self._host[turn, :count] = pairs
        return self._there[turn, :count].copy_(self._pinned[turn, :count], non_blocking=True)

    def launched(self) -> None:
        """The kernel that reads the last pairs is on its stream."""
        self._used[self._turn].record()


@cache
def _uploads(device: torch.device) -> _PairUploads:
    return _PairUploads(device)


def copy_blocks(sources: Sequence[Tensor], destinations: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> None:
    """All pairs of all tensors in one launch on the current device and stream.

    Tensors are contiguous [blocks, ...] with blocks of one size in bytes, a multiple of 16. Those on the host must be
    pinned (not checked: asking costs more than the copy): the kernel reads and writes them over the link by their
    address, so that a swap of one block through 64 tensors is one launch and not 64 copies. A chain (a block that is
    both read and written) is done tensor by tensor.
    """
    if not pairs or not sources:
        return
    first = sources[0]
    device = next((x.device for x in (first, destinations[0]) if x.is_cuda), first.device)
    from_pointers = tuple([x.data_ptr() for x in sources])
    to_pointers = from_pointers if destinations is sources else tuple([x.data_ptr() for x in destinations])
    if from_pointers == to_pointers and not {a for a, _ in pairs}.isdisjoint([b for _, b in pairs]):
        ids = torch.tensor(pairs, dtype=torch.int64, device=device)
        for source, destination in zip(sources, destinations, strict=True):
            destination.index_copy_(0, ids[:, 1], source.index_select(0, ids[:, 0]))
        return
    block_bytes = first.stride(0) * first.element_size()
    _check_blocks((*sources[:1], *destinations[-1:]), block_bytes)
    uploads = _uploads(device) if device.type == "cuda" and len(pairs) <= MAX_PAIRS else None
    ids = torch.tensor(pairs, dtype=torch.int64, device=device) if uploads is None else uploads.send(pairs)
    words = block_bytes // 4
    grid = (len(pairs), len(sources), triton.cdiv(words, COPY_BYTES // 4))
    addresses = _addresses(from_pointers + to_pointers, device)
    _copy_blocks_kernel[grid](addresses, ids, len(sources), words, WORDS=COPY_BYTES // 4, num_warps=4)
    if uploads is not None:
        uploads.launched()


def _check_blocks(tensors: Sequence[Tensor], block_bytes: int) -> None:
    """For one of each side: to ask 128 tensors takes longer than to launch the copy."""
    assert block_bytes % 16 == 0
    assert all(x.is_contiguous() and x.stride(0) * x.element_size() == block_bytes for x in tensors)
