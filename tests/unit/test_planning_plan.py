"""The plan as a whole: work counted, throughputs taken up, refusals with their remedies, plan against actual."""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from pipeline.config import Settings
from pipeline.errors import ConfigError
from pipeline.planning.against import against
from pipeline.planning.calibrate import calibrate, sample, threads
from pipeline.planning.command import plan_run
from pipeline.planning.described import GIB, Cluster, parse_cluster
from pipeline.planning.estimate import STAGES, estimate
from pipeline.planning.facts import facts_of, on_first_rung
from pipeline.planning.memory import Memory, disk_of, memory_of
from pipeline.planning.nets import NetSize
from pipeline.planning.plan import make_plan
from pipeline.planning.rates import Rates, Starts, achieved_at
from pipeline.planning.recorded import recorded
from pipeline.planning.refusals import refusals, warnings
from pipeline.planning.teachers import TeacherSize
from pipeline.planning.work import Work, net_sizes, shards_of, work_of
from pipeline.settings_files import load_settings
from pipeline.stages.artefacts import Record, RunFolder, write_settings
from tests.tiny import SIDE, make_data, make_settings, make_zoo

ALL = dict.fromkeys(STAGES, "missing")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world")
    make_zoo(path, ("untrained", "blind"))
    make_data(path, per_class=60)
    return path


def settings_of(folder: Path, *overrides: str, **changes: object) -> Settings:
    return load_settings([make_settings(folder, **changes)], overrides)


