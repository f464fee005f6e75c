"""The layers of a stage for one token where weights are e4m3: five launches each, every product rounds for itself.

Only where this GPU's file has sizes for all products of a layer (`kernels/fp8_one.py` says what a launch does). The
residual goes from buffer to buffer: while a product reads the old one, its first program writes the new one.
D = model width, X = width of q, k and v.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from argosy.kernels import tuning
from argosy.kernels.fp8_reference import Fp8Weight
from argosy.placement.process_groups import ParallelContext
from argosy.workers.forward_context import ForwardContext
from argosy.workers.layers.linear import ParallelLinear
from argosy.workers.layers.norm import RMSNorm
from argosy.workers.quantization.fp8 import Fp8Method

if TYPE_CHECKING:  # it imports this file
    from argosy.workers.models.decoder import DecoderLayer


class Fp8OneToken:
    """The sizes of a layer's products: q, k and v; o; gate and up; down."""

    def __init__(self, sizes: Sequence[tuning.Sizes]):
        from argosy.kernels import fp8_one  # Triton, which a CPU host has no need of

        self._kernels, self._sizes = fp8_one, list(sizes)

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

        `next_norms`: for each layer the one that is behind it.
        """
        linear, (qkv, o, gate_up, down) = self._kernels.linear, self._sizes
        parts_P1D: Tensor | None = None
        for layer in layers:
            attention, mlp, norm = layer.attention, layer.mlp, layer.input_norm
            if parts_P1D is not None:
                made_1D = torch.empty_like(residual_1D)
                qkv_1X = linear(
                    residual_1D, weight_of(attention.qkv_proj), attention.qkv_proj.bias, qkv,
                    norm=(norm.weight, norm.eps), parts_P1I=parts_P1D, kept_1I=made_1D,
                )  # fmt: skip
                residual_1D = made_1D
            shape = dataclasses.replace(attention.shape, beside_rings=True)
            seen_1X = attention.attend(qkv_1X, positions_1, ctx, shape)
            parts_P1D = linear(seen_1X, weight_of(attention.o_proj), None, o).view(-1, *residual_1D.shape)
            made_1D, norm = torch.empty_like(residual_1D), layer.mlp_norm
            inner_1X = linear(
                residual_1D, weight_of(mlp.gate_up_proj), mlp.gate_up_proj.bias, gate_up, gated=True,
                norm=(norm.weight, norm.eps), parts_P1I=parts_P1D, kept_1I=made_1D,
            )  # fmt: skip
            residual_1D = made_1D
            parts_P1D = linear(inner_1X, weight_of(mlp.down_proj), None, down).view(-1, *residual_1D.shape)
        assert parts_P1D is not None
        delta_1D, last = parts_P1D.sum(0).to(residual_1D.dtype), next_norms[-1]
        return residual_1D.add_(delta_1D) if last is None else last.add(delta_1D, residual_1D)


def weight_of(product: ParallelLinear) -> Fp8Weight:
    """The e4m3 weight of a product that has one."""
    assert isinstance(product.method, Fp8Method)
    assert product.method.stored is not None
    return product.method.stored


def open_fp8_one_token(
    parallel: ParallelContext, layers: "Sequence[DecoderLayer]", *, width: int, dtype: torch.dtype
) -> Fp8OneToken | None:
    """For these layers once they are loaded, or None: one is of another kind, or nothing was measured here."""
    if parallel.device.type != "cuda" or parallel.tp_size > 1 or dtype.itemsize != 2 or not layers:
        return None
    found: list[tuning.Sizes] = []
    for layer in layers:
        attention, mlp = layer.attention, layer.mlp
        products = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
        if not mlp.is_silu or any(type(norm) is not RMSNorm for norm in (layer.input_norm, layer.mlp_norm)):
            return None
        for product, adds in zip(products, (False, True, False, True), strict=True):
            method = product.method
            if not isinstance(method, Fp8Method) or not method.rounds_by_row or (adds and product.has_bias):
                return None
        if not found:
            found = _sizes_of(products, parallel.device) or []
    return Fp8OneToken(found) if found else None


def _sizes_of(products: Sequence[ParallelLinear], device: torch.device) -> list[tuning.Sizes] | None:
    """Of all of them, if they were measured and can be launched."""
    from argosy.kernels import fp8_one

    found = []
    for product in products:
        num_outputs, num_inputs = weight_of(product).values_OI.shape
        sizes = tuning.pick("fp8_one", f"{num_inputs}x{num_outputs}", device)
        if sizes is None or not fp8_one.takes(weight_of(product), sizes):
            return None
        found.append(sizes)
    return found
