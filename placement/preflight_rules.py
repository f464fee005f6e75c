"""What is wrong with a cluster, from its nodes' facts and links: each fault with its node, what was found, and the fix.

Pure, and in the order in which one would mend things. "fail" is for what can't work: it keeps the node out of a start.
"warn" is for what may work, or not well: it is said, and the ranks find out.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Literal

import msgspec

from argosy.placement.preflight_facts import NCCL_PACKAGES, GpuFacts, NodeFacts
from argosy.placement.preflight_links import LinkFacts

_GIB: Final = 2**30
_NEEDED: Final = ("torch", "ray", "tokenizers", "safetensors", "msgspec", "numpy")
_SAME: Final = ("argosy", "torch", "ray", "msgspec", "transformers", "tokenizers", "safetensors", "triton")
_LEAST_DRIVER: Final = {12: 525, 13: 580}  # CUDA's major version: the first driver that runs it
_INTERFACE_VARIABLES: Final = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
MOST_CLOCK_SECONDS: Final = 2.0  # logs of several nodes are read side by side; tokens of cloud services expire
LEAST_GBYTES: Final = 0.11  # a full gigabit link gives 0.117
MOST_LATENCY_US: Final = 2000.0


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to mend."""

    check: str  # a stable name, for programs
    node: str  # its address; two of them for a link; "cluster"
    level: Literal["fail", "warn"]
    found: str
    fix: str

    def describe(self) -> str:
        """One line: "10.0.0.5: /dev/shm has 16 MiB free -> ..."."""
        return f"{self.node}: {self.found} -> {self.fix}"


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What the nodes are to be used for."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    ray_gpus: dict[str, float] = {}  # by node id: what Ray believes
    host_bytes: int = 0  # of the host's memory, that each rank takes beside everything else
    num_ranks: int = 0  # in all; 0: one for each GPU
    silent: dict[str, str] = {}  # nodes (id -> address) that are in the cluster and did not answer


def judge(nodes: Mapping[str, NodeFacts], links: Sequence[LinkFacts], wanted: Wanted) -> list[Fault]:
    """All faults, those of nodes first, failures before warnings."""
    found: list[Fault] = [
        Fault(
            check="node-silent",
            node=address,
            level="fail",
            found="is in the Ray cluster and its probe did not answer in time",
            fix="look whether it is stalled or its raylet hangs (the raylet's log says more); else take it out",
        )
        for _, address in sorted(wanted.silent.items())
    ]
    for node_id, facts in sorted(nodes.items(), key=lambda item: item[1].address):
        found += _of_software(facts)
        found += _of_gpus(facts, wanted.ray_gpus.get(node_id, 0.0), wanted.device)
        found += _of_machine(facts)
        found += _of_host_room(facts, wanted, wanted.ray_gpus.get(node_id, 0.0))
        found += _of_network(facts)
        found += _of_model(facts)
    found += _between_nodes(list(nodes.values()))
    found += _of_links(nodes, links)
    return sorted(found, key=lambda fault: fault.level != "fail")


def usable_nodes(nodes: Mapping[str, NodeFacts], faults: Sequence[Fault]) -> list[str]:
    """Ids of the nodes that no failure speaks against; of two that can't reach each other, the one with more such.

    Faults name addresses: what is wrong with one is so for all raylets that share it.
    """
    failed = {fault.node for fault in faults if fault.level == "fail"}
    broken = [fault.node.split(" -> ") for fault in faults if fault.level == "fail" and " -> " in fault.node]
    left = {facts.address for facts in nodes.values()} - failed
    while pairs := [pair for pair in broken if left.issuperset(pair)]:
        counts = Counter(address for pair in pairs for address in pair)
        left.discard(max(counts, key=lambda address: (counts[address], address)))
    return sorted(node_id for node_id, facts in nodes.items() if facts.address in left)


def _of_software(facts: NodeFacts) -> Iterator[Fault]:
    for name in _NEEDED:
        if name not in facts.packages:
            yield _fail("package-missing", facts, f"{name} is not installed", f"pip install {name} on this node")
    if facts.gpus and facts.packages.get("torch", "").endswith("+cpu"):
        yield _fail(
            "torch-without-cuda", facts, f"torch {facts.packages['torch']} has no CUDA, and the node has GPUs",
            "install the CUDA build of torch (see pytorch.org), or use --device cpu",
        )  # fmt: skip


