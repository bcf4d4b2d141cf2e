"""The gate, the lineage and the champion, with real students, a real image table and a real MLflow store."""

import dataclasses
import io
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.errors import UserError
from pipeline.models.spec import MlflowModel, StudentSpec
from pipeline.models.student import build_student, load_student, save_student
from pipeline.models.zoo import load_zoo
from pipeline.report.console import Display
from pipeline.settings_files import load_settings
from pipeline.stages import tables, training
from pipeline.stages.artefacts import Record, RunFolder, digest_of_file, flatten, write_json, write_settings
from pipeline.stages.base import Run
from pipeline.stages.distill import control_arm, student_arm
from pipeline.stages.evaluate import difference
from pipeline.stages.ingest import Ingest
from pipeline.stages.register import Register
from pipeline.stages.teachers import table_of
from pipeline.tracking.connect import open_tracker
from pipeline.tracking.spec import TrackingSpec
from tests import tiny

pytestmark = [
    pytest.mark.integration,
    # MLflow 3.17 uses a loader strategy that SQLAlchemy 2.1 deprecates.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"),
]
SECRET = "sentinel-7f3a"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Images, two teachers and one store for all tests: creating the store takes seconds."""
    folder = tmp_path_factory.mktemp("world")
    tiny.make_data(folder)
    tiny.make_zoo(folder, ("flat", "mixed"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Work in an empty folder and look that nothing strays into it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    yield
    assert os.listdir(empty) == []


def store_of(world):
    return f"sqlite:///{world}/store/mlflow.db"


def client_of(world):
    import mlflow

    return mlflow.MlflowClient(store_of(world))


def trained(steps, seed=0):
    """A student that has seen the task's classes for so many steps."""
    torch.manual_seed(seed)
    spec = StudentSpec(name="small_cnn", kwargs={"width": 8})
    student = build_student(spec, 4, (1, tiny.SIDE, tiny.SIDE))
    pixels, labels = tiny.images(100, seed=50)
    inputs, targets = torch.from_numpy(pixels)[:, None], torch.from_numpy(labels)
    optimiser = torch.optim.Adam(student.parameters(), lr=5e-3)
    student.train()
    for step in range(steps):
        rows = torch.arange(step * 32, step * 32 + 32) % len(targets)
        optimiser.zero_grad()
        nn.functional.cross_entropy(student(inputs[rows]), targets[rows]).backward()
        optimiser.step()
    return student.eval()


@pytest.fixture(scope="module")
def students():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for nets as small as these a second thread only waits
    yield {"weak": trained(0), "fair": trained(23), "good": trained(60)}
    torch.set_num_threads(threads)


def said(student, images):
    with torch.no_grad():
        return student(images)


@dataclasses.dataclass
class Finished:
    """A run whose stages up to `evaluate` are finished; `register` can be called as often as wanted."""

    run: Run
    console: Console

    def register(self):
        """Run the stage as the pipeline does; return what it says of itself and its key's inputs."""
        run, stage = self.run, Register()
        inputs = flatten(dict(stage.inputs(run))) | {f"{need}.digest": run.records[need].digest for need in stage.needs}
        key = f"key{len(list(run.files.root.glob('register/*')))}"
        folder = run.files.folder("register", key)
        folder.mkdir(parents=True)
        settings = run.settings
        with (
            open_tracker(settings.tracking, run.files.root, name="tiny", key=run.files.identity) as tracker,
            tracker.run("register", key=key, params=inputs) as child,
        ):
            write_settings(folder / "settings.yaml", settings.dump())
            child.artifact(folder / "settings.yaml")
            run.root = tracker
            outcome = stage.run(run.within(child), folder)
        clock = float(len(list(run.files.root.glob("register/*"))))
        record = Record("register", key, outcome.digest, inputs, outcome.summary, 1.0, clock)
        run.files.finish(record)
        run.records["register"] = record
        tables.after("register", run)
        return outcome.summary

    @property
    def folder(self):
        return self.run.folder("register")

    @property
    def shown(self):
        return " ".join(self.console.export_text(clear=False).split())


