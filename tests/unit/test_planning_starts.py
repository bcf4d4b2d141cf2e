"""What starting takes: of former runs, tried, and what a plan makes of it."""

import dataclasses
import json
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cluster.spec import ClusterSpec
from pipeline.planning import calibrate as room
from pipeline.planning import rehearsal
from pipeline.planning.calibrate import calibrate
from pipeline.planning.described import Cluster
from pipeline.planning.estimate import STAGES, estimate
from pipeline.planning.facts import facts_of
from pipeline.planning.nets import NetSize
from pipeline.planning.rates import Rates, Starts, derived
from pipeline.planning.recalled import recalled
from pipeline.planning.recorded import recorded
from pipeline.planning.teachers import TeacherSize
from pipeline.planning.work import Work, net_sizes, work_of
from pipeline.settings_files import load_settings
from pipeline.stages.artefacts import Record, RunFolder, write_settings
from pipeline.stages.assess import start_of
from tests.tiny import SIDE, make_data, make_settings, make_zoo
from tests.unit.test_planning_plan import leave_trainings

ALL = dict.fromkeys(STAGES, "missing")
NOTHING = Starts(**dict.fromkeys(vars(Starts()), 0.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world")
    make_zoo(path, ("untrained", "blind"))
    make_data(path, per_class=60)
    return path


def teachers(count: int) -> list[TeacherSize]:
    net = NetSize(250, 1000, 1000, 1e6, 100, None, 8, 4)
    return [TeacherSize(f"t{number}", "net", "key", 4, (1, SIDE, SIDE), net) for number in range(count)]


def work_for(settings: Any, count: int = 3) -> Work:
    facts = facts_of(settings, None)
    return work_of(settings, facts, teachers(count), net_sizes(settings, facts), None)


def settings_of(folder: Path, *overrides: str) -> Any:
    return load_settings([make_settings(folder)], overrides)


def parts_of(settings: Any, starts: Starts, states: dict[str, str] = ALL, count: int = 3) -> dict[str, Any]:
    rates = Rates(origin="described", flops=1e6, decode=0.0, fit=(0.0, 1, 1), starts=starts)
    found = estimate(settings, work_for(settings, count), rates, Cluster(cpus=2), states)
    return {one.stage: one.parts for one in found}


# --- former runs ------------------------------------------------------------------------------------------------------


def left(home: Path, stage: str, finished: float, machine: str = "here", **starts: float) -> None:
    path = home / stage / f"k{finished}"
    path.mkdir(parents=True)
    (home / "run.json").write_text("{}", encoding="utf-8")
    record = Record(stage, path.name, "d", {}, {}, 9.0, finished, starts=starts, machine=machine)
    (path / "stage.json").write_text(json.dumps(dataclasses.asdict(record)), encoding="utf-8")


def test_former_runs_beside_a_folder_tell_what_starting_takes(tmp_path: Path) -> None:
    left(tmp_path / "a", "assess", 1.0, session=10.0, trials=20.0)
    left(tmp_path / "b", "distill", 2.0, session=12.0, group=16.0)
    left(tmp_path / "b", "evaluate", 3.0, group=18.0)
    left(tmp_path / "other", "assess", 4.0, machine="elsewhere", session=99.0)
    (tmp_path / "b" / "register" / "cut").mkdir(parents=True)
    (tmp_path / "b" / "register" / "cut" / "stage.json").write_text("{", encoding="utf-8")
    found = recalled(tmp_path / "new", "here")  # which is not there yet
    assert found == {"session": 11.0, "trials": 20.0, "group": 17.0}
    assert recalled(tmp_path / "a", "here")["session"] == 11.0  # its own, too


def test_of_many_former_runs_the_latest_count(tmp_path: Path) -> None:
    for number in range(9):
        left(tmp_path / f"run{number}", "assess", float(number), session=float(number))
    assert recalled(tmp_path / "new", "here") == {"session": 6.0}  # of 4 to 8


def test_a_store_knows_no_machine(tmp_path: Path) -> None:
    assert recalled("s3://bucket/run", "here") == {}


def test_the_first_trial_of_a_process_is_a_start() -> None:
    # Two processes: 8 and 7 s for the trials that import, 1 s for the others; 20 s in all.
    assert start_of([8.0, 1.0, 7.0, 1.0, 1.0, 1.0], 2, 20.0) == pytest.approx(20.0 - 3.0)
    assert start_of([8.0, 7.0], 2, 20.0) is None
    assert start_of([], 0, 20.0) is None


# --- tried ------------------------------------------------------------------------------------------------------------


def test_starts_are_those_of_what_begins_one_after_the_other() -> None:
    tried = {"driver": 1.0, "session": 10.0, "tasks": 7.0, "imports": 6.0, "process": 2.0, "tune": 0.5, "train": 0.25}
    found = derived(tried | {"register": 4.0})
    assert (found["session"], found["tasks"], found["register"]) == (11.0, 7.0, 4.0)
    assert found["trials"] == 0.5 + 2 + 6
    assert found["group"] == 0.75 + (2 + 0.75) + 2 + (2 + 6)
    assert derived({"driver": 1.0}) == {"driver": 1.0}  # the rest is assumed


def test_what_a_rehearsal_has_said_counts_though_it_was_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*arguments: Any, **options: Any) -> Any:
        raise subprocess.TimeoutExpired("python", 5.0, output=b'{"driver": 1.5}\nsomething else\n{"sess')

    monkeypatch.setattr(subprocess, "run", cut)
    assert rehearsal.starts(ClusterSpec(), 2, None, 2, (1, 4, 4), 5.0) == {"driver": 1.5}


def test_a_calibration_tries_no_start_that_former_runs_know(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any) -> Any:
        raise AssertionError("tried")

    monkeypatch.setattr(rehearsal, "starts", never)
    settings = settings_of(folder)
    former = {"session": 1.0, "trials": 2.0, "tasks": 3.0, "group": 4.0, "register": 5.0, "resident": 2.0**30}
    found = calibrate(settings, work_for(settings), lambda name: never(), parts=("starts",), former=former)
    assert found.starts == dataclasses.replace(Starts(), session=1.0, trials=2.0, tasks=3.0, group=4.0, register=5.0)
    assert found.resident == 2**30


def test_what_could_not_be_tried_is_assumed_and_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "starts", lambda *asked: {"driver": 3.0, "session": 7.0})
    settings = settings_of(folder)
    found = calibrate(settings, work_for(settings), lambda name: None, parts=("starts",), former={"group": 40.0})  # type: ignore[arg-type,return-value]
    assert found.starts.driver == 3.0 and found.starts.session == 3.0 + 7.0
    assert found.starts.group == 40.0  # known
    assert found.resident is None and "partly assumed" in found.notes[0]


