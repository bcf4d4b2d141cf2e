"""What the project claims, a row each: what was measured, against what, and whether its goals were met."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Form = Callable[[Sequence[dict[str, Any]]], str]
_SCALE = {"accuracy": 100, "points": 1}  # to percentage points


def _range(values: Sequence[float], digits: Callable[[float], str]) -> str:
    low, high = digits(min(values)), digits(max(values))
    return low if low == high else f"{low} to {high}"


def _plain(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def _signed(value: float) -> str:
    return "0" if value == 0 else f"{value:+.1f}"


def times(goals: Sequence[dict[str, Any]]) -> str:
    return (
        f"{_range([one['value'] for one in goals], lambda value: f'{value:.2f}' if value < 10 else f'{value:.0f}')} x"
    )


def share(goals: Sequence[dict[str, Any]]) -> str:
    return f"{_range([100 * one['value'] for one in goals], lambda value: f'{value:.0f}')} %"


def points(goals: Sequence[dict[str, Any]]) -> str:
    return f"{_range([_SCALE[one['unit']] * one['value'] for one in goals], _signed)} points"


def short(goals: Sequence[dict[str, Any]]) -> str:
    return f"{_range([_SCALE[one['unit']] * one['value'] for one in goals], _plain)} points"


def lead(goals: Sequence[dict[str, Any]]) -> str:
    return (
        f"{_range([one['value'] for one in goals], lambda value: f'{value:+.3f}' if value else '0')} {goals[0]['unit']}"
    )


def number(goals: Sequence[dict[str, Any]]) -> str:
    unit = "" if goals[0]["unit"] == "ratio" else goals[0]["unit"]
    return f"{_range([one['value'] for one in goals], _plain)} {unit}".strip()


def met_of(goals: Sequence[dict[str, Any]]) -> str:
    return f"{sum(one['met'] for one in goals)} of {len(goals)}"


@dataclass(frozen=True)
class Claim:
    """A row: the goals of one benchmark that have to do with each other.

    Attributes
    ----------
    benchmark : str
        Name of its file.
    what, against : str
    goals : str
        Pattern of the names of the goals that decide.
    form : callable
        Words what was measured.
    shown : str
        Pattern of those whose values are shown, where it is not all of them.
    main : bool
        Whether the README shows it when its goals are met, too.
    """

    benchmark: str
    what: str
    against: str
    goals: str
    form: Form
    shown: str = ""
    main: bool = True


CLAIMS = (
    Claim("demo", "student taught by the chosen set, five splits", "no teacher", "minus no teacher", points,
          "teacher$"),
    Claim("demo", "student taught by the chosen set, five splits", "the best single teacher", "minus the best single",
          points, "teacher$"),
    Claim("distill", "default ahead by two standard errors, tasks", "every control and baseline", "default ahead",
          met_of),
    Claim("distill", "default, no labels, teachers of half the classes each",
          "best teacher, averaged teachers, concatenated logits", "^halves: faculty", points),
    Claim("distill", "AKA, no labels, teachers of half the classes each",
          "best teacher, averaged teachers, concatenated logits", "^halves: aka", points),
    Claim("distill", "AKA, no labels, two sub-tasks", "best teacher, averaged teachers, concatenated logits",
          "^multitask: aka", points),
    Claim("distill", "knowledge flow in the lead, tasks", "fine-tuning and KD", "knowledge flow", number),
    Claim("distill", "chosen set in the lead, share of the draws", "a random set of its size", "chosen set", share),
    Claim("distill", "irrelevant teachers forced on a task, at worst", "no teacher", "irrelevant", points),
    Claim("ranking", "teachers ranked by the combined score, mean weighted τ", "the best published score", "mean τ",
          lead),
    Claim("ranking", "regret of the teacher that the combined score puts first", "the least regret of the others",
          "mean regret", points, main=False),
    Claim("ranking", "transport gain ranks better, tasks and draws", "raw transport cost", "transport gain", number,
          main=False),
    Claim("assess", "time to assess 32 teachers, warm", "their bare forward passes", "bare forward passes", times),
    Claim("assess", "search among 200 teachers, forward passes", "all images by all", "share of the forward", share),
    Claim("assess", "search among 200 teachers, accuracy of the chosen one short of", "the best of the 200",
          "short of the best", short),
    Claim("assess", "open a catalogue of 100,000 teachers", "", "catalogue", number, main=False),
    Claim("transport", "speed of the transport loss, 128 samples of 1,000 against 100 classes",
          "POT's `ot.solve_batch` (its other solvers are nearer)", "solve_batch|the same", times),
    Claim("transport", "memory of the transport loss, 21,841 against 1,000 classes", "", "extra memory", number),
    Claim("transport", "relative error of the converged cost", "`ot.sinkhorn2`", "relative error", number, main=False),
    Claim("training", "images a second taught by 1 or 4 cached teachers", "torchdistill, which runs them",
          "cached, KD to their average, of torchdistill", times),
    Claim("training", "images a second taught by 1 or 4 live teachers", "torchdistill", "live, of torchdistill", times),
    Claim("training", "images a second without teachers", "a bare torch loop", "no teacher, of the bare", times),
    Claim("training", "images a second taught by 8 cached teachers", "the bare loop without any",
          "8 teachers cached.*of the bare", times),
    Claim("training", "speed of filling the cache", "bare forward passes", "cache filled", times, main=False),
    Claim("training", "memory of a training by 8 cached teachers", "by one", "memory", times, main=False),
    Claim("scaling", "images a second of two processes that train together", "twice one alone", "efficiency of two",
          times),
    Claim("scaling", "images a second of two processes that train together", "two that train side by side",
          "of two side by side", times),
    Claim("scaling", "work of the busiest of four simulated nodes", "an even share", "nodes|busiest", times, "busiest",
          main=False),
    Claim("eta", "time left on a progress bar, how far off from its first tenth on", "the time that it took",
          "time left", share, main=False),
    Claim("plan", "planned seconds of a stage off by, first run on a machine", "what it took",
          "^calibrated, first run: .*seconds", share),
    Claim("plan", "planned seconds of a stage off by, later runs on it", "what it took",
          "^calibrated, runs before: .*seconds", share),
    Claim("plan", "planned seconds of a stage off by, another run of the folder", "what it took",
          "^recorded: .*seconds", share),
    Claim("plan", "planned memory of a teacher's process off by", "what it took", "memory", share),
)  # fmt: skip


def found(results: Path) -> Iterator[tuple[Claim, list[dict[str, Any]]]]:
    """Yield each claim that was measured, with its goals; a goal that is part of none stands for itself."""
    for name in dict.fromkeys(claim.benchmark for claim in CLAIMS):
        path = results / f"{name}.json"
        goals = json.loads(path.read_text(encoding="utf-8"))["goals"] if path.exists() else []
        claims = [claim for claim in CLAIMS if claim.benchmark == name]
        for claim in claims:
            own = [one for one in goals if re.search(claim.goals, one["name"])]
            if own:
                yield claim, own
        for one in goals:
            if not any(re.search(claim.goals, one["name"]) for claim in claims):
                yield Claim(name, one["name"], "", re.escape(one["name"]), number), [one]


def table(results: Path, *, everything: bool) -> str:
    """Return a row for each claim; without `everything` the main ones, and every one with a goal that was missed."""
    lines = ["| what | measured | against | goal | |", "|---|---|---|---|---|"]
    for claim, goals in found(results):
        missed = sum(not one["met"] for one in goals)
        if not (everything or claim.main or missed):
            continue
        shown = [one for one in goals if re.search(claim.shown, one["name"])]
        of = f" in {missed} of {len(goals)}" if len(goals) > 1 else ""
        outcome = f"**missed**{of}" if missed else "met"
        cells = [claim.what, claim.form(shown), claim.against, _wanted(shown, claim.form), outcome]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _wanted(goals: Sequence[dict[str, Any]], form: Form) -> str:
    signs = {"≤" if one["at_most"] else "≥" for one in goals}
    if form is met_of:
        return "all"
    targets = [one | {"value": one["target"]} for one in goals]
    return f"{' '.join(sorted(signs))} {form(targets)}"


def goals_told(goals: Sequence[dict[str, Any]]) -> str:
    """Return what became of a benchmark's goals: how many were met, and each that was missed."""
    missed = [one for one in goals if not one["met"]]
    if not goals:
        return "No goal was set."
    if not missed:
        return f"Goals: all {len(goals)} met." if len(goals) > 1 else "Goals: the one that was set is met."
    lines = [f"Goals: {len(goals) - len(missed)} of {len(goals)} met. Missed:", ""]
    for one in missed:
        sign, unit = "≤" if one["at_most"] else "≥", f" {one['unit']}" if one["unit"] not in ("", "ratio") else ""
        value, target = (_plain(one[key]) for key in ("value", "target"))
        lines.append(f"- {one['name']}: {value}{unit}, wanted {sign} {target}")
    return "\n".join(lines)
