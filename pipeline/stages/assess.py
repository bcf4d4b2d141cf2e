"""Stage assess: the zoo's teachers scored on the task, one trial a teacher, most images for the most promising."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import FacultyError, StageError
from pipeline.stages.artefacts import digest_of, write_json
from pipeline.stages.base import Outcome, Run
from pipeline.stages.class_level import accuracy_of, thin
from pipeline.stages.probe import ProbePayload, assess_teacher, build_probe, has_labels
from pipeline.stages.teachers import TeacherJob, carried, outputs_folder, teacher_folder

SCORES = (
    "score",
    "score_low",
    "score_high",
    "transport_cost",
    "transport_gain",
    "bridge_gain",
    "knn",
    "leep",
    "nce",
    "logme",
    "h_score",
    "gbc",
    "otce",
    "source_accuracy",
    "num_parameters",
    "certainty",
    "information",
    "agreement",
    "class_level",
)
# An error of one of these types is the teacher's own, and comes again; others (memory, a lost process) may pass.
_OWN = ("TeacherError", "ConfigError", "DataError", "ValueError")
_MISMATCH = "sha256"  # a file that is not the one that the zoo names may be put right without the zoo being touched


class Assess:
    """Zoo and table → `assessment.parquet`, and per teacher its bridge and what it says of the labelled images."""

    name = "assess"
    version = 2
    needs = ("ingest",)

    def inputs(self, run: Run) -> Mapping[str, Any]:
        """Depend on the settings and on every teacher's spec and weights."""
        return {
            "assess": run.settings.assess.model_dump(mode="json", exclude={"resources"}),
            "teachers": {name: run.fingerprint(name) for name in run.zoo.names},
            "trusted_factories": list(run.settings.zoo.trusted_factories),
        }

    def run(self, run: Run, folder: Path) -> Outcome:
        """Assess what has not been assessed; keep a teacher that fails, or is dropped on the way, as a row."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        names, class_level, dropped = thin(run)
        homes = {name: teacher_folder(run, name) for name in names}
        rows = {name: _row(run, name, {"rung": 0, "dropped": reason}) for name, reason in dropped.items()}
        rows |= {name: row for name, home in homes.items() if (row := read_row(home)) is not None}
        missing = [name for name in names if name not in rows]
        passing: list[str] = []
        if missing:
            found, passing = self._assess(run, missing, len(names), homes)
            rows |= found
        for name, row in rows.items():
            row["class_level"] = class_level.get(name)
        if not has_labels(run):
            _add_agreement(run, rows)
        ordered = sorted(rows.values(), key=_place)
        path = folder / "assessment.parquet"
        pq.write_table(pa.Table.from_pylist(ordered, schema=schema()), path)
        run.tracker.artifact(path)
        run.tracker.table("assessment", ordered)
        failed = [row for row in ordered if row["error"]]
        if len(failed) == len(ordered):
            reasons = "; ".join(f"{row['teacher']}: {row['error']}" for row in failed[:3])
            raise StageError(f"assess: none of the {len(ordered)} teachers could be assessed ({reasons})")
        results = [{key: row[key] for key in ("teacher", "fingerprint", "rung", "error", *SCORES)} for row in ordered]
        return Outcome(
            digest=digest_of(results),
            summary={
                "teachers": len(ordered),
                "failed": len(failed),
                "dropped": sum(row["dropped"] is not None for row in ordered),
                "assessed_now": len(missing),
                "labels": has_labels(run),
            },
            again=f"{', '.join(passing)} failed in a way that may pass" if passing else "",
        )

    def _assess(
        self, run: Run, names: list[str], candidates: int, homes: dict[str, Path]
    ) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """Return the rows, and the teachers that failed for another reason than themselves (memory, a lost process)."""
        from pipeline.assessment.halving import survivors
        from pipeline.cluster.trials import TrialItem, run_trials

        settings = run.settings.assess
        rungs = len(settings.search.rungs)
        climbing = survivors(candidates, rungs=rungs, eta=settings.search.eta, least=settings.search.least)
        # Those assessed by a run that was cut off, or before a teacher was added, have taken their places.
        taken = candidates - len(names)
        climbing = tuple(max(count - taken, 1) for count in climbing)
        if all(count >= len(names) for count in climbing):  # nobody can be dropped: one rung is enough
            climbing = ()
        rows: dict[str, dict[str, Any]] = {}
        passing: list[str] = []
        accuracy = accuracy_of(run) if "source_accuracy" in settings.scores else lambda name: None
        items = [
            TrialItem(
                name,
                ProbePayload(
                    TeacherJob.of(run, name, homes[name], settings.resources),
                    str(outputs_folder(run, name)),
                    settings,
                    last_rung=len(climbing),
                    accuracy=accuracy(name),
                ),
            )
            for name in names
        ]
        with run.display.working("reading the probe"):
            probe = build_probe(run, rungs=settings.search.rungs if climbing else (1.0,))
        run.open_cluster()
        with run.display.bar("teachers", len(names)) as advance:

            def keep(name: str, result: dict[str, Any]) -> None:
                # Counted from 1; a teacher that saw all images is on the last one, also where the zoo was not thinned.
                rung = result.get("rung", 0) + 1 if "dropped" in result else rungs
                row = _row(run, name, result | {"rung": None if "error" in result else rung})
                if row["error"] is None and row["dropped"] is None:
                    write_json(homes[name] / "row.json", row)
                elif row["error"] is not None and (result.get("error_type") not in _OWN or _MISMATCH in row["error"]):
                    passing.append(name)
                rows[name] = row
                _track(run, row)
                advance(1, name)

            run_trials(
                assess_teacher,
                items,
                resources={"CPU": settings.resources.cpus, "GPU": settings.resources.gpus},
                max_concurrent=settings.resources.max_concurrent,
                max_failures=settings.resources.max_failures,
                storage=run.files.root / "ray",
                experiment="assess",
                on_result=keep,
                climbing=climbing,
                shared=probe,
                verbose=run.verbose,
            )
        return rows, passing


def read_row(folder: Path) -> dict[str, Any] | None:
    """Return the row of a teacher that was assessed to the last rung, or None."""
    try:
        return json.loads((folder / "row.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def schema() -> Any:
    """Return the columns of the assessment; the metadata of a score's column says whether it needed labels."""
    import pyarrow as pa

    from pipeline.assessment.probe import NEED_LABELS

    def score(name: str) -> Any:
        return pa.field(name, pa.float64(), metadata={"needs_labels": str(name in NEED_LABELS).lower()})

    return pa.schema(
        [
            ("teacher", pa.string()),
            ("fingerprint", pa.string()),
            ("classes", pa.int32()),
            ("parameters", pa.int64()),
            ("rung", pa.int32()),
            ("images", pa.int64()),
            ("dropped", pa.string()),
            *map(score, SCORES),
            ("precision", pa.string()),
            ("forward_seconds", pa.float64()),
            ("seconds", pa.float64()),
            ("peak_mb", pa.float64()),
            ("peak_gpu_mb", pa.float64()),
            ("error", pa.string()),
        ]
    )


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    """Order: by the rung reached, then by score; those that were not run come after them, failures last."""
    value = row["score"] if row["score"] is not None else row["class_level"]
    return (
        row["error"] is not None,
        -(row["rung"] or 0),
        -(value if value is not None else float("-inf")),
        row["teacher"],
    )


