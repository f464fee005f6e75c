"""What a tensor-parallel group of GPUs that address each other does in one launch instead of a collective and two more.

Products of a rank are written where its peers can read them; `add_norm` sums them, adds them to the residual and norms
(`kernels/group_sum.py`). The choice of the most likely token exchanges 8 bytes a row, not the logits.
T = tokens, D = model width, R = rows that sample, V = this rank's part of the vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from argosy.placement.process_groups import ParallelContext
from argosy.placement.step_memory import PUSH_ROW_NUMBERS
from argosy.placement.stream_flags import StreamFlags, open_stream_flags
from argosy.workers.layers.norm import RMSNorm

# A peer may still read what was written last, never what was written before that: the products of layers take turns.
# A step begins with the embedding's sum, and the last sum of the step before need not be over on all ranks where no row
# drew a token or another stage draws it: so it has a place of its own, whose last readers are a whole step behind.
NUM_PARTS = 3
EMBEDDED = 2
SCATTER_ROWS = 32  # from more rows on, with more than two ranks, bytes count more than a second trip over the link
# Numbers that bring their turn (`kernels/group_push`) are faster where one multiprocessor can send and read a row: not
# 8192 numbers over four cards (`PUSH_ROW_NUMBERS`). To all, as long as those are few bytes; else to the one who sums a
# row. On H200: 1, 32 rows of 4096 over two 3.8, 4.6 us (fetched 4.7, 5.8), over four 1, 16, 64 rows 4.7, 6.3, 9.6 (5.7,
# 7.2, 11.0).
PUSH_NUMBERS = 262144  # of all rows, times ranks


class Left(NamedTuple):
    """What else there is to say of a rank's part of a sum than what lies in its place."""

    pieces_PTD: Tensor | None = None  # float32, what adds up to it: its place was left alone
    asked: tuple[Tensor, int] | None = None  # (experts of each token, number of experts): others added nothing


