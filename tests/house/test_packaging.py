"""What a user installs is what lies in the tree."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import argosy

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("cluster", "placement", "kernels", "workers", "deploy")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_folder_with_code_is_a_package_that_ships() -> None:
    """A folder that pyproject does not name works in the tree and is missing after `pip install`."""
    folders = {p.parent.relative_to(ROOT) for room in ROOMS for p in (ROOT / room).rglob("*.py")}
    expected = {"argosy"} | {f"argosy.{'.'.join(folder.parts)}" for folder in folders}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == expected


def test_every_package_says_the_rule_of_its_room() -> None:
    """The docstring, and nothing else, stands in __init__.py."""
    for room in ROOMS:
        for path in (ROOT / room).rglob("__init__.py"):
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            assert lines, path
            assert lines[0].startswith('"""'), path


def test_the_rooms_are_links_beside_the_face() -> None:
    """`argosy.cluster` and the folder cluster/ are the same files."""
    for room in ROOMS:
        assert (ROOT / "argosy" / room).resolve() == ROOT / room


def test_a_script_beside_a_clone_finds_the_package_and_not_the_folder(tmp_path: Path) -> None:
    """Python looks beside the script first, where the clone lies under the package's own name."""
    (tmp_path / "argosy").symlink_to(ROOT)
    assert (ROOT / "src" / "argosy").resolve() == ROOT / "argosy"
    assert PROJECT["tool"]["setuptools"]["package-dir"] == {"": "src"}
    script = tmp_path / "script.py"
    script.write_text("from argosy import SamplingParams; print(SamplingParams(max_tokens=3).max_tokens)")
    environment = {"PYTHONPATH": str(ROOT / "src"), "PATH": os.environ["PATH"]}
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=False)
    assert run.stdout.strip() == "3", run.stderr


def test_public_names_grow_on_purpose() -> None:
    """What `from argosy import ...` offers is a promise."""
    assert set(argosy.__all__) == {
        "LLM",
        "AsyncClient",
        "Client",
        "CompletionOutput",
        "Job",
        "RequestOutput",
        "SamplingParams",
        "__version__",
    }


@pytest.mark.parametrize("name", sorted(set(argosy.__all__) - {"__version__"}))
def test_a_public_name_can_be_imported(name: str) -> None:
    """A name in __all__ that leads nowhere is found by the first user otherwise."""
    assert getattr(argosy, name).__name__ == name


def test_importing_the_package_costs_nothing() -> None:
    """`argosy --help` and a client must not pay for torch and Ray."""
    code = "import sys, argosy, argosy.deploy.cli, argosy.deploy.client; argosy.SamplingParams(); argosy.LLM"
    code += "; print([m for m in ('torch', 'ray', 'transformers', 'fastapi') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "[]"


def test_the_version_is_said_once() -> None:
    """pyproject and the package agree."""
    assert PROJECT["project"]["version"] == argosy.__version__


def test_the_lock_covers_what_we_ask_for() -> None:
    """Every dependency except torch and triton (the machine's choice) has one exact version."""
    extras = PROJECT["project"]["optional-dependencies"]
    asked = [*PROJECT["project"]["dependencies"], *extras["serve"], *extras["dev"]]
    names = {text.split(">")[0].split("[")[0].lower().replace("_", "-") for text in asked} - {"torch", "triton"}
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    locked = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert names <= locked, names - locked


def test_a_wheel_holds_the_rooms_and_the_default_model(tmp_path: Path) -> None:
    """The links become real files, and `argosy serve` works without the tree."""
    tree = tmp_path / "tree"  # a copy: what an earlier build left in the tree would find its way into the wheel
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    built = subprocess.run([*command, tree], capture_output=True, text=True, timeout=240, check=False)
    assert built.returncode == 0, built.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for name in ("cluster/protocol/messages.py", "deploy/cli.py", "py.typed", "default_model/config.json"):
        assert f"argosy/{name}" in names
    assert "argosy/kernels/tuned/nvidia_h200.json" in names
    assert "argosy/placement/model_configs/llama-3.1-8b/config.json" in names
    assert "argosy/placement/calibrations/nvidia_h200.json" in names
    assert any(n.startswith("argosy/default_model/") and n.endswith(".safetensors") for n in names)
