"""The pre-norm decoder that most families share. A stage is a contiguous range of its layers.

T = tokens of the step (padding included), D = model width, S = tokens to be sampled.

    first stage                 every stage                                            last stage
    embed -> residual     for each layer: residual += attention(norm(residual))     norm -> lm_head
                                          residual += mlp(norm(residual))
"""

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from argosy.cluster.protocol.model_spec import ModelSpec
from argosy.kernels import fp8_ops, step_ops
from argosy.kernels.cpu_steps import CpuSteps
from argosy.kernels.fp8_reference import Fp8Rows
from argosy.kernels.norm_ahead import NormAhead
from argosy.placement.plan import RankInfo
from argosy.placement.process_groups import ParallelContext
from argosy.workers.forward_context import ForwardContext
from argosy.workers.layers.activation import GATED_ACTIVATIONS
from argosy.workers.layers.attention import Attention
from argosy.workers.layers.chains import Chain, open_chains
from argosy.workers.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from argosy.workers.layers.group_sum import Left, open_group_copies, open_group_sum
from argosy.workers.layers.linear import MergedColumnParallelLinear, ParallelLinear, RowParallelLinear
from argosy.workers.layers.norm import RMSNorm
from argosy.workers.layers.rotary import RotaryEmbedding
from argosy.workers.loading.names import LLAMA_NAMES, NameTable
from argosy.workers.models.group_forward import HALF_MULTIPLE, GroupForward
from argosy.workers.quantization.base import Cut, Fusion, LinearMethod, linear_method_for
from argosy.workers.weight_offload import WeightOffload


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)); one all-reduce at the end."""

    def __init__(self, spec: ModelSpec, parallel: ParallelContext, method: LinearMethod, *, dtype: torch.dtype):
        super().__init__()
        width, inner, bias = spec.hidden_size, spec.intermediate_size, spec.mlp_bias
        self.gate_up_proj = MergedColumnParallelLinear(
            parallel, method, width, {"gate": inner, "up": inner}, bias=bias, dtype=dtype
        )
        self.down_proj = RowParallelLinear(parallel, method, inner, width, bias=bias, dtype=dtype)
        self.activate = GATED_ACTIVATIONS[spec.activation]
        self.is_silu = spec.activation == "silu"
        self.native: CpuSteps | None = None  # on a CPU, once it is compiled

    def inner(self, x_TD: Tensor) -> Tensor:
        """act(gate(x)) * up(x), this rank's share."""
        if self.is_silu and self.gate_up_proj.method.fuses(self.gate_up_proj, x_TD):
            return self.gate_up_proj.fused(x_TD, Fusion(gated=True))
        return self._gate(self.gate_up_proj(x_TD))

    def _gate(self, both_TX: Tensor) -> Tensor:
        if self.native is not None and self.is_silu and self.native.takes(both_TX):
            return self.native.silu_and_mul(both_TX)
        return self.activate(both_TX)

    def partial(self, x_TD: Tensor) -> Tensor:
        """`forward` without the sum over the group."""
        return self.down_proj.product(self.inner(x_TD))

    def part(self, x_TD: Tensor, out_TD: Tensor, *, in_pieces: bool = False) -> Left:
        """`partial`, written to `out_TD`, or with `in_pieces` maybe left as `ParallelLinear.part` does."""
        return Left(self.down_proj.part(self.inner(x_TD), out_TD, in_pieces=in_pieces))

    def forward(self, x_TD: Tensor | Fp8Rows, *, pieces: bool = False) -> Tensor:
        """[T, D]; with `pieces` as `RowParallelLinear.pieces` leaves it."""
        inner_TX: Tensor | Fp8Rows | None = self.gate_up_proj.gated(x_TD) if self.is_silu else None
        if inner_TX is None:
            both_TX = self.gate_up_proj(x_TD)
            rounding = self.down_proj.rounding(both_TX) if self.is_silu else None
            inner_TX = self._gate(both_TX) if rounding is None else fp8_ops.gate_and_quantize(both_TX, rounding)
        return self.down_proj.pieces(inner_TX) if pieces else self.down_proj(inner_TX)


