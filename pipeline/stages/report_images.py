"""What the report tells of single test and training images: confusion, calibration, worst mistakes, ambiguous ones."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.stages.base import Run
from pipeline.stages.report_facts import Absent, needs, read_json
from pipeline.stages.report_kept import kept_trainings
from pipeline.stages.together import TOGETHER

if TYPE_CHECKING:
    import numpy as np
    import torch

    from pipeline.data.table import ImageSplit

_BINS = 15  # as `pipeline.engine.evaluation.calibration_error` has them
_WHOLE = 60  # classes up to which every cell of a confusion is kept
_WITH = 8  # else the most frequent predictions of each class
_PAIRS = 8  # classes that are taken for each other most often
_EXAMPLES = 8
_MISTAKES = 16
_SIDE = 96  # pixels of an example, at most


def confusion(run: Run) -> dict[str, Any]:
    """Return whom the student takes for whom, head by head: cells [label, prediction, images]."""
    needs(run, "evaluate")
    evaluation = read_json(run.folder("evaluate") / "evaluation.json")
    if not evaluation["arms"]:
        raise Absent("the test split is empty (task.splits.test)")
    first = evaluation["arms"][0]["first"]
    found = first["confusion"]
    heads = []
    for name, counts in (found if isinstance(found, dict) else {"": found}).items():
        labels = [label.removeprefix(f"{name}/") for label in evaluation["classes"] if label.startswith(f"{name}/")]
        heads.append({"head": name} | cells_of(counts, labels if name else evaluation["classes"]))
    return {"heads": heads, "samples": first["samples"], "title": evaluation["arms"][0]["title"]}


def cells_of(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> dict[str, Any]:
    """Return a confusion (C, C) as cells; of many classes the most frequent predictions of each, and what is right."""
    import numpy as np

    found = np.asarray(counts, dtype=np.int64)
    whole = len(found) <= _WHOLE
    kept = found > 0
    if not whole:
        largest = np.zeros(found.shape, bool)
        np.put_along_axis(largest, np.argsort(-found, axis=1, kind="stable")[:, :_WITH], True, axis=1)
        np.fill_diagonal(largest, True)
        kept &= largest
    confused = found.copy()
    np.fill_diagonal(confused, 0)
    wrong = confused.sum(0) + confused.sum(1)
    order = np.argsort(-confused, axis=None, kind="stable")[:_PAIRS]
    pairs = [divmod(int(place), len(found)) for place in order if confused.flat[place]]
    return {
        "classes": list(classes),
        "cells": [[int(j), int(k), int(found[j, k])] for j, k in zip(*np.nonzero(kept), strict=True)],
        "totals": found.sum(1).tolist(),
        "wrong": wrong.tolist(),
        "whole": whole,
        "pairs": [[classes[j], classes[k], int(found[j, k])] for j, k in pairs],
    }


def calibration(run: Run) -> dict[str, Any]:
    """Return how often the student is right for how sure it is: confidence, accuracy and images of 15 bins.

    Of the training whose student is handed on, on the test images; ECE = Σ_b n_b / N · |accuracy_b − confidence_b|.
    """
    needs(run, "evaluate", "distill")
    import torch

    logits, labels, _ = _tested(run)
    curves = [{"name": "the student"} | reliability(logits.softmax(1), labels)]
    for one in kept_trainings(run.folder("evaluate")):
        if one.contender == "no_teacher":
            other = predictions_of(one.folder)
            if other is not None and other.shape == logits.shape and torch.isfinite(other).all():
                curves.append({"name": one.title} | reliability(other.softmax(1), labels))
            break
    return {"curves": curves, "images": len(labels)}


def reliability(probabilities: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Return bins [mean confidence, accuracy, images], those without images left out, and the ECE of them."""
    import torch

    confidence, predicted = probabilities.double().max(1)
    hit = (predicted == labels).double()
    index = (confidence * _BINS).ceil().long().clamp(1, _BINS) - 1
    count = torch.bincount(index, minlength=_BINS)
    sums = [torch.zeros(_BINS, dtype=torch.double).index_add(0, index, value) for value in (confidence, hit)]
    error = float((sums[1] - sums[0]).abs().sum() / len(labels))
    bins = [
        [float(sums[0][place] / count[place]), float(sums[1][place] / count[place]), int(count[place])]
        for place in range(_BINS)
        if count[place]
    ]
    return {"bins": bins, "ece": error, "confidence": float(confidence.mean()), "accuracy": float(hit.mean())}


