"""The report's first words: what came out, in a sentence, and the one number that stands for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.report.page_format import count, listed, number, percent


def told(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of a verdict; of one that could not be gathered those of a run of which nothing is known."""
    if "missing" not in verdict:
        return dict(verdict)
    return {"stages": [], "arms": [], "comparisons": [], "figure": None, "trouble": verdict["missing"]}


def headline(verdict: Mapping[str, Any]) -> str:
    """Return the verdict of a run in a sentence."""
    if verdict["figure"] is not None:
        return _tested(verdict)
    choice = verdict.get("choice")
    if "trouble" in verdict:
        return f"What came out is not known: {verdict['trouble']}."
    if verdict.get("sentence"):
        return "The student was not tested: the test split is empty."
    if choice is not None:
        names = choice["chosen"]
        if not names:
            return "No teacher helps with this task."
        trained = " No student has been tested yet." if "distill" in verdict["stages"] else ""
        return f"{listed(names)} {_are(names)} chosen to teach.{trained}"
    best = verdict.get("best")
    if best is not None:
        return f"{best['teacher']} knows most of this task; no set has been chosen yet."
    if "assessed" in verdict:
        return "No teacher could be assessed."
    return "The images are ready; no teacher has been assessed yet."


def _tested(verdict: Mapping[str, Any]) -> str:
    names = (verdict.get("choice") or {}).get("chosen") or []
    alone = verdict["comparisons"][0]
    if (verdict.get("guard") or {}).get("kept") == "no_teacher":
        return "The teachers did not help: the student that learnt from the labels alone was kept."
    if not names:
        return "No teacher helps with this task: the student learnt from the labels alone."
    by = f"Taught by {listed(names, 4)}, the student"
    outcome, gap = alone.get("outcome"), alone.get("difference")
    if gap is None:
        return f"{by} was not compared with one that had no teacher."
    told = f"{percent(abs(gap))} points"
    if outcome == "clear":
        return f"{by} is {told} better than one without teachers."
    if outcome == "clearly worse":
        return f"{by} is {told} worse than one without teachers."
    if outcome == "no interval":
        more = "more" if gap >= 0 else "fewer"
        return f"{by} has {told} {more} than one without teachers, by a single training of each."
    return f"{by} is not clearly better than one without teachers."


def figure(verdict: Mapping[str, Any]) -> dict[str, str]:
    """Return the number that stands for a run: ``value``, ``unit``, ``interval`` and ``what`` it is."""
    if verdict["figure"] is not None:
        own = verdict["figure"]
        half = (own["high"] - own["low"]) / 2
        return {
            "value": percent(own["mean"]),
            "unit": "%",
            "interval": f"± {percent(half)}",
            "what": f"test accuracy, ± two standard errors over {own['over']}",
        }
    choice, assessed = verdict.get("choice"), verdict.get("assessed")
    if choice is not None and assessed is not None:
        score = "" if choice["score"] is None else f"; score of the set {number(choice['score'])}"
        interval = choice.get("score_interval")
        told = f" ({number(interval[0])} to {number(interval[1])})" if interval else ""
        return {
            "value": count(len(choice["chosen"])),
            "unit": f"of {count(assessed['teachers'])}",
            "interval": "",
            "what": f"teachers chosen{score}{told}",
        }
    if assessed is not None:
        gone = assessed["failed"] + assessed["dropped"]
        rest = f", {count(gone)} of them not to the end" if gone else ""
        return {"value": count(assessed["teachers"]), "unit": "", "interval": "", "what": f"teachers assessed{rest}"}
    data = verdict.get("data") or {}
    return {"value": count(data.get("rows")), "unit": "", "interval": "", "what": "images"}


def _are(names: list[str]) -> str:
    return "was" if len(names) == 1 else "were"
