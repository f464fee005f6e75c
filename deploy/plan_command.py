"""`argosy plan`: which layout a model would get on a cluster, and why; without GPU, Ray or torch."""

import argparse
import json
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import ConfigError, WeightError
from argosy.cluster.protocol.quant_spec import ONLINE
from argosy.deploy import device_defaults
from argosy.deploy.plan_svg import plan_svg
from argosy.deploy.plan_text import describe_model, plan_json, plan_lines
from argosy.deploy.setting_values import whole_number
from argosy.deploy.settings import clean_setting, is_hub_name
from argosy.placement.calibration import Calibration, read_calibration
from argosy.placement.data_sheets import DATA_SHEETS
from argosy.placement.layout import Layout, Traffic
from argosy.placement.model_shape import ModelShape
from argosy.placement.model_sources import known_models, read_model_shape
from argosy.placement.odd_settings import odd_settings
from argosy.placement.plan_report import PlanOptions
from argosy.placement.planner import fits, plan_cluster
from argosy.placement.rank_memory import Serving
from argosy.placement.topology import ClusterTopology
from argosy.placement.topology_sources import parse_topology, read_topology
from argosy.placement.weight_format import FORMATS, format_by_name
from argosy.workers.loading.resolve import fetch

EXAMPLES: Final = f"""\
examples:
  argosy plan llama-3.1-405b                          how many GPUs of each kind it needs
  argosy plan llama-3.1-70b --gpus "4 x H200"         one node, here and now
  argosy plan deepseek-r1 --gpus "8 x H100" --nodes 2 --network 400Gbit
  argosy plan ./my-model --cluster cluster.yaml --price 2.5 --svg plan.svg
  argosy plan ./my-model --ray-address auto           what 'argosy serve' would choose on the cluster here

A cluster file (examples/clusters/*.yaml, docs/planning.md):
  network: 400Gbit
  nodes:
    - {{name: big, count: 2, gpus: 8 x H200}}
    - {{name: old, gpus: [{{model: A100-40GB, count: 4, free_gib: 30}}], gpu_link: pcie}}

GPU models: {", ".join(DATA_SHEETS)}.
Models known without a network ({len(known_models())}; a hub name, a folder or a config.json does as well):
{textwrap.fill(", ".join(known_models()), 110)}
"""
SERVING_FLAGS: Final = (
    "dtype", "kv_cache_dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size",
    "gpu_memory_utilization", "kv_cache_memory_bytes", "enable_expert_parallel", "all2all_backend",
    "cpu_offload_gb", "swap_space", "activation_offload_gb", "activation_slice_tokens",
)  # fmt: skip
NODE_SIZES: Final = (1, 2, 4, 8)  # GPUs of a node that can be bought, for the table of needs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `argosy plan`."""
    parser.add_argument("model", help="a known model's name, a hub name, a folder, or a config.json")
    add_cluster_arguments(parser)
    parser.add_argument("--objective", choices=("throughput", "latency"), default="throughput",
                        help="tokens a second, or a lone request's time (default: %(default)s)")  # fmt: skip
    parser.add_argument("--input-len", type=int, default=512, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--output-len", type=int, default=256, help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, help="most requests at once on a replica (default: what fits)")
    parser.add_argument("--max-ttft-ms", type=float, help="refuse layouts whose lone first token takes longer")
    parser.add_argument("--max-tpot-ms", type=float, help="refuse layouts whose tokens come slower under load")
    parser.add_argument("--price", type=float, metavar="X", help="of a GPU and hour, in any currency")
    parser.add_argument("--svg", metavar="FILE", help="draw nodes, stages and ranks")
    parser.add_argument("--all", action="store_true", help="say of every other layout why it lost")
    parser.add_argument("--json", action="store_true", help="the answer for programs")


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say on what, and with which settings."""
    parser.add_argument("--cluster", metavar="FILE", help="YAML of the cluster (it need not exist)")
    parser.add_argument("--ray-address", metavar="ADDRESS",
                        help="host:port or auto: the Ray cluster that runs there, and what is free of it")  # fmt: skip
    parser.add_argument(
        "--gpus", metavar="'N x MODEL'", help="instead of a file: the GPUs of a node, several kinds with commas between"
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="with --gpus: so many such nodes")
    parser.add_argument("--network", default="100Gbit", metavar="SPEED", help="between them (default: %(default)s)")
    parser.add_argument("-tp", "--tensor-parallel-size", type=int, help="default: the planner chooses")
    parser.add_argument("-pp", "--pipeline-parallel-size", type=int, help="default: the planner chooses")
    parser.add_argument("--stage-memory-gb", metavar="[A,B]",
                        help="GiB that each rank of a stage may use, such as [0,40]; 0: what there is")  # fmt: skip
    parser.add_argument("--replicas", "-dp", "--data-parallel-size", type=int, help="default: as many as fit")
    parser.add_argument("-q", "--quantization", choices=tuple(FORMATS), help="default: as the checkpoint is stored")
    parser.add_argument("--cpu-offload-gb", "--offload-gb", metavar="GIB",
                        help="GiB of each GPU's weights in the host's memory; auto: what is needed to fit")  # fmt: skip
    parser.add_argument("--swap-space", metavar="GIB",
                        help="host memory of each GPU for KV blocks that make room: 16, 16GiB or auto")  # fmt: skip
    parser.add_argument("--activation-offload-gb", metavar="GIB",
                        help="GiB of the host's memory for hidden states of long steps, or auto")  # fmt: skip
    parser.add_argument("--activation-slice-tokens", type=int, help="tokens of such a step at once (default: 4096)")
    parser.add_argument("--dtype", help="default: the checkpoint's")
    parser.add_argument("--kv-cache-dtype", help="auto, bfloat16, float16, float32, fp8, fp8_scaled or int8")
    parser.add_argument("--max-model-len", type=whole_number, help="default: the model's")
    parser.add_argument("--max-num-seqs", type=int, help="most requests at once on a replica (default: by the GPU)")
    parser.add_argument("--max-num-batched-tokens", type=int, help="token budget of a step (default: by the GPU)")
    parser.add_argument("--block-size", type=int, help="tokens of a KV block (default: 16)")
    parser.add_argument("--gpu-memory-utilization", type=float, help="share of the memory to use (default: 0.92)")
    parser.add_argument(
        "--kv-cache-memory-bytes", type=whole_number, help="bytes for KV on each GPU instead of what is left"
    )
    parser.add_argument("--enable-expert-parallel", action="store_true", default=None,
                        help="whole experts on each rank of a group, not a part of each")  # fmt: skip
    parser.add_argument("--all2all-backend", help="how tokens reach whole experts: auto, sum or all_to_all")
    parser.add_argument("--calibration", metavar="FILE", help="measured efficiencies (default: those that ship)")


def main(args: argparse.Namespace) -> int:
    """Plan and print; 0 when there is a plan."""
    shape = shape_from(args)
    if not names_cluster(args):
        return _print_needs(shape, serving_from(args, shape), as_json=args.json)
    topology = topology_from(args)
    report = plan_cluster(shape, topology, options_from(args), serving_from(args, shape, topology))
    config = config_of(config_from(args, shape, topology), report.chosen.replicas[0])
    odd = odd_settings(config, shape, report.serving)
    report = msgspec.structs.replace(report, notes=(*report.notes, *odd))
    if args.svg:
        write_drawing(args.svg, plan_svg(report))
    if args.json:
        print(json.dumps(plan_json(report), indent=1))
    else:
        print("\n".join(plan_lines(report, all_losers=args.all, given=serve_flags(args))))
    return 0


def shape_from(args: argparse.Namespace) -> ModelShape:
    """The model that is meant: a folder, a name that ships, or one on the hub, of which the config is fetched."""
    options: dict[str, Any] = {"expert_parallel": bool(args.enable_expert_parallel)}
    options["all2all"] = args.all2all_backend or "auto"
    if not args.model.strip():  # as a path it is the folder one stands in
        raise ConfigError("model='': name a folder, a config.json, or a model")
    shape = _read_shape(args.model, options)
    most = shape.spec.max_position
    if args.max_model_len is not None and args.max_model_len > most:  # `argosy serve` would refuse it
        raise ConfigError(
            f"max_model_len={args.max_model_len} exceeds the {most} positions of {shape.name}; use {most} or less"
        )
    return shape


def _read_shape(model: str, options: Mapping[str, Any]) -> ModelShape:
    try:
        return read_model_shape(model, **options)
    except WeightError as error:
        if not is_hub_name(model) or Path(model).exists():
            raise
        try:
            folder = fetch(model, files=("config.json",))
        except ImportError:  # the hub's library is no part of what plans need
            raise error from None
    return msgspec.structs.replace(read_model_shape(folder, **options), name=model)


def names_cluster(args: argparse.Namespace) -> bool:
    """Whether the flags say on what."""
    return any(value is not None for value in (args.cluster, args.gpus, args.ray_address))


def topology_from(args: argparse.Namespace) -> ClusterTopology:
    """The cluster that the flags name."""
    if [args.cluster, args.gpus, args.ray_address].count(None) < 2:
        raise ConfigError("give one of --cluster, --gpus and --ray-address")
    if args.ray_address is not None:
        from argosy.deploy.live_cluster import read_live_topology  # Ray: only where a running cluster is asked for

        return read_live_topology(args.ray_address)
    if args.cluster is not None:
        return read_topology(args.cluster)
    return parse_topology(
        {"network": args.network, "nodes": [{"name": "node", "gpus": args.gpus, "count": args.nodes}]}
    )


def config_from(args: argparse.Namespace, shape: ModelShape, topology: ClusterTopology | None = None) -> ServingConfig:
    """The settings that the flags name, the others at their defaults: a step's size is what suits the cards."""
    given: dict[str, Any] = {name: getattr(args, name) for name in SERVING_FLAGS if getattr(args, name) is not None}
    for name in ("cpu_offload_gb", "activation_offload_gb", "swap_space", "kv_cache_dtype"):
        if name in given:
            given[name] = clean_setting(name, given[name])
    models = [gpu.model for node in topology.nodes for gpu in node.gpus] if topology is not None else []
    if caps := stage_memory_from(args):
        given |= {"stage_memory_gb": caps, "pipeline_parallel_size": args.pipeline_parallel_size or len(caps)}
    filled = device_defaults.fill({**given, "model": shape.name or "model"}, card=models[0] if models else "")
    return ServingConfig.from_mapping(filled)


def config_of(config: ServingConfig, layout: Layout) -> ServingConfig:
    """The settings with the sizes of a layout."""
    parallel = config.parallel.replace(
        tensor_parallel_size=layout.tp_size, pipeline_parallel_size=layout.pp_size, pipeline_layers=layout.layer_counts
    )
    changed: ServingConfig = config.replace(parallel=parallel)
    return changed


def serving_from(args: argparse.Namespace, shape: ModelShape, topology: ClusterTopology | None = None) -> Serving:
    """The settings that decide bytes, from the flags."""
    weight_format = format_by_name(args.quantization) if args.quantization else None
    return Serving.from_config(config_from(args, shape, topology), shape, weight_format)


def stage_memory_from(args: argparse.Namespace) -> tuple[float, ...]:
    """What the flags allow the ranks of each stage; empty: no bounds. Raises `ConfigError`."""
    text = args.stage_memory_gb
    value = clean_setting("stage_memory_gb", text) if text is not None else ()
    if not isinstance(value, tuple) or not all(type(cap) in (int, float) for cap in value):
        raise ConfigError(f"--stage-memory-gb {text}: must be a JSON list of GiB, one for each stage, such as [0,40]")
    return value


def num_stages_from(args: argparse.Namespace) -> int | None:
    """How many stages the flags ask for; None: the planner chooses."""
    asked: int | None = args.pipeline_parallel_size
    return asked if asked is not None else len(stage_memory_from(args)) or None


def serve_flags(args: argparse.Namespace) -> str:
    """What was given here and `argosy serve` takes, too: the settings that a plan counts with."""
    names = [name for name in SERVING_FLAGS if name not in ("enable_expert_parallel", "all2all_backend")]
    if args.quantization in ONLINE:
        names.append("quantization")
    names += ["stage_memory_gb"]
    words = [f"--{name.replace('_', '-')} {getattr(args, name)}" for name in names if getattr(args, name) is not None]
    return " ".join(words)


def calibration_from(args: argparse.Namespace) -> Calibration | None:
    """The calibration file that the flags name."""
    return read_calibration(args.calibration) if args.calibration else None


def check_numbers(args: argparse.Namespace, *names: str, least: int | None = None) -> None:
    """Refuse what is given and too small, or no number; None for `least`: anything above 0."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and (value > 0 if least is None else value >= least)):
            bound = "a number above 0" if least is None else f"a number from {least}"
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be {bound}")


def options_from(args: argparse.Namespace) -> PlanOptions:
    """What is asked of the plan, from the flags."""
    check_numbers(args, "input_len", "output_len", "concurrency", least=1)
    check_numbers(args, "price", least=0)
    check_numbers(args, "max_ttft_ms", "max_tpot_ms")
    return PlanOptions(
        tp_size=args.tensor_parallel_size,
        pp_size=num_stages_from(args),
        num_replicas=args.replicas,
        objective=args.objective,
        traffic=Traffic(input_len=args.input_len, output_len=args.output_len, concurrency=args.concurrency),
        max_ttft_seconds=None if args.max_ttft_ms is None else args.max_ttft_ms / 1e3,
        max_tpot_seconds=None if args.max_tpot_ms is None else args.max_tpot_ms / 1e3,
        price_per_gpu_hour=args.price,
        calibration=calibration_from(args),
    )


def smallest_cluster(shape: ModelShape, serving: Serving, gpu: str, *, max_nodes: int) -> tuple[int, int] | None:
    """The fewest GPUs of a kind that hold the model, as (nodes, GPUs in each); None: more than `max_nodes` of them.

    1, 2, 4 or 8 of one node, then nodes of 8.
    """
    sizes = [(1, gpus) for gpus in NODE_SIZES] + [(nodes, NODE_SIZES[-1]) for nodes in range(2, max_nodes + 1)]
    for num_nodes, num_gpus in sizes:
        content = {"network": "400Gbit", "nodes": [{"name": "node", "count": num_nodes, "gpus": f"{num_gpus} x {gpu}"}]}
        if fits(shape, parse_topology(content), PlanOptions(num_replicas=1), serving):
            return num_nodes, num_gpus
    return None


def _print_needs(shape: ModelShape, serving: Serving, *, as_json: bool) -> int:
    """Without a cluster: what the model would need of each kind of GPU."""
    names = dict.fromkeys((serving.weight_format.name, "fp8", "awq"))
    rows = []
    for name in names:
        weight_format = serving.weight_format if name == serving.weight_format.name else format_by_name(name)
        stored = msgspec.structs.replace(serving, weight_format=weight_format)
        needs: dict[str, str] = {}
        for gpu in DATA_SHEETS:
            if gpu == "CPU":
                continue
            nodes, each = smallest_cluster(shape, stored, gpu, max_nodes=16) or (0, 0)
            needs[gpu] = "-" if not nodes else f"{nodes} x {each}" if nodes > 1 else str(each)
        rows.append((name if name != "none" else shape.spec.dtype, stored, needs))
    if as_json:
        print(json.dumps([{"format": name, "needs": needs} for name, _, needs in rows], indent=1))
        return 0
    print(describe_model(shape, serving))
    print("\nfewest GPUs that hold it (nodes x GPUs; '-': more than 16 nodes of 8), stored as")
    gpus = list(rows[0][2])
    print("  " + " " * 12 + "".join(f"{gpu:>11}" for gpu in gpus))
    for name, _, needs in rows:
        print(f"  {name:12}" + "".join(f"{needs[gpu]:>11}" for gpu in gpus))
    print("\nnext: argosy plan " + shape.name + ' --gpus "8 x H200"')
    return 0


def write_drawing(path: str, text: str) -> None:
    """What --svg asks for. Raises `ConfigError`."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"--svg {path} can't be written: {reason}; name a file in a folder of yours") from error
