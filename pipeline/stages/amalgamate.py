"""Stage amalgamate: what the chosen teachers say of every training image, as one or by shares; or component nets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.mirror import here
from pipeline.engine.spec import NOT_DECISIVE
from pipeline.stages.artefacts import digest_of, write_json
from pipeline.stages.assess import rows_of
from pipeline.stages.base import Outcome, Run
from pipeline.stages.probe import classes_of
from pipeline.stages.recording import optional
from pipeline.stages.recording_data import record_choices, record_datasets
from pipeline.stages.speaking import speak, spoken, views_seen
from pipeline.stages.teachers import load_bridge, table_of, teacher_folder
from pipeline.stages.together import TOGETHER, choice_of, said_together, speak_together

if TYPE_CHECKING:
    import torch

    from pipeline.amalgamation.ambiguity import Assignment
    from pipeline.data.table import ImageSplit
    from pipeline.engine.teaching import Speaker

NONE = "none"
_BINS = 20


class Amalgamate:
    """Faculty and table → `assignments.parquet` (image, teacher, ambiguity of each) and what the student is taught."""

    name = "amalgamate"
    version = 3
    needs = ("ingest", "assess", "select")

    def inputs(self, run: Run) -> Mapping[str, Any]:
        """Depend on how the teachers are put together; with component nets also on how these are trained."""
        settings = run.settings.amalgamate
        found: dict[str, Any] = {
            "amalgamate": settings.model_dump(mode="json", exclude={"resources", "batch_size", "components", "choice"}),
            "raw": needs_raw(run),
        } | views_seen(run)
        if settings.mode == "direct":
            found["choice"] = choice_of(run.settings)
        if settings.choice == "random" and settings.mode == "direct":
            found["seed"] = run.settings.seed
        if settings.mode == "components":
            distill, loop = run.settings.distill, set(NOT_DECISIVE)
            found |= {
                "components": settings.components.model_dump(mode="json", exclude={"loop": loop}),
                "distill": distill.model_dump(
                    mode="json", include={"student", "loop", "augment"}, exclude={"loop": loop}
                ),
                "seed": run.settings.seed,
                "subtasks": run.settings.task.subtasks,
            }
        return found

    def run(self, run: Run, folder: Path) -> Outcome:
        """Run the faculty over the training images; share them out."""
        names = chosen(run)["chosen"]
        if not names:
            return Outcome(digest=NONE, summary={"shares": {}})
        if run.settings.amalgamate.mode == "components":
            from pipeline.stages.components import amalgamate_components

            digest, summary = amalgamate_components(run, names, folder)
        else:
            digest = teach(run, names, folder)
            from pipeline.engine.teaching import Teaching

            summary = {"shares": Teaching.open(folder).shares()}
        with optional("the assignments"):
            run.tracker.artifact(folder / "assignments.parquet")
        record_datasets(run, table_of(run), "training")
        record_choices(run, folder)
        return Outcome(digest=digest, summary=summary)


def chosen(run: Run) -> dict[str, Any]:
    """Return what the stage select decided."""
    return json.loads((run.folder("select") / "faculty.json").read_text(encoding="utf-8"))


def wanted(run: Run) -> frozenset[str]:
    """Return what the student's objective needs of the teachers, see `pipeline.distillation.step.Objective`."""
    from pipeline.engine.objectives import wants

    return wants(run.settings.distill.objective)


def needs_raw(run: Run) -> bool:
    """Return whether the teachers' logits and features are to be kept beside what they say of the task."""
    return bool({"said.logits", "said.features", "labelled"} & wanted(run))


def teaching_of(run: Run) -> tuple[Path | None, str]:
    """Return where the faculty's say lies and its digest.

    (None, "") when no teacher was chosen, or the student's loss asks for none.
    """
    digest = run.records["amalgamate"].digest
    if digest == NONE or (not wanted(run) and run.settings.distill.flow is None):
        return None, ""
    return run.folder("amalgamate"), digest


def teaching_by(run: Run, kind: str, names: Sequence[str], **how: Any) -> tuple[Path, str]:
    """Let other teachers teach, or share the images otherwise, as a control; return folder and digest."""
    how["choice"] = how.get("choice") or choice_of(run.settings)
    raw = needs_raw(run) or how.pop("raw", False) or how["choice"] == "together"
    speak(run, names, raw=raw)
    settings = run.settings.amalgamate
    weighted = {"by_gain": settings.by_gain, "confidence": settings.confidence}
    keyed = {"spoken": [spoken(run, name).name for name in names], **how, **weighted, "raw": raw}
    folder = run.part("controls", kind, keyed)
    return folder, teach(run, names, folder, raw=raw, **how)


def speaker(run: Run, name: str) -> Speaker:
    """Describe a teacher as `Teaching` keeps it."""
    from pipeline.engine.teaching import Speaker

    row = next(row for row in rows_of(run) if row["teacher"] == name)
    gain = row.get("bridge_gain")
    weight = 1.0 if gain is None else max(float(gain), 0.0)
    return Speaker(name, classes_of(run, name), weight, str(spoken(run, name)))


