"""Clusters from files and from Ray, and what a mistake in a file is answered."""

from pathlib import Path
from typing import Any

import pytest

from argosy.cluster.protocol.errors import ConfigError
from argosy.placement.data_sheets import DATA_SHEETS, find_data_sheet
from argosy.placement.topology import Gpu, Link, NodeLink, NodeProbe
from argosy.placement.topology_sources import parse_topology, read_topology, topology_from_ray


def test_a_file_becomes_nodes_gpus_and_links() -> None:
    """Counts are spelt out, units become bytes and GB/s, and nodes are in natural order."""
    topology = parse_topology(
        {
            "network": "100Gbit",
            "nodes": [
                {"name": "n", "count": 11, "gpus": "8 x H200", "price_per_hour": 80},
                {"name": "old", "gpus": [{"model": "A100-40GB", "count": 2, "free_gib": 10}, "L4"], "gpu_link": "pcie"},
            ],
            "links": [{"between": ["n-0", "n-1"], "gbytes_per_second": 90, "latency_us": 5}],
        }
    )
    assert [node.node_id for node in topology.nodes][:3] == ["n-0", "n-1", "n-2"]
    assert topology.nodes[10].node_id == "n-10"
    assert topology.network.gbytes_per_second == pytest.approx(11.25)
    assert topology.link_between("n-1", "n-0").gbytes_per_second == 90
    assert topology.link_between("n-1", "n-2") == topology.network
    old = topology.node("old")
    assert [gpu.model for gpu in old.gpus] == ["A100-40GB", "A100-40GB", "L4"]
    assert [gpu.index for gpu in old.gpus] == [0, 1, 2]
    assert old.gpus[0].usable_bytes == 10 * 2**30
    assert old.gpu_link is not None
    assert old.gpu_link.kind == "pcie"
    for text in ("2 x H200, A100-40GB", "2xH200+A100-40GB"):  # it was two of A100-80GB
        (node,) = parse_topology({"nodes": [{"gpus": text}]}).nodes
        assert [gpu.model for gpu in node.gpus] == ["H200", "H200", "A100-40GB"]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([], "the file: must be a mapping"),
        ({"nodes": "8 x H200"}, "nodes: must be a list"),
        ({"nodes": [{"gpus": "8 x H900"}]}, r"nodes\[0\].gpus='H900': unknown GPU model; known: A10G"),
        ({"nodes": [{"gpus": "-1 x H200"}]}, r"nodes\[0\].gpus='-1 x H200': unknown GPU model"),
        ({"nodes": [{"gpus": "1e9 x H200"}]}, r"nodes\[0\].gpus='1e9 x H200': unknown GPU model"),
        ({"nodes": [{"gpus": "2 x H200 x 2"}]}, r"nodes\[0\].gpus='2 x H200 x 2': unknown GPU model"),
        ({"nodes": [{"gpus": "2 x 3 x H200"}]}, r"nodes\[0\].gpus='2 x 3 x H200': unknown GPU model"),
        ({"nodes": [{"gpus": "8 x H200, A100,"}]}, r"nodes\[0\].gpus\[2\]='': unknown GPU model"),
        ({"nodes": [{"gpus": "8 x H200", "cuont": 2}]}, "unknown key 'cuont'"),
        ({"nodes": [{"gpus": "800 x H200"}]}, r"count=800: must be a number from 1 to 64"),
        ({"nodes": [{"gpus": "1 x L4", "count": 0}]}, r"nodes\[0\].count=0"),
        ({"nodes": [{"name": "a", "gpus": "L4"}, {"name": "a", "gpus": "L4"}]}, "two are named 'a'"),
        ({"nodes": [{"gpus": "L4"}], "network": "fast"}, "network='fast': must be such as '100Gbit'"),
        ({"nodes": [{"gpus": "L4", "gpu_link": "nvlink"}]}, "has none by its data sheet"),
        ({"nodes": [{"gpus": "L4"}], "links": [{"between": ["node-0", "b"]}]}, "no node is named 'b'"),
        ({"nodes": [{"gpus": "L4", "memory_gib": "much"}]}, "memory_gib='much'"),
        ({"nodes": [{"gpus": [{"model": "L4", "memory_gib": True}]}]}, "memory_gib=True"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_place(content: Any, named: str) -> None:
    """Place, value, and what would do."""
    with pytest.raises(ConfigError, match=named):
        parse_topology(content)


@pytest.mark.parametrize("text", ["8 x H200", "8xh200", "8 H200", "8 * H200", "H200 x 8", "H200:8", " 8  NVIDIA H200 "])
def test_a_number_of_cards_is_read_on_either_side(text: str) -> None:
    """Names are found within what drivers call cards; a number that was not read there was one card, without a word."""
    (node,) = parse_topology({"nodes": [{"gpus": text}]}).nodes
    assert [gpu.model for gpu in node.gpus] == ["H200"] * 8


def test_a_file_that_is_no_yaml_or_not_there(tmp_path: Path) -> None:
    """The file's name comes first."""
    bad = tmp_path / "bad.yaml"
    bad.write_text("nodes: [", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bad\.yaml is not YAML"):
        read_topology(bad)
    with pytest.raises(ConfigError, match="No such file"):
        read_topology(tmp_path / "none.yaml")


def ray_node(name: str, alive: bool = True, **resources: float) -> dict[str, Any]:
    """As `ray.nodes()` gives it."""
    return {
        "NodeID": name,
        "Alive": alive,
        "NodeManagerAddress": f"10.0.0.{name}",
        "Resources": resources,
        "Labels": {},
    }


def test_what_an_operator_says_of_the_network_counts_where_all_nodes_say_it() -> None:
    """TCP measured between two probes says nothing of RDMA or NVLink between ranks; one silent node, and it counts."""
    wire = NodeLink(first="1", second="2", link=Link(kind="network", gbytes_per_second=3, latency_us=30, measured=True))
    nodes = [ray_node("1", CPU=8), ray_node("2", CPU=8)]
    nodes[0]["Labels"] = {"argosy-network": "900GB"}
    assert topology_from_ray(nodes, links=[wire]).link_between("1", "2") == wire.link
    nodes[1]["Labels"] = {"argosy-network": "400GB"}
    assert topology_from_ray(nodes, links=[wire]).link_between("1", "2").gbytes_per_second == 400
    nodes[1]["Labels"] = {"argosy-network": "fast"}
    with pytest.raises(ConfigError, match=r"label argosy-network of 10\.0\.0\.2='fast': must be such as"):
        topology_from_ray(nodes)


def test_ray_and_probes_make_a_topology() -> None:
    """A probe's word counts; without one the accelerator type says what there is; the dead are left out."""
    seen = Gpu(index=0, model="NVIDIA H200", memory_bytes=150_000_000_000, free_bytes=75_000_000_000, uuid="GPU-1")
    wire = NodeLink(first="1", second="2", link=Link(kind="network", gbytes_per_second=40, latency_us=7, measured=True))
    topology = topology_from_ray(
        [
            ray_node("2", CPU=8, GPU=2, **{"accelerator_type:A100": 1}),
            ray_node("1", CPU=8, GPU=1),
            ray_node("3", alive=False, GPU=8),
        ],
        {"1": NodeProbe(gpus=(seen,))},
        links=[wire],
    )
    assert [node.node_id for node in topology.nodes] == ["1", "2"]
    assert topology.node("1").gpus == (seen,)
    assert [gpu.model for gpu in topology.node("2").gpus] == ["A100-80GB", "A100-80GB"]
    assert topology.link_between("2", "1").measured


@pytest.mark.parametrize(
    ("driver", "sheet"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA B200", "B200"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_drivers_names_find_their_sheets(driver: str, sheet: str) -> None:
    """What nvidia-smi prints is what probes report."""
    found = find_data_sheet(driver)
    assert found is not None
    assert found.name == sheet


def test_sheets_are_plausible() -> None:
    """No unit is off by a thousand."""
    assert find_data_sheet("GeForce 256") is None
    for name, sheet in DATA_SHEETS.items():
        if name != "CPU":
            assert 20e9 < sheet.memory_bytes < 210e9
            assert 250 < sheet.gbytes_per_second < 10_000
            assert sheet.bf16_tflops <= sheet.fp8_tflops
