"""Requests that are made together: how long until all are sent, and how many steps their prompts take.

    python benchmarks/control_path/bench_burst.py [--requests 1 64 256 1000] [--tokens 128] [--prefix 0] [--repeat 5]

`LLM.generate` over a real driver whose ranks answer at once (`workers/zero_cost_rank.py`). Prints one JSON line a case,
medians in milliseconds from the call on:

    first, last  the first and the last bytes of requests are written       steps  that computed prompts
    begun        the first of them is in a step                            whole  `generate` returns
"""

import argparse
import functools
import json
import os
import statistics
import time
from typing import Any

from argosy import LLM, SamplingParams
from argosy.deploy import launch

OUTPUT_TOKENS = 4
BUDGET = 8192


class SentTimes:
    """Notes when the client writes."""

    def __init__(self, llm: LLM):
        client: Any = llm._gateway.client
        transport = client._transport
        self.times: list[float] = []

        class Noting:
            def write(_, data: bytes) -> None:
                self.times.append(time.perf_counter())
                transport.write(data)

            def close(_) -> None:
                transport.close()

        client._transport = Noting()


def one_run(llm: LLM, sent: SentTimes, prompts: list[list[int]]) -> dict[str, float]:
    """Milliseconds of one `generate`, and steps."""
    llm.reset_prefix_cache()
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=OUTPUT_TOKENS, detokenize=False)
    before = step_count(llm)
    sent.times.clear()
    began, began_wall = time.perf_counter(), time.time()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    ended = time.perf_counter()
    writes = list(sent.times)
    timings = [output.metrics for output in outputs if output.metrics is not None]
    # every step after the last first token is one of decodes alone
    steps = step_count(llm) - before - (OUTPUT_TOKENS - 1)
    return {
        "first": (writes[0] - began) * 1e3,
        "last": (writes[-1] - began) * 1e3,
        "begun": (min(t.arrival_time + t.scheduled_ts for t in timings) - began_wall) * 1e3,
        "whole": (ended - began) * 1e3,
        "steps": steps,
        "writes": len(writes),
    }


def step_count(llm: LLM) -> int:
    """Steps so far."""
    _, counts, _ = llm.run(lambda gateway: gateway.client.stats()).histograms["argosy_step_tokens"]
    return sum(counts)


def main() -> None:
    """All cases, to the screen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 64, 256, 1000])
    parser.add_argument("--tokens", type=int, default=128, help="of a prompt")
    parser.add_argument("--prefix", type=int, default=0, help="tokens that all prompts begin with")
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    launch.launch_engine = functools.partial(  # type: ignore[assignment]  # ranks that cost nothing
        launch.launch_engine, rank_module="argosy.workers.zero_cost_rank"
    )
    most = max(arguments.requests)
    length = arguments.tokens + arguments.prefix + OUTPUT_TOKENS
    with LLM(
        distributed_executor_backend="mp", max_model_len=max(2048, length), max_num_seqs=max(most, 1),
        max_num_batched_tokens=max(BUDGET, most), num_gpu_blocks_override=(length // 16 + 2) * most + 64,
    ) as llm:  # fmt: skip
        sent = SentTimes(llm)
        for num_requests in arguments.requests:
            runs = []
            for repeat in range(arguments.repeat + 1):
                seed = 7919 * (repeat + 1)
                prompts = [
                    [5] * arguments.prefix
                    + [3 + (seed + 31 * number + place) % 3000 for place in range(arguments.tokens)]
                    for number in range(num_requests)
                ]
                runs.append(one_run(llm, sent, prompts))
            runs = runs[1:]
            medians = {name: round(statistics.median(run[name] for run in runs), 2) for name in runs[0]}
            row = {
                "benchmark": "burst",
                "requests": num_requests,
                "tokens": arguments.tokens,
                "prefix": arguments.prefix,
            }
            print(json.dumps({**row, **medians, "load": round(os.getloadavg()[0], 1)}), flush=True)


if __name__ == "__main__":
    main()
