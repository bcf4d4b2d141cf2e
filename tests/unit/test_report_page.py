"""What a run's page says is what its artefacts say; what is not there is left out with the reason."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import spearmanr

from pipeline.engine.evaluation import calibration_error
from pipeline.models.spec import StudentSpec
from pipeline.models.student import build_student
from pipeline.planning.nets import measure_net
from pipeline.report import page
from pipeline.report.page_format import NOT_KNOWN, count, percent, points
from pipeline.stages import report
from pipeline.stages.amalgamate import write_assignments
from pipeline.stages.artefacts import write_json, write_settings
from pipeline.stages.plans import transport_plan
from pipeline.stages.report_facts import rank_correlation
from pipeline.stages.report_folder import kept_run
from pipeline.stages.report_sizes import operations
from pipeline.stages.teachers import table_of
from tests.madefolder import EPOCHS, Made, make_run
from tests.readpage import Page

SECTIONS = [name for name, _ in page.SECTIONS]


def page_of(root: Path) -> Page:
    return Page(page.render(report.gather(kept_run(root))))


def artefact(root: Path, stage: str, name: str):
    (path,) = (root / stage).glob(f"*/{name}")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_run(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def whole(made: Made) -> Page:
    return page_of(made.root)


def test_all_sections_are_there_and_in_the_contents(whole: Page) -> None:
    ids = whole.ids()
    assert len(ids) == len(set(ids))
    assert {"verdict", "size", *SECTIONS} <= set(ids)
    links = {attributes["href"] for tag, attributes, _ in whole.elements if tag == "a"}
    assert {f"#{name}" for name in ("verdict", "size", *SECTIONS)} <= links
    assert whole.data("left-out") == {
        "Knowledge flow": "no features flowed from the teachers into the student (distill.flow)"
    }


def test_the_verdict_is_that_of_the_evaluation(whole: Page, made: Made) -> None:
    found = artefact(made.root, "evaluate", "evaluation.json")
    own, alone, single = found["arms"]
    assert whole.by_id("figure") == f"{percent(own['mean'])}%"
    error = 2 * own["std"] / np.sqrt(2)
    verdict = " ".join(whole.by_id("verdict").split())
    assert f"± {percent(error)}" in verdict
    for arm in (alone, single):
        assert f"{points(arm['difference'])} ± {percent(arm['difference_2se'])} points" in verdict
    assert "+5.0 ± 2.0 points" in verdict and "version 7" in verdict  # the champion, see `Made.register`
    assert "add ensemble to evaluate.controls" in verdict
    clear = alone["difference"] > alone["difference_2se"]
    assert ("better than one without teachers" in verdict) == clear or "not clearly better" in verdict


def test_differences_of_single_trainings_are_taken_in_pairs_over_the_test_images(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    path = made.stage("evaluate") / "evaluation.json"
    found = json.loads(path.read_text())
    for arm in found["arms"][1:]:
        arm |= {"accuracies": arm["accuracies"][:1], "difference_2se": None}
    write_json(path, found)
    credits = {name: value.double().mean(0) for name, value in load_file(path.parent / "credits.safetensors").items()}
    gap = credits["student"] - credits["no_teacher"]
    arm = report.gather(kept_run(made.root), ["verdict"])["parts"]["verdict"]["arms"][1]
    assert arm["difference"] == pytest.approx(float(gap.mean()))
    assert arm["error"] == pytest.approx(2 * float(gap.std()) / len(gap) ** 0.5)
    assert arm["difference_over"] == f"{len(gap)} test images, in pairs"


def test_the_ranking_is_the_assessment(whole: Page, made: Made) -> None:
    rows = pq.read_table(next((made.root / "assess").glob("*/assessment.parquet"))).to_pylist()
    head, *shown = whole.rows("ranking-table")
    assert [row[1][1] for row in shown] == [row["teacher"] for row in rows]
    place = [cell[0] for cell in head].index("k-NN")
    for cells, row in zip(shown, rows, strict=True):
        assert float(cells[3][1]) == row["score"] if row["score"] is not None else cells[3][1] == ""
        assert float(cells[place][1]) == row["knn"]
        assert int(cells[5][1]) == row["parameters"]
    assert ["chosen" in cells[1][0].split() for cells in shown] == [True, True, False, False]


def test_the_agreement_is_spearmans(made: Made) -> None:
    random = np.random.default_rng(0)
    left, right = random.integers(0, 5, 40).astype(float), random.normal(size=40)  # with ties
    assert rank_correlation(left, right) == pytest.approx(spearmanr(left, right).statistic)
    right[3] = np.nan
    keep = ~np.isnan(right)
    assert rank_correlation(left, right) == pytest.approx(spearmanr(left[keep], right[keep]).statistic)
    assert rank_correlation(np.ones(40), right) is None
    found = report.gather(kept_run(made.root), ["agreement"])["parts"]["agreement"]
    matrix = np.array(found["matrix"], float)
    np.testing.assert_allclose(matrix, matrix.T)
    np.testing.assert_allclose(np.diag(matrix), 1)
    # The cost rises as the score falls in the made run; it is turned around.
    assert matrix[found["names"].index("score"), found["names"].index("transport_cost")] == pytest.approx(1)


def test_scores_of_one_s_own_stand_beside_the_built_in_ones(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.root, tmp_path / "run")
    (file,) = (tmp_path / "run" / "assess").glob("*/assessment.parquet")
    table = pq.read_table(file)
    mine = {"own.separation": [0.3, 0.1, 0.2, None], "own.width_of_all": [None, 7.0, 8.0, 9.0]}
    for name, values in mine.items():
        table = table.append_column(name, pa.array(values, pa.float64()))
    pq.write_table(table, file)
    written = yaml.safe_load((tmp_path / "run" / "settings.yaml").read_text(encoding="utf-8"))
    written["assess"]["own"] = {f"not_on_this_machine:{name[4:]}": {} for name in mine}
    write_settings(tmp_path / "run" / "settings.yaml", written)

    found = page_of(tmp_path / "run")
    head, *shown = found.rows("ranking-table")
    titles = [cell[0] for cell in head]
    for name, title in zip(mine, ("yours: separation", "yours: width of all"), strict=True):
        assert titles.index("parameters") < titles.index(title) < titles.index("k-NN")
        told = [cells[titles.index(title)][1] for cells in shown]
        assert [float(value) if value else None for value in told] == mine[name]
    matrix = report.gather(kept_run(tmp_path / "run"), ["agreement"])["parts"]["agreement"]
    place = [matrix["names"].index(name) for name in ("own.separation", "knn")]
    expected = spearmanr(mine["own.separation"][:3], table["knn"].to_pylist()[:3]).statistic
    assert matrix["matrix"][place[0]][place[1]] == pytest.approx(expected)
    assert found.html.count("yours: separation") == 3  # the ranking, and row and column of the agreement


def test_the_transport_plots_show_the_plans(whole: Page, made: Made) -> None:
    run, data = kept_run(made.root), whole.data("data-transport")
    assert [one["teacher"] for one in data["plans"]] == ["mixed", "flat", "solid"]
    assert [one["chosen"] for one in data["plans"]] == [True, True, False]
    for one in data["plans"]:
        plan = transport_plan(run, one["teacher"])
        shares = (plan.mass / plan.mass.sum(0)).numpy()
        drawn = np.zeros_like(shares)
        for row, column, share in one["cells"]:
            drawn[plan.sources.index(one["rows"][row]), column] = share
        np.testing.assert_allclose(drawn, shares, atol=1e-3)


def test_the_classes_have_their_accuracies_and_what_the_set_knows(whole: Page, made: Made) -> None:
    choice, found = artefact(made.root, "select", "faculty.json"), artefact(made.root, "evaluate", "evaluation.json")
    own, alone = (arm["first"]["per_class"] for arm in found["arms"][:2])
    rows = {cells[0][0]: cells for cells in whole.rows("class-table")[1:]}
    assert set(rows) == set(made.classes)
    for name, cells in rows.items():
        assert float(cells[1][1]) == choice["coverage"][name]
        assert (float(cells[3][1]), float(cells[4][1])) == (own[name], alone[name])
        assert float(cells[5][1]) == pytest.approx(own[name] - alone[name])


def test_who_taught_what_and_the_images_of_it(whole: Page, made: Made) -> None:
    (path,) = (made.root / "amalgamate").glob("*/assignments.parquet")
    table, histogram = pq.read_table(path), artefact(made.root, "amalgamate", "histograms.json")
    for cells in whole.rows("teach-1")[1:]:
        place = made.classes.index(cells[0][0])
        assert [int(cell[1]) for cell in cells[2:4]] == [histogram["surest"][name][place] for name in ("mixed", "flat")]
    found = report.gather(kept_run(made.root), ["examples"])["parts"]["examples"]["groups"][0]
    own = np.array(table.column("ambiguity.(together)"))
    assert [one["ambiguity"] for one in found["most"]] == sorted(own.tolist(), reverse=True)[:8]
    assert [one["ambiguity"] for one in found["least"]] == sorted(own.tolist())[:8]
    first, split = found["most"][0], table_of(kept_run(made.root)).split("train_labelled", "train_unlabelled")
    row = int(own.argmax())
    assert first["id"] == table.column("sample_id")[row].as_py() == split.ids[row]
    assert f'src="{first["picture"]}"' in whole.html
    with Image.open(io.BytesIO(base64.b64decode(first["picture"].partition(",")[2]))) as image:
        np.testing.assert_array_equal(np.asarray(image), split.images(torch.tensor([row]))[0, 0].numpy())


def test_confusion_calibration_and_mistakes_are_of_the_students_predictions(whole: Page, made: Made) -> None:
    (path,) = (made.root / "distill").glob("*/predictions.safetensors")
    logits, split = load_file(path)["test"], table_of(kept_run(made.root)).split("test")
    p = logits.softmax(1)
    data = whole.data("data-confusion-1")
    counts = np.zeros((4, 4), int)
    for label, predicted, images in data["cells"]:
        counts[label, predicted] = images
    expected = np.zeros((4, 4), int)
    np.add.at(expected, (split.labels.numpy(), logits.argmax(1).numpy()), 1)
    np.testing.assert_array_equal(counts, expected)
    parts = report.gather(kept_run(made.root), ["calibration", "mistakes"])["parts"]
    own, alone = parts["calibration"]["curves"]
    assert own["ece"] == pytest.approx(calibration_error(p, split.labels))
    assert sum(images for *_, images in own["bins"]) == len(split)
    recomputed = sum(images * abs(right - sure) for sure, right, images in own["bins"]) / len(split)
    assert recomputed == pytest.approx(own["ece"])
    assert alone["ece"] == pytest.approx(artefact(made.root, "evaluate", "evaluation.json")["arms"][1]["first"]["ece"])
    wrong = torch.nonzero(p.argmax(1) != split.labels)[:, 0]
    worst = wrong[p.max(1).values[wrong].argmax()]
    first = parts["mistakes"]["images"][0]
    assert parts["mistakes"]["wrong"] == len(wrong)
    assert first["id"] == split.ids[worst] and first["confidence"] == pytest.approx(float(p[worst].max()))
    assert (first["label"], first["predicted"]) == (
        split.classes[split.labels[worst]],
        split.classes[p[worst].argmax()],
    )


def test_sizes_curves_cost_and_lineage(whole: Page, made: Made) -> None:
    student = report.gather(kept_run(made.root), ["size", "training"])["parts"]
    size = student["size"]
    assert size["student"]["parameters"] == kept_run(made.root).records["distill"].summary["parameters"]
    assert size["student"]["flops"] > 0 and size["student"]["images_per_second"] > 0
    assert size["set"]["parameters"] == 1000 + 1001
    assert size["set"]["images_per_second"] == pytest.approx(80)  # 160 each, one after the other
    assert size == report.gather(kept_run(made.root), ["size"])["parts"]["size"]  # measured once, and kept
    training = student["training"]
    assert [one["name"] for one in training["parts"]] == ["cross_entropy", "kd"]
    assert training["parts"][0]["values"] == [[k, 2 / k] for k in range(1, EPOCHS + 1)]
    assert len(training["curves"]) == 6 and sum(one["own"] for one in training["curves"]) == 2
    for name, record in kept_run(made.root).records.items():
        assert f"{record.seconds:.1f} s" in whole.by_id("cost") and record.key in whole.by_id("lineage"), name
    assert "models:/made@challenger" in whole.by_id("lineage")


@pytest.mark.parametrize("name", ["mlp", "small_cnn", "resnet8"])
def test_operations_are_those_of_the_plan(name: str) -> None:
    student = build_student(StudentSpec(name=name), 5, (3, 16, 16))
    student.train()
    found = operations(student, (3, 16, 16))
    assert student.training and found == measure_net(student, (3, 16, 16)).flops > 0


def test_a_plan_stands_beside_what_was_taken(tmp_path: Path) -> None:
    made = make_run(tmp_path, until="assess")
    plan = {"made": 0, "stages": [{"stage": "assess", "state": "missing", "seconds": 3.0}]}
    write_json(made.root / "plan.json", plan)
    cells = page_of(made.root).rows("cost")[-1]
    assert [cell[0] for cell in cells] == ["assess", "", "2.5 s", "3.0 s", "1.20"]
    write_json(made.root / "plan.json", plan | {"made": 9e12})
    assert "made after these stages had run" in page_of(made.root).by_id("cost")
    (made.root / "plan.json").unlink()
    assert "No plan was made before the run" in page_of(made.root).by_id("cost")


def test_settings_are_there_without_credentials(whole: Page) -> None:
    assert "distill.student.kwargs.width" in whole.by_id("settings-table")
    assert "mlflow.example:5000" in whole.by_id("settings") and "hidden-word" not in whole.html


def test_flow_weights_by_the_names_of_the_teachers(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    path = made.stage("distill") / "history.json"
    rows = json.loads(path.read_text())
    for row in rows:
        row |= {"flow.blocks.1.student": row["epoch"] / EPOCHS, "flow.blocks.1.0": 0.25, "flow.blocks.1.1": 0.5}
    path.write_text(json.dumps(rows))
    from pipeline.engine.teaching import Speaker, Teaching

    speakers = [Speaker(name, ("a",), 1.0, str(tmp_path)) for name in ("mixed", "flat")]
    costs, shares = [torch.zeros(1, 4)] * 2, torch.ones(2, 3)
    Teaching.save(made.stage("amalgamate"), ids=["a", "b", "c"], speakers=speakers, costs=costs, shares=shares)
    (layer,) = report.gather(kept_run(made.root), ["flow"])["parts"]["flow"]["layers"]
    lines = {one["name"]: [value for _, value in one["values"]] for one in layer["lines"]}
    assert layer["layer"] == "blocks.1"
    assert lines == {
        "the student itself": [k / EPOCHS for k in range(1, EPOCHS + 1)],
        "mixed": [0.25] * EPOCHS,
        "flat": [0.5] * EPOCHS,
    }
    assert "the student itself" in page_of(made.root).by_id("flow")


def test_every_sub_task_has_its_own(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    path = made.stage("amalgamate") / "histograms.json"
    one = json.loads(path.read_text())
    write_json(path, {"form": one, "use": one})
    split = table_of(made.run).split("train_labelled", "train_unlabelled")
    unsure, teacher = torch.rand(2, len(split)), torch.arange(len(split)) % 2
    names = ("mixed", "flat")
    found = {"form": (names, teacher, unsure), "use": (names, 1 - teacher, unsure)}
    write_assignments(path.parent, split.ids, found)
    path = made.stage("evaluate") / "evaluation.json"
    evaluation = json.loads(path.read_text()) | {"classes": ["form/round", "form/square", "use/none"]}
    evaluation["arms"][0]["first"]["confusion"] = {"form": [[3, 1], [0, 4]], "use": [[8]]}
    write_json(path, evaluation)
    shown = page_of(made.root)
    assert shown.data("data-confusion-1")["classes"] == ["round", "square"]
    assert shown.data("data-confusion-1")["cells"] == [[0, 0, 3], [0, 1, 1], [1, 1, 4]]
    assert shown.data("data-confusion-2")["classes"] == ["none"]
    assert {"teach-1", "teach-2"} <= set(shown.ids())
    groups = report.gather(kept_run(made.root), ["examples"])["parts"]["examples"]["groups"]
    assert [group["subtask"] for group in groups] == ["form", "use"]
    own = unsure[teacher, torch.arange(len(split))]
    assert groups[0]["most"][0]["ambiguity"] == pytest.approx(float(own.max()))


@pytest.mark.parametrize(
    ("until", "said", "there"),
    [
        ("ingest", "no teacher has been assessed yet", {"cost", "lineage", "settings"}),
        ("assess", "mixed knows most of this task", {"ranking", "agreement", "transport"}),
        ("select", "mixed and flat were chosen to teach", {"classes", "ranking"}),
        ("amalgamate", "mixed and flat were chosen to teach", {"teaching", "classes"}),
        ("distill", "No student has been tested yet", {"training", "teaching"}),
        ("evaluate", "the student is", {"confusion", "calibration", "mistakes"}),
    ],
)
def test_a_run_that_stopped_early_has_the_sections_that_there_are(
    tmp_path: Path, until: str, said: str, there: set[str]
) -> None:
    made = make_run(tmp_path, until=until)
    found = page_of(made.root)
    assert said in found.by_id("verdict")
    missing = set(found.data("left-out"))
    assert not {title for name, title in page.SECTIONS if name in there} & missing
    assert set(SECTIONS) <= set(found.ids())
    if until == "assess":
        assert found.by_id("figure").strip() == "4"
        assert "the stage evaluate has not run" in found.by_id("confusion")


def test_a_run_that_no_teacher_helps_says_so(tmp_path: Path) -> None:
    found = page_of(make_run(tmp_path, chosen=[], until="evaluate").root)
    assert "No teacher helps with this task: the student learnt from the labels alone." in found.by_id("verdict")
    assert "the student is itself the one without teachers" in found.by_id("verdict")
    assert found.data("left-out")["Who taught what"] == "no teacher was chosen"
    assert found.data("data-confusion-1")["cells"]


@pytest.mark.parametrize(
    ("gone", "section", "reason"),
    [
        ("outputs", "transport", "is no longer there"),
        ("distill/*/predictions.safetensors", "calibration", "were not kept"),
        ("distill/*/history.json", "training", "history.json is not there"),
        ("amalgamate/*/histograms.json", "teaching", "histograms.json is not there"),
        ("evaluate/*/evaluation.json", "confusion", "evaluation.json is not there"),
        ("assess/*/assessment.parquet", "ranking", "can't be read"),
        ("ingest/*/images.arrow", "mistakes", "no such image table"),
    ],
)
def test_what_is_gone_is_left_out_with_the_reason(
    made: Made, tmp_path: Path, gone: str, section: str, reason: str
) -> None:
    shutil.copytree(made.root, tmp_path / "run")
    for path in list((tmp_path / "run").glob(gone)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    found = page_of(tmp_path / "run")
    assert reason in found.by_id(section) and "Left out" in found.by_id(section)
    assert "cross_entropy" in found.by_id("settings") and "ingestkey" in found.by_id("lineage")


def test_artefacts_of_an_older_version_are_enough(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.root, tmp_path / "run")
    for name in ("trainings.json", "credits.safetensors"):
        next((tmp_path / "run" / "evaluate").glob(f"*/{name}")).unlink()
    found = report.gather(kept_run(tmp_path / "run"))["parts"]
    assert len(found["training"]["curves"]) == 1 and len(found["calibration"]["curves"]) == 1
    assert found["verdict"]["arms"][1]["error"] is not None


EVIL = '"><img src=x onerror=alert(1)>'
SCRIPT = "</script><script>alert(1)</script>"


def test_names_from_others_stay_text(tmp_path: Path) -> None:
    made = make_run(tmp_path, classes=(SCRIPT, EVIL, "{{ 7 * 7 }}", "a'b&c"), teachers=(EVIL, SCRIPT, "odd", "last"))
    found = page_of(made.root)
    scripts = [attributes for tag, attributes, _ in found.elements if tag == "script"]
    runs = [attributes for attributes in scripts if attributes.get("type") != "application/json"]
    assert runs == [{}]  # ours alone
    assert not [name for _, attributes, _ in found.elements for name in attributes if name.startswith("on")]
    pictures = [attributes["src"] for tag, attributes, _ in found.elements if tag == "img"]
    assert pictures and all(str(source).startswith("data:image/png;base64,") for source in pictures)
    names = [cells[0][0] for cells in found.rows("class-table")[1:]]
    assert set(names) == set(made.classes)  # as they are, and no template was run
    assert {one["teacher"] for one in found.data("data-transport")["plans"]} == {EVIL, SCRIPT, "odd"}
    assert SCRIPT not in found.html and EVIL not in found.html


def test_the_page_fetches_nothing(whole: Page) -> None:
    for tag, attributes, _ in whole.elements:
        for name in ("src", "href", "action", "data", "poster"):
            value = attributes.get(name) or ""
            assert value.startswith(("data:", "#")) or not value, (tag, value)
    assert "url(" not in whole.html and "@import" not in whole.html
    policy = next(a["content"] for t, a, _ in whole.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in str(policy) and "unsafe-eval" not in str(policy)


def test_a_thousand_classes_and_a_thousand_teachers_fit(tmp_path: Path) -> None:
    classes = [f"class number {k} of the catalogue" for k in range(1000)]
    teachers = [f"teacher number {k}" for k in range(1000)]
    made = make_run(tmp_path, classes=classes, teachers=teachers, per_class=1)
    found = page_of(made.root)
    assert len(found.html.encode()) < 4_000_000
    assert not {"Which teachers", "From their classes to yours", "Confusion"} & set(found.data("left-out"))
    assert len(found.rows("ranking-table")) == 1001 and len(found.rows("class-table")) == 1001
    data = found.data("data-confusion-1")
    evaluation = artefact(made.root, "evaluate", "evaluation.json")["arms"][0]["first"]["confusion"]
    assert len(data["classes"]) == 1000 and not data["whole"]
    cells = {(label, predicted): images for label, predicted, images in data["cells"]}
    assert all(cells.get((k, k), 0) == evaluation[k][k] for k in range(1000))
    assert all(evaluation[label][predicted] == images for (label, predicted), images in cells.items())
    plan = found.data("data-transport")["plans"][0]
    assert plan["of"] == 1000 and len({column for _, column, _ in plan["cells"]}) == 1000


def test_more_teachers_than_the_page_holds_are_counted(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.stages.report_facts._TEACHERS", 1)
    found = page_of(made.root)
    assert [cells[1][1] for cells in found.rows("ranking-table")[1:]] == ["mixed", "flat"]  # the best, and the chosen
    assert "2 more, below these" in found.by_id("ranking")


def test_a_section_that_can_not_be_drawn_is_left_out(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = report.gather(kept_run(made.root), ["verdict", "size", "confusion", "cost"])
    facts["parts"]["cost"] = {"stages": [{"stage": "ingest"}]}  # no seconds
    found = Page(page.render(facts))
    assert "it can't be shown" in found.by_id("cost") and found.data("data-confusion-1")["cells"]


def test_every_svg_is_drawn_inside_its_frame(whole: Page) -> None:
    places = [float(value) for value in re.findall(r'(?:cx|x|x1|x2)="(-?[\d.]+)%"', whole.html)]
    assert places and min(places) >= 0 and max(places) <= 100
    for line in re.findall(r'points="([^"]*)"', whole.html):
        values = [float(value) for pair in line.split() for value in pair.split(",")]
        assert all(-1 <= value <= 1001 for value in values)
    assert "nan" not in "".join(re.findall(r"<svg.*?</svg>", whole.html)).lower()


def test_counts_are_written_with_their_thousands() -> None:
    assert (count(43274), percent(-0.0125)) == ("43,274", "\N{MINUS SIGN}1.2")
    assert (points(0.115), percent(None), points(float("nan"))) == ("+11.5", NOT_KNOWN, NOT_KNOWN)
