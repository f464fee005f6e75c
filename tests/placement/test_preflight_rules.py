"""Each thing that can be wrong with nodes is named with its node and its fix; what is sound is left in peace."""

from typing import Any

import msgspec
import pytest

pytest.importorskip("psutil")

from argosy.placement.preflight_facts import GpuFacts, ModelFacts, NodeFacts, read_gpu_link, visible_gpus
from argosy.placement.preflight_links import LinkFacts
from argosy.placement.preflight_rules import Fault, Wanted, judge, usable_nodes

PACKAGES = {
    "argosy": "0.1.0", "torch": "2.11.0+cu130", "triton": "3.6.0", "ray": "2.60.0", "transformers": "5.23.0",
    "tokenizers": "0.23", "safetensors": "0.8", "msgspec": "0.22", "numpy": "2.4", "nvidia-nccl-cu13": "2.28",
}  # fmt: skip
CARD = GpuFacts(
    index=0, uuid="GPU-1", name="NVIDIA H100", memory_mib=81559, used_mib=4, driver="580.82", pcie_width=16,
    pcie_width_max=16, ecc_errors=0, compute_mode="Default", mig="Disabled",
)  # fmt: skip
SOUND = NodeFacts(
    address="10.0.0.1", hostname="one", python="3.11.7", system="Linux x86_64", packages=PACKAGES, code="abc",
    gpus=(CARD,), interface="eth0", interfaces=("eth0", "lo"), mtu=1500, memory_bytes=64 << 30,
    free_memory_bytes=60 << 30, free_shm_bytes=32 << 30, temp_folder="/tmp",
    free_temp_bytes=90 << 30, num_cpus=16, open_files=65536, locked_memory=-1,
    model=ModelFacts(folder="m", marks={"config.json": "c0ffee"}),
)  # fmt: skip


def node(number: int, **changes: Any) -> NodeFacts:
    """A sound node with some facts changed."""
    own = {"address": f"10.0.0.{number}", "hostname": f"host-{number}"}
    own |= {"gpus": (msgspec.structs.replace(CARD, uuid=f"GPU-{number}"),)}
    return msgspec.structs.replace(SOUND, **{**own, **changes})


def card(**changes: Any) -> tuple[GpuFacts]:
    return (msgspec.structs.replace(CARD, **{"uuid": "GPU-3", **changes}),)


def examine(last: NodeFacts, *links: LinkFacts, **wanted: Any) -> list[Fault]:
    """Of three nodes of which the last may be odd."""
    nodes = {"a": node(1), "b": node(2), "c": last}
    gpus = {name: float(len(facts.gpus)) for name, facts in nodes.items()}
    return judge(nodes, links, Wanted(**{"ray_gpus": gpus, **wanted}))


def link(**changes: Any) -> LinkFacts:
    facts = {"caller": "a", "callee": "c", "gbytes_per_second": 2.8, "latency_us": 30.0}
    return LinkFacts(**{**facts, **changes})


def test_three_sound_nodes_have_no_fault() -> None:
    """Otherwise nobody would read the rest."""
    assert examine(node(3), link()) == []