def teach(run: Run, names: Sequence[str], folder: Path, *, choice: str | None = None, raw: bool | None = None) -> str:
    """Share the training images among teachers; return the digest of what the student is taught."""
    import torch

    from pipeline.engine.teaching import Teaching

    settings = run.settings.amalgamate
    choice = choice or choice_of(run.settings)
    if choice == "together":
        return _teach_together(run, names, folder)
    speak(run, names, raw=needs_raw(run) if raw is None else raw)
    speakers = [speaker(run, name) for name in names]
    gains = [one.gain for one in speakers]
    found = assign_carried(run, names, gains if settings.by_gain and max(gains) > 0 else None)
    samples = found.ambiguity.shape[1]
    if choice == "random":
        generator = torch.Generator().manual_seed(run.settings.seed)
        teacher = torch.randint(len(names), (samples,), generator=generator)
    else:
        teacher = found.teacher
    shares = torch.zeros(len(names), samples)
    if choice in ("least_ambiguous", "random"):
        shares[teacher, torch.arange(samples)] = 1.0
    else:
        weights = torch.tensor(gains if choice == "gain" and max(gains) > 0 else [1.0] * len(names))
        shares += (weights / weights.sum())[:, None]
    if settings.confidence:
        shares *= 1 - found.ambiguity
    split = _taught(run)
    costs = [ground_cost(run, name) for name in names]
    views = run.settings.distill.augment.views
    digest = Teaching.save(folder, ids=split.ids, speakers=speakers, costs=costs, shares=shares, views=views)
    _write_choice(run, folder, split, names, teacher, found.ambiguity, found.target)
    return digest_of([digest, list(names)])


def _teach_together(run: Run, names: Sequence[str], folder: Path) -> str:
    """Let teachers teach as one; how sure each of them is by itself is written down, too."""
    import torch

    from pipeline.amalgamation.ambiguity import assign
    from pipeline.engine.teaching import Teaching

    speak(run, names, raw=True)
    one, cost = speak_together(run, names)
    split = _taught(run)
    p = said_together(Path(one.folder), len(split))
    own = assign(p[None]).ambiguity
    shares = 1 - own if run.settings.amalgamate.confidence else torch.ones_like(own)
    views = run.settings.distill.augment.views
    digest = Teaching.save(folder, ids=split.ids, speakers=[one], costs=[cost], shares=shares, views=views)
    ambiguity = torch.cat([assign_carried(run, names).ambiguity, own])
    teacher = torch.full((len(split),), len(names))
    _write_choice(run, folder, split, [*names, TOGETHER], teacher, ambiguity, p)
    return digest_of([digest, list(names)])


def _taught(run: Run) -> ImageSplit:
    from pipeline.engine.arms import TAUGHT

    return table_of(run).split(*TAUGHT)


def _write_choice(
    run: Run,
    folder: Path,
    split: ImageSplit,
    names: Sequence[str],
    teacher: torch.Tensor,
    ambiguity: torch.Tensor,
    target: torch.Tensor,
) -> None:
    import torch

    write_assignments(folder, split.ids, {"": (names, teacher, ambiguity)})
    classes = torch.where(split.labels >= 0, split.labels, target.argmax(1))
    write_json(folder / "histograms.json", histograms(names, ambiguity, teacher, classes, table_of(run).classes))


def assign_carried(run: Run, names: Sequence[str], gains: Sequence[float] | None = None) -> Assignment:
    """Give every training image to the teacher that is least ambiguous of it, all carried to the task's classes."""
    import torch
    from safetensors import safe_open

    from pipeline.amalgamation.ambiguity import assign
    from pipeline.engine.spec import SPOKEN

    said, images = [], len(_taught(run))
    for name in names:
        with safe_open(here(spoken(run, name) / SPOKEN), "pt") as handle:
            said.append(handle.get_slice("carried")[:images].float())  # the first view is the image as it is
    carried = torch.stack(said)
    carried /= carried.sum(-1, keepdim=True)  # half precision rounds the sums away from 1
    return assign(carried, gains=gains)


def ground_cost(run: Run, name: str) -> torch.Tensor:
    """Return the ground cost (L_t, C_s) from a teacher's label space to the task's classes."""
    return load_bridge(teacher_folder(run, name)).M


def write_assignments(
    folder: Path, ids: Sequence[str], found: Mapping[str, tuple[Sequence[str], torch.Tensor, torch.Tensor]]
) -> None:
    """Write `assignments.parquet`: by sub-task ("" for a single one) teachers, who teaches, and all ambiguities."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {"sample_id": ids}
    for subtask, (names, teacher, ambiguity) in found.items():
        prefix = f"{subtask}." if subtask else ""
        columns[f"{prefix}teacher"] = [names[int(number)] for number in teacher]
        columns |= {f"{prefix}ambiguity.{name}": row.tolist() for name, row in zip(names, ambiguity, strict=True)}
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / ".assignments.parquet")
    (folder / ".assignments.parquet").replace(folder / "assignments.parquet")


def histograms(
    names: Sequence[str],
    ambiguity: torch.Tensor,
    teacher: torch.Tensor,
    classes: torch.Tensor,
    class_names: Sequence[str],
) -> dict[str, Any]:
    """Count ambiguities by teacher, and images by teacher and class (the label, or else what the teacher says).

    ``taught`` counts the images that a teacher teaches, ``surest`` those that it is the least ambiguous of: where
    teachers teach as one, that is what tells who knows what.
    """
    import torch

    edges = torch.linspace(0, 1, _BINS + 1)

    def by_class(teacher: torch.Tensor, names: Sequence[str]) -> dict[str, list[int]]:
        counts = torch.bincount(teacher * len(class_names) + classes, minlength=len(names) * len(class_names))
        return dict(zip(names, counts.view(len(names), -1).tolist(), strict=True))

    single = [name for name in names if name != TOGETHER]
    return {
        "edges": edges.tolist(),
        "ambiguity": {
            name: torch.histc(row, _BINS, 0, 1).int().tolist() for name, row in zip(names, ambiguity, strict=True)
        },
        "mean": {name: float(row.mean()) for name, row in zip(names, ambiguity, strict=True)},
        "classes": list(class_names),
        "taught": by_class(teacher, names),
        "surest": by_class(ambiguity[[names.index(name) for name in single]].argmin(0), single),
    }