def _row(run: Run, name: str, result: dict[str, Any]) -> dict[str, Any]:
    row = {field: result.get(field) for field in schema().names}
    return row | {"teacher": name, "fingerprint": run.fingerprint(name)}


def _add_agreement(run: Run, rows: Mapping[str, dict[str, Any]]) -> None:
    """Add how far each teacher agrees with the others, which only all of them together tell."""
    import torch

    from pipeline.assessment.unlabelled import agreement

    names = [name for name, row in rows.items() if row["error"] is None and row["dropped"] is None]
    if names:
        found = agreement(torch.stack([carried(run, name, "unlabelled") for name in names]))
        for name, value in zip(names, found.tolist(), strict=True):
            rows[name]["agreement"] = value


def _track(run: Run, row: dict[str, Any]) -> None:
    spec = run.zoo[row["teacher"]]
    with run.tracker.run(
        f"teacher {row['teacher']}",
        key=f"assess-{row['teacher']}-{row['fingerprint'][:12]}",
        tags={"teacher": row["teacher"], "fingerprint": row["fingerprint"], "licence": spec.licence},
        params={"teacher": row["teacher"], "source": spec.source.type, "parameters": row["parameters"]},
    ) as tracker:
        numbers = {key: row[key] for key in (*SCORES, "rung", "seconds", "peak_mb") if row[key] is not None}
        tracker.metrics(numbers)
        tracker.tags({key: row[key] for key in ("dropped", "error") if row[key]})


def rows_of(run: Run) -> list[dict[str, Any]]:
    """Return the rows of the finished assessment, best first."""
    import pyarrow.parquet as pq

    try:
        return pq.read_table(run.folder("assess") / "assessment.parquet").to_pylist()
    except OSError as error:
        raise FacultyError(f"assess: its table can't be read ({error}); delete its folder and run again") from None
