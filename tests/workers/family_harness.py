"""A stage that answers greedily: what the model runner does, in a hundred lines, for tests of models alone.

This file is also the program of one rank (`python family_harness.py job.json index`): four such processes run all
families in all layouts with more than one rank, because starting a process costs more than all of the arithmetic.
"""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from argosy.cluster.protocol.messages import BlockSwaps
from argosy.cluster.protocol.model_spec import read_model_spec
from argosy.placement.plan import RankInfo, make_plan
from argosy.placement.process_groups import ParallelContext, destroy_parallel, init_parallel
from argosy.workers.attention.base import AttentionBackend, AttentionMetadata
from argosy.workers.attention.torch_backend import TorchBackend
from argosy.workers.forward_context import ForwardContext
from argosy.workers.host_pool import make_host_pool
from argosy.workers.kv_cache import KVCache
from argosy.workers.loading.stream import load_weights
from argosy.workers.models import decoder, general
from argosy.workers.models.registry import build_model
from argosy.workers.native_steps import cpu_backend

CPU = torch.device("cpu")
DEADLINE_SECONDS = 240.0  # of all layouts, on a machine that does other things
BLOCK_SIZE, NUM_BLOCKS = 4, 96
LAYOUTS = {"TP1": (1, 1), "TP2": (2, 1), "PP2": (1, 2), "TP4": (4, 1), "TP2xPP2": (2, 2), "EP2": (2, 1)}
LAYOUTS |= {"EP4": (4, 1), "A2A2": (2, 1), "A2A4": (4, 1), "A2A2xPP2": (2, 2)}  # whole experts; tokens exchanged
LAYOUTS |= {
    "SUM2": (2, 1),
    "SUMEP2": (2, 1),
    "SUM2xPP2": (2, 2),
}  # as GPUs do that address each other: sum, addition, norm
FOUND = "ARGOSY_FAMILIES_FOUND"  # a file
WAYS = ("whole", "chunked", "preempted", "swapped", "n = 3")
# Over several ranks, where a step is mostly the waiting of four processes for two cores: three answers to each prompt,
# in chunks, of which one goes on, one is preempted and one swapped, in the same steps.
AT_ONCE = "at once"
PARTED_WAYS = (AT_ONCE,)


@dataclass
class Expected:
    """What another implementation answered: greedy tokens of each prompt, and the logits before each of them."""

    prompts: list[list[int]]
    tokens: list[list[int]]
    logits_PNV: Tensor


@dataclass
class Sequence:
    """One row: its tokens so far, how many are in the cache, and where."""

    ids: list[int]
    blocks: list[int]
    computed: int = 0


