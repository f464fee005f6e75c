"""What each weight format costs in memory and gives in speed: decode steps of one shape, all formats in one run.

    python benchmarks/gpu/compare_methods.py --output benchmarks/results/methods_h200.jsonl

Each format is a rank of its own in a process of its own, with random weights (numbers, scales, zeros and GPTQ's order
are drawn in the format's own layout), timed as its recorded graph is replayed. One JSON line a format and batch: ms a
step, bytes of the weights, and both beside bf16. `benchmarks/quality/method_table.py` makes the table of the docs.
"""

import argparse
import json
import subprocess
import sys

from argosy.deploy import bench_table

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}
FORMATS: dict[str, tuple[str | None, dict[str, object]]] = {  # (--quantization, what config.json says)
    "bf16": (None, {}),
    "fp8": ("fp8", {}),
    "int8": ("int8", {}),
    "int4": ("int4", {}),
    "gptq": (None, {"quantization_config": GPTQ | {"desc_act": False}}),
    "gptq, act-order": (None, {"quantization_config": GPTQ | {"desc_act": True}}),
    "awq": (None, {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}}),
}


def measure(name: str, model: str, batches: list[int], context: int, top: int) -> None:
    """One format, in this process."""
    import torch
    from profile_step import decode, make_runner, show, start_rows, timed, timeline

    from argosy.workers.recording import Recorder
    from argosy.workers.step_recording import make_graphs

    quantization, config = FORMATS[name]
    runner = make_runner(model, max(batches), context, quantization=quantization, checkpoint=config)
    weights = sum(parameter.nbytes for parameter in runner.model.parameters())
    graphs = make_graphs(runner, max(batches), [])
    graphs.sizes, graphs.shared_sizes = sorted(batches), []  # no others are looked at
    graphs.even_sizes = [size for size in graphs.even_sizes if size in batches]
    for batch in batches:
        runner.warm_up([(batch, 1)])
    graphs.record(Recorder(runner.device))
    runner.graphs = graphs
    for batch in batches:
        runner.execute(start_rows(runner, batch, context))
        for step in range(3):
            runner.execute(decode(batch, step))
        replay_ms, _ = timed(lambda batch=batch: graphs.run(batch), 20)  # type: ignore[misc]  # bound now
        step_ms, _ = timed(lambda batch=batch: runner.execute(decode(batch, 9)), 20)  # type: ignore[misc]  # bound now
        row = {"format": name, "model": model, "batch": batch, "context": context, "step_ms": round(step_ms, 4),
               "replay_ms": round(replay_ms, 4), "weight_bytes": weights,
               "device": torch.cuda.get_device_name()}  # fmt: skip
        print(json.dumps(row), flush=True)
        if top:
            show(lambda batch=batch: graphs.run(batch), top)  # type: ignore[misc]  # bound now
            timeline(lambda batch=batch: graphs.run(batch))  # type: ignore[misc]  # bound now


def main() -> int:
    """All formats, each beside bf16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="8b")
    parser.add_argument("--format", nargs="+", choices=sorted(FORMATS), default=list(FORMATS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument(
        "--top", type=int, default=0, help="also print so many kernels of each step, and a layer's in turn"
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="limit for one format")
    parser.add_argument("--output", help="append the JSON lines to this file")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        measure(args.format[0], args.model, args.batch, args.context, args.top)
        return 0
    plain: dict[int, dict[str, float]] = {}
    failed = 0
    for name in args.format:
        command = [sys.executable, __file__, "--here", "--model", args.model, "--format", name, "--context",
                   str(args.context), "--top", str(args.top), "--batch", *map(str, args.batch)]  # fmt: skip
        try:
            ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=args.seconds, check=False)
            told, is_done = ran.stdout, ran.returncode == 0
        except subprocess.TimeoutExpired as late:  # what it has said until then counts
            told, is_done = (late.stdout or b"").decode(), False
            print(f"{name}: not done after {args.seconds:.0f} s", flush=True)
        failed += not is_done
        for line in told.splitlines():
            if not line.startswith("{"):
                print(line, flush=True)
                continue
            row = json.loads(line)
            plain.setdefault(row["batch"], row)
            first = plain[row["batch"]]
            if first["format"] == "bf16":
                row["times_faster"] = round(first["step_ms"] / row["step_ms"], 3)
                row["memory"] = round(row["weight_bytes"] / first["weight_bytes"], 3)
            bench_table.tell(row, args.output)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
