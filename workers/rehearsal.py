"""The first start on a machine: a rank goes through its launches once, so that their kernels compile side by side.

Later starts find a mark beside the compiled kernels and leave it out. Of one rank alone: over several, sums and
hand-overs would be waited for that nobody launched.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import torch
import triton

from argosy.kernels import compile_ahead, tuning
from argosy.placement.switches import read_switch
from argosy.workers.memory import LARGEST_STEP, explain_out_of_memory
from argosy.workers.model_runner import ModelRunner
from argosy.workers.step_recording import rehearse_graphs
from argosy.workers.warm_up import largest_shapes, warm_up_shapes


def is_due(runner: ModelRunner) -> bool:
    """Whether kernels are to be compiled, and there are cores to do it side by side."""
    rank = runner.rank
    is_alone = rank.tp_size == rank.pp_size == 1 and read_switch("ARGOSY_REHEARSAL") is not False
    return runner.device.type == "cuda" and is_alone and _num_threads() > 1 and not _mark_of(runner).exists()


def rehearse(runner: ModelRunner) -> None:
    """Compile what measuring, warming up and recording will launch. With weights, before there is a cache."""
    with explain_out_of_memory(*LARGEST_STEP), compile_ahead.compiling_ahead(_num_threads()):
        runner.allocate(1)
        runner.warm_up([*largest_shapes(runner), *warm_up_shapes(runner)])
        rehearse_graphs(runner)
    runner.kv_cache = None
    with suppress(OSError):  # a folder that is only read: the next start looks again, and finds all compiled
        _mark_of(runner).touch()


def _num_threads() -> int:
    return min(compile_ahead.MOST_THREADS, len(os.sched_getaffinity(0)))


def _mark_of(runner: ModelRunner) -> Path:
    """A file of this name says that all was compiled: for this model, these limits, this card, these kernels."""
    config, folder = runner.config, Path(tuning.__file__).parent
    about = [triton.__version__, torch.__version__, torch.cuda.get_device_name(runner.device), runner.spec]
    about += [runner.dtype, runner.cache_dtype, runner.cache_scales, config.scheduler, config.cache.block_size]
    about += [runner.max_model_len, config.parallel.enforce_eager, config.parallel.max_cuda_graph_batch, config.offload]
    for file in sorted([*folder.glob("*.py"), *folder.glob("tuned/*.json")]):
        about += [file.name, file.stat().st_size, file.stat().st_mtime_ns]
    digest = hashlib.sha256(repr(about).encode()).hexdigest()[:16]
    return compile_ahead.cache_folder() / f"argosy-{digest}.compiled"
