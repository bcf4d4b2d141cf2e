"""Stage assess: every teacher of the zoo scored on the task's probe, one trial a teacher."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import AssessSettings, TrialResources
from pipeline.errors import FacultyError, StageError
from pipeline.models.spec import TeacherSpec
from pipeline.stages.artefacts import digest_of, write_json
from pipeline.stages.base import Outcome, Run
from pipeline.stages.ingest import table_path

if TYPE_CHECKING:
    from pipeline.models.teacher import Teacher

SCORES = ("transport_cost", "transport_gain", "bridge_gain", "knn", "leep")


@dataclass(frozen=True)
class TeacherJob:
    """What travels to a worker that runs a teacher over images: references, never weights.

    Attributes
    ----------
    teacher : TeacherSpec
    table : str
        The image table.
    folder : str
        Where the result goes.
    trusted_factories : tuple of str
    tracking_uri : str or None
        Where teachers from an MLflow registry are.
    gpu : bool
        Whether it has a GPU, or a share of one.
    """

    teacher: TeacherSpec
    table: str
    folder: str
    trusted_factories: tuple[str, ...]
    tracking_uri: str | None
    gpu: bool

    @classmethod
    def of(cls, run: Run, name: str, folder: Path, resources: TrialResources) -> TeacherJob:
        """Describe the job of one teacher of the run's zoo."""
        return cls(
            teacher=run.zoo[name],
            table=str(table_path(run)),
            folder=str(folder),
            trusted_factories=run.settings.zoo.trusted_factories,
            tracking_uri=run.tracking_uri,
            gpu=resources.gpus > 0,
        )

    def load(self) -> Teacher:
        """Load the teacher; on the worker."""
        import torch

        from pipeline.models.sources import load_teacher

        def from_mlflow(uri: str) -> Any:
            from pipeline.tracking.resolve import load_mlflow_module

            return load_mlflow_module(uri, self.tracking_uri)

        return load_teacher(
            self.teacher,
            device="cuda" if self.gpu and torch.cuda.is_available() else "cpu",
            trusted_factories=self.trusted_factories,
            resolvers={"mlflow": from_mlflow},
        )

    def save(self, name: str, tensors: dict[str, Any]) -> None:
        """Write the result, whole or not at all; on the worker."""
        from safetensors.torch import save_file

        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f".{name}")
        (folder / f".{name}").replace(folder / name)


class Assess:
    """Zoo and table → `assessment.parquet`, and per teacher its bridge and what it says of the labelled images."""

    name = "assess"
    version = 1
    needs = ("ingest",)

    def inputs(self, run: Run) -> Mapping[str, Any]:
        """Depend on the settings and on every teacher's spec and weights."""
        return {
            "assess": run.settings.assess.model_dump(mode="json", exclude={"resources"}),
            "teachers": {name: run.fingerprint(name) for name in run.zoo.names},
            "trusted_factories": list(run.settings.zoo.trusted_factories),
        }

    def run(self, run: Run, folder: Path) -> Outcome:
        """Assess what has not been assessed; keep a teacher that fails as a row with its error."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        homes = {name: teacher_folder(run, name) for name in run.zoo.names}
        rows = {name: row for name, home in homes.items() if (row := read_row(home)) is not None}
        missing = [name for name in run.zoo.names if name not in rows]
        passing: list[str] = []
        if missing:
            found, passing = self._assess(run, missing, homes)
            rows |= found
        ordered = sorted(
            rows.values(), key=lambda row: (row["bridge_gain"] is None, -(row["bridge_gain"] or 0), row["teacher"])
        )
        path = folder / "assessment.parquet"
        pq.write_table(pa.Table.from_pylist(ordered, schema=_schema()), path)
        run.tracker.artifact(path)
        run.tracker.table("assessment", ordered)
        failed = [row for row in ordered if row["error"]]
        if len(failed) == len(ordered):
            reasons = "; ".join(f"{row['teacher']}: {row['error']}" for row in failed[:3])
            raise StageError(f"assess: none of the {len(ordered)} teachers could be assessed ({reasons})")
        results = [{key: row[key] for key in ("teacher", "fingerprint", "error", *SCORES)} for row in ordered]
        return Outcome(
            digest=digest_of(results),
            summary={"teachers": len(ordered), "failed": len(failed), "assessed_now": len(missing)},
            again=f"{', '.join(passing)} failed in a way that may pass" if passing else "",
        )

    def _assess(
        self, run: Run, names: list[str], homes: dict[str, Path]
    ) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """Return the rows, and the teachers that failed for another reason than themselves (memory, a lost process)."""
        from pipeline.cluster.trials import TrialItem, run_trials

        settings = run.settings.assess
        rows: dict[str, dict[str, Any]] = {}
        passing: list[str] = []
        items = [
            TrialItem(name, (TeacherJob.of(run, name, homes[name], settings.resources), settings)) for name in names
        ]
        run.open_cluster()
        with run.display.bar("teachers", len(names)) as advance:

            def keep(name: str, result: dict[str, Any]) -> None:
                row = _row(run, name, result)
                if row["error"] is None:
                    write_json(homes[name] / "row.json", row)
                elif result.get("error_type") not in ("TeacherError", "ConfigError", "DataError", "ValueError"):
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
                verbose=run.verbose,
            )
        return rows, passing


def teacher_folder(run: Run, name: str) -> Path:
    """Return where a teacher's assessment is kept: keyed by the teacher, the table and the settings."""
    return run.part(
        "teachers",
        name,
        {
            "teacher": run.fingerprint(name),
            "table": run.records["ingest"].digest,
            "assess": run.settings.assess.model_dump(mode="json", exclude={"resources"}),
            "version": Assess.version,
        },
    )


