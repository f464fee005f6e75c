"""The layers of a stage for a few tokens: a launch for attention and one for all that is behind it, up to the next one.

As `layer_chain`, for up to `rows_chain.TOKENS` tokens at once (`kernels/rows_chain.py`), only where this GPU's file has
sizes for a rank's widths. T = tokens, D = model width, X = width of q, k and v.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from argosy.kernels import tuning
from argosy.placement.process_groups import ParallelContext
from argosy.workers.forward_context import ForwardContext
from argosy.workers.layers.fp8_one_token import Fp8OneToken, open_fp8_one_token
from argosy.workers.layers.layer_chain import LayerChain, are_plain, open_layer_chain
from argosy.workers.layers.norm import RMSNorm

if TYPE_CHECKING:  # it imports this file
    from argosy.workers.models.decoder import DecoderLayer

ONES = -1  # all bits: nobody wrote here yet


class RowsChain:
    """The words of one rank, and the launches. All ranks of the group make the same calls in the same order."""

    def __init__(self, parallel: ParallelContext, sizes: tuning.Sizes, *, width: int, inner: int):
        """Collective over a group."""
        from argosy.kernels import rows_chain  # Triton, which a CPU host has no need of

        self._kernels, self._sizes, self._rank = rows_chain, sizes, parallel.rank.tp_rank
        device, num_bytes = parallel.device, 4 * rows_chain.inbox_words(parallel.tp_size, width)
        if parallel.tp_size > 1:
            self._shared = parallel.shared_buffer(num_bytes)  # kept, since it holds the peers' memory open
            self._bases_W = self._shared.addresses_W
        else:
            self._own = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
            self._bases_W = torch.tensor([self._own.data_ptr()], dtype=torch.int64, device=device)
        self._boxes = torch.full((2 * rows_chain.box_words(width, inner),), ONES, dtype=torch.int32, device=device)
        programs = tuning.device_facts(device).num_sms * sizes["per_sm"]
        self._counters = torch.zeros(programs, dtype=torch.int32, device=device)

    def takes(self, num_tokens: int) -> bool:
        """Whether so many tokens go through it, faster than otherwise."""
        least, most = self._sizes.get("least", 2), self._sizes.get("most", self._kernels.TOKENS)
        return bool(least <= num_tokens <= most)

    def through(
        self,
        layers: "Iterable[DecoderLayer]",
        next_norms: Sequence[RMSNorm | None],
        qkv_TX: Tensor,
        residual_TD: Tensor,
        positions_T: Tensor,
        ctx: ForwardContext,
    ) -> Tensor:
        """From the first layer's q, k and v to what comes behind the last one: normed, or without a norm the residual.

        `next_norms`: for each layer the one that is behind it. `residual_TD` is updated in place.
        """
        stack = list(layers)
        for number, (layer, norm) in enumerate(zip(stack, next_norms, strict=True)):
            shape = layer.attention.shape
            if self._sizes.get("lean", 0):
                shape = dataclasses.replace(shape, is_packed=True)
            seen_TS = layer.attention.attend(qkv_TX, positions_T, ctx, shape)
            after = stack[number + 1].attention.qkv_proj if number + 1 < len(stack) else None
            o, gate_up, down = layer.attention.o_proj.weight, layer.mlp.gate_up_proj.weight, layer.mlp.down_proj.weight
            assert o is not None
            assert gate_up is not None
            assert down is not None
            out_TX, own_norm = None, (layer.mlp_norm.weight, layer.mlp_norm.eps)
            if after is not None:
                size = (len(residual_TD), after.num_out_own)
                out_TX = torch.empty(size, dtype=residual_TD.dtype, device=residual_TD.device)
            self._kernels.chain(
                seen_TS, (o, gate_up, down, None if after is None else after.weight),
                (own_norm, None if norm is None else (norm.weight, norm.eps)),
                None if after is None else after.bias, residual_TD, out_TX, self._bases_W, self._boxes, self._counters,
                self._rank, self._sizes, inbox_at=0,
            )  # fmt: skip
            if out_TX is not None:
                qkv_TX = out_TX
        last = next_norms[-1]
        return residual_TD if last is None else last(residual_TD)


Chain = LayerChain | RowsChain | Fp8OneToken


def open_rows_chain(
    parallel: ParallelContext, layers: "Sequence[DecoderLayer]", *, width: int, dtype: torch.dtype
) -> RowsChain | None:
    """For these layers, or None where one of them is of another kind or nothing was measured; alike on all ranks."""
    if not are_plain(parallel, layers, dtype):
        return None
    first = layers[0]
    seen, inner = first.attention.o_proj.share, first.mlp.down_proj.share
    sizes = tuning.pick("rows_chain", f"{width}x{seen}x{inner}x{parallel.tp_size}", parallel.device)
    if sizes is None:
        return None
    from argosy.kernels import layer_chain, rows_chain

    programs = (tuning.device_facts(parallel.device).num_sms - sizes.get("spare", 0)) * sizes["per_sm"]
    qkv = first.attention.qkv_proj.num_out_own
    if not layer_chain.RUNS_HERE or not rows_chain.suits(seen, width, inner, qkv, parallel.tp_size, sizes, programs):
        return None
    return RowsChain(parallel, sizes, width=width, inner=inner)


def open_chains(
    parallel: ParallelContext, layers: "Sequence[DecoderLayer]", width: int, dtype: torch.dtype
) -> list[Chain]:
    """All there are for these layers, what takes more tokens first. Collective over a group."""
    kinds = (open_rows_chain, open_layer_chain, open_fp8_one_token)
    opened = [opens(parallel, layers, width=width, dtype=dtype) for opens in kinds]
    return [chain for chain in opened if chain is not None]
