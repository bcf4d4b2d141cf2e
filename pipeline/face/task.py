"""A task for a notebook: images with their labels, wherever they are."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.config import TaskSettings
from pipeline.errors import DataError
from pipeline.face.kept import KEPT, keep
from pipeline.strict import validate

_PARTS = ("train_labelled", "probe", "validation", "test")


@dataclass(frozen=True)
class Task:
    """Images to be learnt, and how they are split.

    Attributes
    ----------
    settings : TaskSettings
        As in the section ``task`` of a settings file.
    name : str
        What a run is called unless it is told otherwise.
    """

    settings: TaskSettings
    name: str

    def __repr__(self) -> str:
        splits, (channels, height, width) = self.settings.splits, self.settings.image.shape
        counts = ", ".join(f"{name} {'the rest' if (n := getattr(splits, name)) is None else n}" for name in _PARTS)
        source = self.settings.source
        place = getattr(source, "path", None) or getattr(source, "name", None) or getattr(source, "factory", "")
        return (
            f"Task {self.name!r}: {source.type} {place}, {height} x {width} pixels of {channels} channels; "
            f"a class: {counts}"
        )


def load_task(
    images: Any,
    labels: Any = None,
    *,
    name: str | None = None,
    classes: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    storage: str = "raw",
    train_labelled: int | None = None,
    train_unlabelled: int | None = None,
    probe: int | None = None,
    validation: int | None = None,
    test: int | Literal["rest"] | None = None,
    test_source: Any = None,
    subtasks: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    keep_in: str | Path = KEPT,
    **source: Any,
) -> Task:
    """Return a task for `assess`; nothing is read before that, except arrays, which are written to a file.

    Parameters
    ----------
    images : path, str, mapping, array or tensor
        A folder with a folder for each class; ``.npz``; Parquet (a file, a folder of them, a glob); the name of a data
        set of torchvision (with ``root=``); a mapping with the keys of a ``task.source``, of any type; or images: uint8
        array (N, H, W) or (N, H, W, C), uint8 tensor (N, H, W) or (N, C, H, W).
    labels : sequence, optional
        With arrays: N class numbers (-1: none) or class names (None: none). Left out, no image has a label.
    name : str, optional
        Default: that of the folder, file or data set; ``task`` for arrays.
    classes : sequence of str, optional
        Class names in the order of the numbers. Default: what the source knows; of arrays the names found, sorted, or
        the numbers.
    only : sequence of str, optional
        The task's classes, if it wants fewer than the source has.
    image_size, channels, storage
        How images are stored, see ``task.image``; default 32 pixels and 3 channels, of arrays their own.
    train_labelled, probe, validation, test : int, optional
        Images of each class, see ``task.splits``; default 10, 10, 10, 100. All 0 for arrays without labels. ``"rest"``
        for `test`: all that no other split asks for.
    train_unlabelled : int, optional
        In total, whose labels are not used; default: the rest.
    test_source : optional
        A source of its own for the test split: what `images` may be, or (images, labels).
    subtasks : mapping, optional
        See ``task.subtasks``.
    keep_in : path
        Where arrays are written to, named by their content.
    **source
        Further settings of the source: ``root``, ``download``, ``unlabelled``, ``image_column``, …

    Raises
    ------
    DataError
        When images or labels are nothing that can be used, or do not fit each other.
    ConfigError
        When a setting is not valid.
    """
    named = {key: list(value) for key, value in (("classes", classes), ("only", only)) if value is not None}
    found, own_name, shape = _source(images, labels, named | source, Path(keep_in))
    if image_size is None:
        image_size = (shape[1], shape[2]) if shape else 32
    counts: dict[str, Any] = dict(train_labelled=train_labelled, probe=probe, validation=validation, test=test)
    if shape and labels is None:
        counts = {key: value or 0 for key, value in counts.items()}
    splits = {key: None if value == "rest" else value for key, value in counts.items() if value is not None}
    if train_unlabelled is not None:
        splits["train_unlabelled"] = train_unlabelled
    task: dict[str, Any] = {
        "source": found,
        "image": {"size": image_size, "channels": channels or (shape[0] if shape else 3), "storage": storage},
        "splits": splits,
    }
    if test_source is not None:
        held = test_source if isinstance(test_source, tuple) else (test_source, None)
        task["test_source"] = _source(held[0], held[1], named, Path(keep_in))[0]
        if test is None:
            splits["test"] = None
    if subtasks is not None:
        task["subtasks"] = {key: {k: tuple(v) for k, v in value.items()} for key, value in subtasks.items()}
    return Task(validate(TaskSettings, task, where="load_task"), _as_name(name or own_name))


def _source(
    images: Any, labels: Any, settings: Mapping[str, Any], keep_in: Path
) -> tuple[dict[str, Any], str, tuple[int, int, int] | None]:
    """Return the settings of a source, its name, and the shape (C, H, W) of images given as arrays."""
    if isinstance(images, Mapping):
        found = _with_absolute_paths(dict(images) | dict(settings))
        name = found.get("path") or found.get("name") or str(found.get("factory", "")).rpartition(":")[2]
        return found, Path(str(name)).stem, None
    if isinstance(images, str | Path):
        if labels is not None:
            raise DataError("load_task: `labels` belong to arrays; a folder or file has its own")
        return _place(str(images), settings)
    path, shape = _written(images, labels, settings.get("classes"), keep_in)
    rest = {key: value for key, value in settings.items() if key != "classes"}
    return {"type": "numpy", "path": str(path)} | rest, "task", shape


def _place(place: str, settings: Mapping[str, Any]) -> tuple[dict[str, Any], str, None]:
    path = Path(place).expanduser()
    if "://" not in place and not path.exists() and place.isidentifier():
        from torchvision import datasets  # costs seconds

        if place not in datasets.__all__:
            raise DataError(
                f"load_task: there is no folder or file {place!r}, and no data set of that name in torchvision"
            )
        root = _absolute(str(settings.get("root", "data")))
        return {"type": "torchvision", "name": place} | dict(settings) | {"root": root}, place, None
    if path.suffix == ".npz":
        kind = "numpy"
    elif path.suffix == ".parquet" or any(sign in place for sign in "*?") or _holds_parquet(path):
        kind = "parquet"
    elif "://" in place or path.exists():
        kind = "image_folder" if path.is_dir() else "parquet"
    else:
        raise DataError(f"load_task: {place}: does not exist; give a folder of images, an .npz or Parquet")
    if path.is_file() and path.suffix not in (".npz", ".parquet"):
        raise DataError(
            f"load_task: {place}: is neither a folder, nor .npz, nor .parquet; give it as a mapping of settings"
        )
    return {"type": kind, "path": _absolute(place)} | dict(settings), path.name if path.is_dir() else path.stem, None


def _holds_parquet(path: Path) -> bool:
    """Return whether Parquet files lie in a folder, or in its folder `data`, as data sets are published."""
    return path.is_dir() and any(any(place.glob("*.parquet")) for place in (path, path / "data"))


def _with_absolute_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a source as a settings file of the current folder would have them."""
    found = dict(settings)
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found[key] = _with_absolute_paths(value)
        elif key in ("path", "root") and isinstance(value, str | Path):
            found[key] = _absolute(str(value))
    return found


