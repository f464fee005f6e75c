"""How long the card waits for the host between decode steps of a running engine, from the device's own clock.

    python benchmarks/gpu/idle_profile.py --model 06b 8b --batch 1 8 64 256

The requests of `decode(batch)` twice over: the first run is timed without a profiler, in the second one sixty steps are
profiled in the rank. `idle_between_steps` is the share of the time from the end of a step's last kernel to the first
kernel of the next; the aim is 3 % at most. One JSON line a batch, then a line each that a person reads, with how busy
the host's cores were; exit code 1 where the aim was missed. About half a minute a model.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from argosy.deploy import bench, bench_engine, bench_models, bench_table, launch, workload
from argosy.deploy.offline import LLM

FIRST_STEP, NUM_STEPS = 170, 60  # of the second run: the first one is shorter than that
INPUT_LEN = 128
AIM = 0.03


def profile_model(model: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each batch and rank, printed and stored as they come."""
    about = {key: value for key, value in bench.describe_machine().items() if key != "cores"}
    layout = f"TP{args.tensor_parallel_size}xPP{args.pipeline_parallel_size}"
    most = max(args.batch)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="argosy-idle-") as parent:
        folder, options = bench_models.make_folder(model, Path(parent))
        job = {"file": f"{parent}/profile", "rows": args.batch, "first": FIRST_STEP, "steps": NUM_STEPS}
        os.environ["ARGOSY_PROFILE"] = json.dumps(job)
        vocab = bench_models.vocab_size(folder)
        if args.quantization:
            options["quantization"] = args.quantization
        with LLM(
            str(folder), **options, dtype="bfloat16", distributed_executor_backend="mp",
            tensor_parallel_size=args.tensor_parallel_size, pipeline_parallel_size=args.pipeline_parallel_size,
            max_num_seqs=most, max_cuda_graph_batch=most, max_num_batched_tokens=max(8192, most),
            max_model_len=args.max_model_len,
        ) as llm:  # fmt: skip
            for batch in args.batch:
                bench_engine.run(llm, workload.decode(batch, vocab=vocab, output_len=32, salt=1))
                steps = []
                for output_len in (FIRST_STEP - 10, FIRST_STEP + NUM_STEPS + 20):
                    requests = workload.decode(
                        batch, vocab=vocab, input_len=INPUT_LEN, output_len=output_len, salt=output_len
                    )
                    _, outputs = bench_engine.run(llm, requests)
                    times = [o.metrics for o in outputs if o.metrics is not None]
                    gaps = [(t.last_token_ts - t.first_token_ts) / (t.num_generation_tokens - 1) for t in times]
                    steps.append(1e3 * statistics.median(gaps))
                for file in sorted(Path(parent).glob("profile.*")):
                    name = model + (f" {args.quantization}" if args.quantization else "")
                    row = {"model": name, "layout": layout, "batch": batch, "step_ms_unprofiled": round(steps[0], 4)}
                    row |= {**json.loads(file.read_text()), **about, "context": INPUT_LEN + FIRST_STEP + NUM_STEPS // 2}
                    row["load_a_core"] = round(os.getloadavg()[0] / (os.cpu_count() or 1), 2)
                    file.unlink()
                    rows.append(row)
                    bench_table.tell(row, args.output)
    return rows


def main() -> int:
    """Run, print, perhaps store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["8b"], help="one after the other (8b)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("-tp", "--tensor-parallel-size", type=int, default=1)
    parser.add_argument("-pp", "--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--quantization", "-q")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--output", help="append the JSON lines to this file")
    args = parser.parse_args()
    here = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    launch.launch_engine.__kwdefaults__["rank_module"] = "profiled_rank"
    rows = [row for model in args.model for row in profile_model(model, args)]
    for row in rows:
        print(
            f"{row['model']} {row['layout']} rank {row['rank']}, {row['batch']} rows: {row['step_ms_unprofiled']:.3f}"
            f" ms a step, waits {row['idle_between_steps']:.2%} ({row['idle_between_steps_us']:.1f} us) between steps, "
            f"{row['idle_within_steps']:.2%} within; host's load {row['load_a_core']} a core"
        )
    worst = max((row["idle_between_steps"] for row in rows), default=1.0)
    print(f"{'holds' if worst <= AIM else 'MISSES'} the aim of {AIM:.0%}: at most {worst:.2%}")
    return int(worst > AIM)


if __name__ == "__main__":
    sys.exit(main())
