"""Some calls are never right here: what they take in would run as a program."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load"}


def sources() -> list[Path]:
    """Every Python file of the product (tests may do what they like, as long as they don't ship)."""
    rooms = ("cluster", "placement", "kernels", "workers", "deploy", "examples")
    return sorted([p for room in rooms for p in (ROOT / room).rglob("*.py")] + list((ROOT / "argosy").glob("*.py")))


def offences(source: str) -> list[str]:
    """What in this source may never be written."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"import {a.name}" for a in node.names if a.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in FORBIDDEN_MODULES:
            found.append(f"from {node.module}")
        elif isinstance(node, ast.Call):
            found += _offences_of_call(node)
    return found


def _offences_of_call(node: ast.Call) -> list[str]:
    name = ast.unparse(node.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    found = [name] if name in FORBIDDEN_CALLS else []
    if given.get("shell") == "True":
        found.append(f"{name}(shell=True)")
    if given.get("trust_remote_code") == "True":
        found.append(f"{name}(trust_remote_code=True)")
    if name == "torch.load":
        found.append("torch.load")
    if name == "yaml.load" and "Safe" not in given.get("Loader", ""):
        found.append("yaml.load without a safe loader")
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_nothing_that_comes_in_is_run(path: Path) -> None:
    """Weights, configs, messages and templates are data."""
    assert offences(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "eval('1')",
        "subprocess.run('ls', shell=True)",
        "torch.load('weights.bin')",
        "yaml.load(text)",
        "AutoConfig.from_pretrained(folder, trust_remote_code=True)",
    ],
)
def test_the_judge_can_say_no(source: str) -> None:
    """Each rule goes off on the line it is there for."""
    assert len(offences(source)) == 1


def test_no_absolute_path_of_a_machine_is_committed() -> None:
    """Folders are worked out where the program runs; a path of somebody's machine helps nobody else."""
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    for name in tracked.split():
        path = ROOT / name
        if not path.is_file() or path == Path(__file__).resolve():
            continue
        for text in (n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)):
            assert not (isinstance(text, str) and text.startswith(("/root/", "/home/", "/work/"))), f"{name}: {text}"
