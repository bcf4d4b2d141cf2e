"""Pictures of a sweep: its trials as lines across the settings, and how much each setting tells of the outcome."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.report.plots import _COLOURS, _figure, _line, _short

LEAST = 5  # trials below which nothing is said of importance
_SHUFFLES = 2000
_CHANCE = 0.95
_SHOWN = 12  # settings in a picture


@dataclass(frozen=True)
class Axis:
    """A setting, as numbers.

    Attributes
    ----------
    name : str
        Path of the setting.
    values : (T,) sequence of float
        By trial; the place among `labels` where there are any.
    labels : tuple of str
        Of a choice; empty for a range.
    log : bool
        Whether ratios count.
    """

    name: str
    values: Sequence[float]
    labels: tuple[str, ...] = ()
    log: bool = False


@dataclass(frozen=True)
class Importance:
    """How much a setting tells of the outcome by itself.

    Attributes
    ----------
    name : str
    explained : float
        Share of the variance of the outcome's ranks that it explains, in [0, 1].
    chance : float
        What a setting without any influence reaches in one of twenty sweeps.
    p : float
        Share of shuffled sweeps in which it explains as much.
    """

    name: str
    explained: float
    chance: float
    p: float


def importances(axes: Sequence[Axis], outcome: Sequence[float], *, seed: int = 0) -> list[Importance]:
    """Return what each setting tells of the outcome, the most telling first; nothing for fewer than `LEAST` trials.

    With r the ranks of the outcome over T trials, a choice explains the share of the variance of r between its values
    (η², as in the test of Kruskal and Wallis), a range that of the regression of r on its own ranks and their squares,
    so that a best value in the middle counts. Both find something in noise, the more the fewer the trials: `chance` and
    `p` say how much, from 2000 shuffles of r. What two settings tell only together is seen by neither.

    Parameters
    ----------
    axes : sequence of Axis
    outcome : (T,) sequence of float
    seed : int
        Of the shuffles.
    """
    values = np.asarray(outcome, dtype=float)
    if len(values) < LEAST or np.ptp(values) == 0:
        return []
    ranks = _ranks(values)
    random = np.random.default_rng(seed)
    shuffled = np.stack([random.permutation(ranks) for _ in range(_SHUFFLES)])
    found = []
    for axis in axes:
        basis = _basis(axis)
        if basis is None:
            continue
        explained = float(_explained(basis, ranks[None])[0])
        null = _explained(basis, shuffled)
        chance, p = float(np.quantile(null, _CHANCE)), float((1 + (null >= explained - 1e-12).sum()) / (1 + len(null)))
        found.append(Importance(axis.name, explained, chance, p))
    return sorted(found, key=lambda one: (-one.explained, one.name))


def _basis(axis: Axis) -> np.ndarray | None:
    """Return orthonormal columns (T, k) that the outcome is explained by, without the constant; None if there is none.

    A range with three values or fewer has no more to tell than whether it rises.
    """
    values = np.asarray(axis.values, dtype=float)
    kinds = np.unique(values)
    if len(kinds) < 2:
        return None
    if axis.labels:
        columns = (values[:, None] == kinds).astype(float)
    else:
        ranks = _ranks(values)
        centred = ranks - ranks.mean()
        columns = centred[:, None] if len(kinds) <= 3 else np.stack([centred, centred**2], axis=1)
    columns = columns - columns.mean(0)
    left, sizes, _ = np.linalg.svd(columns, full_matrices=False)
    return left[:, sizes > 1e-9 * sizes[0]]


def _explained(basis: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Return the share (N,) of the variance of ranks (N, T) in the span of `basis` (T, k)."""
    centred = ranks - ranks.mean(1, keepdims=True)
    return ((centred @ basis) ** 2).sum(1) / (centred**2).sum(1)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks (T,), the mean of those that are equal."""
    from scipy.stats import rankdata

    return np.asarray(rankdata(values), dtype=float)


def plot_parallel(axes: Sequence[Axis], outcome: Sequence[float], path: Path, *, title: str, best: str = "max") -> None:
    """Draw each trial as a line across the settings, coloured by its outcome; the best one stands out.

    Parameters
    ----------
    axes : sequence of Axis
        Of more than 12, the first are shown.
    outcome : (T,) sequence of float
    path : Path
        Its ending chooses the format: ``.svg`` or ``.png``.
    title : str
        What the outcome is.
    best : {"max", "min"}
    """
    from matplotlib import colormaps

    shown = list(axes)[:_SHOWN]
    values = np.asarray(outcome, dtype=float)
    low, high = float(values.min()), float(values.max())
    shades = (values - low) / (high - low) if high > low else np.full(len(values), 0.5)
    columns = [_places(axis) for axis in shown]
    lines = np.stack([*columns, shades], axis=1)
    first = int(values.argmax() if best == "max" else values.argmin())
    figure, (axis,) = _figure(1, 1, width=max(1.7 * len(lines[0]) + 1.6, 5.0), height=4.2)
    axis.spines[:].set_visible(False)
    order = np.argsort(shades if best == "max" else -shades, kind="stable")  # the better ones on top
    for row in order:
        colour = colormaps["cividis"](shades[row])
        axis.plot(range(len(lines[row])), lines[row], color=colour, linewidth=1.3, alpha=0.75, solid_capstyle="round")
    axis.plot(range(len(lines[first])), lines[first], color=_COLOURS[4], linewidth=2.4, marker="o", markersize=4)
    for place, one in enumerate(shown):
        _scale(axis, place, _ticks(one))
    _scale(axis, len(shown), [(0.0, f"{low:.4g}"), (1.0, f"{high:.4g}")] if high > low else [(0.5, f"{low:.4g}")])
    names = [_name(one.name) for one in shown] + [_line(title)]
    axis.set_xticks(range(len(names)), names, fontsize=8)
    axis.tick_params(axis="x", length=0, pad=8)
    axis.set_yticks([])
    axis.set(ylim=(-0.06, 1.06), xlim=(-0.4, len(names) - 0.4))
    axis.set_title(f"{len(values)} trials; the best in red", fontsize=10)
    _save(figure, path)


def plot_importances(found: Sequence[Importance], path: Path, *, title: str, trials: int) -> None:
    """Draw what each setting explains, with a mark at what chance explains in one of twenty sweeps.

    Parameters
    ----------
    found : sequence of Importance
    path : Path
        ``.svg`` or ``.png``.
    title : str
        What the outcome is.
    trials : int
    """
    shown = list(found)[:_SHOWN]
    (figure, (axis,)) = _figure(1, 1, width=6.8, height=0.42 * max(len(shown), 1) + 1.5)
    for place, one in enumerate(shown):
        clear = one.explained > one.chance
        axis.barh(place, one.explained, height=0.6, color=_COLOURS[0] if clear else "#B0B0B0")
        axis.plot([one.chance, one.chance], [place - 0.38, place + 0.38], color=_COLOURS[4], linewidth=2)
    axis.set_yticks(range(len(shown)), [_short(one.name, 40) for one in shown], fontsize=8)
    axis.tick_params(axis="y", length=0)
    axis.set(xlim=(0, 1), xlabel="share of the variance in ranks that the setting explains alone")
    axis.set_ylim(max(len(shown), 1) - 0.4, -0.6)
    told = "grey: no more than chance (red mark) explains in one of 20 sweeps"
    axis.set_title(f"{_line(title)}, {trials} trials\n{told}", fontsize=9)
    _save(figure, path)


def _places(axis: Axis) -> np.ndarray:
    """Return where the values (T,) lie on an axis from 0 to 1."""
    values = np.asarray(axis.values, dtype=float)
    if axis.labels:
        return values / (len(axis.labels) - 1) if len(axis.labels) > 1 else np.full(len(values), 0.5)
    if axis.log:
        values = np.log(values)
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.full(len(values), 0.5)


def _ticks(axis: Axis) -> list[tuple[float, str]]:
    if axis.labels:
        last = max(len(axis.labels) - 1, 1)
        lone = len(axis.labels) == 1
        return [(0.5 if lone else place / last, _short(label, 14)) for place, label in enumerate(axis.labels)]
    low, high = min(axis.values), max(axis.values)
    if low == high:
        return [(0.5, f"{low:.3g}")]
    middle = math.exp((math.log(low) + math.log(high)) / 2) if axis.log else (low + high) / 2
    return [(0.0, f"{low:.3g}"), (0.5, f"{middle:.3g}"), (1.0, f"{high:.3g}")]


def _scale(axis: Any, place: int, ticks: Sequence[tuple[float, str]]) -> None:
    axis.plot([place, place], [0, 1], color="#606060", linewidth=0.9, zorder=0)
    for height, text in ticks:
        axis.plot([place - 0.02, place + 0.02], [height, height], color="#606060", linewidth=0.9)
        axis.annotate(
            text,
            (place, height),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=7,
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.8},
        )


def _name(path: str) -> str:
    """Return a path in two lines: what it is, and below where it is."""
    above, _, last = path.rpartition(".")
    return f"{_short(last, 20)}\n{_short(above, 26)}" if above else _short(last, 20)


def _save(figure: Any, path: Path) -> None:
    import warnings

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part{path.suffix}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from", category=UserWarning)
        # No time of drawing: the same sweep gives the same file.
        figure.savefig(part, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    part.replace(path)