def _of_gpus(facts: NodeFacts, ray_gpus: float, device: str) -> Iterator[Fault]:
    if device == "cpu":
        return
    if facts.gpu_problem:
        yield _fail(
            "gpu-driver", facts, facts.gpu_problem,
            "restart the node or its driver ('dmesg | grep -i nvrm' says more); take it out of the cluster until then",
        )  # fmt: skip
    elif ray_gpus > len(facts.gpus):
        yield _fail(
            "gpu-missing", facts, f"Ray was told of {ray_gpus:g} GPUs and the driver shows {len(facts.gpus)}",
            "start Ray there without --num-gpus, or find the lost card ('nvidia-smi -L', 'lspci')",
        )  # fmt: skip
    elif 0 < ray_gpus < len(facts.gpus):
        hidden = facts.environment.get("CUDA_VISIBLE_DEVICES")
        why = f" (CUDA_VISIBLE_DEVICES={hidden} where Ray was started)" if hidden else ""
        yield _warn(
            "gpu-hidden", facts, f"Ray uses {ray_gpus:g} of {len(facts.gpus)} GPUs{why}",
            "start Ray there without --num-gpus and CUDA_VISIBLE_DEVICES if all are meant",
        )  # fmt: skip
    for gpu in facts.gpus:
        yield from _of_gpu(facts, gpu)
    modes = {gpu.mig for gpu in facts.gpus if gpu.mig in ("Enabled", "Disabled")}
    if len(modes) == 2:
        yield _warn("gpu-mig", facts, "MIG is on for some of its GPUs and off for others", "nvidia-smi -mig 0 for all")
    cuda = _cuda_major(facts)
    driver = next((gpu.driver for gpu in facts.gpus), "")
    if cuda and driver.split(".")[0].isdigit() and int(driver.split(".")[0]) < _LEAST_DRIVER.get(cuda, 0):
        yield _warn(
            "driver-old", facts, f"driver {driver} is too old for CUDA {cuda} of torch {facts.packages.get('torch')}",
            f"install driver {_LEAST_DRIVER[cuda]} or newer, or a torch for an older CUDA",
        )  # fmt: skip


def _of_gpu(facts: NodeFacts, gpu: GpuFacts) -> Iterator[Fault]:
    name = f"GPU {gpu.index} ({gpu.name})"
    if gpu.used_mib > 0.5 * gpu.memory_mib > 0:
        yield _warn(
            "gpu-occupied", facts, f"{name} has {gpu.used_mib} of {gpu.memory_mib} MiB in use by others",
            "end what uses it ('nvidia-smi' lists processes; often a rank of an earlier run)",
        )  # fmt: skip
    elif gpu.used_mib > 1024:
        yield _warn(
            "gpu-in-use", facts, f"{name} has {gpu.used_mib} of {gpu.memory_mib} MiB in use by others",
            "end what uses it, or accept so much less KV cache",
        )  # fmt: skip
    if gpu.ecc_errors > 0:
        yield _warn(
            "gpu-ecc", facts, f"{name} has {gpu.ecc_errors} uncorrected memory errors",
            "reset it ('nvidia-smi -r' with nothing running) and replace it when they come back",
        )  # fmt: skip
    if 0 < gpu.pcie_width < gpu.pcie_width_max:
        yield _warn(
            "gpu-pcie", facts, f"{name} runs on {gpu.pcie_width} of {gpu.pcie_width_max} PCIe lanes",
            "reseat the card or its riser; idle cards of some kinds save lanes, so look again under load",
        )  # fmt: skip
    if gpu.compute_mode == "Prohibited":
        yield _fail(
            "gpu-prohibited", facts, f"{name} takes no programs (compute mode)", f"nvidia-smi -i {gpu.index} -c 0"
        )


def _of_machine(facts: NodeFacts) -> Iterator[Fault]:
    if facts.free_memory_bytes < 2 * _GIB:
        yield (_fail if facts.free_memory_bytes < _GIB // 2 else _warn)(
            "memory-low", facts, f"{facts.free_memory_bytes / _GIB:.1f} GiB of memory are free",
            "end something there: Ray and a rank need 2 GiB beside the weights",
        )  # fmt: skip
    if facts.free_shm_bytes < 64 << 20:
        yield _fail(
            "shm-small", facts, f"/dev/shm has {facts.free_shm_bytes >> 20} MiB free",
            "mount -o remount,size=2g /dev/shm (Docker: --shm-size=2g; Kubernetes: an emptyDir of medium Memory)",
        )  # fmt: skip
    elif facts.free_shm_bytes < _GIB and len(facts.gpus) > 1:
        yield _warn(
            "shm-tight", facts, f"/dev/shm has {facts.free_shm_bytes >> 20} MiB free for {len(facts.gpus)} GPUs",
            "mount -o remount,size=8g /dev/shm: NCCL keeps a buffer there for each pair",
        )  # fmt: skip
    if not facts.is_temp_writable:
        yield _fail(
            "temp-unwritable", facts, f"nothing can be written to {facts.temp_folder}",
            "mount it read-write and let this user write there, or set TMPDIR before Ray starts",
        )  # fmt: skip
    elif facts.free_temp_bytes < _GIB:
        yield (_fail if facts.free_temp_bytes < _GIB // 4 else _warn)(
            "temp-full", facts, f"{facts.temp_folder} has {facts.free_temp_bytes >> 20} MiB free",
            "free a GiB: Ray stops placing work on a full disk",
        )  # fmt: skip
    if facts.open_files < 1024:
        yield _warn(
            "open-files", facts, f"a process may open {facts.open_files} files",
            "ulimit -n 65536 before Ray starts (or LimitNOFILE= of its service)",
        )  # fmt: skip
    if facts.infiniband and 0 <= facts.locked_memory < 1 << 30:
        yield _warn(
            "memlock", facts, f"a process may lock {facts.locked_memory >> 20} MiB, and RDMA needs its buffers locked",
            "ulimit -l unlimited before Ray starts",
        )  # fmt: skip


