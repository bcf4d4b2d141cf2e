"""Reads the finished rows, judges the goals, writes `benchmarks/results/distill.json`, its table and its plot.

python -m benchmarks.distill report --work DIR
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.distill.rows import NO_STUDENT, journal, rows_of
from benchmarks.distill.world import SETTINGS
from benchmarks.results import RESULTS, goal, write

LABELLED = tuple(setting.name for setting in SETTINGS.values() if setting.labels)
WITHOUT = tuple(setting.name for setting in SETTINGS.values() if not setting.labels)
METHODS = ("faculty", "sctd", "aka", "knowledge_flow")
# Students that the default is held against; teachers themselves are larger than a student and stand apart.
AGAINST = (
    *("no_teacher", "finetune", "random_set", "best_single", "least_ambiguous", "average", "concatenated"),
    *("kd", "dkd", "dist", "hints", "attention", "common_features", "b_tuning", "dropping"),
)
TITLES = {
    "faculty": "**faculty (the default)**",
    "sctd": "SCTD",
    "aka": "AKA",
    "knowledge_flow": "knowledge flow",
    "no_teacher": "no teacher",
    "all_teachers": "all teachers, none chosen",
    "irrelevant": "irrelevant teachers, forced, with guard",
    "direct": "least ambiguous, direct",
    "best_teacher": "best teacher itself",
    "average_ensemble": "the set itself, averaged",
    "least_ambiguous_ensemble": "the set itself, least ambiguous",
    "together": "the set itself, together",
}

Values = dict[tuple[str, str], dict[int, float]]


def guarded(rows: Iterable[dict[str, Any]]) -> Values:
    """Return accuracies by (setting, row) and seed, the default's as its guard leaves them.

    The guard is the product's: without teachers, if that is better on the probe and validation images by more than one
    standard error.
    """
    found: dict[tuple[str, str, int], dict[str, Any]] = {
        (one["setting"], one["row"], one["seed"]): one for one in rows if one.get("accuracy") is not None
    }
    values: Values = defaultdict(dict)
    for (setting, row, seed), one in found.items():
        accuracy = one["accuracy"]
        alone = found.get((setting, "no_teacher", seed))
        if row in ("faculty", "irrelevant") and alone is not None:
            gaps = [a - b for a, b in zip(alone["hits"], one["hits"], strict=True)]
            if statistics.fmean(gaps) > statistics.pstdev(gaps) / math.sqrt(len(gaps)):
                accuracy = alone["accuracy"]
        values[setting, row][seed] = accuracy
    return values


def lead(ours: dict[int, float], theirs: dict[int, float]) -> tuple[float, float]:
    """Return the mean difference over the seeds that both have, and twice its standard error, in points."""
    gaps = [100 * (ours[seed] - theirs[seed]) for seed in ours if seed in theirs]
    error = 2 * statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
    return statistics.fmean(gaps) if gaps else math.nan, error


def judged(values: Values) -> list[dict[str, Any]]:
    """Return the goals."""
    found = []
    for setting in LABELLED:
        leads = {row: lead(values[setting, "faculty"], values[setting, row]) for row in AGAINST}
        least = min((gap - error for gap, error in leads.values() if not math.isnan(error)), default=math.nan)
        closest = min(leads, key=lambda row: leads[row][0] if not math.isnan(leads[row][0]) else math.inf)
        name = f"{setting}: default ahead of every control and baseline, least lead less 2 SE ({closest})"
        found.append(goal(name, least, 0.0, "points"))
    for setting in WITHOUT:
        for method in ("aka", "faculty") if values.get((setting, "faculty")) else ("aka",):
            for row in ("best_teacher", "concatenated", "average_ensemble"):
                gap, _ = lead(values[setting, method], values[setting, row])
                found.append(goal(f"{setting}: {method} against {row}", gap, 0.0, "points"))
    ahead = sum(
        all(lead(values[setting, "knowledge_flow"], values[setting, row])[0] > 0 for row in ("finetune", "kd"))
        for setting in LABELLED
    )
    found.append(goal("settings in which knowledge flow is above fine-tuning and KD", ahead, 2, "settings"))
    draws = [
        ours > values[setting, "random_set"][seed]
        for setting in LABELLED
        for seed, ours in values[setting, "faculty"].items()
        if seed in values[setting, "random_set"]
    ]
    share = statistics.fmean(draws) if draws else math.nan
    found.append(goal(f"chosen set beats a random one, share of {len(draws)} draws", share, 7 / 8, ""))
    harm = [lead(values[setting, "irrelevant"], values[setting, "no_teacher"])[0] for setting in LABELLED]
    found.append(goal("irrelevant teachers, forced: worst difference to no teacher", min(harm), -1.0, "points"))
    return found


def main(arguments: list[str]) -> None:
    """Write the results; refuses to while rows are missing, unless it is told to write what there is."""
    parser = argparse.ArgumentParser(description="Writes the distillation benchmark's results.")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    parser.add_argument("--partial", action="store_true", help="print what there is; write nothing")
    options = parser.parse_args(arguments)
    rows = journal(options.work.absolute())
    wanted = {(s.name, seed, row) for s in SETTINGS.values() for seed in s.seeds for row in rows_of(s)}
    rows = [one for one in rows if (one["setting"], one["seed"], one["row"]) in wanted]
    missing = wanted - {(one["setting"], one["seed"], one["row"]) for one in rows}
    if missing and not options.partial:
        raise SystemExit(f"{len(missing)} of {len(wanted)} rows are missing; `run` goes on with them")
    values = guarded(rows)
    names = list(dict.fromkeys(row for s in SETTINGS.values() for row in rows_of(s)))
    table = []
    for row in names:
        cells: dict[str, Any] = {"row": TITLES.get(row, row.replace("_", " "))}
        for setting in SETTINGS:
            accuracies = [100 * value for value in values[setting, row].values()]
            if accuracies:
                spread = f" ± {statistics.stdev(accuracies):.1f}" if len(accuracies) > 1 else ""
                cells[setting] = f"{statistics.fmean(accuracies):.1f}{spread}"
        table.append(cells)
    if options.partial:
        for cells in table:
            print(" | ".join(str(cells.get(key, "")).ljust(34 if key == "row" else 12) for key in ("row", *SETTINGS)))
        print(f"{len(wanted) - len(missing)} of {len(wanted)} rows")
        return
    goals = judged(values)
    columns = {"row": "taught by"} | {name: name for name in SETTINGS}
    note = (
        "Test accuracy in %, mean ± std of 3 seeds of splits and trainings, last epoch. All rows of a setting and seed "
        "share images, labels, net, loop and augmentation. Where teachers look at every step the ImageNet net is left "
        "out; AKA, hints, attention, common features, B-Tuning and relations need that, or nets in between, and ran on "
        "two of the tasks with labels alone. "
        'Rows called "itself" are teachers, without a student.'
    )
    write("distill", table, goals, columns, note)
    plot(values, RESULTS / "distill.png")
    for one in goals:
        print(f"{'met   ' if one['met'] else 'missed'} {one['name']}: {one['value']:.2f} {one['unit']}")


def plot(values: Values, path: Path) -> None:
    """Draw every row of the labelled settings as its difference to no teacher."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(LABELLED), 5.5), layout="constrained")
    axes = figure.subplots(1, len(LABELLED), sharey=True)
    names = [row for row in rows_of(SETTINGS[LABELLED[0]]) if row not in (*NO_STUDENT, "together", "no_teacher")]
    for axis, setting in zip(axes, LABELLED, strict=True):
        for place, row in enumerate(names):
            gap, error = lead(values[setting, row], values[setting, "no_teacher"])
            colour = "tab:blue" if row in METHODS else "tab:grey"
            axis.errorbar(gap, place, xerr=0 if math.isnan(error) else error, fmt="o", color=colour)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=setting, xlabel="points over no teacher")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)