class DecoderLayer(nn.Module):
    """Attention and MLP, each with its norm before it. The sum of what came before is kept apart, as `residual`."""

    def __init__(
        self,
        spec: ModelSpec,
        parallel: ParallelContext,
        method: LinearMethod,
        rotary: RotaryEmbedding,
        *,
        layer: int,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.input_norm = RMSNorm(spec.hidden_size, spec.norm_eps, dtype=dtype)
        self.attention = Attention(spec, parallel, method, rotary, layer=layer, dtype=dtype)
        self.mlp_norm = RMSNorm(spec.hidden_size, spec.norm_eps, dtype=dtype)
        self.mlp = GatedMLP(spec, parallel, method, dtype=dtype)

    def forward(self, delta_TD: Tensor | None, residual_TD: Tensor, positions_T: Tensor, ctx: ForwardContext) -> Tensor:
        """What is still to be added to `residual_TD`, which this layer updates in place."""
        return self.forward_rows(delta_TD, residual_TD, positions_T, ctx, None)[0]

    def forward_rows(
        self,
        delta_TD: Tensor | None,
        residual_TD: Tensor,
        positions_T: Tensor,
        ctx: ForwardContext,
        rows_S: Tensor | None,
        following: "DecoderLayer | None" = None,
    ) -> tuple[Tensor, Tensor]:
        """What is still to be added, and the residual to add it to: of `rows_S` alone, where nobody asks for others.

        All tokens leave their keys and values in the cache. Where `following` rounds what it adds, that may come in
        pieces (`RowParallelLinear.pieces`)."""
        norm, attention, mlp = self.input_norm, self.attention, self.mlp
        rounding = attention.qkv_proj.rounding(residual_TD)
        if delta_TD is None:
            x_TD = norm.rounded(residual_TD, rounding)
        else:
            x_TD = norm.add_rounded(delta_TD, residual_TD, rounding)
        seen_TX = attention.attend(attention.qkv_proj(x_TD), positions_T, ctx)
        if rows_S is not None:
            seen_TX, residual_TD = seen_TX[rows_S], residual_TD[rows_S]
            if residual_TD.shape[0] == 0:
                return residual_TD, residual_TD
        rounding = mlp.gate_up_proj.rounding(residual_TD)
        delta_TD = attention.o_proj(seen_TX) if rounding is None else attention.o_proj.pieces(seen_TX)
        x_TD = self.mlp_norm.add_rounded(delta_TD, residual_TD, rounding)
        in_pieces = following is not None and following.attention.qkv_proj.rounding(residual_TD) is not None
        return mlp(x_TD, pieces=in_pieces), residual_TD

    def forward_fused(
        self,
        residual_TD: Tensor,
        positions_T: Tensor,
        ctx: ForwardContext,
        rows_S: Tensor | None = None,
        *,
        normed: NormAhead | None = None,
        following: "DecoderLayer | None" = None,
    ) -> tuple[Tensor, NormAhead | None]:
        """The same on one GPU, with nothing left to add: five launches, four of them products, and for some rows one
        more for each norm. `normed` is what the layer before left of this one's; gives the residual, and what it left
        for `following`.
        """
        attention, mlp, norm = self.attention, self.mlp, self.input_norm
        qkv_TX = attention.qkv_proj.fused(residual_TD, Fusion(norm.weight, norm.eps, normed=normed))
        seen_TX = attention.attend(qkv_TX, positions_T, ctx)
        if rows_S is not None:
            seen_TX, residual_TD = seen_TX[rows_S], residual_TD[rows_S]
            if residual_TD.shape[0] == 0:
                return residual_TD, None
        norm = self.mlp_norm
        between = attention.o_proj.norm_ahead(mlp.gate_up_proj, residual_TD, norm.weight, norm.eps)
        attention.o_proj.fused(seen_TX, Fusion(residual_TO=residual_TD, ahead=between))
        inner_TX = mlp.gate_up_proj.fused(residual_TD, Fusion(norm.weight, norm.eps, gated=True, normed=between))
        ahead = None
        if following is not None:
            norm, qkv_proj = following.input_norm, following.attention.qkv_proj
            ahead = mlp.down_proj.norm_ahead(qkv_proj, residual_TD, norm.weight, norm.eps)
        mlp.down_proj.fused(inner_TX, Fusion(residual_TO=residual_TD, ahead=ahead))
        return residual_TD, ahead


class Decoder(nn.Module):
    """This rank's part of a decoder. Its parameters have no memory until `load_weights` found the checkpoint sound."""

    NAMES: NameTable = LLAMA_NAMES

    def __init__(
        self, spec: ModelSpec, rank: RankInfo, parallel: ParallelContext, dtype: torch.dtype, device: torch.device
    ):
        super().__init__()
        spec.check_layout(rank.tp_size, rank.pp_size)
        self.spec, self.rank, self.parallel, self.dtype, self.device = spec, rank, parallel, dtype, device
        method = linear_method_for(None)
        self.rotary = RotaryEmbedding(spec.rope, spec.head_size, spec.max_position)
        self.embed = (
            VocabParallelEmbedding(parallel, spec.vocab_size, spec.hidden_size, dtype=dtype)
            if rank.is_first_stage
            else None
        )
        # by the global number of the layer, so that names mean the same on every stage
        self.layers = nn.ModuleDict(
            {
                str(layer): DecoderLayer(spec, parallel, method, self.rotary, layer=layer, dtype=dtype)
                for layer in range(rank.first_layer, rank.last_layer)
            }
        )
        self.norm: RMSNorm | None = None
        self.lm_head: ParallelLMHead | None = None
        if rank.is_last_stage:
            self.norm = RMSNorm(spec.hidden_size, spec.norm_eps, dtype=dtype)
            self.lm_head = ParallelLMHead(
                parallel,
                spec.vocab_size,
                spec.hidden_size,
                dtype=dtype,
                tied_to=self.embed if spec.tied else None,
            )
        self._stack = [layer for layer in self.layers.values() if isinstance(layer, DecoderLayer)]
        self._group: GroupForward | None = None
        self._chains: list[Chain] = []
        self.offload: WeightOffload | None = None

    def open_group_sum(self, max_tokens: int, max_rows: int) -> None:
        """Share memory with the tensor-parallel group where its GPUs can. Collective, once, before the first step."""
        if type(self).forward is not Decoder.forward or len(self._stack) != len(self.layers):
            return
        if any(type(layer) is not DecoderLayer for layer in self._stack):
            return
        width = self.spec.hidden_size
        if self.parallel.tp_size == 1:
            self._chains = self._open_chains()
        options = {"max_tokens": max_tokens, "width": width, "max_rows": max_rows}
        sums = open_group_sum(self.parallel, **options, dtype=self.dtype)
        if sums is not None:
            copies = open_group_copies(self.parallel, sums, max_rows=max_tokens // 2 + HALF_MULTIPLE)
            self._group = GroupForward(
                self._stack, self.embed, self.norm, sums, copies, width=width, dtype=self.dtype, device=self.device,
                in_turn=self.in_turn, chains=self._open_chains(),
            )  # fmt: skip

    def _open_chains(self) -> list[Chain]:
        """Not with weights that come through the link: they are asked for long before their turn."""
        plain = self.offload is None
        return open_chains(self.parallel, self._stack, self.spec.hidden_size, self.dtype) if plain else []

    def forward(
        self, token_ids_T: Tensor | None, hidden_TD: Tensor | None, positions_T: Tensor, ctx: ForwardContext
    ) -> Tensor:
        """[T, D]: the hidden state for the next stage, or on the last one the normed state for `compute_logits`.

        The first stage gets token ids; the others what the stage before them returned, which is overwritten. The last
        one may give [S, D], the rows that the context asks for: its last layer then multiplies these alone.
        """
        if self._group is not None:
            return self._group(token_ids_T, hidden_TD, positions_T, ctx)
        if self.embed is not None:
            residual_TD: Tensor = self.embed(token_ids_T)
        else:
            assert hidden_TD is not None
            residual_TD = hidden_TD
        for chain in self._chains if ctx.asked_rows_S is None else ():
            if chain.takes(len(residual_TD)):
                norm = self._stack[0].input_norm
                qkv_TX = self._stack[0].attention.qkv_proj.fused(residual_TD, Fusion(norm.weight, norm.eps))
                norms = [*(layer.input_norm for layer in self._stack[1:]), self.norm]
                return chain.through(self._stack, norms, qkv_TX, residual_TD, positions_T, ctx)
        # the last layer of all leaves out the tokens whose state nobody asks for, once their keys are in the cache
        last = len(self._stack) if self.norm is not None else 0
        fuses = self._fuses(residual_TD)
        delta_TD: Tensor | None = None
        normed: NormAhead | None = None
        for number, layer in enumerate(self.in_turn(), start=1):
            rows_S = ctx.asked_rows_S if number == last else None
            following = self._stack[number] if number < len(self._stack) and self.offload is None else None
            if fuses:
                residual_TD, normed = layer.forward_fused(
                    residual_TD, positions_T, ctx, rows_S, normed=normed, following=following
                )
            else:
                delta_TD, residual_TD = layer.forward_rows(delta_TD, residual_TD, positions_T, ctx, rows_S, following)
        if residual_TD.shape[0] == 0:
            return residual_TD
        if delta_TD is None:
            return residual_TD if self.norm is None else self.norm(residual_TD)
        return residual_TD.add_(delta_TD) if self.norm is None else self.norm.add(delta_TD, residual_TD)

    def records_prompts(self, num_tokens: int) -> bool:
        """Whether a step of so many tokens, prompts among them, may be recorded; the same on all ranks of a group.

        Not with weights that come through the link, or halves whose flags the driver can't record.
        """
        return self.offload is None and (self._group is None or self._group.records(num_tokens))

    def enter(self, token_ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """From tokens to what the first layer gets, [T, D]."""
        assert self.embed is not None
        return self.embed(token_ids_T)  # type: ignore[no-any-return]  # a module's call is Any

    def through(
        self, layer: Any, residual_TD: Tensor, positions_T: Tensor, ctx: ForwardContext, rows_S: Tensor | None = None
    ) -> Tensor:
        """One layer of `in_turn`, what it gives added to `residual_TD`, which is spent; of `rows_S` alone if given."""
        if self._fuses(residual_TD):
            return layer.forward_fused(residual_TD, positions_T, ctx, rows_S)[0]  # type: ignore[no-any-return]  # a module's call is Any
        if isinstance(layer, DecoderLayer):
            delta_TD, residual_TD = layer.forward_rows(None, residual_TD, positions_T, ctx, rows_S)
            return residual_TD.add_(delta_TD) if residual_TD.shape[0] else residual_TD
        made_TD: Tensor | None = layer(None, residual_TD, positions_T, ctx)
        if made_TD is not None:
            residual_TD.add_(made_TD)
        return residual_TD if rows_S is None else residual_TD[rows_S]

    def leave(self, residual_TD: Tensor) -> Tensor:
        """From what the last layer of the model left to what `compute_logits` takes, [T, D]."""
        return residual_TD if self.norm is None else self.norm(residual_TD)

    def in_turn(self) -> "Iterable[DecoderLayer]":
        """The layers of this stage, each with its weights on the device while the loop's body runs."""
        return self._stack if self.offload is None else self.offload.in_turn(self._stack)

    def _fuses(self, residual_TD: Tensor) -> bool:
        """Whether products are fused with their neighbours. Not over a group: its sum stands between them."""
        probe = self._stack[0].attention.qkv_proj
        return self.parallel.tp_size == 1 and self.spec.activation == "silu" and probe.method.fuses(probe, residual_TD)

    def compute_raw_logits(self, hidden_SD: Tensor) -> Tensor:
        """[S, vocabulary] in the model's numbers, on every rank of the last stage's group."""
        assert self.lm_head is not None, "only the last stage has the head"
        logits_SV: Tensor = self.lm_head(hidden_SD)
        return logits_SV

    @property
    def chooses_over_group(self) -> bool:
        """Whether `choose` finds the most likely token without gathering the logits."""
        return self._group is not None

    def compute_own_logits(self, hidden_SD: Tensor) -> Tensor:
        """[S, W] of this rank's share of the vocabulary and its padding, in the model's numbers."""
        assert self.lm_head is not None
        return self.lm_head.part(hidden_SD)

    def gather_logits(self, own_logits_SW: Tensor) -> Tensor:
        """From `compute_own_logits` of all ranks to the logits of the whole vocabulary, on every rank."""
        assert self.lm_head is not None
        return self.lm_head.gather(own_logits_SW)

    def choose(self, own_logits_SW: Tensor) -> tuple[Tensor, Tensor]:
        """The most likely tokens of the whole vocabulary (int64) and their logits (float32), on every rank."""
        assert self._group is not None
        assert self.lm_head is not None
        ids_S = step_ops.argmax_rows(own_logits_SW[:, : self.lm_head.num_own])
        return self._group.sums.choose(own_logits_SW, ids_S, self.lm_head.share.first)

    def compute_logits(self, hidden_SD: Tensor) -> Tensor:
        """The same in float32, contiguous."""
        return self.compute_raw_logits(hidden_SD).float().contiguous()

    def allocate(self, modules: Collection[nn.Module] | None = None) -> None:
        """Give the parameters and the rotary table their memory on the device. Padding rows are zero.

        `modules`: those alone; the table comes with the model itself.
        """
        for module in self.modules() if modules is None else modules:
            for name, parameter in module.named_parameters(recurse=False):
                empty = torch.zeros if _is_padded(module) else torch.empty
                memory = empty(parameter.shape, dtype=parameter.dtype, device=self.device)
                setattr(module, name, nn.Parameter(memory, requires_grad=False))
        if modules is None or self in modules:
            self.rotary.allocate(self.device)

    def finish(self, modules: Collection[nn.Module] | None = None) -> None:
        """All weights are loaded (or those of `modules`): let every layer bring its own into shape."""
        for module in self.modules() if modules is None else modules:
            if isinstance(module, Attention | ParallelLinear | ParallelLMHead | RMSNorm):
                module.finish()

    def checkpoint_tensors(self) -> Iterator[tuple[str, nn.Module, str, Cut]]:
        """What this rank reads: (name in the checkpoint, our module, its parameter, the cut)."""
        tied_away = self.spec.tied and self.embed is None and self.lm_head is not None
        for theirs, target in self.NAMES.modules(range(self.rank.first_layer, self.rank.last_layer)):
            found = self._find(target.module)
            if tied_away and target.module == "embed":
                found = self.lm_head
            elif tied_away and target.module == "lm_head":
                continue
            if found is None:
                continue
            cuts: dict[str, Cut] = found.cuts(target.slot)  # type: ignore[operator]  # every layer of ours has it
            for suffix, cut in cuts.items():
                yield f"{theirs}.{suffix}", found, suffix, cut

    def known_names(self) -> set[str]:
        """All tensors that a checkpoint of this model may hold, of all stages."""
        own: dict[str, set[str]] = {}
        for name, _, suffix, _ in self.checkpoint_tensors():
            module = name.removesuffix(f".{suffix}").replace(f".{self.rank.first_layer}.", ".{}.")
            own.setdefault(module, set()).add(suffix)
        names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
        for row in self.NAMES.rows:
            for suffix in own.get(row, ()):
                names.update(f"{row}.{suffix}".format(layer) for layer in range(self.spec.num_layers))
        return names

    def _find(self, path: str) -> nn.Module | None:
        module: nn.Module | None = self
        for part in path.split("."):
            module = getattr(module, part, None) if not isinstance(module, nn.ModuleDict) else module[part]
            if module is None:
                return None
        return module


def _is_padded(module: nn.Module) -> bool:
    return isinstance(module, VocabParallelEmbedding | ParallelLMHead)
