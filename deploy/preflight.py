"""The nodes of a Ray cluster, looked at before any weight is read: one probe on each, then calls between them.

A probe is an actor that takes no CPU. All have a deadline; a node that does not answer is a fault itself.
"""

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec
import ray

from argosy.cluster.protocol.config import ServingConfig
from argosy.deploy.preflight_model import Wish, examine_model
from argosy.placement.network import choose_interface
from argosy.placement.ports import free_port
from argosy.placement.preflight_facts import NodeFacts, gather_facts
from argosy.placement.preflight_links import LinkFacts, LinkServer, call_link, rounds_of_pairs
from argosy.placement.preflight_rules import Fault, Wanted, judge
from argosy.placement.ray_cluster import ray_nodes
from argosy.placement.topology import Gpu, Link, NodeLink, NodeProbe
from argosy.placement.topology_sources import gpu_link_of

FACTS_SECONDS: Final = 7.0  # from nothing to the facts of all nodes: a process has to start on each
_ROUND_SECONDS: Final = 6.0
_LINKS_SECONDS: Final = 8.0  # for all rounds; what is not reached by then stays untried
_MIB: Final = 2**20
_NOTHING: Final = Wanted()
_NO_MODEL: Final = Wish()


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """What was found, by node id."""

    nodes: dict[str, NodeFacts]
    links: tuple[LinkFacts, ...] = ()
    wanted: Wanted = Wanted()
    ray_memory: dict[str, int] = {}  # by node id, what Ray may give away: of a container it knows the limit
    seconds: float = 0.0

    @property
    def faults(self) -> list[Fault]:
        """What is wrong with it."""
        return judge(self.nodes, self.links, self.wanted)

    def probes(self) -> dict[str, NodeProbe]:
        """For the planner: what memory each device really has free.

        A node without GPUs is one seat of its CPU where no node has any, and no seat beside nodes that do.
        """
        on_cpu = self.wanted.device == "cpu" or not any(facts.gpus for facts in self.nodes.values())
        return {
            node_id: NodeProbe(
                gpus=_seats(facts, on_cpu, self.ray_memory.get(node_id, facts.memory_bytes)),
                gpu_link=gpu_link_of(facts.gpu_link, facts.gpus[0].name) if facts.gpu_link and not on_cpu else None,
            )
            for node_id, facts in self.nodes.items()
        }

    def node_links(self) -> list[NodeLink]:
        """For the planner: the slower direction of each pair that was measured."""
        slowest: dict[tuple[str, str], LinkFacts] = {}
        for link in self.links:
            key = (min(link.caller, link.callee), max(link.caller, link.callee))
            if not link.problem and (key not in slowest or link.gbytes_per_second < slowest[key].gbytes_per_second):
                slowest[key] = link
        return [
            NodeLink(
                first=first,
                second=second,
                link=Link(
                    kind="network",
                    gbytes_per_second=max(link.gbytes_per_second, 0.001),
                    latency_us=link.latency_us,
                    measured=True,
                ),
            )
            for (first, second), link in sorted(slowest.items())
        ]


class Probe:
    """One node's; made an actor below."""

    def __init__(self) -> None:
        self._server: LinkServer | None = None

    def facts(self, address: str, wish: Wish) -> bytes:
        """`NodeFacts` as JSON."""
        return msgspec.json.encode(_facts(address, wish))

    def listen(self, address: str, secret: str) -> int:
        """Open a port for calls of the others; its number."""
        self._server = LinkServer(address, secret)
        return self._server.port

    def free_port(self, address: str) -> int:
        """One that was free a moment ago."""
        return free_port(address)

    def call(self, caller: str, callee: str, address: str, port: int, secret: str) -> bytes:
        """`LinkFacts` as JSON."""
        return msgspec.json.encode(call_link(caller, callee, address, port, secret))

    def all_reduce(self, rank: int, world_size: int, rendezvous: str, sizes: Sequence[int]) -> list[float]:
        """Seconds that a sum over all nodes takes, for each size in bytes; -1.0 where it fails."""
        # torch: only here, seconds to import, and no other question needs it
        from argosy.deploy.preflight_torch import time_all_reduce

        choose_interface(rendezvous.rpartition(":")[0])
        return time_all_reduce(rank, world_size, rendezvous, sizes)


