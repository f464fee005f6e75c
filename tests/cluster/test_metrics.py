"""Names and figures."""

from argosy.cluster.metrics import METRIC_NAMES, Histogram, Metrics
from argosy.cluster.protocol.sampling import FinishReason


def test_a_value_is_counted_between_its_bounds() -> None:
    """Bounds belong to what is below them, as Prometheus has it."""
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    histogram.observe(1.5, 3)
    assert histogram.counts == [2, 4, 1]
    assert histogram.total == 0.5 + 1.0 + 1.5 + 9.0 + 4.5


def test_a_snapshot_has_every_name_of_the_table_and_no_other() -> None:
    """Ours, and vLLM's where they mean the same."""
    metrics = Metrics()
    metrics.finished[FinishReason.STOP] += 1
    metrics.refuse("overloaded")
    gauges = {name: 0.0 for name, metric in METRIC_NAMES.items() if metric.kind == "gauge"}
    found = {key.partition("{")[0] for key in (*metrics.values(gauges), *metrics.histograms())}
    assert found == {*METRIC_NAMES, *(metric.vllm for metric in METRIC_NAMES.values() if metric.vllm)}
    assert metrics.values(gauges)['vllm:request_success_total{finished_reason="stop"}'] == 1.0
    assert metrics.values(gauges)['argosy_requests_refused_total{code="overloaded"}'] == 1.0