def finished(world, folder, student, control, *, chosen=("flat", "mixed"), guard=None, zoo=None, **changes):
    """Bring a run as far as `register`: the table is real, what the student and the control say is what they say."""
    register = {"name": folder.name, **changes.pop("register", {})}
    tracking = {"uri": store_of(world), **changes.pop("tracking", {})}
    path = tiny.make_settings(world, run_dir=str(folder / "run"), register=register, tracking=tracking, **changes)
    console = Console(record=True, width=400, file=io.StringIO(), highlight=False)
    settings = load_settings([path])
    files = RunFolder(settings.run_dir)
    files.prepare()
    run = Run(settings, files, Display(console), zoo or load_zoo(settings.zoo.path))

    def record(stage, digest, **summary):
        run.records[stage] = Record(stage, "k", digest, {}, summary, 1.0, 1.0)
        target = files.folder(stage, "k")
        target.mkdir(parents=True, exist_ok=True)
        return target

    outcome = Ingest().run(run, record("ingest", ""))
    record("ingest", outcome.digest, **outcome.summary)
    rows = [
        {
            "teacher": name,
            "score": 0.7,
            "score_low": 0.6,
            "score_high": 0.8,
            "knn": 0.5,
            "parameters": 1000,
            "classes": 2,
        }
        for name in (*chosen, "nobody")
    ]
    pq.write_table(pa.Table.from_pylist(rows), record("assess", "a") / "assessment.parquet")
    write_json(record("select", "s") / "faculty.json", {"chosen": list(chosen), "best_single": None})
    shares = {name: 10 * (number + 1) for number, name in enumerate(chosen)}
    record("amalgamate", "taught" if chosen else "none", shares=shares)
    distill = save_student(student, record("distill", ""))
    summary = {"parameters": student.num_parameters, "taught": bool(chosen)}
    if guard is not None:
        summary["guard"] = {"kept": guard}
    record("distill", digest_of_file(distill / "model.safetensors"), **summary)

    test = table_of(run).split("test")
    record("evaluate", "e")
    if len(test):
        arms = [("student", "the faculty", student_arm(run), student)]
        if control is not None:
            arms.append(("no_teacher", "no teacher", control_arm(run), control))
        if guard == "no_teacher":
            arms[0], arms[1] = (*arms[1][:3], student), (*arms[0][:3], control)
        evaluated = []
        for name, title, arm, module in arms:
            os.makedirs(arm.folder, exist_ok=True)
            save_file({"test": said(module, test.images()).contiguous()}, f"{arm.folder}/predictions.safetensors")
            score = training.score(run, arm, "test")
            row = {"name": name, "title": title, "accuracies": [score.accuracy], "mean": score.accuracy, "std": 0.0}
            evaluated.append(row | {"ece": score.ece, "first": score.as_dict(tiny.SHAPES)})
        for row in evaluated[1:]:
            row |= difference(evaluated[0]["accuracies"], row["accuracies"])
        write_json(run.folder("evaluate") / "evaluation.json", {"arms": evaluated, "verdict": "better", "classes": []})
    else:
        write_json(run.folder("evaluate") / "evaluation.json", {"arms": [], "verdict": "not evaluated", "classes": []})
    return Finished(run, console)


