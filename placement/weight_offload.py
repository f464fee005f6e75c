"""Which layers of a stage have their weights in the host's memory: one rule, for ranks and for the planner.

The layers are spread as evenly as can be, and the last of the stage is always one of them:

    layers     0   1   2   3   4   5   6   7          3 of 8
    host               x       x           x          the link copies the next while those before it compute

Then the first copy has the most layers before it, and behind the last copy one layer is left to compute. Two buffers on
the device, each as large as the largest of these layers, take turns: so much of the gain is spent again.
"""

from collections.abc import Sequence
from typing import Final

NUM_BUFFERS: Final = 2
AUTO: Final = "auto"


def offloaded_places(num_layers: int, count: int) -> tuple[int, ...]:
    """The places of `count` layers among those of a stage, first to last."""
    count = min(max(count, 0), num_layers)
    return tuple((number + 1) * num_layers // count - 1 for number in range(count))


def offloaded_bytes(layer_bytes: Sequence[int], count: int) -> int:
    """What so many layers have in the host's memory; `layer_bytes` are those of the stage's layers."""
    return sum(layer_bytes[place] for place in offloaded_places(len(layer_bytes), count))


def buffer_bytes(layer_bytes: Sequence[int], count: int) -> int:
    """What they still take on the device."""
    places = offloaded_places(len(layer_bytes), count)
    return min(NUM_BUFFERS, len(places)) * max((layer_bytes[place] for place in places), default=0)


def count_for(layer_bytes: Sequence[int], asked_bytes: int) -> int:
    """The fewest layers that have at least so many bytes; all of them where that is not enough."""
    if asked_bytes <= 0:
        return 0
    everything = len(layer_bytes)
    return next((n for n in range(1, everything) if offloaded_bytes(layer_bytes, n) >= asked_bytes), everything)


def count_to_gain(layer_bytes: Sequence[int], missing_bytes: int) -> int:
    """The fewest layers that leave so many bytes more on the device; all of them where that is not enough."""
    if missing_bytes <= 0:
        return 0
    everything = len(layer_bytes)
    return next(
        (
            n
            for n in range(1, everything)
            if offloaded_bytes(layer_bytes, n) - buffer_bytes(layer_bytes, n) >= missing_bytes
        ),
        everything,
    )
