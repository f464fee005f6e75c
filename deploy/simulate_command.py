"""`argosy simulate`: a planned cluster under a workload, with the real scheduler in virtual time and no GPU."""

import argparse
import json
import time
from collections.abc import Iterable
from typing import Any, Final

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import ConfigError
from argosy.cluster.simulated_cluster import Arrival, SimulatedCluster
from argosy.cluster.simulated_replica import SimulatedReplica, StageSeconds, StepSize
from argosy.deploy import plan_command
from argosy.deploy.simulate_report import Slo, make_report, report_lines, report_svg
from argosy.deploy.simulate_workload import WorkloadSpec, generate, named, read_trace
from argosy.deploy.workload import WORKLOADS
from argosy.placement.cost_model import ReplicaCost, StepLoad
from argosy.placement.device_groups import hop_links
from argosy.placement.layout import LayoutJudge, Traffic
from argosy.placement.plan_report import PlanOptions, PlanReport
from argosy.placement.planner import plan_cluster
from argosy.placement.rank_memory import StageBytes
from argosy.placement.swap_plan import plan_swap

EXAMPLES: Final = f"""\
examples:
  argosy simulate llama-3.1-8b --gpus "4 x H200" --rate 60 --requests 5000
  argosy simulate llama-3.1-8b --gpus "1 x H200" --workload chat1000      the requests of 'argosy bench'
  argosy simulate llama-3.1-70b --cluster cluster.yaml --arrivals bursts --burst-size 200 --slo-ttft-ms 500
  argosy simulate qwen3-32b --gpus "8 x H100" --nodes 16 --prefixes 40 --prefix-len 1500 --input-len 1800 --rate 400
  argosy simulate llama-3.1-8b --gpus "2 x L4" --trace requests.jsonl --json

The layout is the planner's (see 'argosy plan --help'), or what -tp, -pp and --replicas say. Time is virtual: the
scheduler, the block manager, the prefix cache and the router are the real ones, steps take what the cost model says.
The same seed gives the same figures. A trace has a request a line: {{"arrival": 0.5, "input": 512, "output": 128}}.
Named workloads: {", ".join(WORKLOADS)}.
"""
LOAD: Final = 0.7  # of the predicted throughput, when no rate is given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `argosy simulate`."""
    parser.add_argument("model", help="a known model's name, a hub name, a folder, or a config.json")
    plan_command.add_cluster_arguments(parser)
    parser.add_argument("--workload", metavar="NAME", help="a workload of 'argosy bench', all requests at once")
    parser.add_argument("--trace", metavar="FILE", help="requests from a file, JSON lines or CSV")
    parser.add_argument("--requests", type=int, default=1000, metavar="N", help="default: %(default)s")
    parser.add_argument("--arrivals", choices=("poisson", "even", "bursts", "at-once"), default="poisson",
                        help="default: %(default)s")  # fmt: skip
    rate = f"requests a second (default: {100 * LOAD:.0f} %% of full load)"
    parser.add_argument("--rate", type=float, metavar="R", help=rate)
    parser.add_argument("--burst-size", type=int, default=50, metavar="N", help="with bursts (default: %(default)s)")
    parser.add_argument("--lengths", choices=("fixed", "lognormal", "uniform"), default="lognormal",
                        help="how lengths spread around their means (default: %(default)s)")  # fmt: skip
    parser.add_argument("--input-len", type=int, default=512, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--output-len", type=int, default=256, help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--prefixes", type=int, default=0, metavar="N", help="so many prefixes that prompts share")
    parser.add_argument("--prefix-len", type=int, default=0, metavar="N", help="tokens of each of them")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same figures")
    parser.add_argument("--slo-ttft-ms", type=float, help="count requests whose first token comes in time")
    parser.add_argument("--slo-tpot-ms", type=float, help="count requests whose tokens come fast enough")
    parser.add_argument(
        "--step-by-step", action="store_true", help="don't leap over plain steps (same figures, slower)"
    )
    parser.add_argument("--svg", metavar="FILE", help="draw load over time")
    parser.add_argument("--json", action="store_true", help="the figures for programs")


