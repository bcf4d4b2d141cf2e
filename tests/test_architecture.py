"""The direction of imports: the pure core stays pure, and each outside system has one room."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PURE = ("transport", "assessment", "amalgamation", "distillation")
# A room may import itself and the rooms named here.
ALLOWED = {
    "transport": set(),
    "cache": set(),
    "assessment": {"transport", "amalgamation"},
    "amalgamation": {"transport"},
    "distillation": {"transport", "amalgamation"},
    "data": set(),
    "models": {"data"},
    "engine": {"transport", "assessment", "amalgamation", "distillation", "data", "models"},
    "cluster": {"engine", "assessment", "tracking"},  # the last for the callback that others may use
    "tracking": {"models"},
    "report": set(),
}
COMMON = {"errors", "strict", "places"}


def modules_of(room: str) -> list[str]:
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "pipeline" / room).rglob("*.py"))
        if path.name != "__init__.py"
    ]


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return names


def loaded_after(imports: list[str]) -> set[str]:
    code = f"import sys, {', '.join(imports)}; print(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize("room", PURE)
def test_a_pure_room_brings_neither_ray_nor_mlflow_nor_settings(room: str) -> None:
    modules = modules_of(room)
    assert modules
    assert not {"ray", "mlflow", "pydantic"} & loaded_after(modules)


def test_the_engine_brings_neither_ray_nor_mlflow() -> None:
    assert not {"ray", "mlflow"} & loaded_after(modules_of("engine"))


def test_settings_and_command_line_do_not_import_the_heavy_packages() -> None:
    heavy = {"torch", "torchvision", "ray", "mlflow", "pyarrow"}
    assert not heavy & loaded_after(["pipeline.settings_files", "jobs.cli"])


@pytest.mark.parametrize(("package", "room"), [("ray", "cluster"), ("mlflow", "tracking")])
def test_one_room_imports_each_outside_system(package: str, room: str) -> None:
    for path in [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "jobs").rglob("*.py")]:
        if {name.split(".")[0] for name in imports_of(path)} & {package}:
            assert path.relative_to(ROOT / "pipeline").parts[0] == room, path


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_only_what_lies_under_them(room: str) -> None:
    allowed = ALLOWED[room] | COMMON | {room}
    for path in (ROOT / "pipeline" / room).rglob("*.py"):
        found = {name.split(".")[1] for name in imports_of(path) if name.startswith("pipeline.")}
        assert found <= allowed, f"{path.relative_to(ROOT)} imports {sorted(found - allowed)}"


def test_every_job_is_thin() -> None:
    for path in (ROOT / "jobs").glob("*.py"):
        if path.name not in {"shell.py", "zoo.py", "cli.py"}:
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 30, path
