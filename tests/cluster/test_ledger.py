"""A rank's bytes by purpose: parts of two memories, each with its sum, in words that are never 0.00 of something."""

import pytest

from argosy.cluster.metrics import Metrics
from argosy.cluster.protocol.ledger import describe_ledger, gb, gib

GIB, MIB = 2**30, 2**20
LEDGER = {"weights": 15 * GIB, "kv": 100 * GIB, "graphs": 3 * MIB, "others": 0, "free": 5 * GIB - 3 * MIB,
          "total": 120 * GIB, "host: kv": 64 * GIB, "host: weights": 12 * MIB}  # fmt: skip


def test_a_line_for_people_gives_small_parts_a_unit_of_their_own() -> None:
    assert describe_ledger(LEDGER) == (
        "weights 15.00 + kv 100.00 + graphs 3.0 MiB + free 5.00 = 120.00 GiB; host: kv 64.00 GiB + weights 12.00 MiB"
    )


def test_figures_for_dashboards_add_up_place_by_place() -> None:
    """sum by (rank, place) is what that memory holds: the device's sum is a figure of its own, none of the parts."""
    metrics = Metrics()
    metrics.ledgers = {0: LEDGER}
    values = {name: value for name, value in metrics.values({}).items() if name.startswith("argosy_rank_memory")}
    on = {place: sum(value for name, value in values.items() if f'place="{place}"' in name)
          for place in ("device", "host")}  # fmt: skip
    assert on["device"] == values['argosy_rank_memory_total_bytes{rank="0"}'] == 120 * GIB
    assert on["host"] == 64 * GIB + 12 * MIB
    assert values['argosy_rank_memory_bytes{rank="0",place="host",purpose="kv"}'] == 64 * GIB


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0.0 GiB"),
        (15 * GIB, "15.0 GiB"),
        (GIB // 5, "0.2 GiB"),
        (5 * MIB, "5.0 MiB"),
        (3000, "2.9 KiB"),
        (9, "0.0 KiB"),
    ],
)
def test_amounts_are_said_in_the_unit_that_says_something(num_bytes: int, text: str) -> None:
    assert gib(num_bytes) == text
    assert gb(430_000, 2) == "0.43 MB"
