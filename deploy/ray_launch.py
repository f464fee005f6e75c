"""The engine on Ray: a driver actor that reserves a bundle for each stage and starts its worker actors in them.

`RayRankStarter` is what the driver is handed, so that its room need not know placement or workers; it runs inside the
driver's process and does so again after every loss.
"""

import os
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import ray

from argosy.cluster import ray_executor
from argosy.cluster.driver_actor import DriverBoot, DriverHandle
from argosy.cluster.protocol.channel import RELAY
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import PlacementImpossible
from argosy.cluster.protocol.messages import EngineInfo
from argosy.cluster.rank_processes import RankDoor, RankHandles
from argosy.deploy import preflight
from argosy.deploy.cluster_layout import choose_layout
from argosy.deploy.owned_folder import short_temp_folder
from argosy.deploy.promised_nodes import wait_for_nodes
from argosy.deploy.ray_session import RaySession
from argosy.placement import ray_cluster
from argosy.placement.plan import PlacementPlan, RankInfo
from argosy.placement.ports import free_port
from argosy.placement.seating import StageRoom
from argosy.workers.worker_actor import WorkerActor, encode_boot

_LOOPBACK: Final = "127.0.0.1"
_MOST_FOLDER_BYTES: Final = 80  # a socket's path has at most 107, and 22 come below it


class RayRankStarter:
    """Starts the ranks of a plan as actors; satisfies `StartRanks`."""

    def __init__(
        self,
        config: ServingConfig,
        plan: PlacementPlan,
        *,
        group_name: str,
        rank_module: str,
        unfit: Sequence[str] = (),
    ):
        self.config, self.plan = config, plan
        self.group_name, self.rank_module, self.unfit = group_name, rank_module, tuple(unfit)

    def __call__(self, door: RankDoor, on_dead: Callable[[int, str], None]) -> RankHandles:
        """Reserve, create, locate, and let them run."""
        plan = self.plan
        device = self._device()
        per_rank = {"GPU": 1.0} if device == "cuda" else {"CPU": 1.0}
        places = plan.places()
        rooms = [
            StageRoom(resources={key: amount * len(place) for key, amount in per_rank.items()}, node_id=place[0].node)
            for place in places
        ]
        reservation = ray_cluster.reserve(self.group_name, rooms, unfit=self.unfit)
        try:
            bundles = [number for number, place in enumerate(places) for _ in place]
            group = reservation.group
            actors = ray_executor.create_rank_actors(WorkerActor, bundles, group, per_rank, epoch=door.epoch)
            _check_seats(actors, [reservation.stage_node_ids[bundle] for bundle in bundles])
            here = ray.get_runtime_context().get_node_id()
            one_node = len({actor.node_id for actor in actors}) == 1
            host = _LOOPBACK if one_node else actors[0].host
            rendezvous = ray_executor.find_rendezvous(actors[0], host, door.epoch)
            config = self.config.replace(parallel=self.config.parallel.replace(device=device))
            addresses = driver_addresses(door, here, [actor.node_id for actor in actors], self.group_name)
            boots = [
                encode_boot(rank=rank, config=config, driver_address=address, secret=door.secret, node=actor.host)
                for rank, actor, address in zip(ranks_as_ray_starts_them(plan), actors, addresses, strict=True)
            ]
            return ray_executor.RayRanks(
                actors,
                boots,
                module=self.rank_module,
                rendezvous=rendezvous,
                on_dead=on_dead,
                release=reservation.release,
            )
        except BaseException:
            reservation.release()
            raise

    def _device(self) -> str:
        """What "auto" means here: GPUs wherever there are any, so that none is idle by mistake."""
        device = self.config.parallel.device
        return device if device != "auto" else "cuda" if ray_cluster.discover().num_gpus else "cpu"


def ranks_as_ray_starts_them(plan: PlacementPlan) -> list[RankInfo]:
    """Ray decides which card of its node a rank gets, and shows it that one alone, as number 0.

    The plan's own numbers say how many cards of which kind a stage takes.
    """
    return [msgspec.structs.replace(rank, gpu=None) for rank in plan.ranks]


