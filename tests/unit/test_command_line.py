"""The command line: help, suggestions, exit codes, output for machines, and no colours in a pipe."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from jobs.cli import app, main
from tests.tiny import make_data, make_settings, make_zoo

ROOT = Path(__file__).parents[2]


def faculty(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {
        key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS")
    }
    command = [sys.executable, "-m", "jobs.cli", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=kept | {"COLUMNS": "110"} | environment
    )


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process; a process of its own costs seconds."""
    monkeypatch.setenv("COLUMNS", "110")

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["faculty", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_data(folder, per_class=40)
    make_zoo(folder, ("untrained", "blind"))
    return make_settings(folder, tracking={"enabled": False}, register={"enabled": False}).parent


@pytest.fixture(scope="module")
def help_text() -> str:
    result = faculty("--help")
    assert result.returncode == 0
    assert "\x1b" not in result.stdout
    return result.stdout


def commands() -> dict[str, typer.core.TyperCommand]:
    return typer.main.get_command(app).commands  # type: ignore[attr-defined,return-value]


def test_help_groups_every_command_and_says_a_word_on_each(help_text: str) -> None:
    for name, command in commands().items():
        assert re.search(rf"^│ {name} +\S", help_text, re.MULTILINE), name
        assert command.rich_help_panel and not repr(command.rich_help_panel).startswith("<"), name
    for panel in {str(command.rich_help_panel) for command in commands().values()}:
        assert f"─ {panel} ─" in help_text
    assert "--install-completion" in help_text
    assert "faculty init" in help_text  # an example


def test_the_exit_codes_are_told_and_true(help_text: str) -> None:
    from pipeline.errors import FacultyError, Interrupted, UserError

    guide = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for code in (0, FacultyError.exit_code, UserError.exit_code, Interrupted.exit_code):
        assert re.search(rf"\b{code}\b", help_text.split("Exit codes")[1]), code
        assert re.search(rf"^\| {code} \|", guide, re.MULTILINE), code


def test_the_guide_names_every_command_and_no_other() -> None:
    guide = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^\| `faculty (\w+)", guide, re.MULTILINE))
    assert told == set(commands())


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [
        (("asess",), "assess"),
        (("zoo", "chekc"), "check"),
        (("run", "--verbos"), "--verbose"),
        (("plan", "--prise", "2"), "--price"),
    ],
)
def test_a_mistyped_name_gets_a_suggestion(here: Callable, words: tuple[str, ...], suggestion: str) -> None:
    code, _, told = here(*words)
    assert code == 2
    assert suggestion in told


def test_a_settings_file_without_c_is_told(here: Callable, world: Path) -> None:
    code, _, err = here("run", world / "run.yaml")
    assert (code, err.strip().splitlines()[0].endswith(f"-c {world / 'run.yaml'}")) == (2, True)


def test_bad_input_is_one_line_without_colours(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("name: x\ntsk: {}\n")
    result = faculty("run", "-c", tmp_path / "run.yaml")
    assert result.returncode == 2
    assert "did you mean `task`?" in result.stderr
    assert "\x1b" not in result.stderr + result.stdout


def test_status_for_people_and_machines(here: Callable, world: Path) -> None:
    code, people, _ = here("run", "-c", world / "run.yaml", "--status")
    assert code == 0
    assert "ingest" in people and "\x1b" not in people
    code, machines, _ = here("run", "-c", world / "run.yaml", "--status", "--json")
    assert code == 0
    found = json.loads(machines)
    assert [row["stage"] for row in found["stages"]] == [
        "ingest",
        "assess",
        "select",
        "amalgamate",
        "distill",
        "evaluate",
    ]
    assert {row["state"] for row in found["stages"]} == {"missing"}
    assert found["run_dir"] == str(world / "run")
    code, _, told = here("run", "-c", world / "run.yaml", "--json")
    assert code == 2
    assert "--status" in told


def test_zoo_list_for_machines(here: Callable, world: Path) -> None:
    code, machines, _ = here("zoo", "list", world / "zoo.yaml", "--json")
    assert code == 0
    rows = json.loads(machines)["teachers"]
    assert [row["name"] for row in rows] == ["untrained", "blind"]
    assert rows[0]["source"]["type"] == "safetensors"


def test_zoo_check_for_machines(here: Callable, world: Path) -> None:
    code, out, err = here("zoo", "check", world / "zoo.yaml", "--json")
    told = json.loads(out)  # nothing beside it on standard output; progress is on the other one
    assert (code, [one["name"] for one in told["teachers"]]) == (0, ["untrained", "blind"])
    assert all(one["ok"] and one["error"] is None and one["parameters"] > 0 for one in told["teachers"])
    assert "teachers 2/2" in err


def test_switches_take_no_value_in_the_help(here: Callable) -> None:
    _, out, _ = here("run", "--help")
    assert "--status" in out and "<bool>" not in out
    assert re.search(r"--config +-c +<path>", out)


def test_cache_for_machines(here: Callable, world: Path) -> None:
    code, machines, _ = here("cache", "-c", world / "run.yaml", "--json")
    assert code == 0
    assert json.loads(machines)["entries"] == 0


def test_the_shell_completes_commands() -> None:
    result = faculty(_FACULTY_COMPLETE="complete_bash", COMP_WORDS="faculty ass", COMP_CWORD="1")
    assert "assess" in result.stdout.split()
