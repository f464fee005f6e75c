"""Tokens go to the ranks that hold their experts and come back: ranks are threads here, their wires are lists."""

import threading
from collections.abc import Callable
from typing import Any, cast

import msgspec
import pytest
import torch
from torch import Tensor

from argosy.cluster.protocol.model_spec import ModelSpec, MoESpec
from argosy.kernels import moe_ops
from argosy.placement.plan import RankInfo, make_plan
from argosy.placement.process_groups import ParallelContext
from argosy.workers.layers.expert_exchange import ExpertExchange
from argosy.workers.layers.moe import MoE
from argosy.workers.models.decoder import GatedMLP
from argosy.workers.quantization.base import UnquantizedMethod

WIDTH = 6


class Wires:
    """What the ranks of a group gave last."""

    def __init__(self, world: int):
        self.barrier = threading.Barrier(world, timeout=60)
        self.given: list[Any] = [None] * world
        self.rows_sent = 0  # to other ranks


class Thread:
    """One rank's `ParallelContext`, as far as an exchange asks it."""

    def __init__(self, rank: RankInfo, wires: Wires):
        self.rank, self.tp_size, self.wires, self.device = rank, rank.tp_size, wires, torch.device("cpu")

    def _swap(self, value: Any) -> list[Any]:
        wires = self.wires
        wires.given[self.rank.tp_rank] = value
        wires.barrier.wait()
        found = list(wires.given)
        wires.barrier.wait()
        return found

    def all_to_all(self, rows: Tensor, sent: list[int] | None, received: list[int] | None) -> Tensor:
        sizes = sent or [len(rows) // self.tp_size] * self.tp_size
        assert sum(sizes) == len(rows)
        if rows.ndim == 2:
            with threading.Lock():
                self.wires.rows_sent += sum(sizes) - sizes[self.rank.tp_rank]
        parts = [given[self.rank.tp_rank] for given in self._swap(rows.split(sizes))]
        assert received is None or [len(part) for part in parts] == received
        return torch.cat(parts)


def as_ranks(world: int, run: Callable[[int, Thread], Tensor]) -> tuple[list[Tensor], Wires]:
    """What each rank of a group makes."""
    wires, made, errors = Wires(world), [torch.empty(0)] * world, []

    def live(rank: RankInfo) -> None:
        try:
            made[rank.tp_rank] = run(rank.tp_rank, Thread(rank, wires))
        except BaseException as error:  # shown where they are joined
            errors.append(error)
            wires.barrier.abort()

    threads = [threading.Thread(target=live, args=(rank,)) for rank in make_plan(2, world, 1).ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return made, wires


def layer(moe: MoESpec, seed: int) -> tuple[Tensor, Tensor]:
    """(gate and up, down) of all experts."""
    generator = torch.Generator().manual_seed(seed)
    inner = moe.intermediate_size
    both = torch.randn(moe.num_experts, 2 * inner, WIDTH, generator=generator)
    return both, torch.randn(moe.num_experts, WIDTH, inner, generator=generator)


def exchanged(moe: MoESpec, world: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Wires]:
    """The layer's output, made by `world` ranks."""
    gate_up, down = layer(moe, 0)
    num_tokens = len(x_TD)

    def run(rank: int, parallel: Thread) -> Tensor:
        exchange = ExpertExchange(cast(ParallelContext, parallel), moe)
        assert exchange.takes(num_tokens)
        x_SD, ids_SK, weights_SK = (exchange.own_slice(whole) for whole in (x_TD, ids_TK, weights_TK))
        way = exchange.dispatch(x_SD, ids_SK, weights_SK, exchange.num_own(num_tokens))
        own = moe.own_experts(world, rank)
        ids = torch.where((way.ids_RK >= own.start) & (way.ids_RK < own.stop), way.ids_RK - own.start, -1)
        assert (ids >= 0).any(1).all(), "a token came to a rank that has none of its experts"
        made_RD = moe_ops.experts(
            way.rows_RD, gate_up[own.start : own.stop], down[own.start : own.stop], ids, way.weights_RK
        )
        return exchange.combine(made_RD, way)[: exchange.num_own(num_tokens)]

    made, wires = as_ranks(world, run)
    return torch.cat(made), wires


def chosen(moe: MoESpec, num_tokens: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden states, ids, weights)."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(num_tokens, WIDTH, generator=generator)
    ids = torch.stack([torch.randperm(moe.num_experts, generator=generator)[: moe.top_k] for _ in range(num_tokens)])
    return x_TD, ids.int(), torch.rand(num_tokens, moe.top_k, generator=generator)


@pytest.mark.parametrize(("world", "num_experts", "top_k"), [(2, 8, 2), (4, 6, 3), (3, 7, 1), (4, 4, 4), (1, 4, 2)])
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 16])
def test_it_is_as_if_one_rank_had_all_experts(world: int, num_experts: int, top_k: int, num_tokens: int) -> None:
    """More ranks than tokens, experts that can't be divided evenly, a token whose experts are on every rank."""
    moe = MoESpec(num_experts=num_experts, top_k=top_k, intermediate_size=5, expert_parallel=True, all2all="all_to_all")
    if world == 1:
        assert not ExpertExchange(cast(ParallelContext, Thread(make_plan(2, 1, 1).ranks[0], Wires(1))), moe).takes(5)
        return
    x_TD, ids_TK, weights_TK = chosen(moe, num_tokens)
    made_TD, _ = exchanged(moe, world, x_TD, ids_TK, weights_TK)
    torch.testing.assert_close(made_TD, moe_ops.experts(x_TD, *layer(moe, 0), ids_TK, weights_TK))


