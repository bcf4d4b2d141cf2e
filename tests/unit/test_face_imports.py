"""`import pipeline as faculty` is cheap, and every name is where type checkers look for it."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline as faculty

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "torchvision", "ray", "mlflow", "pyarrow", "pydantic", "matplotlib", "numpy"}


def loaded_after(code: str) -> set[str]:
    result = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*{{name.split('.')[0] for name in sys.modules}})"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(result.stdout.split())


def test_importing_the_package_imports_nothing_else() -> None:
    assert not HEAVY & loaded_after("import pipeline as faculty; dir(faculty)")


def test_the_calls_bring_neither_torch_nor_ray_nor_mlflow_before_they_are_made() -> None:
    names = "; ".join(f"faculty.{name}" for name in faculty.__all__)
    loaded = loaded_after(f"import pipeline as faculty; {names}")
    assert not {"torch", "ray", "mlflow", "pyarrow", "matplotlib"} & loaded


def test_every_name_is_loaded_on_demand_and_known_to_type_checkers() -> None:
    tree = ast.parse((ROOT / "pipeline" / "__init__.py").read_text(encoding="utf-8"))
    (typed,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == faculty._HOMES
    assert sorted(seen) == faculty.__all__
    for name, home in seen.items():
        assert getattr(faculty, name) is getattr(importlib.import_module(home), name)
        assert name in dir(faculty)


def test_an_unknown_name_is_an_attribute_error_and_rooms_stay_importable() -> None:
    with pytest.raises(AttributeError, match="no attribute 'asses'"):
        faculty.asses  # noqa: B018
    assert importlib.import_module("pipeline.stages.assess").Assess.name == "assess"


def test_no_room_knows_the_face() -> None:
    for path in [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "jobs").rglob("*.py")]:
        if path.parent.name != "face" and path != ROOT / "pipeline" / "__init__.py":
            assert "pipeline.face" not in path.read_text(encoding="utf-8"), path
