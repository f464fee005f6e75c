"""The layers of a stage for one token: a launch for attention and one for all that is behind it, up to the next one.

Only where this GPU's file has sizes for a rank's widths (`kernels/layer_chain.py` says what the launch does). Between
the products it holds, numbers go as words with the turn they belong to through memory that all ranks address.
D = model width, X = width of q, k and v.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from argosy.kernels import tuning
from argosy.placement.process_groups import ParallelContext
from argosy.placement.switches import read_switch
from argosy.workers.forward_context import ForwardContext
from argosy.workers.layers.norm import RMSNorm
from argosy.workers.quantization.base import UnquantizedMethod

if TYPE_CHECKING:  # it imports this file
    from argosy.workers.models.decoder import DecoderLayer


COMPARED_RANKS = 4  # of a group on cards: what `tune_chain.py --check` and `check_chain.py` were run over


class LayerChain:
    """The words of one rank, and the launches. All ranks of the group make the same calls in the same order."""

    def __init__(self, parallel: ParallelContext, sizes: tuning.Sizes, *, width: int, inner: int):
        """Collective over a group."""
        from argosy.kernels import layer_chain  # Triton, which a CPU host has no need of

        self._kernels, self._sizes, self._rank = layer_chain, sizes, parallel.rank.tp_rank
        device, num_bytes = parallel.device, 4 * layer_chain.inbox_words(parallel.tp_size, width)
        if parallel.tp_size > 1:
            self._shared = parallel.shared_buffer(num_bytes)  # kept, since it holds the peers' memory open
            self._bases_W = self._shared.addresses_W
        else:
            self._own = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
            self._bases_W = torch.tensor([self._own.data_ptr()], dtype=torch.int64, device=device)
        self._inner_I = torch.zeros(inner, dtype=torch.int32, device=device)
        programs = tuning.device_facts(device).num_sms * sizes["per_sm"]
        self._counters = torch.zeros(programs, dtype=torch.int32, device=device)

    def takes(self, num_tokens: int) -> bool:
        """One, and no more."""
        return num_tokens == 1

    def through(
        self,
        layers: "Iterable[DecoderLayer]",
        next_norms: Sequence[RMSNorm | None],
        qkv_1X: Tensor,
        residual_1D: Tensor,
        positions_1: Tensor,
        ctx: ForwardContext,
    ) -> Tensor:
        """From the first layer's q, k and v to what comes behind the last one: normed, or without a norm the residual.

        `next_norms`: for each layer the one that is behind it. `residual_1D` is updated in place.
        """
        stack = list(layers)
        for number, (layer, norm) in enumerate(zip(stack, next_norms, strict=True)):
            shape = layer.attention.shape
            if self._sizes.get("lean", 0):
                shape = dataclasses.replace(shape, is_packed=True)
            seen_1S = layer.attention.attend(qkv_1X, positions_1, ctx, shape)
            after = stack[number + 1].attention.qkv_proj if number + 1 < len(stack) else None
            out_1X = residual_1D
            if after is not None:
                out_1X = torch.empty((1, after.num_out_own), dtype=residual_1D.dtype, device=residual_1D.device)
            elif norm is not None:
                out_1X = torch.empty_like(residual_1D)
            o, gate_up, down = layer.attention.o_proj.weight, layer.mlp.gate_up_proj.weight, layer.mlp.down_proj.weight
            assert o is not None
            assert gate_up is not None
            assert down is not None
            qkv_1X = self._kernels.chain(
                seen_1S, (o, gate_up, down, None if after is None else after.weight),
                ((layer.mlp_norm.weight, layer.mlp_norm.eps), None if norm is None else (norm.weight, norm.eps)),
                None if after is None else after.bias, residual_1D, out_1X, self._bases_W, self._inner_I,
                self._counters, self._rank, self._sizes, inbox_at=0,
            )  # fmt: skip
        return qkv_1X


def is_wanted(num_ranks: int) -> bool:
    """For a group of so many; ARGOSY_LAYER_CHAIN says 0 or 1 for who wants to measure without it or beyond that."""
    asked = read_switch("ARGOSY_LAYER_CHAIN")
    return num_ranks <= COMPARED_RANKS if asked is None else asked


def open_layer_chain(
    parallel: ParallelContext, layers: "Sequence[DecoderLayer]", *, width: int, dtype: torch.dtype
) -> LayerChain | None:
    """For these layers, or None where one of them is of another kind or nothing was measured; alike on all ranks."""
    device = parallel.device
    if device.type != "cuda" or dtype.itemsize != 2 or not layers or not is_wanted(parallel.tp_size):
        return None
    if parallel.tp_size > 1 and not parallel.shares_memory:
        return None
    for layer in layers:
        attention, mlp = layer.attention, layer.mlp
        products = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
        if not mlp.is_silu or any(type(product.method) is not UnquantizedMethod for product in products):
            return None
        if any(product.has_bias for product in products[1:]):
            return None
    first = layers[0]
    seen, inner = first.attention.o_proj.share, first.mlp.down_proj.share
    sizes = tuning.pick("layer_chain", f"{width}x{seen}x{inner}x{parallel.tp_size}", device)
    if sizes is None:
        return None
    from argosy.kernels import layer_chain

    programs = tuning.device_facts(device).num_sms * sizes["per_sm"]
    qkv = first.attention.qkv_proj.num_out_own
    if not layer_chain.RUNS_HERE or not layer_chain.suits(seen, width, inner, qkv, sizes, programs):
        return None
    return LayerChain(parallel, sizes, width=width, inner=inner)
