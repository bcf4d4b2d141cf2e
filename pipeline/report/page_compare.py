"""Several runs beside each other as one HTML file: verdicts, students in pairs, teachers, costs, settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.page import environment, shell
from pipeline.report.page_words import figure, headline, told

_MOST_CLASSES = 2000  # rows of the table by class
_MOST_TEACHERS = 1000
_NOT_TOLD = {"run_dir", "name"}  # settings that differ between any two runs


def render_comparison(facts: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]]) -> str:
    """Return the page that compares runs.

    Parameters
    ----------
    facts : sequence of mappings
        As `pipeline.stages.report.gather` finds them, a run each.
    pairs : sequence of mappings
        As `pipeline.stages.report_pairs.pairs` finds them: each but the first run against the first.
    """
    names = labels([one["head"]["name"] for one in facts])
    runs = [
        {
            "label": label,
            "head": one["head"],
            "parts": one["parts"] | {"verdict": told(one["parts"]["verdict"])},
            "headline": headline(told(one["parts"]["verdict"])),
            "figure": figure(told(one["parts"]["verdict"])),
            "pair": pair,
        }
        for label, one, pair in zip(names, facts, [None, *pairs], strict=True)
    ]
    parts = {
        "runs": runs,
        "differing": differing([_part(one, "settings").get("flat", {}) for one in facts]),
        "classes": by_class(facts),
        "teachers": by_teacher(facts),
        "stages": by_stage(facts),
        "same_images": len({_part(one, "lineage").get("data", {}).get("fingerprint") for one in facts}) == 1,
    }
    return environment().get_template("compare.html").render(title=" and ".join(names), **parts, **shell())


def labels(names: Sequence[str]) -> list[str]:
    """Return names that tell the runs apart: those that occur twice get a number."""
    found: list[str] = []
    for place, name in enumerate(names):
        again = names[:place].count(name)
        found.append(f"{name} ({again + 1})" if names.count(name) > 1 else name)
    return found


def differing(settings: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Return the settings that are not the same in all runs: path, and each run's value, None where it has none."""
    paths = dict.fromkeys(path for one in settings for path in one)
    rows = [{"path": path, "values": [one.get(path) for one in settings]} for path in paths if path not in _NOT_TOLD]
    return [row for row in rows if len(set(row["values"])) > 1]


def by_class(facts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the students' test accuracies by class, those that differ most first."""
    found = []
    for one in facts:
        rows = _part(one, "classes").get("rows", [])
        found.append({row["class"]: row.get("student") for row in rows})
    table = []
    for name in dict.fromkeys(name for one in found for name in one):
        values = [one.get(name) for one in found]
        known = [value for value in values if value is not None]
        if known:
            table.append({"class": name, "values": values, "range": max(known) - min(known)})
    return sorted(table, key=lambda row: -row["range"])[:_MOST_CLASSES]


def by_teacher(facts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return each teacher's rank and score in every run, and whether it was chosen there; the chosen ones first."""
    found = []
    for one in facts:
        rows = _part(one, "ranking").get("rows", [])
        found.append({row["teacher"]: row for row in rows})
    table = []
    for name in dict.fromkeys(name for one in found for name in one):
        cells = [
            None if row is None else {"rank": row["rank"], "score": row["score"], "place": row["place"]}
            for row in (one.get(name) for one in found)
        ]
        chosen = sum(cell is not None and cell["place"] is not None for cell in cells)
        ranks = [cell["rank"] for cell in cells if cell is not None]
        table.append({"teacher": name, "cells": cells, "chosen": chosen, "best": min(ranks)})
    return sorted(table, key=lambda row: (-row["chosen"], row["best"]))[:_MOST_TEACHERS]


def by_stage(facts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the seconds of every stage in every run, None where it did not run; the sums last."""
    found = [{row["stage"]: row["seconds"] for row in _part(one, "cost").get("stages", [])} for one in facts]
    names = dict.fromkeys(name for one in found for name in one)
    rows = [{"stage": name, "values": [one.get(name) for one in found]} for name in names]
    return [*rows, {"stage": "all stages", "values": [sum(one.values()) for one in found]}] if rows else []


def _part(facts: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = facts["parts"].get(name, {})
    return {} if "missing" in found else found