def _of_host_room(facts: NodeFacts, wanted: Wanted, ray_gpus: float) -> Iterator[Fault]:
    """What is kept in the host's memory for ranks on its GPUs (weights, hidden states)."""
    gpus = int(ray_gpus) or len(facts.gpus)
    if not wanted.host_bytes or not gpus or wanted.device == "cpu":
        return
    ranks = min(gpus, wanted.num_ranks or gpus)
    needed, free = wanted.host_bytes / _GIB, facts.free_memory_bytes / _GIB
    found = f"{free:.1f} GiB of memory are free, and each of {ranks} ranks there would keep {needed:.1f} GiB in it"
    fix = "lower --cpu-offload-gb and --activation-offload-gb, spread the model over more nodes, or end something there"
    if wanted.host_bytes > facts.free_memory_bytes:
        yield _fail("host-memory", facts, found, fix)
    elif ranks * wanted.host_bytes > facts.free_memory_bytes:
        yield _warn("host-memory", facts, found, fix)


def _of_network(facts: NodeFacts) -> Iterator[Fault]:
    if not facts.interface:
        yield _fail(
            "interface-missing", facts, f"no interface of {facts.hostname} has the address {facts.address}",
            "start Ray there with --node-ip-address set to an address of its own (behind NAT nodes can't be reached)",
        )  # fmt: skip
    for name in _INTERFACE_VARIABLES:
        wished = facts.environment.get(name, "").lstrip("=")
        if (
            wished
            and wished[0] != "^"
            and not any(each.startswith(part) for part in wished.split(",") for each in facts.interfaces)
        ):
            yield _fail(
                "interface-wrong", facts, f"{name}={facts.environment[name]} names no interface of this node",
                f"unset it where Ray starts: {facts.interface or 'the right one'} is found without it",
            )  # fmt: skip
    if facts.name_seconds >= 1.0:
        yield _warn(
            "name-slow", facts, f"its own name {facts.hostname} took {facts.name_seconds:.1f} s or more to resolve",
            f"put '{facts.address} {facts.hostname}' into its /etc/hosts, or mend its name server",
        )  # fmt: skip


def _of_model(facts: NodeFacts) -> Iterator[Fault]:
    if facts.model is not None and facts.model.problem:
        yield _fail(
            "model-broken", facts, facts.model.problem,
            "copy the model folder to this node again, to the same place (or serve it by its hub name)",
        )  # fmt: skip


def _between_nodes(nodes: Sequence[NodeFacts]) -> Iterator[Fault]:
    """Where nodes differ, the ones in the minority are named."""
    same = "install the same on all nodes"
    yield from _odd(nodes, "python-differs", "fail", [n.python.rpartition(".")[0] for n in nodes], "Python", same)
    yield from _odd(nodes, "system-differs", "fail", [n.system for n in nodes], "system", "use nodes of one kind")
    for name in _SAME:
        found = [node.packages.get(name, "") for node in nodes]
        if all(found):
            yield from _odd(nodes, "package-differs", "fail", found, name, same)
    if len({node.packages.get("argosy") for node in nodes}) == 1:
        yield from _odd(nodes, "code-differs", "fail", [n.code for n in nodes], "sources of argosy", "ship them to all")
    nccl = [next((n.packages[name] for name in NCCL_PACKAGES if name in n.packages), "none") for n in nodes]
    yield from _odd(nodes, "nccl-differs", "fail", nccl, "NCCL", same)
    with_gpus = [node for node in nodes if node.gpus]
    drivers = [node.gpus[0].driver for node in with_gpus]
    yield from _odd(with_gpus, "driver-differs", "warn", drivers, "NVIDIA driver", "install one version on all")
    models = ["+".join(sorted({gpu.name for gpu in node.gpus})) for node in with_gpus]
    yield from _odd(with_gpus, "gpu-differs", "warn", models, "GPU", "fine for stages: 'argosy plan' splits unevenly")
    yield from _odd(nodes, "mtu-differs", "warn", [str(n.mtu) for n in nodes], "MTU", "ip link set dev ... mtu ...")
    nccl_settings = [_describe({k: v for k, v in n.environment.items() if k.startswith("NCCL_")}) for n in nodes]
    yield from _odd(nodes, "environment-differs", "fail", nccl_settings, "environment", "set the same where Ray starts")
    owners: dict[str, str] = {}
    for node in nodes:
        for gpu in node.gpus:
            if gpu.uuid and owners.setdefault(gpu.uuid, node.address) != node.address:
                yield _fail(
                    "gpu-twice", node, f"GPU {gpu.index} ({gpu.uuid}) is also that of {owners[gpu.uuid]}",
                    "two raylets share one machine: stop one of them, or give each its own CUDA_VISIBLE_DEVICES",
                )  # fmt: skip
    yield from _models_differ(nodes)


