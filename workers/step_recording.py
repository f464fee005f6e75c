"""Which steps of a rank are recorded as CUDA graphs, and recording them.

None on a CPU, with `enforce_eager`, or for models whose modules are not ours.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from argosy.kernels import step_ops
from argosy.placement.step_memory import ladder, recorded_kinds
from argosy.workers.attention.base import AttentionMetadata
from argosy.workers.cuda_graphs import CUDAGraphRunner
from argosy.workers.forward_context import ForwardContext
from argosy.workers.prompt_graphs import Kind, PromptGraphs
from argosy.workers.recording import Recorder, Rehearsal

if TYPE_CHECKING:  # it imports this file
    from argosy.workers.model_runner import ModelRunner


def graph_sizes(runner: "ModelRunner") -> list[int]:
    """The batch sizes of decode steps that will be recorded."""
    parallel = runner.config.parallel
    if runner.device.type != "cuda" or parallel.enforce_eager or not getattr(runner.model, "records_graphs", True):
        return []
    return ladder(min(runner.config.scheduler.max_num_seqs, parallel.max_cuda_graph_batch))


def recorded_prompts(runner: "ModelRunner") -> list[Kind]:
    """The steps with prompts that will be recorded. The same on all ranks of a group."""
    decodes, records = graph_sizes(runner), getattr(runner.model, "records_prompts", None)
    if not decodes or records is None:
        return []
    long_steps = runner.long_steps  # which all stages cut in the same way
    return recorded_kinds(
        runner.spec, runner.rank.last_layer - runner.rank.first_layer, decodes[-1], tp_size=runner.rank.tp_size,
        max_tokens=runner.config.scheduler.max_num_batched_tokens, dtype_bytes=runner.dtype.itemsize,
        kv_dtype_bytes=runner.cache_dtype.itemsize, records=records,
        slice_tokens=None if long_steps is None else long_steps.slice_tokens,
    )  # fmt: skip


def record_graphs(runner: "ModelRunner", on_progress: Callable[[float], None] | None) -> CUDAGraphRunner | None:
    """Record them, if any. After the cache was made and the model has warmed up."""
    sizes = graph_sizes(runner)
    if not sizes:
        return None
    graphs = make_graphs(runner, sizes[-1], recorded_prompts(runner))
    graphs.record(Recorder(runner.device, alone=runner.rank.tp_size == 1), on_progress)
    return graphs


def rehearse_graphs(runner: "ModelRunner") -> None:
    """Run what would be recorded, once."""
    if sizes := graph_sizes(runner):
        make_graphs(runner, sizes[-1], recorded_prompts(runner)).record(Rehearsal())


def make_graphs(runner: "ModelRunner", max_rows: int, kinds: list[Kind]) -> CUDAGraphRunner:
    """What records them: decode steps of up to so many rows, and these steps with prompts."""
    model, rank, cache = runner.model, runner.rank, runner.kv_cache
    assert cache is not None

    def forward(
        token_ids_T: Tensor | None,
        hidden_TD: Tensor | None,
        positions_T: Tensor,
        metadata: AttentionMetadata,
        asked_rows_S: Tensor | None = None,
    ) -> Tensor:
        context = ForwardContext(runner.backend, cache, metadata, asked_rows_S)
        hidden: Tensor = model(token_ids_T, hidden_TD, positions_T, context)
        return hidden

    chooses = rank.is_last_stage and runner.chooses_over_group
    compute_logits = getattr(model, "compute_raw_logits", model.compute_logits)
    if chooses:
        compute_logits = model.compute_own_logits
    graphs = CUDAGraphRunner(
        runner.batch,
        forward,
        compute_logits if rank.is_last_stage else None,
        choose=model.choose if chooses else None,
        max_rows=max_rows,
        max_model_len=runner.max_model_len,
        hidden_size=runner.spec.hidden_size,
        dtype=runner.dtype,
        is_first_stage=rank.is_first_stage,
        windows=runner.kv_groups.windows,
        even_pays=lambda num_rows: step_ops.even_pays(num_rows, cache.layers[0][0]),
    )
    if kinds:
        graphs.prompts = PromptGraphs(
            runner.batch,
            graphs.tables,
            forward,
            kinds,
            max_model_len=runner.max_model_len,
            hidden_size=runner.spec.hidden_size,
            dtype=runner.dtype,
            is_first_stage=rank.is_first_stage,
            is_last_stage=rank.is_last_stage,
        )
    return graphs
