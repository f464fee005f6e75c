"""A model without weights whose next token is a hash of everything that stands in the row's KV blocks.

It goes where a real model goes: writes to slots, reads through block tables, sums over the TP group in every layer and
hands a hidden state to the next stage. `cluster.oracle` says in plain Python what must come out.

T tokens, R rows, K heads of this rank, H head size, P positions of the longest context, J parts of the hash.
"""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from argosy.cluster.protocol.errors import ConfigError
from argosy.cluster.protocol.model_spec import ModelSpec
from argosy.kernels import ops
from argosy.placement.plan import RankInfo
from argosy.placement.process_groups import ParallelContext
from argosy.workers.forward_context import ForwardContext
from argosy.workers.loading.names import LLAMA_NAMES, NameTable
from argosy.workers.quantization.base import Cut

# The same numbers as in `cluster.oracle`, which this room may not import; a test holds the two together.
MODULUS, PRIME = 4093, 2**31 - 1
SURE = 30.0  # the logit of the one right token; all others have 0


class OracleForCausalLM(nn.Module):
    """The layers of one stage, the heads of one TP rank."""

    NAMES: NameTable = LLAMA_NAMES  # for the loader's types; no checkpoint has any

    def __init__(
        self, spec: ModelSpec, rank: RankInfo, parallel: ParallelContext, dtype: torch.dtype, device: torch.device
    ):
        super().__init__()
        if dtype is not torch.float32:
            raise ConfigError(f"dtype={dtype}: the oracle's sums are exact in float32 only")
        if spec.num_kv_heads % rank.tp_size:
            raise ConfigError(f"tensor_parallel_size={rank.tp_size} must divide the oracle's {spec.num_kv_heads} heads")
        self.spec, self.rank, self.parallel, self.device = spec, rank, parallel, device
        self.num_heads = spec.num_kv_heads // rank.tp_size
        self.first_head = rank.tp_rank * self.num_heads
        self.num_parts = spec.hidden_size - 1

    def checkpoint_tensors(self) -> Iterable[tuple[str, nn.Module, str, Cut]]:
        """There is nothing to load."""
        return ()

    def known_names(self) -> set[str]:
        """There is nothing to load."""
        return set()

    def allocate(self, modules: Collection[nn.Module] | None = None) -> None:
        """There is nothing to load."""

    def finish(self, modules: Collection[nn.Module] | None = None) -> None:
        """There is nothing to load."""

    def forward(
        self, token_ids_T: Tensor | None, hidden_TD: Tensor | None, positions_T: Tensor, ctx: ForwardContext
    ) -> Tensor:
        """Adds what this stage reads in its blocks to the hash; the last element is the token id."""
        if hidden_TD is None:
            assert token_ids_T is not None
            hidden_TD = torch.zeros((len(token_ids_T), self.spec.hidden_size), device=self.device)
            hidden_TD[:, -1] = token_ids_T
        token_T = hidden_TD[:, -1]
        total_TJ = hidden_TD[:, :-1]
        shape = (len(token_T), self.num_heads, self.spec.head_size)
        k_TKH = token_T[:, None, None].expand(shape).contiguous()
        v_TKH = positions_T.float()[:, None, None].expand(shape).contiguous()
        row_T = _row_of_token(ctx, len(token_T), self.device)
        for index, (k_cache, v_cache) in enumerate(ctx.kv_cache.layers):
            ops.store_kv(k_TKH, v_TKH, k_cache, v_cache, ctx.metadata.slot_mapping_T)
            read_RPJ = self._read(self.rank.first_layer + index, k_cache, v_cache, ctx)
            part_TJ = read_RPJ[row_T, positions_T].float()
            total_TJ = (total_TJ + self.parallel.all_reduce(part_TJ)) % MODULUS
        return torch.cat([total_TJ, token_T[:, None]], dim=1)

    def _read(self, layer: int, k_cache: Tensor, v_cache: Tensor, ctx: ForwardContext) -> Tensor:
        """The hash of this rank's heads up to each position of each row. [R, P, J], integers below MODULUS."""
        table_RB = ctx.metadata.block_table_RB.long()
        num_positions = table_RB.shape[1] * k_cache.shape[1]
        position_P = torch.arange(num_positions, device=self.device)
        total = torch.zeros((table_RB.shape[0], num_positions, self.num_parts), dtype=torch.int64, device=self.device)
        for head in range(self.num_heads):
            k_RP = k_cache[table_RB, :, head, :].amax(dim=-1).flatten(1).long()
            v_RP = v_cache[table_RB, :, head, :].amin(dim=-1).flatten(1).long()
            for kind, values_RP in ((0, k_RP), (1, v_RP)):
                weight_PJ = self._weights(layer, self.first_head + head, position_P, kind)
                total += (values_RP + 1).remainder(PRIME)[:, :, None] * weight_PJ
        return total.remainder_(MODULUS).cumsum(1).remainder_(MODULUS)

    def _weights(self, layer: int, head: int, position_P: Tensor, kind: int) -> Tensor:
        part_J = torch.arange(self.num_parts, device=self.device)
        seed = position_P[:, None] * 7919 + layer * 104729 + head * 1299709 + part_J * 15485863 + kind * 32452843
        mixed = ((seed + 12345) % PRIME * 48271 + 11) % PRIME
        mixed = (mixed * 16807 + 7) % PRIME
        return 1 + mixed % (MODULUS - 1)

    def compute_logits(self, hidden_SD: Tensor) -> Tensor:
        """All on one token. [S, vocabulary]."""
        parts_SJ = hidden_SD[:, :-1].long()
        mixed_S = torch.ones(len(parts_SJ), dtype=torch.int64, device=self.device)
        for part_S in parts_SJ.unbind(1):
            mixed_S = (mixed_S * 48271 + part_S + 1) % PRIME
        token_S = mixed_S * 16807 % PRIME % self.spec.vocab_size
        logits_SV = torch.zeros((len(parts_SJ), self.spec.vocab_size), device=self.device)
        return logits_SV.scatter_(1, token_S[:, None], SURE)


def _row_of_token(ctx: ForwardContext, num_tokens: int, device: torch.device) -> Tensor:
    start_R1 = ctx.metadata.query_start_R1.long()
    return torch.repeat_interleave(
        torch.arange(ctx.metadata.num_rows, device=device), start_R1[1:] - start_R1[:-1], output_size=num_tokens
    )