def test_a_cluster_is_not_joined_for_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ClusterSpec] = []
    monkeypatch.setattr(rehearsal, "starts", lambda spec, *asked: seen.append(spec) or {})
    settings = settings_of(folder, "cluster.address=auto")
    room._starts(room._Clock(1e12), settings, facts_of(settings, None), {}, [])
    assert seen[0].local


def test_pictures_are_drawn_to_see_what_they_take() -> None:
    found = rehearsal.pictures(classes=3, own=2, teachers=2)
    assert set(found) == {"first", "matrix", "panel"} and found["matrix"] > 0 and found["panel"] > 0


# --- in the plan ------------------------------------------------------------------------------------------------------


def test_pictures_are_counted_as_the_stages_draw_them(folder: Path) -> None:
    starts = dataclasses.replace(NOTHING, picture=100.0, matrix=10.0, panel=1.0)
    settings = settings_of(folder)
    found = {stage: parts.get("pictures", 0.0) for stage, parts in parts_of(settings, starts).items()}
    # Of 3 teachers a plan each, and the scores; the first picture of all comes there.
    assert found["assess"] == 100 + 3 * 10 + 1
    assert (found["select"], found["amalgamate"], found["distill"], found["evaluate"]) == (1, 2, 2, 10 + 1)
    assert (found["ingest"], found["register"]) == (0, 0)
    later = parts_of(settings, starts, ALL | {"assess": "fresh"})
    assert later["select"]["pictures"] == 101
    assert parts_of(settings, starts, count=400)["assess"]["pictures"] == 100 + 20 * 10 + 1  # of the best alone


def test_without_a_store_nothing_is_drawn(folder: Path) -> None:
    starts = dataclasses.replace(NOTHING, picture=100.0, matrix=10.0, panel=1.0)
    settings = settings_of(folder, "tracking.enabled=false", "register.enabled=false")
    assert not any(parts.get("pictures") for parts in parts_of(settings, starts).values())


def test_a_fit_goes_by_what_was_measured_between_two_widths() -> None:
    rates = Rates(fit=(1.0, 100, 10), wide=(4.0, 40))  # four times the width, four times the time
    assert rates.a_fit(100, 10) == pytest.approx(1.0)
    assert rates.a_fit(100, 20) == pytest.approx(2.0)
    assert rates.a_fit(200, 20) == pytest.approx(4.0)
    assert rates.a_fit(100, 5) == pytest.approx(1.0)  # nothing is known of less
    assert rates.a_fit(100, 80) == pytest.approx(4.0 * 2**2)
    assert rates.a_fit(100, 1000) == rates.a_fit(100, 100)  # within the span of the images
    assert Rates().a_fit(100, 10) is None


def test_ray_starts_in_the_first_stage_that_runs(folder: Path, tmp_path: Path) -> None:
    """The start of a former run is taken from where it was and added where it will be."""
    settings = settings_of(folder, f"run_dir={tmp_path / 'runs' / 'one'}")
    work = work_for(settings)
    found = former_run(settings, work)
    assert found is not None
    planned = {
        one.stage: one
        for one in estimate(settings, work, found, Cluster(cpus=2), ALL | dict.fromkeys(STAGES[:3], "fresh"))
    }
    assert (planned["amalgamate"].seconds, planned["distill"].parts["start"]) == (3.0 + 5.0, 1.0)
    whole = {one.stage: one for one in estimate(settings, work, found, Cluster(cpus=2), ALL)}
    assert (whole["assess"].parts["start"], whole["amalgamate"].seconds) == (pytest.approx(13.0 - 4.0), 3.0)
    assert found.starts.report == 0.0  # among what the trainings took


def former_run(settings: Any, work: Work) -> Rates | None:
    files, now = RunFolder(settings.run_dir), time.time()
    files.prepare()
    for stage, seconds in zip(STAGES, (1.0, 13.0, 2.0, 3.0, 31.0, 31.0, 4.0), strict=True):
        summary = {"assessed_now": 3, "teachers": 3} if stage == "assess" else {}
        files.folder(stage, "k").mkdir(parents=True)
        write_settings(files.folder(stage, "k") / "settings.yaml", settings.dump())
        starts = {"session": 5.0} if stage == "assess" else {}
        files.finish(Record(stage, "k", "d", {}, summary, seconds, now, starts=starts, machine=platform.node()))
    row = {"images": 80, "forward_seconds": 0.8, "seconds": 2.0, "error": None, "peak_mb": 500.0, "peak_gpu_mb": None}
    rows = [row | {"teacher": one.name} for one in work.teachers]
    pq.write_table(pa.Table.from_pylist(rows), files.folder("assess", "k") / "assessment.parquet")
    leave_trainings(files, now)
    return recorded(settings, work, files)
