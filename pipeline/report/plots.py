"""Plots that stages write beside their numbers. Each takes plain values and writes one PNG file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_MOST = 12


def plot_histograms(found: Mapping[str, Any], path: Path) -> None:
    """Draw the ambiguities of every teacher, and who taught which class.

    Parameters
    ----------
    found : mapping
        ``edges``, ``ambiguity`` (teacher to counts), ``classes``, ``taught`` (teacher to counts by class).
    path : Path
    """
    names = list(found["ambiguity"])[:_MOST]
    figure, (left, right) = _figure(1, 2, width=11, height=0.28 * len(found["classes"]) + 2.2)
    edges = found["edges"]
    for name in names:
        left.stairs(found["ambiguity"][name], edges, label=name, linewidth=1.5)
    left.set(xlabel="ambiguity", ylabel="images", xlim=(0, 1), title="How unsure each teacher is")
    left.legend(frameon=False, fontsize=8)
    begun = [0] * len(found["classes"])
    rows = range(len(found["classes"]))
    for name in names:
        right.barh(rows, found["taught"][name], left=begun, label=name)
        begun = [before + more for before, more in zip(begun, found["taught"][name], strict=True)]
    right.set(xlabel="images", title="Who teaches which class")
    right.set_yticks(rows, found["classes"], fontsize=8)
    right.invert_yaxis()
    right.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
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
                label = "the student itself" if own else teachers[int(source)]
                axis.plot(epochs, [row[key] for row in history], label=label, linewidth=2.5 if own else 1.2)
        axis.set(xlabel="epoch", ylim=(0, 1.02), title=layer)
    axes[0].set_ylabel("mixing weight")
    axes[-1].legend(frameon=False, fontsize=8)
    _write(figure, path)


def _figure(rows: int, columns: int, *, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot: no display, no state shared between threads

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _write(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".part.png"), dpi=120)
    path.with_suffix(".part.png").replace(path)
