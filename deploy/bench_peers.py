"""transformers on the same prompts, in a process of its own: one request at a time, and static batches.

Run as a module it reads one JSON job from its input and writes one JSON line a figure; see `run_transformers`.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, Final

from argosy.cluster.protocol.errors import ConfigError
from argosy.deploy.workload import Workload

_LONGEST_SECONDS: Final = 3600.0


def run_transformers(
    folder: str, workload: Workload, *, dtype: str, random_weights: bool, batch: int, cpu_threads: int | None = None
) -> list[dict[str, Any]]:
    """One row for each way of running it: seconds, output tokens, and the token ids for a comparison."""
    job = {
        "folder": folder,
        "dtype": dtype,
        "random_weights": random_weights,
        "batch": batch,
        "cpu_threads": cpu_threads,
        "requests": [[request.prompt, request.max_tokens] for request in workload],
    }
    command = [sys.executable, "-P", "-m", "argosy.deploy.bench_peers"]
    done = subprocess.run(
        command, input=json.dumps(job), capture_output=True, text=True, timeout=_LONGEST_SECONDS, check=False
    )
    if done.returncode:
        raise ConfigError(f"transformers could not run this: {done.stderr.strip().splitlines()[-1:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def main() -> int:
    """The process that runs transformers."""
    job = json.load(sys.stdin)
    for row in _measure(job):
        print(json.dumps(row), flush=True)
    return 0


def _measure(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    # Heavy, and the module is also imported by those who only start this process.
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    if job["cpu_threads"]:
        torch.set_num_threads(job["cpu_threads"])
    dtype = getattr(torch, job["dtype"])
    if job["random_weights"]:
        make: Any = AutoModelForCausalLM.from_config  # untyped over there
        model = make(AutoConfig.from_pretrained(job["folder"]), dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=dtype)
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    model.generation_config.eos_token_id = None  # as ignore_eos: every answer has the length it was asked for
    model.generation_config.pad_token_id = 0
    requests = job["requests"]
    _generate(torch, model, requests[:1], limit=4)  # warm-up
    for name, batch in (("one by one", 1), ("static batch", job["batch"])):
        if name == "static batch" and len(requests) == 1:
            continue
        started, first, answers = time.perf_counter(), None, []
        for place in range(0, len(requests), batch):
            answers += _generate(torch, model, requests[place : place + batch])
            first = first or time.perf_counter() - started
        yield {"mode": name, "seconds": time.perf_counter() - started, "first_seconds": first, "token_ids": answers}


def _generate(torch: Any, model: Any, requests: list[Any], limit: int | None = None) -> list[list[int]]:
    """Greedy answers; a batch runs until its longest answer is complete, and what is beyond the others' is waste."""
    longest = max(len(prompt) for prompt, _ in requests)
    most = limit or max(num_new for _, num_new in requests)
    rows = [[0] * (longest - len(prompt)) + prompt for prompt, _ in requests]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in requests]
    with torch.inference_mode():
        out = model.generate(
            torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=most,
            min_new_tokens=most,
            do_sample=False,
        )
    return [out[row, longest : longest + num_new].tolist() for row, (_, num_new) in enumerate(requests)]


if __name__ == "__main__":
    raise SystemExit(main())
