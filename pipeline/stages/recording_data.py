"""What is recorded of the images and of who teaches them: data sets as inputs, ambiguities, choices by class."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.stages.recording import optional, recorded
from pipeline.tracking.tracker import Tracker

if TYPE_CHECKING:
    from pipeline.data.table import ImageSplit, ImageTable
    from pipeline.stages.base import Run

# What each split is for.
CONTEXTS = {
    "train_labelled": "training",
    "train_unlabelled": "training",
    "probe": "probe",
    "validation": "validation",
    "test": "test",
}
_WITHOUT_LABEL = "(no label)"


@dataclass(frozen=True)
class Dataset:
    """A split of the task's images, as it is recorded.

    Attributes
    ----------
    name, digest, source, context : str
        The digest is of its images and labels, in their order.
    profile : dict
        Number of images, and by class.
    """

    name: str
    digest: str
    source: str
    context: str
    profile: dict[str, Any]


def datasets(table: ImageTable, name: str, sources: Mapping[str, str], contexts: tuple[str, ...] = ()) -> list[Dataset]:
    """Describe the splits of a table that hold images.

    Parameters
    ----------
    table : ImageTable
    name : str
        What the task is called.
    sources : mapping of str to str
        ``source``, and ``test_source`` where the test split has its own.
    contexts : tuple of str
        Those to describe; () for all.
    """
    found = []
    for split, context in CONTEXTS.items():
        images = table.split(split)
        if not len(images) or (contexts and context not in contexts):
            continue
        source = sources.get("test_source") if split == "test" else None
        profile = {"images": len(images), "classes": _counts(images), "shape": list(images.image_shape)}
        found.append(Dataset(f"{name}.{split}", _digest(images), source or sources["source"], context, profile))
    return found


def _digest(images: ImageSplit) -> str:
    digest = hashlib.sha256(images.raw_ids.tobytes())
    digest.update(images.labels.numpy().tobytes())
    return digest.hexdigest()


def _counts(images: ImageSplit) -> dict[str, int]:
    names = (_WITHOUT_LABEL, *images.classes)
    counts = (images.labels + 1).bincount(minlength=len(names)).tolist()
    return {name: count for name, count in zip(names, counts, strict=True) if count}


def record_datasets(run: Run, table: ImageTable, *contexts: str, root: bool = False) -> None:
    """Record the splits that a stage uses as its inputs; those of the whole run with `root`, too.

    Parameters
    ----------
    run : Run
    table : ImageTable
    *contexts : str
        ``training``, ``probe``, ``validation``, ``test``; none for all.
    root : bool
    """
    if not recorded(run):
        return
    with optional("the data sets"):
        task = run.settings.task
        sources = {"source": source_name(task.source)}
        if task.test_source is not None:
            sources["test_source"] = source_name(task.test_source)
        for one in datasets(table, run.settings.name, sources, contexts):
            for tracker in (run.tracker, run.root) if root else (run.tracker,):
                tracker.dataset(
                    one.name, digest=one.digest, source=one.source, context=one.context, profile=one.profile
                )


def source_name(source: Any) -> str:
    """Return where images come from, as a path or URI: ``torchvision://NAME`` for a published set."""
    place = getattr(source, "path", None)
    named = getattr(source, "name", None) or getattr(source, "factory", "")
    return str(place) if place is not None else f"{source.type}://{named}"


def record_choices(run: Run, folder: Path) -> None:
    """Record who teaches what and how unsure everyone is, from `histograms.json`, as numbers, tables and pictures."""
    from pipeline.report.plots import plot_histograms

    with optional("who teaches what"):
        path = folder / "histograms.json"
        found = json.loads(path.read_text(encoding="utf-8"))
        pictures = []
        for name, one in subtasks(found):
            picture = folder / f"histograms{'-' if name else ''}{name}.png"
            plot_histograms(one, picture)
            pictures.append(picture)
        if not recorded(run):
            return
        run.tracker.artifact(path)
        for picture in pictures:
            run.tracker.artifact(picture)
        record_histograms(run.tracker, found)


def subtasks(found: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and histograms of every sub-task; "" for a single task."""
    yield from ({"": dict(found)} if "edges" in found else found).items()


def record_histograms(tracker: Tracker, found: Mapping[str, Any]) -> None:
    """Record histograms as numbers and tables.

    Numbers: ``taught.TEACHER``, its share of the images, ``surest.TEACHER``, the share that it is the least ambiguous
    of, and ``ambiguity.TEACHER``, its mean. Tables: `ambiguity`, a row a teacher and bin, and `choices` and `surest`, a
    row a class with the images of each teacher. Who teaches an image is settled before the student is trained, and
    every epoch passes over all of them: the choices are those of each epoch.
    """
    bins: list[dict[str, Any]] = []
    counted: dict[str, list[dict[str, Any]]] = {"taught": [], "surest": []}
    for name, one in subtasks(found):
        prefix, named = (f"{name}.", {"subtask": name}) if name else ("", {})
        tracker.metrics({f"{prefix}ambiguity.{teacher}": mean for teacher, mean in one.get("mean", {}).items()})
        edges = list(zip(one["edges"], one["edges"][1:], strict=False))
        bins += [
            named | {"teacher": teacher, "from": round(low, 4), "to": round(high, 4), "images": count}
            for teacher, counts in one["ambiguity"].items()
            for (low, high), count in zip(edges, counts, strict=True)
        ]
        for what, rows in counted.items():
            shared = one.get(what, {})
            total = max(sum(map(sum, shared.values())), 1)
            tracker.metrics({f"{prefix}{what}.{teacher}": sum(counts) / total for teacher, counts in shared.items()})
            rows += [
                named | {"class": label} | {teacher: counts[place] for teacher, counts in shared.items()}
                for place, label in enumerate(one["classes"])
            ]
    tracker.table("ambiguity", bins)
    tracker.table("choices", counted["taught"])
    tracker.table("surest", counted["surest"])
