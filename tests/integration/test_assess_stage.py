"""The stages assess and select on a zoo that is searched, by cards and by rungs, with labels and without."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console
from safetensors import safe_open

from pipeline.models.catalogue import write_catalogue
from pipeline.models.zoo import load_zoo
from pipeline.report.console import Display
from pipeline.settings_files import load_settings
from pipeline.stages.run import run_pipeline
from tests import tiny
from tests.inprocess import without_ray

pytestmark = pytest.mark.integration

COPIES = 3  # of every teacher: twins whose weights differ a little


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    zoo = tiny.make_zoo(folder)
    entries = yaml.safe_load(zoo.read_text(encoding="utf-8"))["teachers"]
    for copy in range(1, COPIES):
        for number, entry in enumerate(entries[: len(tiny.TEACHERS)]):
            path = folder / "teachers" / f"{entry['name']}{copy}.safetensors"
            classes, steps = tiny.TEACHERS[entry["name"]]
            from safetensors.torch import save_file

            save_file(tiny.train_teacher(classes, 10 * copy + number, min(steps, 60)).state_dict(), path)
            source = entry["source"] | {"path": f"teachers/{path.name}"}
            entries.append({**entry, "name": f"{entry['name']}{copy}", "source": source})
            entries[-1].pop("sha256")
    broken = folder / "teachers" / "broken.safetensors"
    broken.write_bytes(b"no weights")
    entries.append(
        {**entries[0], "name": "broken", "source": entries[0]["source"] | {"path": f"teachers/{broken.name}"}}
    )
    entries[-1].pop("sha256")
    tiny.write_zoo(zoo, entries)
    tiny.make_data(folder)
    tiny.make_settings(folder, tracking={"enabled": False}, register={"enabled": False})
    return folder


SEARCH = ["assess.search.rungs=[0.5, 1]", "assess.search.eta=4", "assess.search.least=3"]


def run(world: Path, *overrides: str, until: str = "select") -> tuple[dict, list[dict], str]:
    settings = load_settings([world / "run.yaml"], overrides)
    console = Console(record=True, width=250, file=io.StringIO())
    records = run_pipeline(settings, until=until, display=Display(console))
    folder = Path(settings.run_dir) / "assess" / records["assess"].key
    rows = pq.read_table(folder / "assessment.parquet").to_pylist()
    return records, rows, console.export_text()


def seen(run_dir: Path) -> dict[str, int]:
    """How many images each teacher has been run over, by name."""
    counts = {}
    for path in (run_dir / "outputs").glob("*/outputs.safetensors"):
        with safe_open(path, "pt") as handle:
            counts[path.parent.name.rpartition("-")[0]] = len(handle.get_tensor("rows"))
    return counts


@pytest.fixture(scope="module")
def searched(cluster, world):
    """The trials of the search on Ray; what the stage makes of other settings is seen without it."""
    return run(world, *SEARCH)


@pytest.fixture
def here():
    with without_ray():
        yield


def test_the_best_see_all_images_and_the_others_half_of_the_labelled_ones(searched, world):
    records, rows, text = searched
    by_name = {row["teacher"]: row for row in rows}
    finished = [row for row in rows if row["rung"] == 2]
    dropped = [row for row in rows if row["dropped"]]
    assert len(finished) == 4 and len(dropped) == 11 and by_name["broken"]["error"]  # a quarter of 16
    assert rows[:4] == sorted(finished, key=lambda row: -row["score"]) and rows[-1]["teacher"] == "broken"
    labelled = 4 * (4 + 8)
    assert {row["images"] for row in finished} == {labelled + 4 * 8}
    assert {row["images"] for row in dropped} == {labelled // 2}
    assert seen(world / "run") == {row["teacher"]: row["images"] for row in rows if row["images"]}
    least = min(row["score"] for row in finished)
    assert all("on rung 1 of 2, not among the best 4 of 16" in row["dropped"] for row in dropped)
    assert not any(name.startswith(("blind", "untrained")) for name in (row["teacher"] for row in finished))
    assert all(row["score_low"] <= row["score"] <= row["score_high"] for row in finished + dropped)
    assert least > max(by_name[name]["score"] for name in ("blind", "blind1", "blind2"))
    assert records["assess"].summary["dropped"] == 11
    choice = json.loads(next((world / "run" / "select").glob("*/faculty.json")).read_text(encoding="utf-8"))
    assert set(choice["chosen"]) <= {row["teacher"] for row in finished} and choice["chosen"]
    assert choice["score_interval"][0] < choice["score"] < choice["score_interval"][1]
    assert choice["reasons"][dropped[0]["teacher"]].startswith("dropped: score")
    assert choice["reasons"]["broken"].startswith("failed: ")
    assert "images" in text and "dropped: score" in text


def test_other_settings_run_no_teacher_again(searched, here, world):
    _, before, _ = searched
    files = {path: path.stat().st_mtime_ns for path in (world / "run" / "outputs").glob("*/outputs.safetensors")}
    _, rows, _ = run(world, *SEARCH, "assess.neighbours=3", "assess.scores=[knn, nce, logme, h_score, gbc, otce]")
    assert {path: path.stat().st_mtime_ns for path in files} == files
    old = {row["teacher"]: row for row in before}
    for row in rows:
        assert (row["score"], row["rung"]) == (old[row["teacher"]]["score"], old[row["teacher"]]["rung"])
        assert row["leep"] is None and (row["error"] or None not in (row["nce"], row["logme"], row["otce"]))


def test_a_search_that_was_cut_off_ends_like_one_that_was_not(searched, here, world, tmp_path):
    _, before, _ = searched
    copy = tmp_path / "cut"
    shutil.copytree(world, copy)
    root = copy / "run"
    shutil.rmtree(root / "select")
    shutil.rmtree(root / "assess")
    kept, *gone = sorted((root / "teachers").iterdir())
    for path in gone:  # all but one of those that had come through, and one that had been looked at
        shutil.rmtree(path)
    shutil.rmtree(next((root / "outputs").glob("solid-*")))
    _, rows, _ = run(copy, *SEARCH, f"run_dir={root}")
    measured = ("seconds", "peak_mb", "forward_seconds", "error")  # the last names a path of the copy

    def plain(row):
        cut = row["dropped"] and row["dropped"].partition(", not among")[0]  # of how many: those that were left
        return {key: value for key, value in row.items() if key not in measured} | {"dropped": cut}

    assert [plain(row) for row in rows] == [plain(row) for row in before]
    assert kept.exists()


def test_names_thin_the_zoo_before_anyone_is_run(here, world):
    catalogue = world / "zoo.parquet"
    write_catalogue(load_zoo(world / "zoo.yaml"), catalogue)
    run_dir = world / "by_names"
    only = ["task.source.only=[bar, post]", "assess.search.class_level={cost: names, keep: 0.7}"]
    _, rows, text = run(world, f"zoo.path={catalogue}", f"run_dir={run_dir}", "assess.search.least=2", *only)
    dropped = {row["teacher"]: row for row in rows if row["rung"] == 0}
    assert {name.rstrip("12") for name in dropped} == {"solid", "mixed"}  # solid: no class of the task; mixed: one
    assert not {name for name in seen(run_dir)} & set(dropped)
    assert all("class-level score" in row["dropped"] and row["score"] is None for row in dropped.values())
    assert {row["class_level"] for row in rows if row["teacher"].startswith(("flat", "untrained"))} == {1.0}
    assert "class level" in text


def test_cards_thin_the_zoo_too(here, world, tmp_path):
    from typer.testing import CliRunner

    from jobs.cli import app

    folder = tmp_path / "cards"
    shutil.copytree(world, folder, ignore=shutil.ignore_patterns("run", "by_names"))
    entries = yaml.safe_load((folder / "zoo.yaml").read_text(encoding="utf-8"))["teachers"]
    for entry in entries:
        if entry["name"] in ("flat", "solid"):
            classes = [tiny.SHAPES.index(name) for name in entry["classes"]]
            pixels, labels = tiny.images(8, seed=50, classes=tuple(classes))
            np.savez(
                folder / f"{entry['name']}.npz",
                images=pixels,
                labels=np.searchsorted(classes, labels),
                classes=np.array(entry["classes"]),
            )
            entry["examples"] = {"type": "numpy", "path": f"{entry['name']}.npz"}
    tiny.write_zoo(folder / "zoo.yaml", [entry for entry in entries if entry["name"] != "broken"])
    made = CliRunner().invoke(app, ["zoo", "cards", str(folder / "zoo.yaml"), "--reference", "mixed"])
    assert made.exit_code == 0, made.output
    only = ["task.source.only=[bar, post]", "assess.scores=[source_accuracy]", "assess.search.least=1"]
    only.append("assess.reference=mixed")
    search = "assess.search.class_level={cost: reference, keep: 0.5}"
    _, rows, _ = run(folder, f"run_dir={folder / 'run'}", search, *only, until="assess")
    by_name = {row["teacher"]: row for row in rows}
    assert {name for name, row in by_name.items() if row["rung"] == 0} == {"solid"}
    assert by_name["flat"]["class_level"] > by_name["solid"]["class_level"]
    assert by_name["flat"]["source_accuracy"] > 0.8 and by_name["mixed"]["source_accuracy"] is None
    assert (
        by_name["mixed"]["class_level"] is None and by_name["mixed"]["score"] is not None
    )  # no card: not judged by it


NO_LABELS = [f"task.splits.{name}=0" for name in ("train_labelled", "probe", "validation", "test")]


def test_without_labels_teachers_are_ranked_by_what_they_say(here, world):
    run_dir = world / "no_labels"
    _, rows, text = run(world, f"run_dir={run_dir}", *NO_LABELS, "assess.unlabelled=100")
    by_name = {row["teacher"]: row for row in rows}
    assert {row["images"] for row in rows if not row["error"]} == {100}
    for name in ("transport_cost", "transport_gain", "bridge_gain", "knn", "leep"):
        assert all(row[name] is None for row in rows)
    told = [row for row in rows if not row["error"]]
    assert all(None not in (row["information"], row["certainty"], row["agreement"]) for row in told)
    assert by_name["blind"]["information"] == pytest.approx(0, abs=1e-6)
    assert by_name["solid"]["information"] > 0.1
    table = pq.read_schema(next(run_dir.glob("assess/*/assessment.parquet")))
    needs = {field.name: field.metadata[b"needs_labels"] == b"true" for field in table if field.metadata}
    assert needs["leep"] and needs["bridge_gain"] and not needs["information"] and not needs["class_level"]
    choice = json.loads(next(run_dir.glob("select/*/faculty.json")).read_text(encoding="utf-8"))
    assert "unverified" in choice["verdict"] and choice["chosen"] and "blind" not in choice["chosen"]
    assert "no labels: scores tell how sure" in text