def read_row(folder: Path) -> dict[str, Any] | None:
    """Return the row of an assessed teacher, or None."""
    try:
        return json.loads((folder / "row.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def assess_teacher(payload: tuple[TeacherJob, AssessSettings]) -> dict[str, Any]:
    """Score one teacher; runs on a worker.

    The bridge is fitted on the labelled training images, the scores are taken on the probe, and what the teacher says
    of probe and validation images, carried to the task's classes, is stored for the choice of the set.
    """
    from pipeline.assessment.scores import knn, leep
    from pipeline.data.table import ImageTable
    from pipeline.models.teacher import predict
    from pipeline.transport.bridge import fit_bridge
    from pipeline.transport.cost import transport_cost, transport_gain

    job, settings = payload
    teacher, table = job.load(), ImageTable.open(job.table)
    splits = {name: table.split(name) for name in ("train_labelled", "probe", "validation")}
    outputs = {name: predict(teacher, split.batches(settings.batch_size)) for name, split in splits.items()}
    fitted, probe, labels = outputs["train_labelled"], outputs["probe"], splits["probe"].labels

    def bridge_of(kind: Any, temperature: float | None) -> Any:
        return fit_bridge(
            kind,
            logits=fitted.logits,
            features=fitted.features,
            labels=splits["train_labelled"].labels,
            num_classes=len(table.classes),
            classifier_weight=teacher.classifier_weight,
            temperature=temperature,
        )

    bridge = bridge_of(settings.bridge.kind, settings.bridge.temperature)
    row: dict[str, Any] = {
        "classes": len(teacher.classes),
        "parameters": teacher.num_parameters,
        "bridge_gain": transport_gain(bridge.distribution(probe.logits, probe.features), labels, bridge.M),
        "knn": knn(probe.features, labels, k=settings.neighbours),
        "leep": leep(probe.logits.softmax(1), labels),
    }
    if teacher.classifier_weight is not None:
        prototype = bridge_of("prototype", None)
        p = prototype.distribution(probe.logits, probe.features)
        row["transport_cost"] = float(transport_cost(p, labels, prototype.M).mean())
        row["transport_gain"] = transport_gain(p, labels, prototype.M)
    tensors = {f"bridge.{name}": value for name, value in bridge.state().items()}
    for name in ("probe", "validation"):
        p = bridge.distribution(outputs[name].logits, outputs[name].features)
        tensors[name] = bridge.carry(p)
    job.save("bridge.safetensors", tensors)
    return row


def load_bridge(folder: Path) -> Any:
    """Return the bridge of an assessed teacher, see `pipeline.transport.bridge`."""
    from safetensors.torch import load_file

    from pipeline.transport.bridge import Bridge

    tensors = load_file(folder / "bridge.safetensors")
    return Bridge.from_state({name[7:]: value for name, value in tensors.items() if name.startswith("bridge.")})


def carried(run: Run, name: str, split: str) -> Any:
    """Return what an assessed teacher says of a labelled split, carried to the task's classes: (N, C_s) tensor."""
    from safetensors.torch import load_file

    return load_file(teacher_folder(run, name) / "bridge.safetensors")[split]


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            ("teacher", pa.string()),
            ("fingerprint", pa.string()),
            ("classes", pa.int32()),
            ("parameters", pa.int64()),
            *((score, pa.float64()) for score in SCORES),
            ("seconds", pa.float64()),
            ("peak_mb", pa.float64()),
            ("error", pa.string()),
        ]
    )


def _row(run: Run, name: str, result: dict[str, Any]) -> dict[str, Any]:
    row = {field: result.get(field) for field in _schema().names}
    return row | {"teacher": name, "fingerprint": run.fingerprint(name)}


def _track(run: Run, row: dict[str, Any]) -> None:
    spec = run.zoo[row["teacher"]]
    with run.tracker.run(
        f"teacher {row['teacher']}",
        key=f"assess-{row['teacher']}-{row['fingerprint'][:12]}",
        tags={"teacher": row["teacher"], "fingerprint": row["fingerprint"], "licence": spec.licence},
        params={"teacher": row["teacher"], "source": spec.source.type, "parameters": row["parameters"]},
    ) as tracker:
        numbers = {key: row[key] for key in (*SCORES, "seconds", "peak_mb") if row[key] is not None}
        tracker.metrics(numbers)
        if row["error"]:
            tracker.tags({"error": row["error"]})


def rows_of(run: Run) -> list[dict[str, Any]]:
    """Return the rows of the finished assessment, best first."""
    import pyarrow.parquet as pq

    try:
        return pq.read_table(run.folder("assess") / "assessment.parquet").to_pylist()
    except OSError as error:
        raise FacultyError(f"assess: its table can't be read ({error}); delete its folder and run again") from None
