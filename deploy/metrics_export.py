"""Prometheus text from the driver's figures and from this edge's own. Labels come from closed sets only."""

from collections.abc import Iterable, Mapping
from typing import Final

from argosy.cluster.metrics import METRIC_NAMES, MetricName
from argosy.cluster.protocol.messages import StatsReply

CONTENT_TYPE: Final = b"text/plain; version=0.0.4; charset=utf-8"
_OF_VLLM: Final = {metric.vllm: metric for metric in METRIC_NAMES.values() if metric.vllm}
EDGE_METRICS: Final[Mapping[str, MetricName]] = {
    "argosy_http_requests_total": MetricName("counter", "HTTP requests that were answered, by route and status."),
    "argosy_http_requests_in_flight": MetricName("gauge", "HTTP requests that are being served."),
    "argosy_http_disconnects_total": MetricName("counter", "Requests whose client left or stopped reading."),
    "argosy_http_broken_streams_total": MetricName("counter", "Streams that ended with an error event."),
    "argosy_engine_healthy": MetricName("gauge", "Whether the engine makes progress."),
}


class EdgeMetrics:
    """What this edge counts itself; `door` is its name where a scrape may meet any of several."""

    def __init__(self, door: str = "") -> None:
        self._door = f'door="{_escape(door)}"' if door else ""
        self.in_flight = 0
        self.disconnects = 0
        self.broken_streams = 0
        self._answered: dict[tuple[str, int], int] = {}

    def answered(self, route: str, status: int) -> None:
        """A request of `route` (a name from the routing table, or "other") ended with `status`."""
        key = (route, status)
        self._answered[key] = self._answered.get(key, 0) + 1

    def values(self) -> dict[str, float]:
        """By name with labels, as `StatsReply.values` is."""
        found: dict[str, float] = {
            "argosy_http_requests_in_flight": self.in_flight,
            "argosy_http_disconnects_total": self.disconnects,
            "argosy_http_broken_streams_total": self.broken_streams,
        }
        for (route, status), count in sorted(self._answered.items()):
            found[f'argosy_http_requests_total{{route="{route}",status="{status}"}}'] = count
        return {self._with_door(name): value for name, value in found.items()} if self._door else found

    def _with_door(self, name: str) -> str:
        plain, _, labels = name.partition("{")
        return f"{plain}{{{self._door},{labels}" if labels else f"{plain}{{{self._door}}}"


def render(stats: StatsReply | None, edge: EdgeMetrics, model_name: str) -> bytes:
    """The text that Prometheus reads. Without `stats` (the driver does not answer) only the edge's figures."""
    values: dict[str, float] = {**(stats.values if stats else {}), **edge.values()}
    values["argosy_engine_healthy"] = float(stats is not None and stats.healthy)
    common = f'model_name="{_escape(model_name)}"'
    by_name: dict[str, list[tuple[str, float]]] = {}
    for key, value in values.items():
        name, _, labels = key.partition("{")
        by_name.setdefault(name, []).append((labels.rstrip("}"), value))
    lines: list[str] = []
    for name, rows in by_name.items():
        lines += _head(name, "counter" if name.endswith("_total") else "gauge")
        lines += [f"{name}{{{_labels(name, common, labels)}}} {_number(value)}" for labels, value in rows]
    for key, (bounds, counts, total) in (stats.histograms if stats else {}).items():
        name, _, labels = key.partition("{")
        lines += _head(name, "histogram")
        lines += _histogram(name, _labels(name, common, labels.rstrip("}")), bounds, counts, total)
    return ("\n".join(lines) + "\n").encode()


def _head(name: str, kind: str) -> list[str]:
    metric = METRIC_NAMES.get(name) or _OF_VLLM.get(name) or EDGE_METRICS.get(name)
    if metric is None:
        return [f"# TYPE {name} {kind}"]
    return [f"# HELP {name} {metric.help}", f"# TYPE {name} {metric.kind}"]


def _labels(name: str, common: str, more: str) -> str:
    engine = 'engine="0"' if name.startswith("vllm:") else ""
    return ",".join(filter(None, (common, engine, more)))


def _histogram(name: str, labels: str, bounds: Iterable[float], counts: list[int], total: float) -> list[str]:
    lines, running = [], 0
    for bound, count in zip((*bounds, float("inf")), counts, strict=True):
        running += count
        edge = "+Inf" if bound == float("inf") else _number(bound)
        lines.append(f'{name}_bucket{{{labels},le="{edge}"}} {running}')
    return [*lines, f"{name}_sum{{{labels}}} {_number(total)}", f"{name}_count{{{labels}}} {running}"]


def _number(value: float) -> str:
    return repr(float(value))


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
