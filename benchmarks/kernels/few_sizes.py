"""Products of a few tokens, and the sizes that are worth a try for them by kernel: for `tune_group` and `tune_step`."""

import itertools
from collections.abc import Iterator, Sequence

from argosy.kernels import gemv, tuning

Sizes = dict[str, int]
LIBRARY = {"kernel": 1, "rows": 32, "width": 128, "stages": 3, "warps": 4, "per_sm": 0, "prefetch": 4096, "early": 0,
           "library": 1}  # fmt: skip
MODELS = {  # hidden, wide, heads, kv heads, vocabulary
    "06b": (1024, 3072, 16, 8, 151936), "8b": (4096, 14336, 32, 8, 128256), "70b": (8192, 28672, 64, 8, 128256),
}  # fmt: skip
HEAD_SIZE = 128
KERNELS = {gemv.SPLIT: "gemv_split", gemv.AHEAD: "gemv_ahead, one token"}


def shapes_of(model: str, cards: int) -> dict[str, tuple[int, int, bool]]:
    """(inputs, weight rows, gated) of each product of a rank."""
    hidden, wide, heads, kv_heads, vocabulary = MODELS[model]
    qkv = (heads // cards + 2 * max(1, kv_heads // cards)) * HEAD_SIZE
    return {
        "qkv": (hidden, qkv, False), "o": (heads // cards * HEAD_SIZE, hidden, False),
        "gate_up": (hidden, 2 * wide // cards, True), "down": (wide // cards, hidden, False),
        "head": (hidden, vocabulary // cards, False),
    }  # fmt: skip


def split_sizes(tokens: int, num_in: int, num_rows: int) -> Iterator[Sizes]:
    """Of `gemv_split` for so many tokens: enough programs for the card, and enough bytes on their way."""
    tile = max(16, tokens)
    for rows in (64, 128):
        for width in (64, 128, 256):
            for stages in (3, 4, 6):
                held = stages * (rows + tile) * width * 2
                if num_in % width or not 40 << 10 <= held <= 220 << 10:
                    continue
                for splits in (1, 2, 4, 8):
                    programs = -(-num_rows // rows) * splits
                    if num_in // splits >= 2 * width and 90 <= programs <= 1200:
                        yield {"kernel": gemv.SPLIT, "rows": rows, "width": width, "stages": stages, "warps": 4,
                               "splits": splits, "prefetch": 512, "early": 0, "library": 0}  # fmt: skip


def ahead_sizes(num_in: int) -> Iterator[Sizes]:
    """Of `gemv_ahead`: as much of the chip's memory as two kernels can have at a time."""
    width = tuning.next_power_of_two(num_in)
    for rows, warps in itertools.product((1, 2, 4, 8, 16), (4, 8)):
        if rows * width // (32 * warps) not in (32, 64, 128):
            continue
        for stages, per_sm in itertools.product((3, 4), (1, 2, 3, 4)):
            if 64 << 10 <= per_sm * stages * rows * width * 2 <= 200 << 10:
                yield {"kernel": gemv.AHEAD, "rows": rows, "width": width, "stages": stages, "warps": warps,
                       "per_sm": per_sm, "prefetch": 0, "early": 0, "library": 0}  # fmt: skip


def sizes_of(tokens: int, num_in: int, num_rows: int, kernels: Sequence[int]) -> Iterator[Sizes]:
    """All that is tried by these kernels."""
    if tokens == 1:
        yield from ahead_sizes(num_in) if gemv.AHEAD in kernels else ()
        return
    yield from split_sizes(tokens, num_in, num_rows) if gemv.SPLIT in kernels else ()


def short(sizes: Sizes) -> str:
    """Sizes in a few letters."""
    return "library" if sizes.get("library") else "/".join(f"{k[:3]}{v}" for k, v in sizes.items() if k != "library")
