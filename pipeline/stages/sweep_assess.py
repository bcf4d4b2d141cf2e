"""Trials of a sweep that train nothing: teachers are judged by what is kept of them, and nobody is run."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.data.mirror import here
from pipeline.engine.checkpoint import plain
from pipeline.errors import FacultyError
from pipeline.stages.amalgamate import chosen
from pipeline.stages.artefacts import write_json
from pipeline.stages.assess import Assess, payload_of, row_of
from pipeline.stages.base import Run
from pipeline.stages.probe import ProbePayload, build_probe
from pipeline.stages.recording_teachers import TeacherRuns
from pipeline.stages.rungs import assess_rung
from pipeline.stages.teachers import carried, has_labels, outputs_folder, table_of

_OUTPUTS = "outputs.safetensors"
_TINY = 1e-12  # below what half precision keeps of a probability


def all_said(run: Run) -> bool:
    """Return whether it is known what each teacher says of the labelled images, but for those that failed.

    Settings of the assessment change nothing of it. Under a search by rungs it is known of as many images as the
    teacher was run over; one that would climb higher under other settings is run over the others.
    """
    names = [name for name in run.zoo.names if _said(run, name)]
    former = run.files.newest("assess")
    return bool(names) and former is not None and len(names) >= former.summary["teachers"] - former.summary["failed"]


def _said(run: Run, name: str) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(here(outputs_folder(run, name) / _OUTPUTS), "pt") as handle:
            return "rows" in handle.keys()
    except (OSError, SafetensorError):
        return False


class CachedAssess(Assess):
    """The stage assess in this process, for teachers that have said all that is asked: no cluster, no forward pass."""

    def _assess(
        self,
        run: Run,
        names: list[str],
        homes: dict[str, Path],
        climbing: tuple[int, ...],
        search: str,
        runs: TeacherRuns,
        complete: Callable[[dict[str, Any]], None],
    ) -> tuple[dict[str, dict[str, Any]], list[str]]:
        from pipeline.assessment.halving import Standing

        settings = run.settings.assess
        payloads = {name: payload_of(run, name, homes[name], climbing) for name in names}
        probe = build_probe(run, rungs=settings.search.rungs if climbing else (1.0,))
        rows: dict[str, dict[str, Any]] = {}
        found: dict[str, dict[str, Any]] = {}
        waiting, standing = [(name, 0) for name in names], Standing(len(names), climbing)
        with run.display.bar("teachers", len(names)) as advance:

            def keep(name: str, result: dict[str, Any]) -> None:
                rung = None if "error" in result else result["rung"] + 1
                rows[name] = row = row_of(run, name, result | {"rung": rung})
                if row["error"] is None:
                    write_json(homes[name] / "row.json", row | {"search": search})
                complete(row)
                if has_labels(run):
                    runs.record(row)
                advance(1, name)

            while waiting:
                name, rung = waiting.pop(0)
                result = _judge(run, name, payloads[name], rung, probe)
                result["seconds"] += found.get(name, {}).get("seconds", 0.0)
                found[name] = result
                if "error" in result or rung == len(climbing):
                    keep(name, result)
                    standing.leave(name)
                else:
                    standing.enter(name, rung, result["score"])
                for decision in standing.settle():
                    if decision.climbs:
                        waiting.append((decision.name, found[decision.name]["rung"] + 1))
                    else:
                        keep(decision.name, found[decision.name] | {"dropped": decision.reason})
        return rows, []


def _judge(run: Run, name: str, payload: ProbePayload, rung: int, probe: dict[str, Any]) -> dict[str, Any]:
    began = time.perf_counter()
    result: dict[str, Any]
    if _said(run, name):
        try:
            result = plain(assess_rung(payload, rung=rung, shared=probe))
        except (FacultyError, RuntimeError, ValueError, ArithmeticError) as error:
            result = {"error": " ".join(str(error).split())[:400], "error_type": type(error).__name__}
    else:
        result = {"error": "failed in the assessment before the sweep", "error_type": "TeacherError"}
    return result | {"rung": rung, "seconds": time.perf_counter() - began}


def faculty_scores(run: Run) -> dict[str, float]:
    """Return what the chosen teachers are worth, without a student; empty where none was chosen.

    ``faculty_accuracy`` and ``faculty_nll`` are of p̄(y|x) = mean over teachers of what each says of a validation image,
    carried to the task's classes by its bridge (which was fitted on other images). ``faculty_score`` is the set's own,
    see `pipeline.assessment.selection`.
    """
    import torch

    choice = chosen(run)
    names = choice["chosen"]
    if not names:
        return {}
    labels = table_of(run).split("validation").labels
    mean = torch.stack([carried(run, name, "validation").double() for name in names]).mean(0)
    mean = mean / mean.sum(1, keepdim=True)
    found = {
        "faculty_accuracy": float((mean.argmax(1) == labels).double().mean()),
        "faculty_nll": float(-mean[torch.arange(len(labels)), labels].clamp_min(_TINY).log().mean()),
        "faculty_size": float(len(names)),
    }
    if choice["score"] is not None:
        found["faculty_score"] = float(choice["score"])
    return found