def test_a_token_travels_once_to_a_rank_and_not_to_its_own() -> None:
    """All tokens want both experts of the last rank: three slices of two go there and back, nothing else moves."""
    moe = MoESpec(num_experts=8, top_k=2, intermediate_size=5, expert_parallel=True, all2all="all_to_all")
    x_TD, _, weights_TK = chosen(moe, 8)
    ids_TK = torch.tensor([[6, 7]] * 8, dtype=torch.int32)
    made_TD, wires = exchanged(moe, 4, x_TD, ids_TK, weights_TK)
    torch.testing.assert_close(made_TD, moe_ops.experts(x_TD, *layer(moe, 0), ids_TK, weights_TK))
    assert wires.rows_sent == 2 * 3 * 2


@pytest.mark.parametrize(("all2all", "takes"), [("sum", False), ("all_to_all", True)])
def test_who_asks_for_one_way_gets_it(all2all: str, takes: bool) -> None:
    """From one token on, or never."""
    moe = MoESpec(num_experts=8, top_k=2, intermediate_size=5, expert_parallel=True, all2all=all2all)
    rank = Thread(make_plan(2, 2, 1).ranks[0], Wires(2))
    assert ExpertExchange(cast(ParallelContext, rank), moe).takes(1) is takes
    assert ExpertExchange(cast(ParallelContext, rank), moe).takes(1, only_decodes=True) is takes
    rank.device = torch.device("cuda", 0)  # whose decode steps are recorded: what they do must not depend on sizes
    assert ExpertExchange(cast(ParallelContext, rank), moe).takes(1) is takes
    assert not ExpertExchange(cast(ParallelContext, rank), moe).takes(1, only_decodes=True)


@pytest.mark.parametrize(("shared_size", "all2all"), [(0, "sum"), (8, "sum"), (8, "all_to_all")])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_the_parts_of_a_group_add_up(shared_size: int, all2all: str, num_tokens: int) -> None:
    """GPUs that share memory write parts of a sum side by side: also of a shared expert that each rank has whole."""
    world, generator = 2, torch.Generator().manual_seed(5)
    moe = MoESpec(
        num_experts=5, top_k=2, intermediate_size=6, expert_parallel=True, all2all=all2all, shared_size=shared_size,
        shared_gate=bool(shared_size),
    )  # fmt: skip
    spec = ModelSpec(
        architecture="", num_layers=1, hidden_size=WIDTH, num_heads=2, num_kv_heads=2, head_size=4,
        intermediate_size=8, vocab_size=8, max_position=8, moe=moe,
    )  # fmt: skip
    x_TD = torch.randn(num_tokens, WIDTH, generator=generator)
    whole = {name: torch.randn(shape, generator=generator) for name, shape in {
        "router": (5, WIDTH), "gate_up": (5, 12, WIDTH), "down": (5, WIDTH, 6), "gate": (1, WIDTH),
        "shared gate": (shared_size, WIDTH), "shared up": (shared_size, WIDTH), "shared down": (WIDTH, shared_size),
    }.items()}  # fmt: skip
    total, asked = torch.zeros(num_tokens, WIDTH), None
    for rank in make_plan(2, world, 1).ranks:
        parallel = ParallelContext(rank, torch.device("cpu"), 1.0)
        method = UnquantizedMethod()
        shared = None
        if shared_size:
            shared = GatedMLP(
                msgspec.structs.replace(spec, intermediate_size=shared_size),
                parallel.alone() if moe.shared_is_whole else parallel, method, dtype=torch.float32,
            )  # fmt: skip
            ranks = 1 if moe.shared_is_whole else world
            rows = slice(None) if ranks == 1 else slice(rank.tp_rank * 4, rank.tp_rank * 4 + 4)
            gate_up = torch.cat((whole["shared gate"][rows], whole["shared up"][rows]))
            shared.gate_up_proj.weight = torch.nn.Parameter(gate_up)
            shared.down_proj.weight = torch.nn.Parameter(whole["shared down"][:, rows].contiguous())
        layer = MoE(spec, parallel, dtype=torch.float32, shared=shared)
        own = layer.experts.own_experts
        layer.router.weight = torch.nn.Parameter(whole["router"])
        layer.experts.gate_up = torch.nn.Parameter(whole["gate_up"][own.start : own.stop])
        layer.experts.down = torch.nn.Parameter(whole["down"][own.start : own.stop])
        if layer.shared_gate is not None:
            layer.shared_gate.weight = torch.nn.Parameter(whole["gate"])
        part_TD = torch.full((num_tokens, WIDTH), 9.0)
        with torch.no_grad():
            asked = layer.part(x_TD, part_TD).asked
        total += part_TD
    ids, weights = moe_ops.choose_experts(x_TD @ whole["router"].T, 2)
    want = moe_ops.experts(x_TD, whole["gate_up"], whole["down"], ids, weights)
    if shared_size:
        inner = torch.nn.functional.silu(x_TD @ whole["shared gate"].T) * (x_TD @ whole["shared up"].T)
        want += (inner @ whole["shared down"].T) * (x_TD @ whole["gate"].T).sigmoid()
    torch.testing.assert_close(total, want, rtol=1e-4, atol=1e-4)
    assert (asked is None) == bool(shared_size), "with a shared expert every rank has something of every token"
