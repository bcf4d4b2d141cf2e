"""From a folder of images and two teachers to a student, by what `faculty init` writes."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.data.sources import open_source
from pipeline.data.spec import ParquetSource
from pipeline.report.console import Display
from pipeline.settings_files import load_settings
from pipeline.stages.run import run_pipeline
from pipeline.start.command import Wanted, initialise
from tests.inprocess import without_ray

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "conf" / "demo"
EACH = 40


@pytest.fixture(scope="module")
def clothes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's images as files: a folder for each class."""
    folder = tmp_path_factory.mktemp("own") / "clothes"
    source = open_source(ParquetSource(path=str(DEMO / "data")))
    counts = dict.fromkeys(range(len(source.classes)), 0)
    for sample in source:
        if sample.label is None or counts[sample.label] == EACH:
            continue
        counts[sample.label] += 1
        target = folder / source.classes[sample.label].replace("/", "-") / f"{counts[sample.label]}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(sample.image)
    assert len(list(folder.glob("*/*.png"))) == 10 * EACH
    return folder


def test_settings_that_init_wrote_assess_the_zoo(clothes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.yaml"
    display = Display(Console(file=io.StringIO()))
    assert initialise(Wanted(clothes, zoo=DEMO / "zoo.yaml", out=out), display, interactive=False) == 0
    changes = [
        f"run_dir={tmp_path / 'run'}",
        "zoo.only=[shoes, tops]",
        "tracking.enabled=false",
        "register.enabled=false",
    ]
    settings = load_settings([out], changes)
    with without_ray():
        records = run_pipeline(settings, until="assess", display=display)
    assert set(records) == {"ingest", "assess"}
    status = json.dumps(records["ingest"].summary)
    assert str(10 * settings.task.splits.train_labelled) in status
    assert (settings.task.image.size, settings.task.image.channels) == (28, 1)


@pytest.mark.slow
def test_own_images_and_two_own_teachers_give_a_registered_student(clothes: Path, tmp_path: Path) -> None:
    for name in ("shoes", "tops"):
        shutil.copy(DEMO / "teachers" / f"{name}.safetensors", tmp_path)

    def faculty(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "jobs.cli", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path)

    teachers = ("--teachers", "shoes.safetensors", "--teachers", "tops.safetensors")
    classes = ("--classes", "shoes=sandal,sneaker,ankle boot", "--classes", "tops=t-shirt,pullover,shirt")
    made = faculty("init", "--images", clothes, *teachers, *classes, "--name", "clothes", "--labels", "10")
    assert made.returncode == 0, made.stderr
    assert faculty("zoo", "check", "zoo.yaml").returncode == 0
    small = ("distill.loop.epochs=2", "distill.resources.num_workers=0", "register.gate=false")
    done = faculty("run", "-c", "run.yaml", *small)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "models:/faculty-clothes" in done.stdout
    assert (tmp_path / "runs" / "clothes").is_dir()
