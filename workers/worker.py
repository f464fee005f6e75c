"""The life of a rank: connect, join the groups, load, report, allocate, step, stop.

The driver's connection is the rank's life line: when it ends, so does the rank, even from within a collective, so that
its device is free for whoever comes next. A Python error in a step is told to the driver and ends the rank; the driver
rebuilds the group.
"""

import contextlib
import os
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch

from argosy.cluster.protocol.channel import Channel
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import ChannelClosed, ConfigError, ServingError, WorkerFailed
from argosy.cluster.protocol.ledger import describe_ledger
from argosy.cluster.protocol.messages import (
    AllocateCache,
    Hello,
    Ping,
    Pong,
    SchedulerOutput,
    StartWorker,
    StopWorker,
    ToRank,
    WorkerError,
    WorkerProgress,
    WorkerReady,
    WorkerReport,
)
from argosy.cluster.protocol.model_spec import KV_SCALE_BYTES, ModelSpec, read_model_spec
from argosy.kernels import fp8_ops
from argosy.placement.plan import RankInfo
from argosy.placement.process_groups import ParallelContext, destroy_parallel, init_parallel
from argosy.workers.answer_thread import EXIT_FAILED, GRACE_SECONDS, AnswerThread
from argosy.workers.device import (
    TORCH_DTYPES,
    DeviceMemory,
    choose_device,
    choose_dtype,
    describe_device,
    set_up_device,
)
from argosy.workers.host_pool import choose_num_host_blocks, make_host_pool
from argosy.workers.loading.resolve import resolve_model
from argosy.workers.memory import (
    MemoryLedger,
    check_weights_fit,
    choose_num_offloaded,
    explain_out_of_memory,
    measure_num_blocks,
    num_ranks_here,
)
from argosy.workers.memory_advice import check_cache_fits, less_cache
from argosy.workers.model_runner import ModelRunner
from argosy.workers.start_clock import StartClock
from argosy.workers.warm_up import prompt_shape, warm_up_shapes

IDLE_SECONDS = 5.0  # without a word from the driver, longer than a step: what is taken before is waited for
EXIT_DRIVER_GONE = 3


