"""The assembly of `warp_decode`, carried out lane by lane on a CPU: two tiles of keys, weighed as softmax says."""

import numpy as np
import pytest
import torch
from ptx_lanes import LANE, Lanes, bits, floats, run

from argosy.kernels import warp_parts

G, T = LANE // 4, LANE % 4
HEADS, KEYS, SIZE = 8, 16, 128


def words(numbers: torch.Tensor) -> Lanes:
    """Numbers of 8 bits [..., 4 n] as words [..., n]."""
    return numbers.contiguous().view(torch.int8).numpy().view(np.uint32)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_two_tiles_and_the_end_of_a_row(dtype: torch.dtype) -> None:
    """The second tile has five keys; what lies behind them is large, and must not be seen."""
    torch.manual_seed(3)
    is_e4m3 = dtype != torch.int8
    k, v = (
        (torch.randn(2, KEYS, SIZE).to(dtype) if is_e4m3 else torch.randint(-127, 128, (2, KEYS, SIZE)).to(dtype))
        for _ in range(2)
    )
    k_scale, v_scale = torch.rand(2, KEYS) + 0.1, torch.rand(2, KEYS) * 8 + 0.1
    q = torch.randn(HEADS, SIZE).half()
    factor, present = 0.3 if is_e4m3 else 0.01, KEYS + 5
    queries = np.ascontiguousarray(q.numpy()).view(np.uint32)  # [heads, pairs]
    # as `_queries`: number 64 half + 16 t + 4 step + 2 pair of head g
    query_words = [
        queries[G, (64 * half + 16 * T + 4 * step + 2 * pair) // 2]
        for half in range(2) for step in range(4) for pair in range(2)
    ]  # fmt: skip
    acc = [np.zeros(32, np.uint32) for _ in range(32)]  # [8 tiles, 4]
    largest = [bits(np.full(32, -1e30)) for _ in range(2)]
    totals = [bits(np.zeros(32)) for _ in range(2)]
    kind = "E4M3" if is_e4m3 else "INT8"
    for tile in range(2):
        left = present - tile * KEYS
        key_words, value_words = words(k[tile]), words(v[tile])
        keys = [
            key_words[G + more, 16 * half + 4 * T + word] for more in (0, 8) for half in range(2) for word in range(4)
        ]
        products = run(getattr(warp_parts, f"ATTEND_{kind}").value, [*keys, *query_words], 4)
        its_scale = [np.where(G + more < left, v_scale[tile].numpy()[G + more], 1.0) for more in (0, 8)]
        side = [
            *(bits(k_scale[tile].numpy()[G + more] * factor) for more in (0, 8)),
            *(bits(np.log2(x)) for x in its_scale), *(bits(1.0 / x) for x in its_scale),
            *(bits(np.where(G + more < left, np.inf, -np.inf)) for more in (0, 8)),
        ]  # fmt: skip
        weighed = run(warp_parts.WEIGH.value, [*products, *side, *largest, *totals], 8)
        largest, shrink, totals, weights = weighed[:2], weighed[2:4], weighed[4:6], weighed[6:]
        for word in range(4):
            four = [
                np.where(2 * T + token < left, value_words[2 * T + token, 4 * G + word], 0) for token in (0, 1, 8, 9)
            ]
            unpacked = run(getattr(warp_parts, f"VALUES_{kind}").value, four, 8)
            for half in range(2):
                at = 4 * (2 * word + half)
                operands = [*unpacked[4 * half : 4 * half + 4], *([weights[0]] * 4), *([weights[1]] * 4)]
                shrinks = [*([shrink[0]] * 4), *([shrink[1]] * 4)]
                acc[at : at + 4] = run(warp_parts.ADD.value, [*acc[at : at + 4], *operands, *shrinks], 4)
    sums = [floats(x).astype(np.float64) for x in totals]
    out = np.zeros((HEADS, SIZE))
    for head in range(2):
        whole = np.array([sums[head][t == T].sum() for t in range(4)])[T]
        for number in range(16):  # as `acc` [8, 2, 2] turned to [2, 16]
            out[2 * T + head, 16 * G + number] = floats(acc[4 * (number // 2) + 2 * (number % 2) + head]) / whole
    keys_f = (k.float() * k_scale[..., None]).flatten(0, 1)[:present]
    values_f = (v.float() * v_scale[..., None]).flatten(0, 1)[:present]
    logits = q.float() @ keys_f.T * factor
    want = torch.softmax(logits * np.log(2.0), -1) @ values_f
    torch.testing.assert_close(torch.from_numpy(out).float(), want, atol=2e-3 * values_f.abs().max().item(), rtol=5e-3)
