"""What a tensor-parallel group of GPUs that address each other does in one launch instead of a collective and two more.

Products of a rank are written where its peers can read them; `add_norm` sums them, adds them to the residual and norms
(`kernels/group_sum.py`). The choice of the most likely token exchanges 8 bytes a row, not the logits.
T = tokens, D = model width, R = rows that sample, V = this rank's part of the vocabulary.
"""

import torch
from torch import Tensor

from argosy.placement.process_groups import ParallelContext
from argosy.workers.layers.norm import RMSNorm

NUM_PARTS = 2  # in turn: a peer may still read what was written last, never what was written before that
SCATTER_ROWS = 64  # from so many on, with more than two ranks, bytes count more than a second trip over the link


class GroupSum:
    """The shared buffer of one rank: flags, two places for products, one for results, one for choices.

    All ranks of the group make the same calls in the same order on one stream.
    """

    def __init__(self, parallel: ParallelContext, *, max_tokens: int, width: int, max_rows: int, dtype: torch.dtype):
        """Collective. Raises nothing where GPUs can't address each other: ask `open_group_sum`."""
        from argosy.kernels import group_sum  # Triton, which a CPU host has no need of

        self._kernels = group_sum
        self._rank, self._world = parallel.rank.tp_rank, parallel.tp_size
        self._max_rows, self._dtype, self._width = max_rows, dtype, width
        self._part_bytes = -(-max_tokens * width * dtype.itemsize // 256) * 256
        self._shared_bytes = group_sum.FLAG_BYTES + NUM_PARTS * self._part_bytes
        self._choice_bytes = self._shared_bytes + self._part_bytes
        # kept, since it holds the peers' memory open
        self._buffer = parallel.shared_buffer(self._choice_bytes + self._world * max_rows * 8)
        self._counters = torch.zeros(group_sum.MAX_PROGRAMS, dtype=torch.int32, device=parallel.device)

    def part(self, which: int, num_tokens: int) -> Tensor:
        """Where this rank's product goes, [T, D]. Turn about: 0, 1, 0, 1."""
        assert num_tokens * self._width * self._dtype.itemsize <= self._part_bytes, num_tokens
        return self._view(self._kernels.FLAG_BYTES + which * self._part_bytes, num_tokens)

    def add_norm(
        self,
        which: int,
        residual_TD: Tensor,
        norm: RMSNorm | None,
        *,
        add: bool = True,
        first_row: int = 0,
        out_TD: Tensor | None = None,
    ) -> Tensor:
        """residual (+)= the sum of all parts. Returns its norm, or itself without one, valid until the next call.

        `first_row`: where in the parts the rows begin; `out_TD`: where the norm may go. With many rows over many ranks
        each rank keeps only its own rows of the residual up to date; what is returned is whole on every rank.
        """
        num_tokens = residual_TD.shape[0]
        scatters = self._world > 2 and num_tokens > SCATTER_ROWS
        offset = first_row * self._width * self._dtype.itemsize
        made_TD = self._kernels.sum_add_norm(
            self._buffer.addresses_W,
            self._counters,
            self._rank,
            residual_TD,
            None if norm is None else norm.weight,
            0.0 if norm is None else norm.eps,
            parts_bytes=self._kernels.FLAG_BYTES + which * self._part_bytes + offset,
            shared_bytes=self._shared_bytes + offset if scatters else None,
            shared_TD=self._view(self._shared_bytes + offset, num_tokens) if scatters else None,
            out_TD=out_TD,
            add=add,
        )
        return residual_TD.copy_(made_TD) if norm is None and scatters else made_TD

    def whole(self, pieces: list[Tensor], into_TD: Tensor) -> Tensor:
        """Pieces of neighbouring rows that `add_norm` gave, as one tensor: `into_TD` if they lie in it."""
        first = pieces[0]
        if first.data_ptr() == into_TD.data_ptr():
            return into_TD
        return self._view(self._shared_bytes, into_TD.shape[0])

    def choose(self, logits_RV: Tensor, ids_R: Tensor, first_id: int) -> tuple[Tensor, Tensor]:
        """From this rank's most likely tokens (columns of its logits) to the group's: (ids, their logits)."""
        return self._kernels.choose_over_group(
            self._buffer.addresses_W, self._counters, self._rank, logits_RV, ids_R, first_id,
            place_bytes=self._choice_bytes, max_rows=self._max_rows,
        )  # fmt: skip

    def _view(self, at: int, num_tokens: int) -> Tensor:
        size = num_tokens * self._width * self._dtype.itemsize
        return self._buffer.local[at : at + size].view(self._dtype).view(num_tokens, self._width)


def open_group_sum(
    parallel: ParallelContext, *, max_tokens: int, width: int, max_rows: int, dtype: torch.dtype
) -> GroupSum | None:
    """A group's sums over shared memory, None on a CPU, for one rank, or where the GPUs can't address each other."""
    if not parallel.shares_memory:
        return None
    return GroupSum(parallel, max_tokens=max_tokens, width=width, max_rows=max_rows, dtype=dtype)
