"""Puts an engine together: what model, which plan, where; then a driver, which starts its ranks.

This is the one place where all rooms meet. `backend="ray"` is the product: a detached driver actor and worker actors in
a placement group. `backend="local"` runs the same driver and the same ranks as plain processes.
"""

import logging
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Literal

from argosy.cluster.driver_loop import DriverStatus
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import ChannelClosed, ConfigError, StartupTimeout
from argosy.cluster.protocol.messages import EngineInfo
from argosy.cluster.protocol.model_spec import ModelSpec, read_model_spec
from argosy.cluster.start_rules import error_from_code
from argosy.deploy.local_launch import RANK_MODULE, LocalDriver
from argosy.deploy.model_folder import localize
from argosy.deploy.replica_drivers import ReplicaDrivers, RunningDriver
from argosy.deploy.stage_devices import local_devices
from argosy.placement.model_families import shape_from_spec
from argosy.placement.odd_settings import odd_settings
from argosy.placement.plan import PlacementPlan, make_plan
from argosy.placement.rank_memory import Serving
from argosy.placement.uneven import layers_for
from argosy.workers.loading.checkpoint import Checkpoint

if TYPE_CHECKING:
    from argosy.deploy.ray_session import RaySession

_log = logging.getLogger(__name__)
_POLL_SECONDS: Final = 0.1
_GRACE_SECONDS: Final = 60.0  # for Ray and the driver to come up, beyond the ranks' own start deadline
OnProgress = Callable[[str, float], None]


