"""Simulated scheduling against closed forms, bounds that no schedule can beat, and what must not get worse."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.planning.scale import Job, Model, Site, fit_flops, score_flops, simulate
from pipeline.planning.simulate import Limits, Schedule, Task, makespan, ring_seconds, schedule

SECONDS = st.lists(st.floats(0.01, 50), min_size=1, max_size=40)


def of(seconds: list[float], slots: int, **limits: float) -> Schedule:
    return schedule([Task(one) for one in seconds], slots, Limits(**limits))


@pytest.mark.parametrize(("tasks", "slots"), [(1, 1), (7, 3), (9, 3), (10, 64), (1000, 64)])
def test_equal_tasks_take_their_rounds(tasks: int, slots: int) -> None:
    found = of([2.5] * tasks, slots)
    assert found.seconds == pytest.approx(math.ceil(tasks / slots) * 2.5)
    assert found.busy == pytest.approx(2.5 * tasks)
    assert found.used == pytest.approx(2.5 * tasks / (slots * found.seconds))


def test_one_long_task_is_waited_for() -> None:
    assert of([1.0] * 8 + [100.0], 4).seconds == pytest.approx(102.0)  # it begins after two rounds
    assert of([100.0] + [1.0] * 8, 4).seconds == pytest.approx(100.0)


def test_a_single_slot_takes_the_sum() -> None:
    assert of([1.0, 2.0, 3.0], 1).seconds == pytest.approx(6.0)


def test_nothing_takes_no_time() -> None:
    assert schedule([], 4).seconds == 0.0
    assert schedule([Task(0.0)] * 5, 2).seconds == 0.0


@given(SECONDS, st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_without_limits_it_is_list_scheduling(seconds: list[float], slots: int) -> None:
    found = of(seconds, slots)
    assert found.seconds == pytest.approx(makespan(seconds, slots))
    # Graham's bounds.
    least = max(max(seconds), sum(seconds) / slots)
    assert least * (1 - 1e-9) <= found.seconds <= sum(seconds) / slots + max(seconds) * (1 - 1 / slots) + 1e-6


@given(SECONDS, st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_more_slots_are_never_slower(seconds: list[float], slots: int) -> None:
    assert of(seconds, slots + 1).seconds <= of(seconds, slots).seconds + 1e-9


@given(SECONDS, st.integers(1, 8), st.integers(0, 39))
@settings(max_examples=60, deadline=None)
def test_less_work_is_never_slower(seconds: list[float], slots: int, which: int) -> None:
    shorter = [one / 2 if place == which % len(seconds) else one for place, one in enumerate(seconds)]
    assert of(shorter, slots).seconds <= of(seconds, slots).seconds + 1e-9
    assert of(seconds[:-1] or [0.0], slots).seconds <= of(seconds, slots).seconds + 1e-9


def test_a_dispatcher_that_is_slower_than_the_slots_sets_the_pace() -> None:
    found = of([1.0] * 100, 64, rate=10)
    assert found.seconds == pytest.approx(99 / 10 + 1.0)
    assert of([1.0] * 100, 64, rate=1e6).seconds == pytest.approx(2.0, abs=0.01)


def test_storage_is_shared_evenly() -> None:
    # Four tasks read 10 bytes at 20 a second in all: 5 a second each, so 2 s; then they compute.
    found = schedule([Task(1.0, reads=10.0)] * 4, 4, Limits(storage=20.0))
    assert found.seconds == pytest.approx(3.0)
    assert found.moving == pytest.approx(8.0)


def test_a_link_limits_one_task() -> None:
    assert schedule([Task(1.0, reads=10.0)], 4, Limits(storage=1e9, link=2.0)).seconds == pytest.approx(6.0)


def test_a_transfer_speeds_up_when_another_ends() -> None:
    # 10 and 30 bytes at 10 a second: both at 5 until 2 s, then the other alone, with 20 left: 2 s more.
    found = schedule([Task(0.0, reads=10.0), Task(0.0, reads=30.0)], 2, Limits(storage=10.0))
    assert found.ends == pytest.approx((2.0, 4.0))


def test_reading_computing_and_writing_follow_each_other() -> None:
    found = schedule([Task(3.0, reads=4.0, writes=6.0)], 1, Limits(storage=2.0))
    assert found.seconds == pytest.approx(2.0 + 3.0 + 3.0)
    assert (found.busy, found.moving) == (pytest.approx(3.0), pytest.approx(5.0))


@given(
    st.lists(st.tuples(st.floats(0, 5), st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=25),
    st.integers(1, 6),
    st.floats(0.5, 50),
    st.floats(1, 200),
)
@settings(max_examples=60, deadline=None)
def test_no_schedule_beats_its_limits(work, slots: int, rate: float, storage: float) -> None:
    tasks = [Task(*one) for one in work]
    found = schedule(tasks, slots, Limits(rate=rate, storage=storage))
    moved = sum(task.reads + task.writes for task in tasks)
    assert found.seconds >= moved / storage * (1 - 1e-6)
    assert found.seconds >= (len(tasks) - 1) / rate * (1 - 1e-6)
    assert found.seconds >= sum(task.seconds for task in tasks) / slots * (1 - 1e-6)
    assert found.busy == pytest.approx(sum(task.seconds for task in tasks))
    assert found.seconds >= schedule(tasks, slots).seconds - 1e-6
    assert all(end > 0 or task == Task(0, 0, 0) for end, task in zip(found.ends, tasks, strict=True) if task.seconds)


@pytest.mark.parametrize(
    ("tasks", "slots", "limits"),
    [
        ([Task(1)], 0, Limits()),
        ([Task(-1)], 1, Limits()),
        ([Task(math.nan)], 1, Limits()),
        ([Task(1)], 1, Limits(rate=0)),
        ([Task(1)], 1, Limits(storage=-1)),
    ],
)
def test_what_can_not_be_is_refused(tasks, slots: int, limits: Limits) -> None:
    with pytest.raises(ValueError, match="must"):
        schedule(tasks, slots, limits)


def test_a_ring_moves_almost_twice_its_size() -> None:
    assert ring_seconds(8e9, 1, 1e9) == 0.0
    assert ring_seconds(8e9, 2, 1e9) == pytest.approx(8.0)
    assert ring_seconds(8e9, 1000, 1e9) == pytest.approx(16.0, rel=2e-3)
    assert ring_seconds(0.0, 5, 1e9, latency=0.001) == pytest.approx(0.008)


def site(**changes) -> Site:
    known = {
        "nodes": 2,
        "gpus": 4,
        "cpus": 32,
        "memory": 1e12,
        "gpu_memory": 8e10,
        "object_store": 2e11,
        "gpu_flops": 1e13,
        "cpu_flops": 1e10,
        "driver_cpus": 8,
        "storage": 1e10,
        "link": 1e9,
        "network": 1e10,
        "gpu_link": 1e11,
        "latency": 1e-5,
        "rate": 10.0,
        "decode": 100.0,
    }
    return Site(**(known | changes))


ZOO = [Model(flops=1e9 * (1 + number % 7), weight_bytes=1e8, classes=100, features=512) for number in range(200)]


def job(**changes) -> Job:
    known = {
        "images": 1e5,
        "source_bytes": 1e5,
        "labelled": (10, 10, 10),
        "classes": 100,
        "row_bytes": 3 * 64 * 64,
        "student_flops": 1e9,
        "student_bytes": 4e7,
        "batch": 1024,
        "labelled_batch": 512,
    }
    return Job(**(known | changes))


def seconds_of(**changes) -> dict[str, float]:
    own = {name: value for name, value in changes.items() if name in Site.__dataclass_fields__}
    rest = {name: value for name, value in changes.items() if name not in own}
    return {stage.name: stage.seconds for stage in simulate(ZOO, job(**rest), site(**own))}


@pytest.mark.parametrize(
    ("name", "value", "stage"),
    [
        ("gpu_flops", 1e14, "distill"),
        ("cpu_flops", 1e11, "select"),
        ("cpu_flops", 1e11, "assess"),
        ("rate", 100.0, "assess"),
        ("decode", 1000.0, "ingest"),
        ("nodes", 8, "distill"),
    ],
)
def test_a_faster_cluster_makes_the_stage_it_bounds_faster_and_none_slower(name: str, value: float, stage: str) -> None:
    world = {"labelled": (40, 40, 10), "gpu_flops": 1e15} if stage == "assess" and name == "cpu_flops" else {}
    before, after = seconds_of(**world), seconds_of(**world | {name: value})
    assert after[stage] < before[stage]
    if name != "nodes":  # more nodes also mean more to send the probe and the table to
        assert all(after[one] <= before[one] * (1 + 1e-9) for one in before)


def test_a_search_costs_less_than_showing_all_to_all() -> None:
    assert seconds_of()["assess"] < seconds_of(rungs=(1.0,))["assess"]


def test_more_epochs_and_seeds_cost_in_proportion() -> None:
    once, twice = seconds_of(epochs=10), seconds_of(epochs=20)
    assert 1.5 < twice["distill"] / once["distill"] <= 2.0 + 1e-9
    assert seconds_of(seeds=5)["evaluate"] > seconds_of(seeds=3)["evaluate"]


def test_a_table_that_does_not_stay_in_memory_is_told() -> None:
    stages = {stage.name: stage for stage in simulate(ZOO, job(), site(memory=1e8, object_store=1e6))}
    assert "does not stay" in stages["distill"].breaks[0]
    assert any("object store" in text for text in stages["assess"].breaks)


def test_busy_shares_are_shares() -> None:
    for stage in simulate(ZOO, job(), site()):
        assert 0 <= stage.gpu_share <= 1, stage
        assert stage.seconds > 0 and stage.bound in stage.parts


def test_operations_of_scores_by_hand() -> None:
    """10 images of 4 features and 2 classes: nothing is as large as the decompositions of 4 dimensions."""
    fold = 2 * 8 * 16 + 10 * 64 + 0.4 * 10 * 16 + 8 * 0.4 * 10 * 4 * 2
    assert fit_flops(10, 4, 2) == pytest.approx(5 * fold)
    own = 2 * 100 * 4 + 2 * 10 * 16 + 10 * 64 + 13 * 2 * 10 * 4 * 2
    assert score_flops(10, 4, 2) == pytest.approx(own + 5 * fold)


def test_wide_features_are_compared_within_the_span_of_the_images() -> None:
    assert fit_flops(10, 1000, 2) == pytest.approx(6 * 100 * 1000 + fit_flops(10, 10, 2))