def faculty(*arguments):
    """Run a command in this process; return its exit code and what it printed, errors as `main` would end with."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "400"})
    if isinstance(result.exception, UserError):
        return 2, str(result.exception)
    assert result.exception is None, result.exception
    return result.exit_code, " ".join(result.output.split())


def aliases(world, name):
    return {alias: str(number) for alias, number in client_of(world).get_registered_model(name).aliases.items()}


def champion(world, name):
    return aliases(world, name).get("champion")


def test_the_first_student_that_beats_no_teacher_becomes_a_challenger(world, tmp_path, students):
    run = finished(world, tmp_path, students["good"], students["weak"])
    found = run.register()
    name = tmp_path.name
    assert (found["version"], found["gate"], found["promoted"], found["created"]) == ("1", "passed", False, True)
    assert found["uri"] == f"models:/{name}@challenger"
    assert found["difference.no_teacher"] > 0.3

    client = client_of(world)
    assert aliases(world, name) == {"challenger": "1"}  # nobody's production has changed
    version = client.get_model_version(name, "1")
    assert version.tags["faculty.gate"] == "passed"
    assert version.tags["faculty.gate.champion"] == "none"
    assert "there is no champion yet" in version.tags["faculty.gate.why"]
    assert version.tags["accuracy"] == str(training.score(run.run, student_arm(run.run), "test").accuracy)
    assert "gate passed: +" in run.shown
    assert f"faculty promote models:/{name}@challenger --tracking-uri {store_of(world)}" in run.shown

    told = json.loads((run.folder / "registered.json").read_text())
    assert [hurdle["outcome"] for hurdle in told["decision"]["hurdles"]] == ["passed", "not needed"]
    assert told["decision"]["hurdles"][0]["images"] == 80
    assert version.tags["faculty.test_fingerprint"] == told["decision"]["test_fingerprint"]

    again = run.register()
    assert (again["version"], again["created"]) == ("1", False)
    assert len(client.search_model_versions(f"name = '{name}'")) == 1


def test_the_lineage_names_every_teacher_and_the_card_its_licence(world, tmp_path, students):
    run = finished(world, tmp_path, students["good"], students["weak"])
    licences = {"flat": "CC-BY-NC-4.0", "mixed": ""}
    zoo = run.run.zoo
    specs = {name: zoo[name].model_copy(update={"licence": text}) for name, text in licences.items()}
    run.run.zoo = zoo._with(specs)
    summary = run.register()
    lineage = json.loads((run.folder / "registered.json").read_text())["lineage"]
    assert lineage["data"]["fingerprint"] == table_of(run.run).fingerprint
    assert lineage["data"]["sources"]["source"]["location"].endswith("shapes.npz")
    assert lineage["data"]["images"] == {
        "train_labelled": 16,
        "train_unlabelled": 400 - 16 - 32 - 32 - 80,
        "probe": 32,
        "validation": 32,
        "test": 80,
    }
    assert lineage["teaching"] == "direct"
    for name, share in (("flat", 1 / 3), ("mixed", 2 / 3)):
        teacher = lineage["teachers"][name]
        assert teacher["weights_sha256"] == digest_of_file(world / "teachers" / f"{name}.safetensors")
        assert teacher["source"]["location"] == str(world / "teachers" / f"{name}.safetensors")
        assert teacher["licence"] == licences[name]
        assert teacher["preprocessing"]["size"] == tiny.SIDE
        assert teacher["scores"] == {"score": 0.7, "score_low": 0.6, "score_high": 0.8, "knn": 0.5}
        assert teacher["share"] == pytest.approx(share)
    assert set(lineage["stages"]) == {"ingest", "assess", "select", "amalgamate", "distill", "evaluate"}
    assert lineage["code"]["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    client = client_of(world)
    assert client.get_run(lineage["run"]["stage_run_id"]).data.tags["mlflow.parentRunId"] == lineage["run"]["run_id"]
    assert client.get_model_version(tmp_path.name, "1").run_id == lineage["run"]["stage_run_id"]

    assert summary["warnings"] == [
        "flat: CC-BY-NC-4.0 excludes commercial use",
        "mixed: no licence is stated; ask its owner before the student is used",
    ]
    assert "licence of flat: CC-BY-NC-4.0 excludes commercial use" in run.shown
    card = (run.folder / "model_card.md").read_text()
    for line in (
        "| no teacher | 1 |",
        "- **Warning** flat: CC-BY-NC-4.0",
        f"`{digest_of_file(world / 'teachers' / 'flat.safetensors')}`",
        "The gate: **passed**",
        "0.700 (0.600 to 0.800) | 33 % |",
        "Weakest classes: ",
        lineage["settings"]["sha256"],
        lineage["data"]["fingerprint"],
    ):
        assert line in card, line
    assert client.get_model_version(tmp_path.name, "1").description == card


def test_a_student_that_its_teachers_did_not_help_is_no_version_unless_asked_for(world, tmp_path, students):
    name = tmp_path.name
    run = finished(world, tmp_path, students["weak"], students["good"])
    found = run.register()
    assert found["gate"] == "failed"
    assert not {"version", "uri", "alias"} & set(found)
    assert "points" in found["why"]
    assert "not registered: -" in run.shown
    assert "register.gate=false" in run.shown
    assert client_of(world).search_registered_models(f"name = '{name}'") == []
    assert json.loads((run.folder / "registered.json").read_text())["version"] is None

    wanted = finished(world, tmp_path, students["weak"], students["good"], register={"gate": False, "promote": True})
    found = wanted.register()
    assert (found["version"], found["gate"], found["promoted"]) == ("1", "failed", False)
    code, text = faculty("promote", f"models:/{name}@challenger", "--tracking-uri", store_of(world))
    assert code == 2
    assert "failed at the gate (-" in text
    assert "--force" in text
    assert champion(world, name) is None
    code, text = faculty("promote", f"models:/{name}/1", "--force", "--tracking-uri", store_of(world))
    assert code == 0
    assert "overruled" in text
    assert champion(world, name) == "1"
    assert client_of(world).get_model_version(name, "1").tags["faculty.promoted"].startswith("by force: it failed")


def test_the_champion_is_beaten_only_by_a_clear_margin_on_the_same_images(world, tmp_path, students):
    name, uri = tmp_path.name, store_of(world)
    first = finished(world, tmp_path / name, students["fair"], students["weak"], register={"promote": True})
    assert first.register()["promoted"]  # nothing to beat, and the settings ask for it
    assert champion(world, name) == "1"

    # Another run, other weights, a little better at most: not clear on 80 images, so that the champion stays.
    twin = load_student(first.run.folder("distill"))
    with torch.no_grad():
        next(iter(twin.net.parameters())).mul_(1.001)
    second = finished(world, tmp_path / "b" / name, twin, students["weak"], register={"promote": True})
    found = second.register()
    assert (found["version"], found["gate"], found["promoted"]) == ("2", "failed", False)
    hurdles = {
        one["against"]: one
        for one in json.loads((second.folder / "registered.json").read_text())["decision"]["hurdles"]
    }
    assert hurdles["champion"]["version"] == "1"
    assert hurdles["champion"]["same_test"] is True
    # What the champion says here is what it said of these images when it was trained.
    test = table_of(second.run).split("test")
    theirs = (said(students["fair"], test.images()).argmax(1) == test.labels).double()
    ours = (said(twin, test.images()).argmax(1) == test.labels).double()
    assert hurdles["champion"]["theirs"] == pytest.approx(float(theirs.mean()))
    assert hurdles["champion"]["difference"] == pytest.approx(float((ours - theirs).mean()))
    expected = float((ours - theirs).numpy().std(ddof=1) / np.sqrt(80))
    assert hurdles["champion"]["standard_error"] == pytest.approx(expected)
    assert aliases(world, name) == {"champion": "1", "challenger": "2"}
    code, text = faculty("promote", f"models:/{name}/2", "--tracking-uri", uri)
    assert (code, "failed at the gate" in text) == (2, True)

    third = finished(world, tmp_path / "c" / name, students["good"], students["weak"])
    found = third.register()
    assert (found["version"], found["gate"], found["promoted"]) == ("3", "passed", False)
    assert champion(world, name) == "1"
    code, text = faculty("promote", f"models:/{name}@challenger", "--tracking-uri", uri)
    assert (code, text) == (
        0,
        f"models:/{name}@champion version 1 → version 3 to take it back: faculty promote --back {name}",
    )
    assert champion(world, name) == "3"
    assert faculty("promote", f"models:/{name}/3", "--tracking-uri", uri)[1].endswith("is version 3 already")
    assert faculty("promote", "--back", name, "--tracking-uri", uri) == (
        0,
        f"models:/{name}@champion version 3 → version 1",
    )
    assert champion(world, name) == "1"
    code, text = faculty("promote", "--back", name, "--tracking-uri", uri)
    assert (code, "had no version before version 1" in text) == (2, True)


def test_promotions_are_taken_back_one_by_one_and_deleted_versions_passed_over(world, tmp_path, students):
    name, client = tmp_path.name, client_of(world)
    for number in range(3):
        run = finished(
            world, tmp_path / str(number) / name, trained(5 + number), students["weak"], register={"gate": False}
        )
        run.register()
    for number in "123":
        faculty("promote", f"models:/{name}/{number}", "--force", "--tracking-uri", store_of(world))
    client.delete_model_version(name, "2")
    assert faculty("promote", "--back", f"models:/{name}@champion", "--tracking-uri", store_of(world))[0] == 0
    assert champion(world, name) == "1"


def test_the_settings_name_registry_and_champion(world, tmp_path, students):
    """A file of settings stands for --tracking-uri, and its alias is the one that moves."""
    name = tmp_path.name
    run = finished(world, tmp_path, students["fair"], students["weak"], register={"champion": "production"})
    run.register()
    settings = tmp_path / "run.yaml"
    settings.write_text((world / "run.yaml").read_text().replace("path: ", f"path: {world}/"))
    assert faculty("promote", f"models:/{name}@challenger", "-c", settings)[0] == 0
    assert aliases(world, name) == {"challenger": "1", "production": "1"}
    better = finished(
        world, tmp_path / "b" / name, students["good"], students["weak"], register={"champion": "production"}
    )
    found = better.register()
    assert (found["version"], found["gate"]) == ("2", "passed")
    assert "against the champion, version 1" in found["why"]


def test_a_verdict_against_another_champion_does_not_count(world, tmp_path, students):
    name, uri = tmp_path.name, store_of(world)
    runs = [finished(world, tmp_path / kind / name, students[kind], students["weak"]) for kind in ("fair", "good")]
    for run in runs:
        assert run.register()["gate"] == "passed"  # each found no champion
    before = Register().inputs(runs[0].run)
    assert faculty("promote", f"models:/{name}/2", "--tracking-uri", uri)[0] == 0
    code, text = faculty("promote", f"models:/{name}/1", "--tracking-uri", uri)
    assert code == 2
    assert "it was compared with no champion, and now the champion is version 2" in text
    # The first run's registration is stale now; the second's is not, although its own student was promoted.
    assert (before["champion"], Register().inputs(runs[0].run)["champion"]) == ("none", "2")
    assert Register().inputs(runs[1].run)["champion"] == "none"
    again = runs[0].register()
    assert (again["version"], again["created"], again["gate"]) == ("1", False, "failed")
    tags = client_of(world).get_model_version(name, "1").tags
    assert (tags["faculty.gate"], tags["faculty.gate.champion"]) == ("failed", "2")
    assert "failed at the gate" in faculty("promote", f"models:/{name}/1", "--tracking-uri", uri)[1]
    # While the store does not answer, a registration is not made stale by that.
    lost = TrackingSpec(uri="http://127.0.0.1:9", timeout=1)
    runs[0].run.settings = runs[0].run.settings.model_copy(update={"tracking": lost})
    assert Register().inputs(runs[0].run)["champion"] == "2"


def test_the_champion_itself_is_not_held_against_itself(world, tmp_path, students):
    name = tmp_path.name
    run = finished(world, tmp_path / name, students["good"], students["weak"], register={"promote": True})
    assert run.register()["promoted"]
    other = finished(world, tmp_path / "b" / name, students["good"], students["weak"], register={"promote": True})
    found = other.register()
    assert (found["version"], found["created"], found["gate"]) == ("1", False, "passed")
    assert "the very same weights" in found["why"]
    assert champion(world, name) == "1"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"evaluate": {"controls": []}}, "evaluate.controls has no no_teacher"),
        (
            {"task": {"splits": {"train_labelled": 0, "probe": 0, "validation": 0, "test": 20}}},
            "without labels there is no student without teachers",
        ),
    ],
)
def test_what_can_not_be_judged_is_registered_and_not_promoted(world, tmp_path, students, changes, why):
    if "task" in changes:
        source = {"type": "numpy", "path": "shapes.npz"}
        changes["task"] = {"source": source, "image": {"size": tiny.SIDE, "channels": 1}, **changes["task"]}
    run = finished(world, tmp_path, students["good"], None, register={"promote": True}, **changes)
    found = run.register()
    assert (found["version"], found["gate"], found["promoted"]) == ("1", "not judged", False)
    assert why in found["why"]
    assert why in run.shown
    code, text = faculty("promote", f"models:/{tmp_path.name}/1", "--tracking-uri", store_of(world))
    assert (code, "the gate is not judged" in text) == (2, True)


@pytest.mark.parametrize("how", ["guard", "none chosen"])
def test_a_student_without_teachers_has_only_the_champion_to_beat(world, tmp_path, students, how):
    if how == "guard":
        run = finished(world, tmp_path, students["good"], students["weak"], guard="no_teacher")
    else:
        run = finished(world, tmp_path, students["good"], None, chosen=())
    found = run.register()
    assert (found["version"], found["gate"]) == ("1", "passed")
    assert "the student is itself the one without teachers" in found["why"]
    card = (run.folder / "model_card.md").read_text()
    assert ("None: no set of teachers" in card) == (how == "none chosen")


class Other(nn.Module):
    def forward(self, images):
        return images.float().mean((2, 3)).expand(-1, 2)


def test_a_champion_that_can_not_be_compared_keeps_its_place(world, tmp_path, students):
    """Another task's model, and one that was pickled: it is not unpickled, and the student is a challenger."""
    import mlflow
    import mlflow.pytorch

    from pipeline.tracking.registry import register_student

    name, client = tmp_path.name, client_of(world)
    spec = TrackingSpec(uri=store_of(world))
    with open_tracker(spec, tmp_path / "other", name="other") as tracker:
        example = np.zeros((2, 1, tiny.SIDE, tiny.SIDE), np.uint8)
        register_student(tracker, student=Other(), example=example, classes=["a", "b"], name=name, alias="champion")
    run = finished(world, tmp_path / name, students["good"], students["weak"], register={"promote": True})
    found = run.register()
    assert (found["version"], found["gate"], found["promoted"]) == ("2", "not judged", False)
    assert "the champion, version 1, can't be compared: it has other classes" in found["why"]

    path = tmp_path / "pickled"
    mlflow.pytorch.save_model(nn.Linear(2, 3), str(path), serialization_format="pickle", pip_requirements=["torch"])
    pickled = client.create_model_version(name, source=str(path), run_id=None)
    client.set_registered_model_alias(name, "champion", pickled.version)
    found = run.register()
    assert (found["version"], found["gate"], found["promoted"]) == ("2", "not judged", False)
    assert "saved by pickle" in found["why"]
    assert champion(world, name) == str(pickled.version)


