"""What Prometheus reads when any of several doors may answer it."""

from argosy.deploy.metrics_export import EdgeMetrics, render


def figures(door: str) -> list[str]:
    edge = EdgeMetrics(door)
    edge.answered("chat_completions", 200)
    edge.answered("chat_completions", 200)
    return [line for line in render(None, edge, "m").decode().splitlines() if not line.startswith("#")]


def test_one_door_needs_no_name() -> None:
    """Figures have the labels that they always had."""
    assert 'argosy_http_requests_total{model_name="m",route="chat_completions",status="200"} 2.0' in figures("")
    assert 'argosy_http_requests_in_flight{model_name="m"} 0.0' in figures("")


def test_of_several_doors_each_counts_under_its_name() -> None:
    """A counter that sometimes is that of another process would seem to run backwards."""
    found = figures("a1")
    assert 'argosy_http_requests_total{model_name="m",door="a1",route="chat_completions",status="200"} 2.0' in found
    assert 'argosy_http_disconnects_total{model_name="m",door="a1"} 0.0' in found
    assert 'argosy_engine_healthy{model_name="m"} 0.0' in found  # of the engine, which is one
