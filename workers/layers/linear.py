"""Weights split by column or by row over the tensor-parallel group.

A column-parallel layer has a share of the outputs of each of its parts (q, k, v; gate, up), side by side in one weight,
so that they are one product. A row-parallel layer has a share of the inputs and sums its outputs over the group: with
one after the other, a block needs one all-reduce for attention and one for the MLP.

T = tokens, I = inputs of this rank, O = outputs of this rank.
"""

import torch
from torch import Tensor

from argosy.kernels import norm_ahead, ops
from argosy.kernels.fp8_reference import Fp8Rows, Rounding
from argosy.kernels.norm_ahead import NormAhead
from argosy.placement.process_groups import ParallelContext
from argosy.workers.quantization.base import Cut, Fusion, LinearLayer, LinearMethod
from argosy.workers.quantization.fp8 import Fp8Method

ALL = slice(None)


class ParallelLinear(LinearLayer):
    """A linear layer that has a part of a weight. Made of `parts`: name in `cuts` -> (rows in the file, our rows)."""

    def __init__(self, method: LinearMethod, num_in: int, num_out: int, *, bias: bool, dtype: torch.dtype):
        super().__init__()
        self.method = method
        self._made_of = (num_in, num_out, bias, dtype)
        method.create(self, num_in, num_out, bias=bias, dtype=dtype)

    def use(self, method: LinearMethod) -> None:
        """Another format instead, before anything is loaded."""
        self.method = method
        num_in, num_out, bias, dtype = self._made_of
        method.create(self, num_in, num_out, bias=bias, dtype=dtype)

    def cuts(self, part: str) -> dict[str, Cut]:
        """The tensors that the checkpoint must hold for `part`, by the last word of their names."""
        raise NotImplementedError

    def finish(self) -> None:
        """All parts are loaded."""
        self.method.finish(self)

    def rounding(self, x_TX: Tensor) -> Rounding | None:
        """How inputs as many as the rows of `x_TX` may come rounded; None: not at all."""
        return self.method.rounding(self, x_TX)

    def forward(self, x_TI: Tensor | Fp8Rows) -> Tensor:
        """x W^T + bias, of this rank's part."""
        return self.method.apply(self, x_TI)

    def fused(self, x_TI: Tensor, fusion: Fusion) -> Tensor:
        """The same, with what stands before and after it in one launch; no sum over the group."""
        return self.method.apply_fused(self, x_TI, fusion)

    def gated(self, x_TI: Tensor | Fp8Rows) -> Tensor | None:
        """silu(gate) times up of [gate | up] = x W^T + bias, where one launch for both was measured to be better."""
        if isinstance(self.method, Fp8Method) and not isinstance(x_TI, Tensor):
            return self.method.gated(self, x_TI)
        return None

    def norm_ahead(
        self, following: "ParallelLinear", residual_TD: Tensor, norm_weight_D: Tensor, eps: float
    ) -> NormAhead | None:
        """Room for the norm between this product and the one that follows, if both do without a launch for it."""
        weight, next_weight = self.weight, following.weight
        if weight is None or next_weight is None or not weight.dtype == next_weight.dtype == residual_TD.dtype:
            return None
        return norm_ahead.between(residual_TD, weight, next_weight, norm_weight_D, eps)

    def product(self, x_TI: Tensor) -> Tensor:
        """x W^T + bias of this rank's part, the fastest way; no sum over the group."""
        if self.method.fuses(self, x_TI):
            return self.method.apply_fused(self, x_TI, Fusion())
        return self.method.apply(self, x_TI)

    def part(self, x_TI: Tensor, out_TO: Tensor, *, in_pieces: bool = False) -> Tensor | None:
        """x W^T + bias of this rank's part, the fastest way, written to `out_TO`.

        With `in_pieces` it may give what adds up to it instead, float32 [P, T, O], for `GroupSum.add_norm`.
        """
        if self.method.fuses(self, x_TI):
            made_TO = self.method.apply_fused(self, x_TI, Fusion(out_TO=out_TO, in_pieces=in_pieces))
            if made_TO.dim() == 3:
                return made_TO
        elif self.weight is not None and self.weight.dtype == x_TI.dtype:
            made_TO = ops.linear_into(x_TI, self.weight, self.bias, out_TO)
        else:
            made_TO = self.method.apply(self, x_TI)
        if made_TO is not out_TO:
            out_TO.copy_(made_TO)
        return None

    @property
    def num_out_own(self) -> int:
        """Outputs of this rank."""
        return self._made_of[1]


