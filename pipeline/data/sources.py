"""Where samples come from: streams of raw images with a label each, and the names of the classes."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from pipeline.data.spec import ImageFolderSource, NumpySource, OwnSource, ParquetSource, SourceSpec, TorchvisionSource
from pipeline.errors import DataError

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
_MAX_BYTES = 256 << 20  # no sensible image file is larger, and it would have to be held in memory


@dataclass(frozen=True)
class RawSample:
    """One sample as its source has it.

    Attributes
    ----------
    image : bytes, ndarray, PIL image or None
        Encoded; or (H, W) or (H, W, C) uint8. None if it can't be read, see `problem`.
    label : int or None
        Class number.
    origin : str
        Where it comes from: a file, or a row of one.
    problem : str
        Why there is no image.
    """

    image: bytes | np.ndarray | Image.Image | None
    label: int | None
    origin: str
    problem: str = ""


class Source(Protocol):
    """A stream of samples that can be gone through once more.

    Attributes
    ----------
    classes : tuple of str
        Names by class number.
    where : str
        The source in one phrase, for errors.
    """

    classes: tuple[str, ...]
    where: str

    def __iter__(self) -> Iterator[RawSample]: ...


def open_source(spec: SourceSpec) -> Source:
    """Open a source; nothing but its names and lists is read yet.

    Raises
    ------
    DataError
        If a file, column or class name is missing, or a name stands for two classes.
    """
    source: Source
    if isinstance(spec, ParquetSource):
        from pipeline.data.parquet import ParquetImages

        source = ParquetImages(spec)
    elif isinstance(spec, ImageFolderSource):
        source = FolderImages(spec)
    elif isinstance(spec, TorchvisionSource):
        source = TorchvisionImages(spec)
    elif isinstance(spec, OwnSource):
        from pipeline.data.own import OwnImages

        source = OwnImages(spec)
    else:
        source = NumpyImages(spec)
    if len(set(source.classes)) < max(2, len(source.classes)):
        raise DataError(
            f"{source.where}: a task needs two or more classes with different names, found "
            f"{', '.join(source.classes)}; list them in the source's `classes`"
        )
    return source if spec.only is None else _Only(source, spec.only)


class LabelReader:
    """Turns the labels of a source into class numbers.

    Parameters
    ----------
    classes : sequence of str
    where : str
    """

    def __init__(self, classes: Sequence[str], where: str) -> None:
        self._numbers = {name: number for number, name in enumerate(classes)}
        self._where = where

    def __call__(self, value: Any, origin: str) -> int | None:
        """Return the class number; None for null or -1.

        Raises
        ------
        DataError
            If the label is no class.
        """
        if value is None:
            return None
        if isinstance(value, str):
            number = self._numbers.get(value)
        elif isinstance(value, int | np.integer):
            if value == -1:
                return None
            number = int(value) if 0 <= value < len(self._numbers) else None
        else:
            raise DataError(f"{origin}: label is {value!r}; it must be an integer, a class name or null")
        if number is None:
            raise DataError(
                f"{origin}: label {value!r} is outside the {len(self._numbers)} classes of {self._where}; "
                "correct it, or name every class in the source's `classes`"
            )
        return number


class FolderImages:
    """A folder for each class, in the order of their names.

    Parameters
    ----------
    spec : ImageFolderSource
    """

    def __init__(self, spec: ImageFolderSource) -> None:
        self._root = Path(spec.path).expanduser()
        self.where = f"image folder {self._root}"
        try:
            folders = sorted(entry.name for entry in os.scandir(self._root) if entry.is_dir() and entry.name[0] != ".")
        except OSError as error:
            raise DataError(f"{self._root}: can't be read ({error.strerror}); check the source's `path`") from None
        if spec.unlabelled is not None and spec.unlabelled not in folders:
            raise DataError(f"{self._root / spec.unlabelled}: no such folder; check the source's `unlabelled`")
        found = [name for name in folders if name != spec.unlabelled]
        self.classes = tuple(spec.classes or found)
        missing = [name for name in self.classes if name not in found]
        if not found or missing:
            wanted = f"folder for class {missing[0]!r}" if missing else "class folders"
            raise DataError(f"{self._root}: has no {wanted}; check the source's `path` and `classes`")
        if len(found) > len(self.classes):
            extra = next(name for name in found if name not in self.classes)
            raise DataError(f"{self._root / extra}: is no class of the source's `classes`; add it there, or use `only`")
        self._folders: list[tuple[str, int | None]] = [(name, number) for number, name in enumerate(self.classes)]
        if spec.unlabelled is not None:
            self._folders.append((spec.unlabelled, None))

    def __iter__(self) -> Iterator[RawSample]:
        """Yield the class folders' files, sorted by name."""
        for name, label in self._folders:
            for path in image_files(self._root / name):
                try:
                    if os.path.getsize(path) > _MAX_BYTES:
                        yield RawSample(None, label, path, f"is larger than {_MAX_BYTES >> 20} MiB")
                        continue
                    with open(path, "rb") as handle:
                        content = handle.read()
                except OSError as error:
                    yield RawSample(None, label, path, f"can't be read ({error.strerror})")
                else:
                    yield RawSample(content, label, path)


