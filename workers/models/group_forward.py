"""The decoder over a tensor-parallel group of GPUs that share memory: sum, addition and next norm in one launch.

With many tokens the sums of one half are done by copy engines while the other half is multiplied:

    main    o(A)  o(B)   mlp(A)         mlp(B)         qkv(A)  qkv(B)  attention(A and B)
    side          sum(A) sum(B)  .      sum(A)  .      sum(B)

T = tokens of the step, D = model width, X = width of q, k and v.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from argosy.placement.switches import read_count
from argosy.workers.forward_context import ForwardContext
from argosy.workers.layers.chains import Chain
from argosy.workers.layers.embedding import VocabParallelEmbedding
from argosy.workers.layers.group_sum import EMBEDDED, GroupCopies, GroupSum
from argosy.workers.layers.norm import RMSNorm

if TYPE_CHECKING:  # it imports this file
    from argosy.workers.models.decoder import DecoderLayer

LEAST_OVERLAP_TOKENS = 1024  # from so many on, halves are large enough to keep the card busy
# Over two H200 the host takes 37 ms to queue the 32 layers of a step in halves, flags and copies (8B; a step of 1131
# tokens with 512 rows took 38 ms that way, one of 935 in one piece 17): fewer tokens than keep the cards as long
# are faster with their sums in between.
HOST_SECONDS_A_LAYER = 1.15e-3
PRODUCT_BYTES_PER_SECOND = 650e12  # of weights, times tokens: 16-bit weights at 650 TFLOP/s
SUM_BYTES_PER_SECOND = 0.64e12  # of a sum over the group, times ranks
# From so many on where the step is recorded, which costs the host nothing: 8B over four H200, in one piece and in
# halves, 2048 tokens 18.6 and 20.4 ms, 4096 tokens 35.1 and 33.0, 8192 tokens 65.3 and 56.1.
LEAST_RECORDED_TOKENS = 4096
HALF_MULTIPLE = 128  # the rows of a product's tile


def least_overlapped(layer_bytes: int, token_bytes: int, num_ranks: int) -> int:
    """From how many tokens on a layer keeps the cards longer than the host takes to queue it in halves."""
    # for tests, and for who wants to measure it; of fewer the second half would have no rows
    asked = read_count("ARGOSY_OVERLAP_TOKENS", 2 * HALF_MULTIPLE)
    if asked is not None:
        return asked
    seconds = layer_bytes / PRODUCT_BYTES_PER_SECOND + 2 * token_bytes * num_ranks / SUM_BYTES_PER_SECOND
    return max(LEAST_OVERLAP_TOKENS, round(HOST_SECONDS_A_LAYER / seconds))


class GroupForward:
    """The layers of one stage, on one rank of the group. All ranks make the same calls in the same order."""

    def __init__(
        self,
        layers: "Sequence[DecoderLayer]",  # or of another class with the same parts, whose norms are RMS norms
        embed: VocabParallelEmbedding | None,
        norm: RMSNorm | None,
        sums: GroupSum,
        copies: GroupCopies | None,
        *,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        in_turn: "Callable[[], Iterable[DecoderLayer]]",
        chains: Sequence[Chain] = (),
    ):
        """`in_turn`: the same layers, each with its weights on the device while a loop's body runs. `chains`: for a few
        tokens, where all weights stay."""
        self.sums, self._in_turn, self._chains = sums, in_turn, chains
        self._layers, self._embed = layers, embed
        self._norms: list[RMSNorm | None] = [*(layer.input_norm for layer in layers), norm]
        self._width, self._dtype, self._device = width, dtype, device
        self._copies = copies
        layer_bytes = sum(weight.numel() * weight.element_size() for weight in layers[0].parameters())
        self._overlap_tokens = least_overlapped(layer_bytes, width * dtype.itemsize, sums.num_ranks)
        self._recorded_tokens = min(self._overlap_tokens, LEAST_RECORDED_TOKENS)
        # of high priority: its short kernels go between two products, not behind all that are queued
        make_stream: Any = torch.cuda.Stream  # torch gives these no types
        make_event: Any = torch.cuda.Event
        self._side = make_stream(device, priority=-1)
        self._after_attention = [make_event(), make_event()]
        self._after_mlp = [make_event(), make_event()]

    def __call__(
        self, token_ids_T: Tensor | None, hidden_TD: Tensor | None, positions_T: Tensor, ctx: ForwardContext
    ) -> Tensor:
        """What `Decoder.forward` gives: [T, D], whole on every rank."""
        sums = self.sums
        if self._embed is not None:
            assert token_ids_T is not None
            num_tokens = token_ids_T.shape[0]
            residual_TD = torch.empty((num_tokens, self._width), dtype=self._dtype, device=self._device)
            whole = self._overlaps(num_tokens, ctx)
            self._embed.part(token_ids_T, sums.part(EMBEDDED, num_tokens))
            x_TD = sums.add_norm(EMBEDDED, residual_TD, self._norms[0], add=False, whole=whole)
        else:
            assert hidden_TD is not None
            residual_TD, x_TD = hidden_TD, self._layers[0].input_norm(hidden_TD)
        for chain in self._chains:
            if chain.takes(len(x_TD)):
                qkv_TX = self._layers[0].attention.qkv_proj.product(x_TD)
                return chain.through(self._layers, self._norms[1:], qkv_TX, residual_TD, positions_T, ctx)
        if self._copies is not None and self._overlaps(len(x_TD), ctx):
            return self._overlapped(self._copies, x_TD, residual_TD, positions_T, ctx)
        in_pieces = sums.takes_pieces(len(x_TD))
        for layer, next_norm in zip(self._in_turn(), self._norms[1:], strict=True):
            place_TD = sums.part(0, len(x_TD))
            left = layer.attention.part(x_TD, positions_T, ctx, place_TD, in_pieces=in_pieces)
            x_TD = sums.add_norm(0, residual_TD, layer.mlp_norm, left=left)
            left = layer.mlp.part(x_TD, sums.part(1, len(x_TD)), in_pieces=in_pieces)
            x_TD = sums.add_norm(1, residual_TD, next_norm, left=left)
        return x_TD

    def _overlaps(self, num_tokens: int, ctx: ForwardContext) -> bool:
        """Whether a step of so many tokens goes in halves."""
        if self._copies is None:
            return False
        recorded = self._copies.in_graphs and ctx.metadata.is_padded
        return num_tokens >= (self._recorded_tokens if recorded else self._overlap_tokens)

    def records(self, num_tokens: int) -> bool:
        """Whether a step of so many tokens may be recorded; the same on all ranks."""
        return self._copies is None or self._copies.in_graphs or num_tokens < self._overlap_tokens

    def _overlapped(
        self, copies: GroupCopies, x_TD: Tensor, residual_TD: Tensor, positions_T: Tensor, ctx: ForwardContext
    ) -> Tensor:
        """The same in two halves of the tokens; attention needs both. Nothing is allocated on the side stream."""
        num_tokens, sums = len(x_TD), self.sums
        middle = -(-num_tokens // (2 * HALF_MULTIPLE)) * HALF_MULTIPLE
        halves = (slice(0, middle), slice(middle, num_tokens))
        main = torch.cuda.current_stream(self._device)
        parts = sums.part(0, num_tokens), sums.part(1, num_tokens)
        shared_TD = sums.shared(num_tokens)
        for number, layer in enumerate(self._in_turn()):
            attention, mlp = layer.attention, layer.mlp
            qkv = attention.qkv_proj
            qkv_TX = torch.empty((num_tokens, qkv.num_out_own), dtype=self._dtype, device=self._device)
            for half, ready in zip(halves, self._after_mlp, strict=True):
                if number:
                    main.wait_event(ready)
                qkv.part((shared_TD if number else x_TD)[half], qkv_TX[half])
            seen_TX = attention.attend(qkv_TX, positions_T, ctx)
            if (
                ctx.asked_rows_S is not None
                and number
                and number + 2 == len(self._norms)
                and self._norms[-1] is not None
            ):
                owned_S = copies.owns(ctx.asked_rows_S, halves)
                return self._finish_rows(seen_TX, residual_TD, layer, ctx.asked_rows_S, owned_S)
            for half, ready in zip(halves, self._after_attention, strict=True):
                attention.o_proj.part(seen_TX[half], parts[0][half])
                self._sum_aside(copies, main, ready, 0, residual_TD, half, layer.mlp_norm)
            for place, half in enumerate(halves):
                main.wait_event(self._after_attention[place])
                mlp.down_proj.part(mlp.inner(shared_TD[half]), parts[1][half])
                self._sum_aside(
                    copies, main, self._after_mlp[place], 1, residual_TD, half, self._norms[number + 1]
                )  # fmt: skip
        for ready in self._after_mlp:
            main.wait_event(ready)
        return shared_TD if self._norms[-1] is not None else residual_TD.copy_(shared_TD)

    def _finish_rows(
        self, seen_TX: Tensor, residual_TD: Tensor, layer: "DecoderLayer", rows_S: Tensor, owned_S: Tensor
    ) -> Tensor:
        """The rest of the last layer for the rows that are asked for, [S, D]: few, so sums are kernels again.

        Each row of the residual comes from its owner; nobody reads the parts of the layer before any more, since this
        stream has waited for its sums.
        """
        sums, num_rows = self.sums, len(rows_S)
        residual_SD = residual_TD[rows_S]
        if num_rows == 0:
            return residual_SD
        sums.part(1, num_rows).copy_(residual_SD.masked_fill_(~owned_S[:, None], 0.0))
        sums.add_norm(1, residual_SD, None, add=False)
        layer.attention.o_proj.part(seen_TX[rows_S], sums.part(0, num_rows))
        x_SD = sums.add_norm(0, residual_SD, layer.mlp_norm)
        layer.mlp.down_proj.part(layer.mlp.inner(x_SD), sums.part(1, num_rows))
        return sums.add_norm(1, residual_SD, self._norms[-1])

    def _sum_aside(
        self,
        copies: GroupCopies,
        main: "torch.cuda.Stream",
        ready: "torch.cuda.Event",
        which: int,
        residual_TD: Tensor,
        half: slice,
        norm: RMSNorm | None,
    ) -> None:
        self._side.wait_stream(main)
        with torch.cuda.stream(self._side):
            copies.sum_rows(self._side, which, residual_TD, half, norm)
            ready.record(self._side)
