"""docs/python.md from its first line to its last, as a notebook runs it: in a thread, beside a running event loop."""

from __future__ import annotations

import asyncio
import re
import shlex
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pipeline as faculty
from jobs.cli import main
from tests.tiny import SHAPES, SIDE, images, make_zoo
from tests.unit.test_docs_examples import write_sheets

pytestmark = pytest.mark.e2e

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
BIRDS = ("owl", "wren", "crow", "kite")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("notebook")
    make_zoo(folder)
    pixels, labels = images(90, seed=7)
    for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        path = folder / "birds" / BIRDS[label] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    for name in BIRDS:  # the page's examples
        first = min((folder / "birds" / name).iterdir())
        first.rename(first.with_name("0.png"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield folder


def run_as_a_notebook(cells: list[str]) -> dict[str, Any]:
    """Run cells one after the other; return their names."""
    names: dict[str, Any] = {}
    failures: list[BaseException] = []

    async def kernel() -> None:
        for number, cell in enumerate(cells):
            exec(compile(cell, f"cell {number}", "exec"), names)

    def work() -> None:
        try:
            asyncio.run(kernel())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return names


@pytest.fixture(scope="module")
def names(folder: Path, cluster) -> dict[str, Any]:
    return run_as_a_notebook(re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S))


def test_the_page_runs_from_teachers_to_a_version(names: dict[str, Any], folder: Path) -> None:
    found, chosen, student, version = (names[name] for name in ("found", "chosen", "student", "version"))
    assert set(found.ranking) == {"flat", "solid", "mixed", "untrained", "blind"} and not found.failed
    assert found.best()["teacher"] == found.ranking[0] == found.table["teacher"][0].as_py()
    assert (folder / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert chosen and set(chosen.who) <= {"flat", "solid", "mixed"} and set(chosen.coverage) == set(BIRDS)
    assert student.accuracy == student.arms[0]["mean"] and [arm["name"] for arm in student.arms][1:] == ["no_teacher"]
    assert version and (version.name, version.number, version.uri) == ("birds", "1", "models:/birds@challenger")
    assert (folder / "models.db").exists()
    assert names["brisk"].settings.distill.augment.flip and len(names["brisk"].arms) == 1


def test_the_student_answers_in_class_names(names: dict[str, Any], folder: Path) -> None:
    student = names["student"]
    assert student.classes == tuple(sorted(BIRDS))
    paths = sorted((folder / "birds" / "owl").iterdir())[:20]
    said, told = student.predict(paths), student.probabilities(paths)
    np.testing.assert_array_equal(said, np.array(student.classes)[told.argmax(1)])
    np.testing.assert_allclose(told.sum(1), 1, rtol=1e-5)
    stored = torch.from_numpy(np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths]))
    np.testing.assert_allclose(student.probabilities(stored.permute(0, 3, 1, 2)), told, atol=1e-6)
    assert len(student.history) == 10
    assert not student.model.training


def test_the_same_call_computes_nothing_and_the_command_line_goes_on(
    names: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = faculty.distill(names["chosen"], student="small_cnn", epochs=10, workers=0)
    assert {stage: one.key for stage, one in again.records.items()} == {
        stage: one.key for stage, one in names["student"].records.items()
    }
    assert capsys.readouterr().out.count("unchanged since") == 6
    (block,) = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    shown = []
    for command in block.splitlines():  # what they would run, without running it
        program, *arguments = shlex.split(command)
        monkeypatch.setattr("sys.argv", [program, *dict.fromkeys([*arguments, "--status"])])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
        shown.append(capsys.readouterr().out)
    assert shown[0].count("fresh") == 6
    # Compared with the newest student, which is the brisk one.
    assert shown[1].count("fresh") == 4 and "distill.loop.epochs: 2 → 60" in " ".join(shown[1].split())


@pytest.mark.slow
def test_own_source_own_score_and_own_objective(folder: Path, cluster, capsys: pytest.CaptureFixture) -> None:
    (folder / "sheets").mkdir()
    write_sheets(folder / "sheets", per_class=40)
    source = {"type": "own", "factory": "docs.examples.my_data:sheets", "kwargs": {"path": "sheets", "side": SIDE}}
    counts = {"train_labelled": 4, "probe": 6, "validation": 6, "test": 10}
    task = faculty.load_task(source, classes=SHAPES, image_size=SIDE, channels=1, **counts)
    zoo = faculty.load_zoo("zoo.yaml", only=["mixed", "blind"])
    own = {"assess.own": {"docs.examples.my_scores:separation": {"power": 2.0}}}
    found = faculty.assess(zoo, task, tracking=False, settings=own)
    assert "separation" in capsys.readouterr().out
    scores = {row["teacher"]: row["own.separation"] for row in found}
    assert scores["mixed"] > scores["blind"] + 0.1
    assert found.table.schema.field("own.separation").metadata[b"needs_labels"] == b"true"
    chosen = faculty.select(found, teachers=["mixed"], quiet=True)
    order = {"distill.objective.own": {"docs.examples.my_losses:Order": {"weight": 0.2}}, "distill.guard": None}
    student = faculty.distill(chosen, epochs=2, workers=0, controls=[], settings=order, quiet=True)
    assert all(epoch["order"] > 0 for epoch in student.history)
    assert student.accuracy is not None
