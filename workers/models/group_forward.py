"""The decoder over a tensor-parallel group of GPUs that share memory: sum, addition and next norm in one launch.

With many tokens the sums of one half travel on a stream of their own while the other half is multiplied:

    main    o(A)  o(B)   mlp(A)         mlp(B)         qkv(A)  qkv(B)  attention(A and B)
    side          sum(A) sum(B)  .      sum(A)  .      sum(B)

T = tokens of the step, D = model width, X = width of q, k and v.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from argosy.workers.forward_context import ForwardContext
from argosy.workers.layers.embedding import VocabParallelEmbedding
from argosy.workers.layers.group_sum import GroupSum
from argosy.workers.layers.norm import RMSNorm

if TYPE_CHECKING:  # it imports this file
    from argosy.workers.models.decoder import DecoderLayer

OVERLAP_TOKENS = 1024  # from so many on, halves are large enough to keep the card busy
HALF_MULTIPLE = 128  # the rows of a product's tile


class GroupForward:
    """The layers of one stage, on one rank of the group. All ranks make the same calls in the same order."""

    def __init__(
        self,
        layers: "Sequence[DecoderLayer]",
        embed: VocabParallelEmbedding | None,
        norm: RMSNorm | None,
        sums: GroupSum,
        *,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.sums = sums
        self._layers, self._embed = layers, embed
        self._norms: list[RMSNorm | None] = [*(layer.input_norm for layer in layers), norm]
        self._width, self._dtype, self._device = width, dtype, device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call, unused-ignore]  # torch's own
        self._events = [torch.cuda.Event() for _ in range(4)]  # type: ignore[no-untyped-call, unused-ignore]  # as well

    def __call__(
        self, token_ids_T: Tensor | None, hidden_TD: Tensor | None, positions_T: Tensor, ctx: ForwardContext
    ) -> Tensor:
        """What `Decoder.forward` gives: [T, D], whole on every rank."""
        sums = self.sums
        if self._embed is not None:
            assert token_ids_T is not None
            num_tokens = token_ids_T.shape[0]
            residual_TD = torch.empty((num_tokens, self._width), dtype=self._dtype, device=self._device)
            self._embed.part(token_ids_T, sums.part(1, num_tokens))
            x_TD = sums.add_norm(1, residual_TD, self._norms[0], add=False)
        else:
            assert hidden_TD is not None
            residual_TD, x_TD = hidden_TD, self._layers[0].input_norm(hidden_TD)
        if len(x_TD) >= OVERLAP_TOKENS:
            return self._overlapped(x_TD, residual_TD, positions_T, ctx)
        for layer, next_norm in zip(self._layers, self._norms[1:], strict=True):
            attention, mlp = layer.attention, layer.mlp
            seen_TX = attention.attend(attention.qkv_proj.product(x_TD), positions_T, ctx)
            attention.o_proj.part(seen_TX, sums.part(0, len(x_TD)))
            x_TD = sums.add_norm(0, residual_TD, layer.mlp_norm)
            mlp.down_proj.part(mlp.inner(x_TD), sums.part(1, len(x_TD)))
            x_TD = sums.add_norm(1, residual_TD, next_norm)
        return x_TD

    def _overlapped(self, x_TD: Tensor, residual_TD: Tensor, positions_T: Tensor, ctx: ForwardContext) -> Tensor:
        """The same in two halves of the tokens; attention needs both.

        What the side stream writes was last read by a product that was launched before the side stream was told to wait
        for this one, so that two buffers do. Nothing is allocated on the side stream.
        """
        num_tokens, sums = len(x_TD), self.sums
        middle = -(-num_tokens // (2 * HALF_MULTIPLE)) * HALF_MULTIPLE
        halves = (slice(0, middle), slice(middle, num_tokens))
        main = torch.cuda.current_stream(self._device)
        after_attention, after_mlp = self._events[:2], self._events[2:]
        inner_TD, outer_TD = torch.empty_like(residual_TD), torch.empty_like(residual_TD)
        parts = sums.part(0, num_tokens), sums.part(1, num_tokens)
        xs = [x_TD[half] for half in halves]
        for number, layer in enumerate(self._layers):
            attention, mlp, next_norm = layer.attention, layer.mlp, self._norms[number + 1]
            qkv = attention.qkv_proj
            qkv_TX = torch.empty((num_tokens, qkv.num_out_own), dtype=self._dtype, device=self._device)
            for x, half, ready in zip(xs, halves, after_mlp, strict=True):
                if number:
                    main.wait_event(ready)
                qkv.part(x, qkv_TX[half])
            seen_TX = attention.attend(qkv_TX, positions_T, ctx)
            for place, (half, ready) in enumerate(zip(halves, after_attention, strict=True)):
                attention.o_proj.part(seen_TX[half], parts[0][half])
                xs[place] = self._sum_aside(main, ready, 0, residual_TD, half, layer.mlp_norm, inner_TD)
            for place, half in enumerate(halves):
                main.wait_event(after_attention[place])
                mlp.down_proj.part(mlp.inner(xs[place]), parts[1][half])
                xs[place] = self._sum_aside(main, after_mlp[place], 1, residual_TD, half, next_norm, outer_TD)
        for ready in after_mlp:
            main.wait_event(ready)
        return sums.whole(xs, residual_TD if self._norms[-1] is None else outer_TD)

    def _sum_aside(
        self,
        main: "torch.cuda.Stream",
        ready: "torch.cuda.Event",
        which: int,
        residual_TD: Tensor,
        half: slice,
        norm: RMSNorm | None,
        out_TD: Tensor,
    ) -> Tensor:
        self._side.wait_stream(main)
        with torch.cuda.stream(self._side):
            made = self.sums.add_norm(which, residual_TD[half], norm, first_row=half.start, out_TD=out_TD[half])
            ready.record(self._side)
        return made
