"""What a rank's host does for a recorded decode step, without a card: from the driver's message to the answer, all but
the replay itself.

    python benchmarks/cpu/host_work.py --rows 1 8 64 256 1024

The real rank of a tiny model whose recorded steps are empty, so what is left is Python: taking up the message, the
control of the step, the answer. Contexts differ, so that one row in sixteen opens a block in each step, as they do in a
server. One JSON line a number of rows: microseconds of the processor (median of the steps), the same of steps in which
no row opens a block, and calls of functions in one of those, which are as many for one row as for a thousand.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.messages import ModelRunnerOutput, NewRequest, SchedulerOutput
from argosy.cluster.protocol.model_spec import read_model_spec
from argosy.cluster.protocol.sampling import TokenParams
from argosy.deploy import bench_table
from argosy.deploy.bench_models import make_folder
from argosy.placement.plan import make_plan
from argosy.placement.process_groups import ParallelContext
from argosy.workers.model_runner import ModelRunner
from argosy.workers.step_recording import make_graphs

BLOCK_SIZE, PROMPT = 16, 32
GREEDY = TokenParams(max_tokens=512, temperature=0.0)


class Nothing:
    """A recorded step of which only the replay's call is left."""

    def replay(self) -> None:
        """A card would begin to compute now."""


class EmptyRecorder:
    """As `workers.recording.Recorder`, for steps that leave their first results."""

    @contextmanager
    def recording(self) -> Iterator[None]:
        """All of them."""
        yield

    def record(self, run: Callable[[], Any]) -> tuple[Nothing, Any]:
        """What a step computes once, and nothing again."""
        made = run()
        return Nothing(), made.zero_() if isinstance(made, Tensor) else made


def make_runner(folder: str, options: dict[str, Any], most_rows: int) -> ModelRunner:
    """A rank with the given room, whose steps are recorded as on a card."""
    config = ServingConfig.from_mapping(
        {"model": folder, "load_format": options.get("load_format", "auto"), "max_num_seqs": most_rows,
         "max_num_batched_tokens": max(2048, most_rows), "max_model_len": 1024, "block_size": BLOCK_SIZE}
    )  # fmt: skip
    spec, device = read_model_spec(folder), torch.device("cpu")
    (rank,) = make_plan(spec.num_layers, 1, 1).ranks
    runner = ModelRunner(
        config, spec, ParallelContext(rank, device, 60.0), device=device, dtype=torch.float32,
        cache_dtype=torch.float32,
    )  # fmt: skip
    runner.load(Path(folder), None)
    runner.allocate(64)
    runner.batch.lives_on_device = True
    with torch.inference_mode():
        runner.graphs = make_graphs(runner, most_rows, [])
        runner.graphs.record(EmptyRecorder())  # type: ignore[arg-type]  # records nothing
    return runner


class Steps:
    """Decode steps of so many rows, of contexts that begin their blocks at different times."""

    def __init__(self, runner: ModelRunner, num_rows: int):
        """Takes the requests up: computed already, as after a swap, so that no prompt has to be computed."""
        self.runner, self.num_rows, self.step_id = runner, num_rows, 0
        self.lengths = [PROMPT + place % BLOCK_SIZE for place in range(num_rows)]
        requests = [
            NewRequest(place, [1] * length, length, length - 1, [0] * (-(-length // BLOCK_SIZE)), GREEDY)
            for place, length in enumerate(self.lengths)
        ]
        # a step without rows takes them up: the first step of rows is a recorded one as well
        runner.execute(SchedulerOutput(step_id=0, epoch=0, rows=[], new_requests=requests))
        for place, length in enumerate(self.lengths):
            runner.batch.num_computed_N[place] = length

    def message(self, *, opens: bool = True) -> bytes:
        """The next step's, as the driver sends it; with `opens` those rows get a block that need one."""
        self.step_id += 1
        new_blocks = [
            (place, [place % 64]) for place, length in enumerate(self.lengths) if opens and length % BLOCK_SIZE == 0
        ]
        self.lengths = [length + 1 for length in self.lengths]
        output = SchedulerOutput(step_id=self.step_id, epoch=0, rows=list(range(self.num_rows)), new_blocks=new_blocks)
        return msgspec.msgpack.encode(output)

    def run(self, message: bytes) -> ModelRunnerOutput:
        """What a rank does with it."""
        outcome = self.runner.execute(msgspec.msgpack.decode(message, type=SchedulerOutput))
        assert outcome is not None
        return outcome.result()

    def finish(self) -> None:
        """Forget the rows."""
        over = SchedulerOutput(step_id=self.step_id + 1, epoch=0, rows=[], finished=list(range(self.num_rows)))
        self.runner.execute(over)


def calls_of(run: Callable[[], object]) -> int:
    """Calls of functions, Python's and C's, while it ran."""
    count = 0

    def note(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def measure(runner: ModelRunner, num_rows: int, num_steps: int) -> dict[str, Any]:
    """Warm, then timed one by one."""
    steps = Steps(runner, num_rows)
    times: dict[bool, list[float]] = {True: [], False: []}
    for opens in (True, False):
        for _ in range(num_steps + 8):
            message = steps.message(opens=opens)
            began = time.process_time()
            answer = steps.run(message)
            times[opens].append(1e6 * (time.process_time() - began))
            assert len(answer.token_ids) == num_rows
    message = steps.message(opens=False)
    calls = calls_of(lambda: steps.run(message))
    steps.finish()
    every, quiet = (statistics.median(times[opens][8:]) for opens in (True, False))
    return {
        "bench": "host_work",
        "rows": num_rows,
        "us": round(every, 1),
        "us_no_block": round(quiet, 1),
        "calls": calls,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256, 1024])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", help="append the JSON lines to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as parent:
        folder, options = make_folder("tiny", Path(parent))
        runner = make_runner(str(folder), options, max(args.rows))
        for num_rows in args.rows:
            line = measure(runner, num_rows, args.steps)
            bench_table.tell(line, args.output)


if __name__ == "__main__":
    main()
