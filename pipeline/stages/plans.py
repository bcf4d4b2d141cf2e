"""The transport plan of an assessed teacher: which of its classes stand for which of the task's, and how much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.stages.base import Run
from pipeline.stages.probe import LABELLED, probe_logits
from pipeline.stages.teachers import has_labels, load_bridge, table_of, teacher_folder

if TYPE_CHECKING:
    from torch import Tensor

_PICTURE = "plan.png"
_JUDGED = LABELLED[:2]  # validation images judge sets of teachers alone


@dataclass(frozen=True)
class ClassPlan:
    """A plan between classes.

    Attributes
    ----------
    mass : (C_t, C_s) tensor
        Sums to 1.
    sources, targets : tuple of str
        Names of the teacher's and the task's classes.
    """

    mass: Tensor
    sources: tuple[str, ...]
    targets: tuple[str, ...]


def transport_plan(run: Run, name: str) -> ClassPlan:
    """Return the plan that takes a teacher's probabilities p(x) to the task's classes, in the mean over images.

    With labels y the plan of an image is forced, p(x) to y, so that P_ij = mean_x p_i(x) 1[y(x) = j], over the labelled
    images that it was scored on. Without, P_ij = mean_x p_i(x) T_ij with the bridge's row-stochastic T. Nobody is run:
    what the teacher said is read from where it was kept, a few thousand images at a time.

    Parameters
    ----------
    run : Run
    name : str
        A teacher that was assessed to the end.

    Raises
    ------
    StageError
        When what it said is no longer there.
    """
    import torch

    table, said = table_of(run), probe_logits(run, name)
    if not has_labels(run):
        mean = torch.stack([logits.softmax(1).sum(0) for _, logits in said.pieces()]).sum(0)
        mass = (mean / mean.sum())[:, None] * load_bridge(teacher_folder(run, name)).plan.float()
        return ClassPlan(mass, said.classes, tuple(table.classes))
    labels = torch.cat([table.split(split).labels for split in _JUDGED])
    mass = torch.zeros(len(table.classes), len(said.classes))
    for rows, logits in said.pieces():
        seen = rows < len(labels)
        mass.index_add_(0, labels[rows[seen]], logits[seen].softmax(1))
    return ClassPlan(mass.t() / mass.sum().clamp_min(1e-12), said.classes, tuple(table.classes))


def plan_rows(plan: ClassPlan, most: int = 2000, share: float = 0.99) -> list[dict[str, Any]]:
    """Return the largest masses, largest first: those that together hold `share` of all, `most` at most."""
    values, places = plan.mass.flatten().topk(min(most, plan.mass.numel()))
    held = values.cumsum(0) - values
    kept = (values > 0) & (held < share)
    width = len(plan.targets)
    return [
        {"teacher class": plan.sources[place // width], "task class": plan.targets[place % width], "mass": value}
        for place, value in zip(places[kept].tolist(), values[kept].tolist(), strict=True)
    ]


def draw_plan(run: Run, row: Mapping[str, Any], plan: ClassPlan) -> Path:
    """Draw a teacher's plan beside its assessment; return the file. `row` is that of the assessment."""
    from pipeline.report.plots import plot_plan

    path = teacher_folder(run, row["teacher"]) / _PICTURE
    known = {"cost": row["transport_cost"], "gain": row["transport_gain"], "bridge gain": row["bridge_gain"]}
    told = [f"{what} {value:.3f}" for what, value in known.items() if value is not None]
    title = ", ".join([f"{row['teacher']}: transport plan", *told])
    plot_plan(plan.mass.numpy(), plan.sources, plan.targets, path, title=title)
    return path


def picture_of(run: Run, row: Mapping[str, Any]) -> Path:
    """Return the picture of a teacher's plan; it is drawn where it is not there."""
    path = teacher_folder(run, row["teacher"]) / _PICTURE
    return path if path.is_file() else draw_plan(run, row, transport_plan(run, row["teacher"]))
