"""What the HTTP doors cost: one engine on Ray, the same requests in process and over HTTP in turns.

`argosy bench --over http`. The process that measures stands where Ray Serve's replica stands (it talks to the driver by
the same channel), so the difference is the doors alone: proxy, replica, text of events.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.replica_client import connect_engine
from argosy.deploy import bench_engine, bench_http, bench_models, bench_table, server, workload
from argosy.deploy.bench_engine import Row
from argosy.deploy.bench_load import Timing, ask_gateway, run_clients
from argosy.deploy.gateway import Gateway
from argosy.deploy.model_folder import load_tokenizer, localize
from argosy.deploy.progress import StartProgress
from argosy.deploy.workload import Workload
from argosy.placement.ports import free_port

_CONCURRENCY: Final = (1, 32, 256)
_REQUESTS_A_CLIENT: Final = 4
_LEAST_REQUESTS, _MOST_REQUESTS = 16, 512
_MOST_REPEATS: Final = 2
_CONNECT_SECONDS: Final = 30.0
Load = tuple[float, list[Timing]]


class _MeasureThenStop:
    """Stands in for the signals that a server waits for: when its doors are open we measure, and then it stops."""

    is_set = False

    def __init__(self, measure: Callable[[], None]):
        self._measure = measure

    def wait(self) -> None:
        """What the server calls once it serves."""
        self._measure()


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """A row for each number of requests at once."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="argosy-bench-") as parent, server._private_folder() as private:
        folder, options = bench_models.make_folder(args.model, Path(parent))
        config = bench_engine.engine_config(args, folder, options)
        door = config.server.replace(host="127.0.0.1", port=free_port("127.0.0.1"), drain_seconds=0.0)
        config = localize(config.replace(server=door))
        vocab = bench_models.vocab_size(folder)
        server._set_environment(private)
        # Ray reads its environment when it is imported, so only now.
        from argosy.deploy.launch import launch_engine

        started = time.perf_counter()
        engine = launch_engine(config, backend="ray")
        base = {
            "group": _group(args, engine.info.dtype),
            "model": args.model,
            "dtype": engine.info.dtype,
            "engine": "argosy HTTP",
            "layout": engine.info.layout,
            "note": args.note,
        }
        print(f"engine on Ray ready after {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)

        def work() -> None:
            url = f"http://127.0.0.1:{config.server.port}"
            for concurrency in args.concurrency or _CONCURRENCY:
                found = _compare(config, engine, url, vocab, concurrency, args.repeats)
                rows.append({**base, "workload": f"http x{concurrency}", **found})
                print(f"  {rows[-1]}", file=sys.stderr, flush=True)

        stop: Any = _MeasureThenStop(work)
        try:
            server._serve(config, engine, StartProgress(is_quiet=True), stop, server._doors_folder(config, private))
        finally:
            engine.close()
    yield from rows


def _group(args: argparse.Namespace, dtype: str) -> str:
    layout = bench_table.layout_of(args.tensor_parallel_size, args.pipeline_parallel_size)
    return bench_table.name_of(args.model, args.quantization or dtype, layout)


def _compare(config: ServingConfig, engine: Any, url: str, vocab: int, concurrency: int, repeats: int) -> Row:
    """In process and over HTTP in turns, each after a warm-up; medians over all repeats."""
    count = min(max(_LEAST_REQUESTS, _REQUESTS_A_CLIENT * concurrency), _MOST_REQUESTS)
    repeats = min(repeats, _MOST_REPEATS)
    in_process, over_http = [], []
    for repeat in range(-1, repeats):
        salt = 1000 * concurrency + 2 * repeat
        some = max(concurrency, count // 4) if repeat < 0 else count
        requests = workload.fixed(some, 128, 128, vocab=vocab, seed=9, salt=salt)
        others = workload.fixed(some, 128, 128, vocab=vocab, seed=9, salt=salt + 1)
        near = asyncio.run(_in_process(config, engine, requests, concurrency))
        # without a tokenizer a token has no text, and an event without text would not be sent
        ask_ids = {"return_token_ids": True}
        far = asyncio.run(bench_http.run_load(url, others, concurrency=concurrency, extra=ask_ids))
        if repeat >= 0:
            in_process.append(near)
            over_http.append(far)
    ttft = [
        1e3 * statistics.median([t.first_seconds for _, ts in runs for t in ts]) for runs in (in_process, over_http)
    ]
    rates = [
        statistics.median([sum(t.num_tokens for t in ts) / seconds for seconds, ts in runs])
        for runs in (in_process, over_http)
    ]
    gaps = [
        [1e3 * statistics.median([t.gap_seconds for t in ts]) for _, ts in runs] for runs in (in_process, over_http)
    ]
    return {
        "figure": round(rates[1] / rates[0], 4),
        "unit": "of the throughput in process",
        "repeats": repeats,
        "requests": count,
        "ttft_ms_p50": round(ttft[1], 3),
        "ttft_ms_p50_in_process": round(ttft[0], 3),
        "ttft_ms_more": round(ttft[1] - ttft[0], 3),
        "ms_per_token": round(statistics.median(gaps[1]), 3),
        "ms_per_token_in_process": round(statistics.median(gaps[0]), 3),
        # of each run: a lone client's tokens come at the engine's pace, so a run that is slow was slow there
        "ms_per_token_of_runs": [[round(gap, 3) for gap in runs] for runs in gaps],
        "output_tokens_per_second": round(rates[1], 1),
        "output_tokens_per_second_in_process": round(rates[0], 1),
    }


async def _in_process(config: ServingConfig, engine: Any, requests: Workload, concurrency: int) -> Load:
    client = await connect_engine(engine.address, engine.secret, timeout_seconds=_CONNECT_SECONDS)
    try:
        gateway = Gateway(client, load_tokenizer(config), config)
        return await run_clients([ask_gateway(gateway)] * concurrency, requests)
    finally:
        await client.close()
