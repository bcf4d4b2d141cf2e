"""The probe: images of the task that teachers are assessed on, sent to every node once; and one teacher on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import AssessSettings
from pipeline.data.mirror import here
from pipeline.errors import ConfigError, StageError, TeacherError
from pipeline.stages.base import Run
from pipeline.stages.outputs import CachedTeacher, outputs_of
from pipeline.stages.own_scores import GIVEN, score_own
from pipeline.stages.teachers import (
    TeacherJob,
    has_labels,
    outputs_folder,
    save_bridge,
    save_tensors,
    table_of,
    teacher_folder,
)

if TYPE_CHECKING:
    import torch

    from pipeline.assessment.estimate import Estimate
    from pipeline.models.teacher import Teacher

LABELLED = ("train_labelled", "probe", "validation")
_FITTED, _SCORED, _HELD, _UNLABELLED = range(4)  # the parts of the probe
_OUTPUTS = "outputs.safetensors"


@dataclass(frozen=True)
class ProbePayload:
    """What travels to the worker that assesses one teacher."""

    job: TeacherJob
    outputs: str
    cached: CachedTeacher
    settings: AssessSettings
    last_rung: int


def build_probe(run: Run, rungs: Sequence[float]) -> dict[str, Any]:
    """Read the images that teachers are assessed on: all labelled ones, or some without where no label is there.

    Parameters
    ----------
    run : Run
    rungs : sequence of float
        The share of the images that is looked at on each rung.

    Returns
    -------
    dict
        ``images`` (N, C, H, W) uint8, ``ids`` (N, 16) uint8, ``labels``, ``part`` and ``rung`` (N,): arrays that Ray
        shares among the processes of a node; ``classes``; and ``vectors`` of the words in names of classes, if they are
        wanted.
    """
    import torch

    from pipeline.assessment.rungs import rung_of

    settings, table = run.settings.assess, table_of(run)
    labelled = has_labels(run)
    images, ids, labels, parts, first = [], [], [], [], []
    for part, name in enumerate(LABELLED) if labelled else ((_UNLABELLED, "train_unlabelled"),):
        split = table.split(name)
        if not labelled:
            split = split.take(torch.arange(min(settings.unlabelled, len(split))))
        images.append(split.images())
        ids.append(torch.from_numpy(split.raw_ids))
        labels.append(split.labels)
        parts.append(torch.full((len(split),), part, dtype=torch.int8))
        # Validation images are looked at last: they judge sets of teachers, and the student.
        last = torch.full((len(split),), len(rungs) - 1, dtype=torch.int8)
        first.append(last if part == _HELD else rung_of(split.labels, rungs))
    return {
        "images": torch.cat(images).numpy(),
        "ids": torch.cat(ids).numpy(),
        "labels": torch.cat(labels).numpy(),
        "part": torch.cat(parts).numpy(),
        "rung": torch.cat(first).numpy(),
        "classes": table.classes,
        "vectors": None if labelled else word_vectors(run, table.classes),
    }


def word_vectors(run: Run, classes: tuple[str, ...]) -> dict[str, torch.Tensor] | None:
    """Read the vectors of the words in all names of classes; None where names are compared by their spelling."""
    from pipeline.transport.names import load_vectors, name_words

    path = run.settings.assess.names.path
    if path is None:
        return None
    names = {name for teacher in run.zoo.values() for name in class_names_of(teacher)} | set(classes)
    try:
        return load_vectors(path, {word for name in names for word in name_words(name)})
    except (OSError, ValueError) as error:
        raise ConfigError(f"assess.names.path: {error}; give a file of word vectors in GloVe's text format") from None


def class_names_of(spec: Any) -> tuple[str, ...]:
    """Return the names of a teacher's classes as the zoo has them; () where only its source knows them."""
    from pipeline.models.class_names import class_names

    if isinstance(spec.classes, str):
        return class_names(spec.classes)
    return spec.classes or ()


def assess_teacher(payload: ProbePayload, *, rung: int, shared: dict[str, Any]) -> dict[str, Any]:
    """Score one teacher on the images of a rung; runs on a worker.

    What it says of them is kept, so that a later rung, or other settings, run it over other images alone. After the
    last rung its bridge is kept, too, and what it says, carried to the task's classes, for the choice of the set.
    """
    import torch

    rows = torch.nonzero(torch.from_numpy(shared["rung"].copy()) <= rung)[:, 0]
    said = _outputs(payload, shared, rows)
    row: dict[str, Any] = {
        "classes": said["logits"].shape[1],
        "parameters": int(said["about"]["parameters"]),
        "precision": said["about"]["precision"],
        "images": len(rows),
        "forward_seconds": float(said["about"]["seconds"]),
        "top_k_loss": float(said["about"].get("lost", 0.0)),
        "note": said["about"].get("note", ""),
    }
    labelled = bool((shared["part"] != _UNLABELLED).any())
    estimate, scores = (_score_labelled if labelled else _score_unlabelled)(payload, shared, rows, said, rung)
    return row | scores | {"score": estimate.value, "score_low": estimate.low, "score_high": estimate.high}