def _backend(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    return cpu_backend(model, dtype, False) if device.type == "cpu" else TorchBackend()


class Harness:
    """A model's part on one rank, with a cache whose blocks lie in random order."""

    def __init__(
        self,
        folder: str | Path,
        rank: RankInfo,
        parallel: ParallelContext,
        *,
        max_model_len: int | None = None,
        all2all: str = "",  # whole experts on each rank, reached this way
        seed: int = 0,
        backend: AttentionBackend | None = None,
        device: torch.device = CPU,
        block_size: int = BLOCK_SIZE,
        dtype: torch.dtype = torch.float32,
    ):
        self.device, self.block_size, self.dtype = device, block_size, dtype
        self.spec = read_model_spec(folder).as_served(max_model_len, expert_parallel=bool(all2all), all2all=all2all)
        self.rank, self.parallel = rank, parallel
        self.model = build_model(self.spec, rank, parallel, dtype, device)
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        native = _backend(self.model, device, dtype)  # before weights are packed
        load_weights(self.model, folder, self.spec)
        self.backend = backend or native
        self.cache = KVCache.allocate(self.spec, rank, NUM_BLOCKS, block_size, dtype, device)
        order = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(seed))
        self.free: list[int] = order.tolist()

    def sequence(self, ids: list[int], length: int) -> Sequence:
        """A row with room for `length` tokens."""
        count = -(-length // self.block_size)
        taken, self.free = self.free[:count], self.free[count:]
        return Sequence(list(ids), taken)

    def step(self, rows: list[tuple[Sequence, int]]) -> Tensor:
        """Compute the next so many tokens of each row; logits after each row's last, on every rank."""
        order = sorted(range(len(rows)), key=lambda place: rows[place][1] > 1)
        ordered = [rows[place] for place in order]
        positions = [p for row, count in ordered for p in range(row.computed, row.computed + count)]
        slots = [
            row.blocks[p // self.block_size] * self.block_size + p % self.block_size
            for row, count in ordered
            for p in range(row.computed, row.computed + count)
        ]
        lengths = [row.computed + count for row, count in ordered]
        starts = torch.tensor([0, *(count for _, count in ordered)]).cumsum(0)
        widest = max(len(row.blocks) for row, _ in ordered)
        device = self.device
        metadata = AttentionMetadata(
            num_rows=len(rows),
            num_decode_rows=sum(count == 1 for _, count in ordered),
            query_start_R1=starts.to(device, torch.int32),
            context_len_R=torch.tensor(lengths, dtype=torch.int32, device=device),
            block_table_RB=torch.tensor(
                [row.blocks + [0] * (widest - len(row.blocks)) for row, _ in ordered], dtype=torch.int32, device=device
            ),
            slot_mapping_T=torch.tensor(slots, device=device),
            max_query_len=max(count for _, count in ordered),
            max_context_len=max(lengths),
        )
        ids = torch.tensor([i for row, count in ordered for i in row.ids[row.computed : row.computed + count]])
        logits = self._forward(ids.to(device), torch.tensor(positions, device=device), metadata, starts[1:] - 1)
        for row, count in rows:
            row.computed += count
        in_order = torch.empty_like(logits)
        in_order[torch.tensor(order)] = logits
        return in_order

    def _forward(self, ids: Tensor, positions: Tensor, metadata: AttentionMetadata, last: Tensor) -> Tensor:
        hidden = None
        if self.parallel.previous_rank is not None:
            hidden = torch.empty(len(positions), self.spec.hidden_size, dtype=self.dtype, device=self.device)
            dist.recv(hidden, src=self.parallel.previous_rank)
        ctx = ForwardContext(self.backend, self.cache, metadata)
        out = self.model(ids if self.rank.is_first_stage else None, hidden, positions, ctx)
        logits = torch.empty(len(last), self.spec.vocab_size, dtype=self.dtype, device=self.device)
        if self.parallel.next_rank is not None:
            dist.send(out, dst=self.parallel.next_rank)
        else:
            logits = self.model.compute_logits(out[last.to(self.device)])
        if self.rank.pp_size > 1:
            dist.broadcast(logits, src=self.rank.tp_size * (self.rank.pp_size - 1))
        return logits.cpu()

    @torch.inference_mode()
    def errors(self, expected: Expected) -> Tensor:
        """Of the logits before each expected token, the others fed: ||got - want|| / ||want||, [prompts, tokens]."""
        num_new, free = len(expected.tokens[0]), list(self.free)
        rows = [self.sequence(prompt, len(prompt) + num_new) for prompt in expected.prompts]
        made = [self.prefill(rows)]
        for step in range(1, num_new):
            for row, tokens in zip(rows, expected.tokens, strict=True):
                row.ids.append(tokens[step - 1])
            made.append(self.step([(row, 1) for row in rows]))
        self.free = free
        got_PNV, want_PNV = torch.stack(made, 1).float(), expected.logits_PNV
        return (got_PNV - want_PNV).norm(dim=-1) / want_PNV.norm(dim=-1)

    def prefill(self, rows: list[Sequence], chunk: int = 1000) -> Tensor:
        """All tokens that the rows have, so many at a time; logits after each row's last."""
        logits = torch.empty(len(rows), self.spec.vocab_size)
        while waiting := [place for place, row in enumerate(rows) if row.computed < len(row.ids)]:
            counts = [min(chunk, len(rows[place].ids) - rows[place].computed) for place in waiting]
            made = self.step([(rows[place], count) for place, count in zip(waiting, counts, strict=True)])
            logits[waiting] = made
        return logits

    @torch.inference_mode()
    def largest_difference(self, expected: Expected, way: str = "whole") -> float:
        """Feed the expected tokens and compare all logits; infinite when a greedy token differs."""
        num_new = len(expected.tokens[0])
        copies = 3 if way in ("n = 3", AT_ONCE) else 1
        free = list(self.free)
        for tensor in self.cache.tensors:  # what another way left in these blocks would be right
            tensor.view(torch.uint8).fill_(77)
        rows = [self.sequence(prompt, len(prompt) + num_new) for prompt in expected.prompts for _ in range(copies)]
        logits = self._prefill_shared(rows, copies, {"whole": 1000, "n = 3": 1000, AT_ONCE: 7}.get(way, 5))
        worst = 0.0
        for step in range(num_new):
            wanted = expected.logits_PNV[:, step].repeat_interleave(copies, 0)
            tokens = [answer[step] for answer in expected.tokens for _ in range(copies)]
            worst = max(worst, float((logits - wanted).abs().max()))
            if logits.argmax(-1).tolist() != tokens:
                worst = float("inf")
            for row, token in zip(rows, tokens, strict=True):
                row.ids.append(token)
            if step == 2 and way in ("preempted", "swapped", AT_ONCE):
                for place in {"preempted": range(1, len(rows), 2), AT_ONCE: range(1, len(rows), 3)}.get(way, ()):
                    # its blocks were taken: computed anew, elsewhere
                    rows[place] = self.sequence(rows[place].ids, len(rows[place].ids) + num_new)
                for place in {"swapped": range(1, len(rows), 2), AT_ONCE: range(2, len(rows), 3)}.get(way, ()):
                    rows[place] = self._swapped(rows, place, num_new)
                logits = self.prefill(rows, 7 if way == AT_ONCE else 3)
            elif step + 1 < num_new:
                logits = self.step([(row, 1) for row in rows])
        self.free = free
        return worst

    def _swapped(self, rows: list[Sequence], place: int, num_new: int) -> Sequence:
        """A row after its blocks went to the host, were written by others, and came back to other blocks."""
        row = rows[place]
        others = {block_id for other in rows if other is not row for block_id in other.blocks}
        own = [block_id for block_id in row.blocks if block_id not in others]
        pool = make_host_pool(self.cache.tensors, NUM_BLOCKS)
        back = self.sequence(row.ids, len(row.ids) + num_new)
        count = -(-row.computed // self.block_size)
        pool.begin(0, BlockSwaps(out=[(block_id, NUM_BLOCKS - 1 - block_id) for block_id in row.blocks[:count]]))
        for tensor in self.cache.tensors:
            tensor.view(torch.uint8).view(NUM_BLOCKS, -1)[own] = 77
        into = [(NUM_BLOCKS - 1 - old, new) for old, new in zip(row.blocks[:count], back.blocks, strict=False)]
        pool.begin(1, BlockSwaps(into=into, await_step_id=1))
        back.computed = row.computed
        return back

    def _prefill_shared(self, rows: list[Sequence], copies: int, chunk: int) -> Tensor:
        """Answers to one prompt share its full blocks; each has a copy of the one that is not full."""
        firsts = rows[::copies]
        logits = self.prefill(firsts, chunk)
        pairs = []
        for place, row in enumerate(rows):
            first = firsts[place // copies]
            full = first.computed // self.block_size
            row.computed = first.computed
            if row is not first:
                pairs.append((first.blocks[full], row.blocks[full]))
                row.blocks[:full] = first.blocks[:full]
        self.cache.copy_blocks(pairs)
        return logits.repeat_interleave(copies, 0)


def note(name: str, column: str, difference: float) -> None:
    """For `benchmarks/families/make_table.py`, which makes the table in the docs of what the tests found."""
    if found := os.environ.get(FOUND):
        with open(found, "a", encoding="utf-8") as file:
            file.write(json.dumps([name, column, difference]) + "\n")


def load_expected(folder: Path) -> Expected:
    """From the file beside a checkpoint."""
    facts = torch.load(folder / "expected.pt", weights_only=True)
    return Expected(facts["prompts"], facts["tokens"], facts["logits"])


class PlainSums:
    """`GroupSum` by a collective."""

    def __init__(self, parallel: ParallelContext, width: int):
        self.parallel, self.num_ranks, self.width = parallel, parallel.tp_size, width
        self._parts: dict[int, Tensor] = {}

    def part(self, which: int, num_tokens: int) -> Tensor:
        """A place with the numbers of another step."""
        self._parts[which] = torch.full((num_tokens, self.width), 7.0)
        return self._parts[which]

    def takes_pieces(self, num_tokens: int) -> bool:
        """None of them."""
        return False

    def add_norm(
        self, which: int, residual_TD: Tensor, norm: Any, *, add: bool = True, whole: bool = False, left: Any = None
    ) -> Tensor:
        """As `GroupSum.add_norm`."""
        total_TD = self.parallel.all_reduce(self._parts[which].clone())
        residual_TD.copy_(residual_TD + total_TD if add else total_TD)
        made: Tensor = residual_TD if norm is None else norm(residual_TD)
        return made


def sum_in_one(harness: Harness) -> None:
    """Let a model run as where GPUs address each other: `GroupForward` has a stream of its own there."""
    sums = PlainSums(harness.parallel, harness.spec.hidden_size)
    with (
        patch.object(general, "open_group_sum", lambda *args, **options: sums),
        patch.object(decoder, "open_group_sum", lambda *args, **options: sums),
        patch.object(decoder, "open_group_copies", lambda *args, **options: None),
        patch.object(torch.cuda, "Stream", lambda *args, **options: None),
        patch.object(torch.cuda, "Event", lambda *args, **options: None),
    ):
        harness.model.open_group_sum(64, 8)
    assert harness.model._group is not None


def run_rank(job: dict[str, Any], index: int) -> None:
    """The life of one of the four processes: for each layout, all of its models."""
    torch.set_num_threads(1)
    answers: dict[str, float | str] = {}
    for layout, run in job["layouts"].items():
        tp_size, pp_size = LAYOUTS[layout]
        if index >= tp_size * pp_size:
            continue
        ranks: dict[int, RankInfo] = {}
        first = make_plan(2, tp_size, pp_size).ranks[index]
        # those that the layouts before had no part for wait here until the others are done with them
        parallel = init_parallel(first, run["rendezvous"], CPU, DEADLINE_SECONDS)
        for name, folder, num_layers, max_model_len in run["models"]:
            if num_layers not in ranks:
                ranks[num_layers] = make_plan(num_layers, tp_size, pp_size).ranks[index]
            parallel.rank = ranks[num_layers]
            all2all = "sum" if layout in ("EP2", "EP4", "SUMEP2") else "all_to_all" if layout.startswith("A2A") else ""
            harness = Harness(folder, parallel.rank, parallel, max_model_len=max_model_len, all2all=all2all)
            if layout.startswith("SUM"):
                sum_in_one(harness)
            expected = load_expected(Path(folder))
            for way in PARTED_WAYS:
                answers[f"{name}|{layout}|{way}"] = harness.largest_difference(expected, way)
        dist.barrier()
        destroy_parallel(parallel)
    Path(job["answers"], f"{index}.json").write_text(json.dumps(answers))


def run_layouts(
    models: dict[str, list[tuple[str, str, int, int | None]]],
    folder: Path,
    *,
    deadline_seconds: float = DEADLINE_SECONDS,
) -> list[dict[str, float]]:
    """Run layout -> [(name, folder, layers, longest)] in four processes. What each rank found, by "name|layout|way"."""
    layouts = {
        layout: {"rendezvous": f"127.0.0.1:{free_port()}", "models": found} for layout, found in models.items() if found
    }
    (folder / "job.json").write_text(json.dumps({"layouts": layouts, "answers": str(folder)}))
    command = [sys.executable, __file__, str(folder / "job.json")]
    ranks = [subprocess.Popen([*command, str(index)]) for index in range(4)]
    try:
        assert [rank.wait(timeout=deadline_seconds) for rank in ranks] == [0, 0, 0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    return [json.loads((folder / f"{index}.json").read_text()) for index in range(4)]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    run_rank(json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]))
