"""Stage select: which teachers together help most on the validation images, or that none does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.stages.artefacts import digest_of, write_json
from pipeline.stages.assess import carried, rows_of
from pipeline.stages.base import Outcome, Run
from pipeline.stages.ingest import table_path

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.assessment.selection import Selection, Verdict
    from pipeline.data.table import ImageTable


class Select:
    """Assessment → `faculty.json`: who was chosen, in which order and why, and how well the set knows each class."""

    name = "select"
    version = 1
    needs = ("ingest", "assess")

    def inputs(self, run: Run) -> Mapping[str, Any]:
        """Depend on the settings, and the seed of the resamples."""
        return {"select": run.settings.select.model_dump(mode="json"), "seed": run.settings.seed}

    def run(self, run: Run, folder: Path) -> Outcome:
        """Choose greedily by marginal gain; the set must beat what the pixels alone say."""
        from pipeline.assessment.selection import select_set
        from pipeline.data.table import ImageTable

        settings, table = run.settings.select, ImageTable.open(str(table_path(run)))
        rows = {row["teacher"]: row for row in rows_of(run)}
        usable = [name for name, row in rows.items() if row["error"] is None]
        found = select_set(
            {name: carried(run, name, "validation") for name in usable},
            table.split("validation").labels,
            reference=_without_teacher(table),
            gains={name: rows[name]["bridge_gain"] for name in usable},
            parameters={name: rows[name]["parameters"] for name in usable},
            max_teachers=settings.max_teachers,
            max_params=settings.max_params,
            min_gain=settings.min_gain,
            confidence=settings.confidence,
            seed=run.settings.seed,
        )
        choice = _describe(found, table.classes)
        choice["reasons"] |= {name: f"failed: {row['error']}" for name, row in rows.items() if row["error"]}
        write_json(folder / "faculty.json", choice)
        run.tracker.artifact(folder / "faculty.json")
        run.tracker.tags({"chosen": ", ".join(found.chosen) or "none"})
        summary = {key: choice[key] for key in ("chosen", "score", "reference_score", "confidence")}
        return Outcome(digest=digest_of([choice["chosen"], choice["best_single"]]), summary=summary)


def _without_teacher(table: ImageTable) -> Tensor:
    """Return what the images alone say of the validation images: class centres of whitened pixels."""
    from pipeline.transport.bridge import fit_bridge, pixel_features

    labelled, validation = table.split("train_labelled"), table.split("validation")
    bridge = fit_bridge(
        "centres",
        logits=None,
        features=pixel_features(labelled.images()),
        labels=labelled.labels,
        num_classes=len(table.classes),
    )
    return bridge.carry(bridge.distribution(None, pixel_features(validation.images())))


def _describe(found: Selection, classes: tuple[str, ...]) -> dict[str, Any]:
    order = {name: number for number, name in enumerate(found.chosen)}
    coverage = {name: value for name, value in zip(classes, found.coverage.tolist(), strict=True) if value == value}
    verdict = (
        f"{len(found.chosen)} teachers: validation score {found.score:.3f} against {found.reference_score:.3f} "
        f"without a teacher, confidence {found.confidence:.2f}"
        if found.chosen
        else "no set of teachers is better on the validation images than the images alone "
        f"(score {found.reference_score:.3f})"
    )
    return {
        "chosen": list(found.chosen),
        "best_single": found.best_single,
        "verdict": verdict,
        "score": found.score,
        "reference_score": found.reference_score,
        "confidence": found.confidence,
        "reasons": {name: _reason(order.get(name), one) for name, one in found.verdicts.items()},
        "verdicts": {
            name: {"reason": one.reason, "score": one.score, "gain": one.gain, "confidence": one.confidence}
            for name, one in found.verdicts.items()
        },
        "coverage": coverage,
        "shares": found.shares,
    }


def _reason(place: int | None, verdict: Verdict) -> str:
    gain = f"{verdict.gain:+.3f} ({verdict.confidence:.0%} sure)"
    return f"{place + 1}. choice, {gain}" if place is not None else f"{verdict.reason}, {gain}"
