"""Plots that stages write beside their numbers. Each takes plain values and writes one PNG file.

The colour-blind can tell the colours apart: Okabe and Ito's for lines and bars, cividis for matrices. What does not fit
is summed up or left out, and the title says so: a picture has at most `_ROWS` rows and columns, whatever the number of
classes and teachers.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_ROWS = 40  # of a matrix or a list of bars: more can't be read
_MOST = 8  # lines or colours in one plot
_WRITTEN = 12  # rows up to which a matrix has its numbers written in
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")
_OTHER = "#B0B0B0"
_STYLES = ("-", "--", ":", "-.")


def plot_histograms(found: Mapping[str, Any], path: Path) -> None:
    """Draw the ambiguities of every teacher, and who taught which class.

    Parameters
    ----------
    found : mapping
        ``edges``, ``ambiguity`` (teacher to counts), ``classes``, ``taught`` (teacher to counts by class). Where one
        alone teaches, for all of them, ``surest`` is drawn instead: who is the least ambiguous of how many images.
    path : Path
    """
    title, counted = "Who teaches which class", found["taught"]
    if sum(any(counts) for counts in counted.values()) == 1 < len(found.get("surest", ())):
        title, counted = "They teach together; who is surest of which class", found["surest"]
    taught = {name: np.asarray(counts, dtype=float) for name, counts in counted.items()}
    # Those who teach most, and then in the order in which they were chosen.
    most = sorted(taught, key=lambda name: -taught[name].sum())[:_MOST]
    names = [name for name in taught if name in most]
    total = sum(taught.values(), np.zeros(len(found["classes"])))
    rows = _largest(total, _ROWS)
    figure, (left, right) = _figure(1, 2, width=11, height=max(0.24 * len(rows) + 1.6, 3.2))
    edges = np.asarray(found["edges"])
    begun = np.zeros(len(rows))
    for number, name in enumerate(names):
        colour = _COLOURS[number]
        counts = np.asarray(found["ambiguity"][name], dtype=float)
        left.stairs(counts, edges, linewidth=1.6, color=colour)
        right.barh(np.arange(len(rows)), taught[name][rows], left=begun, label=_short(name), color=colour)
        begun += taught[name][rows]
    rest = total[rows] - begun
    if len(names) < len(taught) and rest.sum() > 0:
        right.barh(np.arange(len(rows)), rest, left=begun, label="all others", color=_OTHER)
    left.set(xlabel="ambiguity (0 sure, 1 no idea)", ylabel="images", xlim=(0, 1))
    left.set_title("How unsure each teacher is" + _part(len(names), len(taught), "teachers"), fontsize=10)
    right.set(xlabel="images")
    right.set_title(title + _part(len(rows), len(total), "classes"), fontsize=10)
    _names(right, "y", [found["classes"][row] for row in rows])
    right.invert_yaxis()
    _legend(right, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _write(figure, path)


def plot_flow(history: Sequence[Mapping[str, float]], teachers: Sequence[str], path: Path) -> None:
    """Draw the mixing weights of every student layer over the epochs.

    Parameters
    ----------
    history : sequence of mappings
        One an epoch, with ``flow.LAYER.student`` and ``flow.LAYER.NUMBER`` for the teachers.
    teachers : sequence of str
        Names by number.
    path : Path
    """
    keys = [key for key in history[0] if key.startswith("flow.")]
    layers = list(dict.fromkeys(key[5:].rpartition(".")[0] for key in keys))
    figure, axes = _figure(1, len(layers), width=3.2 * len(layers) + 1, height=3)
    epochs = range(1, len(history) + 1)
    for axis, layer in zip(axes, layers, strict=True):
        for key in keys:
            if key[5:].rpartition(".")[0] == layer:
                source = key.rpartition(".")[2]
                own = source == "student"
                label = "the student itself" if own else _short(teachers[int(source)])
                colour, style = ("#000000", "-") if own else _look(int(source))
                values = [row[key] for row in history]
                axis.plot(epochs, values, label=label, linewidth=2.5 if own else 1.4, color=colour, linestyle=style)
        axis.set(xlabel="epoch", ylim=(0, 1.02), title=_short(layer))
        _whole_epochs(axis, len(history))
    axes[0].set_ylabel("mixing weight")
    lines = {line.get_label(): line for axis in axes for line in axis.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", frameon=False, fontsize=8)
    _write(figure, path)


def plot_curves(histories: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Draw losses over the epochs: the total of each training, and the parts of the first one's.

    Parameters
    ----------
    histories : mapping of str to sequence of mappings
        By training: one mapping an epoch, with ``loss``, its parts, ``lr`` and other numbers, see `loss_parts`.
    path : Path
    """
    first = next(iter(histories.values()))
    parts = loss_parts(first)
    figure, axes = _figure(1, 2 if parts else 1, width=9 if parts else 5, height=3.4)
    for number, (name, history) in enumerate(list(histories.items())[:_MOST]):
        colour, style = _look(number)
        epochs = range(1, len(history) + 1)
        values = [row["loss"] for row in history]
        axes[0].plot(epochs, values, label=_short(name), color=colour, linestyle=style, marker=_dot(history))
    axes[0].set(xlabel="epoch", ylabel="loss", title="Training loss")
    if len(histories) > 1:
        _legend(axes[0])
    if parts:
        for number, part in enumerate(parts[:_MOST]):
            colour, style = _look(number)
            values = [row.get(part, float("nan")) for row in first]
            axes[1].plot(
                range(1, len(first) + 1),
                values,
                label=_short(part),
                color=colour,
                linestyle=style,
                marker=_dot(first),
            )
        axes[1].set(xlabel="epoch", title=f"Parts of the loss, {_short(next(iter(histories)))}")
        _legend(axes[1])
    for axis in axes:
        _whole_epochs(axis, len(first))
    _write(figure, path)


