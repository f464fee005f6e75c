"""A decoder put together from a spec's facts: what families differ in beyond the pre-norm shape of `decoder`.

Its layers are in `blocks`. T = tokens of the step, D = model width, S = tokens to be sampled.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from argosy.cluster.protocol.int_quant_spec import IntScheme
from argosy.cluster.protocol.model_spec import ModelSpec
from argosy.placement.plan import RankInfo
from argosy.placement.process_groups import ParallelContext
from argosy.workers.forward_context import ForwardContext
from argosy.workers.layers.attention import Attention
from argosy.workers.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from argosy.workers.layers.expert_exchange import ExpertExchange
from argosy.workers.layers.fp8_experts import Fp8Experts, RoundedExperts
from argosy.workers.layers.fused_checkpoint import cuts_of, transposed
from argosy.workers.layers.group_sum import open_group_sum
from argosy.workers.layers.int_experts import IntExperts
from argosy.workers.layers.linear import ParallelLinear, ReplicatedLinear
from argosy.workers.layers.mla import LatentAttention
from argosy.workers.layers.moe import Experts, MoE
from argosy.workers.layers.norm import LayerNorm, RMSNorm, make_norm
from argosy.workers.layers.position import LearnedPositions
from argosy.workers.layers.rotary import RotaryEmbedding
from argosy.workers.loading.names import Slot
from argosy.workers.models.blocks import BiasedLMHead, GeneralLayer, PlainMLP
from argosy.workers.models.decoder import Decoder, GatedMLP
from argosy.workers.models.group_forward import GroupForward
from argosy.workers.quantization.base import (
    Cut,
    linear_method_for,
)

# what a checkpoint may hold for a kind of layer that this stage has none of
OF_OTHER_LAYERS = {"weight", "bias", "e_score_correction_bias", "weight_scale_inv", "weight_scale", "input_scale"}
OF_OTHER_LAYERS |= {"qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_zero_point", "weight_shape"}
OF_OTHER_LAYERS |= {"weight_g_idx", "SCB", "weight_format"}


class GeneralDecoder(Decoder):
    """This rank's part of a decoder of any family. A family's file has its names, and what no fact can say."""

    TRANSPOSED = False  # the checkpoint has weights as [inputs, outputs]

    def __init__(
        self, spec: ModelSpec, rank: RankInfo, parallel: ParallelContext, dtype: torch.dtype, device: torch.device
    ):
        nn.Module.__init__(self)
        spec.check_layout(rank.tp_size, rank.pp_size)
        self.spec, self.rank, self.parallel, self.dtype, self.device = spec, rank, parallel, dtype, device
        self.method = linear_method_for(None)
        rotated = spec.mla.rope_size if spec.mla is not None else spec.head_size
        self.rotary = RotaryEmbedding(spec.rope, rotated, spec.max_position)
        self.local_rotary = (
            self.rotary if spec.local_rope is None else RotaryEmbedding(spec.local_rope, rotated, spec.max_position)
        )
        self.exchange = None if spec.moe is None else ExpertExchange(parallel, spec.moe)
        self.embed: VocabParallelEmbedding | None = None
        self.embed_norm: RMSNorm | LayerNorm | None = None
        self.position_table: LearnedPositions | None = None
        self.project_in: ReplicatedLinear | None = None
        if rank.is_first_stage:
            self._make_entry()
        self.layers = nn.ModuleDict(
            {str(layer): self.make_layer(layer) for layer in range(rank.first_layer, rank.last_layer)}
        )
        self.norm: RMSNorm | LayerNorm | None = None  # type: ignore[assignment]  # wider than the base's
        self.project_out: ReplicatedLinear | None = None
        self.lm_head: ParallelLMHead | None = None
        if rank.is_last_stage:
            self._make_exit()
        self._stack = list(self.layers.values())  # type: ignore[arg-type]  # layers of another class than the base's
        self._group = None
        self.offload = None
        # as transformers has it: the scale is rounded to the model's numbers first
        self.embedding_scale = float(torch.tensor(spec.embedding_scale, dtype=dtype))

    # ------------------------------------------------------------------------------------------------------- making

    def _make_entry(self) -> None:
        spec, width, dtype = self.spec, self.spec.hidden_size, self.dtype
        inner = spec.embedding_size or width
        self.embed = VocabParallelEmbedding(self.parallel, spec.vocab_size, inner, dtype=dtype)
        if spec.embedding_size:
            self.project_in = ReplicatedLinear(self.method, inner, width, bias=False, dtype=dtype)
        if spec.embedding_norm:
            self.embed_norm = make_norm(spec.norm, width, spec.norm_eps, dtype=dtype)
        if spec.position == "learned":
            self.position_table = LearnedPositions(spec.position_rows, width, spec.position_offset, dtype=dtype)

    def _make_exit(self) -> None:
        spec, dtype = self.spec, self.dtype
        inner = spec.embedding_size or spec.hidden_size
        if spec.final_norm:
            self.norm = make_norm(spec.norm, spec.hidden_size, spec.norm_eps, dtype=dtype)
        if spec.embedding_size:
            self.project_out = ReplicatedLinear(self.method, spec.hidden_size, inner, bias=False, dtype=dtype)
        head = BiasedLMHead if spec.head_bias else ParallelLMHead
        self.lm_head = head(
            self.parallel, spec.vocab_size, inner, dtype=dtype, tied_to=self.embed if spec.tied else None
        )

    def make_layer(self, layer: int) -> nn.Module:
        """One layer of this stage, by its number in the model."""
        return GeneralLayer(
            self.spec, self.parallel, self.make_attention(layer), self.make_mlp(layer), dtype=self.dtype
        )

    def make_attention(self, layer: int) -> nn.Module:
        """Its attention, with the rotation that it has."""
        spec = self.spec
        rotary: RotaryEmbedding | None = self.rotary if spec.window_of(layer) is None else self.local_rotary
        if spec.position != "rotary" or (spec.unrotated_layers and spec.unrotated_layers[layer]):
            rotary = None
        return Attention(spec, self.parallel, self.method, rotary, layer=layer, dtype=self.dtype)

    def make_mlp(self, layer: int) -> nn.Module:
        """Its MLP, or its experts."""
        if self.spec.moe is not None and self.spec.has_experts(layer):
            experts = self.make_experts(layer)
            return MoE(
                self.spec, self.parallel, dtype=self.dtype, shared=self._shared_mlp(), experts=experts,
                exchange=self.exchange,
            )  # fmt: skip
        mlp = GatedMLP if self.spec.gated else PlainMLP
        return mlp(self.spec, self.parallel, self.method, dtype=self.dtype)

    def make_experts(self, layer: int) -> Callable[..., Experts]:
        """How its experts are stored, as the checkpoint says or as we are told to round them."""
        rows = [row for row in self.NAMES.rows if row.count("{}") > 1]
        if self.spec.quantization is None or not rows:
            return Experts
        scheme = self.spec.quantization.scheme_of(rows[0].format(layer, 0))
        if scheme is None:
            return Experts
        if scheme.online and not (isinstance(scheme, IntScheme) and scheme.bits == 4):
            return RoundedExperts  # also for whole numbers: 8 bits either way
        if isinstance(scheme, IntScheme):
            return partial(IntExperts, scheme=scheme)
        return partial(Fp8Experts, scheme=scheme)

    def _shared_mlp(self) -> GatedMLP | None:
        moe = self.spec.moe
        if moe is None or not moe.shared_size:
            return None
        shared = msgspec.structs.replace(self.spec, intermediate_size=moe.shared_size, mlp_bias=False)
        parallel = self.parallel.alone() if moe.shared_is_whole else self.parallel
        return GatedMLP(shared, parallel, self.method, dtype=self.dtype)

    # ------------------------------------------------------------------------------------------------------ running

    def open_group_sum(self, max_tokens: int, max_rows: int) -> None:
        """As `Decoder.open_group_sum`, for those families whose blocks are Llama's with experts or other attention."""
        spec = self.spec
        plain = spec.block == "sequential" and spec.norm == "rms" and spec.final_norm and not spec.embedding_norm
        plain = plain and spec.position == "rotary" and not spec.embedding_size and not spec.head_bias
        scales = (spec.residual_scale, spec.embedding_scale, spec.logit_scale)
        if not plain or any(scale != 1.0 for scale in scales) or spec.final_soft_cap is not None:
            return
        if not all(isinstance(layer.mlp, MoE | GatedMLP) for layer in self._stack):
            return
        sums = open_group_sum(
            self.parallel, max_tokens=max_tokens, width=spec.hidden_size, max_rows=max_rows, dtype=self.dtype
        )
        if sums is not None:
            norm = self.norm if isinstance(self.norm, RMSNorm) else None
            self._group = GroupForward(
                self._stack, self.embed, norm, sums, None, width=spec.hidden_size, dtype=self.dtype,
                device=self.device, in_turn=self.in_turn,
            )  # fmt: skip

    def forward(
        self, token_ids_T: Tensor | None, hidden_TD: Tensor | None, positions_T: Tensor, ctx: ForwardContext
    ) -> Tensor:
        """As `Decoder.forward`."""
        num_tokens = len(positions_T)
        only_decodes = ctx.metadata.num_decode_rows == ctx.metadata.num_rows
        exchanges = self.exchange is not None and self.exchange.takes(num_tokens, only_decodes=only_decodes)
        if self._group is not None and not exchanges:
            return self._group(token_ids_T, hidden_TD, positions_T, ctx)
        if hidden_TD is None:
            assert token_ids_T is not None
            hidden_TD = self.enter(token_ids_T, positions_T)
        if exchanges:
            assert self.exchange is not None
            out_SD = self._finish(*self._run_slices(self.exchange.own_slice(hidden_TD), positions_T, ctx))
            return self.parallel.gather_rows(out_SD)[:num_tokens]
        delta_TD: Tensor | None = None
        for layer in self.in_turn():
            delta_TD = layer(delta_TD, hidden_TD, positions_T, ctx)
        return self._finish(hidden_TD, delta_TD)

    def records_prompts(self, num_tokens: int) -> bool:
        """As `Decoder.records_prompts`; not where experts' tokens are exchanged, or attention asks the device."""
        exchanges = self.exchange is not None and self.exchange.takes(num_tokens)
        return super().records_prompts(num_tokens) and not exchanges and self.spec.mla is None

    def _run_slices(self, hidden_SD: Tensor, positions_T: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor | None]:
        """All layers with the tokens divided over the group: (what came of this rank's slice, what is to be added)."""
        delta_SD: Tensor | None = None
        layers: Iterable[Any] = self.in_turn()  # of a class that has slices
        for layer in layers:
            delta_SD = layer.forward_slice(delta_SD, hidden_SD, positions_T, ctx)
        return hidden_SD, delta_SD

    def _finish(self, hidden_TD: Tensor, delta_TD: Tensor | None) -> Tensor:
        """What this stage hands on: the hidden state, on the last stage normed."""
        if self.norm is not None:
            normed: Tensor = self.norm(hidden_TD) if delta_TD is None else self.norm.add(delta_TD, hidden_TD)
            return normed
        return hidden_TD if delta_TD is None else hidden_TD.add_(delta_TD)

    def enter(self, token_ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """From tokens to what the first layer gets, [T, D]."""
        assert self.embed is not None
        x_TD: Tensor = self.embed(token_ids_T)
        if self.project_in is not None:
            x_TD = self.project_in(x_TD)
        if self.embedding_scale != 1.0:
            x_TD = x_TD * self.embedding_scale
        if self.position_table is not None:
            x_TD = x_TD + self.position_table(positions_T)
        return x_TD if self.embed_norm is None else self.embed_norm(x_TD)

    def compute_raw_logits(self, hidden_SD: Tensor) -> Tensor:
        """As `Decoder.compute_raw_logits`, scaled and capped."""
        if self.project_out is not None:
            hidden_SD = self.project_out(hidden_SD)
        logits_SV = super().compute_raw_logits(hidden_SD)
        if self.spec.logit_scale != 1.0:
            logits_SV = logits_SV * self.spec.logit_scale
        cap = self.spec.final_soft_cap
        return logits_SV if cap is None else torch.tanh(logits_SV / cap) * cap

    def _fuses(self, residual_TD: Tensor) -> bool:
        return False  # products are fused with RMS norms and SwiGLU only

    # ------------------------------------------------------------------------------------------------------ loading

    def allocate(self, modules: Collection[nn.Module] | None = None) -> None:
        """As `Decoder.allocate`, with the second table of rotations where there is one."""
        super().allocate(modules)
        if self.local_rotary is not self.rotary and (modules is None or self in modules):
            self.local_rotary.allocate(self.device)

    def finish(self, modules: Collection[nn.Module] | None = None) -> None:
        """As `Decoder.finish`."""
        loaded = list(self.modules() if modules is None else modules)
        for module in loaded:
            finish = getattr(module, "finish", None)
            if module is not self and finish is not None:
                finish()
        for module in loaded:
            if isinstance(module, LatentAttention):
                module.after_finish()

    def checkpoint_tensors(self) -> Iterator[tuple[str, nn.Module, str, Cut]]:
        """What this rank reads: (name in the checkpoint, our module, its parameter, the cut)."""
        for _, name, module, suffix, cut in self._reads():
            yield name, module, suffix, cut

    def known_names(self) -> set[str]:
        """All tensors that a checkpoint of this model may hold, of all stages."""
        own: dict[str, set[str]] = {}
        for row, name, _, _, _ in self._reads():
            own.setdefault(row, set()).add(name.rpartition(".")[2])
        names = set()
        num_experts = range(self.spec.moe.num_experts) if self.spec.moe is not None else range(0)
        for row, target in self.NAMES.rows.items():
            if target is None:
                continue
            suffixes = own.get(row, set()) if "{}" in row else {"weight", "bias"}
            if self.spec.moe is not None and ".mlp." in target.module and not suffixes:
                suffixes = OF_OTHER_LAYERS  # layers of this kind are on other stages
            for suffix in suffixes:
                for layer in range(self.spec.num_layers):
                    for expert in num_experts if row.count("{}") > 1 else (0,):
                        names.add(f"{row}.{suffix}".format(layer, expert))
        return names

    def _reads(self) -> Iterator[tuple[str, str, nn.Module, str, Cut]]:
        """(row of the table of names, name in the checkpoint, module, parameter, cut)."""
        tied_away = self.spec.tied and self.embed is None and self.lm_head is not None
        own_layers = range(self.rank.first_layer, self.rank.last_layer)
        for row, target in self.NAMES.rows.items():
            if target is None:
                continue
            for layer in own_layers if "{}" in row else (0,):
                found = self._find(target.module.format(layer))
                if tied_away and target.module == "embed":
                    found = self.lm_head
                if found is None:
                    continue
                for theirs, reads in _tensors_of(row, layer, found, target.slot):
                    for suffix, parameter, cut in _with_parameter(reads):
                        if tied_away and (target.module, suffix) in (("lm_head", "weight"), ("embed", "bias")):
                            continue  # the embedding's tensor is the head's weight here
                        if self.TRANSPOSED and suffix == "weight" and isinstance(found, ParallelLinear):
                            cut = transposed(cut)
                        yield row, f"{theirs}.{suffix}", found, parameter, cut

    def _find(self, path: str) -> nn.Module | None:
        """None also for a layer of another stage."""
        module: nn.Module = self
        for part in path.split("."):
            inner = module._modules.get(part)
            if inner is None:
                return None
            module = inner
        return module


def _tensors_of(row: str, layer: int, module: nn.Module, slot: Slot) -> Iterator[tuple[str, Iterable[tuple[Any, ...]]]]:
    """(checkpoint module, what is read of it): one of a layer, or one of each expert that this rank has."""
    if row.count("{}") < 2:
        yield row.format(layer), cuts_of(module, slot)
        return
    assert isinstance(module, Experts)
    for expert in module.own_experts:
        yield row.format(layer, expert), module.expert_cuts(slot, expert)


def _with_parameter(reads: Iterable[tuple[Any, ...]]) -> Iterator[tuple[str, str, Cut]]:
    """(last word of the name, parameter, cut), where the two are the same unless a layer says otherwise."""
    for suffix, *parameter, cut in reads:
        yield suffix, parameter[0] if parameter else suffix, cut
