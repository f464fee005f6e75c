"""The best contiguous split of layers over stages of unequal memory and speed, by dynamic programming.

    best(stage, last) = the best that the stages up to `stage` can do with the layers [0, last)
                      = the best over k of  worse(best(stage - 1, k), worth(stage, [k, last)))

More layers never make a stage faster or leave it more room: from k = last - 1 downwards a stage is worth less and less,
and once it is worth no more than the best that was found, no further k can be better. So a stage looks at little more
than the layers that it can have, and P stages of L layers take about L x L looks.
"""

from collections.abc import Callable
from typing import Final

_NEVER: Final = float("-inf")

Worth = Callable[[int, int, int], float]
"""What (stage, first layer, last layer) is worth, never more with more layers; minus infinity: impossible."""


def split_layers(num_layers: int, num_stages: int, worth: Worth) -> tuple[float, tuple[int, ...]] | None:
    """The split whose worst stage is worth the most, as (that worth, layers of each stage); None when none is possible.

    Every stage gets a layer at least. Of equal splits the one whose later stages have fewer layers is taken.
    """
    if num_stages > num_layers or num_stages < 1:
        return None
    # best[last]: the worth of the worst stage so far; only lasts that leave a layer for each later stage
    best = {last: worth(0, 0, last) for last in range(1, num_layers - num_stages + 2)}
    choices: list[dict[int, int]] = []
    for stage in range(1, num_stages):
        found, chosen = {}, {}
        is_final = stage == num_stages - 1
        lasts = (num_layers,) if is_final else range(stage + 1, num_layers - num_stages + stage + 2)
        for last in lasts:
            value, at = _NEVER, stage
            for k in range(last - 1, stage - 1, -1):
                own = worth(stage, k, last)
                if own <= value:
                    break
                if min(own, best[k]) > value:
                    value, at = min(own, best[k]), k
            found[last], chosen[last] = value, at
        best = found
        choices.append(chosen)
    value = best[num_layers]
    if value == _NEVER:
        return None
    counts, last = [], num_layers
    for chosen in reversed(choices):
        counts.append(last - chosen[last])
        last = chosen[last]
    counts.append(last)
    return value, tuple(reversed(counts))