def _score_labelled(
    payload: ProbePayload, shared: dict[str, Any], rows: torch.Tensor, outputs: dict[str, Any], rung: int
) -> tuple[Estimate, dict[str, float]]:
    import torch

    from pipeline.assessment.probe import Said, score_labelled
    from pipeline.transport.bridge import fit_bridge
    from pipeline.transport.cost import transport_gain

    settings, num_classes = payload.settings, len(shared["classes"])
    labels, part = torch.from_numpy(shared["labels"][rows]), torch.from_numpy(shared["part"][rows])
    seen = part != _HELD
    said = Said(
        logits=outputs["logits"][seen],
        features=outputs["features"][seen],
        labels=labels[seen],
        fitted=part[seen] == _FITTED,
        classifier_weight=outputs.get("classifier_weight"),
        parameters=int(outputs["about"]["parameters"]),
    )
    estimate, scores = score_labelled(said, num_classes, scores=settings.scores, neighbours=settings.neighbours)
    about = {name: getattr(said, name) for name in GIVEN if name != "num_classes"}
    scores |= score_own(settings, about | {"num_classes": num_classes})
    if rung < payload.last_rung:
        return estimate, scores
    fitted = part == _FITTED
    bridge = fit_bridge(
        settings.bridge.kind,
        logits=outputs["logits"][fitted],
        features=outputs["features"][fitted],
        labels=labels[fitted],
        num_classes=num_classes,
        classifier_weight=outputs.get("classifier_weight"),
        temperature=settings.bridge.temperature,
    )
    said_of = {
        name: bridge.distribution(outputs["logits"][part == number], outputs["features"][part == number])
        for number, name in ((_SCORED, "probe"), (_HELD, "validation"))
    }
    scores["bridge_gain"] = transport_gain(said_of["probe"], labels[part == _SCORED], bridge.M)
    save_bridge(payload.job, bridge, {name: bridge.carry(p) for name, p in said_of.items()})
    return estimate, scores


def _score_unlabelled(
    payload: ProbePayload, shared: dict[str, Any], rows: torch.Tensor, outputs: dict[str, Any], rung: int
) -> tuple[Estimate, dict[str, float]]:
    from pipeline.assessment.estimate import Estimate
    from pipeline.assessment.unlabelled import certainty, information
    from pipeline.transport.bridge import given_bridge
    from pipeline.transport.names import name_words, names_cost

    names, vectors = outputs["about"]["classes"].split("\n"), shared["vectors"]
    if vectors is not None and not any(word in vectors for name in names for word in name_words(name)):
        vectors = None  # names that only the teacher's source knows: compared by their spelling
    M = names_cost(names, shared["classes"], vectors=vectors)
    bridge = given_bridge(M, temperature=payload.settings.bridge.temperature)
    carried = bridge.carry(bridge.distribution(outputs["logits"], outputs["features"]))
    told = information(carried)
    about = {name: outputs.get(name) for name in ("logits", "features", "classifier_weight")}
    about |= {"num_classes": len(shared["classes"]), "parameters": int(outputs["about"]["parameters"])}
    if rung == payload.last_rung:
        save_bridge(payload.job, bridge, {"unlabelled": carried})
    scores = {"information": told, "certainty": certainty(carried)}
    return Estimate(told, told, told), scores | score_own(payload.settings, about)


def _outputs(payload: ProbePayload, shared: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """Return what the teacher says of `rows`, and what is known of it; run it over those it has not seen."""
    import torch

    folder = Path(payload.outputs)
    known = _read_outputs(folder)
    missing = rows if known is None else rows[~torch.isin(rows, known["rows"])]
    if len(missing):
        fresh = _run_teacher(payload, shared, missing, None if known is None else known["about"]["precision"])
        if known is not None:
            fresh |= {key: torch.cat([known[key], fresh[key]]) for key in ("rows", "logits", "features")}
            before, now = known["about"], fresh["about"]
            now["seconds"] = str(float(before["seconds"]) + float(now["seconds"]))
            parts = (float(before.get("lost", 0)) * len(known["rows"]), float(now["lost"]) * len(missing))
            now["lost"] = str(sum(parts) / len(fresh["rows"]))
        known = fresh
        save_tensors(folder, _OUTPUTS, {k: v for k, v in known.items() if k != "about"}, known["about"])
    assert known is not None
    places = torch.empty(int(max(known["rows"].max(), rows.max())) + 1, dtype=torch.long)
    places[known["rows"]] = torch.arange(len(known["rows"]))
    return known | {key: known[key][places[rows]] for key in ("logits", "features")}


def _read_outputs(folder: Path) -> dict[str, Any] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(here(folder / _OUTPUTS, newest=True), "pt") as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()} | {"about": handle.metadata()}
    except (OSError, SafetensorError):  # not there, or cut off: the teacher says it again
        return None


