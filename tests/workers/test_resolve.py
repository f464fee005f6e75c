"""From a hub name to a folder: revisions, folders of one's own, and a node that lacks the folder of the door."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from argosy.cluster.protocol.errors import WeightError
from argosy.workers.loading.resolve import WANTED_FILES, commit_of, resolve_model

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The hub library's cache with two commits of a model: main is the new one, v1 the old one."""
    repo = tmp_path / "models--org--model"
    for branch, commit in (("main", NEW), ("v1", OLD)):
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        (repo / "refs" / branch).write_text(commit)
        folder = repo / "snapshots" / commit
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(f'{{"of": "{branch}"}}')
    return tmp_path


def test_a_revision_is_found_in_the_folder_that_was_named(cache: Path) -> None:
    """The real library, without a network: a branch, a tag, a commit, and none."""
    for revision, commit in ((None, NEW), ("main", NEW), ("v1", OLD), (OLD, OLD)):
        folder = resolve_model("org/model", revision=revision, download_dir=str(cache))
        assert folder.name == commit_of(folder) == commit
    with pytest.raises(WeightError, match=r"^org/model@v2: is no folder here, not in the Hugging Face cache"):
        resolve_model("org/model", revision="v2", download_dir=str(cache))


def test_a_node_without_the_doors_folder_finds_the_same_commit_by_name(cache: Path, tmp_path: Path) -> None:
    """The path is that of another machine; the name and the commit travel with it."""
    folder = resolve_model("/other/machine/snapshots/x", hub_name="org/model", revision=OLD, download_dir=str(cache))
    assert folder.name == OLD
    here = tmp_path / "here"
    here.mkdir()
    assert resolve_model(str(here), hub_name="org/model", revision=OLD) == here
    assert commit_of(here) is None


def response(status: int, code: str) -> Any:
    """What the library keeps of the hub's answer."""
    httpx = pytest.importorskip("httpx")
    request = httpx.Request("GET", "https://hub.invalid/api/models/org/model")
    return httpx.Response(status, headers={"X-Error-Code": code}, request=request)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: errors.GatedRepoError("no", response=response(403, "GatedRepo")), "only some read it"),
        (lambda: errors.RevisionNotFoundError("no", response=response(404, "RevisionNotFound")), "no such revision"),
        (lambda: errors.RepositoryNotFoundError("no", response=response(401, "RepoNotFound")), "no such model is on"),
        (lambda: errors.LocalEntryNotFoundError("no"), "can't be downloaded"),
        (lambda: OSError("disk"), "can't be downloaded"),
    ],
)
def test_what_the_hub_says_becomes_one_line(
    make: Callable[[], Exception], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the name and what to do; never the library's page of text."""

    def refuse(name: str, **options: Any) -> str:
        raise make()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(WeightError, match=told) as caught:
        resolve_model("org/model", revision="v9")
    assert str(caught.value).startswith("org/model@v9: ")
    assert "\n" not in str(caught.value)


def test_what_is_asked_of_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No code of strangers is fetched; a commit that is here needs no network, a branch is asked for."""
    asked: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        asked.append(options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    resolve_model("org/model", revision="v1", download_dir="/models")
    resolve_model("org/model", revision=OLD)
    assert [found["local_files_only"] for found in asked] == [False, True]
    assert (asked[0]["revision"], asked[0]["cache_dir"]) == ("v1", Path("/models"))
    assert asked[1]["cache_dir"] is None
    assert not any(pattern.endswith((".py", ".bin", ".pt")) for pattern in WANTED_FILES)


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("llama-3.1-8b", "such as meta-llama/Llama-3.1-8B, or a folder"),
        ("Qwen3-8B", "such as Qwen/Qwen3-8B, or a folder"),
        ("gpt3-175b", "no weights of it are on the hub: give a folder"),
    ],
)
def test_a_name_of_the_planner_is_answered_with_the_name_to_give(name: str, fix: str) -> None:
    """Who just read `argosy plan llama-3.1-8b` types the same after `argosy serve`; no hub has to be asked."""
    with pytest.raises(WeightError, match="is a name of 'argosy plan'") as caught:
        resolve_model(name)
    assert fix in str(caught.value)
