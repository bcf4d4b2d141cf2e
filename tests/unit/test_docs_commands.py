"""README.md and docs/: every command is one that exists, every setting valid, every block of Python compiles.

Commands are parsed by the real command line, with their files and overrides; `RUN` lists those that are run, too.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
import typer
import yaml
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.config import Settings
from pipeline.models.spec import ZooFile
from pipeline.settings_files import load_settings
from pipeline.strict import load_yaml, validate
from tests.documents import PAGES, ROOT, blocks, commands

# Settings files that the reader has, and we have not.
READERS = {
    "run.yaml": "the reader's own",
    "runs/birds/settings.yaml": "left by a run of the reader's",
    "sweep.yaml": "the reader's own",
}
# Programs that are no part of this package and not installed where tests run, or that need no check.
OUTSIDE = {
    "docker": "not installed where tests run",
    "kubectl": "not installed where tests run",
    "cp": "of the system",
    "curl": "of the system",
    "uv": "of the installation",
    "jupyter": "not among the locked packages",
    "export": "of the shell",
    "source": "of the shell",
    "pip": "of Python",
    "mkdir": "of the system",
    "cd": "of the shell",
    "git": "of the system",
}
# Blocks of YAML that are neither settings nor a zoo, by their first key.
OTHER_YAML: dict[str, str] = {}
# These lines are run as they stand, in this order, where there are `data/birds`, `weights` and a zoo.
RUN = (
    "faculty init --images data/birds --teachers weights/resnet18_dogs.pth --teachers weights/cifar.safetensors",
    "faculty init --images data/birds --zoo zoo.yaml",
    "faculty run -c run.yaml --status",
    "faculty zoo pack zoo.yaml -o zoo.parquet",
    "faculty zoo list zoo.parquet",
)
BASE = {
    "name": "birds",
    "task": {"source": {"type": "image_folder", "path": "data/birds"}, "image": {"size": 64}},
    "zoo": {"path": "zoo.yaml"},
}
COMMANDS = list(commands())


def inner(words: list[str]) -> list[str]:
    """Return the command itself, without variables before it and without what runs it elsewhere."""
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words[:4] == ["docker", "compose", "exec", "head"]:
        words = words[4:]
    if words[:3] == ["ray", "job", "submit"] and "--" in words:
        words = words[words.index("--") + 1 :]
    return [words[0].removeprefix(".venv/bin/"), *words[1:]] if words else words


def of_faculty() -> list[Any]:
    """Return the commands of this package: where they are, and their words behind `faculty`."""
    found = []
    for where, words in COMMANDS:
        own = inner(words)
        if own[0] == "faculty":
            found.append(pytest.param(own[1:], id=f"{where} {' '.join(own)}"))
        elif own[:2] == ["python", "-m"] and own[2].startswith("jobs."):
            found.append(pytest.param([own[2].removeprefix("jobs."), *own[3:]], id=f"{where} {' '.join(own)}"))
    return found


def parsed(words: list[str]) -> click.Context:
    """Parse a command with the real command line, without running it."""
    command: Any = typer.main.get_command(app)
    context = click.Context(command, info_name="faculty")
    while hasattr(command, "commands"):
        name, words = words[0], words[1:]
        assert name in command.commands, f"there is no command {name!r}"
        command = command.commands[name]
    made: click.Context = command.make_context(name, list(words), parent=context)
    return made


@pytest.mark.parametrize("words", of_faculty())
def test_a_command_is_accepted_with_its_files_and_settings(words: list[str], tmp_path: Path) -> None:
    if words[0].startswith("--"):
        group: Any = typer.main.get_command(app)
        assert words[0] in {option for parameter in group.params for option in parameter.opts}
        return
    given = parsed(words).params
    files = [Path(path) for path in given.get("config") or ()]
    for path in files:
        assert (ROOT / path).is_file() or str(path) in READERS, f"{path} is neither here nor the reader's"
    if given.get("compare"):
        return
    settings = [*(given.get("overrides") or ()), *(given.get("words") or ())]
    if not (files or settings):
        return
    base = tmp_path / "run.yaml"
    base.write_text(yaml.safe_dump(BASE), encoding="utf-8")
    merged = [base if str(path) in READERS else ROOT / path for path in files] or [base]
    assert isinstance(load_settings(merged, settings), Settings)


def test_every_other_command_is_known() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for where, words in COMMANDS:
        program, *rest = inner(words)
        if program == "make":
            assert {word for word in rest if "=" not in word} <= targets, (where, words)
        elif program == "python" and rest[0] == "-m":
            assert importlib.util.find_spec(rest[1]) is not None, (where, words)
        elif program == "python":
            assert rest[0] == "-c", (where, words)
            compile(rest[1], where, "exec")
        elif program == "ray":
            check_ray(where, rest)
        elif program == "mlflow":
            check_mlflow(where, rest)
        else:
            assert program == "faculty" or program in OUTSIDE, f"{where}: nobody is known to run {words}"


def check_ray(where: str, words: list[str]) -> None:
    """Look a command of Ray up in its own command line."""
    from ray.scripts.scripts import cli

    command: Any = cli
    for word in words[: words.index("--")] if "--" in words else words:
        if word in getattr(command, "commands", {}):
            command = command.commands[word]
        elif word.startswith("-"):
            assert word.split("=")[0] in {option for one in command.params for option in one.opts}, (where, word)
    assert not hasattr(command, "commands"), f"{where}: ray {words} names no command"


def check_mlflow(where: str, words: list[str]) -> None:
    """Look the options of MLflow up in its source: importing its command line takes many seconds."""
    package = Path(str(importlib.util.find_spec("mlflow").origin)).parent  # type: ignore[union-attr]
    names = ("cli/__init__.py", "models/cli.py", "utils/cli_args.py")
    source = "\n".join((package / name).read_text(encoding="utf-8") for name in names)
    assert words[0] in ("ui", "server", "models"), (where, words)
    for word in words:
        if word.startswith("-"):
            assert f'"{word.split("=")[0]}"' in source, (where, word)


def test_the_readers_files_are_all_named_somewhere() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    assert not [name for name in READERS if name not in text]


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_a_block_of_yaml_is_valid(block: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs" / "examples")
    path = tmp_path / "block.yaml"
    path.write_text(block.text, encoding="utf-8")
    content = load_yaml(path)
    if "teachers" in content:
        zoo = validate(ZooFile, content, where=block.where)
        assert zoo.teachers
        return
    first = next(iter(content))
    if first in OTHER_YAML:
        return
    base = tmp_path / "run.yaml"
    base.write_text(yaml.safe_dump(BASE), encoding="utf-8")
    before = [base, *(ROOT / name for name in re.findall(r"^# together with (\S+)$", block.text, re.MULTILINE))]
    assert load_settings([*before, path]) != load_settings([base]), block.text


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_a_block_of_python_compiles(block: Any) -> None:
    compile(block.text, block.where, "exec")


def test_blocks_are_there() -> None:
    assert len(COMMANDS) > 60
    assert len(blocks("yaml")) > 15
    assert len(blocks("python")) > 10
    assert not [block.where for block in blocks("sh", "shell", "yml", "py")], "call them bash, yaml and python"


# --- those that are run ---


@pytest.fixture
def at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lay out what the quickstart has at hand: images in folders, and the weights of two networks."""
    import torchvision

    from pipeline.models.nets import resnet20

    random = np.random.default_rng(0)
    for name in ("owl", "wren"):
        folder = tmp_path / "data" / "birds" / name
        folder.mkdir(parents=True)
        for number in range(8):
            Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    weights = tmp_path / "weights"
    weights.mkdir()
    torch.save(torchvision.models.resnet18(num_classes=3).state_dict(), weights / "resnet18_dogs.pth")
    (weights / "resnet18_dogs.classes.txt").write_text("beagle\ncollie\npug\n", encoding="utf-8")
    save_file(resnet20(10, 3).state_dict(), weights / "cifar.safetensors")
    (weights / "cifar.classes.txt").write_text("\n".join(f"kind {number}" for number in range(10)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_these_commands_run_as_the_pages_have_them(at_hand: Path) -> None:
    shown = {" ".join(inner(words)) for _, words in COMMANDS}
    assert set(RUN) <= shown, "a command of RUN is on no page any more"
    for line in RUN:
        if "--zoo zoo.yaml" in line:
            for name in ("run.yaml", "run.schema.json"):
                (at_hand / name).unlink()
            shutil.copy(ROOT / "conf" / "demo" / "zoo.yaml", at_hand)
            shutil.copytree(ROOT / "conf" / "demo" / "teachers", at_hand / "teachers")
        result = CliRunner().invoke(app, line.split()[1:])
        assert result.exit_code == 0, (line, result.output, result.exception)
    assert (at_hand / "zoo.parquet").is_file()
    assert load_settings([at_hand / "run.yaml"]).task.source.path == str(at_hand / "data" / "birds")  # type: ignore[union-attr]
