"""The reference against arithmetic written out by hand, one token and one head at a time, in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from argosy.kernels import ops, reference

Near = Callable[[Tensor, Tensor], None]


def attend_by_hand(
    q_TNH: Tensor, k_cache: Tensor, v_cache: Tensor, query_lens: list[int], context_lens: list[int], table: Tensor,
    *, scale: float, sliding_window: int | None = None, soft_cap: float | None = None,
    alibi_slopes_N: Tensor | None = None, sinks_N: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Loops over rows, queries, heads and keys, each key read from its slot."""
    block_size, num_kv_heads = k_cache.shape[1:3]
    num_heads = q_TNH.shape[1]
    out = torch.zeros(q_TNH.shape, dtype=torch.float64)
    token = 0
    for row, (queries, context) in enumerate(zip(query_lens, context_lens, strict=True)):
        for position in range(context - queries, context):
            first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            slots = [(int(table[row, j // block_size]), j % block_size) for j in range(first, position + 1)]
            for head in range(num_heads):
                kv_head = head * num_kv_heads // num_heads
                logits = []
                for j, (block, offset) in enumerate(slots, start=first):
                    logit = float(q_TNH[token, head].double() @ k_cache[block, offset, kv_head].double()) * scale
                    if soft_cap is not None:
                        logit = soft_cap * math.tanh(logit / soft_cap)
                    if alibi_slopes_N is not None:
                        logit += float(alibi_slopes_N[head]) * (j - position)
                    logits.append(logit)
                if sinks_N is not None:
                    logits.append(float(sinks_N[head]))
                weights = torch.tensor(logits, dtype=torch.float64).softmax(0)
                for weight, (block, offset) in zip(weights, slots, strict=False):
                    out[token, head] += weight * v_cache[block, offset, kv_head].double()
            token += 1
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("option", ["none", "window", "soft_cap", "alibi", "sinks"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_size", "block_size"), [(6, 2, 24, 16), (5, 5, 7, 3)])
def test_prefill_attention_is_the_sum_by_hand(
    num_heads: int, num_kv_heads: int, head_size: int, block_size: int, option: str, dtype: torch.dtype,
    assert_near: Near,
) -> None:  # fmt: skip
    """A new prompt, a chunk after a prefix, a row without tokens, single tokens: all in one step."""
    query_lens, context_lens = [9, 4, 0, 1, 1], [9, 21, 0, 30, 1]
    k_cache, v_cache = (torch.randn(40, block_size, num_kv_heads, head_size).to(dtype) for _ in range(2))
    table = torch.stack([torch.randperm(40)[:10] for _ in query_lens]).int()
    q = torch.randn(sum(query_lens), num_heads, head_size).to(dtype)
    options = {
        "none": {},
        "window": {"sliding_window": 5},
        "soft_cap": {"soft_cap": 1.5},
        "alibi": {"alibi_slopes_N": torch.rand(num_heads)},
        "sinks": {"sinks_N": torch.randn(num_heads)},
    }[option]
    query_start = torch.tensor([0, *query_lens]).cumsum(0).int()
    want = attend_by_hand(q, k_cache, v_cache, query_lens, context_lens, table, scale=0.3, **options)
    got = ops.prefill_attention(
        q, k_cache, v_cache, query_start, torch.tensor(context_lens, dtype=torch.int32), table, scale=0.3, **options
    )
    assert_near(got, want)

    rows = [3, 4, 0]  # and the last tokens of three rows as a decode step
    last = query_start[1:][rows].long() - 1
    decoded = ops.paged_attention(
        q[last],
        k_cache,
        v_cache,
        table[rows],
        torch.tensor(context_lens, dtype=torch.int32)[rows],
        scale=0.3,
        **options,
    )
    assert_near(decoded, want[last])


def test_rows_of_context_zero_are_padding_and_give_zeros() -> None:
    cache = torch.randn(4, 16, 2, 8)
    table, context = torch.zeros(3, 2, dtype=torch.int32), torch.tensor([0, 5, 0], dtype=torch.int32)
    out = ops.paged_attention(torch.randn(3, 4, 8), cache, cache, table, context, scale=1.0)
    assert (out[[0, 2]] == 0).all()
    assert out[1].isfinite().all()


def test_decode_of_long_rows_is_cut_into_pieces_that_fit_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece holds the rows whose keys fit; the answer does not depend on where rows are parted."""
    cache_k, cache_v = torch.randn(2, 64, 16, 2, 8)
    table = torch.randperm(64).view(8, 8).int()
    context = torch.tensor([100, 3, 128, 17, 64, 65, 1, 90], dtype=torch.int32)
    q = torch.randn(8, 4, 8)
    whole = reference.paged_attention(q, cache_k, cache_v, table, context, scale=0.5)
    monkeypatch.setattr(reference, "GATHER_BYTES", 3 * 128 * 2 * 8 * 4)
    torch.testing.assert_close(reference.paged_attention(q, cache_k, cache_v, table, context, scale=0.5), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64), (7, 96), (3, 5, 130)])
def test_norms_and_gates_are_their_formulas(shape: tuple[int, ...], dtype: torch.dtype, assert_near: Near) -> None:
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)

    def norm(x: Tensor) -> Tensor:
        x = x.double()
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()

    assert_near(ops.rms_norm(x, weight, 1e-5), norm(x))
    total = (x.float() + residual.float()).to(dtype)
    normed, kept = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert kept is residual
    torch.testing.assert_close(residual, total)
    assert_near(normed, norm(total))
    gate, up = x.double().chunk(2, -1)
    assert_near(ops.silu_and_mul(x), gate / (1 + (-gate).exp()) * up)
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    assert_near(ops.gelu_and_mul(x), gate / 2 * (1 + inner.tanh()) * up)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [4, 16])
def test_rotation_turns_each_pair_by_its_angle(rotary: int, interleaved: bool, assert_near: Near) -> None:
    """Pair i of a head, as a complex number, is multiplied by e^(i · position · θ_i); the other dimensions stay."""
    theta = 100.0 ** (-torch.arange(0, rotary, 2).double() / rotary)
    angles = torch.arange(50).double()[:, None] * theta
    table = torch.cat((angles.cos(), angles.sin()), -1).float()
    positions = torch.tensor([0, 7, 49, 7])
    q, k = torch.randn(4, 3, 16), torch.randn(4, 1, 16)
    wants = []
    for x in (q, k):
        want = x.double().clone()
        for token, position in enumerate(positions.tolist()):
            for head in range(x.shape[1]):
                for i in range(rotary // 2):
                    a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + rotary // 2)
                    turned = complex(want[token, head, a], want[token, head, b]) * torch.exp(1j * angles[position, i])
                    want[token, head, a], want[token, head, b] = turned.real, turned.imag
        wants.append(want)
    got_q, got_k = ops.apply_rotary(q, k, positions, table, interleaved=interleaved)
    assert got_q is q
    assert_near(got_q, wants[0])
    assert_near(got_k, wants[1])


def test_store_kv_writes_each_token_to_its_slot_and_padding_nowhere() -> None:
    k, v = torch.randn(2, 4, 2, 8)
    k_cache, v_cache = torch.zeros(2, 3, 5, 2, 8)
    ops.store_kv(k, v, k_cache, v_cache, torch.tensor([11, -1, 0, 7]))
    for token, (block, offset) in {0: (2, 1), 2: (0, 0), 3: (1, 2)}.items():
        assert torch.equal(k_cache[block, offset], k[token])
        assert torch.equal(v_cache[block, offset], v[token])
    assert k_cache.count_nonzero() == 3 * 16


def test_rope_and_store_is_norm_then_rotation_then_store(assert_near: Near) -> None:
    qkv, table = torch.randn(5, (4 + 2 * 2) * 8), torch.randn(20, 8)
    positions, slots = torch.randint(20, (5,)), torch.tensor([3, 9, 14, 0, -1])
    caches = torch.zeros(2, 4, 4, 2, 8)
    q_weight, k_weight = torch.randn(2, 8)
    q, k, v = (x.reshape(5, -1, 8).clone() for x in qkv.split((32, 16, 16), 1))
    q, k = ops.rms_norm(q, q_weight, 1e-6), ops.rms_norm(k, k_weight, 1e-6)
    ops.apply_rotary(q, k, positions, table)
    got = ops.rope_and_store(
        qkv, positions, table, *caches, slots, num_heads=4, q_norm_weight_H=q_weight, k_norm_weight_H=k_weight
    )
    assert got.data_ptr() == qkv.data_ptr()
    assert_near(got, q)
    flat_k, flat_v = caches.view(2, 16, 2, 8)
    assert_near(flat_k[slots[:4]], k[:4])
    assert torch.equal(flat_v[slots[:4]], v[:4])


def test_copied_blocks_are_those_from_before_the_copy() -> None:
    """A chain 0 -> 1 -> 2 moves each block once: all sources are read before any destination is written."""
    caches = [torch.arange(5.0).repeat_interleave(4).view(5, 2, 2) + 100 * layer for layer in range(3)]
    ops.copy_blocks(caches, [(0, 1), (1, 2)])
    for layer, cache in enumerate(caches):
        assert cache[:, 0, 0].tolist() == [100 * layer + x for x in (0, 0, 1, 3, 4)]
    host = [torch.zeros(2, 2, 2) for _ in caches]
    ops.swap_blocks(caches, host, [(4, 0), (2, 1)])
    assert host[1][:, 0, 0].tolist() == [104, 101]
    ops.copy_blocks(caches, [])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("with_all", [False, True])
def test_fused_linear_is_norm_product_bias_gate_and_residual(gated: bool, with_all: bool, assert_near: Near) -> None:
    x, weight = torch.randn(3, 10), torch.randn(8, 10)
    bias, norm = (torch.randn(8), torch.randn(10)) if with_all else (None, None)
    residual = torch.randn(3, 4 if gated else 8) if with_all else None
    want = x.double()
    if norm is not None:
        want = want / (want.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm
    want = want @ weight.double().T + (0 if bias is None else bias)
    if gated:
        want = want[:, :4] * want[:, :4].sigmoid() * want[:, 4:]
    if residual is not None:
        want = want + residual
    got = ops.fused_linear(x, weight, bias, norm_weight_I=norm, residual_TO=residual, gated=gated)
    assert residual is None or got is residual
    assert_near(got, want)
