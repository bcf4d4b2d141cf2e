"""Stage assess: the zoo's teachers scored on the task, one trial a teacher, most images for the most promising."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.mirror import share
from pipeline.errors import FacultyError, StageError
from pipeline.stages.artefacts import digest_of, write_json
from pipeline.stages.base import Outcome, Run
from pipeline.stages.class_level import accuracy_of, identity, thin
from pipeline.stages.outputs import CachedTeacher, tell_kept, tidy_cache
from pipeline.stages.own_scores import own_columns, own_needing_labels
from pipeline.stages.probe import ProbePayload, build_probe
from pipeline.stages.recording_data import record_datasets
from pipeline.stages.recording_teachers import TeacherRuns, record_assessment
from pipeline.stages.rungs import assess_rung
from pipeline.stages.teachers import (
    TeacherJob,
    carried,
    has_labels,
    kept,
    outputs_folder,
    scoring,
    table_of,
    teacher_folder,
)

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
_OWN = (
    "TeacherError",
    "ConfigError",
    "DataError",
    "ValueError",
    "RuntimeError",
    "_LinAlgError",
    "TypeError",
    "AttributeError",
    "IndexError",
    "KeyError",
    "NotImplementedError",
    "AssertionError",
)
_RECORDED = ("rungs", "trial_id")  # what is recorded of a teacher beside its row in the table
_MISMATCH = "sha256"  # a file that is not the one that the zoo names may be put right without the zoo being touched


class Assess:
    """Zoo and table → `assessment.parquet`, and per teacher its bridge and what it says of the labelled images."""

    name = "assess"
    version = 3
    needs = ("ingest",)

    def inputs(self, run: Run) -> Mapping[str, Any]:
        """Depend on the settings and on every teacher's spec and weights."""
        excluded: Any = {"resources": True, "names": {"path"}}  # the file counts by its content
        return {
            "assess": scoring(run, excluded) | identity(run),
            "teachers": {name: run.fingerprint(name) for name in run.zoo.names},
            "trusted_factories": list(run.settings.zoo.trusted_factories),
            "kept": kept(run),
        }

    def run(self, run: Run, folder: Path) -> Outcome:
        """Assess what has not been assessed; keep a teacher that fails, or is dropped on the way, as a row."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        names, class_level, dropped = thin(run)
        homes = {name: teacher_folder(run, name) for name in names}
        climbing = _climbing(run, len(names))
        run.files.pull("teachers/*/row.json")
        rows = {name: row for name, home in homes.items() if (row := read_row(home)) is not None}
        if climbing:
            # Teachers are judged against each other: a row counts if all took part in the same search. What they said
            # is kept apart, so that a search that was cut off, or that others have joined, costs no forward pass twice.
            taking_part = {name: run.fingerprint(name) for name in names}
            search = digest_of([taking_part, list(run.settings.assess.search.rungs), list(climbing)])
            if any(row.get("search") != search for row in rows.values()) or len(rows) < len(names):
                rows = {}
        else:
            search = ""
            rows = {name: row for name, row in rows.items() if row["dropped"] is None}
        missing = [name for name in names if name not in rows]
        passing: list[str] = []
        accuracy = accuracy_of(run) if "source_accuracy" in run.settings.assess.scores else None

        def complete(row: dict[str, Any]) -> None:
            row["class_level"] = class_level.get(row["teacher"])
            row["source_accuracy"] = None if accuracy is None else accuracy(row["teacher"])
            if row["dropped"] is None and row["error"] is None:
                row["rung"] = len(run.settings.assess.search.rungs)

        runs = TeacherRuns(run, folder)
        record_datasets(run, table_of(run), "probe" if has_labels(run) else "training")
        if missing:
            found, passing = self._assess(run, missing, homes, climbing, search, runs, complete)
            rows |= found
        rows |= {name: row_of(run, name, {"rung": 0, "dropped": reason}) for name, reason in dropped.items()}
        for row in rows.values():
            complete(row)
        if not has_labels(run):
            _add_agreement(run, rows)
        ordered = sorted(rows.values(), key=_place)
        pq.write_table(pa.Table.from_pylist(ordered, schema=schema(run)), folder / "assessment.parquet")
        columns = schema(run).names
        record_assessment(run, folder, [{name: row.get(name) for name in columns} for row in ordered])
        runs.record_others(ordered)
        runs.record_plans(ordered)
        failed = [row for row in ordered if row["error"]]
        if len(failed) == len(ordered):
            reasons = "; ".join(f"{row['teacher']}: {row['error']}" for row in failed[:3])
            raise StageError(f"assess: none of the {len(ordered)} teachers could be assessed ({reasons})")
        told = ("teacher", "fingerprint", "rung", "error", *SCORES, *own_columns(run.settings.assess))
        results = [{key: row[key] for key in told} for row in ordered]
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
        self,
        run: Run,
        names: list[str],
        homes: dict[str, Path],
        climbing: tuple[int, ...],
        search: str,
        runs: TeacherRuns,
        complete: Callable[[dict[str, Any]], None],
    ) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """Return the rows, and the teachers that failed for another reason than themselves (memory, a lost process)."""
        from pipeline.cluster.session import beside
        from pipeline.cluster.trials import TrialItem, run_trials

        settings = run.settings.assess
        rows: dict[str, dict[str, Any]] = {}
        passing: list[str] = []
        told: dict[str, dict[str, Any]] = {}
        items = [TrialItem(name, payload_of(run, name, homes[name], climbing)) for name in names]
        with run.display.working("reading the probe"):
            probe = build_probe(run, rungs=settings.search.rungs if climbing else (1.0,))
        run.open_cluster()
        began = time.perf_counter()
        resources = {"CPU": settings.resources.cpus, "GPU": settings.resources.gpus}
        at_once = beside(resources, len(names), settings.resources.max_concurrent)
        with run.display.bar("teachers", len(names), at_once=at_once) as advance:

            def keep(name: str, result: dict[str, Any]) -> None:
                row = row_of(run, name, result | {"rung": None if "error" in result else result.get("rung", 0) + 1})
                if row["error"] is None:
                    told[name] = {
                        "rows": row["images"] or 0,
                        "lost": row["top_k_loss"] or 0.0,
                        "note": result.get("note", ""),
                    }
                    write_json(homes[name] / "row.json", row | {"search": search})
                    share(homes[name] / "row.json")
                elif result.get("error_type") not in _OWN or _MISMATCH in row["error"]:
                    passing.append(name)
                complete(row)
                rows[name] = row
                if has_labels(run):  # without, how far it agrees with the others is still to come
                    runs.record(row)
                advance(1, name, took=result.get("worked"))

            run_trials(
                assess_rung,
                items,
                resources=resources,
                max_concurrent=settings.resources.max_concurrent,
                max_failures=settings.resources.max_failures,
                storage=run.files.storage,
                experiment="assess",
                on_result=keep,
                climbing=climbing,
                shared=probe,
                verbose=run.verbose,
            )
        run.timed.update(_starts(run, rows, at_once, time.perf_counter() - began))
        tell_kept(run, told.items())
        tidy_cache(run)
        return rows, passing


def _starts(run: Run, rows: Mapping[str, dict[str, Any]], at_once: int, seconds: float) -> dict[str, float]:
    """Return what starting took among the seconds of a search, see `Run.timed`; nothing of a cluster elsewhere."""
    took = [row["seconds"] for row in rows.values() if row["error"] is None and row["seconds"] is not None]
    peaks = [row["peak_mb"] for row in rows.values() if row["peak_mb"]]
    start = start_of(took, at_once, seconds)
    if start is None or not peaks or not run.settings.cluster.local:
        return {}
    return {"trials": start, "resident": min(peaks) * 2**20}


def start_of(took: Sequence[float], beside: int, seconds: float) -> float | None:
    """Return the seconds of a search that did not go into teachers; None where there are too few to tell.

    The first trial of each process imports what the next ones find there, so that the longest, as many as there are
    processes, count as one of the others does.

    Parameters
    ----------
    took : sequence of float
        By trials.
    beside : int
        Trials side by side.
    seconds : float
        From the first to the last.
    """
    usual = sorted(took)[: len(took) - beside]
    if beside < 1 or not usual:
        return None
    return max(seconds - sum(usual) / beside - usual[len(usual) // 2], 0.0)


def payload_of(run: Run, name: str, home: Path, climbing: tuple[int, ...]) -> ProbePayload:
    """Return what the assessment of a teacher gets; `climbing` as in `pipeline.cluster.trials.run_trials`."""
    settings = run.settings.assess
    return ProbePayload(
        TeacherJob.of(run, name, home, settings.resources),
        str(outputs_folder(run, name)),
        CachedTeacher.of(run, name),
        settings,
        last_rung=len(climbing),
    )


def _climbing(run: Run, candidates: int) -> tuple[int, ...]:
    """Return how many teachers go on from each rung; () where all of them see all images at once."""
    from pipeline.assessment.halving import survivors

    search = run.settings.assess.search
    found = survivors(candidates, rungs=len(search.rungs), eta=search.eta, least=search.least)
    return found if any(count < candidates for count in found) else ()


def read_row(folder: Path) -> dict[str, Any] | None:
    """Return the row of a teacher that has been assessed, with the search that it took part in; or None."""
    try:
        return json.loads((folder / "row.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def schema(run: Run) -> Any:
    """Return the columns of the assessment; the metadata of a score's column says whether it needed labels."""
    import pyarrow as pa

    from pipeline.assessment.probe import NEED_LABELS

    needing = set(NEED_LABELS) | ({"score", "score_low", "score_high"} if has_labels(run) else set())
    needing |= own_needing_labels(run.settings.assess)
    class_level = run.settings.assess.search.class_level
    if class_level is not None and class_level.cost == "reference":
        needing.add("class_level")

    def score(name: str) -> Any:
        return pa.field(name, pa.float64(), metadata={"needs_labels": str(name in needing).lower()})

    return pa.schema(
        [
            ("teacher", pa.string()),
            ("fingerprint", pa.string()),
            ("classes", pa.int32()),
            ("parameters", pa.int64()),
            ("rung", pa.int32()),
            ("images", pa.int64()),
            ("dropped", pa.string()),
            *map(score, (*SCORES, *own_columns(run.settings.assess))),
            ("precision", pa.string()),
            ("forward_seconds", pa.float64()),
            ("top_k_loss", pa.float64()),
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


def row_of(run: Run, name: str, result: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a teacher in the table, and what is recorded of it beside that."""
    row = {field: result.get(field) for field in (*schema(run).names, *_RECORDED)}
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


def rows_of(run: Run) -> list[dict[str, Any]]:
    """Return the rows of the finished assessment, best first."""
    import pyarrow.parquet as pq

    try:
        return pq.read_table(run.folder("assess") / "assessment.parquet").to_pylist()
    except OSError as error:
        raise FacultyError(f"assess: its table can't be read ({error}); delete its folder and run again") from None