def _check_seats(actors: Sequence[ray_executor.RankActor], node_ids: Sequence[str]) -> None:
    """Each rank runs where the plan put it, or none does."""
    for actor, node_id in zip(actors, node_ids, strict=True):
        if actor.node_id != node_id:
            ray_executor.kill_actors(actors)
            raise PlacementImpossible(f"rank {actor.global_rank} came up on {actor.host}, and not where its plan says")


def driver_addresses(door: RankDoor, here: str, node_ids: Sequence[str], name: str) -> list[str]:
    """Where each rank connects. The first rank of every other node relays for the ones that share that node with it."""
    relays: dict[str, str] = {}
    addresses = []
    for node_id in node_ids:
        if node_id == here:
            addresses.append(door.unix)
        elif node_id in relays:
            addresses.append(relays[node_id])
        elif node_ids.count(node_id) == 1:
            addresses.append(door.tcp)
        else:
            relays[node_id] = f"unix:/tmp/{name}-{len(relays)}/relay"  # not TMPDIR: that of the node may differ
            addresses.append(f"{door.tcp}{RELAY}{relays[node_id]}")
    return addresses


def _cluster_folder() -> str:
    """Where drivers of a cluster that is not ours keep their sockets: among its own files, so that they go with it."""
    node: Any = ray._private.worker._global_node
    folder = str(node.get_session_dir_path()) if node is not None else ""
    return folder if 0 < len(os.fsencode(folder)) <= _MOST_FOLDER_BYTES else short_temp_folder(50)


class StartedDrivers(NamedTuple):
    """The driver actor of each replica and what they stand on."""

    drivers: list[DriverHandle]
    session: RaySession
    folders: list[str]
    config: ServingConfig  # with what was planned


def start_ray_drivers(
    config: ServingConfig,
    describe: Callable[[ServingConfig, PlacementPlan], EngineInfo],
    *,
    secret: str,
    address: str | None,
    rank_module: str,
    tell: Callable[[str, float], None],
    note: Callable[[str], None],
) -> StartedDrivers:
    """Connect to Ray, or start it, look at its nodes, plan, and create a driver actor for each replica.

    The drivers begin at once. Raises what speaks against it and leaves nothing behind.
    """
    parallel = config.parallel
    num_ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size * parallel.data_parallel_size
    num_cpus = max(os.cpu_count() or 1, num_ranks + 1)  # logical: a rank must find room on a small machine, too
    session = RaySession.open(address, num_cpus=num_cpus)
    drivers: list[DriverHandle] = []
    try:
        if address and (lacking := wait_for_nodes(lambda: len(ray_cluster.discover().nodes), Path.home(), tell)):
            note(lacking)
        tell("looking at the nodes", 0.0)
        inspection = preflight.inspect_for(config, lambda text: tell(text, 0.0))
        topology = ray_cluster.discover(inspection.probes(), links=inspection.node_links())
        layout = choose_layout(config, topology, inspection, ray_cluster.offers(), note)
        folders = []
        for plan in layout.plans:
            layers = plan.layer_counts if plan.pp_size > 1 else ()
            own = layout.config.replace(parallel=layout.config.parallel.replace(pipeline_layers=layers))
            name = f"argosy-{secrets.token_hex(4)}"
            folders.append(os.path.join(session.folder or _cluster_folder(), name))
            boot = DriverBoot(
                name=name,
                config=own,
                info=describe(own, plan),
                folder=folders[-1],
                secret=secret,
                tcp_port=free_port("") if len(topology.nodes) > 1 else 0,
            )
            starter = RayRankStarter(own, plan, group_name=f"{name}-ranks", rank_module=rank_module, unfit=layout.unfit)
            driver = DriverHandle.create(boot, starter)
            driver.is_cut_off = lambda: session.is_ending
            driver.on_stopped = partial(ray_cluster.release, starter.group_name)
            drivers.append(driver)
    except BaseException:
        for driver in drivers:
            driver.stop()
        session.close()
        raise
    return StartedDrivers(drivers, session, folders, layout.config)
