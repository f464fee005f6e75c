"""Ranks as Ray actors: created in their bundles, watched, killed. Steps do not come this way (see `channel_executor`).

Ray notices a dead process in 10 to 20 ms and a hung one never; the latter is the step deadline's business. A group is
killed as a whole, because a peer of a dead rank hangs in its collectives.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from argosy.cluster.protocol.errors import ServingError, StartupTimeout, WorkerFailed, WorkerLost

_ACTOR_SECONDS: Final = 60.0  # for a process to come up in a bundle that is reserved
_DEATH_SECONDS: Final = 10.0


class RankActor:
    """A rank's actor and where it turned out to be."""

    def __init__(self, global_rank: int, handle: Any):
        self.global_rank, self.handle = global_rank, handle
        self.node_id, self.host, self.pid = "", "", 0


@contextlib.contextmanager
def map_ray_errors(actor: RankActor, epoch: int) -> Iterator[None]:
    """Ray's errors about one rank's actor, renamed to ours."""
    try:
        yield
    except ray.exceptions.GetTimeoutError as error:
        raise StartupTimeout(f"the process of rank {actor.global_rank}", _ACTOR_SECONDS) from error
    except ray.exceptions.RayActorError as error:
        raise WorkerLost(actor.global_rank, actor.host or "its node", epoch) from error
    except ray.exceptions.RayError as error:
        raise WorkerFailed(actor.global_rank, "ray_error", _first_line(error)) from error


def create_rank_actors(
    actor_class: type, bundles: Sequence[int], group: PlacementGroup, resources: Mapping[str, float], *, epoch: int
) -> list[RankActor]:
    """One actor for each entry of `bundles` (that which it belongs to), all up and located, or none."""
    remote: Any = ray.remote  # its annotations don't know of concurrency groups
    remote_class = remote(concurrency_groups={"control": 2})(actor_class)
    actors = []
    for global_rank, bundle in enumerate(bundles):
        handle = remote_class.options(
            num_cpus=resources.get("CPU", 0.0),
            num_gpus=resources.get("GPU", 0.0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=group,
                placement_group_bundle_index=bundle,
            ),
        ).remote()
        actors.append(RankActor(global_rank, handle))
    try:
        answers = [actor.handle.where.remote() for actor in actors]
        for actor, answer in zip(actors, answers, strict=True):
            with map_ray_errors(actor, epoch):
                actor.node_id, actor.host, actor.pid = ray.get(answer, timeout=_ACTOR_SECONDS)
    except ServingError:
        kill_actors(actors)
        raise
    return actors


def find_rendezvous(actor: RankActor, host: str, epoch: int) -> str:
    """ "host:port" with a port that is free on the node of `actor`."""
    with map_ray_errors(actor, epoch):
        port = ray.get(actor.handle.free_port.remote(host), timeout=_ACTOR_SECONDS)
    return f"{host}:{port}"


def kill_actors(actors: Sequence[RankActor]) -> None:
    """End all of them now."""
    for actor in actors:
        ray.kill(actor.handle, no_restart=True)


class RayRanks:
    """The running actors of one epoch; satisfies `RankHandles`."""

    def __init__(
        self,
        actors: Sequence[RankActor],
        boots: Sequence[bytes],
        *,
        module: str,
        rendezvous: str,
        on_dead: Callable[[int, str], None],
        release: Callable[[], None],
    ):
        self.rendezvous = rendezvous
        self._actors, self._release, self._on_dead = list(actors), release, on_dead
        self._killed = threading.Event()
        self._runs = [actor.handle.run.remote(module, boot) for actor, boot in zip(actors, boots, strict=True)]
        self._watcher = threading.Thread(target=self._watch, name="watch-ranks", daemon=True)
        self._watcher.start()

    def kill(self) -> None:
        """End all of them now, wait until they are gone, give back their bundles. May be called twice."""
        if self._killed.is_set():
            return
        self._killed.set()
        kill_actors(self._actors)
        ray.wait(self._runs, num_returns=len(self._runs), timeout=_DEATH_SECONDS)
        self._watcher.join(timeout=_DEATH_SECONDS)
        self._release()

    def _watch(self) -> None:
        """Until one has ended. Polls, since a wait without end can crash when Ray is torn down under it."""
        while not self._killed.is_set():
            done, _ = ray.wait(self._runs, num_returns=1, timeout=1.0)
            if done and not self._killed.is_set():
                global_rank = self._runs.index(done[0])
                self._on_dead(global_rank, _why(done[0]))
                return


def _why(run: Any) -> str:
    try:
        return f"it ended with status {ray.get(run, timeout=1.0)}"
    except ray.exceptions.RayError as error:
        return _first_line(error)


def _first_line(error: Exception) -> str:
    """Ray's messages are pages with tracebacks; the cause is its own line at the end, the class at the start."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:500]}" if lines else type(error).__name__
