"""How much a setting tells of the outcome: against independent tests, and against chance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from pipeline.report.sweep_plots import Axis, importances, plot_importances, plot_parallel


def test_a_choice_explains_what_kruskal_and_wallis_say() -> None:
    random = np.random.default_rng(0)
    groups, outcome = random.integers(0, 3, 30), random.normal(size=30)
    [found] = importances([Axis("a", groups.tolist(), ("x", "y", "z"))], outcome.tolist())
    h, _ = stats.kruskal(*(outcome[groups == k] for k in range(3)))
    assert found.explained == pytest.approx(h / (len(outcome) - 1))


def test_a_range_with_few_values_explains_what_spearman_says() -> None:
    random = np.random.default_rng(1)
    values, outcome = random.integers(0, 3, 20).astype(float), random.normal(size=20)
    [found] = importances([Axis("a", values.tolist())], outcome.tolist())
    assert found.explained == pytest.approx(stats.spearmanr(values, outcome).statistic ** 2)


def test_a_best_value_in_the_middle_counts() -> None:
    values = np.linspace(1e-4, 1e-1, 15)
    outcome = -((np.arange(15) - 7.0) ** 2) + 1e-3 * np.arange(15)
    [found] = importances([Axis("a", values.tolist(), log=True)], outcome.tolist())
    assert found.explained > 0.8 and found.p < 0.01
    assert stats.spearmanr(values, outcome).statistic ** 2 < 0.1  # which a correlation does not see


def test_chance_is_what_noise_reaches() -> None:
    """Of settings that have no influence one in twenty is above the mark: 400 of them, 20 ± 3 · √19."""
    random = np.random.default_rng(2)
    above = 0
    for seed in range(100):
        axes = [Axis(f"a{k}", random.normal(size=12).tolist()) for k in range(4)]
        found = importances(axes, random.normal(size=12).tolist(), seed=seed)
        above += sum(one.explained > one.chance for one in found)
    assert 7 <= above <= 33


def test_nothing_is_said_of_few_trials_or_of_equal_ones() -> None:
    axis = Axis("a", [1.0, 2.0, 3.0, 4.0, 5.0])
    assert importances([Axis("a", [1.0, 2.0, 3.0, 4.0])], [1, 2, 3, 4]) == []
    assert importances([axis], [1.0] * 5) == []
    assert importances([Axis("a", [2.0] * 5)], [1, 2, 3, 4, 5]) == []
    assert len(importances([axis], [1, 2, 3, 5, 4])) == 1


@pytest.mark.parametrize("ending", [".svg", ".png"])
def test_pictures_hold_every_setting(tmp_path: Path, ending: str) -> None:
    axes = [
        Axis("distill.loop.optim.lr", [1e-4, 1e-2, 1e-3, 5e-3, 2e-2], log=True),
        Axis("distill.student", [0, 1, 1, 0, 1], ("mlp", "a $strange$ name")),
        Axis("select.max_teachers", [2, 2, 2, 2, 2]),
    ]
    outcome = [0.5, 0.6, 0.7, 0.65, 0.4]
    plot_parallel(axes, outcome, tmp_path / f"parallel{ending}", title="validation_accuracy")
    found = importances(axes, outcome)
    assert {one.name for one in found} == {"distill.loop.optim.lr", "distill.student"}
    plot_importances(found, tmp_path / f"importance{ending}", title="validation_accuracy", trials=5)
    assert all((tmp_path / f"{name}{ending}").stat().st_size > 2000 for name in ("parallel", "importance"))
    assert not list(tmp_path.glob(".part*"))