def _models_differ(nodes: Sequence[NodeFacts]) -> Iterator[Fault]:
    sound = [node for node in nodes if node.model is not None and not node.model.problem]
    files = sorted({name for node in sound if node.model for name in node.model.marks})
    fix = "copy the model folder to this node again"
    for name in files:
        marks = [node.model.marks.get(name, "missing") for node in sound if node.model]
        yield from _odd(sound, "model-differs", "fail", marks, f"{name} of the model", fix)


def _of_links(nodes: Mapping[str, NodeFacts], links: Sequence[LinkFacts]) -> Iterator[Fault]:
    late: dict[str, float] = {}
    for link in links:
        caller, callee = nodes.get(link.caller), nodes.get(link.callee)
        if caller is None or callee is None:
            continue
        pair = f"{caller.address} -> {callee.address}"
        if link.problem:
            yield Fault(
                check="link-broken", node=pair, level="fail", found=link.problem,
                fix="let all TCP ports through between the nodes (ranks use free ones); compare MTUs and routes",
            )  # fmt: skip
            continue
        if link.gbytes_per_second < LEAST_GBYTES:
            yield Fault(
                check="link-slow", node=pair, level="warn", found=f"{link.gbytes_per_second * 8:.2f} Gbit/s",
                fix="look at the port's speed ('ethtool') and at what else uses it; 10 Gbit/s is the least for stages",
            )  # fmt: skip
        if link.latency_us > MOST_LATENCY_US:
            yield Fault(
                check="link-late", node=pair, level="warn", found=f"{link.latency_us / 1000:.1f} ms one way",
                fix="use nodes of one site: each token crosses this link once a stage",
            )  # fmt: skip
        offset = link.clock_offset_seconds
        for node, ahead in ((link.callee, offset), (link.caller, -offset)):
            late[node] = max(late.get(node, 0.0), abs(ahead))
    if late and (worst := max(late.values())) > MOST_CLOCK_SECONDS:
        counts = Counter(node for node, seconds in late.items() if seconds > MOST_CLOCK_SECONDS)
        names = ", ".join(sorted(nodes[node].address for node in counts))
        yield Fault(
            check="clock", node=names, level="warn", found=f"clocks differ by {worst:.1f} s",
            fix="run an NTP client on all nodes ('timedatectl set-ntp true')",
        )  # fmt: skip


def _odd(
    nodes: Sequence[NodeFacts], check: str, level: Literal["fail", "warn"], values: Sequence[str], what: str, fix: str
) -> Iterator[Fault]:
    """A fault for each node whose value is not that of most (of the first, where none has more)."""
    if len(set(values)) < 2:
        return
    counts = Counter(values)
    usual = max(counts, key=lambda value: (counts[value], -values.index(value)))
    example = nodes[values.index(usual)].address
    for node, value in zip(nodes, values, strict=True):
        if value != usual:
            found = f"{what}: {value or 'none'} here, {usual or 'none'} on {example}"
            yield Fault(check=check, node=node.address, level=level, found=found, fix=fix)


def _cuda_major(facts: NodeFacts) -> int:
    """Of the CUDA that torch was built for; 0: unknown."""
    build = facts.packages.get("torch", "").partition("+cu")[2]
    if build[:2].isdigit():
        return int(build[:2])
    return next((int(name[-2:]) for name in NCCL_PACKAGES if name in facts.packages), 0)


def _describe(settings: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())


def _fail(check: str, facts: NodeFacts, found: str, fix: str) -> Fault:
    return Fault(check=check, node=facts.address, level="fail", found=found, fix=fix)


def _warn(check: str, facts: NodeFacts, found: str, fix: str) -> Fault:
    return Fault(check=check, node=facts.address, level="warn", found=found, fix=fix)
