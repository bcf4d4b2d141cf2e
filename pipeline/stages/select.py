"""Stage select: which teachers together help most on the validation images, or that none does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.stages.artefacts import digest_of, write_json
from pipeline.stages.assess import carried, rows_of
from pipeline.stages.base import Outcome, Run
from pipeline.stages.ingest import table_path


class Select:
    """Assessment → `faculty.json`: who was chosen, in which order and why, and the coverage of the classes."""

    name = "select"
    version = 1
    needs = ("ingest", "assess")

    def inputs(self, run: Run) -> Mapping[str, Any]:
        """Depend on the settings."""
        return {"select": run.settings.select.model_dump(mode="json")}

    def run(self, run: Run, folder: Path) -> Outcome:
        """Choose greedily by marginal gain."""
        from pipeline.assessment.selection import select_set
        from pipeline.data.table import ImageTable

        settings, table = run.settings.select, ImageTable.open(str(table_path(run)))
        rows = {row["teacher"]: row for row in rows_of(run)}
        usable = [name for name, row in rows.items() if row["error"] is None]
        validation = {name: carried(run, name, "validation") for name in usable}
        found = select_set(
            validation,
            table.split("validation").labels,
            gains={name: rows[name]["bridge_gain"] for name in usable},
            parameters={name: rows[name]["parameters"] for name in usable},
            max_teachers=settings.max_teachers,
            max_params=settings.max_params,
            min_gain=settings.min_gain,
            confidence=settings.confidence,
            seed=run.settings.seed,
        )
        choice: dict[str, Any] = {}
        write_json(folder / "faculty.json", choice)
        run.tracker.artifact(folder / "faculty.json")
        return Outcome(digest=digest_of([choice["chosen"], choice["best_single"]]), summary={})