class GroupSum:
    """The shared buffer of one rank: flags, three places for products, one for results, one for choices.

    All ranks of the group make the same calls in the same order on one stream.
    """

    def __init__(self, parallel: ParallelContext, *, max_tokens: int, width: int, max_rows: int, dtype: torch.dtype):
        """Collective. Raises nothing where GPUs can't address each other: ask `open_group_sum`."""
        from argosy.kernels import group_push, group_sum  # Triton, which a CPU host has no need of

        self._kernels, self._push = group_sum, group_push
        self._rank, self._world = parallel.rank.tp_rank, parallel.tp_size
        self._max_rows, self._dtype, self._width = max_rows, dtype, width
        self.max_tokens = max_tokens
        self._part_bytes = -(-max_tokens * width * dtype.itemsize // 256) * 256
        self._shared_bytes = group_sum.FLAG_BYTES + NUM_PARTS * self._part_bytes
        self._choice_bytes = self._shared_bytes + self._part_bytes
        self._flag_bytes = self._choice_bytes + self._world * max_rows * 8
        self._inbox_bytes = -(-(self._flag_bytes + 2 * self._world * 4) // 256) * 256
        pushes = self._world * width <= PUSH_ROW_NUMBERS and group_push.suits(1, width, dtype)
        self._each_inbox = each = group_push.inbox_bytes(self._world, width) if pushes else 0
        # kept, since it holds the peers' memory open
        self._buffer = parallel.shared_buffer(self._inbox_bytes + NUM_PARTS * each)
        self._counters = torch.zeros(group_sum.MAX_PROGRAMS, dtype=torch.int32, device=parallel.device)

    @property
    def num_ranks(self) -> int:
        """Of the group."""
        return self._world

    @property
    def pushes(self) -> bool:
        """Whether there is room for `push` at all."""
        return self._each_inbox > 0

    def part(self, which: int, num_tokens: int) -> Tensor:
        """Where this rank's product goes, [T, D]. In a step: `EMBEDDED`, then turn about 0, 1, 0, 1."""
        assert num_tokens * self._width * self._dtype.itemsize <= self._part_bytes, num_tokens
        return self._view(self._kernels.FLAG_BYTES + which * self._part_bytes, num_tokens)

    def add_norm(
        self,
        which: int,
        residual_TD: Tensor,
        norm: RMSNorm | None,
        *,
        add: bool = True,
        whole: bool = False,
        left: Left = Left(),  # noqa: B008 - a value
        way: str | None = None,
    ) -> Tensor:
        """residual (+)= the sum of all parts. Returns its norm, or itself without one, valid until the next call.

        With many rows over many ranks each rank keeps only its own rows of the residual up to date, unless it must be
        `whole`; what is returned always is. `left`: pieces only of so many rows as `takes_pieces` allows.
        `way` overrides `way_of` (benchmarks).
        """
        num_tokens = residual_TD.shape[0]
        way = way or self.way_of(num_tokens, whole=whole, asked=left.asked is not None)
        scatters = way.endswith("scatter")
        if way.startswith("push"):
            made_TD = self._push.push_add_norm(
                self._buffer.addresses_W, self._counters, self._rank,
                self.part(which, num_tokens) if left.pieces_PTD is None else left.pieces_PTD, residual_TD,
                None if norm is None else norm.weight, 0.0 if norm is None else norm.eps,
                inbox_at=self._inbox_bytes + which * self._each_inbox, scatter=scatters, add=add,
            )  # fmt: skip
            if norm is None:
                return residual_TD.copy_(made_TD) if scatters else residual_TD
            return made_TD
        assert left.pieces_PTD is None, way
        made_TD = self._kernels.sum_add_norm(
            self._buffer.addresses_W,
            self._counters,
            self._rank,
            residual_TD,
            None if norm is None else norm.weight,
            0.0 if norm is None else norm.eps,
            parts_bytes=self._kernels.FLAG_BYTES + which * self._part_bytes,
            shared_bytes=self._shared_bytes if scatters else None,
            shared_TD=self.shared(num_tokens) if scatters else None,
            add=add,
            asked=left.asked,
        )
        return residual_TD.copy_(made_TD) if norm is None and scatters else made_TD

    def way_of(self, num_tokens: int, *, whole: bool = False, asked: bool = False) -> str:
        """How so many rows are summed: `push` or `push scatter` (`kernels/group_push`), `pull` or `pull scatter`
        (`kernels/group_sum`)."""
        # not where ranks have whole experts: the parts of those that were not asked hold anything
        if self._each_inbox and not asked and 0 < num_tokens <= self._push.MAX_ROWS:
            if num_tokens * self._world * self._width <= PUSH_NUMBERS:
                return "push"
            if self._world > 2 and not whole:
                return "push scatter"
        return "pull scatter" if self._world > 2 and num_tokens > SCATTER_ROWS and not whole else "pull"

    def takes_pieces(self, num_tokens: int) -> bool:
        """Whether the part of so many rows may come as the pieces of a sum."""
        return self.way_of(num_tokens).startswith("push")

    def shared(self, num_tokens: int) -> Tensor:
        """Where results for all ranks go, [T, D]."""
        return self._view(self._shared_bytes, num_tokens)

    def choose(self, logits_RV: Tensor, ids_R: Tensor, first_id: int) -> tuple[Tensor, Tensor]:
        """From this rank's most likely tokens (columns of its logits) to the group's: (ids, their logits)."""
        return self._kernels.choose_over_group(
            self._buffer.addresses_W, self._counters, self._rank, logits_RV, ids_R, first_id,
            place_bytes=self._choice_bytes, max_rows=self._max_rows,
        )  # fmt: skip

    def _view(self, at: int, num_tokens: int) -> Tensor:
        size = num_tokens * self._width * self._dtype.itemsize
        return self._buffer.local[at : at + size].view(self._dtype).view(num_tokens, self._width)


class GroupCopies:
    """Sums of many rows on a stream of their own, by copy engines and flags: products keep all multiprocessors.

    Each rank copies its share of the rows from all peers, sums, adds and norms them in a launch, and the others copy
    the result. The residual of a row is kept up to date by its owner alone. A sum tells the driver the same each time,
    in nine calls over four cards, so that graphs may repeat it.
    """

    def __init__(self, sums: GroupSum, flags: StreamFlags, *, max_rows: int, in_graphs: bool = False):
        """`in_graphs`: steps with such sums may be recorded."""
        self._sums, self._flags, self.in_graphs = sums, flags, in_graphs
        self._rank, self._world = sums._rank, sums._world
        self._peers = [(self._rank + n) % self._world for n in range(1, self._world)]  # each asks another one first
        self._bases = sums._buffer.pointers
        self._row_bytes = sums._width * sums._dtype.itemsize
        share = -(-max_rows // self._world)
        local = sums._buffer.local
        self._staged_PSD = torch.empty((self._world - 1, share, sums._width), dtype=sums._dtype, device=local.device)
        # parts are there; what each rank made of its rows is there
        self._meetings = [
            flags.meeting(
                [self._flag(peer, what, self._rank) for peer in self._peers],
                [self._flag(self._rank, what, peer) for peer in self._peers],
            )
            for what in range(2)
        ]

    def sum_rows(
        self, stream: "torch.cuda.Stream", which: int, residual_TD: Tensor, rows: slice, norm: RMSNorm | None
    ) -> None:
        """residual += the sum of all parts in these rows; its norm (or itself) comes to `GroupSum.shared`, same rows.

        `stream` must be current, and must have waited for this rank's part.
        """
        sums, flags = self._sums, self._flags
        share = -(-(rows.stop - rows.start) // self._world)
        own = self._share(rows, share, self._rank)
        count, at = own.stop - own.start, sums._kernels.FLAG_BYTES + which * sums._part_bytes
        flags.meet(stream, self._meetings[0])
        staged_PSD = self._staged_PSD[:, :count]
        if count:
            at += own.start * self._row_bytes
            target, each = self._staged_PSD.data_ptr(), self._staged_PSD.stride(0) * sums._dtype.itemsize
            for place, peer in enumerate(self._peers):
                flags.copy(stream, target + place * each, self._bases[peer] + at, count * self._row_bytes)
        num_tokens = residual_TD.shape[0]
        sums._kernels.add_staged_norm(
            sums.part(which, num_tokens)[own], staged_PSD, residual_TD[own], None if norm is None else norm.weight,
            0.0 if norm is None else norm.eps, sums.shared(num_tokens)[own],
        )  # fmt: skip
        flags.meet(stream, self._meetings[1])
        for peer in self._peers:
            theirs = self._share(rows, share, peer)
            at = sums._shared_bytes + theirs.start * self._row_bytes
            if theirs.stop > theirs.start:
                num_bytes = (theirs.stop - theirs.start) * self._row_bytes
                flags.copy(stream, self._bases[self._rank] + at, self._bases[peer] + at, num_bytes)

    def owns(self, rows_S: Tensor, parts: Sequence[slice]) -> Tensor:
        """Of which rows this rank's residual is up to date after sums of these parts of the tokens."""
        owned_S = torch.zeros_like(rows_S, dtype=torch.bool)
        for part in parts:
            own = self._share(part, -(-(part.stop - part.start) // self._world), self._rank)
            owned_S |= (rows_S >= own.start) & (rows_S < own.stop)
        return owned_S

    def _share(self, rows: slice, share: int, rank: int) -> slice:
        first = min(rows.start + rank * share, rows.stop)
        return slice(first, min(first + share, rows.stop))

    def _flag(self, of: int, what: int, by: int) -> int:
        return self._bases[of] + self._sums._flag_bytes + 4 * (what * self._world + by)


def open_group_copies(parallel: ParallelContext, sums: GroupSum, *, max_rows: int) -> GroupCopies | None:
    """Sums by copy engines, or None where the driver has no flags in streams; the same answer on all ranks."""
    flags = open_stream_flags(parallel.device)
    in_graphs = flags is not None and flags.can_be_recorded(parallel.device)
    answers = torch.tensor([float(flags is not None)] * 32 + [float(in_graphs)] * 32, device=parallel.device)
    agreed = parallel.all_reduce(answers)
    if flags is None or float(agreed[0]) < parallel.tp_size:
        return None
    return GroupCopies(sums, flags, max_rows=max_rows, in_graphs=float(agreed[-1]) >= parallel.tp_size)


def open_group_sum(
    parallel: ParallelContext, *, max_tokens: int, width: int, max_rows: int, dtype: torch.dtype
) -> GroupSum | None:
    """A group's sums over shared memory, None on a CPU, for one rank, or where the GPUs can't address each other."""
    if not parallel.shares_memory:
        return None
    return GroupSum(parallel, max_tokens=max_tokens, width=width, max_rows=max_rows, dtype=dtype)
