"""How long a plan takes, process start included: python benchmarks/planner/bench_plan.py [--output FILE]

Each row is `argosy plan MODEL --gpus "8 x GPU" --nodes N` in a process of its own; CPU seconds are given beside the
wall's, since plans are made on machines that do other things.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

from argosy.deploy import bench_table

MODELS = ("llama-3.1-405b", "deepseek-r1", "bloom-176b")
NODES = (1, 4, 16, 64)


def measure(model: str, gpu: str, nodes: int) -> dict[str, object]:
    """One plan."""
    command = [sys.executable, "-m", "argosy", "plan", model, "--gpus", f"8 x {gpu}", "--nodes", str(nodes), "--json"]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    layout = json.loads(run.stdout)["chosen"]["layout"] if run.returncode == 0 else "does not fit"
    return {"model": model, "gpus": f"{nodes} x 8 x {gpu}", "layout": layout, "cpu_seconds": round(cpu, 2),
            "wall_seconds": round(wall, 2)}  # fmt: skip


def main() -> int:
    """All rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="append the JSON lines to this file")
    args = parser.parse_args()
    for model in MODELS:
        for gpu in ("H200", "A100-40GB"):
            for nodes in NODES:
                bench_table.tell(measure(model, gpu, nodes), args.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
