"""Products with weights of 4 or 8 bits, by the number of tokens. Meaning: `packed_reference.linear`.

    1              `packed_vector` on Hopper, where the weight has few rows; `packed_stream` where that was faster
    1 to 16        `packed_few`: bound by reading the weight; both with gate, bias and residual in one launch
    to some 100    `packed_hopper`, elsewhere `packed_many`: 16 bits are made on the way to the tensor cores
    more           the weight becomes 16 bits in memory, a slice at a time, and cuBLAS multiplies

Which of them, and in which sizes, stands in the tuned file (`tune_packed.py`) by shape and tokens.
"""

import torch
import triton
from torch import Tensor

from argosy.kernels import activation, packed_hopper, packed_stream, packed_vector, rms_norm, tuning
from argosy.kernels.packed_few import few_kernel
from argosy.kernels.packed_inputs import pick_inputs as pick_inputs
from argosy.kernels.packed_many import many_kernel, unpack_kernel
from argosy.kernels.packed_parts import ASSEMBLES, adds_pairs
from argosy.kernels.packed_reference import ROWS, PackedWeight, block_of

SMALLEST_GROUP = 32
MOST_FUSED = 16  # tokens, of `packed_few`
MANY_TOKENS = 256  # and no more are multiplied by `packed_many`, where nothing was tuned
HOPPER_TOKENS = 1024  # by `packed_hopper`
MOST_TILES = 2.5  # a multiprocessor for which `packed_vector` is faster than `packed_few`, where nothing was tuned
SLICE_BYTES = 24 << 20  # of plain weight at a time: it stays in the second-level cache
SLICE_ROWS = 64  # and a multiple of so many
FEW, MANY, SLICES, HOPPER, VECTOR, STREAM = 0, 1, 2, 3, 4, 5  # as `kernel` in the tuned sizes counts them
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def suits(weight: PackedWeight) -> bool:
    """Whether kernels multiply it as it is: groups of at least 32 inputs, scales of 16 bits."""
    return weight.group >= SMALLEST_GROUP and weight.pairs_MKR2.element_size() == 2


def can_gate(weight: PackedWeight) -> bool:
    """Whether rows of gates and rows of ups fill tiles of their own."""
    return weight.num_outputs % (2 * ROWS) == 0


def bucket(num_tokens: int) -> int:
    """The number of tokens that sizes are tuned for; 0 beyond the largest."""
    return next((size for size in BUCKETS if num_tokens <= size), 0)


def key_of(weight: PackedWeight, num_tokens: int) -> str:
    """In the tuned file."""
    kind = "" if (weight.bits, weight.group) == (4, 128) else f"_{weight.bits}g{weight.group}"
    return f"{weight.num_inputs}x{weight.num_outputs}x{bucket(num_tokens)}{kind}"