def inspect_cluster(
    *,
    wish: Wish = _NO_MODEL,
    wanted: Wanted = _NOTHING,
    tell: Callable[[str], None] = lambda text: None,
) -> Inspection:
    """Look at all nodes of the cluster that this process is connected to, and at the model on each of them.

    `wanted`: what ranks will ask of a node; what Ray says of nodes is filled in here.
    """
    began = time.monotonic()
    if here := _only_node(wish, wanted):
        return here
    alive = _own_first(ray_nodes(), ray.get_runtime_context().get_node_id())
    addresses = {node_id: str(node["NodeManagerAddress"]) for node_id, node in alive.items()}
    ray_gpus = {node_id: float(node["Resources"].get("GPU", 0.0)) for node_id, node in alive.items()}
    with _probes(list(alive)) as probes:
        tell(f"looking at {len(alive)} node{'s' if len(alive) > 1 else ''}")
        asked = {node_id: probe.facts.remote(addresses[node_id], wish) for node_id, probe in probes.items()}
        answers = _gather(asked, FACTS_SECONDS)
        nodes = {node_id: msgspec.json.decode(answer, type=NodeFacts) for node_id, answer in answers.items()}
        links: list[LinkFacts] = []
        if len(nodes) > 1:
            tell("trying the links between them")
            links = _try_links({node_id: probes[node_id] for node_id in nodes}, addresses)
    silent = {node_id: address for node_id, address in addresses.items() if node_id not in nodes}
    return Inspection(
        nodes=nodes,
        links=tuple(links),
        wanted=msgspec.structs.replace(wanted, ray_gpus=ray_gpus, silent=silent),
        ray_memory=_memory_of(list(alive.values())),
        seconds=round(time.monotonic() - began, 2),
    )


def _own_first(nodes: Sequence[Mapping[str, Any]], own: str) -> dict[str, Mapping[str, Any]]:
    """The nodes that are alive, by id. Of two that differ the first is taken to be right: that is where somebody asks.

    Ray's own order is that of random ids: of two nodes it called now the one and now the other the odd one.
    """
    alive = [node for node in nodes if node["Alive"]]
    alive.sort(key=lambda node: (node["NodeID"] != own, str(node["NodeManagerAddress"]), node["NodeID"]))
    return {node["NodeID"]: node for node in alive}


def _facts(address: str, wish: Wish) -> NodeFacts:
    """Of this node."""
    facts = gather_facts(address)
    return msgspec.structs.replace(facts, model=examine_model(wish)) if wish.folder else facts


def _only_node(wish: Wish, wanted: Wanted) -> Inspection | None:
    """The inspection of a cluster that is this machine alone: no process has to be started for it."""
    began = time.monotonic()
    alive = [node for node in ray_nodes() if node["Alive"]]
    own: str = ray.get_runtime_context().get_node_id()
    if len(alive) != 1 or alive[0]["NodeID"] != own:
        return None
    facts = _facts(str(alive[0]["NodeManagerAddress"]), wish)
    wanted = msgspec.structs.replace(wanted, ray_gpus={own: float(alive[0]["Resources"].get("GPU", 0.0))})
    return Inspection(
        nodes={own: facts}, wanted=wanted, ray_memory=_memory_of(alive), seconds=round(time.monotonic() - began, 2)
    )


def inspect_for(config: ServingConfig, tell: Callable[[str], None]) -> Inspection:
    """For a model that is about to be served."""
    wish = Wish(config.model.model, config.model.load_format != "dummy", config.model.hf_overrides)
    return inspect_cluster(wish=wish, wanted=wanted_by(config), tell=tell)