def without(name: str) -> dict[str, str]:
    return {key: value for key, value in PACKAGES.items() if key != name}


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "package-missing": ({"packages": without("tokenizers")}, "tokenizers is not installed"),
    "package-differs": (
        {"packages": PACKAGES | {"torch": "2.12.0+cu130"}},
        "2.12.0+cu130 here, 2.11.0+cu130 on 10.0.0.1",
    ),
    "nccl-differs": ({"packages": PACKAGES | {"nvidia-nccl-cu13": "2.27"}}, "NCCL: 2.27 here"),
    "python-differs": ({"python": "3.12.1"}, "3.12 here, 3.11 on"),
    "system-differs": ({"system": "Linux aarch64"}, "aarch64"),
    "code-differs": ({"code": "xyz"}, "sources of argosy: xyz here"),
    "torch-without-cuda": ({"packages": PACKAGES | {"torch": "2.11.0+cpu"}}, "has no CUDA"),
    "gpu-driver": ({"gpus": (), "gpu_problem": "nvidia-smi ended with 9: GPU is lost"}, "GPU is lost"),
    "gpu-occupied": ({"gpus": card(used_mib=70000)}, "70000 of 81559 MiB"),
    "gpu-in-use": ({"gpus": card(used_mib=4000)}, "4000 of 81559 MiB"),
    "gpu-ecc": ({"gpus": card(ecc_errors=3)}, "3 uncorrected"),
    "gpu-pcie": ({"gpus": card(pcie_width=4)}, "4 of 16 PCIe lanes"),
    "gpu-prohibited": ({"gpus": card(compute_mode="Prohibited")}, "takes no programs"),
    "gpu-mig": ({"gpus": (*card(mig="Enabled"), *card(index=1, uuid="GPU-4"))}, "MIG is on for some"),
    "gpu-twice": ({"gpus": card(uuid="GPU-1")}, "is also that of 10.0.0.1"),
    "gpu-differs": ({"gpus": card(name="NVIDIA A100")}, "NVIDIA A100 here"),
    "driver-differs": ({"gpus": card(driver="590.1")}, "590.1 here, 580.82 on"),
    "driver-old": ({"gpus": card(driver="550.1")}, "550.1 is too old for CUDA 13"),
    "memory-low": ({"free_memory_bytes": 1 << 30}, "1.0 GiB of memory"),
    "shm-small": ({"free_shm_bytes": 16 << 20}, "/dev/shm has 16 MiB"),
    "temp-full": ({"free_temp_bytes": 300 << 20}, "300 MiB free"),
    "temp-unwritable": ({"is_temp_writable": False}, "nothing can be written to /tmp"),
    "open-files": ({"open_files": 256}, "256 files"),
    "memlock": ({"infiniband": ("mlx5_0",), "locked_memory": 64 << 20}, "may lock 64 MiB"),
    "interface-missing": ({"interface": ""}, "no interface of host-3 has the address 10.0.0.3"),
    "interface-wrong": ({"environment": {"GLOO_SOCKET_IFNAME": "ib7"}}, "ib7 names no interface"),
    "environment-differs": ({"environment": {"NCCL_IB_DISABLE": "1"}}, "NCCL_IB_DISABLE=1 here, none on"),
    "name-slow": ({"name_seconds": 5.0}, "host-3 took 5.0 s or more"),
    "mtu-differs": ({"mtu": 9000}, "9000 here, 1500 on"),
    "model-broken": ({"model": ModelFacts(folder="m", problem="has no model folder m")}, "no model folder"),
    "model-differs": ({"model": ModelFacts(folder="m", marks={"config.json": "dead"})}, "dead here, c0ffee on"),
}


@pytest.mark.parametrize("check", sorted(ODD))
def test_an_odd_node_is_named(check: str) -> None:
    """Alone, with what was found and a fix: the other two are not blamed."""
    changes, found = ODD[check]
    faults = examine(node(3, **changes))
    assert [(fault.check, fault.node) for fault in faults if fault.check == check] == [(check, "10.0.0.3")]
    (fault,) = [fault for fault in faults if fault.check == check]
    assert found in fault.found
    assert fault.fix
    assert "\n" not in fault.describe()
    assert {fault.node for fault in faults} == {"10.0.0.3"}


@pytest.mark.parametrize(
    ("check", "changes"),
    [
        ("link-broken", {"problem": "blocked: nothing came back"}),
        ("link-slow", {"gbytes_per_second": 0.01}),
        ("link-late", {"latency_us": 40_000.0}),
        ("clock", {"clock_offset_seconds": -60.0}),
    ],
)
def test_an_odd_link_is_named_with_both_ends(check: str, changes: dict[str, Any]) -> None:
    """Which of the two is to blame is not known; both addresses are what one needs."""
    (fault,) = examine(node(3), link(**changes))
    assert fault.check == check
    assert "10.0.0.1" in fault.node
    assert "10.0.0.3" in fault.node


def test_ray_and_the_driver_are_held_against_each_other() -> None:
    """Ray believes what it was started with."""
    (fault,) = examine(node(3), ray_gpus={"c": 4.0, "a": 1.0, "b": 1.0})
    assert fault.check == "gpu-missing"
    assert "told of 4 GPUs and the driver shows 1" in fault.found
    two = (CARD, msgspec.structs.replace(CARD, index=1, uuid="GPU-9"))
    (fault,) = examine(node(3, gpus=two[::-1], environment={"CUDA_VISIBLE_DEVICES": "0"}), ray_gpus={"c": 1.0})[:1]
    assert fault.check in ("gpu-hidden", "gpu-twice")


def test_gpus_don_t_matter_where_the_cpu_is_asked_for() -> None:
    """A broken card is no reason to refuse a run that does not want it."""
    assert examine(node(3, gpus=(), gpu_problem="lost"), device="cpu") == []


def test_a_node_that_does_not_answer_is_named() -> None:
    """It is in the cluster, so Ray would place a rank there."""
    (fault,) = examine(node(3), silent={"d": "10.0.0.4"})
    assert (fault.check, fault.node, fault.level) == ("node-silent", "10.0.0.4", "fail")