def default_sizes(weight: PackedWeight, num_tokens: int, num_sms: int) -> dict[str, int]:
    """Near what measured best on an H200 for the shapes of 8B."""
    tiles = weight.words_MUW.shape[0]
    if num_tokens <= 8 and weight.planes == 1:
        per_program = 2 if tiles >= MOST_TILES * num_sms else 1
        return {"kernel": FEW, "tiles": per_program, "split": 4, "wide": 2, "ahead": 1, "stages": 3, "prefetch": 0}
    if num_tokens <= MOST_FUSED:
        per_program, split = 2 if tiles >= 8 * num_sms else 1, 4 if tiles >= 2.5 * num_sms else 8
        return {"kernel": FEW, "tiles": per_program, "split": split, "ahead": 1, "prefetch": 32}
    if num_tokens > MANY_TOKENS // weight.planes:  # two planes are two products: 256 tokens took 25 ms a step of 8B
        return {"kernel": SLICES}
    few = num_tokens <= 64
    per_program, tokens = (4, max(16, tuning.next_power_of_two(num_tokens))) if few else (8, 128)
    programs = -(-tiles // per_program) * -(-num_tokens // tokens)
    splits = max(1, min(4, 2 * num_sms // programs))
    return {"kernel": MANY, "tiles": per_program, "tokens": tokens, "splits": splits, "stages": 4 if few else 3,
            "warps": per_program, "prefetch": 0}  # fmt: skip


def _sizes(weight: PackedWeight, x_TI: Tensor) -> tuning.Sizes:
    num_tokens, device = max(1, x_TI.shape[0]), x_TI.device
    found = tuning.pick("packed", key_of(weight, num_tokens), device) if num_tokens <= BUCKETS[-1] else None
    by_hopper = num_tokens > MOST_FUSED and packed_hopper.takes(x_TI, weight)
    by_vector = num_tokens == 1 and packed_vector.takes(x_TI, weight)
    if found is not None and (
        found["kernel"] in (FEW, MANY, SLICES)
        or (found["kernel"] == HOPPER and by_hopper)
        or (found["kernel"] == VECTOR and by_vector)
        or (found["kernel"] == STREAM and packed_stream.takes(x_TI, weight))
    ):
        return found
    num_sms = tuning.device_facts(device).num_sms
    if by_vector and weight.planes == 1 and weight.words_MUW.shape[0] <= MOST_TILES * num_sms:
        return {"kernel": VECTOR, **packed_vector.default_sizes(weight)}
    if by_hopper and num_tokens <= HOPPER_TOKENS:
        return {"kernel": HOPPER, **packed_hopper.default_sizes(weight, num_tokens, num_sms)}
    return default_sizes(weight, num_tokens, num_sms)


def adds(x_TI: Tensor, weight: PackedWeight) -> bool:
    """Whether `linear` adds to a residual without a launch of its own."""
    return x_TI.shape[0] <= MOST_FUSED or _sizes(weight, x_TI)["kernel"] != MANY


def linear(
    x_TI: Tensor,
    weight: PackedWeight,
    bias_O: Tensor | None = None,
    *,
    norm_weight_I: Tensor | None = None,
    eps: float = 1e-6,
    residual_TO: Tensor | None = None,
    gated: bool = False,
    out_TO: Tensor | None = None,
    sizes: tuning.Sizes | None = None,
) -> Tensor:
    """[T, O] of x, or of its norm; silu(gate) * up of it if `gated`, added to the residual (in place) or written to
    `out_TO` if given.

    One launch for up to `MOST_FUSED` tokens, and one for the norm where `packed_stream` doesn't make it.
    """
    num_tokens, num_in = x_TI.shape
    assert num_in == weight.num_inputs
    assert x_TI.stride(1) == 1
    assert residual_TO is None or out_TO is None
    sizes = sizes or _sizes(weight, x_TI)
    streams = sizes["kernel"] == STREAM and (not gated or can_gate(weight))
    if norm_weight_I is not None and not (streams and packed_stream.norms(norm_weight_I, x_TI, sizes)):
        x_TI, norm_weight_I = rms_norm.rms_norm(x_TI, norm_weight_I, eps), None
    num_outputs = weight.num_outputs // 2 if gated else weight.num_outputs
    made_TO = residual_TO if out_TO is None else out_TO
    if made_TO is None:
        made_TO = torch.empty((num_tokens, num_outputs), dtype=x_TI.dtype, device=x_TI.device)
    assert made_TO.stride(1) == 1
    if num_tokens == 0:
        return made_TO
    if sizes["kernel"] == FEW and (not gated or can_gate(weight)):
        return _few(x_TI, weight, bias_O, residual_TO, gated, made_TO, sizes)
    if sizes["kernel"] == VECTOR and (not gated or can_gate(weight)):
        return packed_vector.linear(x_TI, weight, bias_O, residual_TO, gated, made_TO, sizes)
    if streams:
        return packed_stream.linear(
            x_TI, weight, bias_O, residual_TO, gated, made_TO, sizes, norm_weight_I=norm_weight_I, eps=eps
        )
    if sizes["kernel"] == HOPPER and not gated:
        return packed_hopper.linear(x_TI, weight, bias_O, residual_TO is not None, made_TO, sizes)
    slice_bytes = sizes.get("slice_mb", SLICE_BYTES >> 20) << 20
    if sizes["kernel"] == SLICES and not gated and bias_O is None and residual_TO is not None:
        return _by_slices(x_TI, weight, None, made_TO, slice_bytes, adds=True)
    if gated or residual_TO is not None:
        y_TO = linear(x_TI, weight, bias_O, sizes=sizes)
        y_TO = activation.silu_and_mul(y_TO) if gated else y_TO
        if residual_TO is not None:
            return residual_TO.add_(y_TO)
        return y_TO if out_TO is None else out_TO.copy_(y_TO)
    if sizes["kernel"] == MANY:
        return _many(x_TI, weight, bias_O, made_TO, sizes)
    return _by_slices(x_TI, weight, bias_O, made_TO, slice_bytes)


def _layout(weight: PackedWeight, adds: torch.dtype | None) -> dict[str, int | bool]:
    """`adds`: numbers of this type are added on the way; None: fields are only brought to their places."""
    block = block_of(weight.group)
    return {
        "UNITS": block // 64, "HALVES": block // weight.group, "PLANES": weight.planes,
        "HALF_SCALES": weight.pairs_MKR2.dtype == torch.float16,
        "ASM": ASSEMBLES if adds is None else adds_pairs(adds, weight.words_MUW.device),
    }  # fmt: skip


def _blocks(weight: PackedWeight) -> int:
    """Of all planes."""
    return weight.words_MUW.shape[1] * 64 // block_of(weight.group)


def _few(
    x_TI: Tensor, weight: PackedWeight, bias_O: Tensor | None, residual_TO: Tensor | None, gated: bool,
    out_TO: Tensor, sizes: tuning.Sizes,
) -> Tensor:  # fmt: skip
    num_tokens, num_in = x_TI.shape
    words, blocks = weight.words_MUW, _blocks(weight) // weight.planes
    assert num_tokens <= MOST_FUSED
    assert not gated or can_gate(weight)
    tiles = max(2, sizes["tiles"]) if gated else sizes["tiles"]
    wide = sizes.get("wide", 1)
    even = blocks % (sizes["split"] * wide) == 0 and num_in % block_of(weight.group) == 0
    few_kernel[(triton.cdiv(words.shape[0], tiles),)](
        x_TI, words, weight.pairs_MKR2.view(torch.int32), out_TO if bias_O is None else bias_O,
        out_TO, out_TO, num_tokens, num_in, out_TO.shape[1], words.shape[0], blocks, x_TI.stride(0), out_TO.stride(0),
        **_layout(weight, x_TI.dtype if weight.planes > 1 else None), SPLIT=sizes["split"], TILES=tiles, WIDE=wide,
        TOKENS=8 if num_tokens <= 8 else 16,
        AHEAD=bool(sizes["ahead"]), STAGES=sizes.get("stages", 3), EARLY=bool(sizes.get("early", 0)), EVEN=even,
        BIAS=bias_O is not None, GATED=gated, RESIDUAL=residual_TO is not None,
        PREFETCH=sizes.get("prefetch", 0) if ASSEMBLES else 0, num_warps=sizes["split"], **tuning.overlap(x_TI.device),
    )  # fmt: skip
    return out_TO


def _many(
    x_TI: Tensor, weight: PackedWeight, bias_O: Tensor | None, out_TO: Tensor, sizes: tuning.Sizes
) -> Tensor:  # fmt: skip
    num_tokens, num_in = x_TI.shape
    words, blocks = weight.words_MUW, _blocks(weight)
    tiles, tokens = sizes["tiles"], sizes["tokens"]
    grid = (triton.cdiv(num_tokens, tokens), triton.cdiv(words.shape[0], tiles))
    splits = sizes["splits"] if grid[0] * grid[1] <= tuning.MAX_COUNTERS else 1
    splits = triton.cdiv(blocks, triton.cdiv(blocks, splits))  # no piece is empty
    part, counters = out_TO, out_TO
    if splits > 1:
        size = grid[0] * grid[1] * splits * tiles * ROWS * tokens
        part = torch.empty(size, dtype=torch.float32, device=x_TI.device)
        counters = tuning.counters(x_TI.device)
    many_kernel[(*grid, splits)](
        x_TI, words, weight.pairs_MKR2.view(torch.int32), out_TO if bias_O is None else bias_O, out_TO, part, counters,
        num_tokens, num_in, weight.num_outputs, words.shape[0], blocks, x_TI.stride(0), out_TO.stride(0),
        **_layout(weight, x_TI.dtype), TILES=tiles, TOKENS=tokens, WARPS=sizes["warps"], SPLITS=splits,
        STAGES=sizes["stages"], SYNC=bool(sizes.get("sync", 1)),
        EVEN=num_in % block_of(weight.group) == 0, BIAS=bias_O is not None, EARLY=bool(sizes.get("early", 0)),
        PREFETCH=sizes.get("prefetch", 0) if ASSEMBLES else 0, num_warps=sizes["warps"], **tuning.overlap(x_TI.device),
    )  # fmt: skip
    return out_TO


def unpack_rows(weight: PackedWeight, first: int, out_RI: Tensor) -> Tensor:
    """Rows of the weight from `first` (a multiple of 16) on in 16 bits, as many as `out_RI` has."""
    assert first % ROWS == 0
    words, blocks = weight.words_MUW, _blocks(weight)
    unpack_kernel[(triton.cdiv(out_RI.shape[0], 2 * ROWS), blocks // weight.planes)](
        words, weight.pairs_MKR2.view(torch.int32), out_RI, weight.num_inputs, words.shape[0], blocks, first // ROWS,
        out_RI.shape[0], out_RI.stride(0), **_layout(weight, None), FP16=out_RI.dtype == torch.float16, TILES=2,
        num_warps=4,
    )  # fmt: skip
    return out_RI


def _by_slices(
    x_TI: Tensor, weight: PackedWeight, bias_O: Tensor | None, out_TO: Tensor, slice_bytes: int, *, adds: bool = False
) -> Tensor:  # fmt: skip
    num_rows, num_in = weight.num_outputs, weight.num_inputs
    rows = max(1, slice_bytes // (num_in * x_TI.element_size()) // SLICE_ROWS) * SLICE_ROWS
    plain = torch.empty((min(rows, num_rows), num_in), dtype=x_TI.dtype, device=x_TI.device)
    for first in range(0, num_rows, rows):
        some = unpack_rows(weight, first, plain[: min(rows, num_rows - first)])
        last = first + some.shape[0]
        if adds:
            out_TO[:, first:last].addmm_(x_TI, some.t())
        elif bias_O is None:
            torch.mm(x_TI, some.t(), out=out_TO[:, first:last])
        else:
            torch.addmm(bias_O[first:last], x_TI, some.t(), out=out_TO[:, first:last])
    return out_TO
