"""What a CPU step is made of, each part in one pass over the numbers: the door to `cpu_steps.c`.

torch needs six operations for a norm, nine to rotate and store, and copies every row's keys and values before it
attends to them; each costs microseconds, and the copies leave the core's own cache. Its products of a few rows are half
as fast as the core is. T = tokens, D = model width, I = inputs, O = outputs.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from argosy.kernels import native

# Numbers (or multiplications, for attention) that are worth a second thread, which comes within some 5 us
SHARED_NUMBERS = 1 << 16
SHARED_PRODUCTS = 1 << 20
SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
OUTPUTS = 64  # that lie together in a packed weight
PAIRED = {torch.float32: 1, torch.bfloat16: 2}  # inputs that do
HEAD_MULTIPLE, LARGEST_HEAD = 16, 256


class _Attention(ctypes.Structure):
    """`Attention` of cpu_steps.c, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in (
            "num_tokens", "num_rows", "num_heads", "num_kv_heads", "head_size", "rotated", "block_size",
            "table_stride", "window",
        )),
        ("interleaved", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in (
            "positions_T", "slots_T", "starts_R1", "lengths_R", "table_RB", "cos_sin_PH", "qkv_TD", "k_cache",
            "v_cache", "norm_XH", "out_TD",
        )),
    )  # fmt: skip


class CpuSteps:
    """The compiled functions, for one number type."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype):
        self.dtype = dtype
        suffix, pointer, count = SUFFIXES[dtype], ctypes.c_void_p, ctypes.c_int64
        self._rms_norm = getattr(library, f"rms_norm_{suffix}")
        self._rms_norm.argtypes = (pointer,) * 4 + (count, count, ctypes.c_float, ctypes.c_int32)
        self._linear = getattr(library, f"linear_{suffix}")
        self._linear.argtypes = (pointer,) * 4 + (count,) * 3 + (ctypes.c_int32,)
        self._silu_and_mul = getattr(library, f"silu_and_mul_{suffix}")
        self._silu_and_mul.argtypes = (pointer, pointer, count, count, ctypes.c_int32)
        self._attend = getattr(library, f"attend_{suffix}")
        self._attend.argtypes = (ctypes.POINTER(_Attention),)
        for function in (self._linear, self._rms_norm, self._silu_and_mul, self._attend):
            function.restype = None

    def takes(self, x: Tensor) -> bool:
        """Whether these are rows as the functions read them."""
        return x.dtype is self.dtype and x.dim() == 2 and x.is_contiguous()

    def pack(self, weight_OI: Tensor) -> Tensor:
        """The weight as `linear` reads it: [O / 64, I, 64], in bfloat16 [O / 64, I / 2, 64, 2]; zeros fill it up."""
        num_out, num_in = weight_OI.shape
        pairs = PAIRED[self.dtype]
        num_panels = -(-num_out // OUTPUTS)
        whole = weight_OI
        if num_out % OUTPUTS:
            whole = weight_OI.new_zeros((num_panels * OUTPUTS, num_in))
            whole[:num_out] = weight_OI
        return whole.view(num_panels, OUTPUTS, num_in // pairs, pairs).transpose(1, 2).contiguous()

    def packs(self, weight_OI: Tensor) -> bool:
        """Whether it can be."""
        return weight_OI.dtype is self.dtype and weight_OI.shape[1] % PAIRED[self.dtype] == 0

    def linear(self, x_TI: Tensor, packed: Tensor, num_out: int, bias_O: Tensor | None = None) -> Tensor:
        """x W^T + bias for a weight that was packed."""
        x_TI = x_TI.contiguous()
        num_tokens, num_in = x_TI.shape
        assert x_TI.dtype is self.dtype, x_TI.dtype
        out_TO = x_TI.new_empty((num_tokens, num_out))
        self._linear(
            x_TI.data_ptr(), packed.data_ptr(), None if bias_O is None else bias_O.data_ptr(), out_TO.data_ptr(),
            num_tokens, num_in, num_out, _threads((8 + num_tokens) * num_in * num_out, SHARED_PRODUCTS),
        )  # fmt: skip
        return out_TO

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float, delta_TD: Tensor | None = None) -> Tensor:
        """A new tensor; with `delta_TD` that is added to `x_TD` in place first."""
        num_tokens, width = x_TD.shape
        out_TD = torch.empty_like(x_TD)
        self._rms_norm(
            None if delta_TD is None else delta_TD.data_ptr(), x_TD.data_ptr(), weight_D.data_ptr(), out_TD.data_ptr(),
            num_tokens, width, eps, _threads(num_tokens * width, SHARED_NUMBERS),
        )  # fmt: skip
        return out_TD

    def silu_and_mul(self, both_TX: Tensor) -> Tensor:
        """silu(gate) * up for rows [gate | up]."""
        num_tokens, width = both_TX.shape
        out_TI = both_TX.new_empty((num_tokens, width // 2))
        self._silu_and_mul(
            both_TX.data_ptr(), out_TI.data_ptr(), num_tokens, width // 2,
            _threads(num_tokens * width, SHARED_NUMBERS),
        )  # fmt: skip
        return out_TI

    def takes_heads(self, head_size: int, rotated: int) -> bool:
        """Whether heads of this size are attended to here."""
        return head_size % HEAD_MULTIPLE == 0 and head_size <= LARGEST_HEAD and rotated <= head_size

    def attend(
        self,
        qkv_TD: Tensor,
        positions_T: Tensor,
        cos_sin_PH: Tensor | None,
        k_cache_BSKH: Tensor,
        v_cache_BSKH: Tensor,
        slots_T: Tensor,
        starts_R1: Tensor,
        lengths_R: Tensor,
        table_RB: Tensor,
        *,
        num_rows: int,
        num_heads: int,
        scale: float,
        most_context: int,
        window: int | None = None,
        interleaved: bool = False,
        norm_XH: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        """Norm, rotate and store q, k and v of [q | k | v], which are spent, then attend: [T, N * H].

        Rows are as in `AttentionMetadata`; `most_context` bounds their lengths. Rows without context and tokens of no
        row give zeros.
        """
        num_tokens = qkv_TD.shape[0]
        _, block_size, num_kv_heads, head_size = k_cache_BSKH.shape
        out_TD = qkv_TD.new_empty((num_tokens, num_heads * head_size))
        work = num_tokens * most_context * num_heads * head_size
        self._attend(
            _Attention(
                num_tokens, num_rows, num_heads, num_kv_heads, head_size,
                0 if cos_sin_PH is None else cos_sin_PH.shape[1], block_size, table_RB.stride(0), window or 0,
                interleaved, _threads(work, SHARED_PRODUCTS), scale, eps, positions_T.data_ptr(), slots_T.data_ptr(),
                starts_R1.data_ptr(), lengths_R.data_ptr(), table_RB.data_ptr(),
                None if cos_sin_PH is None else cos_sin_PH.data_ptr(), qkv_TD.data_ptr(), k_cache_BSKH.data_ptr(),
                v_cache_BSKH.data_ptr(), None if norm_XH is None else norm_XH.data_ptr(), out_TD.data_ptr(),
            )
        )  # fmt: skip
        return out_TD


def open_cpu_steps(dtype: torch.dtype) -> CpuSteps | None:
    """The functions for models of this type, or None: float16, or no compiler (then seconds are not lost either)."""
    if dtype not in SUFFIXES:
        return None
    library = native.load(Path(__file__).with_name("cpu_steps.c"))
    return None if library is None else CpuSteps(library, dtype)


def _threads(work: int, worth: int) -> int:
    return torch.get_num_threads() if work >= worth else 1
