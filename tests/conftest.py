"""For every test: markers from folders, and an environment that is the same for all."""

import importlib.util
from pathlib import Path

import pytest

# What a folder needs to be of any use. The scheduler and the planner need neither, and that is itself tested.
_NEEDS = {"workers": ("torch",), "kernels": ("torch",), "deploy": ("httpx",), "end_to_end": ("torch", "ray")}
_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The folder is the marker."""
    for item in items:
        if (_HERE / "end_to_end") in item.path.parents:
            item.add_marker(pytest.mark.end_to_end)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out the folders whose libraries are not installed; `pytest_report_header` says which and why."""
    return True if collection_path.parent == _HERE and _missing(collection_path.name) else None


def pytest_report_header() -> list[str]:
    """One line for each folder that can't run here."""
    return [f"left out: tests/{room} ({', '.join(_missing(room))} not installed)" for room in _NEEDS if _missing(room)]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A test must not depend on what the person who runs it has set, nor reach the network."""
    for name in ("ARGOSY_API_KEY", "OPENAI_API_KEY", "RAY_ADDRESS", "http_proxy", "https_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))  # where servers keep jobs


def _missing(room: str) -> list[str]:
    return [name for name in _NEEDS.get(room, ()) if importlib.util.find_spec(name) is None]