def test_lineage_goes_down_to_teachers_that_were_students(world, tmp_path, students):
    name = tmp_path.name
    first = finished(world, tmp_path / name, students["fair"], students["weak"])
    first.register()
    zoo = load_zoo(world / "zoo.yaml")
    junior = zoo["mixed"].model_copy(
        update={
            "name": "junior",
            "source": MlflowModel(uri=f"models:/{name}/1"),
            "sha256": None,
            "classes": tiny.SHAPES,
            "preprocessing": None,
        }
    )
    second = finished(
        world,
        tmp_path / "b" / f"{name}-senior",
        students["good"],
        students["weak"],
        chosen=("flat", "junior"),
        zoo=zoo._with({"flat": zoo["flat"], "junior": junior}),
        register={"promote": True},
    )
    second.register()
    uri = f"models:/{name}-senior@champion"
    code, text = faculty("lineage", uri, "--json", "--tracking-uri", store_of(world))
    assert code == 0
    found = json.loads(text)
    assert (found["name"], found["version"], found["aliases"]) == (f"{name}-senior", "1", ["challenger", "champion"])
    assert found["classes"] == list(tiny.SHAPES)
    inner = found["lineage"]["teachers"]["junior"]
    weights = client_of(world).get_model_version(name, "1").tags["faculty.weights_sha256"]
    assert inner["weights_sha256"] == weights
    assert (inner["student"]["name"], inner["student"]["version"]) == (name, "1")
    assert set(inner["student"]["lineage"]["teachers"]) == {"flat", "mixed"}

    code, text = faculty("lineage", uri, "--tracking-uri", store_of(world))
    assert code == 0
    for part in (
        f"{name}-senior version 1 (challenger, champion)",
        "gate passed",
        "junior",
        "flat",
        "shapes.npz",
        weights[:12],
    ):
        assert part in text, part
    assert text.index("junior") < text.index(f"{name} version 1") < text.index("mixed")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["promote", "models:/absent/1"], "there is no models:/absent/1"),
        (["promote", "models:/absent@challenger"], "there is no models:/absent@challenger"),
        (["promote", "absent"], "names no version of a model"),
        (["promote", "--back", "absent"], "there is no such model or alias"),
        (["lineage", "models:/absent@champion"], "there is no models:/absent@champion"),
    ],
)
def test_what_is_not_there_is_one_line(world, tmp_path, students, arguments, part):
    if not os.path.exists(f"{world}/store/mlflow.db"):
        finished(world, tmp_path, students["good"], students["weak"]).register()
    code, text = faculty(*arguments, "--tracking-uri", store_of(world))
    assert (code, part in text, "\n" in text) == (2, True, False), text