def mistakes(run: Run) -> dict[str, Any]:
    """Return the test images that the student is surest of and wrong about."""
    needs(run, "evaluate", "distill")
    import torch

    logits, labels, split = _tested(run)
    p = logits.softmax(1)
    confidence, predicted = p.max(1)
    wrong = torch.nonzero(predicted != labels)[:, 0]
    if not len(wrong):
        return {"images": [], "wrong": 0, "of": len(labels)}
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)[:_MISTAKES]]
    classes = split.classes
    return {
        "images": [
            {
                "picture": picture,
                "label": classes[labels[row]],
                "predicted": classes[predicted[row]],
                "confidence": float(confidence[row]),
                "label_probability": float(p[row, labels[row]]),
                "id": split.ids[row],
            }
            for row, picture in zip(worst.tolist(), pictures(split.images(worst).numpy()), strict=True)
        ],
        "wrong": len(wrong),
        "of": len(labels),
    }


def _tested(run: Run) -> tuple[torch.Tensor, torch.Tensor, ImageSplit]:
    """Return the student's logits (N, C) on the test images, their labels and the images."""
    from pipeline.stages.teachers import table_of

    if run.settings.task.subtasks is not None:
        raise Absent("the student has a head for each of several sub-tasks")
    split = table_of(run).split("test")
    logits = predictions_of(run.folder("distill"))
    if not len(split):
        raise Absent("the test split is empty (task.splits.test)")
    if logits is None or logits.shape != (len(split), len(split.classes)):
        raise Absent("the student's predictions of the test images were not kept")
    return logits.float(), split.labels, split


def predictions_of(folder: Path) -> torch.Tensor | None:
    """Return the logits of the test images that a training left; None where it did not."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / "predictions.safetensors", "pt") as handle:
            return handle.get_tensor("test")
    except (OSError, SafetensorError):
        return None


def examples(run: Run) -> dict[str, Any]:
    """Return the training images that their teacher is least and most sure of, by sub-task."""
    needs(run, "amalgamate")
    import numpy as np
    import pyarrow.parquet as pq

    from pipeline.engine.arms import TAUGHT
    from pipeline.stages.teachers import table_of

    path = run.folder("amalgamate") / "assignments.parquet"
    if not path.is_file():
        raise Absent("no teacher was chosen")
    split = table_of(run).split(*TAUGHT)
    columns = pq.read_schema(path).names
    prefixes = [name.removesuffix("teacher") for name in columns if name == "teacher" or name.endswith(".teacher")]
    groups = []
    for prefix in prefixes:
        start = f"{prefix}ambiguity."
        names = [name.removeprefix(start) for name in columns if name.startswith(start)]
        table = pq.read_table(path, columns=[f"{prefix}teacher", *(start + name for name in names)])
        if len(table) != len(split):
            raise Absent("the assignments are of another image table")
        unsure = np.stack([table.column(start + name).to_numpy() for name in names])
        place = {name: number for number, name in enumerate(names)}
        teacher = np.array([place[name] for name in table.column(f"{prefix}teacher").to_pylist()])
        own = unsure[teacher, np.arange(len(teacher))]
        order = np.argsort(own, kind="stable")
        single = [number for number, name in enumerate(names) if name != TOGETHER]
        surest = np.array(single)[unsure[single].argmin(0)]
        groups.append(
            {
                "subtask": prefix.removesuffix("."),
                "least": _described(split, order[:_EXAMPLES], own, teacher, surest, names),
                "most": _described(split, order[::-1][:_EXAMPLES], own, teacher, surest, names),
            }
        )
    return {"groups": groups, "of": len(split)}


def _described(
    split: ImageSplit, rows: np.ndarray, own: np.ndarray, teacher: np.ndarray, surest: np.ndarray, names: Sequence[str]
) -> list[dict[str, Any]]:
    import torch

    chosen = torch.from_numpy(rows.copy())
    labels = split.labels[chosen].tolist()
    return [
        {
            "picture": picture,
            "ambiguity": float(own[row]),
            "teacher": names[teacher[row]],
            "surest": names[surest[row]],
            "label": split.classes[label] if label >= 0 else None,
            "id": split.ids[row],
        }
        for row, label, picture in zip(rows.tolist(), labels, pictures(split.images(chosen).numpy()), strict=True)
    ]


def pictures(images: np.ndarray) -> list[str]:
    """Return images (n, C, H, W) uint8 as PNG data URIs of at most 96 pixels a side; of more than 3 channels the first.

    Two channels are shown by their first one.
    """
    from PIL import Image

    found = []
    for pixels in images:
        seen = pixels[:3].transpose(1, 2, 0) if len(pixels) >= 3 else pixels[0]
        picture = Image.fromarray(seen)
        picture.thumbnail((_SIDE, _SIDE))
        content = io.BytesIO()
        picture.save(content, "PNG", optimize=True)
        found.append(f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}")
    return found
