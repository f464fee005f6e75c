"""Who may import whom. The table is the drawing of the house; to move a wall is to change a line here."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("cluster", "placement", "kernels", "workers", "deploy")

# room -> what it may import of ours, besides itself
MAY_IMPORT = {
    "cluster.protocol": (),
    "cluster": ("cluster.protocol",),
    "placement": ("cluster.protocol",),
    "kernels": (),
    "workers": ("cluster.protocol", "placement", "kernels"),
    "deploy": ("cluster", "cluster.protocol", "placement", "workers", "kernels"),
}
# rooms and files that may know a heavy library; everything else must work without it
TORCH_ROOMS = ("kernels", "workers")
TORCH_FILES = {"placement/process_groups.py", "placement/stage_transport.py", "placement/symmetric_memory.py"}
TORCH_FILES |= {"placement/stream_flags.py", "placement/card_wires.py"}
# deploy asks torch nothing about requests; these measure or describe the machine, inside functions
TORCH_FILES |= {"deploy/preflight_torch.py", "deploy/bench_peers.py", "deploy/bench_models.py"}
RAY_FILES = {
    "cluster/ray_executor.py",
    "cluster/driver_actor.py",
    "placement/ray_cluster.py",
    "workers/worker_actor.py",
    "deploy/ray_session.py",
    "deploy/ray_launch.py",
    "deploy/preflight.py",
    "deploy/doors.py",
    "deploy/end_engine.py",
    "deploy/serve_app.py",
    "deploy/server.py",
}


def files() -> list[Path]:
    """Every source file of the rooms."""
    return sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def name_of(path: Path) -> str:
    """`cluster.protocol.errors` for cluster/protocol/errors.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(name: str) -> str:
    """The room of a module; the protocol is a room of its own."""
    return "cluster.protocol" if name.startswith("cluster.protocol") else name.split(".")[0]


def imports(path: Path, *, load_time_only: bool = False) -> Iterator[str]:
    """Full names of what a file imports; with `load_time_only` those that run when it is loaded."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node, is_deferred in _walk(tree, False):
        if load_time_only and is_deferred:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the room; write the full name"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = node.module and node.module.startswith("argosy") and _exists(full)
                yield full if is_module else str(node.module)


def _exists(full: str) -> bool:
    path = ROOT.joinpath(*full.split(".")[1:])
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def _walk(node: ast.AST, is_deferred: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        is_type_only = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        inside = is_deferred or is_type_only or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        yield child, inside
        yield from _walk(child, inside)


def ours(path: Path, **options: bool) -> list[str]:
    """Modules of ours that a file imports, without the leading `argosy.`."""
    return [name.removeprefix("argosy.") for name in imports(path, **options) if name.startswith("argosy.")]


def forbidden_rooms(path: Path) -> list[str]:
    """Imports that cross a wall."""
    room = room_of(name_of(path))
    return [name for name in ours(path) if room_of(name) not in (room, *MAY_IMPORT[room])]


def heavy(path: Path) -> list[str]:
    """Heavy libraries a file has no business to know."""
    where = path.relative_to(ROOT).as_posix()
    roots = {name.split(".")[0] for name in imports(path)}
    found = []
    if roots & {"torch", "triton"} and where.split("/")[0] not in TORCH_ROOMS and where not in TORCH_FILES:
        found.append("torch")
    if "ray" in roots and where not in RAY_FILES:
        found.append("ray")
    return found


@pytest.mark.parametrize("path", files(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_file_stays_in_its_room(path: Path) -> None:
    """The scheduler that imports a model, or a kernel that reads the config, is a wall broken."""
    assert forbidden_rooms(path) == []
    assert heavy(path) == [], "a heavy library in a file that must work without it"


@pytest.mark.parametrize("path", files(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_rooms_are_named_through_the_package(path: Path) -> None:
    """A bare `import kernels` is a different module, and breaks transformers besides."""
    assert [name for name in imports(path) if name.split(".")[0] in ROOMS] == []


def test_no_import_cycles() -> None:
    """What is loaded when a file is loaded forms no circle."""
    graph = {name_of(path): ours(path, load_time_only=True) for path in files()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name in done or name not in graph:
            return
        for target in graph[name]:
            if target != name:
                visit(target, (*trail, name))
        done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_the_words_at_the_bottom_need_little() -> None:
    """Whoever speaks the protocol needs msgspec and nothing else."""
    for path in sorted((ROOT / "cluster" / "protocol").glob("*.py")):
        foreign = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"argosy"}
        assert foreign <= {"msgspec"}, f"{path.name}: {foreign}"


def test_the_judge_can_say_no(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that nothing can break is no rule."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "cluster").mkdir()
    bad = tmp_path / "cluster" / "scheduler.py"
    bad.write_text("import torch\nimport ray\nfrom argosy.placement.plan import RankInfo\n")
    assert heavy(bad) == ["torch", "ray"]
    assert forbidden_rooms(bad) == ["placement.plan"]
