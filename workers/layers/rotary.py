"""Positions as rotations: the table of cosines and sines, with the scalings that models use.

P = positions, H = rotated dimensions of a head; row p is [cos of H/2 angles | sin of H/2 angles] in float32.
"""

import math

import torch
from torch import Tensor

from argosy.cluster.protocol.model_spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_size: int, num_positions: int = 0) -> Tensor:
    """Radians a position, for each of the H/2 pairs (Su et al. 2021), after scaling.

    `longrope` has two sets of scales, for sequences up to the original length and beyond. Keys in a cache can't be
    rotated anew when a sequence grows over it, so what is promised (`num_positions`) decides for all.
    """
    plain = 1.0 / rope.theta ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    if rope.rope_type == "linear":
        return plain / rope.factor
    if rope.rope_type == "llama3":
        return _llama3(plain, rope)
    if rope.rope_type == "yarn":
        return _yarn(plain, rope, head_size)
    if rope.rope_type == "longrope":
        is_long = num_positions > rope.original_max_position
        return plain / torch.tensor(rope.long_scales if is_long else rope.short_scales)
    # "dynamic" equals the plain one up to the original length, and is served no further (`ModelSpec.max_position`)
    return plain


def cos_sin_table(rope: RopeSpec, head_size: int, num_positions: int, device: torch.device) -> Tensor:
    """[P, H]."""
    frequencies = inverse_frequencies(rope, head_size, num_positions).to(device)
    angles = torch.arange(num_positions, dtype=torch.float32, device=device)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1) * rope.attention_factor


def _llama3(plain: Tensor, rope: RopeSpec) -> Tensor:
    """Slow rotations are divided by the factor, fast ones kept, those between blended by their wavelength."""
    turns = rope.original_max_position * plain / (2 * math.pi)  # full turns within the original length
    keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return keep * plain + (1 - keep) * plain / rope.factor


def _yarn(plain: Tensor, rope: RopeSpec, head_size: int) -> Tensor:
    """Pairs that turn more than `beta_fast` times are kept, below `beta_slow` divided, a ramp between (Peng 2023)."""

    def pair_that_turns(times: float) -> float:
        wavelength = rope.original_max_position / (times * 2 * math.pi)
        return head_size * math.log(wavelength) / (2 * math.log(rope.theta))

    first, last = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_size - 1)
    pairs = torch.arange(head_size // 2, dtype=torch.float32)
    divided = ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)
    return divided * plain / rope.factor + (1 - divided) * plain


class RotaryEmbedding:
    """The table of one model on one device, shared by its layers."""

    def __init__(self, rope: RopeSpec, head_size: int, num_positions: int):
        self.rope, self.head_size, self.num_positions = rope, rope.rotary_size or head_size, num_positions
        self._table: Tensor | None = None

    def allocate(self, device: torch.device) -> None:
        """Make the table."""
        self._table = cos_sin_table(self.rope, self.head_size, self.num_positions, device)

    @property
    def cos_sin_PH(self) -> Tensor:
        """The table; `allocate` comes first."""
        assert self._table is not None, "the rotary table was not allocated"
        return self._table
