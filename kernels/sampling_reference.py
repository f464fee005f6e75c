"""What sampling means, in plain torch: which tokens are kept, and a draw that every device makes alike.

Letters: R rows (requests) of a step, V vocabulary. All arithmetic on logits is float32.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Halvings before `_top_p_threshold` sorts what is left; each costs two passes over the row.
BISECTIONS = 12
# Weights, relative to the best, above which `_top_p_threshold_cpu` tries to find the wanted mass.
LEAST_WEIGHTS = (2.0**-6, 2.0**-12, 0.0)
# Elements of noise made at once: the temporaries stay in the second-level cache.
NOISE_AT_ONCE = 1 << 16


def sample_rows(
    logits_RV: Tensor,
    temperature_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    min_p_R: Tensor,
    seed_R: Tensor,
    position_R: Tensor,
    *,
    any_random: bool = True,
    any_filter: bool = True,
) -> Tensor:
    """One token id (int64) a row. Temperature 0 is argmax; else a draw from the kept part of softmax(logits / t).

    In this order: logits are multiplied by 1 / temperature; `min_p` drops tokens less probable than min_p times the
    best (0: off); `top_k` keeps the k largest (0 or less: off); `top_p` keeps the smallest set of largest logits whose
    share of what is left is at least top_p (1: off). Equal logits are kept or dropped together, so that the answer
    depends on no order. The draw is argmax(logit + gumbel) (Gumbel 1954) with the noise of `gumbel_noise`, hence a
    function of (logits, parameters, seed, position) of the row alone. Ties go to the lowest id.
    The two flags are promises of the caller that save work: False says that no row is random, or that none filters.
    """
    if any_random:
        random_R = temperature_R > 0
        any_random = bool(random_R.any())
    if not any_random:
        return logits_RV.argmax(dim=-1)
    scaled_RV = logits_RV.float() * temperature_R.masked_fill(~random_R, 1.0).reciprocal()[:, None]
    if any_filter:
        filtered_R = random_R & ((top_k_R > 0) | (top_p_R < 1.0) | (min_p_R > 0.0))
        (rows,) = torch.where(filtered_R)
        if rows.numel():
            part = scaled_RV[rows]
            threshold = keep_threshold(part, top_k_R[rows], top_p_R[rows], min_p_R[rows])
            scaled_RV[rows] = part.masked_fill_(part < threshold[:, None], float("-inf"))
    noise_RV = gumbel_noise(seed_R, position_R, logits_RV.shape[-1])
    if not bool(random_R.all()):
        noise_RV.masked_fill_(~random_R[:, None], 0.0)
    return scaled_RV.add_(noise_RV).argmax(dim=-1)


def keep_threshold(scaled_RV: Tensor, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor) -> Tensor:
    """The smallest logit of each row that min_p, top_k and top_p keep, in this order. [R], float32.

    Of a row whose best logit is no finite number there are no shares to keep: top_p leaves it to who looks at its draw.
    """
    vocabulary = scaled_RV.shape[-1]
    largest_R = scaled_RV.amax(dim=-1)
    threshold_R = largest_R + torch.log(min_p_R.clamp(min=0.0))  # log(0) = -inf keeps all
    top_k_R = torch.where(top_k_R > 0, top_k_R, vocabulary).clamp(max=vocabulary).long()
    limited_R = top_k_R < vocabulary
    if bool(limited_R.any()):
        k = int(top_k_R[limited_R].max())
        kth_R = scaled_RV.topk(k).values.gather(1, (top_k_R.clamp(max=k) - 1)[:, None])[:, 0]
        threshold_R = torch.where(limited_R, torch.maximum(threshold_R, kth_R), threshold_R)
    on_cpu = scaled_RV.device.type == "cpu"
    for row in torch.where((top_p_R < 1.0) & largest_R.isfinite())[0].tolist():
        find = _top_p_threshold_cpu if on_cpu else _top_p_threshold
        threshold_R[row] = find(scaled_RV[row], threshold_R[row], largest_R[row], float(top_p_R[row]))
    return threshold_R


def _top_p_threshold_cpu(scaled_V: Tensor, threshold: Tensor, largest: Tensor, top_p: float) -> float:
    """What `_top_p_threshold` means, by numpy: 30 us a row of 4096 where many small torch calls take 220.

    The few large weights mostly hold the mass that is wanted, so only those are sorted; all, if they don't.
    """
    logits = scaled_V.numpy()
    lowest, best = float(threshold), float(largest)
    weights = np.exp(logits - best)
    if lowest > -np.inf:
        weights[logits < lowest] = 0.0
    wanted = top_p * float(weights.sum(dtype=np.float64))
    for least in LEAST_WEIGHTS:
        inside = weights > least
        if least == 0.0 or float(weights[inside].sum(dtype=np.float64)) >= wanted:
            break
    kept = np.sort(logits[inside])[::-1]
    masses = np.exp(kept - best)
    needed = np.cumsum(masses, dtype=np.float64) - masses < wanted
    return float(kept[max(int(needed.sum()) - 1, 0)])


def _top_p_threshold(scaled_V: Tensor, threshold: Tensor, largest: Tensor, top_p: float) -> Tensor:
    """The smallest value v >= threshold of one row with mass(values > v) < top_p · mass(values >= threshold).

    Bisection brackets v, then only what lies in the bracket is sorted: 0.3 ms where `topk(1024)` of 32 000 takes 3.
    """
    weight_V = torch.where(scaled_V >= threshold, (scaled_V - largest).exp_(), 0.0)
    wanted = top_p * float(weight_V.sum())
    low, high, mass_above = 0.0, 1.0, 0.0  # mass(weights > low) >= wanted > mass(weights > high)
    for _ in range(BISECTIONS):
        middle = math.sqrt(low * high) if low > 0.0 else high / 16
        mass = float(F.threshold(weight_V, middle, 0.0).sum())
        if mass >= wanted:
            low = middle
        else:
            high, mass_above = middle, mass
    inside = torch.where((weight_V > low) & (weight_V <= high))[0]
    weights, order = weight_V[inside].sort(descending=True)
    needed = mass_above + weights.cumsum(0) - weights < wanted
    return scaled_V[inside[order[max(int(needed.sum()) - 1, 0)]]]


def gumbel_noise(seed_R: Tensor, position_R: Tensor, vocabulary: int) -> Tensor:
    """Standard Gumbel noise [R, V], float32: a function of (seed, position, token id) alone.

    Integers, all modulo 2³² so that every device agrees to the bit; mix() is Wellons's 'lowbias32' (xor-shift 16,
    · 0x7FEB352D, xor-shift 15, · 0x846CA68B, xor-shift 16):
        a = mix(seed_low ^ 0x9E3779B9);  b = mix(seed_high + a);  c = mix(position + b);  d = mix(c ^ 0x85EBCA6B)
        h = mix(mix(id · 0x9E3779B9 ^ c) + d)
    Uniform u = (h + 0.5) / 2³²; waiting time E = -log(1 - u), exact to single precision down to 2⁻³³ because the most
    probable winners are those with small E; noise = -log(E). A logit plus this noise wins the argmax with the
    probability that softmax gives it.
    """
    low_R, high_R = seed_R.long() & 0xFFFFFFFF, (seed_R.long() >> 32) & 0xFFFFFFFF
    a_R = _mix(_wrap(low_R ^ 0x9E3779B9))
    b_R = _mix(_wrap(high_R) + a_R)
    c_R = _mix(_wrap(position_R.long()) + b_R)
    d_R = _mix(c_R ^ _int32(0x85EBCA6B))
    ids_V = torch.arange(vocabulary, dtype=torch.int32, device=seed_R.device) * _int32(0x9E3779B9)
    noise_RV = torch.empty((seed_R.shape[0], vocabulary), dtype=torch.float32, device=seed_R.device)
    rows_at_once = max(1, NOISE_AT_ONCE // vocabulary)
    for noise, c, d in zip(*(x.split(rows_at_once) for x in (noise_RV, c_R, d_R)), strict=True):
        hashed = _mix(_mix(ids_V ^ c[:, None]).add_(d[:, None]))
        # two exact halves, so that their sum is the only rounding
        torch.mul((hashed >> 8).bitwise_and_(0xFFFFFF).float(), 2.0**-24, out=noise)
        noise += hashed.bitwise_and_(0xFF).float().add_(0.5).mul_(2.0**-32)
        noise.clamp_(max=1.0 - 2.0**-24).neg_().log1p_().neg_().log_().neg_()
    return noise_RV


def _int32(value: int) -> int:
    """The signed 32-bit number with the bits of `value`: torch multiplies int32 fast and uint32 not at all."""
    return value - (1 << 32) if value >= 1 << 31 else value


def _wrap(x: Tensor) -> Tensor:
    return ((x & 0xFFFFFFFF) ^ 0x80000000).sub_(0x80000000).to(torch.int32)


def _mix(x: Tensor) -> Tensor:
    """Wellons's lowbias32 on int32 tensors; `>>` is arithmetic there, so the sign bits are masked off."""
    x = x ^ (x >> 16).bitwise_and_(0xFFFF)
    x *= _int32(0x7FEB352D)
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= _int32(0x846CA68B)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def argmax_rows(logits_RV: Tensor) -> Tensor:
    """See `step_ops.argmax_rows`."""
    return logits_RV.argmax(dim=-1)
