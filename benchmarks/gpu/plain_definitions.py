"""Every operation of a model by its definition in plain torch, in the numbers of its inputs: what kernels are held to.

`plain_torch` puts the definitions of `kernels.reference`, `moe_reference`, `mla_reference` and `fp8_reference` where
models look for operations; `remembered` keeps which experts were chosen, so that the definitions take the same.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from argosy.kernels import (
    fp8_ops,
    fp8_reference,
    mla_ops,
    mla_reference,
    moe_ops,
    moe_reference,
    mxfp4,
    ops,
    packed_linear,
    packed_reference,
    reference,
)


def of_groups(method: Any) -> Tensor:
    """What a linear layer of whole numbers means, inputs in their own order."""
    made = packed_reference.dequantize(method._weight).float()
    order = method._order_J
    return made if order is None else torch.empty_like(made).index_copy_(1, order.long(), made)


def unpacked(values: Tensor, scale: Tensor) -> Tensor:
    """What numbers of 4 or 8 bits mean; a scale for 32 of a row, for 128 x 128, or for a row."""
    if values.dtype == torch.uint8:
        return mxfp4.unpack(values.unflatten(-1, (-1, mxfp4.BLOCK // 2)), scale, torch.float32)
    for axis in (-2, -1) if scale.ndim == values.ndim else ():
        scale = scale.repeat_interleave(128, axis).narrow(axis, 0, values.shape[axis])
    return values.float() * (scale if scale.ndim == values.ndim else scale[..., None])


def plain_experts(x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, **options: Any) -> Tensor:
    """By definition; more than one row of experts in e4m3 are rounded before both products, as DeepSeek's are."""
    is_e4m3 = isinstance(gate_up, Tensor) and gate_up.dtype == fp8_reference.E4M3
    if not is_e4m3 or len(x) == 1 or x.itemsize != 2:
        return moe_reference.experts(x, gate_up, down, ids, weights, **options)

    def rounded(rows: Tensor) -> Tensor:
        return fp8_reference.dequantize_rows(fp8_reference.quantize_rows(rows, fp8_reference.Rounding(128)), rows.dtype)

    x, out = rounded(x), torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in set(ids.flatten().tolist()) - {-1}:
        tokens, places = torch.where(ids == expert)
        both, last = (
            unpacked(weight[expert], options[f"{name}_scale"][expert])
            for name, weight in (("gate_up", gate_up), ("down", down))
        )
        made = moe_reference.swiglu((x[tokens].float() @ both.t()).to(x.dtype))
        out.index_add_(0, tokens, (rounded(made).float() @ last.t()) * weights[tokens, places, None])
    return out.to(x.dtype)


def plain_fp8(
    x: Tensor, weight: Any, bias: Tensor | None = None, *, rounding: Any = None, norm_weight_I: Tensor | None = None,
    eps: float = 1e-6, residual_TO: Tensor | None = None, gated: bool = False, out_TO: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`fp8_ops.fused_linear` by definition; rows are rounded where they are on the card."""
    if rounding is None or fp8_ops.is_few(x, weight):
        made = fp8_reference.fused_linear(x, weight, bias, norm_weight_I=norm_weight_I, eps=eps, gated=gated)
    else:
        x = x if norm_weight_I is None else reference.rms_norm(x, norm_weight_I, eps)
        made = fp8_reference.linear(fp8_reference.quantize_rows(x, rounding), weight, bias, x.dtype)
        made = reference.silu_and_mul(made) if gated else made
    if out_TO is not None:
        return out_TO.copy_(made)
    return made if residual_TO is None else residual_TO.add_(made)


def plain_int(
    x: Tensor, weight: Any, bias: Tensor | None = None, *, residual_TO: Tensor | None = None, gated: bool = False,
    out_TO: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`packed_linear.linear` by definition."""
    made = packed_reference.linear(x, weight, bias)
    made = reference.silu_and_mul(made) if gated else made
    if out_TO is not None:
        return out_TO.copy_(made)
    return made if residual_TO is None else residual_TO.add_(made)


@contextmanager
def plain_torch(choices: Iterator[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Every operation by its definition, experts as they were chosen before."""

    def by_definition(definition: Callable[..., Tensor]) -> Callable[..., Tensor]:
        known = inspect.signature(definition).parameters  # bounds and hints for launches are no part of a meaning

        def run(*args: Any, **options: Any) -> Tensor:
            out = options.pop("out_RNH", options.pop("out_TNH", options.pop("out_TD", None)))
            made = definition(*args, **{key: value for key, value in options.items() if key in known})
            return made if out is None else out.copy_(made)

        return run

    def drop_hints(definition: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, average: int | None = None, out_TD: Tensor | None = None, **options: Any) -> Tensor:
            made = definition(*args, **options)
            return made if out_TD is None else out_TD.copy_(made)

        return run

    replaced: list[tuple[Any, str, Any]] = [
        (ops, name, by_definition(getattr(reference, name)))
        for name in (
            "rms_norm", "add_rms_norm", "silu_and_mul", "gelu_and_mul", "apply_rotary", "rope_and_store",
            "paged_attention", "decode_attention", "prefill_attention", "fused_linear", "store_kv", "linear_into",
            "measured_linear", "embed_share",
        )
    ]  # fmt: skip
    replaced += [(mla_ops, name, by_definition(getattr(mla_reference, name))) for name in ("store_latent", "decode")]
    replaced += [(moe_ops, "experts", drop_hints(plain_experts))]
    replaced += [(fp8_ops, "fused_linear", plain_fp8), (packed_linear, "linear", plain_int)]
    replaced += [
        (fp8_ops, name, getattr(fp8_reference, name))
        for name in ("quantize_rows", "norm_and_quantize", "gate_and_quantize", "linear")
    ]
    replaced += [(moe_ops, "choose_experts", lambda *args, **options: next(choices))]
    kept = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    for module, name, definition in replaced:
        setattr(module, name, definition)
    try:
        yield
    finally:
        for module, name, before in kept:
            setattr(module, name, before)


@contextmanager
def remembered(choices: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Keep which experts were chosen."""
    choose = moe_ops.choose_experts

    def run(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        choices.append(choose(*args, **options))
        return choices[-1]

    moe_ops.choose_experts = run
    try:
        yield
    finally:
        moe_ops.choose_experts = choose