class WorkerBoot(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank is told by whoever starts it; everything else comes over the channel."""

    rank: RankInfo
    config: ServingConfig
    driver_address: str
    secret: str
    node: str = ""


def run_worker(boot: WorkerBoot) -> int:
    """Be that rank until the driver says stop or goes away. Returns the exit status: 0 after `StopWorker`."""
    try:
        channel = Channel.connect(boot.driver_address, ToRank)
        channel.send(Hello(role="rank", secret=boot.secret, global_rank=boot.rank.global_rank, pid=os.getpid()))
    except ServingError as error:
        print(f"rank {boot.rank.global_rank}: {error}", file=sys.stderr, flush=True)
        return EXIT_DRIVER_GONE
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(channel.fileno(), done), name="driver-watch", daemon=True)
    watcher.start()
    worker = Worker(boot, channel)
    try:
        return worker.serve()
    finally:
        done.set()
        worker.close()
        channel.close()


def _watch(descriptor: int, done: threading.Event) -> None:
    """Ends this process when the driver's connection does, whatever the main thread is waiting for."""
    poller = select.poll()
    poller.register(descriptor, select.POLLRDHUP)  # errors and hang-ups are always reported
    while not done.is_set():
        if poller.poll(1000):
            if not done.wait(GRACE_SECONDS):
                sys.stderr.flush()
                os._exit(EXIT_DRIVER_GONE)
            return


class Worker:
    """One rank, as the driver's messages move it."""

    def __init__(self, boot: WorkerBoot, channel: Channel):
        self.boot, self.config, self.rank, self.channel = boot, boot.config, boot.rank, channel
        self.epoch = -1
        self.runner: ModelRunner | None = None
        self.parallel: ParallelContext | None = None
        self.ledger = MemoryLedger()
        self._clock = StartClock()
        self._clock.mark("Python and imports")
        self._answers: AnswerThread | None = None

    def serve(self) -> int:
        """Obey until told to stop (0), until the driver goes away, or until something fails."""
        try:
            while True:
                message = self._next_message()
                if type(message) is SchedulerOutput:
                    self._step(message)
                elif isinstance(message, StopWorker):
                    return 0
                else:
                    self._handle(message)
        except ChannelClosed:
            return EXIT_DRIVER_GONE
        except Exception as error:  # the top of the loop: recorded, told, and the end of this rank
            traceback.print_exc()
            self._tell_failure(error)
            return EXIT_FAILED

    def _next_message(self) -> Any:
        """The driver's next word. Tokens that no step is in need of are taken once there is nothing else to do: on a
        GPU whoever sent them by NCCL holds a part of the device until then."""
        runner = self.runner
        if runner is None or runner.device.type == "cpu" or not runner.has_tokens_to_take:
            return self.channel.recv()
        try:
            return self.channel.recv(IDLE_SECONDS)
        except TimeoutError:
            runner.take_tokens()
            return self.channel.recv()

    def _handle(self, message: Any) -> None:
        if isinstance(message, Ping):
            step_id = self.runner.last_step_id if self.runner is not None else -1
            self.channel.send(Pong(global_rank=self.rank.global_rank, nonce=message.nonce, step_id=step_id))
        elif isinstance(message, StartWorker):
            self._start(message)
        elif isinstance(message, AllocateCache):
            self._allocate(message)

    def _step(self, output: SchedulerOutput) -> None:
        if output.epoch != self.epoch:
            return  # a late word from an epoch that is over
        assert self.runner is not None
        outcome = self.runner.execute(output)
        if outcome is None:
            return
        if self._answers is not None:
            self._answers.put(outcome)
        else:
            self.channel.send(outcome.result())

    # ----------------------------------------------------------------------------------------------------- starting

    def _start(self, message: StartWorker) -> None:
        self.epoch = message.epoch
        self._clock.skip()
        device = choose_device(self.config.parallel.device, self.rank)
        set_up_device(device, _num_threads(self.config, self.rank))
        if device.type == "cuda":
            self.ledger.meter = DeviceMemory(device)
            self.ledger.mark("context", outside="context")
        self._progress("joining the process groups", 0.0)
        folder, spec = self._read_model()
        self._clock.mark("device")
        self.parallel = init_parallel(self.rank, message.rendezvous, device, message.deadline_seconds)
        self._clock.mark("process groups")
        self.ledger.mark("groups", outside="groups")
        dtype = choose_dtype(self.config.model.dtype, spec.dtype)
        self._progress("loading weights", 0.0)
        self.runner = ModelRunner(
            self.config, spec, self.parallel, device=device, dtype=dtype,
            cache_dtype=_cache_dtype(self.config.cache.kv_cache_dtype, dtype, device),
            cache_scales=self.config.cache.kv_cache_dtype in KV_SCALE_BYTES,
        )  # fmt: skip
        self._clock.mark("buffers")
        self.ledger.mark("buffers")
        weight_bytes = self._load(self.runner, folder)
        num_host_blocks = 0
        if self.config.offload.swap_space:
            is_auto = isinstance(self.config.offload.swap_space, str)  # what is asked for others may have taken already
            num_ranks = num_ranks_here(self.runner, of_all_replicas=is_auto)
            num_host_blocks = choose_num_host_blocks(self.config, self.runner.block_bytes, num_ranks)
        measured = self._measure(self.runner)
        check_cache_fits(self.runner, self.ledger, measured)
        self._clock.mark("measuring memory")
        self.channel.send(
            WorkerReport(
                global_rank=self.rank.global_rank,
                epoch=self.epoch,
                num_blocks=measured,
                block_bytes=self.runner.block_bytes,
                free_bytes=self.ledger.room_bytes,
                weight_bytes=weight_bytes,
                activation_bytes=self.ledger.activation_bytes,
                device=describe_device(device),
                node=self.boot.node,
                ledger=self.ledger.entries(),
                num_host_blocks=num_host_blocks,
                kv_windows=self.runner.kv_groups.windows,
            )
        )

    def _read_model(self) -> tuple[Path, ModelSpec]:
        """Its folder on this node, and its facts as they are served here."""
        model, parallel = self.config.model, self.config.parallel
        folder = resolve_model(
            model.model, hub_name=model.hub_name, revision=model.revision, download_dir=model.download_dir
        )
        spec = read_model_spec(folder, model.hf_overrides, model.quantization).as_served(
            model.max_model_len, expert_parallel=parallel.enable_expert_parallel, all2all=parallel.all2all_backend
        )
        spec.check_layout(self.rank.tp_size, self.rank.pp_size)
        return folder, spec

    def _load(self, runner: ModelRunner, folder: Path) -> int:
        """Fill the weights and write down where they went; bytes of the parameters."""
        num_offloaded = choose_num_offloaded(runner, self.ledger)
        check_weights_fit(runner, self.ledger, num_offloaded)
        with explain_out_of_memory("loading weights", "use --tensor-parallel-size, or free the card for this rank"):
            report = runner.load(folder, self._throttled("loading weights"), num_offloaded=num_offloaded)
        self._clock.mark("weights")
        self._progress("loading weights", 1.0)
        self.ledger.mark("weights", outside="groups" if self.rank.tp_size > 1 else "workspace")
        if self.ledger.meter is None:
            self.ledger.mark_cpu(report.num_bytes)
        elif runner.offload is not None:  # of what was counted as weights, these are there for others to come to
            self.ledger.move("weights", "weight buffers", runner.offload.buffer_bytes)
        if runner.offload is not None:
            self.ledger.host["weights"] = runner.offload.host_bytes
        if runner.long_steps is not None:
            self.ledger.host["hidden states"] = runner.long_steps.host_bytes
            if self.ledger.meter is not None:
                self.ledger.move("buffers", "slice buffers", runner.long_steps.buffer_bytes)
        return report.num_bytes

    def _measure(self, runner: ModelRunner) -> int:
        """How many blocks there is room for. On a card the kernels of all steps are compiled before, side by side,
        where this was not done yet."""
        if self.ledger.meter is not None:
            from argosy.workers import rehearsal  # Triton's: only where a card is

            if rehearsal.is_due(runner):
                self._progress("compiling kernels", 0.0)
                rehearsal.rehearse(runner)
                self.ledger.meter.release()
                self._clock.mark("compiling kernels")
        return measure_num_blocks(runner, self.ledger)

    def _allocate(self, message: AllocateCache) -> None:
        assert self.runner is not None
        self._clock.skip()
        lower = less_cache(self.config)
        with explain_out_of_memory(f"allocating {message.num_blocks} KV blocks", lower):
            self.runner.allocate(message.num_blocks)
        self._clock.mark("KV cache")
        assert self.runner.kv_cache is not None
        self.ledger.mark("kv")
        if self.ledger.meter is None:
            self.ledger.purposes["kv"] = self.runner.kv_cache.num_bytes
        swap_seconds = (0.0, 0.0)
        if message.num_host_blocks:
            self._progress("allocating host memory", 0.0)
            pool = self.runner.host_pool = make_host_pool(self.runner.kv_cache.tensors, message.num_host_blocks)
            swap_seconds = pool.measure()
            self._clock.mark("host pool")
            self.ledger.mark("swap buffers")
            self.ledger.host["kv"] = pool.rows_NB.nbytes
        self._progress("warming up", 0.0)
        self.runner.warm_up(warm_up_shapes(self.runner))
        token_seconds = self._time_prompt() if message.num_host_blocks else 0.0
        self._clock.mark("warm-up")
        self.ledger.mark("workspace")
        with explain_out_of_memory("recording graphs", f"{lower}, or record fewer with --max-num-seqs"):
            self.runner.record_graphs(self._throttled("recording graphs"))
        self._clock.mark("graphs")
        self.ledger.mark("graphs", outside="graphs")
        print(f"rank {self.rank.global_rank} memory: {describe_ledger(self.ledger.entries())}", file=sys.stderr)
        print(f"rank {self.rank.global_rank} start: {self._clock.describe()}", file=sys.stderr, flush=True)
        if self.runner.device.type != "cpu" and self.rank.answers:
            self._answers = AnswerThread(self.channel.send, self._tell_failure)
        self.channel.send(
            WorkerReady(
                global_rank=self.rank.global_rank,
                epoch=self.epoch,
                ledger=self.ledger.entries(),
                phases=dict(self._clock.phases),
                swap_seconds=(*swap_seconds, token_seconds),
            )
        )

    def _time_prompt(self) -> float:
        """Seconds that a token of a long prompt takes: all ranks run it together, and stages overlap."""
        assert self.runner is not None
        shape = prompt_shape(self.runner)
        self.runner.warm_up([shape])
        started = time.perf_counter()
        self.runner.warm_up([shape])
        return (time.perf_counter() - started) / (shape[0] * shape[1] * self.rank.pp_size)

    def _progress(self, phase: str, fraction: float) -> None:
        self.channel.send(WorkerProgress(global_rank=self.rank.global_rank, phase=phase, fraction=fraction))

    def _throttled(self, phase: str) -> Callable[[float], None]:
        """Progress reports, at most one a percent."""
        last = 0.0

        def report(fraction: float) -> None:
            nonlocal last
            if fraction - last >= 0.01:
                last = fraction
                self._progress(phase, fraction)

        return report

    # ------------------------------------------------------------------------------------------------------ the end

    def _tell_failure(self, error: BaseException) -> None:
        """The driver's last word from this rank: a code and one line."""
        if isinstance(error, WorkerFailed):
            code, text = error.error_code, error.message
        elif isinstance(error, ServingError):
            code, text = error.code, str(error)
        elif isinstance(error, torch.OutOfMemoryError):
            code, text = "out_of_memory", f"out of device memory; {less_cache(self.config)} ({_first_line(error)})"
        elif "DefaultCPUAllocator" in str(error):  # torch has no type for the host's memory
            fix = "lower --max-num-batched-tokens, --max-num-seqs or --max-model-len"
            code, text = "out_of_memory", f"out of the host's memory; {fix} ({_first_line(error)})"
        else:
            code, text = "worker_failed", f"{type(error).__name__}: {_first_line(error)}"
        with contextlib.suppress(ServingError, OSError):  # nobody listens any more
            self.channel.send(
                WorkerError(
                    global_rank=self.rank.global_rank, epoch=self.epoch, code=code, message=" ".join(text.split())
                )
            )

    def close(self) -> None:
        """Leave the groups and give the device back."""
        if self._answers is not None:
            self._answers.close()
        self.runner = None
        if self.parallel is not None:
            destroy_parallel(self.parallel)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:500] if lines else "no message"


def _cache_dtype(wanted: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    if wanted == "auto":
        return dtype
    if wanted == "int8":
        return torch.int8
    if not wanted.startswith("fp8"):
        return TORCH_DTYPES[wanted]
    if device.type == "cuda" and not fp8_ops.has_e4m3(device):
        raise ConfigError(
            f"kv_cache_dtype={wanted!r}: {describe_device(device)} does not know e4m3 (compute capability 8.9 and up "
            "do); use int8 or auto"
        )
    return torch.float8_e4m3fn


def _num_threads(config: ServingConfig, rank: RankInfo) -> int:
    """This CPU rank's share of the cores, unless the settings or the environment say otherwise."""
    if config.parallel.cpu_threads is not None:
        return config.parallel.cpu_threads
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    return max(1, len(os.sched_getaffinity(0)) // (rank.tp_size * rank.pp_size))
