"""How many images the task has in each split: from the finished table, or from the settings and the source's lists."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Settings
from pipeline.data.spec import ImageFolderSource, NumpySource, ParquetSource, SourceSpec

LABELLED = ("train_labelled", "probe", "validation")
TAUGHT = ("train_labelled", "train_unlabelled")
TESTED = ("probe", "validation", "test")


@dataclass(frozen=True)
class Facts:
    """What is known of the task's images.

    Attributes
    ----------
    classes : int
    shape : (int, int, int)
        Channels, height, width of a stored image.
    images : mapping of str to int
        By split.
    source : int or None
        Images that the stage ingest reads; None: not known without reading them.
    notes : tuple of str
        What had to be assumed.
    """

    classes: int
    shape: tuple[int, int, int]
    images: Mapping[str, int]
    source: int | None
    notes: tuple[str, ...] = ()

    def count(self, *splits: str) -> int:
        """Return the images of some splits together."""
        return sum(self.images.get(split, 0) for split in splits)

    @property
    def rows(self) -> int:
        """Images of the table."""
        return sum(self.images.values())


def facts_of(settings: Settings, ingested: Mapping[str, Any] | None) -> Facts:
    """Find out what the images are.

    Parameters
    ----------
    settings : Settings
    ingested : mapping, optional
        The summary of the finished stage ingest.

    Raises
    ------
    DataError
        When the source can't be opened.
    """
    task, shape = settings.task, settings.task.image.shape
    if ingested is not None:
        splits = {name: int(ingested.get(name, 0)) for name in (*LABELLED, "train_unlabelled", "test")}
        return Facts(int(ingested["classes"]), shape, splits, None)
    from pipeline.data.sources import open_source

    classes = len(open_source(task.source).classes)
    total = count_images(task.source)
    tested = None if task.test_source is None else count_images(task.test_source)
    splits, notes = _split(settings, classes, total, tested)
    read = None if total is None or (task.test_source is not None and tested is None) else total + (tested or 0)
    return Facts(classes, shape, splits, read, notes)


def _split(
    settings: Settings, classes: int, total: int | None, tested: int | None
) -> tuple[dict[str, int], tuple[str, ...]]:
    spec, own_test = settings.task.splits, settings.task.test_source is not None
    fixed = {name: getattr(spec, name) * classes for name in LABELLED}
    notes: list[str] = []
    test = None if spec.test is None else spec.test * classes
    if own_test:
        if test is None and tested is None:
            notes.append("the test source does not say how many images it has: none are counted")
        test = tested or 0 if test is None else test
    used = sum(fixed.values()) + (0 if own_test else test or 0)
    rest = None if total is None else max(total - used, 0)
    if total is None and (spec.train_unlabelled is None or test is None):
        notes.append("the source does not say how many images it has: those of no fixed number are not counted")
    unlabelled = spec.train_unlabelled if spec.train_unlabelled is not None else rest or 0
    if test is None:
        test = max((rest or 0) - unlabelled, 0)
    if total is not None and used + unlabelled > total:
        notes.append(f"the splits ask for {used + unlabelled} images, the source has {total}")
    return fixed | {"train_unlabelled": unlabelled, "test": test}, tuple(notes)


def count_images(source: SourceSpec) -> int | None:
    """Return how many images a source lists, without decoding one; None where it would have to be read.

    With the source's `only` it is the count before classes are left out.
    """
    if isinstance(source, ParquetSource):
        from pyarrow import dataset

        path: Any = source.path
        if "://" not in path:
            path = os.path.expanduser(path)
            if not Path(path).exists():
                path = sorted(glob.glob(path, recursive=True))
        return dataset.dataset(path, format="parquet").count_rows()
    if isinstance(source, NumpySource):
        from pipeline.data.numpy_archive import NumpyArchive

        return NumpyArchive(source.path).header("images")[0][0]
    if isinstance(source, ImageFolderSource):
        root = os.path.expanduser(source.path)
        return sum(not name.startswith(".") for folder, _, names in os.walk(root) if folder != root for name in names)
    return None


def on_first_rung(count: int, classes: int, share: float) -> int:
    """Return how many of `count` images, spread evenly over the classes, a rung looks at: ⌈s n_k⌉ of each class."""
    return min(count, classes * math.ceil(share * count / classes - 1e-9)) if classes else 0
