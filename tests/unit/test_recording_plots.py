"""Plots: neither blank nor larger than a screen or two, whatever the names and however many there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.report import plots

ODD = ("plain", "$x_{1$", "_under", "日本語", "two\nlines", "a name that is far too long to be drawn beside a bar")


def coloured(path: Path) -> float:
    """The share of pixels that are neither white nor grey, of a picture of a sane size."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert 200 < pixels.shape[1] < 3000 and 100 < pixels.shape[0] < 3000, pixels.shape
    return float((pixels.max(2) - pixels.min(2) > 20).mean())


def histograms(teachers: tuple[str, ...], classes: int) -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {
        "edges": np.linspace(0, 1, 21).tolist(),
        "ambiguity": {name: random.integers(0, 50, 20).tolist() for name in teachers},
        "classes": [f"class {number}" for number in range(classes)],
        "taught": {name: random.integers(0, 50, classes).tolist() for name in teachers},
    }


@pytest.mark.parametrize(("teachers", "classes"), [(ODD, 4), (tuple(f"t{i}" for i in range(30)), 1000), (("one",), 1)])
def test_histograms(tmp_path: Path, teachers: tuple[str, ...], classes: int) -> None:
    plots.plot_histograms(histograms(teachers, classes), tmp_path / "h.png")
    assert coloured(tmp_path / "h.png") > 0.02


def test_bars_of_teachers_without_a_colour_of_their_own_are_summed_up(tmp_path: Path, monkeypatch) -> None:
    drawn = {}
    monkeypatch.setattr(plots, "_write", lambda figure, path: drawn.update(axes=figure.axes))
    names = tuple(f"t{number}" for number in range(11))
    found = histograms(names, 3)
    plots.plot_histograms(found, tmp_path / "h.png")
    bars = drawn["axes"][1].containers
    assert [bar.get_label() for bar in bars][-1] == "all others" and len(bars) == 9
    width = np.array([[patch.get_width() for patch in bar] for bar in bars])
    np.testing.assert_allclose(width.sum(0), np.array(list(found["taught"].values())).sum(0))


def test_where_all_teach_as_one_the_surest_is_shown(tmp_path: Path, monkeypatch) -> None:
    drawn = {}
    monkeypatch.setattr(plots, "_write", lambda figure, path: drawn.update(axis=figure.axes[1]))
    found = histograms(("a", "b", "(together)"), 3)
    found["taught"] = {"a": [0, 0, 0], "b": [0, 0, 0], "(together)": [5, 5, 5]}
    found["surest"] = {"a": [1, 2, 3], "b": [4, 3, 2]}
    plots.plot_histograms(found, tmp_path / "h.png")
    assert [bar.get_label() for bar in drawn["axis"].containers] == ["a", "b"]
    assert "surest" in drawn["axis"].get_title()
    found["taught"]["a"] = [1, 0, 0]
    plots.plot_histograms(found, tmp_path / "h.png")
    assert drawn["axis"].get_title() == "Who teaches which class"


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (3, 12), (1000, 10), (300, 300)])
def test_plans(tmp_path: Path, rows: int, columns: int) -> None:
    plan = np.random.default_rng(0).random((rows, columns)) ** 8
    names = [ODD[number % len(ODD)] + str(number) for number in range(max(rows, columns))]
    plots.plot_plan(plan, names[:rows], names[:columns], tmp_path / "p.png", title="$ of a teacher")
    assert coloured(tmp_path / "p.png") > 0.2


def test_a_plan_is_drawn_by_task_class_with_the_largest_shares(tmp_path: Path, monkeypatch) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(plots, "_draw_matrix", lambda *values, **words: drawn.update(values=values, **words))
    plan = np.array([[0.0, 0.3], [0.1, 0.1], [0.4, 0.1]])
    plots.plot_plan(plan, ["x", "y", "z"], ["a", "b"], tmp_path / "p.png", title="t")
    values, rows, columns, _ = drawn["values"]
    assert rows == ["z", "y", "x"] or rows == ["z", "x", "y"]  # by column, then by share
    np.testing.assert_allclose(values.sum(0), 1)
    assert columns == ["a", "b"] and drawn["title"] == "t"
    plots.plot_plan(np.diag(np.arange(60.0)), list(map(str, range(60))), list(map(str, range(60))), tmp_path, title="t")
    values, rows, columns, _ = drawn["values"]
    assert values.shape == (40, 40) and columns == list(map(str, range(20, 60)))
    assert "40 of 60 teacher classes, 89% of the mass" in drawn["title"]


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_confusions(tmp_path: Path, classes: int) -> None:
    counts = np.eye(classes) * 20 + np.random.default_rng(0).integers(0, 3, (classes, classes))
    plots.plot_confusion(counts.tolist(), [f"class {i}" for i in range(classes)], tmp_path / "c.png", title="student")
    assert coloured(tmp_path / "c.png") > 0.2


def test_a_confusion_of_many_classes_shows_those_with_errors(tmp_path: Path, monkeypatch) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(plots, "_draw_matrix", lambda *values, **words: drawn.update(values=values))
    counts = np.eye(50) * 10
    counts[7, 44] = 5
    plots.plot_confusion(counts, list(map(str, range(50))), tmp_path / "c.png", title="student")
    values, rows, _, _ = drawn["values"]
    assert len(rows) == 40 and {"7", "44"} <= set(rows)
    assert values[rows.index("7"), rows.index("44")] == pytest.approx(1 / 3)


def test_scores_accuracies_curves_and_flow(tmp_path: Path) -> None:
    rows = [
        {"teacher": name, "score": 1 - n / 70, "score_low": 0.9 - n / 70, "score_high": 1.05 - n / 70}
        for n, name in enumerate([*ODD, *(f"t{number}" for number in range(60))])
    ]
    rows[3]["score"] = None
    plots.plot_scores(rows, tmp_path / "s.png", chosen=["plain"])
    assert coloured(tmp_path / "s.png") > 0.004
    arms = [{"title": name, "accuracies": [0.5, 0.6], "mean": 0.55} for name in ODD]
    plots.plot_accuracies(arms, tmp_path / "a.png")
    assert coloured(tmp_path / "a.png") > 0.004
    history = [{"loss": 2 / n, "kd": 1 / n, "transport": 1 / n, "lr": 0.1, "epoch": n} for n in range(1, 6)]
    for length in (1, 5):
        plots.plot_curves({"faculty-seed0": history[:length], "no_teacher-seed0": history}, tmp_path / "l.png")
        assert coloured(tmp_path / "l.png") > 0.0005
    assert plots.loss_parts(history) == ["kd", "transport"]
    plots.plot_curves({"one": [{"loss": 1.0}]}, tmp_path / "o.png")
    assert coloured(tmp_path / "o.png") > 0.0001
    flow = [{"flow.a.student": n / 5, "flow.a.0": 1 - n / 5, "flow.b.student": 0.5, "flow.b.1": 0.5} for n in range(5)]
    plots.plot_flow(flow, ["_first", "second"], tmp_path / "f.png")
    assert coloured(tmp_path / "f.png") > 0.003
