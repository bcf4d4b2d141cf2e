"""Every recipe of conf/recipes, from images to an evaluated student, on tiny modules in one run folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from pipeline.engine.teaching import Teaching
from pipeline.errors import ConfigError
from pipeline.models.student import load_student
from pipeline.settings_files import load_settings
from pipeline.stages.artefacts import Record
from pipeline.stages.run import run_pipeline
from tests.inprocess import without_ray
from tests.tiny import SHAPES, make_data, make_settings, make_zoo, write_zoo

RECIPES = Path(__file__).parents[2] / "conf" / "recipes"
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
TRACKING = "tracking.enabled=false"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    make_data(folder)
    make_zoo(folder)
    make_settings(folder)
    return folder


@pytest.fixture(autouse=True)
def here(request: pytest.FixtureRequest) -> Iterator[None]:
    """A recipe is about what is taught and how: no Ray is started for it, unless a test asks for one."""
    with contextlib.nullcontext() if "cluster" in request.fixturenames else without_ray():
        yield


def run(world: Path, recipe: str, *overrides: str, until: str = "evaluate") -> dict[str, Record]:
    settings = load_settings([world / "run.yaml", RECIPES / f"{recipe}.yaml"], [TRACKING, *overrides])
    return run_pipeline(settings, until=until)


def folder_of(world: Path, records: dict[str, Record], stage: str) -> Path:
    return world / "run" / stage / records[stage].key


@pytest.mark.slow
def test_views_are_kept_for_the_student_and_for_other_runs(world: Path, cluster: None) -> None:
    overrides = ["select.teachers=[mixed, flat]", "distill.augment.views=3", f"cache.path={world / 'outputs'}"]
    overrides.append("amalgamate.choice=average")
    records = run(world, "faculty", *overrides, until="amalgamate")
    teaching = Teaching.open(folder_of(world, records, "amalgamate"))
    assert teaching.views == 3 and len(teaching) == 256
    rows = torch.arange(256)
    clean, second = (teaching.batch(rows, torch.full((256,), view)).target for view in (0, 1))
    assert not torch.allclose(clean, second)
    # Another run finds all that this one was told; a teacher with other preprocessing is not taken for the same.
    kept = {path.relative_to(world) for path in (world / "outputs").rglob("*.arrow")}
    again = run(world, "faculty", *overrides, f"run_dir={world / 'again'}", until="amalgamate")
    assert {path.relative_to(world) for path in (world / "outputs").rglob("*.arrow")} == kept
    assert again["amalgamate"].digest == records["amalgamate"].digest
    zoo = yaml.safe_load((world / "zoo.yaml").read_text(encoding="utf-8"))["teachers"]
    write_zoo(world / "darker.yaml", [one | {"preprocessing": one["preprocessing"] | {"mean": [0.4]}} for one in zoo])
    other = [f"run_dir={world / 'other'}", f"zoo.path={world / 'darker.yaml'}"]
    run(world, "faculty", *overrides, *other, until="amalgamate")
    assert len(list((world / "outputs").rglob("*.arrow"))) > len(kept)


def test_there_is_a_recipe_for_each_name_of_the_readme() -> None:
    names = {path.stem for path in RECIPES.glob("*.yaml")}
    assert names == {"faculty", "sctd", "aka", "knowledge_flow", "kd", "dkd", "dist", "finetune", "scratch"}
    readme = (RECIPES / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in readme for name in names)


@pytest.mark.parametrize(
    ("recipe", "parts"),
    [
        ("faculty", {"cross_entropy", "transport", "kd"}),
        ("sctd", {"cross_entropy", "transport"}),
        ("kd", {"cross_entropy", "kd"}),
        ("dkd", {"cross_entropy", "dkd"}),
        ("dist", {"cross_entropy", "dist"}),
        ("knowledge_flow", {"cross_entropy", "dependency", "flow_kl"}),
        ("aka", {"target"}),
        ("finetune", {"cross_entropy"}),
        ("scratch", {"cross_entropy"}),
    ],
)
def test_a_recipe_trains_a_student(world: Path, recipe: str, parts: set[str]) -> None:
    # Squared distances of features need more steps than probabilities do.
    choice = ["distill.loop.epochs=15"] if recipe == "aka" else ["select.teachers=[mixed, flat]"]
    records = run(world, recipe, "distill.guard=null", *choice)
    student = folder_of(world, records, "distill")
    history = json.loads((student / "history.json").read_text(encoding="utf-8"))
    assert len(history) == (15 if recipe == "aka" else 4)
    assert parts <= history[-1].keys()
    assert not {"transport", "kd", "dkd", "dist", "target"} - parts & history[-1].keys()
    evaluation = json.loads((folder_of(world, records, "evaluate") / "evaluation.json").read_text(encoding="utf-8"))
    assert evaluation["arms"][0]["mean"] > 0.3  # four classes: better than chance
    load_student(student, trusted_factories=None)


@pytest.mark.slow
def test_blocks_on_a_pool_of_actors_say_the_same(world: Path, cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.stages import speaking

    records = run(world, "faculty", "select.teachers=[mixed, flat]", until="amalgamate")
    before = Teaching.open(folder_of(world, records, "amalgamate"))
    other = world / "blocks"
    monkeypatch.setattr(speaking, "_FEW", 0)
    monkeypatch.setattr(speaking, "_BLOCK", 100)
    records = run(world, "faculty", f"run_dir={other}", "select.teachers=[mixed, flat]", until="amalgamate")
    after = Teaching.open(other / "amalgamate" / records["amalgamate"].key)
    rows = torch.arange(len(before))
    assert torch.equal(before.weights, after.weights)
    assert torch.equal(before.batch(rows, rows + 1).target, after.batch(rows, rows + 1).target)
    assert not list((other / "spoken").rglob("rows-*"))


def test_features_flow_and_fade(world: Path) -> None:
    fade = "distill.flow.ramp=0.7"  # the last of four epochs is without teachers
    records = run(world, "knowledge_flow", fade, "distill.guard=null", "select.teachers=[mixed, flat]")
    student = folder_of(world, records, "distill")
    history = json.loads((student / "history.json").read_text(encoding="utf-8"))
    own = [key for key in history[0] if key.startswith("flow.") and key.endswith(".student")]
    assert own
    for key in own:
        assert history[0][key] < 0.9
        assert history[-1][key] == pytest.approx(1)
    assert (student / "flow.png").stat().st_size > 1000
    evaluation = json.loads((folder_of(world, records, "evaluate") / "evaluation.json").read_text(encoding="utf-8"))
    assert "mean_with_teachers" in evaluation["arms"][0]
    saved = load_student(student, trusted_factories=None)
    assert all(name.split(".")[0] in ("stage1", "stage2", "stage3", "classifier") for name in saved.net.state_dict())


def test_subtasks_get_a_component_and_a_head_each(world: Path) -> None:
    subtasks = "task.subtasks={line: {bar: [bar], post: [post]}, solid: {block: [block], slash: [slash]}}"
    records = run(world, "aka", subtasks)
    assigned = pq.read_table(folder_of(world, records, "amalgamate") / "assignments.parquet")
    assert {"sample_id", "line.teacher", "solid.teacher"} <= set(assigned.column_names)
    # Only teachers that know a sub-task by name teach it.
    assert set(assigned["line.teacher"].to_pylist()) <= {"flat", "untrained", "blind"}
    assert set(assigned["solid.teacher"].to_pylist()) <= {"solid", "mixed", "untrained"}
    student = json.loads((folder_of(world, records, "distill") / "student.json").read_text(encoding="utf-8"))
    assert student["classes"] == ["line/bar", "line/post", "solid/block", "solid/slash"]
    evaluation = json.loads((folder_of(world, records, "evaluate") / "evaluation.json").read_text(encoding="utf-8"))
    assert set(evaluation["arms"][0]["first"]["accuracies"]) == {"line", "solid"}
    assert len(list((world / "run" / "students").glob("component-*"))) >= 2


@pytest.mark.parametrize("recipe", ["faculty", "aka"])
def test_no_label_is_needed(world: Path, recipe: str) -> None:
    splits = "task.splits={train_labelled: 0, probe: 0, validation: 0, train_unlabelled: 200, test: 20}"
    off = ["distill.objective.cross_entropy=null"] if recipe == "faculty" else ["distill.loop.epochs=15"]
    records = run(world, recipe, splits, "select.teachers=[flat, solid]", "evaluate.controls=[]", *off)
    assert not records["assess"].summary["labels"]
    evaluation = json.loads((folder_of(world, records, "evaluate") / "evaluation.json").read_text(encoding="utf-8"))
    assert evaluation["classes"] == list(SHAPES)
    assert evaluation["arms"][0]["mean"] > 0.4  # each of the two teachers knows two of the four classes


def test_what_can_not_be_learnt_without_labels_is_refused_before_any_compute(world: Path) -> None:
    splits = "task.splits={train_labelled: 0, probe: 0, validation: 0, train_unlabelled: 200, test: 20}"
    with pytest.raises(ConfigError, match="nothing in it learns from teachers, and the task has no labels"):
        run(world, "scratch", splits)
    with pytest.raises(ConfigError, match="relations: needs labelled images"):
        run(world, "faculty", splits, "distill.objective.relations={}")


def test_the_guard_keeps_the_student_without_teachers(world: Path) -> None:
    """Teachers that see nothing, taught by labels' weight zero: the student can only be worse."""
    records = run(
        world,
        "kd",
        "select.teachers=[blind]",
        "distill.objective.cross_entropy.weight=0",
        "distill.objective.kd.weight=5",
        "distill.loop.epochs=12",
    )
    guard = records["distill"].summary["guard"]
    assert guard["kept"] == "no_teacher" and guard["advantage"] < 0
    evaluation = json.loads((folder_of(world, records, "evaluate") / "evaluation.json").read_text(encoding="utf-8"))
    assert [arm["name"] for arm in evaluation["arms"]][:2] == ["student", "taught"]
    assert evaluation["arms"][0]["mean"] > evaluation["arms"][1]["mean"]
    assert evaluation["verdict"].startswith("do not transfer")