def main(args: argparse.Namespace) -> int:
    """Plan, simulate, print."""
    if args.workload and args.trace:
        raise ConfigError("give --workload or --trace, not both")
    if not plan_command.names_cluster(args):
        raise ConfigError("say on what: --gpus '4 x H200', --cluster FILE, or --ray-address auto")
    plan_command.check_numbers(args, "input_len", "output_len", least=1)
    plan_command.check_numbers(args, "slo_ttft_ms", "slo_tpot_ms")
    shape = plan_command.shape_from(args)
    topology = plan_command.topology_from(args)
    config = plan_command.config_from(args, shape, topology)
    options = PlanOptions(
        tp_size=args.tensor_parallel_size,
        pp_size=plan_command.num_stages_from(args),
        num_replicas=args.replicas,
        traffic=Traffic(input_len=args.input_len, output_len=args.output_len),
        calibration=plan_command.calibration_from(args),
    )
    report = plan_cluster(shape, topology, options, plan_command.serving_from(args, shape, topology))
    arrivals, seconds, about = _arrivals(args, report)
    started = time.perf_counter()
    cluster = simulate(report, config, arrivals, seconds, leaps=not args.step_by_step)
    took = time.perf_counter() - started
    slo = Slo(
        ttft_seconds=None if args.slo_ttft_ms is None else args.slo_ttft_ms / 1e3,
        tpot_seconds=None if args.slo_tpot_ms is None else args.slo_tpot_ms / 1e3,
    )
    overhead = _judge(report).calibration_of(report.chosen.replicas[0].stages[0].group).request_us * 1e-6
    figures: dict[str, Any] = {
        "model": shape.name, "layout": report.chosen.describe(), "workload": about,
        **make_report(cluster, slo=slo, request_seconds=overhead, num_gpus=report.chosen.num_gpus),
    }  # fmt: skip
    if args.svg:
        plan_command.write_drawing(args.svg, report_svg(figures))
    if args.json:
        print(json.dumps(figures, indent=1))
        return 0
    print(f"{shape.name} as {report.chosen.describe()}: {about}")
    print("\n".join(report_lines(figures)))
    print(f"(simulated in {took:.1f} s)")
    return 0


def simulate(
    report: PlanReport,
    config: ServingConfig,
    arrivals: Iterable[Arrival],
    expected_seconds: float,
    *,
    leaps: bool = True,
) -> SimulatedCluster:
    """Run a plan's replicas under a workload, in order of arrival."""
    judge = _judge(report)
    costs: dict[object, ReplicaCost] = {}
    replicas = []
    for number, layout in enumerate(report.chosen.replicas):
        key = (layout.layer_counts, tuple(stage.group.kind for stage in layout.stages))
        if key not in costs:
            groups = [stage.group for stage in layout.stages]
            hops = hop_links(report.topology, groups)
            costs[key] = judge.cost(groups, layout.tp_size, layout.layer_counts, hops)
        calibration = judge.calibration_of(layout.stages[0].group)
        swap = plan_swap(layout, report.serving, report.topology.nodes, costs[key], calibration)
        replicas.append(
            SimulatedReplica(
                number, plan_command.config_of(config, layout), layout.num_blocks, _seconds_of(costs[key]),
                num_stages=layout.pp_size, leaps=leaps, groups=report.serving.groups, swap=swap,
                shared_reads=calibration.shared_reads,
            )
        )  # fmt: skip
    sample = max(expected_seconds / 120, 0.05)
    cluster = SimulatedCluster(
        replicas, sample_seconds=sample, max_model_len=report.serving.max_model_len,
        block_size=report.serving.block_size,
    )  # fmt: skip
    cluster.run(arrivals)
    return cluster


def _judge(report: PlanReport) -> LayoutJudge:
    options = report.options
    return LayoutJudge(StageBytes(report.model, report.serving), options.traffic, calibration=options.calibration)


def _seconds_of(cost: ReplicaCost) -> StageSeconds:
    def seconds(size: StepSize) -> list[float]:
        return cost.stage_seconds(StepLoad(*size))

    return seconds


def _arrivals(args: argparse.Namespace, report: PlanReport) -> tuple[Iterable[Arrival], float, str]:
    """The requests, how long they will take to arrive, and what they are in words."""
    if args.workload:
        found = list(named(args.workload))
        tokens = sum(arrival.output_len for arrival in found)
        return found, tokens / max(report.chosen.tokens_per_second, 1e-9), f"{args.workload}, all at once"
    if args.trace:
        trace = read_trace(args.trace)
        return trace, trace[-1].seconds, f"{len(trace):,} requests of {args.trace}"
    rate = args.rate if args.rate is not None else LOAD * report.chosen.tokens_per_second / args.output_len
    spec = WorkloadSpec(
        num_requests=args.requests, arrivals=args.arrivals, rate=rate, burst_size=args.burst_size,
        lengths=args.lengths, input_len=args.input_len, output_len=args.output_len,
        max_len=report.serving.max_model_len, num_prefixes=args.prefixes, prefix_len=args.prefix_len, seed=args.seed,
    )  # fmt: skip
    shared = f", {args.prefixes} shared prefixes of {args.prefix_len}" if args.prefixes else ""
    when = "at once" if args.arrivals == "at-once" else f"{args.arrivals}, {rate:.2f} a second"
    about = f"{args.requests:,} requests, {when}, {args.input_len} in, {args.output_len} out ({args.lengths}){shared}"
    expected = spec.expected_seconds or args.requests * args.output_len / report.chosen.tokens_per_second
    return generate(spec), expected, about
