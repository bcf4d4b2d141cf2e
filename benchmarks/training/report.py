"""Rows, goals and plot from what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import RESULTS, goal, write
from benchmarks.training.ours import VIEWS
from benchmarks.training.turns import Times
from benchmarks.training.world import BATCH, LABELLED, TAUGHT, World

# The order of the rows.
KINDS = ("bare", "alone", "average", "views", "default", "each", "live", "compiled", "peer")
FLAT = 1.05  # the memory with eight teachers over that with one
COLUMNS = {
    "task": "task",
    "title": "what",
    "measured": "measured",
    "epoch": "an epoch",
    "bare": "of the bare loop",
    "peer": "times torchdistill",
}


@dataclass(frozen=True)
class Found:
    """What was measured of one task.

    Attributes
    ----------
    world : World
    steps : int
        Of one measurement.
    times : Times
        Of trainings, the bare loop among them, by name.
    longer : int
        Steps of one measurement in `close`.
    close : Times
        Of those that are compared closely with the bare loop, and of that.
    filled : Times
        Of `fill`, the filling of the cache, and `forward`, the bare forward passes.
    rows : int
        Images of either.
    sizes : dict of str to float
        Bytes an image and teacher, by what is kept.
    held : dict of int to dict
        Peaks [MiB] by number of teachers; empty where they were not measured.
    workers : int or None
        That the peer's data loader had; None without the peer.
    """

    world: World
    steps: int
    times: Times
    longer: int
    close: Times
    filled: Times
    rows: int
    sizes: dict[str, float]
    held: dict[int, dict[str, float]]
    workers: int | None

    @property
    def names(self) -> list[str]:
        """All trainings, in the order of the rows."""
        names = {*self.close.seconds, *self.times.seconds}
        return sorted(names, key=lambda name: (KINDS.index(name.split()[0]), name))

    def of(self, name: str) -> tuple[Times, int]:
        """Return the times that a training is part of, and its steps there."""
        return (self.close, self.longer) if name in self.close else (self.times, self.steps)


def title(name: str) -> str:
    """Return what a training is called in the table."""
    kind, _, rest = name.partition(" ")
    count = rest.rpartition(" ")[2]
    teachers = f"{count} teacher{'' if count == '1' else 's'}"
    if kind == "peer":
        style = {
            "samples": "live, sample by sample",
            "batches": "live, handed whole batches",
            "replayed": "replayed by a wrapper of one's own, whole batches",
        }[rest.partition(" ")[0]]
        return f"torchdistill, {teachers} {style}"
    return {
        "bare": "bare torch loop, no teacher",
        "alone": "ours, no teacher",
        "average": f"ours, {teachers} cached, KD to their average",
        "views": f"ours, {teachers} cached for {VIEWS} views of each image, KD to their average",
        "default": f"ours, {teachers} cached, default recipe: they speak as one",
        "each": f"ours, {teachers} cached, transport to each of them",
        "live": f"ours, {teachers} live",
        "compiled": f"ours, {teachers} live and compiled",
    }[kind]


def rivals(times: Times, name: str) -> list[str]:
    """Return the peer's trainings for the same job: as many teachers, live, by sample and by batch."""
    count = name.rpartition(" ")[2]
    return [f"peer {style} {count}" for style in ("samples", "batches") if f"peer {style} {count}" in times]


def rows_of(one: Found) -> Iterator[dict[str, Any]]:
    """Yield the rows of one task."""
    common = {"task": one.world.title}
    for name in one.names:
        times, steps = one.of(name)
        rate = steps * BATCH / times.median(name)
        of_bare = times.ratio(name, "bare")
        row: dict[str, Any] = common | {
            "name": name,
            "title": title(name),
            "images_per_second": rate,
            "epoch_seconds": one.world.epoch / rate,
            "of_bare": of_bare.median,
            "of_bare_range": [of_bare.least, of_bare.largest],
            "seconds": times.seconds[name],
            "measured": f"{rate:,.0f} images/s",
            "epoch": f"{one.world.epoch / rate:,.1f} s",
            "bare": "" if name == "bare" else str(of_bare),
        }
        if name.startswith(("average", "views", "live", "compiled")) and (others := rivals(one.times, name)):
            ratios = {other: one.times.ratio(name, other) for other in others}
            row["of_peer"] = {other: [r.median, r.least, r.largest] for other, r in ratios.items()}
            row["peer"] = " / ".join(f"{ratio.median:.2f}" for ratio in ratios.values())
        yield row
    filling = one.filled.ratio("fill", "forward")
    rate = one.rows / one.filled.median("fill")
    yield common | {
        "name": "fill",
        "title": "cache: filling it, of bare forward passes of the teacher",
        "images_per_second": rate,
        "of_forward": filling.median,
        "of_forward_range": [filling.least, filling.largest],
        "measured": f"{rate:,.0f} images/s, {filling}",
    }
    for what, size in one.sizes.items():
        measured = f"{size:.0f} bytes an image and teacher"
        yield common | {"name": "size", "title": f"cache: {what}", "bytes": size, "measured": measured}
    for count, held in one.held.items():
        parts = [f"{value:,.0f} MiB {where}" for where, value in held.items()]
        what = f"{count} cached teacher{'' if count == 1 else 's'}" if count else "no teacher"
        yield common | {
            "name": f"memory {count}",
            "title": f"memory of the process, {what}",
            "mib": held,
            "measured": ", ".join(parts),
        }