def labelled_features(run: Run, name: str) -> torch.Tensor:
    """Return the features (N, D) of an assessed teacher for all labelled images, split by split in `LABELLED`'s order.

    Raises
    ------
    StageError
        If they are no longer there, or a search dropped the teacher before it had seen all images.
    """
    import torch

    known = _read_outputs(outputs_folder(run, name))
    table = table_of(run)
    wanted = sum(len(table.split(split)) for split in LABELLED)
    if known is None or len(known["rows"]) < wanted:
        assessed = f"{teacher_folder(run, name)} and {run.folder('assess')}"
        raise StageError(
            f"{outputs_folder(run, name)}: what {name!r} says of the labelled images is no longer there; remove "
            f"{assessed}, and run again"
        )
    features: torch.Tensor = known["features"][torch.argsort(known["rows"])]
    return features.float()


@dataclass(frozen=True)
class ProbeLogits:
    """What an assessed teacher said of the probe, on disk.

    Attributes
    ----------
    path : Path
    classes : tuple of str
        Its own, C_t names.
    """

    path: Path
    classes: tuple[str, ...]

    def pieces(self, size: int = 4096) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield places in the probe (n,) and logits (n, C_t) of at most `size` images at a time."""
        from safetensors import safe_open

        with safe_open(self.path, "pt") as handle:
            rows, logits = handle.get_tensor("rows"), handle.get_slice("logits")
            for start in range(0, len(rows), size):
                yield rows[start : start + size], logits[start : start + size].float()


def probe_logits(run: Run, name: str) -> ProbeLogits:
    """Return what a teacher that has been run said of the probe.

    Raises
    ------
    StageError
        If it is no longer there.
    """
    from safetensors import SafetensorError, safe_open

    path = here(outputs_folder(run, name) / _OUTPUTS, newest=True)
    try:
        with safe_open(path, "pt") as handle:
            return ProbeLogits(path, tuple(handle.metadata()["classes"].split("\n")))
    except (OSError, SafetensorError, KeyError, TypeError):
        raise StageError(f"{path}: what {name!r} says of the labelled images is no longer there") from None


def classes_of(run: Run, name: str) -> tuple[str, ...]:
    """Return the class names of a teacher that has been run."""
    known = _read_outputs(outputs_folder(run, name))
    return class_names_of(run.zoo[name]) if known is None else tuple(known["about"]["classes"].split("\n"))


def _run_teacher(
    payload: ProbePayload, shared: dict[str, Any], rows: torch.Tensor, precision: str | None
) -> dict[str, Any]:
    import torch

    from pipeline.models.precision import choose_autocast

    teacher, settings = payload.job.load().fold(), payload.settings
    where, images = rows.numpy(), shared["images"]
    if precision is None:
        autocast = choose_autocast(teacher, torch.from_numpy(images[where[: settings.batch_size]]), settings.precision)
    else:  # as on the rung before
        autocast = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision)
    said = outputs_of(
        payload.cached,
        lambda: teacher,
        shared["ids"][where],
        lambda places: torch.from_numpy(images[where[places.numpy()]]),
        batch_size=settings.batch_size,
        autocast=autocast,
    )
    tensors: dict[str, Any] = {"rows": rows, "logits": said.logits, "features": said.features}
    if teacher.classifier_weight is not None:
        tensors["classifier_weight"] = teacher.classifier_weight.float().cpu()
    about = {
        "parameters": str(teacher.num_parameters),
        "precision": "fp32" if autocast is None else str(autocast).removeprefix("torch."),
        "seconds": f"{said.seconds:.6f}",
        "lost": str(said.lost),
        "note": said.note,
        "classes": "\n".join(_checked(teacher)),
    }
    return tensors | {"about": about}


def _checked(teacher: Teacher) -> tuple[str, ...]:
    if any("\n" in name for name in teacher.classes):
        raise TeacherError(f"teacher {teacher.name!r}: a class name has a line break; correct `classes`")
    return teacher.classes
