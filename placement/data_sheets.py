"""What makers say of their devices, as a table: memory, bandwidth, dense arithmetic, and the wires between neighbours.

Peak figures; how much of them is reached stands in the calibration (`placement/calibration.py`). Rates are in units
of 10^9 or 10^12 a second, dense (no 2:4 sparsity), links one way. Memory is what the driver's own tool lists, in MiB.
"""

import re
from typing import Final

import msgspec

from argosy.placement.topology import Link

MIB: Final = 2**20
DRIVER_MIB: Final = 616  # listed, but not given to programs: an H200 lists 143771 and torch sees 143155


class DataSheet(msgspec.Struct, frozen=True, kw_only=True):
    """One device model."""

    name: str
    memory_mib: int
    gbytes_per_second: float  # of its memory
    bf16_tflops: float
    fp8_tflops: float  # where there is no FP8 unit: that of bf16
    link: Link  # to its neighbours in a node, as it is usually sold
    pcie_gbytes_per_second: float  # to the host, one way
    aliases: tuple[str, ...] = ()  # parts of the name that the driver reports, in lower case

    @property
    def memory_bytes(self) -> int:
        """Bytes that a program is given on an idle device."""
        return (self.memory_mib - DRIVER_MIB) * MIB


def _nvlink(gbytes_per_second: float) -> Link:
    return Link(kind="nvlink", gbytes_per_second=gbytes_per_second, latency_us=3.0)


def _pcie(gbytes_per_second: float) -> Link:
    return Link(kind="pcie", gbytes_per_second=gbytes_per_second, latency_us=8.0)


DATA_SHEETS: Final = {
    sheet.name: sheet
    for sheet in (
        # NVIDIA A10G, the AWS G5 variant of the A10: 600 GB/s, 70 TFLOP/s dense tensor FP16, PCIe 4.0 x16
        DataSheet(
            name="A10G",
            memory_mib=23028,
            gbytes_per_second=600,
            bf16_tflops=70,
            fp8_tflops=70,
            link=_pcie(26),
            pcie_gbytes_per_second=26,
            aliases=("a10g", "nvidia a10"),
        ),
        # NVIDIA L4 data sheet: 300 GB/s, 242 TFLOP/s BF16 and 485 FP8 with sparsity, halved here; PCIe 4.0 x16
        DataSheet(
            name="L4",
            memory_mib=23034,
            gbytes_per_second=300,
            bf16_tflops=121,
            fp8_tflops=242,
            link=_pcie(26),
            pcie_gbytes_per_second=26,
            aliases=("nvidia l4",),
        ),
        # NVIDIA L40S data sheet: 864 GB/s, 362.05 TFLOP/s BF16 dense, 733 FP8 dense, PCIe 4.0 x16, no NVLink
        DataSheet(
            name="L40S",
            memory_mib=46068,
            gbytes_per_second=864,
            bf16_tflops=362,
            fp8_tflops=733,
            link=_pcie(26),
            pcie_gbytes_per_second=26,
            aliases=("l40s",),
        ),
        # NVIDIA A100 data sheet (SXM): 1555 and 2039 GB/s, 312 TFLOP/s BF16 dense, no FP8, NVLink 600 GB/s both ways
        DataSheet(
            name="A100-40GB",
            memory_mib=40960,
            gbytes_per_second=1555,
            bf16_tflops=312,
            fp8_tflops=312,
            link=_nvlink(300),
            pcie_gbytes_per_second=26,
            aliases=("a100-sxm4-40gb", "a100-pcie-40gb", "a100-40"),
        ),
        DataSheet(
            name="A100-80GB",
            memory_mib=81920,
            gbytes_per_second=2039,
            bf16_tflops=312,
            fp8_tflops=312,
            link=_nvlink(300),
            pcie_gbytes_per_second=26,
            aliases=("a100-sxm4-80gb", "a100-80gb", "a100 80gb", "a100"),
        ),
        # NVIDIA H100 SXM data sheet: 3.35 TB/s, 989 TFLOP/s BF16 and 1979 FP8 dense, NVLink 900 GB/s both ways, PCIe 5
        DataSheet(
            name="H100",
            memory_mib=81559,
            gbytes_per_second=3350,
            bf16_tflops=989,
            fp8_tflops=1979,
            link=_nvlink(450),
            pcie_gbytes_per_second=55,
            aliases=("h100",),
        ),
        # NVIDIA H200 SXM data sheet: 4.8 TB/s, arithmetic and links of the H100; host link 55 GB/s as measured
        DataSheet(
            name="H200",
            memory_mib=143771,
            gbytes_per_second=4800,
            bf16_tflops=989,
            fp8_tflops=1979,
            link=_nvlink(450),
            pcie_gbytes_per_second=55,
            aliases=("h200",),
        ),
        # NVIDIA HGX B200 data sheet, an eighth of it: 180 GB, 7.7 TB/s, 2.25 and 4.5 PFLOP/s dense, NVLink 1.8 TB/s
        DataSheet(
            name="B200",
            memory_mib=183359,
            gbytes_per_second=7700,
            bf16_tflops=2250,
            fp8_tflops=4500,
            link=_nvlink(900),
            pcie_gbytes_per_second=55,
            aliases=("b200",),
        ),
        # AMD Instinct MI300X data sheet: 192 GB, 5.3 TB/s, 1307.4 and 2614.9 TFLOP/s dense; 7 links of 64 GB/s each way
        DataSheet(
            name="MI300X",
            memory_mib=196592,
            gbytes_per_second=5300,
            bf16_tflops=1307,
            fp8_tflops=2615,
            link=Link(kind="xgmi", gbytes_per_second=448, latency_us=4.0),
            pcie_gbytes_per_second=55,
            aliases=("mi300x",),
        ),
        # A CPU rank: a share of the host. Figures of one core of a Zen 4 (benchmarks/results/cpu.jsonl); the memory of
        # such a device is the node's, or what the file gives.
        DataSheet(
            name="CPU",
            memory_mib=8 * 1024 + DRIVER_MIB,
            gbytes_per_second=20,
            bf16_tflops=0.2,
            fp8_tflops=0.2,
            link=Link(kind="memory", gbytes_per_second=4, latency_us=40.0),
            pcie_gbytes_per_second=20,
            aliases=("cpu",),
        ),
    )
}


def find_data_sheet(name: str) -> DataSheet | None:
    """The sheet of a model by its short name or by what the driver calls it; None when there is none."""
    if name.upper() in DATA_SHEETS:
        return DATA_SHEETS[name.upper()]
    wanted = name.lower()
    for sheet in DATA_SHEETS.values():
        if wanted == sheet.name.lower() or wanted in sheet.aliases:
            return sheet
    found = [
        (len(alias), sheet)
        for sheet in DATA_SHEETS.values()
        for alias in sheet.aliases
        if re.search(rf"(?<![a-z0-9]){re.escape(alias)}(?![a-z0-9])", wanted)  # "l4" is no part of "l40s"
    ]
    return max(found, key=lambda pair: pair[0])[1] if found else None