def test_nodes_that_failed_are_left_out_and_warned_ones_stay() -> None:
    """Two that can't reach each other are fit one by one: the one with fewer friends goes."""
    nodes = {"a": node(1), "b": node(2, mtu=9000), "c": node(3, free_shm_bytes=1)}
    faults = judge(nodes, [], Wanted(ray_gpus=dict.fromkeys(nodes, 1.0)))
    assert usable_nodes(nodes, faults) == ["a", "b"]
    nodes = {"a": node(1), "b": node(2), "c": node(3)}
    blocked = [link(caller="a", problem="blocked"), link(caller="b", problem="blocked")]
    faults = judge(nodes, blocked, Wanted(ray_gpus=dict.fromkeys(nodes, 1.0)))
    assert usable_nodes(nodes, faults) == ["a", "b"]


def test_raylets_that_share_an_address_are_nodes_each() -> None:
    """Half of a machine's cards each: both are used, and what is wrong with the machine is wrong with both."""
    nodes = {"a": node(1), "b": node(1), "c": node(3)}
    assert usable_nodes(nodes, []) == ["a", "b", "c"]
    assert usable_nodes(nodes, [Fault(check="temp-full", node="10.0.0.1", level="fail", found="full", fix="")]) == ["c"]


def test_cards_that_are_left_to_others_don_t_count() -> None:
    """Two servers share a machine by CUDA_VISIBLE_DEVICES: what the one holds is no fault of the other's cards."""
    cards = tuple(msgspec.structs.replace(CARD, index=index, uuid=f"GPU-{index}a") for index in range(4))
    assert [gpu.index for gpu in visible_gpus(cards, "1,3")] == [1, 3]
    assert [gpu.index for gpu in visible_gpus(cards, "GPU-2a")] == [2]
    assert visible_gpus(cards, "") == cards


MATRIX = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \tNV4\tSYS\tSYS\tPXB\t0-31\t0
GPU1\tNV4\t X \tSYS\tSYS\tSYS\t0-31\t0
GPU2\tSYS\tSYS\t X \tNV4\tSYS\t32-63\t1
GPU3\tSYS\tSYS\tNV4\t X \tSYS\t32-63\t1
NIC0\tPXB\tSYS\tSYS\tSYS\t X

Legend:
  X    = Self
"""


@pytest.mark.parametrize(
    ("indexes", "link"), [([0, 1], "nvlink"), ([2, 3], "nvlink"), ([0, 1, 2, 3], "pcie"), ([0], ""), ([0, 7], "")]
)
def test_bridged_pairs_are_no_nvlink_for_all(indexes: list[int], link: str) -> None:
    """Cards with a bridge between two of them each: a group of four goes over PCIe, whatever the data sheet can do."""
    assert read_gpu_link(MATRIX, indexes) == link
    assert read_gpu_link("NVIDIA H100 80GB HBM3, 0", indexes) == ""  # a driver that answers something else


def test_a_card_that_others_use_is_said_and_stops_nothing() -> None:
    """Ray may give out another one, and a small model fits beside: the rank measures and knows."""
    nodes = {"a": node(1, gpus=card(used_mib=70000))}
    faults = judge(nodes, [], Wanted(ray_gpus={"a": 1.0}))
    assert [(fault.check, fault.level) for fault in faults] == [("gpu-occupied", "warn")]
    assert usable_nodes(nodes, faults) == ["a"]


def test_a_host_without_room_for_what_ranks_keep_in_it() -> None:
    """Weights and hidden states on the host: a rank's share that isn't there keeps the node out, several only warn."""
    assert examine(node(3), host_bytes=20 << 30) == []
    (fault,) = examine(node(3, free_memory_bytes=12 << 30), host_bytes=20 << 30)
    assert (fault.check, fault.level, fault.node) == ("host-memory", "fail", "10.0.0.3")
    assert "12.0 GiB of memory are free" in fault.found
    assert "20.0 GiB" in fault.found
    assert "--cpu-offload-gb" in fault.fix
    four = tuple(msgspec.structs.replace(CARD, uuid=f"GPU-3{index}", index=index) for index in range(4))
    (fault,) = examine(node(3, gpus=four), host_bytes=20 << 30)
    assert (fault.check, fault.level) == ("host-memory", "warn")
    assert "each of 4 ranks" in fault.found
    assert examine(node(3, gpus=four), host_bytes=20 << 30, num_ranks=2) == []
    assert examine(node(3, free_memory_bytes=12 << 30), host_bytes=20 << 30, device="cpu") == []