def _absolute(place: str) -> str:
    return place if "://" in place else str(Path(place).expanduser().absolute())


def _written(
    images: Any, labels: Any, classes: Sequence[str] | None, folder: Path
) -> tuple[Path, tuple[int, int, int]]:
    import numpy as np

    pixels = _pixels(images)
    arrays = {"images": pixels}
    if labels is not None:
        numbers, names = _numbers(labels, classes)
        if len(numbers) != len(pixels):
            raise DataError(
                f"load_task: {len(numbers)} labels for {len(pixels)} images; give one each (-1 or None: none)"
            )
        arrays["labels"] = numbers
    elif classes is None:
        raise DataError("load_task: images without labels tell no classes; name them in `classes`")
    else:
        names = list(classes)
    arrays["classes"] = np.array(names)
    digest = hashlib.sha256()
    for array in arrays.values():
        digest.update(f"{array.shape} {array.dtype} ".encode())
        digest.update(array.data)
    path = keep(folder, f"images-{digest.hexdigest()[:16]}.npz", lambda handle: np.savez(handle, **arrays))
    channels = 1 if pixels.ndim == 3 else pixels.shape[3]
    return path, (channels, pixels.shape[1], pixels.shape[2])


def _pixels(images: Any) -> Any:
    """Return images as a uint8 array (N, H, W) or (N, H, W, C)."""
    import numpy as np

    from_torch = type(images).__module__.split(".")[0] == "torch"
    array = images.detach().cpu().numpy() if from_torch else np.asarray(images)
    if from_torch and array.ndim == 4:
        array = array.transpose(0, 2, 3, 1)
    if array.dtype != np.uint8:
        raise DataError(f"load_task: images are {array.dtype}; convert them to uint8 in 0..255")
    if array.ndim not in (3, 4) or 0 in array.shape or (array.ndim == 4 and array.shape[3] not in (1, 3)):
        wanted = "(N, H, W) or (N, C, H, W)" if from_torch else "(N, H, W) or (N, H, W, C)"
        shown = tuple(images.shape) if from_torch else array.shape
        raise DataError(f"load_task: images have shape {shown}; give {wanted} with 1 or 3 channels")
    return np.ascontiguousarray(array[..., 0] if array.ndim == 4 and array.shape[3] == 1 else array)


def _numbers(labels: Any, classes: Sequence[str] | None) -> tuple[Any, list[str]]:
    """Return class numbers (N,), -1 for none, and the names of the classes."""
    import numpy as np

    given = [value.item() if hasattr(value, "item") else value for value in labels]
    known = [value for value in given if value is not None]
    if all(isinstance(value, str) for value in known):
        names = list(classes) if classes is not None else sorted(set(known))
        places = {name: number for number, name in enumerate(names)}
        strange = next((value for value in known if value not in places), None)
        if strange is not None:
            raise DataError(f"load_task: label {strange!r} is none of `classes`; add it there, or correct it")
        return np.array([-1 if value is None else places[value] for value in given], dtype=np.int64), names
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in known):
        raise DataError("load_task: labels must be class numbers or class names, all of one kind")
    numbers = np.array([-1 if value is None else value for value in given], dtype=np.int64)
    names = list(classes) if classes is not None else [str(k) for k in range(numbers.max(initial=-1) + 1)]
    if len(numbers) and not -1 <= numbers.min() <= numbers.max() < len(names):
        raise DataError(
            f"load_task: labels lie in {numbers.min()}..{numbers.max()} for {len(names)} classes; correct them"
        )
    return numbers, names


def _as_name(text: str) -> str:
    """Return what a run may be called."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-._") or "task"