class Engine:
    """A driver with its ranks, ready for edges. `close` leaves nothing behind."""

    def __init__(
        self,
        driver: RunningDriver,
        status: DriverStatus,
        secret: str,
        config: ServingConfig,
        *,
        name: str = "",
        session: "RaySession | None" = None,
        folders: Sequence[str] = (),
    ):
        assert status.info is not None
        self.address, self.secret, self.info = status.address, secret, status.info
        self.ranks = status.ranks  # what each rank said when it was ready: its bytes and the seconds of its start
        self.config = config  # with "auto" and None worked out
        self.name = name
        self._driver, self._session, self._folders = driver, session, folders
        self.has_lost_ray = False  # `close` then abandons our own Ray cluster instead of taking leave of it
        self._closed = False

    def status(self) -> DriverStatus:
        """How the driver is. Raises `ChannelClosed` when it has gone."""
        return self._driver.status()

    @property
    def is_ending(self) -> bool:
        """Whether our own Ray cluster ends by itself: then it can't be asked for anything."""
        return self._session is not None and self._session.is_ending

    def lost_part(self) -> str:
        """Which part of our own Ray cluster has died without which nothing is started again; else nothing."""
        if self._session is None or not self._session.is_own:
            return ""
        from argosy.deploy.ray_session import lost_part  # Ray: only where it runs

        return lost_part()

    def abandon_ray(self) -> None:
        """Our own Ray cluster has lost a part that it can't be without: see `RaySession.abandon`."""
        if self._session is not None and self._session.is_own:
            self._session.abandon()

    def close(self, drain_seconds: float = 0.0) -> None:
        """Let what runs end for at most so long, then stop everything. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self.has_lost_ray:
            self.abandon_ray()
        _tear_down(self._driver, self._session, self._folders, drain_seconds)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def launch_engine(
    config: ServingConfig,
    *,
    backend: Literal["ray", "local"] = "ray",
    on_progress: OnProgress | None = None,
    ray_address: str | None = None,
    rank_module: str = RANK_MODULE,
    on_note: Callable[[str], None] | None = None,
) -> Engine:
    """Start driver and ranks and wait until steps can run. `on_note` hears what was planned and what was odd.

    Raises the error that stopped it (`WeightError`, `PlacementImpossible`, ...) and leaves nothing behind.
    With "ray": the session this process has, else the cluster at `ray_address` or the config's, else one of its own.
    """
    tell = on_progress or (lambda phase, fraction: None)
    tell("reading model", 0.0)
    config, spec, plan = resolve(config)
    secret = secrets.token_hex(32)
    if backend == "local":
        if config.parallel.data_parallel_size > 1:
            raise ConfigError("data_parallel_size: several replicas need Ray; leave out the backend 'mp'")
        if layers := layers_for(config, shape_from_spec(spec), local_devices(config)):
            config = config.replace(parallel=config.parallel.replace(pipeline_layers=layers))
            plan = make_plan(spec.num_layers, plan.tp_size, plan.pp_size, layers)
            _log.info("layers split to suit: %s", plan.describe())
        _tell_odd_settings(config, spec, on_note)
        info = describe_engine(config, spec, plan)
        driver = LocalDriver(config, plan, info, secret=secret, rank_module=rank_module)
        return _wait_until_ready(driver, secret, config, tell)
    tell("starting Ray", 0.0)
    # Only here: importing Ray takes half a second, and the local backend also runs where it is not installed.
    from argosy.deploy.ray_launch import start_ray_drivers

    started = start_ray_drivers(
        config,
        lambda planned, its_plan: describe_engine(planned, spec, its_plan),
        secret=secret,
        address=ray_address or config.parallel.ray_address,
        rank_module=rank_module,
        tell=tell,
        note=on_note or _log.info,
    )
    _tell_odd_settings(started.config, spec, on_note)
    return _wait_until_ready(
        ReplicaDrivers(started.drivers),
        secret,
        started.config,
        tell,
        name=started.drivers[0].name,
        session=started.session,
        folders=started.folders,
    )


def _tell_odd_settings(config: ServingConfig, spec: ModelSpec, on_note: Callable[[str], None] | None) -> None:
    shape = shape_from_spec(spec)
    for line in odd_settings(config, shape, Serving.from_config(config, shape)):
        (on_note or _log.warning)(f"warning: {line}" if on_note else line)


def resolve(config: ServingConfig) -> tuple[ServingConfig, ModelSpec, PlacementPlan]:
    """What follows from the model's folder: length, facts, the plan of the sizes given. Needs neither torch nor Ray.

    Raises `WeightError` for a folder whose weights are missing, cut off or broken, by their headers alone.
    """
    config = localize(config)
    spec = read_model_spec(config.model.model, config.model.hf_overrides, config.model.quantization)
    if config.cache.kv_cache_dtype == "auto" and spec.quantization is not None and spec.quantization.has_kv_scales:
        config = config.replace(cache=config.cache.replace(kv_cache_dtype="fp8_e4m3"))
    parallel = config.parallel
    spec = spec.as_served(None, expert_parallel=parallel.enable_expert_parallel, all2all=parallel.all2all_backend)
    spec.check_layout(parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
    plan = make_plan(
        spec.num_layers, parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.pipeline_layers
    )
    max_model_len = config.model.max_model_len or spec.max_position
    if max_model_len > spec.max_position:
        raise ConfigError(
            f"max_model_len={max_model_len} exceeds the {spec.max_position} positions of {config.model.model}; "
            f"use {spec.max_position} or less"
        )
    if not config.scheduler.enable_chunked_prefill and config.scheduler.max_num_batched_tokens < max_model_len:
        raise ConfigError(
            f"max_num_batched_tokens={config.scheduler.max_num_batched_tokens} is below max_model_len={max_model_len}: "
            "without chunked prefill a full prompt would never run; raise it, or enable_chunked_prefill"
        )
    if config.model.load_format != "dummy":
        Checkpoint.open(config.model.model)
    config = config.replace(model=config.model.replace(max_model_len=max_model_len))
    return config, spec, plan


def describe_engine(config: ServingConfig, spec: ModelSpec, plan: PlacementPlan) -> EngineInfo:
    """What edges must know of an engine before its ranks have measured anything."""
    model, parallel = config.model, config.parallel
    assert model.max_model_len is not None
    return EngineInfo(
        model=(model.served_model_name or (model.model,))[0],
        max_model_len=model.max_model_len,
        vocab_size=spec.vocab_size,
        num_blocks=0,
        block_size=config.cache.block_size,
        tensor_parallel_size=parallel.tensor_parallel_size,
        pipeline_parallel_size=parallel.pipeline_parallel_size,
        dtype=spec.dtype if model.dtype == "auto" else model.dtype,
        max_logprobs=model.max_logprobs,
        max_num_seqs=config.scheduler.max_num_seqs,
        eos_token_ids=spec.eos_token_ids,
        layout=plan.describe(),
    )


def _wait_until_ready(
    driver: RunningDriver,
    secret: str,
    config: ServingConfig,
    tell: OnProgress,
    *,
    name: str = "",
    session: "RaySession | None" = None,
    folders: Sequence[str] = (),
) -> Engine:
    seconds = config.parallel.start_deadline_seconds + _GRACE_SECONDS
    deadline = time.monotonic() + seconds
    try:
        while True:
            status = driver.status()
            if status.error_code:
                raise error_from_code(status.error_code, status.error_message)
            if status.state == "ready" and status.info is not None:
                tell("ready", 1.0)
                return Engine(driver, status, secret, config, name=name, session=session, folders=folders)
            if status.state == "stopped":
                raise ChannelClosed("the driver stopped while it was starting")
            if time.monotonic() >= deadline:
                raise StartupTimeout("the engine", seconds)
            tell(status.phase or status.state, status.fraction)
            time.sleep(_POLL_SECONDS)
    except BaseException:  # Ctrl-C as well: whoever gave up waiting must find nothing running
        _tear_down(driver, session, folders, 0.0)
        raise


def _tear_down(
    driver: RunningDriver, session: "RaySession | None", folders: Sequence[str], drain_seconds: float
) -> None:
    try:
        driver.stop(drain_seconds)
    finally:
        if session is not None:
            session.close()
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