def wanted_by(config: ServingConfig) -> Wanted:
    """What these settings ask of a node. What is "auto" is worked out, and checked, by the ranks."""
    parallel, offload = config.parallel, config.offload
    asked = (offload.cpu_offload_gb, offload.activation_offload_gb, offload.swap_space)
    gib = [size for size in asked if not isinstance(size, str)]
    ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size * parallel.data_parallel_size
    return Wanted(
        device=parallel.device,
        host_bytes=int(sum(gib) * 2**30),
        num_ranks=ranks if parallel.layout == "given" else 0,
    )


def measure_all_reduce(
    node_ids: Sequence[str], addresses: Mapping[str, str], sizes: Sequence[int], seconds: float
) -> list[float]:
    """Seconds of a sum over these nodes, a process on each, for each size in bytes; empty when it failed."""
    with _probes(node_ids) as probes:
        first = node_ids[0]
        try:
            port = ray.get(probes[first].free_port.remote(addresses[first]), timeout=seconds)
            rendezvous = f"{addresses[first]}:{port}"
            asked = [
                probes[node_id].all_reduce.remote(rank, len(node_ids), rendezvous, list(sizes))
                for rank, node_id in enumerate(node_ids)
            ]
            slowest: list[float] = [max(times) for times in zip(*ray.get(asked, timeout=seconds), strict=True)]
        except ray.exceptions.RayError:
            return []
    return slowest


def _try_links(probes: Mapping[str, Any], addresses: Mapping[str, str]) -> list[LinkFacts]:
    secret = secrets.token_hex(16)
    opened = {node_id: probe.listen.remote(addresses[node_id], secret) for node_id, probe in probes.items()}
    ports = _gather(opened, _ROUND_SECONDS)
    node_ids = sorted(ports, key=lambda node_id: addresses[node_id])
    found: list[LinkFacts] = []
    deadline = time.monotonic() + _LINKS_SECONDS
    for pairs in rounds_of_pairs(len(node_ids)):
        if time.monotonic() > deadline:
            break
        asked = {}
        for a, b in pairs:
            caller, callee = node_ids[a], node_ids[b]
            asked[caller] = probes[caller].call.remote(caller, callee, addresses[callee], ports[callee], secret)
        answers = _gather(asked, _ROUND_SECONDS)
        found += [msgspec.json.decode(answer, type=LinkFacts) for answer in answers.values()]
    return found


@contextlib.contextmanager
def _probes(node_ids: Sequence[str]) -> Iterator[dict[str, Any]]:
    remote: Any = ray.remote  # its annotations know no options of actors
    actor: Any = remote(Probe)
    made = {
        node_id: actor.options(num_cpus=0, label_selector={"ray.io/node-id": node_id}).remote() for node_id in node_ids
    }
    try:
        yield made
    finally:
        for probe in made.values():
            with contextlib.suppress(ray.exceptions.RayError):  # dead already
                ray.kill(probe, no_restart=True)


def _gather(asked: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """The answers that came in time, by the same keys."""
    if not asked:
        return {}
    done, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=seconds)
    found = {}
    for key, reference in asked.items():
        if reference in done:
            with contextlib.suppress(ray.exceptions.RayError):  # no answer: not among the found
                found[key] = ray.get(reference, timeout=1.0)
    return found


def _seats(facts: NodeFacts, on_cpu: bool, ray_memory: int) -> tuple[Gpu, ...]:
    if on_cpu:
        memory = min(facts.memory_bytes, ray_memory)
        return (Gpu(index=0, model="CPU", memory_bytes=memory, free_bytes=min(memory, facts.free_memory_bytes)),)
    return tuple(
        Gpu(
            index=gpu.index,
            model=gpu.name,
            memory_bytes=gpu.memory_mib * _MIB,
            free_bytes=max(gpu.memory_mib - gpu.used_mib, 0) * _MIB,
            uuid=gpu.uuid,
        )
        for gpu in facts.gpus
    )


def _memory_of(nodes: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {node["NodeID"]: int(node["Resources"]["memory"]) for node in nodes if "memory" in node["Resources"]}
