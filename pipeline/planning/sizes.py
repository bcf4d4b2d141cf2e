"""Bytes on disk and in shared memory, from the layouts of the files that the stages write.

Shapes: N images, T teachers, V views, C_t classes and D_t features of teacher t, L_t its label space, C_s classes of
the task.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from pipeline.cache.entry import Entry
from pipeline.cache.shard import ID_BYTES
from pipeline.cache.spec import Precision
from pipeline.planning.teachers import TeacherSize

_ALIGNED = 8  # bytes to which Arrow fills up a buffer in a file
_ROW = ID_BYTES + 4 + 1  # of an image table besides the pixels: id, label, split
_SAFETENSORS = 512  # header of a file of a few tensors


def output_columns(classes: int, features: int, *, precision: Precision, top_k: int | None) -> dict[str, int]:
    """Return what the cache keeps of one image: column to bytes, see `pipeline.stages.outputs`.

    Values are taken to be within the range of half precision where that is wanted, see `pipeline.cache.store.compact`.
    """
    item = 2 if precision == "fp16" else 4
    if top_k is None or top_k >= classes:
        return {"features": item * features, "logits": item * classes}
    number = 2 if classes <= torch.iinfo(torch.int16).max + 1 else 4
    kept = {"indices": number * top_k, "lost": item, "rest": item, "values": item * top_k}
    return {"features": item * features, **kept}


def shard_bytes(rows: int, columns: Mapping[str, int], *, classes: int = 1) -> int:
    """Return the size of one shard of the cache.

    8 ⌈16 n / 8⌉ + Σ_c 8 ⌈n w_c / 8⌉ and what the format adds, which is taken from a shard of one image that is written
    for it.

    Parameters
    ----------
    rows : int
        n ≥ 1.
    columns : mapping of str to int
        Bytes w_c of an image in each, as `output_columns` gives them.
    classes : int
        As the shard says of itself.
    """
    return _payload(rows, columns) + _format_bytes(tuple(sorted(columns.items())), len(str(classes)))


def _payload(rows: int, columns: Mapping[str, int]) -> int:
    return sum(_filled(rows * width) for width in (ID_BYTES, *columns.values()))


def _filled(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


@lru_cache
def _format_bytes(columns: tuple[tuple[str, int], ...], digits: int) -> int:
    tensors = {name: torch.zeros(1, width, dtype=torch.uint8) for name, width in columns}
    with tempfile.TemporaryDirectory(prefix="faculty-plan-") as folder:
        entry = Entry(Path(folder) / "entry")
        name = entry.put(np.zeros((1, ID_BYTES), np.uint8), tensors, {"classes": "1" * digits})
        return (entry.path / name).stat().st_size - _payload(1, dict(columns))


def cache_bytes(
    teachers: Iterable[TeacherSize], shards: Iterable[int], *, precision: Precision, top_k: int | None
) -> int:
    """Return what the cache takes for teachers that each say something of the same images.

    Parameters
    ----------
    teachers : iterable of TeacherSize
        Of one whose widths are not known nothing is counted.
    shards : iterable of int
        Images of each shard: one a rung of the assessment, one a block and view of the training images.
    precision, top_k
        See `pipeline.cache.spec.CacheSpec`.
    """
    sizes = [rows for rows in shards if rows]
    total = 0
    for teacher in teachers:
        widths = widths_of(teacher)
        if widths is not None:
            columns = output_columns(*widths, precision=precision, top_k=top_k)
            total += sum(shard_bytes(rows, columns, classes=widths[0]) for rows in sizes)
    return total


def widths_of(teacher: TeacherSize) -> tuple[int, int] | None:
    """Return (C_t, D_t); None where its net does not tell."""
    if teacher.net is None or teacher.classes is None:
        return None
    features = teacher.classes if teacher.net.features is None else teacher.net.features
    return teacher.classes, features


def probe_bytes(images: int, shape: tuple[int, int, int]) -> int:
    """Return what the probe takes in each node's object store: pixels, ids, labels, part and rung of each image."""
    return images * (math.prod(shape) + ID_BYTES + 8 + 1 + 1)


def table_bytes(images: int, shape: tuple[int, int, int], encoded: float | None = None) -> int:
    """Return the size of an image table; `encoded` are the mean bytes of an encoded image, None for raw pixels."""
    return round(images * ((math.prod(shape) if encoded is None else encoded + 4) + _ROW))


def outputs_bytes(teachers: Iterable[TeacherSize], images: int) -> int:
    """Return what the run folder keeps of the assessment: logits, features and rows in single precision."""
    known = [widths for widths in map(widths_of, teachers) if widths is not None]
    return sum(images * (4 * (classes + features) + 8) + 4 * classes * features for classes, features in known)


def spoken_bytes(
    classes: int, features: int, label_space: int, task_classes: int, *, images: int, views: int, raw: bool
) -> int:
    """Return what is kept of one teacher's say of the training images: p (V N, L), carried (V N, C_s), and with `raw`
    logits (V N, C_t) and features (V N, D_t), all in half precision.
    """  # noqa: D205
    width = label_space + task_classes + ((classes + features) if raw else 0)
    return 2 * views * images * width + _SAFETENSORS * (2 if raw else 1)


def training_state_bytes(parameter_bytes: int, weight_bytes: int, optimiser: str, momentum: float, ema: bool) -> int:
    """Return what a checkpoint of a student takes: weights, two moments (AdamW) or one (SGD), the running average."""
    moments = 2 if optimiser == "adamw" else 1 if momentum > 0 else 0
    return weight_bytes * (2 if ema else 1) + moments * parameter_bytes
