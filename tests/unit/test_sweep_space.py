"""What a sweep may vary, how its values are drawn, and what is refused before anything runs."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import Settings
from pipeline.errors import ConfigError
from pipeline.settings_files import load_settings
from pipeline.stages.sweep_space import (
    GridSearch,
    RandomSearch,
    check_sweep,
    make_search,
    planned,
    sweep_key,
    trial_id,
    trial_settings,
)
from pipeline.sweep_spec import Domain, SweepSpec
from tests.tiny import make_settings

ROOT = Path(__file__).parents[2]
LR = "distill.loop.optim.lr"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("space")


def load(folder: Path, space: dict[str, Any], **sweep: Any) -> Settings:
    return load_settings([make_settings(folder, sweep={"space": space, **sweep})])


@pytest.mark.parametrize("name", ["example.yaml", "assessment.yaml"])
def test_the_examples_fit_the_demo(name: str) -> None:
    loaded = load_settings([ROOT / "conf" / "demo" / "run.yaml", ROOT / "conf" / "sweep" / name])
    spec = check_sweep(loaded)
    assert planned(make_search(spec), spec.count)


@pytest.mark.parametrize(
    ("space", "sweep", "message"),
    [
        ({"distill.loop.optim.lrr": [0.1]}, {}, r"sweep\.space\.distill\.loop\.optim\.lrr=0\.1: .*did you mean `lr`\?"),
        ({LR: [1e-3, -1]}, {}, r"space\.distill\.loop\.optim\.lr=-1: `distill\.loop\.optim\.lr` is -1: .*greater than"),
        ({"distill.loop.mixup": {"dist": "uniform", "lower": -1, "upper": 1}}, {}, r"mixup=-1\.0: .*greater than or"),
        ({"assess.scores": [["knn"], ["lepp"]]}, {}, r"did you mean `leep`\?"),
        ({"distill.loop.batch_size": [32, 0]}, {}, r"batch_size=0"),
        ({"task.image.size": [12, 16]}, {}, r"changes the images that trials are judged on"),
        ({"seed": [0, 1]}, {}, r"changes the images"),
        ({"distill.resources.num_workers": [1, 2]}, {}, r"resources change no result"),
        ({"evaluate.seeds": [1, 2]}, {}, r"no part in what a trial is judged by"),
        ({"run_dir": ["a", "b"]}, {}, r"no part"),
        ({LR: [1e-3]}, {"metric": "faculty_nll"}, r"no part in faculty_nll"),
        ({"task.splits.probe": [4, 8]}, {"metric": "probe_accuracy"}, r"changes the images of probe_accuracy"),
        ({"select.by": ["together"]}, {"metric": "faculty_score"}, r"scored otherwise"),
        ({LR: [1e-3]}, {"retrain": {"distill.loop.epoch": 3}}, r"sweep\.retrain: .*did you mean `epochs`"),
        ({LR: [1e-3]}, {"retrain": {"assess.neighbours": 3}}, r"the student alone"),
    ],
)
def test_a_wrong_space_is_refused_with_its_path(
    folder: Path, space: dict[str, Any], sweep: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_sweep(load(folder, space, **sweep), "sweep.yaml")
    assert str(caught.value).startswith("sweep.yaml: sweep.") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"space": {}}, "is empty"),
        ({"space": {LR: {"dist": "loguniform", "lower": 0, "upper": 1}}}, "lower must be > 0"),
        ({"space": {LR: {"dist": "uniform", "lower": 2, "upper": 1}}}, "lower < upper"),
        ({"space": {LR: {"dist": "uniform", "values": [1, 2]}}}, "belong to choice"),
        ({"space": {LR: [1, 1]}}, "given twice"),
        ({"space": {LR: {"dist": "lognormal", "lower": 1, "upper": 2}}}, "did you mean `loguniform`"),
        ({"space": {LR: {"dist": "int", "lower": 0.5, "upper": 2}}}, "whole numbers"),
        ({"space": {LR: {"dist": "loguniform", "lower": 1e-4, "upper": 1}}, "search": "grid"}, "give `points`"),
        ({"space": {LR: [1]}, "mode": "min"}, "the max is best"),
        ({"space": {LR: [1]}, "metric": "test_accuracy"}, "did you mean `probe_accuracy`"),
        ({"space": {LR: [1]}, "metric": "faculty_nll", "scheduler": {"asha": {}}}, "needs no training"),
        ({"space": {LR: [1]}, "scheduler": {"asha": {}, "pbt": {}}}, "name one scheduler"),
        ({"space": {"distill.loop.batch_size": [8]}, "scheduler": {"pbt": {}}}, "can't change while a student"),
        ({"space": {LR: [1]}, "scheduler": {"pbt": {}}, "trials": 1}, "two members"),
        ({"space": {LR: [1]}, "trails": 3}, "did you mean `trials`"),
    ],
)
def test_a_wrong_section_names_the_remedy(folder: Path, sweep: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_settings([make_settings(folder, sweep=sweep)])
    assert "sweep" in str(caught.value) and "run.yaml" in str(caught.value)


def test_without_a_section_the_example_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"conf/sweep/example\.yaml"):
        check_sweep(load_settings([make_settings(folder)]))


def test_without_labels_there_is_nothing_to_judge_by(folder: Path) -> None:
    splits = {"train_labelled": 0, "probe": 0, "validation": 0, "test": 20}
    task = {"source": {"type": "numpy", "path": "shapes.npz"}, "image": {"size": 12, "channels": 1}, "splits": splits}
    loaded = load_settings([make_settings(folder, task=task, sweep={"space": {LR: [1e-3]}})])
    with pytest.raises(ConfigError, match="needs labelled images"):
        check_sweep(loaded)


def test_without_optuna_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(folder, {LR: [1e-3]}, search="optuna")
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"sweep\.search: .*pip install 'faculty\[optuna\]'"):
        check_sweep(loaded)


def test_optuna_learns_from_what_it_is_told() -> None:
    pytest.importorskip("optuna")
    space = {
        "a": {"dist": "loguniform", "lower": 1e-4, "upper": 1},
        "b": {"dist": "int", "lower": 1, "upper": 8, "step": 2},
        "c": ["x", {"name": "y"}, [1, 2]],
    }
    spec = SweepSpec(space=space, search="optuna", metric="validation_nll")

    def run(search: Any, count: int) -> list[tuple[dict[str, Any], float]]:
        found = []
        for _ in range(count):
            values = search.ask()
            assert 1e-4 <= values["a"] <= 1 and values["b"] in (1, 3, 5, 7) and values["c"] in spec.space["c"].ends
            loss = abs(math.log10(values["a"]) + 2) + (values["c"] != "x")
            search.tell(values, None if len(found) == 2 else loss)  # one fails
            found.append((values, loss))
        return found

    first = run(make_search(spec), 60)
    assert first == run(make_search(spec), 60) and len({str(values) for values, _ in first}) == 60

    def mean(found: list[tuple[dict[str, Any], float]]) -> float:
        return sum(loss for _, loss in found) / len(found)

    assert mean(first[-20:]) < 0.6 * mean(first[:10])  # which are drawn at random
    # One that goes on knows what a former call found, and begins with none of it.
    search = make_search(spec)
    for values, loss in first[:30]:
        search.tell(values, loss)
    further = run(search, 15)
    assert not {str(values) for values, _ in further} & {str(values) for values, _ in first[:30]}
    assert mean(further) < 0.6 * mean(first[:10])


ranges = st.one_of(
    st.builds(
        lambda low, width: Domain(dist="loguniform", lower=low, upper=low * width),
        st.floats(1e-6, 10),
        st.floats(1.1, 1e4),
    ),
    st.builds(
        lambda low, width: Domain(dist="uniform", lower=low, upper=low + width),
        st.floats(-10, 10),
        st.floats(0.1, 100),
    ),
    st.builds(
        lambda low, steps, step: Domain(dist="int", lower=low, upper=low + steps * step, step=step),
        st.integers(-10, 10),
        st.integers(1, 20),
        st.integers(1, 5),
    ),
)


@given(ranges, st.floats(0, 1, exclude_max=True))
@settings(max_examples=200, deadline=None)
def test_a_draw_lies_in_its_range_and_on_its_step(domain: Domain, place: float) -> None:
    value = domain.draw(place)
    assert domain.lower <= value <= domain.upper
    if domain.whole:
        assert isinstance(value, int) and (value - domain.lower) % domain.step == 0
    assert domain.ends == (domain.at(0), domain.at(1))
    assert domain.fit(value) == pytest.approx(value)


def test_ranges_are_drawn_evenly_on_their_own_scale() -> None:
    places = [number / 1000 for number in range(1000)]
    log = Domain(dist="loguniform", lower=1e-4, upper=1e-1)
    assert sum(log.draw(place) < 1e-3 for place in places) == pytest.approx(333, abs=2)
    whole = Domain(dist="int", lower=1, upper=4)
    assert [sum(whole.draw(place) == k for place in places) for k in (1, 2, 3, 4)] == [250] * 4
    stepped = Domain(dist="uniform", lower=0, upper=1, step=0.25)
    assert {stepped.draw(place) for place in places} == {0, 0.25, 0.5, 0.75, 1}


def test_a_grid_is_every_combination_once() -> None:
    space = {
        "a": Domain(dist="loguniform", lower=0.01, upper=1, points=3),
        "b": Domain(dist="choice", values=("x", "y")),
        "c": Domain(dist="int", lower=2, upper=6, step=2),
    }
    found = planned(GridSearch(space), 100)
    assert len(found) == 18 and len({tuple(map(str, one.values())) for one in found}) == 18
    assert sorted({round(one["a"], 12) for one in found}) == [0.01, 0.1, 1]
    assert {one["c"] for one in found} == {2, 4, 6}
    assert planned(GridSearch(space), 4) == found[:4]


def test_random_search_repeats_itself_with_its_seed_and_never_a_trial() -> None:
    space = {"a": Domain(dist="int", lower=1, upper=3), "b": Domain(dist="choice", values=(True, False))}
    first = planned(RandomSearch(space, 3), 100)
    assert first == planned(RandomSearch(space, 3), 100) and first != planned(RandomSearch(space, 4), 100)
    assert len(first) == 6 == len({str(one) for one in first})
    longer = RandomSearch({"a": Domain(dist="uniform", lower=0, upper=1)}, 0)
    assert planned(longer, 5) == planned(RandomSearch({"a": Domain(dist="uniform", lower=0, upper=1)}, 0), 9)[:5]


def test_a_trial_is_known_by_what_decides_it(folder: Path) -> None:
    loaded = load(folder, {LR: [1e-3, 2e-3], "distill.loop.epochs": [4, 5]})
    here = trial_id(trial_settings(loaded, {LR: 1e-3}))
    assert here == trial_id(trial_settings(loaded, {LR: 0.001, "distill.loop.epochs": 4}))
    assert here != trial_id(trial_settings(loaded, {LR: 2e-3}))
    elsewhere = trial_settings(loaded, {LR: 1e-3, "distill.resources.cpus_per_worker": 2, "run_dir": "elsewhere"})
    assert here == trial_id(elsewhere)
    assert trial_settings(loaded, {LR: 1e-3}).sweep is None


def test_a_sweep_is_known_by_its_space_and_not_by_how_many_trials(folder: Path) -> None:
    def key(content: Any = "images", **sweep: Any) -> str:
        loaded = load(folder, {LR: [1e-3, 2e-3]}, **sweep)
        return sweep_key(loaded, loaded.sweep, content)

    assert key() == key(trials=7) == key(max_concurrent=1)
    assert len({key(), key(seed=1), key(metric="validation_nll"), key("others"), key(search="grid")}) == 5


def test_counts() -> None:
    space = {LR: {"dist": "loguniform", "lower": 1e-4, "upper": 1, "points": 5}, "distill.loop.ema": [None, 0.9]}
    assert SweepSpec(space=space, search="grid").count == 10
    assert SweepSpec(space=space, search="grid", trials=4).count == 4
    assert SweepSpec(space=space, trials=4).count == 4