def test_a_registry_that_is_not_there_is_not_created(tmp_path):
    code, text = faculty("lineage", "models:/a/1", "--tracking-uri", f"sqlite:///{tmp_path}/absent.db")
    assert (code, "there is no model registry" in text) == (2, True)
    assert not (tmp_path / "absent.db").exists()
    code, text = faculty("promote", "models:/a/1")
    assert (code, "--tracking-uri" in text) == (2, True)


def test_credentials_in_settings_reach_nothing(world, tmp_path, students):
    """A sentinel in the URIs of the images and of a teacher is in no file, database, log or output."""
    run = finished(
        world, tmp_path, students["good"], students["weak"], tracking={"uri": f"sqlite:///{tmp_path}/own/mlflow.db"}
    )
    settings, zoo = run.run.settings, run.run.zoo
    source = settings.task.source.model_copy(update={"path": f"s3://key:{SECRET}@bucket/shapes.npz?token={SECRET}"})
    run.run.settings = settings.model_copy(update={"task": settings.task.model_copy(update={"source": source})})
    place = f"https://me:{SECRET}@host/flat.safetensors?sig={SECRET}"
    flat = zoo["flat"].model_copy(
        update={
            "source": zoo["flat"].source.model_copy(update={"path": place}),
            "licence": f"see https://me:{SECRET}@host/licence",
        }
    )
    run.run.zoo = zoo._with({"flat": flat, "mixed": zoo["mixed"]})
    assert run.register()["version"] == "1"
    card = (run.folder / "model_card.md").read_text()
    assert "s3://bucket/shapes.npz?token=***" in card
    assert "https://host/flat.safetensors?sig=***" in card
    text = faculty("lineage", f"models:/{tmp_path.name}/1", "--tracking-uri", f"sqlite:///{tmp_path}/own/mlflow.db")[1]
    assert "s3://bucket/shapes.npz" in text
    assert SECRET not in text + run.shown
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "MLmodel" for path in kept)
    assert [path for path in kept if SECRET.encode() in path.read_bytes()] == []
