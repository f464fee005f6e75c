"""Steps of prompts over a group of cards: what the host takes to queue them, and the cards to compute them.

    python benchmarks/gpu/bench_group_steps.py --model 8b --cards 4 --tokens 1024 2048 4096 8192

Prompts of 512 tokens, in one piece with sums between products and in halves whose sums are copied; each launched kernel
by kernel and as a recorded graph. JSON lines: milliseconds of the host and until all cards are done, medians.
"""

import argparse
import json
import os
import statistics
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench_gpu import SHAPES
from profile_step import make_runner, prompt

from argosy.cluster.protocol.messages import NewRequest, SchedulerOutput
from argosy.cluster.protocol.sampling import TokenParams
from argosy.placement.plan import make_plan
from argosy.placement.ports import free_port
from argosy.placement.process_groups import destroy_parallel, init_parallel
from argosy.workers.device import set_up_device
from argosy.workers.model_runner import ModelRunner
from argosy.workers.recording import Recorder
from argosy.workers.step_recording import make_graphs

PLACES = 512  # for decode rows, in recorded steps
NEVER = 1 << 30


def step_of(num_tokens: int) -> SchedulerOutput:
    """So many tokens of new prompts."""
    rows = list(range(num_tokens // 512))
    return SchedulerOutput(
        step_id=1, epoch=0, rows=rows, num_tokens=[512] * len(rows),
        new_requests=[
            NewRequest(row, prompt(row), 512, 0, list(range(row * 32, (row + 1) * 32)),
                       TokenParams(max_tokens=8, temperature=0.0))
            for row in rows
        ],
    )  # fmt: skip


def measure(runner: ModelRunner, num_tokens: int, repeats: int) -> tuple[dict[str, float], list[int]]:
    """Milliseconds of a step, and the tokens that it drew."""
    output, group = step_of(num_tokens), runner.parallel.tp_group
    hosts, steps = [], []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        dist.barrier(group)
        torch.cuda.synchronize()
        began = time.perf_counter()
        runner.execute(output)
        hosts.append(1e3 * (time.perf_counter() - began))
        torch.cuda.synchronize()
        dist.barrier(group)
        torch.cuda.synchronize()
        steps.append(1e3 * (time.perf_counter() - began))
    drawn: list[int] = runner.batch.last_token_N[: num_tokens // 512].tolist()
    return {"host": round(statistics.median(hosts[2:]), 2), "step": round(statistics.median(steps[2:]), 2)}, drawn


def main_of_rank(tp_rank: int, args: argparse.Namespace, port: int) -> None:
    """Measure on one card."""
    device = torch.device("cuda", tp_rank)
    set_up_device(device, 4)
    rank = make_plan(int(str(SHAPES[args.model]["num_hidden_layers"])), args.cards, 1).ranks[tp_rank]
    parallel = init_parallel(rank, f"127.0.0.1:{port}", device, 60.0)
    runner = make_runner(args.model, PLACES, 640, parallel=parallel)
    group = runner.model._group
    assert group is not None, "these cards can't address each other"
    assert group._copies is not None, "the driver has no flags in streams"
    for num_tokens in args.tokens:
        row: dict[str, object] = {"model": args.model, "cards": args.cards, "tokens": num_tokens}
        drawn: dict[str, list[int]] = {}
        for way, least in (("halves", 0), ("whole", NEVER)):
            group._overlap_tokens = group._recorded_tokens = least
            runner.graphs = None
            row[way], drawn[way] = measure(runner, num_tokens, args.repeats)
            if least == 0 and not group._copies.in_graphs:
                continue
            graphs = make_graphs(runner, 8, [(num_tokens, PLACES)])
            assert graphs.prompts is not None
            began = time.perf_counter()
            with torch.inference_mode():
                recorder = Recorder(device)
                with recorder.recording():
                    graphs.prompts.record((num_tokens, PLACES), recorder)
            seconds = time.perf_counter() - began
            runner.graphs = graphs
            found, drawn[f"{way} recorded"] = measure(runner, num_tokens, args.repeats)
            row[f"{way} recorded"] = {**found, "seconds_to_record": round(seconds, 2)}
        row["same_tokens"] = {way: sum(map(int.__eq__, drawn["whole"], tokens)) for way, tokens in drawn.items()}
        row["device"] = torch.cuda.get_device_name(device)
        if tp_rank == 0:
            print(json.dumps(row), flush=True)
    dist.barrier()
    destroy_parallel(parallel)


def main() -> None:
    """One process a card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--cards", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="multiples of 512")
    parser.add_argument("--repeats", type=int, default=6)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.spawn(main_of_rank, (args, free_port("127.0.0.1")), nprocs=args.cards)


if __name__ == "__main__":
    main()
