"""Messages between two pipeline stages: whether they arrive as they were sent, and how long they take.

    python benchmarks/gpu/bench_stage_wire.py

Two kinds of wire: NCCL, and copies and counters in the other card's memory.
First 400 messages of random sizes each way, hidden states forward and tables of tokens back, with hosts that run ahead.
Then a message there and one back in turn: microseconds one way, by size. JSON lines.
"""

import argparse
import json
import os
import random
import time

import torch
import torch.multiprocessing as mp

from argosy.placement.plan import make_plan
from argosy.placement.ports import free_port
from argosy.placement.process_groups import destroy_parallel, init_parallel
from argosy.placement.stage_transport import StageTransport

WIDTH, MAX_TOKENS, ROWS = 4096, 8192, 1024
SIZES = (1, 8, 64, 128, 512, 8192)  # tokens


def check(transport: StageTransport, is_first: bool, device: torch.device) -> None:
    """Ends with an error where a message isn't what the other side sent."""
    rng = random.Random(5)
    table, wrong = torch.zeros(ROWS, dtype=torch.int64, device=device), torch.zeros((), device=device)
    reused = torch.zeros((ROWS, WIDTH), dtype=torch.bfloat16, device=device)
    for message in range(400):
        num = rng.choice([1, 2, 3, 7, 64, 127, 128, 129, 500, 2000, MAX_TOKENS])
        changes = num <= ROWS and rng.random() < 0.5
        value = float(message % 250)
        if is_first:
            hidden = reused[:num] if changes else torch.empty((num, WIDTH), dtype=torch.bfloat16, device=device)
            hidden.fill_(value)
            transport.send(hidden, changes=changes)
            if message >= 2:
                transport.receive_tokens(table)
                wrong += (table != message - 2).any()
        else:
            hidden = transport.receive(num, reused[:num] if changes else None)
            wrong += (hidden != value).any()
            table.fill_(message)
            transport.send_tokens(table)
    if is_first:
        for message in (398, 399):
            transport.receive_tokens(table)
            wrong += (table != message).any()
    transport.flush()
    torch.cuda.synchronize(device)
    assert not int(wrong), f"{int(wrong)} messages are not what was sent"


def one_way_us(transport: StageTransport, is_first: bool, num: int, device: torch.device, count: int = 100) -> float:
    """A hidden state there, a table back."""
    hidden = torch.zeros((num, WIDTH), dtype=torch.bfloat16, device=device)
    table = torch.zeros(ROWS, dtype=torch.int64, device=device)
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize(device)
        torch.distributed.barrier()
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(count):
            if is_first:
                transport.send(hidden, changes=True)
                transport.receive_tokens(table)
            else:
                transport.receive(num, hidden)
                transport.send_tokens(table)
        transport.flush()
        torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - began) / count / 2)
    return 1e6 * best


def be_rank(index: int, port: int) -> None:
    """One of two stages."""
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    parallel = init_parallel(make_plan(2, 1, 2).ranks[index], f"127.0.0.1:{port}", device, 60.0)
    for kind in ("nccl", "copies"):
        os.environ["ARGOSY_DISABLE_SYMMETRIC_MEMORY"] = "1" if kind == "nccl" else "0"
        transport = StageTransport(
            parallel, WIDTH, torch.bfloat16, timeout_seconds=60.0, max_steps_in_flight=3, max_tokens=MAX_TOKENS,
            max_rows=ROWS,
        )  # fmt: skip
        check(transport, index == 0, device)
        figures = {num: round(one_way_us(transport, index == 0, num, device), 1) for num in SIZES}
        if index == 0:
            row = {"benchmark": "stage_wire", "kind": kind, "checked": 400, "one_way_us_by_tokens": figures}
            row["device"] = torch.cuda.get_device_name(device)
            print(json.dumps(row), flush=True)
    destroy_parallel(parallel)


def main() -> None:
    """Two processes, two cards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    mp.spawn(be_rank, args=(free_port("127.0.0.1"),), nprocs=2)


if __name__ == "__main__":
    main()