def goals_of(one: Found) -> Iterator[dict[str, Any]]:
    """Yield the goals of one task; those of what was not run are left out."""
    times, task = one.times, one.world.title
    for name, target in (("alone", 0.97), ("average 8", 0.87), ("default 8", 0.87)):
        ratio = one.close.ratio(name, "bare").median
        yield goal(f"{task}: {title(name)}, of the bare loop", ratio, target, "ratio")
    for kind, target in (("average", 1.5), ("live", 1.0)):
        for count in (1, 4):
            name = f"{kind} {count}"
            for other in rivals(times, name):
                ratio = times.ratio(name, other).median
                yield goal(f"{task}: {title(name)}, of {title(other)}", ratio, target, "ratio")
    filling = one.filled.ratio("fill", "forward").median
    yield goal(f"{task}: cache filled, of bare forward passes", filling, 0.9, "ratio")
    for where in one.held.get(8, {}):
        ratio = one.held[8][where] / one.held[1][where]
        yield goal(f"{task}: memory ({where}), 8 cached teachers over 1", ratio, FLAT, "ratio", at_most=True)


def shown(found: Sequence[Found], device: str) -> Iterator[str]:
    """Yield rows and goals as lines."""
    for row in (row for one in found for row in rows_of(one)):
        yield " | ".join(str(row.get(key, "")) for key in COLUMNS)
    for one in (one for part in found for one in goals_of(part)):
        sign = "<=" if one["at_most"] else ">="
        yield f"{'met   ' if one['met'] else 'missed'} {one['name']}: {one['value']:.3f} {sign} {one['target']}"
    yield f"on {hardware(device)}"


def hardware(device: str) -> str:
    """Return what computed, in words."""
    threads = torch.get_num_threads()
    if device == "cuda":
        return f"{torch.cuda.get_device_name()} and {threads} CPU threads"
    return f"{threads} CPU thread{'' if threads == 1 else 's'}"


def publish(found: Sequence[Found], device: str, peer: str | None) -> None:
    """Write the results, their table and their plot."""
    name = "training" if device == "cpu" else "training_gpu"
    rounds, closer = (len(next(iter(one.seconds.values()))) for one in (found[0].times, found[0].close))
    beside = (
        f"torchdistill {peer}: one module holds its teachers, a hook and a loss on each. Sample by sample is the way "
        "of its sample configurations, with the number of data loader workers that was fastest "
        f"({', '.join(str(one.workers) for one in found)}); whole batches come from a data set that makes them as the "
        "bare loop does. It keeps no teacher outputs; replayed ones are added through its registries. The column "
        '"times torchdistill" is against as many live teachers, sample by sample / whole batches.'
        if peer is not None
        else "torchdistill was not installed; its rows are missing."
    )
    note = (
        f"{hardware(device)}; medians of {rounds} rounds, the rows of a task in turn in each; ratios are those within "
        "a round, their median, least and largest. Every step has "
        f"{BATCH} images on all sides: {LABELLED} labelled and {TAUGHT} taught ones where teachers teach. Random "
        "pixels, shifts and flips, AdamW, float32, the same nets. A measurement is a whole call with "
        f"{' and '.join(str(one.steps) for one in found)} steps: ours with its checkpoint, the bare loop without any "
        "logging and with its images on the device. What is compiled was so in the round that warms up. "
        f"{_listed(found[0].close)} were measured apart from the others, in "
        f"{closer} rounds of {' and '.join(str(one.longer) for one in found)} steps. Epochs "
        f"are of {_epochs(found)} images. {beside} Memory: that of a process after one epoch by teachers of "
        "1,000 classes, without pages of mapped files."
    )
    rows = [row for one in found for row in rows_of(one)]
    write(name, rows, [one for part in found for one in goals_of(part)], COLUMNS, note)
    plot(rows, RESULTS / f"{name}.png")
    for line in shown(found, device):
        print(line)


def _listed(close: Times) -> str:
    names = [title(name) for name in close.seconds]
    return f"The {'; '.join(names[:-1])}; and {names[-1]}"


def _epochs(found: Sequence[Found]) -> str:
    return " and ".join(f"{one.world.epoch:,}" for one in found)


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the rate of every training as a part of the bare loop's, from the rows of the table."""
    from matplotlib.figure import Figure

    trainings = [row for row in rows if "of_bare" in row]
    tasks = list(dict.fromkeys(row["task"] for row in trainings))
    most = max(sum(row["task"] == task for row in trainings) for task in tasks)
    figure = Figure(figsize=(6.5 * len(tasks), 0.34 * most + 1), layout="constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axis, task in zip(axes, tasks, strict=True):
        own = [row for row in trainings if row["task"] == task]
        for place, row in enumerate(own):
            kind = row["name"].split()[0]
            colour = {"peer": "tab:grey", "bare": "black"}.get(kind, "tab:blue")
            axis.barh(place, row["of_bare"], color=colour)
            axis.plot(row["of_bare_range"], [place, place], color="0.3", lw=1.2)
        axis.axvline(1, color="black", lw=0.8)
        axis.set_yticks(range(len(own)), [row["title"] for row in own], fontsize=8)
        axis.set_ylim(len(own) - 0.4, -0.6)
        axis.set_title(task)
        axis.set_xlabel("rate over the bare loop's", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
