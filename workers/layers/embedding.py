"""The vocabulary split over the tensor-parallel group, as embedding and as head.

Every rank has the same number of rows; what goes beyond the vocabulary is zero and never leaves this file.
V = vocabulary, W = rows of this rank, T = tokens, S = sampled tokens, D = model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from argosy.kernels import ops
from argosy.placement.process_groups import ParallelContext
from argosy.workers.quantization.base import (
    Cut,
    LinearLayer,
    LinearMethod,
    UnquantizedMethod,
    empty_parameter,
)


class VocabShare:
    """Which rows of the vocabulary this rank has."""

    def __init__(self, parallel: ParallelContext, vocab_size: int, width: int):
        self.vocab_size, self.width = vocab_size, width
        self.rows = -(-vocab_size // parallel.tp_size)
        self.first = min(parallel.rank.tp_rank * self.rows, vocab_size)
        self.last = min(self.first + self.rows, vocab_size)

    def cut(self) -> Cut:
        """These rows of the full table."""
        return Cut(
            (self.vocab_size, self.width),
            (slice(self.first, self.last), slice(None)),
            slice(0, self.last - self.first),
        )


class VocabParallelEmbedding(nn.Module):
    """Token ids to vectors: each rank looks up what it has, the sum over the group is the answer."""

    def __init__(self, parallel: ParallelContext, vocab_size: int, width: int, *, dtype: torch.dtype):
        super().__init__()
        self.parallel = parallel
        self.share = VocabShare(parallel, vocab_size, width)
        self.weight = empty_parameter(self.share.rows, width, dtype=dtype)

    def cuts(self, part: str) -> dict[str, Cut]:
        """This rank's rows."""
        return {"weight": self.share.cut()}

    def part(self, token_ids_T: Tensor, out_TD: Tensor) -> None:
        """This rank's part of the sum, written to `out_TD`: the vectors that it has, zeros for the others."""
        ops.embed_share(token_ids_T, self.weight, self.share.first, out_TD)

    def forward(self, token_ids_T: Tensor) -> Tensor:
        """[T, D]."""
        if self.parallel.tp_size == 1:
            if not self.weight.is_cuda:
                return F.embedding(token_ids_T, self.weight)
            # torch's kernel for up to 16 rows takes 8 us for 8 of them, ours 2 (H200)
            out_TD = self.weight.new_empty((token_ids_T.shape[0], self.weight.shape[1]))
            return ops.embed_share(token_ids_T, self.weight, 0, out_TD)
        local_T = token_ids_T - self.share.first
        foreign_T = (local_T < 0) | (local_T >= self.share.rows)
        x_TD = F.embedding(local_T.masked_fill(foreign_T, 0), self.weight)
        return self.parallel.all_reduce(x_TD.masked_fill_(foreign_T[:, None], 0.0))


class ParallelLMHead(LinearLayer):
    """Vectors to logits. Tied to an embedding of the same rank it has no weight to load, at most a packed copy."""

    def __init__(
        self,
        parallel: ParallelContext,
        vocab_size: int,
        width: int,
        *,
        dtype: torch.dtype,
        tied_to: VocabParallelEmbedding | None = None,
    ):
        super().__init__()
        self.parallel = parallel
        self.share = VocabShare(parallel, vocab_size, width)
        self.method: LinearMethod = UnquantizedMethod()
        self.method.create(self, width, self.share.rows, bias=False, dtype=dtype)
        # in a tuple, so that it is not a submodule: its weight is counted and filled where it lives
        self.tied_to = None if tied_to is None else (tied_to,)
        if tied_to is not None:
            self.weight = None

    def cuts(self, part: str) -> dict[str, Cut]:
        """This rank's rows; nothing when the embedding of this rank has them."""
        return {} if self.tied_to is not None else {"weight": self.share.cut()}

    def finish(self) -> None:
        """The weight is there."""
        if self.tied_to is not None:
            self.weight = self.tied_to[0].weight
        self.method.finish(self)

    @property
    def num_own(self) -> int:
        """How many tokens of the vocabulary this rank has; what `part` gives beyond them is padding."""
        return self.share.last - self.share.first

    def part(self, hidden_SD: Tensor) -> Tensor:
        """[S, W]: the logits of this rank's tokens, the first of which is `share.first`."""
        if self.weight is not None and self.bias is None and hidden_SD.is_cuda:
            return ops.measured_linear(hidden_SD, self.weight)
        return self.method.apply(self, hidden_SD)

    def gather(self, logits_SW: Tensor) -> Tensor:
        """[S, V] on every rank of the group from what `part` gave; rows may be strided."""
        return self.parallel.all_gather_last_dim(logits_SW)[:, : self.share.vocab_size]

    def forward(self, hidden_SD: Tensor) -> Tensor:
        """[S, V] on every rank of the group; rows may be strided."""
        return self.gather(self.part(hidden_SD))
