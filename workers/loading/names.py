"""From checkpoint names to ours, as tables. A family's differences in naming are rows, not code."""

import re
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple


class Slot(StrEnum):
    """Which part of a fused weight a checkpoint's tensor is."""

    WHOLE = ""
    Q = "q"
    K = "k"
    V = "v"
    GATE = "gate"
    UP = "up"
    DOWN = "down"  # of an expert
    STACKED = "stacked"  # all experts in one tensor
    STACKED_UP = "stacked_up"  # gates and ups of all experts in one tensor
    STACKED_DOWN = "stacked_down"
    BLOCKS = "blocks"  # all parts of the module, one below the other
    GROUPED = "grouped"  # q, k and v, for one key/value head after the other


class Target(NamedTuple):
    """A module of ours ("{}" stands for the layer) and the part of it."""

    module: str
    slot: Slot = Slot.WHOLE


class NameTable:
    """Checkpoint module -> our module. None: derived, not loaded. "{}" stands for the layer's number.

    `spellings`: (pattern, replacement) for names that some checkpoints of the family spell otherwise, such as without a
    prefix; the first that matches turns a name of theirs into one of ours. A row may end in ".*" to ignore all below.
    """

    def __init__(
        self,
        rows: Mapping[str, str | tuple[str, Slot] | None],
        spellings: Sequence[tuple[str, str]] = (),
    ):
        self.rows = {
            theirs: None if ours is None else Target(ours) if isinstance(ours, str) else Target(*ours)
            for theirs, ours in rows.items()
        }
        self.spellings = [(re.compile(pattern), replacement) for pattern, replacement in spellings]

    def canonical(self, name: str) -> str:
        """A tensor's name as the rows have it."""
        for pattern, replacement in self.spellings:
            if pattern.match(name):
                return pattern.sub(replacement, name, count=1)
        return name

    def extended(
        self, rows: Mapping[str, str | tuple[str, Slot] | None], spellings: Sequence[tuple[str, str]] = ()
    ) -> "NameTable":
        """This table with more rows and spellings; a row of the same name replaces ours."""
        merged = NameTable(rows, spellings)
        merged.rows = {**self.rows, **merged.rows}
        merged.spellings = [*merged.spellings, *self.spellings]
        return merged

    def without(self, *rows: str) -> "NameTable":
        """This table without some rows."""
        merged = NameTable({})
        merged.rows = {row: target for row, target in self.rows.items() if row not in rows}
        merged.spellings = self.spellings
        return merged

    def modules(self, layers: range) -> Iterator[tuple[str, Target]]:
        """All rows spelled out for `layers`: (checkpoint module, our module). Rows that are not loaded are left out."""
        for theirs, target in self.rows.items():
            if target is None:
                continue
            if "{}" not in theirs:
                yield theirs, target
                continue
            for layer in layers:
                yield theirs.format(layer), Target(target.module.format(layer), target.slot)

    def is_ignored(self, name: str) -> bool:
        """Whether a checkpoint tensor is one of those that are derived."""
        return any(self._matches(row, name) for row, target in self.rows.items() if target is None)

    @staticmethod
    def _matches(row: str, name: str) -> bool:
        pattern = re.escape(row).replace(re.escape("{}"), r"\d+").replace(re.escape(".*"), r"\..*")
        return re.fullmatch(pattern, name) is not None


LLAMA_NAMES = NameTable(
    {
        "model.embed_tokens": "embed",
        "model.layers.{}.input_layernorm": "layers.{}.input_norm",
        "model.layers.{}.self_attn.q_proj": ("layers.{}.attention.qkv_proj", Slot.Q),
        "model.layers.{}.self_attn.k_proj": ("layers.{}.attention.qkv_proj", Slot.K),
        "model.layers.{}.self_attn.v_proj": ("layers.{}.attention.qkv_proj", Slot.V),
        "model.layers.{}.self_attn.q_norm": "layers.{}.attention.q_norm",
        "model.layers.{}.self_attn.k_norm": "layers.{}.attention.k_norm",
        "model.layers.{}.self_attn.o_proj": "layers.{}.attention.o_proj",
        "model.layers.{}.post_attention_layernorm": "layers.{}.mlp_norm",
        "model.layers.{}.mlp.gate_proj": ("layers.{}.mlp.gate_up_proj", Slot.GATE),
        "model.layers.{}.mlp.up_proj": ("layers.{}.mlp.gate_up_proj", Slot.UP),
        "model.layers.{}.mlp.down_proj": "layers.{}.mlp.down_proj",
        "model.norm": "norm",
        "lm_head": "lm_head",
        "model.layers.{}.self_attn.rotary_emb.inv_freq": None,
        "model.rotary_emb.inv_freq": None,
    }
)
