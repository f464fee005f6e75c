"""Experts over several cards: cut, or whole with sums, or whole with tokens exchanged. From how many tokens on does
which way win?

    python benchmarks/gpu/bench_experts.py --cards 4 --shapes mixtral qwen3-30b

Layers of published width with random weights. Prompts run as the engine runs them (not recorded), answers as recorded
steps. First the exchange must give what sums give. JSON lines: milliseconds a layer.
"""

import argparse
import json
import os
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from check_families import BLOCK, Slice
from family_shapes import COMMON, SHAPES, narrowed

from argosy.cluster.protocol.model_spec import read_model_spec
from argosy.deploy import bench_table
from argosy.placement.expert_traffic import exchange_numbers, sum_numbers
from argosy.placement.plan import make_plan
from argosy.placement.ports import free_port
from argosy.placement.process_groups import ParallelContext, destroy_parallel, init_parallel
from argosy.workers.attention.torch_backend import TorchBackend
from argosy.workers.forward_context import ForwardContext

PROMPT = 512
BLOCKS = 8192 // BLOCK + 64


class Cards:
    """One rank's slice of a model, in one way."""

    def __init__(self, shape: dict[str, Any], parallel: ParallelContext, *, whole: bool, most_tokens: int):
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(COMMON | shape))
            spec = read_model_spec(folder).as_served(None, expert_parallel=whole, all2all="auto")
        device = parallel.device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.parallel, self.slice = parallel, Slice(spec, dtype, device, BLOCKS, parallel)
        if device.type == "cpu":
            self.slice.backend = TorchBackend()  # type: ignore[assignment]  # the CPU's own
        for name, parameter in self.slice.model.named_parameters():  # what all ranks have must be the same
            generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
            is_norm = parameter.ndim == 1 and "norm" in name
            parameter.data.normal_(float(is_norm), 0.02, generator=generator)
        self.slice.model.finish()
        self.slice.model.open_group_sum(most_tokens, 512)
        self.group = self.slice.model._group

    def way(self, name: str) -> None:
        """sums by one launch with addition and norm, sums by a collective, or the exchange."""
        model: Any = self.slice.model
        model._group = self.group if name == "one launch" else None
        model.exchange._least_tokens = 1 if name == "exchange" else None

    def inputs(self, num_tokens: int, *, decode: bool) -> Callable[[], torch.Tensor]:
        """A step of prompts of 512 tokens, or of rows of one token after 511."""
        length = min(PROMPT, num_tokens)
        counts = [1] * num_tokens if decode else [length] * (num_tokens // length)
        per_row = PROMPT // BLOCK
        rows = torch.arange(len(counts) * per_row) % BLOCKS
        metadata, positions = self.slice.metadata(
            counts, [PROMPT if decode else length] * len(counts), rows.int().view(-1, per_row)
        )
        generator = torch.Generator().manual_seed(num_tokens)
        ids = torch.randint(0, self.slice.spec.vocab_size, (len(positions),), generator=generator)
        ids = ids.to(self.parallel.device)
        ctx = ForwardContext(self.slice.backend, self.slice.cache, metadata)
        return lambda: self.slice.model(ids, None, positions, ctx)

    @torch.inference_mode()
    def milliseconds(self, run: Callable[[], torch.Tensor], *, record: bool) -> float:
        """Of a layer, the slowest rank, the median of five."""
        device, layers = self.parallel.device, self.slice.spec.num_layers
        if device.type == "cpu":
            run()
            return 0.0
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            run(), run()
            torch.cuda.synchronize(device)
            replay, graph = run, torch.cuda.CUDAGraph()
            if record:
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    run()
                replay = graph.replay  # type: ignore[assignment]  # what is timed
            times = []
            for _ in range(5):
                torch.cuda.synchronize(device)
                dist.barrier(self.parallel.tp_group)
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record(stream)
                for _ in range(4):
                    replay()
                end.record(stream)
                torch.cuda.synchronize(device)
                times.append(start.elapsed_time(end) / (4 * layers))
            graph.reset()
        median = torch.tensor([sorted(times)[2]], device=device)
        dist.all_reduce(median, op=dist.ReduceOp.MAX, group=self.parallel.tp_group)
        return round(float(median), 4)


def measure(rank: int, world: int, port: int, args: argparse.Namespace) -> None:
    """The life of one rank."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    for name in args.shapes:
        shape = narrowed(SHAPES[name], args.narrow) if args.narrow > 1 else SHAPES[name]
        plan = make_plan(shape["num_hidden_layers"], world, 1).ranks[rank]
        parallel = init_parallel(plan, f"127.0.0.1:{port}", device, 60.0)
        port += 1
        say = Lines(name, world, torch.cuda.get_device_name(0) if on_gpu else "CPU", args.output if rank == 0 else None)
        for whole in (True, False):
            cards = Cards(shape, parallel, whole=whole, most_tokens=max(args.tokens))
            moe = cards.slice.spec.moe
            if whole and moe is not None:
                say(check="exchange against sums", **check(cards, 300),
                    bytes_of_sums=round(exchange_numbers(moe, world) / sum_numbers(world), 3), rank=rank)  # fmt: skip
            ways = ("sums", "one launch", "exchange") if whole else ("sums", "one launch")
            for num in args.rows:
                run = cards.inputs(num, decode=True)
                found = {}
                for way in ways[:2]:
                    cards.way(way)
                    found[way] = cards.milliseconds(run, record=True)
                say(step="decode", experts="whole" if whole else "cut", tokens=num, **found, rank=rank)
            for num in args.tokens:
                run = cards.inputs(num, decode=False)
                found = {}
                for way in ways:
                    cards.way(way)
                    found[way] = cards.milliseconds(run, record=False)
                say(step="prompt", experts="whole" if whole else "cut", tokens=num, **found, rank=rank)
            del cards
            if on_gpu:
                torch.cuda.empty_cache()
        destroy_parallel(parallel)


@torch.inference_mode()
def check(cards: Cards, num_tokens: int) -> dict[str, float]:
    """How far the ways are from each other, by token: in the middle, and the share of tokens that differ much (an
    expert that was nearly chosen).
    """
    run = cards.inputs(num_tokens, decode=False)
    cards.way("sums")
    want = run().float()
    found: dict[str, float] = {}
    for way in ("exchange", "one launch"):
        cards.way(way)
        if way == "one launch" and cards.group is None:
            continue
        errors = (run().float() - want).norm(dim=-1) / want.norm(dim=-1)
        found |= {way: round(float(errors.median()), 5), f"{way}, far": round(float((errors > 0.05).float().mean()), 4)}
    return found


class Lines:
    """What rank 0 prints."""

    def __init__(self, name: str, world: int, machine: str, output: str | None):
        self.common = {"bench": "experts over cards", "model": name, "cards": world, "machine": machine}
        self.output = output

    def __call__(self, *, rank: int, **facts: Any) -> None:
        """One line."""
        if rank:
            return
        bench_table.tell(self.common | facts, self.output)


def main() -> None:
    """A process a card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", type=int, default=2)
    parser.add_argument("--shapes", nargs="+", default=["mixtral", "qwen3-30b", "gpt-oss"], choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 2048, 4096, 8192])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--narrow", type=int, default=1, help="divide widths, to try this script on a CPU")
    parser.add_argument("--output")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.spawn(measure, args=(args.cards, free_port("127.0.0.1"), args), nprocs=args.cards)


if __name__ == "__main__":
    main()
