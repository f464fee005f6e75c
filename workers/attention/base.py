"""What a model needs from attention, and the metadata of one step.

T = tokens of the step (padding included), R = rows, B = blocks a row may have, N = query heads of this rank,
K = key/value heads of this rank, H = head size, S = tokens in a block, D = (N + 2K) * H.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


@dataclass(slots=True)
class AttentionMetadata:
    """Where the tokens of one step stand. Rows of one token come first. Make a new one for each step.

    All tensors lie on the device of the model; `max_query_len` and `max_context_len` are bounds known on the host, so
    that nobody has to ask the device. `scratch` belongs to the backend: what it worked out once for all layers.
    """

    num_rows: int
    num_decode_rows: int  # rows [0, num_decode_rows) have exactly one token each: token i belongs to row i
    query_start_R1: Tensor  # int32 [R + 1]: tokens of row r are [query_start[r], query_start[r + 1])
    context_len_R: Tensor  # int32 [R]: tokens of row r in the cache after this step; 0 marks a padding row
    block_table_RB: Tensor  # int32 [R, maxB]
    slot_mapping_T: Tensor  # int64 [T]: block_id * S + offset; -1 is padding
    max_query_len: int
    max_context_len: int
    num_context_tokens: int = 0  # of the rows after those of decode, in the cache; 0: not known, as in recorded steps
    order_R: Tensor | None = None  # int32 [decode rows]: those with long contexts first, see `ops.paged_attention`
    shared_len_R: Tensor | None = None  # int32, in steps of decode rows alone: see `ops.decode_attention`
    even: bool = False  # in such steps: all contexts are about equally long
    # There are fewer decode rows than their places, and so the tokens of the longer rows begin sooner: only
    # `query_start_R1` and `context_len_R` say which rows there are. A recorded step with prompts is like that.
    is_padded: bool = False
    scratch: dict[Any, Any] = field(default_factory=dict)
    others: tuple["AttentionMetadata", ...] = ()  # the same step in the tables of further groups of layers

    def of_group(self, group: int) -> "AttentionMetadata":
        """Where the step's tokens stand for the layers of one group (`protocol.kv_groups`)."""
        return self.others[group - 1] if group else self


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What is the same in every step of one layer: heads of this rank, scale and window, and what logits go through."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    sliding_window: int | None = None
    interleaved: bool = False  # rotated pairs are (0, 1), (2, 3) ..
    soft_cap: float | None = None  # logits become cap * tanh(logits / cap)
    alibi_slopes_N: Tensor | None = None  # then slope * (key - query) is added
    sinks_N: Tensor | None = None  # then a logit of its own joins the softmax, without a value
    kv_scales: tuple[float, float] = (1.0, 1.0)  # the cache holds keys and values over these
    is_packed: bool = False  # few rows leave room beside them: the products around have packed words, or hold the chip
    beside_rings: bool = False  # the products around bring their weights before they wait

    @property
    def is_plain(self) -> bool:
        """Whether logits go to the softmax as they are."""
        return self.soft_cap is None and self.alibi_slopes_N is None and self.sinks_N is None


@dataclass(frozen=True, slots=True)
class QKNorm:
    """RMS norms over each head of q and of k, before the rotation."""

    q_weight_H: Tensor
    k_weight_H: Tensor
    eps: float
    weight_XH: Tensor  # the same for each of the X = N + K heads in a row, to norm q and k together


class AttentionBackend(Protocol):
    """Attention of one layer over the paged cache: `forward`, or its two moves.

    The table of rotations may be narrower than a head, which leaves the rest of it alone; None rotates nothing.
    """

    def forward(
        self,
        qkv_TD: Tensor,
        positions_T: Tensor,
        cos_sin_PH: Tensor | None,
        kv_cache: tuple[Tensor, Tensor],
        metadata: AttentionMetadata,
        shape: AttentionShape,
        norm: QKNorm | None,
    ) -> Tensor:
        """From the product of q, k, v to what the heads saw, [T, N * H]. Spends `qkv_TD`."""

    def rotate_and_store(
        self,
        qkv_TD: Tensor,
        positions_T: Tensor,
        cos_sin_PH: Tensor | None,
        kv_cache: tuple[Tensor, Tensor],
        metadata: AttentionMetadata,
        shape: AttentionShape,
        norm: QKNorm | None,
    ) -> Tensor:
        """Norm (if any) and rotate q and k, write k and v to their slots. Returns q: [T, N, H]. Spends `qkv_TD`."""

    def attend(
        self, q_TNH: Tensor, kv_cache: tuple[Tensor, Tensor], metadata: AttentionMetadata, shape: AttentionShape
    ) -> Tensor:
        """Causal attention of every token to its row's cache: [T, N * H]."""