_NO_PARTS = {"loss", "epoch", "lr", "seconds", "images_per_second", "skipped", "gradient_norm", "kept_teachers"}


def loss_parts(history: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the names of the parts of a loss, in the order in which they were added up."""
    return [name for name in history[0] if name not in _NO_PARTS and not name.startswith("flow.")] if history else []


def plot_plan(
    plan: Sequence[Sequence[float]] | np.ndarray,
    sources: Sequence[str],
    targets: Sequence[str],
    path: Path,
    *,
    title: str,
) -> None:
    """Draw a transport plan between classes: of each target class, which share of its mass lies where.

    Rows are ordered by the column that they give most to, so that a plan between related classes is a band. Of more
    than 40 classes those with most mass are shown.

    Parameters
    ----------
    plan : (L, C) array
        Mass from source class to target class, ≥ 0.
    sources, targets : sequence of str
        L and C names.
    path : Path
    title : str
    """
    mass = np.asarray(plan, dtype=float)
    columns = _largest(mass.sum(0), _ROWS)
    rows = _largest(mass[:, columns].sum(1), _ROWS)
    shares = mass / np.maximum(mass.sum(0, keepdims=True), np.finfo(float).tiny)
    share = shares[np.ix_(rows, columns)]
    order = np.lexsort((-share.max(1), share.argmax(1)))
    rows, share = rows[order], share[order]
    kept = mass[rows].sum() / max(mass.sum(), np.finfo(float).tiny)
    note = _part(len(rows), len(mass), "teacher classes", kept) + _part(len(columns), mass.shape[1], "task classes")
    _draw_matrix(
        share,
        [sources[row] for row in rows],
        [targets[column] for column in columns],
        path,
        title=_line(title) + note,
        ylabel="class of the teacher",
        xlabel="class of the task",
        bar="share of the task class",
    )


def plot_confusion(counts: Sequence[Sequence[float]], classes: Sequence[str], path: Path, *, title: str) -> None:
    """Draw a confusion matrix, each row as shares of the images of that class.

    Of more than 40 classes those with most errors are shown.

    Parameters
    ----------
    counts : (C, C) array
        Row: label, column: prediction.
    classes : sequence of str
    path : Path
    title : str
    """
    found = np.asarray(counts, dtype=float)
    wrong = found.sum(0) + found.sum(1) - 2 * found.diagonal()
    rows = _largest(wrong, _ROWS)
    shares = found / np.maximum(found.sum(1, keepdims=True), 1)
    names = [classes[row] for row in rows]
    note = _part(len(rows), len(found), "classes: those with most errors")
    _draw_matrix(
        shares[np.ix_(rows, rows)],
        names,
        names,
        path,
        title=_line(title) + note,
        ylabel="label",
        xlabel="prediction",
        bar="share of the label's images",
    )


def plot_scores(rows: Sequence[Mapping[str, Any]], path: Path, *, chosen: Sequence[str] = ()) -> None:
    """Draw the scores of the best teachers with their intervals.

    Parameters
    ----------
    rows : sequence of mappings
        ``teacher``, ``score``, ``score_low``, ``score_high``, best first; those without a score are left out.
    path : Path
    chosen : sequence of str
        Teachers that are marked.
    """
    known = [row for row in rows if row["score"] is not None]
    shown = known[:_ROWS]
    (figure, (axis,)) = _figure(1, 1, width=6.5, height=0.22 * len(shown) + 1.2)
    for place, row in enumerate(shown):
        colour = _COLOURS[4] if row["teacher"] in chosen else _COLOURS[0]
        axis.plot((row["score_low"], row["score_high"]), (place, place), color=colour, linewidth=1.6)
        axis.plot(row["score"], place, "D" if row["teacher"] in chosen else "o", color=colour, markersize=5)
    _names(axis, "y", [row["teacher"] for row in shown])
    axis.set_ylim(len(shown) - 0.4, -0.6)
    axis.grid(axis="x", alpha=0.3)
    axis.set(xlabel="score, with its interval" + (" (diamond: chosen)" if chosen else ""))
    axis.set_title("Teachers" + _part(len(shown), len(known), "with a score"), fontsize=10)
    _write(figure, path)


def plot_accuracies(arms: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the test accuracy of the student and its controls, a dot for each seed.

    Parameters
    ----------
    arms : sequence of mappings
        ``title``, ``accuracies``, ``mean``; the student first.
    path : Path
    """
    shown = list(arms)[:_ROWS]
    (figure, (axis,)) = _figure(1, 1, width=6.5, height=0.34 * len(shown) + 1.1)
    for place, arm in enumerate(shown):
        colour = _COLOURS[4] if place == 0 else _COLOURS[0]
        values = [100 * value for value in arm["accuracies"]]
        axis.plot(values, [place] * len(values), "o", color=colour, alpha=0.55, markersize=6, markeredgewidth=0)
        axis.plot(100 * arm["mean"], place, "|", color=colour, markersize=18, markeredgewidth=2.4)
    axis.axvline(100 * shown[0]["mean"], color=_COLOURS[4], linewidth=0.8, linestyle=":")
    _names(axis, "y", [arm["title"] for arm in shown], longest=48)
    axis.set_ylim(len(shown) - 0.4, -0.6)
    axis.grid(axis="x", alpha=0.3)
    axis.set(xlabel="test accuracy, % (dot: one seed, bar: mean)")
    _write(figure, path)


def _draw_matrix(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    path: Path,
    *,
    title: str,
    ylabel: str,
    xlabel: str,
    bar: str,
) -> None:
    width, height = 0.26 * len(columns) + 3.6, 0.24 * len(rows) + 2.4
    (figure, (axis,)) = _figure(1, 1, width=max(width, 5.2), height=max(height, 3.4))
    highest = max(float(values.max(initial=0)), 1e-9)
    image = axis.imshow(values, cmap="cividis", vmin=0, vmax=min(highest, 1.0), aspect="auto", interpolation="nearest")
    _names(axis, "y", rows)
    _names(axis, "x", columns)
    axis.tick_params(axis="x", rotation=60 if len(columns) <= 20 else 90)
    for label in axis.get_xticklabels():
        label.set_horizontalalignment("right" if len(columns) <= 20 else "center")
        label.set_rotation_mode("anchor" if len(columns) <= 20 else "default")
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.set_title(title, fontsize=10)
    axis.spines[:].set_visible(False)
    if max(values.shape) <= _WRITTEN:
        for (row, column), value in np.ndenumerate(values):
            if value >= 0.005:
                colour = "black" if value > 0.6 * highest else "white"
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    scale = figure.colorbar(image, ax=axis, fraction=0.04, pad=0.02)
    scale.set_label(bar, fontsize=8)
    scale.ax.tick_params(labelsize=7)
    scale.outline.set_visible(False)
    _write(figure, path)


def _largest(weights: np.ndarray, most: int) -> np.ndarray:
    """Return the numbers of the `most` largest weights in their own order; all of them where there are no more."""
    if len(weights) <= most:
        return np.arange(len(weights))
    return np.sort(np.argsort(-weights, kind="stable")[:most])


def _part(shown: int, of: int, what: str, share: float | None = None) -> str:
    if shown == of:
        return ""
    return f"\n{shown} of {of} {what}" + ("" if share is None else f", {share:.0%} of the mass")


def _look(number: int) -> tuple[str, str]:
    """Return the colour and the line style of the n-th of several things."""
    return _COLOURS[number % len(_COLOURS)], _STYLES[number // len(_COLOURS) % len(_STYLES)]


def _dot(history: Sequence[Any]) -> str | None:
    return "o" if len(history) == 1 else None  # a line needs two points


def _line(text: str) -> str:
    """Return a text that is drawn as it stands: a dollar begins no formula, and no control character is left."""
    return "".join(letter if letter.isprintable() else " " for letter in text).replace("$", r"\$")


def _short(name: str, longest: int = 28) -> str:
    shown = name if len(name) <= longest else f"{name[: longest - 1]}…"
    return _line(f" {shown}" if shown.startswith("_") else shown)  # a legend leaves out what begins with a _


def _names(axis: Any, side: str, names: Sequence[str], longest: int = 28) -> None:
    set_ticks = axis.set_yticks if side == "y" else axis.set_xticks
    set_ticks(range(len(names)), [_short(name, longest) for name in names], fontsize=8 if len(names) <= 20 else 7)
    axis.tick_params(axis=side, length=0)


def _whole_epochs(axis: Any, epochs: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    room = 0.02 * epochs if epochs > 1 else 0.5
    axis.set_xlim(1 - room, epochs + room)


def _legend(axis: Any, **where: Any) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8, **where)


def _figure(rows: int, columns: int, *, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot: no display, no state shared between threads

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _write(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        # A name in letters that the font does not have is drawn as boxes; that is no reason to worry anyone.
        warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from", category=UserWarning)
        figure.savefig(path.with_suffix(".part.png"), dpi=120)
    path.with_suffix(".part.png").replace(path)
