"""A company's zoo in its registry: pushed to a tracking server, queried by a run, and assessed as the files were."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.errors import UserError
from pipeline.models.sources import load_teacher
from pipeline.models.zoo import load_zoo
from pipeline.report.console import Display
from pipeline.settings_files import load_settings
from pipeline.stages.run import run_pipeline
from pipeline.stages.teachers import source_options
from tests import tiny
from tests.inprocess import without_ray
from tests.loopback import TrackingServer

pytestmark = [
    pytest.mark.integration,
    # MLflow 3.17 uses a loader strategy that SQLAlchemy 2.1 deprecates.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"),
]
SECRET = "sentinel-7f3a"
NAMES = ("flat", "solid", "mixed")
BY_CARDS = "assess.search.class_level={cost: reference, keep: 1}"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = TrackingServer(tmp_path_factory.mktemp("server")).start()
    yield running
    running.stop()


@pytest.fixture(autouse=True)
def credentials(server, tmp_path, monkeypatch):
    """The server's address with a password in it, and an empty folder to work in."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri.replace("://", f"://someone:{SECRET}@"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    yield os.environ["MLFLOW_TRACKING_URI"]
    assert os.listdir(tmp_path / "cwd") == []


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Three teachers with examples of their classes, and settings for their zoo file."""
    folder = tmp_path_factory.mktemp("world")
    path = tiny.make_zoo(folder, NAMES)
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))["teachers"]
    for number, entry in enumerate(entries):
        classes = tiny.TEACHERS[entry["name"]][0]
        pixels, labels = tiny.images(8, seed=50 + number, classes=classes)
        labels = np.searchsorted(classes, labels)
        np.savez(folder / f"{entry['name']}.npz", images=pixels, labels=labels, classes=np.array(entry["classes"]))
        entry["examples"] = {"type": "numpy", "path": f"{entry['name']}.npz"}
        entry["notes"] = f"weights from http://someone:{SECRET}@host/{entry['name']}"
    tiny.write_zoo(path, entries)
    tiny.make_data(folder)
    tiny.make_settings(folder, register={"enabled": False}, run_dir=str(folder / "local"))
    return folder


@pytest.fixture
def here():
    with without_ray():
        yield


def faculty(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    return done.exit_code, done.output


def assess(world: Path, *overrides: str):
    """Assess; return the records, the rows by teacher and what was printed."""
    settings = load_settings([world / "run.yaml"], overrides)
    console = Console(record=True, width=300, file=open(os.devnull, "w"))
    with console.file:
        records = run_pipeline(settings, until="assess", display=Display(console))
    folder = Path(settings.run_dir) / "assess" / records["assess"].key
    rows = {row["teacher"]: row for row in pq.read_table(folder / "assessment.parquet").to_pylist()}
    return records, rows, console.export_text()


def test_a_zoo_in_the_registry_is_assessed_as_its_files_are(server, here, world, credentials, capfd):
    push = ("zoo", "push", world / "zoo.yaml", "--prefix", "acme-", "--tag", "task=shapes", "--alias", "live")
    push += ("--reference", "mixed")
    code, out = faculty(*push)
    assert (code, "3 new, 0 unchanged, 0 not pushed" in out) == (0, True), out
    code, again = faculty(*push)
    assert (code, "0 new, 3 unchanged, 0 not pushed" in again) == (0, True), again

    code, made = faculty("zoo", "cards", world / "zoo.yaml", "--reference", "mixed")
    assert code == 0, made
    _, local, _ = assess(world, "tracking.enabled=false", BY_CARDS, "assess.reference=mixed")
    query = ["zoo.path=null", "zoo.source=mlflow", "zoo.filter=\"tags.task = 'shapes'\"", f"run_dir={world / 'asked'}"]
    query += [BY_CARDS, "assess.reference=acme-mixed", "zoo.alias=live"]
    records, found, text = assess(world, *query)
    assert set(found) == {f"acme-{name}" for name in NAMES}
    for name in NAMES:
        row = found[f"acme-{name}"]
        assert not row["error"]
        for score in ("score", "knn", "leep", "transport_cost", "transport_gain", "class_level"):
            assert row[score] == pytest.approx(local[name][score], rel=1e-3, abs=1e-3), (name, score)
    assert sorted(found, key=lambda name: -found[name]["score"]) == [
        f"acme-{name}" for name in sorted(local, key=lambda name: -local[name]["score"])
    ]

    # Another version of one of them does not touch a run that has begun; a run that begins sees it.
    entries = yaml.safe_load((world / "zoo.yaml").read_text(encoding="utf-8"))["teachers"]
    for entry in entries:
        entry["licence"] = "MIT" if entry["name"] == "flat" else entry["licence"]
    tiny.write_zoo(world / "zoo.yaml", entries)
    code, out = faculty(*push)
    assert (code, "1 new, 2 unchanged" in out) == (0, True), out
    later, _, unchanged = assess(world, *query)
    assert later["assess"].key == records["assess"].key
    printed = capfd.readouterr()
    assert "3 registered teachers as of" in unchanged + printed.out
    zoo = world / "pulled.yaml"
    code, pulled = faculty("zoo", "pull", "--filter", "tags.task = 'shapes'", "-o", zoo)
    assert code == 0, pulled
    assert {name: spec.source.uri[-2:] for name, spec in load_zoo(zoo).items()} == {
        "acme-flat": "/2",
        "acme-mixed": "/1",
        "acme-solid": "/1",
    }
    assert load_zoo(zoo)["acme-flat"].licence == "MIT"
    code, checked = faculty("zoo", "check", zoo)
    assert code == 0, checked

    last = capfd.readouterr()
    for shown in (out, again, text, unchanged, pulled, checked, *printed, *last):
        assert SECRET not in shown
    stored = [path for folder in (server.folder, world / "asked") for path in folder.rglob("*") if path.is_file()]
    stored += [zoo, zoo.with_suffix(".cards.arrow")]
    assert sum(path.name == "model.pt2" for path in stored) == 4
    assert [path for path in stored if SECRET.encode() in path.read_bytes()] == []
    assert [path for path in stored if path.suffix in (".pkl", ".pth", ".pickle")] == []


@pytest.mark.slow
def test_a_model_that_its_owner_logged_with_mlflow_alone_is_a_teacher(server, credentials, tmp_path):
    script = textwrap.dedent(
        """
        import mlflow, numpy as np
        from mlflow.models import infer_signature
        from torch import nn
        batch = np.zeros((2, 1, 12, 12), np.float32)
        with mlflow.start_run():
            mlflow.pytorch.log_model(
                nn.Sequential(nn.Flatten(), nn.Linear(144, 3)), name="net", registered_model_name="theirs",
                input_example=batch, signature=infer_signature(batch, batch[:, 0, 0, :3]), pip_requirements=["torch"],
                metadata={"classes": ["a", "b", "c"], "preprocessing": {"mean": [0.5], "std": [0.25]}},
            )
        """
    )
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code, out = faculty("zoo", "pull", "--filter", "name = 'theirs'", "-o", tmp_path / "zoo.yaml")
    assert code == 0, out
    spec = load_zoo(tmp_path / "zoo.yaml")["theirs"]
    assert (spec.classes, spec.preprocessing.size, spec.preprocessing.std) == (("a", "b", "c"), (12, 12), (0.25,))
    teacher = load_teacher(spec, **source_options((), None))
    assert teacher(torch.zeros(2, 3, 30, 30, dtype=torch.uint8)).logits.shape == (2, 3)


def test_a_filter_that_the_server_refuses_is_told_without_the_password(server, credentials, tmp_path):
    from pipeline.models.zoo_spec import RegistryQuery
    from pipeline.stages.registered import pull_zoo

    with pytest.raises(UserError, match=r"zoo\.filter: the registry does not understand 'task = birds'") as caught:
        pull_zoo(RegistryQuery(filter="task = birds"), tmp_path / "zoo.yaml")
    with pytest.raises(UserError, match="has no model for this query") as nobody:
        pull_zoo(RegistryQuery(filter="tags.task = 'fish'"), tmp_path / "zoo.yaml")
    with pytest.raises(UserError, match="can't be used: no connection") as dead:
        pull_zoo(RegistryQuery(), tmp_path / "zoo.yaml", tracking_uri=f"http://someone:{SECRET}@127.0.0.1:9")
    for one in (caught, nobody, dead):
        assert SECRET not in str(one.value)
        assert "\n" not in str(one.value)
