"""`argosy doctor --ray-address ...`: all nodes of a running cluster, the links between them, and what is wrong there.

The same probes and rules as before a start; besides, how long a sum over all nodes takes. Starts nothing that stays.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from argosy.deploy import preflight
from argosy.deploy.preflight import Inspection
from argosy.deploy.preflight_model import Wish
from argosy.deploy.ray_session import RaySession
from argosy.placement import ray_cluster
from argosy.placement.preflight_facts import NodeFacts

_SUM_SIZES: Final = (16 * 1024, 1024 * 1024, 16 * 1024 * 1024)
_SUM_SECONDS: Final = 25.0  # processes on all nodes import torch
_GIB: Final = 2**30


def main(*, address: str, model: str | None, with_sums: bool, as_json: bool) -> int:
    """Print what was found; 0 when nothing fails."""
    began = time.monotonic()
    session = RaySession.open(address, num_cpus=1)
    try:
        inspection = preflight.inspect_cluster(wish=Wish(model or ""), tell=lambda text: _say(f"{text} ..."))
        sums = _sums(inspection) if with_sums and len(inspection.nodes) > 1 else []
        offers = ray_cluster.offers()
    finally:
        session.close()
    faults = inspection.faults
    seconds = time.monotonic() - began
    if as_json:
        found = {"inspection": inspection, "faults": faults, "all_reduce_seconds": sums, "seconds": round(seconds, 2)}
        print(msgspec.json.format(msgspec.json.encode(found), indent=1).decode())
    else:
        held = [offer.describe(sorted({"CPU", "GPU"} & offer.total.keys())) for offer in offers]
        print("\n".join([*_nodes(inspection), *_links(inspection), *_sum_lines(sums), *held, "", *_faults(faults)]))
        print(f"{len(inspection.nodes)} nodes looked at in {seconds:.1f} s.")
    return 1 if any(fault.level == "fail" for fault in faults) else 0


def _nodes(inspection: Inspection) -> list[str]:
    rows = [_row(facts) for facts in sorted(inspection.nodes.values(), key=lambda facts: facts.address)]
    header = {"node": "node", "devices": "devices", "memory": "memory free", "shm": "/dev/shm", "net": "network"}
    rows.insert(0, header | {"software": "software"})
    widths = {name: max(len(row[name]) for row in rows) for name in rows[0]}
    return ["  ".join(f"{text:<{widths[name]}}" for name, text in row.items()).rstrip() for row in rows]


def _row(facts: NodeFacts) -> dict[str, str]:
    gpus = f"{len(facts.gpus)} x {facts.gpus[0].name} (driver {facts.gpus[0].driver})" if facts.gpus else ""
    rate = f", {facts.speed_mbits / 1000:g} Gbit/s" if facts.speed_mbits > 0 else ""
    packages = facts.packages
    return {
        "node": facts.address,
        "devices": gpus or f"{facts.num_cpus} CPU cores",
        "memory": f"{facts.free_memory_bytes / _GIB:.1f} of {facts.memory_bytes / _GIB:.1f} GiB",
        "shm": f"{facts.free_shm_bytes / _GIB:.2f} GiB",
        "net": f"{facts.interface or 'no interface'} mtu {facts.mtu}{rate}",
        "software": f"Python {facts.python}, torch {packages.get('torch')}, ray {packages.get('ray')}, "
        f"argosy {packages.get('argosy')} ({facts.code[:8]})",
    }


def _links(inspection: Inspection) -> list[str]:
    def name(node_id: str) -> str:
        return inspection.nodes[node_id].address

    lines = []
    for link in sorted(inspection.links, key=lambda link: (name(link.caller), name(link.callee))):
        what = link.problem or (
            f"{link.gbytes_per_second:.2f} GB/s, {link.latency_us:.0f} us, "
            f"clock {link.clock_offset_seconds * 1000:+.1f} ms"
        )
        lines.append(f"{name(link.caller)} -> {name(link.callee)}  {what}")
    return ["", *lines] if lines else []


def _sums(inspection: Inspection) -> list[float]:
    _say("summing over all nodes ...")
    node_ids = sorted(inspection.nodes, key=lambda node_id: inspection.nodes[node_id].address)
    addresses = {node_id: facts.address for node_id, facts in inspection.nodes.items()}
    return preflight.measure_all_reduce(node_ids, addresses, _SUM_SIZES, _SUM_SECONDS)


def _sum_lines(sums: Sequence[float]) -> list[str]:
    if not sums:
        return []
    parts = [f"{size // 1024} KiB {1000 * each:.2f} ms" for size, each in zip(_SUM_SIZES, sums, strict=True)]
    return ["", f"all-reduce over all nodes: {', '.join(parts)}"]


def _faults(faults: Sequence[Any]) -> list[str]:
    lines = [f"{fault.level:<5} {fault.node}: {fault.found}\n      -> {fault.fix}" for fault in faults]
    num_failed = sum(fault.level == "fail" for fault in faults)
    if num_failed:
        return [*lines, f"\n{num_failed} to mend."]
    return [*lines, f"\nReady{f' ({len(lines)} warnings)' if lines else ''}."]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
