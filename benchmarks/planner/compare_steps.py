"""The steps of a traced run beside what the cost model says of those very steps: where a forecast goes wrong.

    python benchmarks/planner/compare_steps.py --model 8b -tp 2 trace.jsonl

The trace is of `benchmarks/gpu/bench_gpu.py --trace FILE` (the rank that answers), plain or gzipped. Each run begins
with prompts alone; `--run` picks one, the last by default. A step's time is from the later of the driver's word and the
answer before to its own answer; over stages, which work side by side, beside the slowest stage's seconds. One line for
each sort of step: how many, their seconds together measured and foretold, and of one the mean measured, foretold, and
the host's for telling the card.
"""

import argparse
import gzip
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from compare_layouts import MODELS, SETTINGS

from argosy.cluster.protocol.config import ServingConfig
from argosy.placement.calibration import Calibration, default_calibration, read_calibration
from argosy.placement.cost_model import ReplicaCost, StepLoad
from argosy.placement.device_groups import deal_groups, find_groups, hop_links
from argosy.placement.layout import LayoutJudge, Traffic
from argosy.placement.model_sources import read_model_shape
from argosy.placement.rank_memory import Serving, StageBytes
from argosy.placement.topology_sources import parse_topology
from argosy.placement.weight_format import format_by_name

ROWS = (1, 8, 32, 64, 128, 256, 512, 1024)
TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)


class TracedStep(msgspec.Struct, frozen=True):
    """A step of a trace."""

    load: StepLoad
    seconds: float
    host_seconds: float
    began: float = 0.0
    ended: float = 0.0


def read_trace(path: str | Path, run: int = -1) -> list[TracedStep]:
    """The steps of a run, in order; those whose answer is missing are left out."""
    data = Path(path).read_bytes()
    text = gzip.decompress(data).decode() if str(path).endswith(".gz") else data.decode()
    lines = [json.loads(line) for line in text.splitlines()]
    steps = [line for line in lines if "step" in line]
    steps = [line for line in steps if line["rows"]]
    starts = [at for at, line in enumerate(steps) if not line["decodes"] and (not at or steps[at - 1]["decodes"])]
    runs = [steps[first:last] for first, last in zip(starts, [*starts[1:], len(steps)], strict=True)]
    steps = runs[run]
    answers = {line["answer"]: line["at"] for line in lines if "answer" in line and line["at"] >= steps[0]["at"]}
    found, before = [], 0.0
    for line in steps:
        if line["step"] not in answers:
            continue
        ended = answers[line["step"]]
        load = StepLoad(line["decodes"], line["context"], line["prefill"], line["pairs"], line["sampled"],
                        line.get("longest", 0))  # fmt: skip
        seconds = ended - max(before, line["at"])
        found.append(TracedStep(load, seconds, line["host"] * 1e-6, line["at"], ended))
        before = ended
    return found


def cost_of(
    model: str, tp_size: int, pp_size: int, *, layers: Sequence[int] = (), quantization: str = "none",
    calibration: Calibration | None = None, gpu: str = "H200",
) -> ReplicaCost:  # fmt: skip
    """The price list of one replica."""
    shape = read_model_shape(MODELS[model])
    config = ServingConfig.from_mapping({"model": shape.name, "max_num_seqs": 1024, **SETTINGS})
    serving = Serving.from_config(config, shape, format_by_name(quantization))
    topology = parse_topology({"nodes": [{"name": "node", "gpus": f"{tp_size * pp_size} x {gpu}"}]})
    judge = LayoutJudge(StageBytes(shape, serving), Traffic(), calibration=calibration)
    (replica,) = deal_groups(find_groups(topology, tp_size), pp_size, 1)
    return judge.cost(replica, tp_size, layers or judge.split(replica, tp_size), hop_links(topology, replica))


def compare(steps: Sequence[TracedStep], cost: ReplicaCost) -> list[dict[str, Any]]:
    """A row for each sort of step, and one for all."""
    reckon: Callable[[StepLoad], float] = cost.step_seconds
    if len(cost.stages) > 1:
        reckon = lambda load: max(cost.stage_seconds(load))  # noqa: E731  # two sorts of the same
    sorts: dict[tuple[int, str], list[TracedStep]] = defaultdict(list)
    for step in steps:
        load = step.load
        if load.prefill_tokens:
            at = next((size for size in TOKENS if load.prefill_tokens <= size), TOKENS[-1])
            sorts[1, f"{at:5} prompt tokens"].append(step)
        else:
            at = next((size for size in ROWS if load.num_decodes <= size), ROWS[-1])
            sorts[0, f"{at:5} rows"].append(step)
    rows = []
    for (_, name), group in [*sorted(sorts.items()), ((2, "all"), list(steps))]:
        seconds, foretold = sum(step.seconds for step in group), sum(reckon(step.load) for step in group)
        loads = [msgspec.structs.astuple(step.load) for step in group]
        rows.append(
            {
                "sort": name.strip(), "steps": len(group), "seconds": round(seconds, 4), "foretold": round(foretold, 4),
                "ms": round(1e3 * seconds / len(group), 4), "ms_foretold": round(1e3 * foretold / len(group), 4),
                "host_ms": round(1e3 * sum(step.host_seconds for step in group) / len(group), 3),
                "load": [round(sum(numbers) / len(group)) for numbers in zip(*loads, strict=True)],
            }
        )  # fmt: skip
    return rows


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--run", type=int, default=-1, help="which run of the trace (default: the last)")
    parser.add_argument("--model", choices=sorted(MODELS), default="8b")
    parser.add_argument("-tp", type=int, default=1)
    parser.add_argument("-pp", type=int, default=1)
    parser.add_argument("--layers", type=int, nargs="*", default=())
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--workload", default="chat1000", help="what was run, for the rows")
    parser.add_argument("--gpu", default="NVIDIA H200", help="where, for the rows")
    parser.add_argument("--output", help="append a JSON line for each sort of step: 'fit_calibration.py --steps'")
    parser.add_argument("--calibration", help="instead of the one that ships")
    args = parser.parse_args()
    calibration = read_calibration(args.calibration) if args.calibration else default_calibration("H200")
    steps = read_trace(args.trace, args.run)
    cost = cost_of(args.model, args.tp, args.pp, layers=args.layers, quantization=args.quantization,
                   calibration=calibration)  # fmt: skip
    wall = steps[-1].ended - steps[0].began
    rows = compare(steps, cost)
    about = {"model": args.model, "layout": f"TP{args.tp}xPP{args.pp}", "layers": list(args.layers),
             "quantization": args.quantization, "workload": args.workload, "gpu": args.gpu}  # fmt: skip
    if args.output:
        with open(args.output, "a", encoding="utf-8") as file:
            file.writelines(json.dumps({**about, **row}) + "\n" for row in rows)
    print(f"{len(steps)} steps in {wall:.3f} s, of which {sum(step.seconds for step in steps):.3f} s in steps")
    print("| step | number | rows | context | longest | prompt | seconds | foretold | off by | ms | foretold | host |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        decodes, context, prompt, _, _, longest = row["load"]
        print(
            f"| {row['sort']} | {row['steps']} | {decodes} | {context // max(1, decodes)} | {longest} | {prompt} | "
            f"{row['seconds']:.3f} | {row['foretold']:.3f} | {row['foretold'] / row['seconds'] - 1:+.1%} | "
            f"{row['ms']:.2f} | {row['ms_foretold']:.2f} | {row['host_ms']:.2f} |"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
