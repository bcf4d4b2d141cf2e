"""The plan, and plan against actual, on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from pipeline.planning.plan import Plan
from pipeline.report.console import Display
from pipeline.stages.tables import table

_SHOWN = 20  # teachers
_ORIGINS = {
    "calibrated": "measured on this machine just now",
    "recorded": "recorded by former runs of this folder",
    "described": "from the operations a second of the description; start-ups are assumed",
    "none": "not known",
}


def show(plan: Plan, display: Display) -> None:
    """Print a plan: teachers, stages, memory, bytes on disk, and what stands against it."""
    display.note(f"[bold]{escape(plan.name)}[/] on {plan.cluster.describe()}")
    _teachers(plan, display)
    _stages(plan, display)
    _memory(plan, display)
    _disk(plan, display)
    for warning in plan.warnings[:_SHOWN]:
        display.warn(escape(warning))
    if len(plan.warnings) > _SHOWN:
        display.warn(f"and {len(plan.warnings) - _SHOWN} more of the kind")
    for one in plan.refused:
        display.note(f"[red]refused[/]  {escape(one.what)}; [bold]{escape(one.remedy)}[/]")
    if not plan.refused:
        display.note("nothing stands against it")


def show_against(rows: Sequence[dict[str, Any]], display: Display) -> None:
    """Print plan against actual, see `pipeline.planning.against.against`; nothing where there is no row."""
    if not rows:
        return
    shown = _aligned("stage", "", "planned", "actual", "plan / actual", left=2)
    for row in rows:
        form = seconds if row["what"] == "seconds" else lambda value: f"{value:.0f} MiB"
        colour = "green" if row["within"] else "yellow"
        what = "time" if row["what"] == "seconds" else row["what"]
        ratio = f"[{colour}]{row['ratio']:.2f}[/]"
        shown.add_row(row["stage"], what, form(row["planned"]), form(row["actual"]), ratio)
    display.table(shown)


def seconds(value: float | None) -> str:
    """Write a time as a person would: ``41 s``, ``12 min``, ``3.5 h``."""
    if value is None:
        return "?"
    if value < 10:
        return f"{value:.1f} s"
    if value < 120:
        return f"{value:.0f} s"
    if value < 600:
        return f"{value / 60:.1f} min"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def size(value: float | None) -> str:
    """Write bytes as a person would, in powers of ten."""
    if value is None:
        return "?"
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{value / unit:.1f} {name}"
    return f"{value:.0f} B"


def _teachers(plan: Plan, display: Display) -> None:
    shown = _aligned(
        "teacher", "net", "input", "classes", "params", "MFLOPs an image", "weights", "of an image", left=2
    )
    for one in plan.teachers[:_SHOWN]:
        net = one.net
        shown.add_row(
            escape(one.name),
            escape(one.kind),
            "x".join(map(str, one.shape)),
            "?" if one.classes is None else str(one.classes),
            "?" if net is None else f"{net.parameters:,d}",
            "?" if net is None or net.flops is None else f"{net.flops / 1e6:,.1f}",
            "?" if net is None else size(net.weight_bytes),
            "?" if net is None else size(net.forward_bytes),
        )
    display.table(shown)
    if len(plan.teachers) > _SHOWN:
        display.note(f"the largest {_SHOWN} of {len(plan.teachers)} teachers; all with --json")


def _stages(plan: Plan, display: Display) -> None:
    priced = plan.price is not None and plan.cluster.all_gpus > 0
    shown = _aligned(
        "stage", "state", "images", "each process", "at once", "time", *(["cost"] if priced else []), left=2
    )
    shown.add_column("what takes it", overflow="fold")
    for one in plan.stages:
        parts = sorted(one.parts.items(), key=lambda item: -item[1])
        cells = [one.stage, one.state]
        if one.state == "fresh":
            cells += ["", "", "", seconds(0.0), *([f"{0:.2f}"] if priced else []), ""]
        else:
            cells += [f"{one.images:,d}" if one.images else "", one.resources, str(one.at_once or "driver")]
            cells += [seconds(one.seconds), *([_money(one.cost)] if priced else [])]
            cells.append(", ".join(f"{name} {seconds(value)}" for name, value in parts if value >= 0.05))
        shown.add_row(*cells)
    cost = f", cost {_money(plan.cost)} at {plan.price:g} a GPU-hour" if priced else ""
    display.table(shown)
    known = sum(one.seconds or 0.0 for one in plan.stages)
    total = seconds(plan.seconds) if plan.seconds is not None else f"more than {seconds(known)}"
    display.note(f"all stages: {total}{cost}; throughputs {_ORIGINS[plan.rates.origin]}")
    if plan.work.assumed and plan.work.faculty:
        names, count = ", ".join(one.name for one in plan.work.faculty[:4]), len(plan.work.faculty)
        most = "the most costly one is" if count == 1 else f"the most costly {count} are"
        display.note(f"who teaches is not known yet: {most} counted ({escape(names)})")
    if plan.price is not None and not priced:
        display.note("--price is that of a GPU, and there is none: no cost is told; --cluster describes other machines")


def _memory(plan: Plan, display: Display) -> None:
    if not plan.memory:
        return
    shown = _aligned("stage", "process", "on", "needs", "side by side", "of", left=3)
    shown.add_column("what takes it", overflow="fold")
    for one in plan.memory:
        parts = sorted(one.parts.items(), key=lambda item: -item[1])
        needs = size(one.bytes) if one.fits else f"[red]{size(one.bytes)}[/]"
        cells = [one.stage, escape(one.process), one.on, needs, f"{one.beside}: {size(max(one.all, one.bytes))}"]
        shown.add_row(
            *cells, size(one.limit), ", ".join(f"{name} {size(value)}" for name, value in parts if value >= 1e5)
        )
    display.table(shown)


def _disk(plan: Plan, display: Display) -> None:
    if plan.disk:
        parts = [f"{name} {size(value)}" for name, value in plan.disk.items()]
        display.note(f"bytes: {', '.join(parts)}")


def _money(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f}"


def _aligned(*columns: str, left: int) -> Table:
    shown = table(*columns)
    for column in shown.columns[left:]:
        column.justify = "right"
    return shown
