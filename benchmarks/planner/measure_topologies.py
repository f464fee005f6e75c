"""Layouts of one host's cards as Ray sees them: as one node, as two raylets with half of the cards each, as one a card.

    python benchmarks/planner/measure_topologies.py --output benchmarks/results/layouts_h200.jsonl

Each topology is a Ray cluster of its own raylets (nodes x cards) on this machine. On each, the layout that the planner
takes is run first ("auto"), then those of `--layouts` (replicas x TP x PP); all replicas work at the same time, behind
one client, on as many copies of the workload as there are replicas. One JSON line a run; `compare_layouts.py` makes
the table.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read when Ray is imported; its ports are on this machine alone
os.environ.update(
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0", RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_USAGE_STATS_ENABLED="0"
)

from ray.cluster_utils import Cluster
from ray.exceptions import RayError

from argosy.cluster.protocol.errors import ServingError
from argosy.cluster.replica_client import connect_engine
from argosy.deploy import bench_models, settings, workload
from argosy.deploy.bench_load import Timing, ask_gateway, run_clients
from argosy.deploy.gateway import Gateway
from argosy.deploy.launch import Engine, launch_engine
from argosy.deploy.owned_folder import short_temp_folder


@contextmanager
def raylets(num_nodes: int, cards: Sequence[str], device: str) -> Iterator[str]:
    """A Ray cluster whose nodes have so many of the cards each; its address."""
    share = len(cards) // num_nodes
    with tempfile.TemporaryDirectory(prefix="mt-", dir=short_temp_folder(20)) as folder:
        os.environ["RAY_TMPDIR"] = folder  # nothing of it where other clusters of this machine look
        Path(folder, "ray").mkdir()
        cluster = Cluster(shutdown_at_exit=True)
        try:
            for node in range(num_nodes):
                mine = cards[node * share : (node + 1) * share]
                room: dict[str, Any] = (
                    {"num_cpus": share} if device == "cpu" else {"num_gpus": share, "num_cpus": 2 * share}
                )
                if not node:
                    room |= {"include_dashboard": False}
                cluster.add_node(
                    **room, node_ip_address="127.0.0.1", object_store_memory=100 * 2**20,
                    env_vars={"CUDA_VISIBLE_DEVICES": ",".join(mine)},
                )  # fmt: skip
            yield cluster.address
        finally:
            cluster.shutdown()


def measure(args: argparse.Namespace, topology: str, layout: str, address: str, folder: Path) -> dict[str, Any]:
    """One layout on one topology."""
    wanted: dict[str, Any] = {
        "model": str(folder), "load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": args.max_model_len,
        "device": args.device,
    }  # fmt: skip
    if layout == "auto":
        wanted = settings.plan_what_is_open(wanted)
    else:
        dp, tp, pp = map(int, layout.split("x"))
        wanted |= {"data_parallel_size": dp, "tensor_parallel_size": tp, "pipeline_parallel_size": pp}
    config, _ = settings.make_config(wanted)
    began = time.perf_counter()
    told: list[str] = []
    with launch_engine(config, backend="ray", ray_address=address, on_note=told.append) as engine:
        ready = time.perf_counter() - began
        parallel = engine.config.parallel
        replicas, vocab = parallel.data_parallel_size, bench_models.vocab_size(folder)
        seconds, timings = asyncio.run(_load(engine, args.workload, vocab, replicas))
        row = {
            "topology": topology, "asked": layout, "model": args.model, "workload": args.workload,
            "replicas": replicas, "tp": parallel.tensor_parallel_size, "pp": parallel.pipeline_parallel_size,
            "layers": list(parallel.pipeline_layers), "figure": round(sum(t.num_tokens for t in timings) / seconds, 1),
            "unit": "output tokens/s", "requests": len(timings),
            "ttft_ms_p50": round(1e3 * statistics.median(t.first_seconds for t in timings), 2),
            "ready_seconds": round(ready, 1), "max_num_seqs": engine.config.scheduler.max_num_seqs,
            "max_num_batched_tokens": engine.config.scheduler.max_num_batched_tokens,
            "device": engine.info.device, "gpu": args.name, "notes": told,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }  # fmt: skip
    return row


async def _load(engine: Engine, name: str, vocab: int, replicas: int) -> tuple[float, list[Timing]]:
    """A warm-up, then all requests of all copies of the workload at once."""
    client = await connect_engine(engine.address, engine.secret, timeout_seconds=60.0)
    try:
        gateway = Gateway(client, None, engine.config)
        warm = [one for copy in range(replicas) for one in workload.make(name, vocab=vocab, salt=100 + copy)[:64]]
        await run_clients([ask_gateway(gateway)] * len(warm), warm)
        requests = [one for copy in range(replicas) for one in workload.make(name, vocab=vocab, salt=copy)]
        return await run_clients([ask_gateway(gateway)] * len(requests), requests)
    finally:
        await client.close()


def main() -> int:
    """All topologies, all layouts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topologies", nargs="+", default=["1x4", "2x2", "4x1"], metavar="NODESxCARDS")
    parser.add_argument("--layouts", nargs="*", default=["2x2x1", "2x1x2", "1x2x2", "1x1x4"], metavar="DPxTPxPP")
    parser.add_argument("--no-auto", action="store_true", help="leave out what the planner takes")
    parser.add_argument("--model", default="8b")
    parser.add_argument("--workload", default="fixed512x256")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--name", default="NVIDIA H200", help="of the card, for the rows")
    parser.add_argument("--output", help="append the JSON lines to this file")
    args = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory(prefix="argosy-topologies-") as parent:
        folder, _ = bench_models.make_folder(args.model, Path(parent))
        for topology in args.topologies:
            nodes, share = map(int, topology.split("x"))
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(nodes * share)))
            with raylets(nodes, visible.split(",")[: nodes * share], args.device) as address:
                for layout in [*([] if args.no_auto else ["auto"]), *args.layouts]:
                    try:
                        line = json.dumps(measure(args, topology, layout, address, folder))
                    except (ServingError, RayError) as error:  # no place on this topology: an answer, too
                        failed += 1
                        print(f"{topology} {layout}: {error}", file=sys.stderr, flush=True)
                        continue
                    print(line, flush=True)
                    if args.output:
                        with open(args.output, "a", encoding="utf-8") as file:
                            file.write(line + "\n")
    return min(failed, 1)


if __name__ == "__main__":
    raise SystemExit(main())