def sized(count: int, *, flops: float = 1e6, weights: int = 1000, features: int = 8) -> list[TeacherSize]:
    return [
        TeacherSize(
            f"t{number}",
            "net",
            f"key{number}",
            4,
            (1, SIDE, SIDE),
            NetSize(weights // 4, weights, weights, flops * (1 + number), 100, None, features, 4),
        )
        for number in range(count)
    ]


def work_for(settings: Settings, teachers: list[TeacherSize] | None = None, chosen: list[str] | None = None) -> Work:
    facts = facts_of(settings, None)
    return work_of(settings, facts, teachers or sized(3), net_sizes(settings, facts), chosen)


# --- how much work there is -------------------------------------------------------------------------------------------


def test_splits_are_counted_from_the_settings(folder: Path) -> None:
    facts = facts_of(settings_of(folder), None)
    assert dict(facts.images) == {
        "train_labelled": 16,
        "probe": 32,
        "validation": 32,
        "train_unlabelled": 240 - 80 - 80,
        "test": 80,
    }
    assert (facts.classes, facts.source, facts.rows) == (4, 240, 240)


def test_a_finished_table_says_itself_what_it_has(folder: Path) -> None:
    facts = facts_of(settings_of(folder), {"classes": 3, "rows": 9, "test": 7, "probe": 2})
    assert (facts.classes, facts.count("test", "probe"), facts.count("validation")) == (3, 9, 0)


def test_splits_that_ask_for_too_much_are_noted(folder: Path) -> None:
    facts = facts_of(settings_of(folder, "task.splits.test=100"), None)
    assert "ask for 480 images, the source has 240" in facts.notes[0]


def test_a_small_zoo_sees_all_images(folder: Path) -> None:
    work = work_for(settings_of(folder))
    assert [(rung.teachers, rung.images) for rung in work.rungs] == [(3, 80)]


def test_a_large_zoo_is_searched(folder: Path) -> None:
    work = work_for(settings_of(folder), sized(400))
    # 15 % of 4 and of 8 a class, rounded up: 1 and 2; validation images come last.
    assert [(rung.teachers, rung.images) for rung in work.rungs] == [(400, 12), (40, 68)]
    # The best 32 are tried with 1 to 3 others that have been chosen: with 4 the set is full.
    assert work.fits == ((41, 1), (31, 2), (30, 3), (29, 4))


def test_class_level_keeps_its_share(folder: Path) -> None:
    work = work_for(settings_of(folder, "assess.search.class_level.keep=0.25"), sized(400))
    assert work.candidates == 100


@pytest.mark.parametrize(("count", "share", "seen"), [(40, 0.15, 8), (40, 1.0, 40), (4, 0.5, 4), (0, 0.5, 0)])
def test_a_rung_sees_each_class(count: int, share: float, seen: int) -> None:
    assert on_first_rung(count, 4, share) == seen


def test_trainings_are_counted_as_the_stages_do_them(folder: Path) -> None:
    wanted = "evaluate.controls=[no_teacher, best_single, finetune, ensemble]"
    work = work_for(settings_of(folder, "evaluate.seeds=3", wanted))
    found = {stage: {one.name: one.arms for one in trainings} for stage, trainings in work.trainings.items()}
    # The guard has trained the first control already.
    assert found["distill"] == {"faculty": 1, "no_teacher": 1}
    assert found["evaluate"] == {"faculty": 2, "no_teacher": 2, "best_single": 3, "finetune": 3}
    assert len(work.tested) == len(work.faculty) == 3


def test_without_a_guard_the_control_is_trained_by_evaluate(folder: Path) -> None:
    work = work_for(settings_of(folder, "evaluate.seeds=3", "distill.guard=null"))
    assert {one.name: one.arms for one in work.trainings["evaluate"]} == {"faculty": 2, "no_teacher": 3}


def test_a_step_of_labels_alone_sees_labelled_images_alone(folder: Path) -> None:
    work = work_for(settings_of(folder))
    images = {one.name: one.images(work.facts) for one in work.trainings["distill"]}
    assert images == {"faculty": 32 + 16, "no_teacher": 16}
    assert work.trainings["distill"][0].steps(work.facts) == 3  # 96 taught images in batches of 32


def test_the_faculty_is_a_guess_until_it_is_chosen(folder: Path) -> None:
    guess = work_for(settings_of(folder, "select.max_teachers=2"))
    assert (guess.assumed, [one.name for one in guess.faculty]) == (True, ["t2", "t1"])  # the most costly
    known = work_for(settings_of(folder), chosen=["t0"])
    assert (known.assumed, [one.name for one in known.faculty]) == (False, ["t0"])
    none = work_for(settings_of(folder), chosen=[])
    assert {one.kind for one in none.trainings["distill"]} == {"labels"}


def test_live_teachers_are_run_beside_the_student(folder: Path) -> None:
    plain = work_for(settings_of(folder))
    assert plain.trainings["distill"][0].live == ()
    live = work_for(settings_of(folder, "distill.objective.hints={}", "distill.objective.transport=null"))
    assert live.trainings["distill"][0].live == live.faculty


def test_component_nets_are_trained_in_amalgamate(folder: Path) -> None:
    components = work_for(settings_of(folder, "amalgamate.mode=components"))
    (one,) = components.trainings["amalgamate"]
    assert (one.kind, one.arms) == ("component", 1)
    assert components.raw


def test_shards_leave_out_what_the_assessment_has_kept(folder: Path) -> None:
    settings = settings_of(folder, "distill.augment.views=2")
    assert shards_of(work_for(settings), settings) == {"assess": [80], "amalgamate": [96 - 16, 96]}


# --- seconds and cost -------------------------------------------------------------------------------------------------


NO_STARTS = Starts(**dict.fromkeys(vars(Starts()), 0.0))


def rates(**changes: Any) -> Rates:
    known: dict[str, Any] = {"origin": "described", "flops": 1e6, "load": 0.0, "starts": NO_STARTS, "decode": 0.0}
    return Rates(**(known | changes))


def seconds_of(settings: Settings, work: Work, cluster: Cluster, **changes: Any) -> dict[str, float | None]:
    found = estimate(settings, work, rates(fit=(0.0, 1, 1), **changes), cluster, ALL)
    return {one.stage: one.seconds for one in found}


def test_teachers_take_images_times_operations(folder: Path) -> None:
    settings, teachers = settings_of(folder), sized(3)
    work = work_for(settings, teachers)
    # 1, 2 and 3 million operations an image at 1 million a second, 80 images, two slots: 80 + 240 beside 160.
    assert seconds_of(settings, work, Cluster(cpus=2))["assess"] == pytest.approx(320)
    assert seconds_of(settings, work, Cluster(cpus=1))["assess"] == pytest.approx(480)
    assert seconds_of(settings, work, Cluster(cpus=2, nodes=2))["assess"] == pytest.approx(240)


def test_a_forward_pass_that_was_measured_goes_before_operations(folder: Path) -> None:
    settings, teachers = settings_of(folder), sized(1)
    work = work_for(settings, teachers)
    measured = seconds_of(settings, work, Cluster(cpus=1), forward={"key0": 0.5})
    assert measured["assess"] == pytest.approx(40)


def test_a_training_takes_epochs_times_steps(folder: Path) -> None:
    settings = settings_of(folder)
    work = work_for(settings)
    steps = {"taught": 2.0, "labels": 0.5}
    found = estimate(settings, work, rates(fit=(0.0, 1, 1), steps=steps), Cluster(cpus=2), ALL)
    distill = next(one for one in found if one.stage == "distill")
    # 4 epochs of 3 steps; then 144 images to predict, each a third of an image's part of a step.
    assert distill.parts["faculty"] == pytest.approx(4 * 3 * 2.0 + 144 * 2.0 / 48 / 3)
    assert distill.parts["no_teacher"] == pytest.approx(4 * 3 * 0.5 + 144 * 0.5 / 16 / 3)


def test_more_epochs_never_take_less(folder: Path) -> None:
    few, many = settings_of(folder), settings_of(folder, "distill.loop.epochs=9")
    cluster = Cluster(cpus=2)
    for stage, seconds in seconds_of(many, work_for(many), cluster).items():
        before = seconds_of(few, work_for(few), cluster)[stage]
        assert seconds is not None and before is not None and seconds >= before


def test_workers_share_a_step_and_exchange_gradients(folder: Path) -> None:
    resources = {"student": {"name": "small_cnn"}, "resources": {"num_workers": 2}}
    settings = settings_of(folder, distill=resources)
    work = work_for(settings)
    one, two = Cluster(cpus=2), Cluster(cpus=1, nodes=2, network=1.0)  # a byte a second
    here, apart = (seconds_of(settings, work, cluster)["distill"] for cluster in (one, two))
    assert here is not None and apart is not None
    exchanged = 2 * (2 - 1) / 2 * work.trainings["distill"][0].net.parameter_bytes
    steps = sum(training.steps(work.facts) * training.loop.epochs for training in work.trainings["distill"])
    assert apart - here > 0.9 * steps * exchanged
    # What was measured with the workers' exchange does not get it once more.
    known = {"steps": {"taught": 1.0, "labels": 1.0}, "synchronised": True}
    assert seconds_of(settings, work, one, **known)["distill"] == seconds_of(settings, work, two, **known)["distill"]


def test_an_elastic_group_takes_what_there_is(folder: Path) -> None:
    settings = settings_of(folder, "distill.resources.num_workers=[1, 4]")
    work = work_for(settings)
    found = estimate(settings, work, rates(fit=(0.0, 1, 1)), Cluster(cpus=3), ALL)
    assert next(one for one in found if one.stage == "distill").at_once == 3


def test_a_fresh_stage_takes_nothing(folder: Path) -> None:
    settings = settings_of(folder)
    states = ALL | {"assess": "fresh", "ingest": "fresh"}
    found = {
        one.stage: one for one in estimate(settings, work_for(settings), rates(), Cluster(cpus=2), states, price=9)
    }
    assert (found["assess"].seconds, found["assess"].state) == (0.0, "fresh")


def test_what_is_not_known_is_not_made_up(folder: Path) -> None:
    settings = settings_of(folder, "evaluate.seeds=2")
    found = estimate(settings, work_for(settings), Rates(), Cluster(cpus=2), ALL)
    known = {one.stage: one.seconds is not None for one in found}
    assert not known["assess"] and not known["distill"] and not known["evaluate"]


def test_all_gpus_are_paid_as_long_as_a_stage_runs(folder: Path) -> None:
    settings = settings_of(folder)
    work = work_for(settings)
    cluster = Cluster(nodes=2, gpus=4)
    for one in estimate(settings, work, rates(fit=(0.0, 1, 1)), cluster, ALL, price=3.0):
        assert one.seconds is not None
        assert one.cost == pytest.approx(one.seconds / 3600 * 8 * 3.0)
    assert all(one.cost is None for one in estimate(settings, work, rates(), Cluster(cpus=2), ALL, price=3.0))


def test_only_the_first_stage_with_ray_starts_it(folder: Path) -> None:
    settings = settings_of(folder, "tracking.enabled=false")
    starts = Starts(driver=3, session=5, tasks=6, trials=7, group=8)
    work = work_for(settings)
    known = rates(fit=(0.0, 1, 1), starts=starts)
    both = {one.stage: one.parts["start"] for one in estimate(settings, work, known, Cluster(cpus=2), ALL)}
    assert (both["assess"], both["amalgamate"], both["distill"]) == (5 + 7, 6, 0)  # trained in this process
    later = estimate(settings, work, known, Cluster(cpus=2), ALL | {"assess": "fresh"})
    assert next(one for one in later if one.stage == "amalgamate").parts["start"] == 5 + 6


def test_achieved_operations_lie_between_those_measured() -> None:
    points = ((1e6, 1e9), (1e8, 4e9))
    assert achieved_at(points, 1e5) == 1e9
    assert achieved_at(points, 1e7) == pytest.approx(2e9)  # the middle of the logarithms
    assert achieved_at(points, 1e9) == 4e9
    assert achieved_at(points[:1], 5.0) == 1e9


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_teacher_takes_weights_and_a_batch_of_activations(folder: Path) -> None:
    settings = settings_of(folder, "assess.batch_size=10")
    work = work_for(settings, sized(3, weights=4000))
    (one,) = memory_of(settings, work, Rates(resident=7000), Cluster(cpus=2, memory=GIB), ["assess"])
    pixels = 10 * 5 * SIDE * SIDE
    assert one.parts == {
        "process": 7000,
        "probe": 80 * (SIDE * SIDE + 26),
        "weights": 4000,
        "activations": 1000 + pixels,
    }
    assert (one.bytes, one.beside) == (sum(one.parts.values()), 2)
    assert one.all == 2 * one.bytes  # two that are alike


def test_a_student_takes_weights_gradients_moments_and_activations(folder: Path) -> None:
    settings = settings_of(folder, "distill.resources.num_workers=2", "distill.loop.ema=0.9")
    work = work_for(settings)
    one = next(one for one in memory_of(settings, work, Rates(), Cluster(cpus=2), ["distill"]))
    net = work.trainings["distill"][0].net
    assert one.parts["weights and optimiser"] == 2 * net.weight_bytes + 2 * net.parameter_bytes
    assert one.parts["gradients"] == 2 * net.parameter_bytes  # and the buckets that workers exchange
    assert one.parts["activations"] == (48 // 2) * (net.training_bytes or 0)


def test_parts_of_a_batch_take_less(folder: Path) -> None:
    def activations(parts: int) -> int:
        settings = settings_of(folder, f"distill.loop.parts={parts}")
        (one,) = memory_of(settings, work_for(settings), Rates(), Cluster(cpus=2), ["distill"])
        return one.parts["activations"]

    assert activations(4) * 4 == activations(1)


def test_gpus_hold_what_shares_them(folder: Path) -> None:
    settings = settings_of(folder, "assess.resources.gpus=0.5")
    found = memory_of(settings, work_for(settings), Rates(), Cluster(gpus=1, cpus=8, gpu_memory=GIB), ["assess"])
    gpu = next(one for one in found if one.on == "GPU")
    assert (gpu.beside, gpu.limit) == (2, GIB)
    assert {one.on for one in found} == {"GPU", "processor"}


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(settings: Settings, cluster: Cluster, *, teachers: list[TeacherSize] | None = None) -> list[str]:
    work = work_for(settings, teachers)
    memory = memory_of(settings, work, Rates(resident=2**20), cluster, STAGES)
    disk = disk_of(settings, work, Rates(), STAGES)
    return [str(one) for one in refusals(settings, cluster, memory, disk, STAGES)]


def test_nothing_stands_against_what_fits(folder: Path) -> None:
    assert refused(settings_of(folder), Cluster(cpus=2, memory=64 * GIB)) == []


def test_a_teacher_that_does_not_fit_into_the_device(folder: Path) -> None:
    settings = settings_of(folder, "assess.resources.gpus=1", "amalgamate.resources.gpus=1")
    cluster = Cluster(cpus=8, gpus=1, gpu_memory=4 * GIB)
    (first, *_) = refused(settings, cluster, teachers=sized(1, weights=5 * GIB))
    assert "assess: teacher t0 needs" in first and "a GPU has 4.0 GiB" in first and "zoo.only" in first


def test_a_batch_that_does_not_fit_is_lowered(folder: Path) -> None:
    settings = settings_of(folder, "assess.resources.gpus=1")
    teacher = sized(1)[0]
    assert teacher.net is not None
    wide = dataclasses.replace(teacher, net=dataclasses.replace(teacher.net, forward_bytes=GIB))
    (first, *_) = refused(settings, Cluster(cpus=8, gpus=1, gpu_memory=8 * GIB), teachers=[wide])
    assert "lower assess.batch_size" in first


def test_teachers_that_share_a_gpu_must_fit_together(folder: Path) -> None:
    settings = settings_of(folder, "assess.resources.gpus=0.25")
    found = refused(settings, Cluster(cpus=8, gpus=1, gpu_memory=4 * GIB), teachers=sized(4, weights=2 * GIB))
    assert any("4 processes share a GPU" in one and "assess.resources.gpus=1" in one for one in found)


def test_more_workers_than_processors(folder: Path) -> None:
    (found,) = refused(settings_of(folder, "distill.resources.num_workers=4"), Cluster(cpus=2))
    assert "4 workers of 1 CPU each, but the cluster has room for 2" in found
    assert "distill.resources.num_workers=2" in found


def test_a_cluster_that_grows_is_waited_for(folder: Path) -> None:
    settings = settings_of(folder, "distill.resources.num_workers=4", cluster={"address": "auto", "autoscaling": True})
    assert refused(settings, dataclasses.replace(Cluster(cpus=2), shared=True)) == []


def test_a_trial_that_no_node_can_hold(folder: Path) -> None:
    (found,) = refused(settings_of(folder, "assess.resources.gpus=1"), Cluster(cpus=8))
    assert "assess: a teacher asks for 1 CPU, 1 GPU, more than a node has" in found


def test_a_local_folder_with_a_cluster(folder: Path) -> None:
    settings = settings_of(folder, cluster={"address": "ray://head:10001"})
    cluster = Cluster(nodes=4, cpus=8, shared=False)
    (found,) = refused(settings, cluster)
    assert "'ray://head:10001'" in found and "shared path" in found
    assert refused(settings, dataclasses.replace(cluster, shared=True)) == []
    assert refused(settings, dataclasses.replace(cluster, nodes=1)) == []
    assert refused(settings.model_copy(update={"run_dir": "s3://bucket/run"}), cluster) == []


def test_weights_on_a_disk_of_this_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.planning.refusals.is_shared", lambda place: "shared" in place.parts)
    settings, cluster = settings_of(folder, cluster={"address": "auto"}), Cluster(nodes=4, cpus=8)
    (told,) = warnings([], settings, cluster, [Path("/shared/zoo"), Path("/disk/zoo")])
    assert "weights in /disk/zoo" in told and "every node needs them at that path" in told
    assert warnings([], settings, cluster, [Path("/shared/zoo")]) == []
    assert warnings([], settings, dataclasses.replace(cluster, nodes=1), [Path("/disk/zoo")]) == []


def test_a_cache_over_its_quota(folder: Path) -> None:
    (found,) = refused(settings_of(folder, "cache.quota_gb=0.0000001"), Cluster(cpus=2))
    assert "set cache.quota_gb=" in found and "cache.top_k" in found


def test_teachers_that_can_not_teach_together(folder: Path) -> None:
    (found,) = refused(settings_of(folder, "amalgamate.choice=together", "distill.objective.hints={}"), Cluster(cpus=2))
    assert "together can't be" in found and "least_ambiguous" in found


def test_what_should_worry_is_told(folder: Path) -> None:
    bad = dataclasses.replace(sized(1)[0], problem="lacks 2 of the net's weights")
    settings = settings_of(folder, cluster={"address": "auto"})
    here = dataclasses.replace(Cluster(cpus=2), here=True)
    found = warnings([bad], settings, here)
    assert found[0] == "teacher t0: lacks 2 of the net's weights"
    assert "is not asked" in found[1]
    assert "would use one machine" in warnings([], settings_of(folder), Cluster(nodes=2))[0]


# --- throughputs ------------------------------------------------------------------------------------------------------


def leave_trainings(files: RunFolder, now: float) -> None:
    """Two students, four epochs each, in steps of 2 and of 0.5 s."""
    for name, step, images in (("faculty-seed0-a", 2.0, 48), ("no_teacher-seed0-b", 0.5, 16)):
        home = files.root / "students" / name
        home.mkdir(parents=True)
        epoch = {"seconds": 3 * step, "images_per_second": images / step}
        (home / "history.json").write_text(json.dumps([epoch] * 4), encoding="utf-8")
        (home / "done.json").write_text("{}", encoding="utf-8")
        os.utime(home / "done.json", (now - 10, now - 10))


def finished(settings: Settings, teachers: list[TeacherSize]) -> RunFolder:
    """A run folder as a finished run leaves it, with figures that are easy to reckon with."""
    files = RunFolder(settings.run_dir)
    files.prepare()
    now = time.time()
    for stage, seconds in zip(STAGES, (1.0, 12.0, 2.0, 3.0, 30.0, 40.0, 4.0), strict=True):
        summary = {"assessed_now": len(teachers), "teachers": len(teachers)} if stage == "assess" else {}
        files.folder(stage, "k").mkdir(parents=True)
        write_settings(files.folder(stage, "k") / "settings.yaml", settings.dump())
        files.finish(Record(stage, "k", "d", {}, summary, seconds, now))
    rows = [
        {
            "teacher": one.name,
            "images": 80,
            "forward_seconds": 0.8,
            "seconds": 1.0,
            "error": None,
            "peak_mb": 500.0 + number,
            "peak_gpu_mb": None,
        }
        for number, one in enumerate(teachers)
    ]
    pq.write_table(pa.Table.from_pylist(rows), files.folder("assess", "k") / "assessment.parquet")
    leave_trainings(files, now)
    return files


def test_former_runs_tell_how_fast_things_go(folder: Path, tmp_path: Path) -> None:
    settings, teachers = settings_of(folder, f"run_dir={tmp_path / 'run'}"), sized(3)
    work = work_for(settings, teachers)
    files = finished(settings, teachers)
    found = recorded(settings, work, files)
    assert found is not None and found.origin == "recorded"
    assert found.forward == pytest.approx({f"key{number}": 0.01 for number in range(3)})
    assert found.steps == pytest.approx({"taught": 2.0, "labels": 0.5})
    # Both were trained while distill ran, and while evaluate did: 24 + 6 seconds of work in each.
    assert found.besides["distill"] == pytest.approx(0.0)
    assert found.besides["evaluate"] == pytest.approx(10.0)
    assert found.besides["assess"] == pytest.approx(12.0 - 2.0)  # three teachers of a second on two processors
    assert found.resident == 500 * 2**20
    planned = {one.stage: one.seconds for one in estimate(settings, work, found, Cluster(cpus=2), ALL)}
    assert planned["assess"] == pytest.approx(12.0, rel=0.1)
    assert (planned["select"], planned["register"]) == (2.0, 4.0)


def test_records_of_other_settings_do_not_count(folder: Path, tmp_path: Path) -> None:
    teachers = sized(3)
    settings = settings_of(folder, f"run_dir={tmp_path / 'run'}")
    files = finished(settings, teachers)
    longer = settings_of(folder, f"run_dir={tmp_path / 'run'}", "distill.loop.epochs=99")
    assert recorded(longer, work_for(longer, teachers), files) is not None
    wider = settings_of(folder, f"run_dir={tmp_path / 'run'}", "distill.loop.batch_size=64")
    assert recorded(wider, work_for(wider, teachers), files) is None


def test_an_empty_folder_tells_nothing(folder: Path, tmp_path: Path) -> None:
    settings = settings_of(folder, f"run_dir={tmp_path / 'run'}")
    assert recorded(settings, work_for(settings), RunFolder(settings.run_dir)) is None


def test_the_sample_spans_the_zoo() -> None:
    teachers = sized(50)
    found = sample(teachers, most=5)
    assert (len(found), found[0].name, found[-1].name) == (5, "t0", "t49")
    assert sample([teachers[0]] * 9, most=5) == [teachers[0]]  # one architecture


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with threads(1.0):
        assert torch.get_num_threads() == 1
    with threads(None):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before


def test_a_calibration_runs_the_work_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes processes of its own is left out; the rest is the code that a run uses."""
    from pipeline.models.sources import load_teacher
    from pipeline.models.zoo import load_zoo
    from pipeline.planning import calibrate as room
    from pipeline.planning.teachers import size_teachers

    tried = {"driver": 1.0, "session": 2.0, "tasks": 1.5, "resident": 2**20, "register": 2.5}
    monkeypatch.setattr(room.rehearsal, "starts", lambda *asked: tried)
    settings, zoo = settings_of(folder, "evaluate.seeds=2"), load_zoo(folder / "zoo.yaml")
    teachers = size_teachers(zoo.values(), (1, SIDE, SIDE), trusted=settings.zoo.trusted_factories)
    work = work_for(settings, teachers)
    told: list[str] = []
    with threads(1.0):
        found = calibrate(
            settings,
            work,
            lambda name: load_teacher(zoo[name]),
            seconds=120,
            advance=lambda done, note: told.append(note),
        )
    assert told == ["images", "teachers", "steps", "scores", "pictures", "starts"]
    assert set(found.forward) == {one.key for one in teachers}
    assert all(seconds > 0 for seconds in found.forward.values())
    assert set(found.steps) == {"taught", "labels"} and all(seconds > 0 for seconds in found.steps.values())
    assert found.fit is not None and found.fit[1:] == (80, 32)
    assert found.wide is not None and found.wide[1] == 2 * 32  # two that look together
    assert (found.starts.session, found.starts.tasks, found.starts.register) == (3.0, 1.5, 2.5)
    assert found.starts.matrix > 0 and found.starts.panel > 0
    assert (found.resident, found.encoded) == (2**20, float(SIDE * SIDE))
    planned = estimate(settings, work, found, Cluster(cpus=2), ALL)
    assert all(one.seconds is not None and one.seconds > 0 for one in planned)


# --- the whole plan, and the command ----------------------------------------------------------------------------------


def test_a_plan_for_a_described_cluster(folder: Path, tmp_path: Path) -> None:
    settings = settings_of(folder, f"run_dir={tmp_path / 'run'}")
    plan = make_plan(settings, described="gpus=8,gpu_mem=80,nodes=2,tflops=1", price=2.0)
    assert [one.stage for one in plan.stages] == list(STAGES)
    assert not (tmp_path / "run").exists()  # nothing is written but by the command
    assert plan.refused == ()
    data = json.loads(json.dumps(plan.as_dict()))
    assert data["cluster"]["gpus"] == 8
    assert [one["name"] for one in data["teachers"]] == sorted(
        (one["name"] for one in data["teachers"]),
        key=lambda name: -next(one["parameters"] for one in data["teachers"] if one["name"] == name),
    )


def test_times_on_gpus_that_are_not_here_are_not_made_up(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = settings_of(folder, f"run_dir={tmp_path / 'run'}")
    plan = make_plan(settings, described="gpus=8,gpu_mem=80")
    assert plan.seconds is None
    assert any("tflops" in text for text in plan.warnings)


def test_the_command_keeps_the_plan_and_its_exit_code_says_whether_it_can_be(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, place = make_settings(folder), f"run_dir={tmp_path / 'run'}"
    described = "cpus=2,mem=64,tflops=0.001"
    assert plan_run([file], [place], described, None, None, False) == 0
    shown = capsys.readouterr().out
    for word in ("untrained", "amalgamate", "all stages", "image table", "nothing stands against it", "plan.json"):
        assert word in shown
    kept = json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))
    assert kept["stages"][1]["stage"] == "assess" and kept["stages"][1]["seconds"] > 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["plan.json", "run.json"]

    code = plan_run([file], [place, "distill.resources.num_workers=4"], described, None, None, True)
    out = capsys.readouterr()
    assert code == 2
    assert json.loads(out.out)["refused"][0]["remedy"].startswith("set distill.resources.num_workers=2")


def test_a_negative_price_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--price"):
        make_plan(settings_of(folder), price=-1.0)


def test_the_command_line_knows_it() -> None:
    from typer.testing import CliRunner

    from jobs.cli import app

    result = CliRunner().invoke(app, ["plan", "--help"], terminal_width=200)
    assert result.exit_code == 0
    assert "--cluster" in result.output and "--price" in result.output


# --- plan against actual ----------------------------------------------------------------------------------------------


def actual(folder: Path, stage: str, seconds: float, finished: float, key: str = "k") -> None:
    (folder / stage / key).mkdir(parents=True, exist_ok=True)
    record = {"stage": stage, "key": key, "seconds": seconds, "finished": finished}
    (folder / stage / key / "stage.json").write_text(json.dumps(record), encoding="utf-8")


def planned(folder: Path, *stages: tuple[str, str, float | None], memory: list[dict[str, Any]] | None = None) -> None:
    rows = [{"stage": stage, "state": state, "seconds": seconds} for stage, state, seconds in stages]
    data = {"made": 1000.0, "stages": rows, "memory": memory or []}
    (folder / "plan.json").write_text(json.dumps(data), encoding="utf-8")


def test_a_plan_is_held_against_what_came(tmp_path: Path) -> None:
    planned(tmp_path, ("ingest", "missing", 13.0), ("select", "stale", 5.0), ("distill", "missing", None))
    actual(tmp_path, "ingest", 10.0, 1001.0)
    actual(tmp_path, "select", 10.0, 1002.0)
    actual(tmp_path, "distill", 10.0, 1003.0)
    first, second = against(tmp_path)
    assert (first["stage"], first["what"], first["ratio"], first["within"]) == ("ingest", "seconds", 1.3, True)
    assert (second["stage"], second["ratio"], second["within"]) == ("select", 0.5, False)


def test_what_was_done_before_the_plan_is_no_actual(tmp_path: Path) -> None:
    planned(tmp_path, ("ingest", "missing", 10.0), ("select", "fresh", 0.0))
    actual(tmp_path, "ingest", 10.0, 999.0)
    actual(tmp_path, "select", 10.0, 1001.0)
    assert against(tmp_path) == []
    actual(tmp_path, "ingest", 20.0, 1001.0, key="later")
    assert [row["actual"] for row in against(tmp_path)] == [20.0]


def test_memory_is_compared_where_it_was_recorded(tmp_path: Path) -> None:
    mib = 2**20
    memory = [
        {"stage": "assess", "on": "processor", "bytes": 110 * mib, "parts": {}},
        {"stage": "assess", "on": "GPU", "bytes": 700 * mib, "parts": {"context": 500 * mib}},
    ]
    planned(tmp_path, ("assess", "missing", 10.0), memory=memory)
    actual(tmp_path, "assess", 10.0, 1001.0)
    rows = [{"peak_mb": 90.0, "peak_gpu_mb": 100.0}, {"peak_mb": 100.0, "peak_gpu_mb": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "assess" / "k" / "assessment.parquet")
    found = {row["what"]: row for row in against(tmp_path)}
    assert found["memory, processor"]["ratio"] == pytest.approx(1.1) and found["memory, processor"]["within"]
    assert found["memory, GPU"]["ratio"] == pytest.approx(2.0) and not found["memory, GPU"]["within"]


@pytest.mark.parametrize("text", [None, "", "{}", "[]", '{"made": "soon", "stages": []}'])
def test_no_plan_is_no_row(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "plan.json").write_text(text, encoding="utf-8")
    actual(tmp_path, "ingest", 10.0, 1001.0)
    assert against(tmp_path) == []


def test_rows_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.planning.show import show_against
    from pipeline.report.console import Display

    planned(tmp_path, ("ingest", "missing", 13.0))
    actual(tmp_path, "ingest", 10.0, 1001.0)
    show_against(against(tmp_path), Display())
    assert "1.30" in capsys.readouterr().out
    show_against([], Display())
    assert capsys.readouterr().out == ""


def test_settings_of_the_world_are_what_is_planned(folder: Path) -> None:
    """The tiny world's file is YAML that the command reads, too."""
    assert yaml.safe_load(make_settings(folder).read_text(encoding="utf-8"))["distill"]["loop"]["epochs"] == 4
    assert parse_cluster("cpus=2").cpus == 2
    assert Memory("s", "p", "GPU", 5, limit=4).fits is False
