"""Topologies from a YAML file of a cluster that need not exist, or from a running Ray cluster and its probes.

A file, every field but `gpus` optional:

    network: 400Gbit                      # between any two nodes; or {gbytes_per_second: 45, latency_us: 6}
    nodes:
      - name: big                         # names of several alike get a number: big-0, big-1
        count: 2
        gpus: 8 x H200                    # or a list: [H200, {model: H100, memory_gib: 70}]
        gpu_link: nvlink                  # nvlink, pcie, or {gbytes_per_second: 450, latency_us: 3}
        cpus: 192
        memory_gib: 2000                  # of the host
        price_per_hour: 80                # of the whole node
    links:
      - {between: [big-0, big-1], gbytes_per_second: 90, latency_us: 5}
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from argosy.cluster.protocol.errors import ConfigError
from argosy.placement.data_sheets import DATA_SHEETS, DataSheet, find_data_sheet
from argosy.placement.topology import NETWORK_25G, ClusterTopology, Gpu, Link, Node, NodeLink, NodeProbe

MAX_NODES: Final = 4096
MAX_GPUS_A_NODE: Final = 64
NETWORK_LABEL: Final = "argosy-network"  # of a Ray node: what its operator says of the network, such as 400Gbit
NETWORK_LATENCY_US: Final = ((100.0, 30.0), (math.inf, 6.0))  # below 100 Gbit/s: TCP; above: RDMA
NETWORK_SHARE: Final = 0.9  # of the line rate that arrives
_GIB: Final = 2**30
_NODE_KEYS: Final = ("name", "count", "gpus", "gpu_link", "cpus", "memory_gib", "price_per_hour", "address")
_GPU_KEYS: Final = ("model", "memory_gib", "free_gib", "count")
_LINK_KEYS: Final = ("gbytes_per_second", "gbits_per_second", "latency_us", "kind")


def read_topology(path: str | Path) -> ClusterTopology:
    """The cluster of a YAML file. Raises `ConfigError` with file, place, value and what would do."""
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cluster file {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"cluster file {path} is not YAML: {' '.join(str(error).split())[:300]}") from error
    try:
        return parse_topology(content)
    except ConfigError as error:
        raise ConfigError(f"cluster file {path}: {error}") from error


def parse_topology(content: object) -> ClusterTopology:
    """The cluster from what YAML gave. Raises `ConfigError`."""
    top = _mapping(content, "the file", ("nodes", "network", "links"))
    network = _link(top["network"], "network", "network") if "network" in top else NETWORK_25G
    nodes: list[Node] = []
    for place, entry in enumerate(_list(top.get("nodes"), "nodes")):
        nodes += _nodes(entry, f"nodes[{place}]", place)
        if len(nodes) > MAX_NODES:
            raise ConfigError(f"nodes: more than {MAX_NODES}; describe a part of the cluster")
    ids = [node.node_id for node in nodes]
    for node_id in ids:
        if ids.count(node_id) > 1:
            raise ConfigError(f"nodes: two are named {node_id!r}; give each entry its own name")
    links = [
        _node_link(entry, f"links[{place}]", ids) for place, entry in enumerate(_list(top.get("links", []), "links"))
    ]
    return ClusterTopology(
        nodes=tuple(sorted(nodes, key=lambda node: _natural(node.node_id))), network=network, links=tuple(links)
    )


def topology_from_ray(
    ray_nodes: Sequence[Mapping[str, Any]],
    probes: Mapping[str, NodeProbe] | None = None,
    *,
    network: Link = NETWORK_25G,
    links: Sequence[NodeLink] = (),
) -> ClusterTopology:
    """The cluster from what `ray.nodes()` gives and, by node id, what probes found there.

    Without a probe a node's GPUs are known by Ray's `accelerator_type` resource and the data sheets alone. Where every
    node has the label `argosy-network`, the slowest counts, and not what a probe measured: that was TCP, and ranks may
    have RDMA or NVLink. Raises `ConfigError` for a label that says no speed.
    """
    nodes = []
    for raw in ray_nodes:
        if not raw.get("Alive"):
            continue
        node_id, resources = str(raw["NodeID"]), raw.get("Resources") or {}
        probe = (probes or {}).get(node_id, NodeProbe())
        nodes.append(
            Node(
                node_id=node_id,
                address=str(raw["NodeManagerAddress"]),
                num_cpus=float(resources.get("CPU", 0.0)),
                num_gpus=float(resources.get("GPU", 0.0)),
                memory_bytes=int(resources.get("memory", 0)),
                labels=dict(raw.get("Labels") or {}),
                gpus=probe.gpus or _gpus_of_resources(resources),
                gpu_link=probe.gpu_link,
            )
        )
    said = [
        _link(node.labels[NETWORK_LABEL], f"label {NETWORK_LABEL} of {node.address}", "network")
        for node in nodes
        if NETWORK_LABEL in node.labels
    ]
    if nodes and len(said) == len(nodes):
        network, links = min(said, key=lambda link: link.gbytes_per_second), ()
    return ClusterTopology(
        nodes=tuple(sorted(nodes, key=lambda node: node.node_id)), network=network, links=tuple(links)
    )


def _gpus_of_resources(resources: Mapping[str, Any]) -> tuple[Gpu, ...]:
    prefix = "accelerator_type:"
    names = sorted(key.removeprefix(prefix) for key in resources if key.startswith(prefix))
    sheet = find_data_sheet(names[0]) if names else None
    if sheet is None:
        return ()
    count = int(resources.get("GPU", 0))
    return tuple(Gpu(index=index, model=sheet.name, memory_bytes=sheet.memory_bytes) for index in range(count))


# --------------------------------------------------------------------------------------------------- parts of a file


def _nodes(value: object, where: str, place: int) -> list[Node]:
    entry = _mapping(value, where, _NODE_KEYS)
    count = int(_number(entry.get("count", 1), f"{where}.count", 1, MAX_NODES))
    name = str(entry.get("name", f"node-{place}"))
    memory = int(_number(entry.get("memory_gib", 0), f"{where}.memory_gib", 0, 1e6) * _GIB)
    gpus = _gpus(entry.get("gpus"), f"{where}.gpus")
    price = entry.get("price_per_hour")
    return [
        Node(
            node_id=name if count == 1 else f"{name}-{number}",
            address=str(entry.get("address", name if count == 1 else f"{name}-{number}")),
            num_cpus=_number(entry.get("cpus", 0), f"{where}.cpus", 0, 1e5),
            num_gpus=float(sum(gpu.model != "CPU" for gpu in gpus)),
            memory_bytes=memory,
            gpus=gpus,
            gpu_link=_gpu_link(entry["gpu_link"], f"{where}.gpu_link", gpus) if "gpu_link" in entry else None,
            price_per_hour=None if price is None else _number(price, f"{where}.price_per_hour", 0, 1e6),
        )
        for number in range(count)
    ]


def _gpus(value: object, where: str) -> tuple[Gpu, ...]:
    if isinstance(value, str) and re.search("[,+]", value):  # "2 x H200, L4", which would be looked for as one name
        value = re.split("[,+]", value)
    entries = value if isinstance(value, list) else [value]
    found: list[Gpu] = []
    for place, entry in enumerate(entries):
        at = f"{where}[{place}]" if isinstance(value, list) else where
        count, sheet, memory, free = _gpu_kind(entry, at)
        if len(found) + count > MAX_GPUS_A_NODE:
            raise ConfigError(f"{where}: a node has at most {MAX_GPUS_A_NODE} GPUs")
        found += [
            Gpu(index=len(found) + more, model=sheet.name, memory_bytes=memory, free_bytes=free)
            for more in range(count)
        ]
    return tuple(found)


def _gpu_kind(entry: object, where: str) -> tuple[int, DataSheet, int, int | None]:
    if isinstance(entry, str):
        matched = re.fullmatch(
            r"\s*(?:(\d+)(?:\s*[x*]\s*|\s+(?!x\s)))?([A-Za-z].*?)(?:(?:\s+x|\s*[*:])\s*(\d+))?\s*", entry
        )
        if matched is None or (matched[1] and matched[3]):  # "-1 x H200" is no H200 by a longer name
            raise _unknown_gpu(where, entry.strip())
        entry = {"count": int(matched[1] or matched[3] or 1), "model": matched[2]}
    given = _mapping(entry, where, _GPU_KEYS)
    name = str(given.get("model", ""))
    sheet = find_data_sheet(name)
    if sheet is None:
        raise _unknown_gpu(where, name)
    count = int(_number(given.get("count", 1), f"{where}.count", 1, MAX_GPUS_A_NODE))
    memory = sheet.memory_bytes
    if "memory_gib" in given:
        memory = int(_number(given["memory_gib"], f"{where}.memory_gib", 1 / 1024, 1e5) * _GIB)
    free = given.get("free_gib")
    free_bytes = None if free is None else int(_number(free, f"{where}.free_gib", 0, 1e5) * _GIB)
    return count, sheet, memory, free_bytes


def _unknown_gpu(where: str, name: str) -> ConfigError:
    known = ", ".join(DATA_SHEETS)
    return ConfigError(f"{where}={name!r}: unknown GPU model; known: {known} (such as '8 x H200')")


def gpu_link_of(kind: str, model: str) -> Link | None:
    """Between cards of that model on ways of that kind ("nvlink", "pcie"); None where the data sheet has no such."""
    sheet = find_data_sheet(model)
    if kind == "pcie":
        return Link(kind="pcie", gbytes_per_second=sheet.pcie_gbytes_per_second if sheet else 26.0, latency_us=8.0)
    return sheet.link if sheet is not None and sheet.link.kind == kind else None


def _gpu_link(value: object, where: str, gpus: Sequence[Gpu]) -> Link:
    if value in ("pcie", "nvlink"):
        if link := gpu_link_of(str(value), gpus[0].model if gpus else ""):
            return link
        raise ConfigError(
            f"{where}='nvlink': {gpus[0].model if gpus else 'no GPU'} has none by its data sheet; say how "
            "fast: {gbytes_per_second: ..., latency_us: 3}"
        )
    return _link(value, where, "nvlink")


def _link(value: object, where: str, kind: str) -> Link:
    if isinstance(value, str):
        matched = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(Gbit|Gb|Gbps|GB)(?:/s)?\s*", value)
        if not matched:
            raise ConfigError(
                f"{where}={value!r}: must be such as '100Gbit', '12.5GB/s' or a mapping with "
                "gbytes_per_second and latency_us"
            )
        value = {"gbytes_per_second" if matched[2] == "GB" else "gbits_per_second": float(matched[1])}
    given = _mapping(value, where, _LINK_KEYS)
    if "gbits_per_second" in given:
        gbits = _number(given["gbits_per_second"], f"{where}.gbits_per_second", 0.001, 1e6)
        rate = gbits / 8 * NETWORK_SHARE
    else:
        rate = _number(given.get("gbytes_per_second"), f"{where}.gbytes_per_second", 0.0001, 1e6)
        gbits = rate * 8
    usual = next(latency for below, latency in NETWORK_LATENCY_US if gbits < below)
    latency = _number(given.get("latency_us", usual if kind == "network" else 3.0), f"{where}.latency_us", 0, 1e7)
    return Link(kind=str(given.get("kind", kind)), gbytes_per_second=rate, latency_us=latency)


def _node_link(value: object, where: str, ids: Sequence[str]) -> NodeLink:
    given = _mapping(value, where, ("between", *_LINK_KEYS))
    between = given.get("between")
    if not isinstance(between, list) or len(between) != 2:
        raise ConfigError(f"{where}.between={between!r}: must name two nodes")
    for name in between:
        if name not in ids:
            raise ConfigError(f"{where}.between: no node is named {name!r}; there are {', '.join(ids[:20])}")
    rest = {key: one for key, one in given.items() if key != "between"}
    return NodeLink(first=between[0], second=between[1], link=_link(rest, where, "network"))


def _mapping(value: object, where: str, known: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: must be a mapping with {', '.join(known)}; found {type(value).__name__}")
    for key in value:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; known: {', '.join(known)}")
    return value


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ConfigError(f"{where}: must be a list; found {type(value).__name__}")
    return value


def _number(value: object, where: str, low: float, high: float) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
        return float(value)
    raise ConfigError(f"{where}={value!r}: must be a number from {low:g} to {high:g}")


def _natural(name: str) -> list[tuple[int, int, str]]:
    """node-2 before node-10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]
