"""docs/extending.md: each example is the file that is shipped, its settings are valid, and it does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from docs.examples import my_data, my_losses, my_scores
from pipeline.config import Settings
from pipeline.data.ingest import build_table
from pipeline.data.spec import ImageSpec, OwnSource, SplitSpec
from pipeline.data.table import ImageTable
from pipeline.distillation.step import Said, Step
from pipeline.engine.objectives import wants
from pipeline.settings_files import load_settings
from pipeline.stages.own_scores import own_scores, score_own
from tests.tiny import SHAPES, SIDE, images

DOCS = Path(__file__).parents[2] / "docs"
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = FENCED.findall((DOCS / "extending.md").read_text(encoding="utf-8"))
CODE = [text for kind, text in BLOCKS if kind == "python"]
YAML = [text for kind, text in BLOCKS if kind == "yaml"]


@pytest.mark.parametrize("module", [my_losses, my_scores, my_data])
def test_the_page_shows_the_files_and_they_are_short(module) -> None:
    text = Path(module.__file__).read_text(encoding="utf-8")
    assert text in CODE
    assert len(text.splitlines()) <= 32


def test_the_page_s_settings_are_valid_and_find_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS / "examples")
    base = {
        "name": "t",
        "task": {"source": {"type": "image_folder", "path": "x"}, "image": {"size": 8}},
        "zoo": {"path": "zoo.yaml"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    assert len(CODE) == len(YAML) == 3
    files = [tmp_path / "run.yaml"]
    for number, text in enumerate(YAML):
        files.append(tmp_path / f"{number}.yaml")
        files[-1].write_text(text, encoding="utf-8")
    settings: Settings = load_settings(files)
    assert "said" in wants(settings.distill.objective)
    assert list(own_scores(settings.assess)) == ["own.separation"]
    assert settings.task.source.kwargs["path"] == str(tmp_path / "sheets")  # type: ignore[union-attr]


def test_the_objective_is_the_hinge_that_it_says() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [2.0, 1.5, 0.0], [0.0, 3.0, 0.0]], requires_grad=True)
    target = torch.tensor([[[0.7, 0.2, 0.1], [0.6, 0.3, 0.1]]])  # one teacher, the last two images
    said = Said(torch.tensor([[1.0, 0.5]]), (target[0],), target)
    found = my_losses.Order(None, margin=1.0)(Step(logits, torch.tensor([0, -1, -1]), said))
    # The second image wants class 0 before class 1: 1 - 2 + 1.5; the third 1 - 0 + 3, and counts half.
    torch.testing.assert_close(found["loss"], torch.tensor((0.5 + 0.5 * 4) / 2))
    found["loss"].backward()
    assert logits.grad is not None and logits.grad[0].abs().sum() == 0
    with pytest.raises(ValueError, match="margin must be > 0"):
        my_losses.Order(None, margin=0)


def test_the_score_is_the_one_of_two_points_by_hand() -> None:
    from pipeline.config import AssessSettings

    settings = AssessSettings(own={"docs.examples.my_scores:separation": {}})
    about = {"logits": torch.zeros(4, 2), "num_classes": 2, "classifier_weight": None, "parameters": 1}
    features = torch.tensor([[0.0], [2.0], [10.0], [12.0]])
    labels = torch.tensor([0, 0, 1, 1])
    given = about | {"features": features, "labels": labels, "fitted": torch.ones(4).bool()}
    # Centres at 1 and 11: distances 1 to the own one, and 11, 9, 9, 11 to the other.
    expected = (2 * 10 / 12 + 2 * 8 / 10) / 4
    assert score_own(settings, given)["own.separation"] == pytest.approx(expected)
    mixed = given | {"labels": torch.tensor([0, 1, 0, 1])}
    assert score_own(settings, mixed)["own.separation"] < 0.2


def write_sheets(folder: Path, per_class: int = 30) -> None:
    """Lay the tiny world's images out on two sheets, the last of them without a label."""
    pixels, labels = images(per_class, seed=7)
    for number, rows in enumerate(np.array_split(np.arange(len(pixels)), 2)):
        tiles = pixels[rows].reshape(4, -1, SIDE, SIDE)
        Image.fromarray(tiles.transpose(0, 2, 1, 3).reshape(4 * SIDE, -1)).save(folder / f"{number}.png")
        names = [SHAPES[label] for label in labels[rows]]
        (folder / f"{number}.txt").write_text(" ".join([*names[:-1], "?"]), encoding="utf-8")


def test_the_source_cuts_the_tiles_that_lie_on_the_sheets(tmp_path: Path) -> None:
    write_sheets(tmp_path)
    source = OwnSource(
        factory="docs.examples.my_data:sheets", kwargs={"path": str(tmp_path), "side": SIDE}, classes=list(SHAPES)
    )
    splits = SplitSpec(train_labelled=2, probe=3, validation=3, test=4)
    report = build_table(source, ImageSpec(size=SIDE, channels=1), splits, 0, tmp_path / "table")
    assert report.rows == 120 and not report.skipped
    table = ImageTable.open(report.path)
    pixels, labels = images(30, seed=7)
    known = {image.tobytes(): label for image, label in zip(pixels, labels, strict=True)}
    probe = table.split("probe")
    assert [known[image.numpy().tobytes()] for image in probe.images()] == probe.labels.tolist()
