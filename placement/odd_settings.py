"""Settings that are allowed and do not do here what their names promise: a line each, at start and in plans."""

from collections.abc import Iterator, Sequence

from argosy.cluster.protocol.config import OffloadConfig, ServingConfig
from argosy.cluster.protocol.ledger import gib
from argosy.placement.model_shape import ModelShape
from argosy.placement.plan import make_plan
from argosy.placement.rank_memory import Serving, StageBytes


def odd_settings(config: ServingConfig, shape: ModelShape, serving: Serving) -> Iterator[str]:
    """What each such setting comes to. Sizes of groups and stages must be settled: a planner may still choose them."""
    parallel = config.parallel
    yield from _strangers(config, shape)
    yield from _experts(config, shape)
    yield from _slices(config)
    if not isinstance(config.offload.cpu_offload_gb, str) and config.offload.cpu_offload_gb:
        plan = make_plan(
            shape.num_layers, parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.pipeline_layers
        )
        yield from _more_than_there_is(config, StageBytes(shape, serving), plan.layer_counts)


def _strangers(config: ServingConfig, shape: ModelShape) -> Iterator[str]:
    if not shape.spec.source:
        return
    line = (
        f"{shape.spec.architecture} runs through transformers' own modules: its steps are not recorded, so times that "
        "are foretold for it are those of layers of ours, which it does not reach"
    )
    if config.parallel.tensor_parallel_size > 1:
        line += "; its group gathers what every linear layer makes, and keeps embeddings and experts whole on each rank"
    yield line


def _experts(config: ServingConfig, shape: ModelShape) -> Iterator[str]:
    parallel = config.parallel
    if not parallel.enable_expert_parallel:
        if parallel.all2all_backend != "auto":
            yield (
                f"all2all_backend={parallel.all2all_backend} changes nothing: without enable_expert_parallel no token "
                "travels to an expert"
            )
    elif shape.spec.moe is None:
        yield f"enable_expert_parallel changes nothing: {shape.spec.architecture} has no experts"
    elif parallel.tensor_parallel_size == 1:
        yield "enable_expert_parallel changes nothing: experts are dealt to tensor-parallel groups of 2 and more"


def _slices(config: ServingConfig) -> Iterator[str]:
    offload, longest = config.offload, config.scheduler.max_num_batched_tokens
    size = offload.activation_slice_tokens
    if offload.activation_offload_gb == 0:
        if size != OffloadConfig().activation_slice_tokens:
            yield (
                f"activation_slice_tokens={size} changes nothing: steps are cut where hidden states may go to the "
                "host; set activation_offload_gb (a number of GiB, or auto)"
            )
    elif longest <= size:
        yield (
            f"activation_offload_gb={offload.activation_offload_gb} changes nothing: a step has up to {longest} "
            f"tokens, and only longer ones than activation_slice_tokens={size} are cut; raise max_num_batched_tokens"
        )


def _more_than_there_is(config: ServingConfig, sizes: StageBytes, layer_counts: Sequence[int]) -> Iterator[str]:
    """`cpu_offload_gb` beyond the layers of the stage that has the most."""
    first = largest = 0
    for count in layer_counts:
        largest = max(largest, sizes.layer_bytes(config.parallel.tensor_parallel_size, first, first + count))
        first += count
    asked = float(config.offload.cpu_offload_gb) * 2**30
    if asked > largest:
        yield (
            f"cpu_offload_gb={config.offload.cpu_offload_gb:g} is more than there is: a rank's layers have "
            f"{gib(largest)}; all of them go to the host's memory and pass the link in every step, embeddings stay"
        )
