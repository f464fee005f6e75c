"""How long the card waits for the host between decode steps of a running engine, from the device's own clock.

    python benchmarks/gpu/idle_profile.py --model 8b --batch 1 8 64 256 512

The requests of `decode(batch)` twice over: the first run is timed without a profiler, in the second one sixty steps are
profiled in the rank. `idle_between_steps` is the share of the time from the end of a step's last kernel to the first
kernel of the next; the aim is 3 % at most. One JSON line a batch.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from argosy.deploy import bench, bench_engine, bench_models, launch, workload
from argosy.deploy.offline import LLM

FIRST_STEP, NUM_STEPS = 300, 60  # of the second run: the first one is shorter than that


def main() -> int:
    """Run, print, perhaps store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="8b")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("-tp", "--tensor-parallel-size", type=int, default=1)
    parser.add_argument("-pp", "--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--quantization", "-q")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--output", help="append the JSON lines to this file")
    args = parser.parse_args()
    about = {key: value for key, value in bench.describe_machine().items() if key != "cores"}
    here = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    launch.launch_engine.__kwdefaults__["rank_module"] = "profiled_rank"
    most = max(args.batch)
    with tempfile.TemporaryDirectory(prefix="argosy-idle-") as parent:
        folder, options = bench_models.make_folder(args.model, Path(parent))
        found = Path(parent, "profile")
        job = {"file": str(found), "rows": args.batch, "first": FIRST_STEP, "steps": NUM_STEPS}
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
                for output_len in (256, FIRST_STEP + NUM_STEPS + 60):
                    requests = workload.decode(batch, vocab=vocab, output_len=output_len, salt=output_len)
                    _, outputs = bench_engine.run(llm, requests)
                    times = [o.metrics for o in outputs if o.metrics is not None]
                    gaps = [(t.last_token_ts - t.first_token_ts) / (t.num_generation_tokens - 1) for t in times]
                    steps.append(1e3 * statistics.median(gaps))
                for file in sorted(Path(parent).glob("profile.*")):
                    layout = f"TP{args.tensor_parallel_size}xPP{args.pipeline_parallel_size}"
                    model = args.model + (f" {args.quantization}" if args.quantization else "")
                    row = {"model": model, "layout": layout, "batch": batch}
                    row |= {"step_ms_unprofiled": round(steps[0], 4), **json.loads(file.read_text()), **about}
                    file.unlink()
                    print(json.dumps(row), flush=True)
                    if args.output:
                        with open(args.output, "a", encoding="utf-8") as out:
                            out.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
