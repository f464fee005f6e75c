"""Which layers of a model share a block table, and how many blocks a sequence then holds. No torch, no files.

Layers that see everything and layers with a sliding window need different blocks of a sequence: the latter none that
fell out of the window. So layers of one kind form groups, and each group has a table of its own. All groups take their
blocks from one pool: a block of the pool has room for as many layers as the largest group has, and the group that holds
it uses its places. Layers of one kind are cut into several groups so that groups are of about equal size.

    layers   w w w F w w w F      F sees everything, w has a window; as groups of two layers:
    group    1 2 3 0 1 2 3 0      a block has two places, and a long sequence costs one growing table and three short

Driver, ranks and planner work out the same from the model alone. A stage of a pipeline deals its own layers to the
groups, so its blocks may have more or fewer bytes; ids mean the same everywhere.
"""

from typing import Final

import msgspec

from argosy.cluster.protocol.model_facts import ModelSpec

MOST_GROUPS: Final = 8  # each is a table to grow, to send and to gather
GROUP_COST: Final = 0.01  # of a sequence's bytes: what one more table must save


class KVGroups(msgspec.Struct, frozen=True):
    """The groups of a model: the window of each, 0 where it sees everything. Those that do come first."""

    windows: tuple[int, ...] = (0,)

    @property
    def num_groups(self) -> int:
        """Tables of a sequence."""
        return len(self.windows)

    @property
    def has_windows(self) -> bool:
        """Whether any group gives blocks back while a sequence grows."""
        return any(self.windows)

    def num_places(self, num_full: int, num_windowed: int) -> int:
        """Layers that a block has room for on a stage that has so many of each kind."""
        of_full = self.windows.count(0)
        of_windowed = self.num_groups - of_full
        if self.num_groups == 1:
            return num_full + num_windowed
        return max(-(-num_full // of_full), -(-num_windowed // of_windowed))

    def num_blocks(self, num_tokens: int, block_size: int, chunk: int = 1) -> int:
        """The most blocks, of all groups, that a sequence of so many tokens ever holds.

        `chunk`: tokens that one step computes at most; before they are, the window of the first of them is held too.
        """
        whole = -(-num_tokens // block_size)
        return sum(min(whole, window_blocks(window, block_size, chunk)) if window else whole for window in self.windows)

    def more_table_bytes(self, num_rows: int, num_tokens: int, block_size: int) -> int:
        """Bytes on a GPU of the tables of all groups but one, which recorded steps keep by request and by row."""
        return (self.num_groups - 1) * 2 * num_rows * -(-num_tokens // block_size) * 4

    def most_blocks(self, num_sequences: int, num_tokens: int, block_size: int, step_tokens: int) -> int:
        """The most blocks that so many sequences of so many tokens can hold at once, a step computing `step_tokens`."""
        most = num_sequences * self.num_blocks(num_tokens, block_size)
        if self.has_windows:
            chunks = sum(window > 0 for window in self.windows) * (step_tokens // block_size + num_sequences)
            most = min(most + chunks, num_sequences * self.num_groups * -(-num_tokens // block_size))
        return most

    def num_tokens(self, num_blocks: int, block_size: int) -> int | None:
        """The longest sequence that so many blocks hold; None: any, since all layers have windows."""
        windowed = [window_blocks(window, block_size) for window in self.windows if window]
        num_full = self.num_groups - len(windowed)
        if not num_full and sum(windowed) <= num_blocks:
            return None
        low, high = 0, num_blocks
        while low < high:  # in whole blocks of each group
            middle = (low + high + 1) // 2
            if num_full * middle + sum(min(middle, most) for most in windowed) <= num_blocks:
                low = middle
            else:
                high = middle - 1
        return low * block_size


ONE_TABLE: Final = KVGroups()
"""What most models have: one table, and no windows."""


def window_blocks(window: int, block_size: int, chunk: int = 1) -> int:
    """Blocks that `chunk` tokens and what they look back on lie in at most, wherever blocks begin."""
    seen = window - 1 + chunk
    return (seen - 2) // block_size + 2 if seen > 1 else 1


class LayerPlaces(msgspec.Struct, frozen=True):
    """Where a stage's layers stand: for each its group, and its place in that group's blocks."""

    groups: tuple[int, ...]
    places: tuple[int, ...]

    @property
    def num_places(self) -> int:
        """Layers that a block has room for."""
        return max(self.places) + 1


def kv_groups(spec: ModelSpec, max_len: int | None = None) -> KVGroups:
    """The groups of a model that serves sequences of at most `max_len` tokens.

    Of all ways to cut each kind into groups the one that costs the least bytes for a sequence as long as the window and
    for the longest, together. One table for all layers is among them, and taken where windows save nothing.
    """
    max_len = max_len or spec.max_position
    windows = {window for layer in range(spec.num_layers) if (window := _window(spec, layer, max_len))}
    if len(windows) != 1:
        return KVGroups()
    window = windows.pop()
    num_windowed = sum(_window(spec, layer, max_len) > 0 for layer in range(spec.num_layers))
    num_full = spec.num_layers - num_windowed
    if not num_full:
        return KVGroups((window,))
    full, windowed = min(
        [
            (0, 0),
            *((full, windowed) for full in range(1, MOST_GROUPS) for windowed in range(1, MOST_GROUPS - full + 1)),
        ],
        key=lambda cut: (_cost(num_full, num_windowed, window, max_len, *cut), cut),
    )
    return KVGroups((0,) * full + (window,) * windowed) if windowed else KVGroups()


def layer_places(spec: ModelSpec, groups: KVGroups, first_layer: int, last_layer: int) -> LayerPlaces:
    """Deal the layers [first_layer, last_layer) of a stage to the groups of their kind, in turn."""
    if groups.num_groups == 1:
        count = last_layer - first_layer
        return LayerPlaces((0,) * count, tuple(range(count)))
    num_full = groups.windows.count(0)
    of_layer, places = [], []
    counts = [0, 0]
    for layer in range(first_layer, last_layer):
        is_windowed = spec.window_of(layer) is not None
        turn = counts[is_windowed]
        counts[is_windowed] += 1
        of_kind = groups.num_groups - num_full if is_windowed else num_full
        of_layer.append(num_full * is_windowed + turn % of_kind)
        places.append(turn // of_kind)
    return LayerPlaces(tuple(of_layer), tuple(places))


def _window(spec: ModelSpec, layer: int, max_len: int) -> int:
    """The window of a layer, 0 if no sequence outgrows it."""
    window = spec.window_of(layer)
    return window if window is not None and window < max_len else 0


def _cost(num_full: int, num_windowed: int, window: int, max_len: int, full: int, windowed: int) -> float:
    """Bytes of a sequence of the window's length and of the longest, each over the least that could be."""
    if not windowed:
        return 1.0 + (num_full + num_windowed) * max_len / (num_full * max_len + num_windowed * window)
    places = max(-(-num_full // full), -(-num_windowed // windowed))
    short = places * (full + windowed) / (num_full + num_windowed)
    long = places * (full * max_len + windowed * window) / (num_full * max_len + num_windowed * window)
    return short + long + GROUP_COST * (full + windowed)