class TorchvisionImages:
    """A data set of ``torchvision.datasets``.

    Parameters
    ----------
    spec : TorchvisionSource
    """

    def __init__(self, spec: TorchvisionSource) -> None:
        from torchvision import datasets  # costs seconds, and only this source needs it

        self.where = f"torchvision {spec.name} in {spec.root}"
        names = [name for name in datasets.__all__ if isinstance(getattr(datasets, name), type)]
        if spec.name not in names:
            near = difflib.get_close_matches(spec.name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see the list in torchvision's documentation"
            raise DataError(f"torchvision.datasets has no {spec.name!r}; {hint}")
        cls = getattr(datasets, spec.name)
        accepted = inspect.signature(cls.__init__).parameters
        arguments: dict[str, Any] = {"root": os.path.expanduser(spec.root), "download": spec.download}
        arguments["train"] = spec.train
        if spec.split is not None or "train" not in accepted:
            arguments["split"] = spec.split or ("train" if spec.train else "test")
        try:
            self._data = cls(**{name: value for name, value in arguments.items() if name in accepted})
        except Exception as error:  # each data set has its own: RuntimeError, FileNotFoundError, ValueError, …
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"{self.where}: can't be opened ({reason}); check `root`, `split`, or set `download: true`"
            ) from None
        self.classes = named(spec.classes or getattr(self._data, "classes", None), self.where)
        self._label = LabelReader(self.classes, self.where)

    def __iter__(self) -> Iterator[RawSample]:
        """Yield the data set's items in its order."""
        for number in range(len(self._data)):
            origin = f"{self.where}, item {number}"
            try:
                image, target = self._data[number]
            except (OSError, SyntaxError, ValueError) as error:  # how Pillow rejects a damaged file
                yield RawSample(None, None, origin, f"can't be read ({error})")
                continue
            if hasattr(target, "item") and getattr(target, "ndim", 1) == 0:
                target = target.item()
            if not isinstance(image, Image.Image | np.ndarray):
                raise DataError(f"{origin}: is a {type(image).__name__}, not an image; choose an image data set")
            yield RawSample(image, self._label(target, origin), origin)


class NumpyImages:
    """A NumPy archive; its images are read in pieces, never pickled objects.

    Parameters
    ----------
    spec : NumpySource
    """

    def __init__(self, spec: NumpySource) -> None:
        from pipeline.data.numpy_archive import NumpyArchive

        self._archive = NumpyArchive(spec.path)
        self.where = f"NumPy archive {spec.path}"
        labels = self._archive.read("labels")
        names = spec.classes or self._archive.read("classes")
        if names is None and labels is not None and labels.dtype.kind == "U":
            names = np.unique(labels)
        self.classes = named(names, self.where)
        shape, dtype = self._archive.header("images")
        if dtype != np.uint8 or len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)):
            raise DataError(
                f"{spec.path}: `images` is {dtype} of shape {shape}; it must be uint8 (N, H, W), (N, H, W, 1) or "
                "(N, H, W, 3)"
            )
        if labels is not None and (labels.shape != shape[:1] or labels.dtype.kind not in "iuU"):
            raise DataError(
                f"{spec.path}: `labels` is {labels.dtype} of shape {labels.shape}; it must hold {shape[0]} integers or "
                "class names, one an image"
            )
        self._labels = labels
        self._label = LabelReader(self.classes, self.where)

    def __iter__(self) -> Iterator[RawSample]:
        """Yield the images in their order."""
        for number, image in enumerate(self._archive.rows("images")):
            origin = f"{self.where}, image {number}"
            label = None if self._labels is None else self._labels[number].item()
            yield RawSample(image, self._label(label, origin), origin)


class _Only:
    """The samples of some classes of a source, renumbered."""

    def __init__(self, source: Source, only: Sequence[str]) -> None:
        unknown = [name for name in only if name not in source.classes]
        if unknown:
            near = difflib.get_close_matches(unknown[0], source.classes, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(source.classes[:20])}"
            raise DataError(f"{source.where}: `only` names {unknown[0]!r}, which is no class of it; {hint}")
        self._source, self.where, self.classes = source, source.where, tuple(only)
        self._new = {source.classes.index(name): number for number, name in enumerate(only)}

    def __iter__(self) -> Iterator[RawSample]:
        for sample in self._source:
            if sample.label is None:
                yield sample
            elif sample.label in self._new:
                yield replace(sample, label=self._new[sample.label])


def named(names: Any, where: str) -> tuple[str, ...]:
    """Return class names as a tuple, or say that there are none."""
    if names is None or not len(names):
        raise DataError(f"{where}: has no class names; list them in the source's `classes`, in the order of the labels")
    return tuple(map(str, names))


def image_files(folder: Path) -> Iterator[str]:
    """Yield the image files under a folder, sorted, without hidden ones; links to folders are not followed."""

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: can't be read ({error.strerror}); check its permissions")

    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in sorted(files):
            if name[0] != "." and os.path.splitext(name)[1].lower() in _SUFFIXES:
                yield os.path.join(parent, name)