class MergedColumnParallelLinear(ParallelLinear):
    """Several projections of the same input, each cut by outputs, stored one below the other."""

    def __init__(
        self,
        parallel: ParallelContext,
        method: LinearMethod,
        num_in: int,
        parts: dict[str, int],
        *,
        bias: bool,
        dtype: torch.dtype,
    ):
        tp_size, tp_rank = parallel.tp_size, parallel.rank.tp_rank
        self.num_in, self.has_bias = num_in, bias
        self.rows: dict[str, tuple[int, slice, slice]] = {}
        at = 0
        for name, num_out in parts.items():
            share = num_out // tp_size
            self._add_part(name, num_out, tp_rank * share, share, at)
            at += share
        super().__init__(method, num_in, at, bias=bias, dtype=dtype)

    def _add_part(self, name: str, full: int, first: int, count: int, at: int) -> None:
        self.rows[name] = (full, slice(first, first + count), slice(at, at + count))

    def cuts(self, part: str) -> dict[str, Cut]:
        """Rows of `part` that belong to this rank."""
        full, source, target = self.rows[part]
        found = self.method.cuts(Cut((full, self.num_in), (source, ALL), target))
        if self.has_bias:
            found["bias"] = Cut((full,), (source,), target)
        return found


class ColumnParallelLinear(MergedColumnParallelLinear):
    """One projection, cut by outputs."""

    def __init__(
        self,
        parallel: ParallelContext,
        method: LinearMethod,
        num_in: int,
        num_out: int,
        *,
        bias: bool,
        dtype: torch.dtype,
    ):
        super().__init__(parallel, method, num_in, {"": num_out}, bias=bias, dtype=dtype)


class QKVParallelLinear(MergedColumnParallelLinear):
    """q, k and v in one product. With more ranks than key/value heads, neighbours hold copies of the same head."""

    def __init__(
        self,
        parallel: ParallelContext,
        method: LinearMethod,
        num_in: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        *,
        bias: bool,
        dtype: torch.dtype,
    ):
        tp_size, tp_rank = parallel.tp_size, parallel.rank.tp_rank
        self.kv_scales = (1.0, 1.0)  # what keys and values are divided by in an e4m3 cache
        self.num_heads = num_heads // tp_size
        self.num_kv_heads = max(1, num_kv_heads // tp_size)
        first_kv_head = tp_rank * num_kv_heads // tp_size
        self.num_in, self.has_bias, self.rows = num_in, bias, {}
        q, kv = self.num_heads * head_size, self.num_kv_heads * head_size
        self._add_part("q", num_heads * head_size, tp_rank * q, q, 0)
        self._add_part("k", num_kv_heads * head_size, first_kv_head * head_size, kv, q)
        self._add_part("v", num_kv_heads * head_size, first_kv_head * head_size, kv, q + kv)
        ParallelLinear.__init__(self, method, num_in, q + 2 * kv, bias=bias, dtype=dtype)


class RowParallelLinear(ParallelLinear):
    """One projection, cut by inputs; the outputs are summed over the group. The bias is added once, by rank 0."""

    def __init__(
        self,
        parallel: ParallelContext,
        method: LinearMethod,
        num_in: int,
        num_out: int,
        *,
        bias: bool,
        dtype: torch.dtype,
    ):
        self.parallel, self.num_in, self.num_out, self.has_bias = parallel, num_in, num_out, bias
        self.share = num_in // parallel.tp_size
        super().__init__(method, self.share, num_out, bias=bias and parallel.rank.tp_rank == 0, dtype=dtype)

    def cuts(self, part: str) -> dict[str, Cut]:
        """Columns that belong to this rank."""
        first = self.parallel.rank.tp_rank * self.share
        found = self.method.cuts(Cut((self.num_out, self.num_in), (ALL, slice(first, first + self.share))))
        if self.has_bias:
            found["bias"] = Cut((self.num_out,), (ALL,))
        return found

    def forward(self, x_TI: Tensor | Fp8Rows) -> Tensor:
        """x W^T summed over the group, + bias."""
        return self.parallel.all_reduce(self.method.apply(self, x_TI))

    def pieces(self, x_TI: Tensor | Fp8Rows) -> Tensor:
        """The same for `RMSNorm.add_rounded` to add to a residual: maybe float32 [P, T, O], the pieces of a sum."""
        if self.parallel.tp_size == 1 and isinstance(self.method, Fp8Method):
            return self.method.apply(self, x_TI, pieces=True)
        return self(x_TI)  # type: ignore[no-any-return]  # a module's call is Any


class ReplicatedLinear(ParallelLinear):
    """The whole weight on every rank."""

    def __init__(self, method: LinearMethod, num_in: int, num_out: int, *, bias: bool, dtype: torch.dtype):
        self.num_in, self.num_out, self.has_bias = num_in, num_out, bias
        super().__init__(method, num_in, num_out, bias=bias, dtype=dtype)

    def cuts(self, part: str) -> dict[str, Cut]:
        """All of it."""
        found = self.method.cuts(Cut((self.num_out, self.num_in), (ALL, ALL)))
        if self.has_bias:
            found["bias"] = Cut((self.num_out,), (ALL,))
        return found
