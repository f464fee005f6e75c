"""From a `ModelSpec` to a `ModelShape`: the matrices behind the facts, for every family that the protocol knows."""

from typing import Final

import msgspec

from argosy.cluster.protocol.model_spec import MLASpec, ModelSpec, MoESpec
from argosy.placement.model_shape import LayerShape, Matrix, ModelShape
from argosy.placement.weight_format import WeightFormat

_NORMS: Final = {"parallel": 1, "sandwich": 4}  # of a layer; other blocks have two


def shape_from_spec(spec: ModelSpec, *, name: str = "", weight_format: WeightFormat | None = None) -> ModelShape:
    """The shape of a model with these facts; `weight_format` None: plain weights."""
    has_experts = tuple(spec.has_experts(layer) for layer in range(spec.num_layers))
    kinds = tuple(_layer(spec, experts=experts) for experts in (False, True))
    norm = _norm_size(spec)
    mla, moe = spec.mla, spec.moe
    return ModelShape(
        name=name,
        spec=spec,
        kinds=kinds,
        layer_kinds=tuple(int(experts) for experts in has_experts),
        final_norm_size=norm * spec.final_norm,
        first_norm_size=norm * spec.embedding_norm,
        inner_size=max(
            spec.intermediate_size if not all(has_experts) else 0,
            moe.intermediate_size * moe.top_k + moe.shared_size if moe is not None else 0,
        ),
        latent_head_work=2 * mla.kv_rank + mla.rope_size if mla is not None else 0,
        weight_format=weight_format or WeightFormat(),
    )


def _norm_size(spec: ModelSpec) -> int:
    return spec.hidden_size * (2 if spec.norm == "layer" else 1)


def _layer(spec: ModelSpec, *, experts: bool) -> LayerShape:
    norms = _NORMS.get(spec.block, 2) * _norm_size(spec) + spec.num_heads * spec.sinks
    if spec.mla is not None:
        attention, more = _latent_attention(spec, spec.mla)
        norms += more
    else:
        attention = _attention(spec)
        q, kv = spec.num_heads * spec.head_size, spec.num_kv_heads * spec.head_size
        norms += (2 * spec.head_size if spec.qk_norm_kind == "head" else q + kv) * spec.qk_norm
    if experts and spec.moe is not None:
        mlp = _mixture(spec.hidden_size, spec.moe)
        norms += spec.moe.num_experts * (spec.moe.router_bias + spec.moe.correction_bias)
    else:
        mlp = _mlp(spec.hidden_size, spec.intermediate_size, gated=spec.gated, bias=spec.mlp_bias)
    return LayerShape(matrices=(*attention, *mlp), norm_size=norms)


def _attention(spec: ModelSpec) -> tuple[Matrix, ...]:
    width, q, kv = spec.hidden_size, spec.num_heads * spec.head_size, spec.num_kv_heads * spec.head_size
    return (
        Matrix(name="q", num_out=q, num_in=width, cut="column", bias=spec.qkv_bias),
        Matrix(name="kv", num_out=2 * kv, num_in=width, cut="kv", bias=spec.qkv_bias),
        Matrix(name="o", num_out=width, num_in=q, cut="row", bias=spec.o_bias),
    )


def _latent_attention(spec: ModelSpec, mla: MLASpec) -> tuple[tuple[Matrix, ...], int]:
    """The matrices, and the numbers in the norms of the two latents."""
    width, heads = spec.hidden_size, spec.num_heads
    q_out = heads * (mla.nope_size + mla.rope_size)
    q = [Matrix(name="q", num_out=q_out, num_in=mla.q_rank or width, cut="column")]
    if mla.q_rank:
        q.append(Matrix(name="q_a", num_out=mla.q_rank, num_in=width, cut="none"))
    matrices = (
        *q,
        Matrix(name="kv_a", num_out=mla.kv_rank + mla.rope_size, num_in=width, cut="none"),
        Matrix(name="kv_b", num_out=heads * (mla.nope_size + mla.value_size), num_in=mla.kv_rank, cut="column"),
        Matrix(name="o", num_out=width, num_in=heads * mla.value_size, cut="row"),
    )
    return matrices, mla.q_rank + mla.kv_rank


def _mlp(width: int, inner: int, *, gated: bool, bias: bool, prefix: str = "") -> tuple[Matrix, ...]:
    return (
        Matrix(name=f"{prefix}up", num_out=(2 if gated else 1) * inner, num_in=width, cut="column", bias=bias),
        Matrix(name=f"{prefix}down", num_out=width, num_in=inner, cut="row", bias=bias),
    )


def _mixture(width: int, moe: MoESpec) -> tuple[Matrix, ...]:
    count, active, inner, bias = moe.num_experts, moe.top_k, moe.intermediate_size, moe.expert_bias
    matrices = [
        Matrix(name="router", num_out=count, num_in=width, cut="none", quantised=False),
        Matrix(
            name="experts.up", num_out=2 * inner, num_in=width, cut="expert_column", count=count, active=active,
            bias=bias,
        ),
        Matrix(
            name="experts.down", num_out=width, num_in=inner, cut="expert_row", count=count, active=active, bias=bias
        ),
    ]  # fmt: skip
    if moe.shared_size:
        shared = _mlp(width, moe.shared_size, gated=True, bias=False, prefix="shared.")
        matrices += [msgspec.structs.replace(m, cut="none") if moe.shared_is_whole else m for m in shared]
    if moe.shared_gate:
        matrices.append(Matrix(name="shared.gate", num_out=1, num_in=width, cut="none", quantised=False))
    return tuple(matrices)
